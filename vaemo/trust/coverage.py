"""Coverage and width of the intervals of scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from vaemo import scores
from vaemo.evaluation.pairs import Pairs
from vaemo.tables import codes
from vaemo.trust.beside import beside
from vaemo.trust.rows import LABELLED_SHARE, calls_of, floats, mean_of

ENDS = ("low", "high")


def coverage_of(
    pairs: Pairs, scored: str, groups: Mapping[str, Iterable[tuple[str, np.ndarray]]]
) -> dict[str, Any] | None:
    """Coverage and width of the intervals, of utterances and of the means of calls; None where there are no intervals.

    Args:
        pairs: Of the split that is judged by.
        scored: The folder of scores.
        groups: By what to divide the utterances: names and rows.

    Returns:
        `nominal`; `utterances` and `calls`: for each dimension `n`, `covered` (the share), `covered_of_sessions` (the
        mean over sessions, which is what is guaranteed), `error` (its standard error), `width`; `by`: for each
        division and group, as `utterances`.
    """
    table = scores.read_utterances(scored)
    bounds = {}
    for name in pairs.names:
        if f"{name}_low" in table.column_names:
            low, high = (_known(beside(pairs.place, table, f"{name}_{end}")) for end in ENDS)
            bounds[name] = low, high
    if not bounds:
        return None
    session = pairs.sessions()
    known = {name: (pairs.label[:, list(pairs.names).index(name)], low, high) for name, (low, high) in bounds.items()}

    def of(rows: np.ndarray) -> dict[str, Any]:
        return {
            name: _covered(label[rows], low[rows], high[rows], session[rows])
            for name, (label, low, high) in known.items()
        }

    trust = scores.read_provenance(scored).get("trust") or {}
    return {
        "nominal": trust.get("coverage"),
        "calibrated_on": trust.get("calibrated_on"),
        "utterances": of(np.arange(len(pairs))),
        "calls": _of_calls(pairs, scored),
        "by": {by: {name: of(rows) for name, rows in each} for by, each in groups.items()},
    }


def table_of(coverage: Mapping[str, Any]) -> list[str]:
    """What a person reads of coverage, as lines."""
    nominal = coverage["nominal"]
    lines = ["", f"intervals{'' if nominal is None else f' of {100 * nominal:g} %'}, share of labels inside (width):"]
    for title, kind in (("  utterances", "utterances"), ("  means of calls", "calls")):
        cells = [
            f"{name} {100 * found['covered_of_sessions']:.1f} % ({found['width']:.3f})"
            for name, found in coverage[kind].items()
            if found["n"]
        ]
        lines += [f"{title:<22}{', '.join(cells)}"] if cells else []
    return lines


def _of_calls(pairs: Pairs, scored: str) -> dict[str, Any]:
    """The means of calls, a session and a role each, that have labels for half of their scores or more."""
    sessions = scores.read_sessions(scored)
    if not any(f"{name}_mean_low" in sessions.column_names for name in pairs.names):
        return {}
    call = calls_of(pairs.place)
    first = np.unique(call, return_index=True)[1]
    names = list(
        zip(*(pairs.place[key].take(pa.array(first)).to_pylist() for key in ("session_id", "role")), strict=True)
    )
    row = {
        key: n for n, key in enumerate(zip(*(sessions[key].to_pylist() for key in ("session_id", "role")), strict=True))
    }
    place = np.array([row.get(name, -1) for name in names])
    length_s = floats(pairs.place, "end_s") - floats(pairs.place, "start_s")
    group = codes(pairs.place["session_id"])[first]
    found = {}
    for number, name in enumerate(pairs.names):
        if f"{name}_mean_low" not in sessions.column_names:
            continue
        label = pairs.label[:, number]
        counts = np.bincount(call[np.isfinite(label)], minlength=len(first))
        enough = counts >= LABELLED_SHARE * floats(sessions, "n_scored")[place]
        mean = np.where(enough & (place >= 0) & (counts > 0), mean_of(call, label, length_s), np.nan)
        low, high = (floats(sessions, f"{name}_mean_{end}")[place] for end in ENDS)
        found[name] = _covered(mean, low, high, group)
    return found


def _covered(label: np.ndarray, low: np.ndarray, high: np.ndarray, session: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(label) & np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return {"n": 0, "covered": None, "covered_of_sessions": None, "error": None, "width": None}
    # Bounds are kept in single precision.
    inside = ((label >= low - 1e-6) & (label <= high + 1e-6))[known]
    number = np.unique(session[known], return_inverse=True)[1]
    share = np.bincount(number, inside) / np.bincount(number)
    return {
        "n": int(known.sum()),
        "covered": float(inside.mean()),
        "covered_of_sessions": float(share.mean()),
        "error": float(share.std(ddof=1) / np.sqrt(len(share))) if len(share) > 1 else None,
        "width": float((high - low)[known].mean()),
    }


def _known(column: pa.Array) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
