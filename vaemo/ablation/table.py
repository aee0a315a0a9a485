"""The grid's results as one row per variant: mean, spread over seeds, interval, and comparison with the full model.

CCC is pooled over all held-out utterances, those of all folds together, once for each seed, and then averaged over the
seeds. Intervals and comparisons resample *sessions*, the same ones for both models; the spread beside them shows the
variation between seeds. The p values of all comparisons with the full model are corrected by Holm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from vaemo.ablation.cell import columns_named, matrix, targets_in
from vaemo.ablation.grid import FULL, Cell, Variant
from vaemo.config import EvaluateConfig
from vaemo.evaluation.bootstrap import Resampled, SessionSums, defined, holm, metrics_of
from vaemo.tables import codes
from vaemo.units import DIMENSIONS

Result = tuple[pa.Table, Mapping[str, Any]]
"""What `run_cell` returned."""

Row = dict[str, Any]
"""A variant's results: a row of `ablation.parquet`, whose columns `summarise` names."""


def summarise(
    results: Mapping[Cell, Result], variants: Sequence[Variant], folds: Sequence[str], config: EvaluateConfig
) -> list[Row]:
    """One row per variant, in the order given.

    A seed counts where all its folds are done. A variant without such a seed has nulls throughout.

    Args:
        results: Of the cells that are done.
        variants: The rows.
        folds: Names of the folds; one empty name where there are none.
        config: How sessions are resampled, and the variance in the CCC.

    Returns:
        `variant`, `title`, `n_seeds`, `n_sessions`, `n`; `ccc_NAME` (mean over seeds), `ccc_NAME_sd` (over seeds),
        `ccc_NAME_low`, `ccc_NAME_high`, `ccc_NAME_seeds` (a list), `within_ccc_NAME` (of predictions and labels less
        their means over the session; mean over seeds) and `rmse_NAME` for every target and avg;
        `fed_ccc_avg` (labels of earlier utterances fed; null without feedback); `difference_NAME` with `_low` and
        `_high` (of CCC, variant less full model), `p` and `p_holm` (of `difference_avg`; null for the full model);
        `seconds` (of a seed's trainings, one after the other).
    """
    runs = {variant: _runs(results, variant, folds) for variant in variants}
    resampled = {
        variant: Resampled.of([_sums(run) for run in of_seeds], config)
        for variant, of_seeds in runs.items()
        if of_seeds
    }
    some = next((table for table, _ in results.values()), None)
    names = (*(DIMENSIONS if some is None else targets_in(some)), "avg")
    rows = [_row(variant, runs[variant], resampled.get(variant), names, config) for variant in variants]
    if FULL in resampled:
        compared = [(row, variant) for row, variant in zip(rows, variants, strict=True) if variant in resampled]
        for row, variant in compared:
            if variant != FULL:
                row.update(_comparison(resampled[variant], resampled[FULL], names))
        tested = [row for row in rows if row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
    return rows


def _runs(results: Mapping[Cell, Result], variant: Variant, folds: Sequence[str]) -> list[list[Result]]:
    """The results of every whole seed, one per fold."""
    seeds = sorted({cell.seed for cell in results if cell.variant == variant})
    cells = [[Cell(variant, seed, fold) for fold in folds] for seed in seeds]
    return [[results[cell] for cell in of_seed] for of_seed in cells if all(cell in results for cell in of_seed)]


def _sums(run: Sequence[Result], what: str = "") -> SessionSums:
    """The sums of a seed, over all folds; the cells of all variants hold the same utterances in the same order."""
    table = pa.concat_tables([table.replace_schema_metadata() for table, _ in run]).combine_chunks()
    targets, n_session = targets_in(table), run[0][1].get("n_session", 0)
    predicted = matrix(table, columns_named(what, targets) if what else targets)
    return SessionSums.of(
        predicted, matrix(table, columns_named("label", targets)), codes(table["session_id"]), n_session
    )


def _row(
    variant: Variant,
    runs: Sequence[list[Result]],
    resampled: Resampled | None,
    names: Sequence[str],
    config: EvaluateConfig,
) -> Row:
    row: Row = {"variant": variant.name, "title": variant.title, "n_seeds": len(runs), "n_sessions": 0, "n": 0}
    per_seed = [metrics_of(_sums(run).total(), config.variance)["ccc"] for run in runs]
    low, high = resampled.interval("ccc") if resampled else (None, None)
    for k, name in enumerate(names):
        values = [float(value[k]) for value in per_seed]
        row |= {
            f"ccc_{name}": float(np.mean(values)) if values else None,
            f"ccc_{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            f"ccc_{name}_low": None if low is None else defined(low[k]),
            f"ccc_{name}_high": None if high is None else defined(high[k]),
            f"ccc_{name}_seeds": values,
            f"within_ccc_{name}": defined(resampled.estimate["within_ccc"][k]) if resampled else None,
            f"rmse_{name}": defined(resampled.estimate["rmse"][k]) if resampled else None,
            **{f"difference_{name}{suffix}": None for suffix in ("", "_low", "_high")},
        }
    row |= {"p": None, "p_holm": None, "fed_ccc_avg": None, "seconds": None}
    if runs:
        held_out = _sums(runs[0]).values
        row |= {"n_sessions": len(held_out), "n": int(held_out[..., 0].sum(axis=0).max())}
        row["seconds"] = float(np.mean([sum(facts["seconds"] for _, facts in run) for run in runs]))
        fed = [metrics_of(_sums(run, "fed").total(), config.variance)["ccc"][-1] for run in runs]
        row["fed_ccc_avg"] = defined(np.mean(fed))
    return row


def _comparison(variant: Resampled, full: Resampled, names: Sequence[str]) -> Row:
    difference = variant.less(full, "ccc")
    row: Row = {"p": defined(difference.p[-1])}
    for k, name in enumerate(names):
        for suffix, values in (("", difference.estimate), ("_low", difference.low), ("_high", difference.high)):
            row[f"difference_{name}{suffix}"] = defined(values[k])
    return row


def to_parquet(rows: Sequence[Row]) -> pa.Table:
    """The rows as a table; numbers that are not known are null."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts, counts = ("variant", "title"), ("n_seeds", "n_sessions", "n")
    kinds = {name: pa.string() for name in texts} | {name: pa.int64() for name in counts}
    kinds |= {name: pa.list_(pa.float64()) for name in columns if name.endswith("_seeds") and name != "n_seeds"}
    return pa.table({name: pa.array(values, kinds.get(name, pa.float64())) for name, values in columns.items()})


_HEADINGS = (
    "95 % interval",
    "within sessions",
    "labels fed",
    "less full",
    "interval",
    "p (Holm)",
)


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table for a README or an issue, with what its numbers are, and `notes` below it."""
    headings = _headings(rows)
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join([*lines, "", _legend(rows), *(f"\n{note}" for note in notes), ""])


def to_latex(rows: Sequence[Row]) -> str:
    """The table for a paper; needs the package booktabs."""
    headings = _headings(rows)
    lines = [
        f"% {_legend(rows)}".replace("\n", " "),
        rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        f"{' & '.join(map(_escape, headings))} \\\\",
        r"\midrule",
        *(f"{' & '.join(map(_escape, _cells(row)))} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def _cells(row: Row) -> list[str]:
    if not row["n_seeds"]:
        return [row["title"], *["failed"] * len(_names(row)), *["-"] * len(_HEADINGS)]
    means = [f"{row[f'ccc_{name}']:z.3f}" + _spread(row[f"ccc_{name}_sd"]) for name in _names(row)]
    return [
        row["title"],
        *means,
        _interval(row["ccc_avg_low"], row["ccc_avg_high"]),
        _decimal(row["within_ccc_avg"], "z.3f"),
        _decimal(row["fed_ccc_avg"], "z.3f"),
        _decimal(row["difference_avg"], "+z.3f"),
        _interval(row["difference_avg_low"], row["difference_avg_high"], "+z.3f"),
        _p(row["p_holm"]),
    ]


def _headings(rows: Sequence[Row]) -> list[str]:
    names = [*_names(rows[0])[:-1], "average"] if rows else []
    return ["", *(f"CCC {name}" for name in names), *_HEADINGS]


def _names(row: Row) -> list[str]:
    """The targets of a row, and their mean."""
    return [
        key.removeprefix("ccc_").removesuffix("_seeds") for key in row if key.endswith("_seeds") and key != "n_seeds"
    ]


def _spread(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.3f}"


def _interval(low: float | None, high: float | None, form: str = "z.3f") -> str:
    return "-" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _decimal(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("±", r"$\pm$").replace("<", "$<$")


def _legend(rows: Sequence[Row]) -> str:
    first = next(row for row in rows if row["n_seeds"])
    n_seeds = max(row["n_seeds"] for row in rows)
    n_compared = sum(row["p_holm"] is not None for row in rows)
    return (
        f"CCC pooled over {first['n']:,} held-out utterances of {first['n_sessions']:,} sessions, running free: "
        f"mean and deviation over {n_seeds} {'seeds' if n_seeds > 1 else 'seed'}; intervals and paired differences "
        f"from resampled sessions; p of the difference in CCC average, corrected by Holm for {n_compared} comparisons. "
        "'Within sessions' is CCC average of predictions and labels less their means over the session. "
        "'Labels fed' is CCC average where the label of every earlier utterance is observed."
    )
