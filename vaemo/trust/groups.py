"""Results by group of speakers: agreement, bias and error of each, and the largest gap, corrected for multiple
comparisons.

CCC alone misleads between groups: it falls where the labels of a group vary less, with errors of the same size. So
bias and mean absolute error are given beside it. A gap between two groups that were picked for being the furthest apart
is judged against the largest gap that resampled speakers give, over all pairs and both dimensions.

Letters: C components (sessions linked by speakers), G groups, B draws.

Source:
    Westfall and Young (1993), Resampling-based multiple testing: the distribution of the largest statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vaemo.config import EvaluateConfig
from vaemo.data.splits import linked_sessions
from vaemo.evaluation.bootstrap import SessionSums, metrics_of
from vaemo.evaluation.pairs import Pairs
from vaemo.tables import codes

FEW_SPEAKERS = 10
"""A group of fewer speakers is small: its numbers may be those of a few voices, and no gap is computed from it."""

COMPARED = ("ccc", "mae", "bias")


def by_group(
    pairs: Pairs,
    group: np.ndarray,
    names: Sequence[str],
    measure: Callable[[Pairs], dict[str, Any]],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Every group measured, and the largest gaps.

    Args:
        pairs: Of the split that is judged by.
        group: Of each row, -1 = none.
        names: Of the groups.
        measure: As `vaemo.evaluation.evaluate.measure`.
        config: Resamples and their seed.

    Returns:
        `groups`: by name what `measure` gives, with `n_speakers` and `small`. `largest_gap`: by metric the two groups
        that are furthest apart among those that are not small, in standard errors, with `difference` and `p`, the
        chance of such a gap anywhere if there were none; None where fewer than two groups are large enough.
    """
    speaker = codes(pc.coalesce(pairs.place["speaker_id"], pairs.place["session_id"]))
    groups = {}
    for number, name in enumerate(names):
        rows = group == number
        if rows.any():
            n_speakers = len(np.unique(speaker[rows]))
            groups[name] = {**measure(pairs.select(rows)), "n_speakers": n_speakers, "small": n_speakers < FEW_SPEAKERS}
    large = [number for number, name in enumerate(names) if name in groups and not groups[name]["small"]]
    return {"groups": groups, "largest_gap": _largest_gaps(pairs, group, names, speaker, large, config)}


def _largest_gaps(
    pairs: Pairs,
    group: np.ndarray,
    names: Sequence[str],
    speaker: np.ndarray,
    large: Sequence[int],
    config: EvaluateConfig,
) -> dict[str, Any] | None:
    if len(large) < 2 or not config.bootstrap:
        return None
    rows = np.isin(group, large)
    some, place = pairs.select(rows), np.searchsorted(large, group[rows])
    component = linked_sessions(some.sessions(), np.unique(speaker[rows], return_inverse=True)[1])
    n_components, n_groups = int(component.max()) + 1, len(large)
    cells = SessionSums.of(some.prediction, some.label, component * n_groups + place).values
    sums = np.zeros((n_components * n_groups, *cells.shape[1:]))
    sums[: len(cells)] = cells
    flat = sums.reshape(n_components, -1)
    random = np.random.default_rng(config.seed)
    times = random.multinomial(n_components, np.full(n_components, 1 / n_components), size=config.bootstrap)
    shape = (n_groups, *cells.shape[1:])
    one, other = np.triu_indices(n_groups, 1)
    found = {}
    estimates = metrics_of(flat.sum(axis=0).reshape(shape), config.variance)
    drawn = metrics_of((times @ flat).reshape(config.bootstrap, *shape), config.variance)
    for metric in COMPARED:
        both = slice(len(pairs.names))
        gap = (estimates[metric][one] - estimates[metric][other])[:, both]
        gaps = (drawn[metric][:, one] - drawn[metric][:, other])[..., both]
        with np.errstate(invalid="ignore"):
            error = np.nanstd(gaps, axis=0)
        usable = np.isfinite(gap) & (error > 0)
        if not usable.any():
            continue
        off = np.where(usable, np.abs(gap) / np.where(usable, error, 1), -1)
        largest = np.nanmax(np.where(usable, np.abs(gaps - gap) / np.where(usable, error, 1), -1), axis=(1, 2))
        pair, dimension = np.unravel_index(int(off.argmax()), off.shape)
        found[metric] = {
            "of": pairs.names[dimension],
            "groups": [names[large[one[pair]]], names[large[other[pair]]]],
            "difference": float(gap[pair, dimension]),
            "standard_errors": float(off.max()),
            "p": float((1 + (largest >= off.max()).sum()) / (1 + len(largest))),
            "compared": int(usable.sum()),
        }
    return found


def table_of(by: Mapping[str, Any]) -> list[str]:
    """What a person reads of results by group, as lines."""
    lines = []
    for column, found in by.items():
        width = max([len(name) for name in found["groups"]] + [len(column), 12])
        keys = keys_of(found)
        heads = "".join(f"{key.replace('_', ' '):<24}" for key in keys)
        lines += ["", f"{column:<{width}}  speakers  {heads}".rstrip()]
        for name, measured in found["groups"].items():
            cells = (_cell(measured, key) for key in keys)
            small = f"  (only {measured['n_speakers']} speakers)" if measured["small"] else ""
            lines.append(
                f"{name:<{width}}  {measured['n_speakers']:>8}  {''.join(f'{cell:<24}' for cell in cells)}".rstrip()
                + small
            )
        if unfit := found.get("unfit"):
            shares = sorted(unfit.items(), key=lambda item: -item[1])
            lines.append(f"unfit, and so not scored: {', '.join(f'{name} {100 * x:.1f} %' for name, x in shares)}")
        gaps = found["largest_gap"]
        if gaps is None:
            lines.append(f"no gap is judged: fewer than two groups have {FEW_SPEAKERS} speakers")
        for metric, gap in (gaps or {}).items():
            lines.append(
                f"largest gap of {metric} ({gap['of']}): {gap['groups'][0]} less {gap['groups'][1]} "
                f"{gap['difference']:+.3f}, p = {gap['p']:.3f} among {gap['compared']} comparisons"
            )
    return lines


def keys_of(found: Mapping[str, Any]) -> list[str]:
    """The metrics of each group that are shown: CCC and MAE over the targets, and the bias of each."""
    first: Mapping[str, Any] = next(iter(found["groups"].values()), {})
    return ["ccc_avg", *(key for key in first if key.startswith("bias_") and key != "bias_avg"), "mae_avg"]


def _cell(measured: Mapping[str, Any], key: str) -> str:
    value, bounds = measured[key], measured.get("ci95", {}).get(key)
    text = "-" if value is None else f"{value:.3f}"
    return f"{text} [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds and None not in bounds else text
