"""Scores against labels: agreement in all and by group, with intervals over sessions; two sets of scores compared.

Reads a folder of scores and the labels of a store or a manifest, writes `metrics.json`, `groups.parquet` and pictures.
The headline is *pooled*: one CCC over all utterances, as in training. It rewards knowing the session as well as
following it, so `within_ccc`, of predictions and labels less their means over the session, is given beside it. CCC is
defined in `metrics`, on biased variances unless `evaluate.variance` says otherwise; intervals in `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.config import Config
from vaemo.drawing import write_pictures
from vaemo.errors import UsageError
from vaemo.evaluation import pictures
from vaemo.evaluation.bootstrap import METRICS, Resampled, SessionSums, defined, metrics_of
from vaemo.evaluation.fed import replay_fed
from vaemo.evaluation.pairs import Pairs, choose_split, has_features, in_common, leave_out, read_pairs, warn_of_used
from vaemo.metrics import spearman, spearman_interval
from vaemo.model.checkpoint import ERRORS, WEIGHTS
from vaemo.model.settling import ErrorByPosition, drawn_to_mean
from vaemo.trust import coverage, groups
from vaemo.trust.beside import Column, column_of
from vaemo.units import CALIB, SPLITS

GROUPS = ("session_id", "speaker_id", "role", "split", "fold", "position")
POSITIONS = (0, 5, 10, 20, 40)
"""Where a range of positions in the session begins; the last has no end."""

FIRST = 2
"""How many utterances are a session's start, on which extremes seldom fall by right."""

MIN_PER_SESSION = 5
"""A session with fewer labelled utterances has no CCC of its own worth averaging."""


def evaluate(
    scored: str,
    labels: str,
    out: str,
    config: Config,
    *,
    split: str | None = None,
    exclude: str | None = None,
    compare: str | None = None,
    checkpoint: str | None = None,
    by: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a folder of scores and write the results.

    Args:
        scored: The folder of scores.
        labels: A store or a manifest.
        out: Where `metrics.json`, `groups.parquet` (every metric of every group), `calibration.png`,
            `error_over_session.png`, `error_by_position.png` and, with a checkpoint, `label_fed.png` go.
        config: `evaluate`, and `labels.range` where the labels are on the corpus's own scale.
        split: Only this split. Left out: `test` where any row has it, else all rows, with a warning.
        exclude: A Parquet file with `utt_id` (and `session_id`) of utterances to leave out.
        compare: Another folder of scores, to be compared on the utterances that both have.
        checkpoint: A model, to be replayed over these utterances' sessions with labels fed and running free; the
            labels must be a store that has its features.
        by: Columns of the labels or the scores by which results are grouped and compared, too.

    Returns:
        The content of `metrics.json`; `measure` says what a set of metrics is. `excluded` has the `list` and how many
        pairs of score and label it left out, whatever their split. `label_fed` is as `compare_pairs` has
        it, first with labels fed, second running free; `error_by_position` as `ErrorByPosition.to_dict`; `coverage`
        as `coverage_of` has it; `by` for each column as `by_group` has it.

    Raises:
        LabelError, ReadScoresError: as `read_pairs`, `choose_split`, `leave_out`, `in_common`.
        UsageError: if `out` is a checkpoint.
        UsageError, FeatureMismatchError: as `replay_fed`.
    """
    if checkpoint is not None and not has_features(labels):
        raise UsageError(f"--checkpoint needs features to replay, and {labels} is a manifest; give --labels STORE.")
    if files.exists(files.join(out, WEIGHTS)):
        raise UsageError(f"--out {out} is a checkpoint, whose metrics.json would be lost. Give another folder.")
    pairs, excluded = read_pairs(scored, labels, config), {}
    if exclude is not None:
        every, pairs = pairs, leave_out(pairs, exclude)
        excluded = {"excluded": {"list": str(exclude), "n": len(every) - len(pairs)}}
    chosen, tested = choose_split(pairs, split, excluded=exclude is not None)
    if chosen != "all" or excluded:
        # Else a warning of all splits has been printed.
        warn_of_used(tested, scored)
    about = {"scores": str(scored), "labels": str(labels), "split": chosen, **excluded, **_facts(tested, config)}
    result: dict[str, Any] = {**about, **_measures(pairs, tested, config)}
    errors = _errors_by_position(tested)
    result[ERRORS] = errors.to_dict()
    result["extremes_at_start"] = extremes_at_start(tested)
    divided = {name: _rows_by(tested, name) for name in ("position", "split", "fold", "role")}
    if (covered := coverage.coverage_of(tested, scored, divided)) is not None:
        result["coverage"] = covered
    if by:
        grouped = {name: column_of(tested, scored, labels, name, config.evaluate, chosen) for name in by}
        result["by"] = {name: _by(tested, column, config) for name, column in grouped.items()}
    if compare is not None:
        both = in_common(tested, read_pairs(compare, labels, config, quiet=True))
        warn_of_used(both[1], compare)
        result["compare"] = {"scores": str(compare), **compare_pairs(*both, config)}
    drawn = _drawn(tested, errors)
    if checkpoint is not None:
        fed, free = replay_fed(tested, labels, checkpoint, config)
        result["label_fed"] = {"checkpoint": str(checkpoint), **compare_pairs(fed, free, config)}
        drawn["label_fed"] = partial(
            pictures.label_fed, fed.prediction, free.prediction, free.label, *free.time_in_session(), free.names
        )
    files.write_json(files.join(out, "metrics.json"), result)
    tables = [_group_table(tested, by, config) for by in GROUPS]
    files.write_parquet_whole(files.join(out, "groups.parquet"), pa.concat_tables(tables))
    write_pictures(out, drawn)
    return result


def _facts(pairs: Pairs, config: Config) -> dict[str, Any]:
    """What the numbers are of, and how CCC is defined."""
    return {
        "variance": config.evaluate.variance,
        "label_range": [pairs.scale.low, pairs.scale.high],
        "native_range": _native_range(pairs),
        "targets": list(pairs.names),
        "session_targets": list(session_names_of(pairs)),
        "not_scored": pairs.not_scored,
        "sessions_not_scored": pairs.sessions_not_scored,
    }


def _measures(pairs: Pairs, tested: Pairs, config: Config) -> dict[str, Any]:
    """Every metric of the chosen split: of all its utterances together, over sessions, and part by part.

    Args:
        pairs: Of all splits, each of which is measured too.
        tested: Of the chosen split.
        config: Section `evaluate`.
    """
    splits = {name: pairs.select(pairs.column("split") == name) for name in (*SPLITS, CALIB)}
    per_fold = per_group(tested, "fold", config)
    return {
        "pooled": measure(tested, config),
        "per_session": _over_sessions(tested, config),
        "fold_mean": _mean_of(per_fold),
        "per_split": {name: measure(each, config) for name, each in splits.items() if len(each)},
        "per_fold": per_fold,
        "per_role": per_group(tested, "role", config),
        "per_position": per_group(tested, "position", config),
    }


def _by(pairs: Pairs, column: Column, config: Config) -> dict[str, Any]:
    measured = partial(measure, config=config)
    return {
        **groups.by_group(pairs, column.group, column.names, measured, config.evaluate),
        "unfit": column.unfit,
    }


def _errors_by_position(pairs: Pairs) -> ErrorByPosition:
    """The errors of the targets of utterances."""
    n_own = len(pairs.names) - pairs.n_session
    own = pairs.prediction[:, :n_own], pairs.label[:, :n_own]
    return ErrorByPosition.of(*own, pairs.sessions(), pairs.order_in_session, pairs.names[:n_own])


def _drawn(pairs: Pairs, errors: ErrorByPosition) -> dict[str, Callable[[], bytes]]:
    """The pictures of an evaluation, by name."""
    at, unit = pairs.time_in_session()
    return {
        "calibration": partial(pictures.calibration, pairs.prediction, pairs.label, pairs.scale, pairs.names),
        "error_over_session": partial(
            pictures.error_over_session, pairs.prediction, pairs.label, at, unit, pairs.names
        ),
        "error_by_position": partial(pictures.error_by_position, errors),
    }


def measure(pairs: Pairs, config: Config) -> dict[str, Any]:
    """Every metric of these utterances.

    Returns:
        `n`, `n_sessions`, and for each metric (those of `METRICS`) `ccc_valence`, `ccc_arousal`, whatever the targets
        are, and their mean `ccc_avg`; RMSE also as `rmse_native_valence`, ... where the corpus has a range of its own.
        A target of the session, one pair a session, has `spearman_NAME` too: such labels are ordinal and skewed.
        `ci95`: [low, high] of each, where there are two sessions or more. Undefined metrics are None.
    """
    sums = sums_of(pairs)
    resampled = Resampled.of([sums], config.evaluate)
    result: dict[str, Any] = {
        "n": int((~np.isnan(pairs.label)).any(axis=1).sum()),
        "n_sessions": len(sums.values),
        **_named(resampled.estimate, pairs),
    }
    if config.evaluate.bootstrap and len(sums.values) > 1:
        bounds = {name: resampled.interval(name) for name in METRICS}
        low = _named({name: bound[0] for name, bound in bounds.items()}, pairs)
        high = _named({name: bound[1] for name, bound in bounds.items()}, pairs)
        result["ci95"] = {name: [low[name], high[name]] for name in low}
    for k, name in enumerate(session_names_of(pairs), len(pairs.names) - pairs.n_session):
        known = ~(np.isnan(pairs.prediction[:, k]) | np.isnan(pairs.label[:, k]))
        rho = spearman(pairs.prediction[known, k], pairs.label[known, k])
        result[f"n_{name}"], result[f"spearman_{name}"] = int(known.sum()), defined(rho)
        if "ci95" in result:
            result["ci95"][f"spearman_{name}"] = [defined(end) for end in spearman_interval(rho, int(known.sum()))]
    return result


def session_names_of(pairs: Pairs) -> tuple[str, ...]:
    """The targets of sessions among those of the pairs."""
    return pairs.names[len(pairs.names) - pairs.n_session :]


def sums_of(pairs: Pairs) -> SessionSums:
    """What each session of these utterances adds to the metrics."""
    return SessionSums.of(pairs.prediction, pairs.label, pairs.sessions(), pairs.n_session)


def per_group(pairs: Pairs, by: str, config: Config) -> dict[str, dict[str, Any]]:
    """`measure` for each value of a column of `place`, or each range of positions; null values are left out."""
    return {name: measure(pairs.select(rows), config) for name, rows in _rows_by(pairs, by)}


def compare_pairs(first: Pairs, second: Pairs, config: Config) -> dict[str, Any]:
    """The difference, first less second, of two sets of scores on the same utterances, by paired bootstrap.

    Returns:
        `n`, `n_sessions`, and per metric, as `ccc_avg`: `first`, `second`, `difference`, `ci95`, `p`; see
        `Resampled.less`.
    """
    sums = [sums_of(pairs) for pairs in (first, second)]
    one, other = (Resampled.of([each], config.evaluate) for each in sums)
    result: dict[str, Any] = {"n": len(first), "n_sessions": len(sums[0].values)}
    for metric in METRICS:
        difference = one.less(other, metric)
        for k, name in enumerate((*first.names, "avg")):
            result[f"{metric}_{name}"] = {
                "first": defined(one.estimate[metric][k]),
                "second": defined(other.estimate[metric][k]),
                "difference": defined(difference.estimate[k]),
                "ci95": [defined(difference.low[k]), defined(difference.high[k])],
                "p": defined(difference.p[k]),
            }
    return result


def extremes_at_start(pairs: Pairs, first: int = FIRST) -> dict[str, Any]:
    """How often the lowest or the highest value of a session falls on its first utterances.

    Args:
        pairs: Sessions with fewer than `MIN_PER_SESSION` utterances that have all labels are left out, and those whose
            first utterances lack one.
        first: How many utterances.

    Returns:
        `utterances`, `n_sessions`, and for every target of utterances the shares for `scores`, for scores that were
        drawn to the mean by their weights, as the sessions' table does it (`weighed`), and for `labels`; None without
        sessions. An extreme that several utterances have counts by the share of them.
    """
    n_own = len(pairs.names) - pairs.n_session
    known = ~np.isnan(pairs.label[:, :n_own]).any(axis=1)
    kept = pairs.select(known)
    session, early = kept.sessions(), kept.order_in_session < first
    long = ((np.bincount(session) >= MIN_PER_SESSION) & (np.bincount(session, early) == first))[session]
    kept, early = kept.select(long), early[long]
    session = kept.sessions()
    result: dict[str, Any] = {"utterances": first, "n_sessions": int(session.max(initial=-1)) + 1}
    for k, name in enumerate(pairs.names[:n_own]):
        score, weight = kept.prediction[:, k], kept.weight[:, k]
        n = np.bincount(session, weight)
        mean = (np.bincount(session, weight * score) / n)[session] if len(session) else score
        values = {"scores": score, "weighed": drawn_to_mean(score, weight, mean), "labels": kept.label[:, k]}
        result[name] = {whose: _share_early(value, session, early) for whose, value in values.items()}
    return result


def _share_early(values: np.ndarray, session: np.ndarray, early: np.ndarray) -> float | None:
    """The share of extremes, lowest and highest of every session, that rows of `early` have."""
    if not len(values):
        return None
    found = []
    for sign in (1.0, -1.0):
        least = np.full(session.max() + 1, np.inf)
        np.minimum.at(least, session, sign * values)
        there = (sign * values == least[session]).astype(np.float64)
        found.append(np.bincount(session, there * early) / np.bincount(session, there))
    return float(np.mean(found))


def table_of(result: Mapping[str, Any]) -> str:
    """A summary as lines of text: the pooled metrics with intervals, the splits, the comparison."""
    pooled, names = result["pooled"], result["targets"]
    lines = [
        f"{pooled['n']:,} utterances of {pooled['n_sessions']:,} sessions, split: {result['split']} "
        f"(CCC on {result['variance']} variances; 95 % intervals over sessions)",
        "",
        " " * 22 + "".join(f"{name:<26}" for name in (*names, "average")),
    ]
    lines += [_line(title, pooled, metric, names) for title, metric in _shown_metrics(result).items()]
    if len(result["per_split"]) > 1:
        lines += ["", *(_line(f"CCC {split}", each, "ccc", names) for split, each in result["per_split"].items())]
    if (extremes := result.get("extremes_at_start", {})).get("n_sessions"):
        lines += ["", _extremes_line(extremes, [name for name in names if name in extremes])]
    if "compare" in result:
        compared = result["compare"]
        lines += [
            "",
            f"less {compared['scores']}, on the same {compared['n']:,} utterances:",
            *_differences(compared, names),
        ]
    if "label_fed" in result:
        fed = result["label_fed"]
        lines += ["", "with the labels of earlier utterances fed, less running free:", *_differences(fed, names)]
    if "coverage" in result:
        lines += coverage.table_of(result["coverage"])
    if "by" in result:
        lines += groups.table_of(result["by"])
    if result["not_scored"]:
        missing = ", ".join(f"{count:,} {status}" for status, count in result["not_scored"].items())
        lines += ["", f"labelled but without a score: {missing}"]
    for name, count in result["sessions_not_scored"].items():
        lines += ["", f"sessions with a label of {name} but without a score: {count:,}"]
    return "\n".join(line.rstrip() for line in lines)


def _shown_metrics(result: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of `table_of` by their titles."""
    shown = {
        "CCC": "ccc",
        "CCC within sessions": "within_ccc",
        "Pearson's r": "pearson",
        "RMSE": "rmse",
        "MAE": "mae",
        "bias": "bias",
    }
    if native := result["native_range"]:
        title = "RMSE, native ranges" if isinstance(native, Mapping) else f"RMSE on [{native[0]:g}, {native[1]:g}]"
        shown[title] = "rmse_native"
    if result["session_targets"]:
        shown["Spearman's rho"] = "spearman"
    return shown


def _named(values: Mapping[str, np.ndarray], pairs: Pairs) -> dict[str, float | None]:
    names = (*pairs.names, "avg")
    named = {f"{metric}_{name}": value[k] for metric, value in values.items() for k, name in enumerate(names)}
    if pairs.native is not None:
        wider = np.array([pairs.native[name].width / pairs.scale.width for name in pairs.names])
        # A mean of errors on different scales is meaningless.
        wider = np.append(wider, wider[0] if (wider == wider[0]).all() else np.nan)
        named |= {f"rmse_native_{name}": values["rmse"][k] * wider[k] for k, name in enumerate(names)}
    return {name: defined(value) for name, value in named.items()}


def _rows_by(pairs: Pairs, by: str) -> Iterator[tuple[str, np.ndarray]]:
    numbers, names = _group_codes(pairs, by)
    for number, name in enumerate(names):
        if (numbers == number).any():
            yield name, numbers == number


def _group_codes(pairs: Pairs, by: str) -> tuple[np.ndarray, list[str]]:
    if by != "position":
        return pairs.codes(by)
    ends = [f"-{end}" for end in POSITIONS[1:]] + ["-"]
    names = [f"{start + 1}{end}" for start, end in zip(POSITIONS, ends, strict=True)]
    return np.searchsorted(POSITIONS, pairs.order_in_session, side="right") - 1, names


def _group_sums(pairs: Pairs, by: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The sums of every group, (G, K, 11), its name, and its number of sessions, without a loop over groups."""
    numbers, names = _group_codes(pairs, by)
    some = pairs.select(numbers >= 0)
    numbers = numbers[numbers >= 0]
    session, _ = some.codes("session_id")
    (group, _), cell = np.unique(np.stack([numbers, session]), axis=1, return_inverse=True)
    # The part of a session in a group counts as a session there.
    sums = SessionSums.of(some.prediction, some.label, cell).of_groups(group)
    return sums, names[: len(sums)], np.bincount(group, minlength=len(sums))


def _group_table(pairs: Pairs, by: str, config: Config) -> pa.Table:
    """One row per group: `by`, `group`, `n`, `n_sessions` and the metrics."""
    sums, names, n_sessions = _group_sums(pairs, by)
    values = metrics_of(sums, config.evaluate.variance, pairs.n_session)
    columns: dict[str, Any] = {
        "by": pa.array([by] * len(names), pa.string()),
        "group": pa.array(names, pa.string()),
        "n": pa.array(sums[..., 0].max(axis=1).astype(np.int64)),
        "n_sessions": pa.array(n_sessions, pa.int64()),
    }
    columns |= {
        f"{metric}_{name}": pa.array(value[:, k], pa.float64(), from_pandas=True)
        for metric, value in values.items()
        for k, name in enumerate((*pairs.names, "avg"))
    }
    table = pa.table(columns)
    return table.filter(pa.array(n_sessions > 0))


def _over_sessions(pairs: Pairs, config: Config) -> dict[str, Any]:
    """Mean and median of the sessions' own metrics, and how many sessions are long enough to have them."""
    sums, _, _ = _group_sums(pairs, "session_id")
    # A target of the session has no agreement within one.
    n_own = len(pairs.names) - pairs.n_session
    sums = sums[:, :n_own]
    long = sums[..., 0].min(axis=1, initial=np.inf) >= MIN_PER_SESSION
    values = metrics_of(sums[long], config.evaluate.variance) if n_own else {}
    result: dict[str, Any] = {"n_sessions": int(long.sum()), "min_utterances": MIN_PER_SESSION}
    for statistic, summarise in (("mean", np.mean), ("median", np.median)):
        result[statistic] = {}
        for metric, value in values.items():
            for k, name in enumerate((*pairs.names[:n_own], "avg")):
                finite = value[np.isfinite(value[:, k]), k]
                result[statistic][f"{metric}_{name}"] = defined(summarise(finite)) if len(finite) else None
    return result


def _mean_of(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None] | None:
    """The plain mean of every metric over groups; None where there is no group."""
    if not groups:
        return None
    names = [name for name in next(iter(groups.values())) if name not in ("n", "n_sessions", "ci95")]
    known = {name: [group[name] for group in groups.values() if group[name] is not None] for name in names}
    return {name: defined(np.mean(values)) if values else None for name, values in known.items()}


def _native_range(pairs: Pairs) -> list[float] | dict[str, list[float]] | None:
    if pairs.native is None:
        return None
    ends = {name: [own.low, own.high] for name, own in pairs.native.items()}
    first, *others = ends.values()
    return first if all(other == first for other in others) else ends


def _extremes_line(extremes: Mapping[str, Any], names: Sequence[str]) -> str:
    shares = "; ".join(
        f"{name} {of['scores']:.0%} ({of['weighed']:.0%} where early scores count less, labels {of['labels']:.0%})"
        for name, of in ((name, extremes[name]) for name in names)
    )
    return f"lowest or highest of a session on its first {extremes['utterances']} utterances: {shares}"


def _line(title: str, measured: Mapping[str, Any], metric: str, names: Sequence[str]) -> str:
    bounds = measured.get("ci95", {})
    keys = (f"{metric}_{name}" for name in (*names, "avg"))
    cells = (_cell(measured.get(key), bounds.get(key)) for key in keys)
    return f"{title:<22}" + "".join(f"{cell:<26}" for cell in cells)


def _differences(compared: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for title, metric in _DIFFERENCES:
        cells = (compared[f"{metric}_{name}"] for name in (*names, "avg"))
        yield f"{title:<22}" + "".join(f"{_cell(cell['difference'], cell['ci95']):<26}" for cell in cells)


_DIFFERENCES = (("difference of CCC", "ccc"), ("  within sessions", "within_ccc"), ("difference of RMSE", "rmse"))


def _cell(value: float | None, bounds: list | None) -> str:
    text = "-" if value is None else f"{value:.3f}"
    if bounds and None not in bounds:
        text += f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    return text
