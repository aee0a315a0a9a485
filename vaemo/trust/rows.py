"""Scored utterances for intervals: speaker, call, predictors of the error, and label.

Letters: U utterances, C calls (a session and a role).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.data.splits import linked_sessions
from vaemo.tables import codes

LABELLED_SHARE = 0.5
"""Share of a call's scored utterances that must have labels for its mean to be judged."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Utterances, or the means of calls.

    Attributes:
        group: (U,) number of the linked sessions.
        signs: What may predict the size of the error, by name, (U,); NaN = not known. `NAME_sd` belongs to a dimension.
        prediction: By dimension, (U,); NaN = none.
        label: By dimension, (U,); NaN = none.
    """

    group: np.ndarray
    signs: Mapping[str, np.ndarray]
    prediction: Mapping[str, np.ndarray]
    label: Mapping[str, np.ndarray]

    def select(self, rows: np.ndarray) -> Rows:
        """Some rows, by a boolean per row or by indices."""
        picked = ({name: values[rows] for name, values in each.items()} for each in self._mappings)
        return Rows(self.group[rows], *picked)

    @property
    def _mappings(self) -> tuple[Mapping[str, np.ndarray], ...]:
        return self.signs, self.prediction, self.label


def utterance_rows(table: pa.Table, names: Sequence[str]) -> Rows:
    """The utterances of scores.

    Args:
        table: Columns of the scores' utterances in session order; labels, where there are, as `label_NAME`.
        names: The targets.
    """
    return Rows(
        groups_of(table),
        signs_of(table, names),
        {name: floats(table, name) for name in names},
        {name: floats(table, f"label_{name}") for name in names},
    )


def signs_of(table: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What may predict the size of the errors of utterances, (U,) each; the arguments are those of `utterance_rows`."""
    sd = {f"{name}_sd": floats(table, f"{name}_sd") for name in names if f"{name}_sd" in table.column_names}
    return {"position": order_in_session(table, names[0]), "novelty": floats(table, "novelty"), **sd}


def call_rows(table: pa.Table, names: Sequence[str]) -> Rows:
    """The means of the calls of scores, one row per session and role, over the utterances that have label and score.

    Weighted by length as the scores' own means are. A call with labels for fewer than half of its scores has none.

    Args:
        table: As for `utterance_rows`.
        names: The targets.
    """
    call = calls_of(table)
    n, group = int(call.max(initial=-1)) + 1, groups_of(table)
    first = np.unique(call, return_index=True)[1]
    length_s = floats(table, "end_s") - floats(table, "start_s")
    prediction: dict[str, np.ndarray] = {}
    label: dict[str, np.ndarray] = {}
    for name in names:
        scored, said = floats(table, name), floats(table, f"label_{name}")
        known = np.isfinite(scored) & np.isfinite(said)
        counts, enough = (np.bincount(call[rows], minlength=n) for rows in (known, np.isfinite(scored)))
        judged = (counts > 0) & (counts >= LABELLED_SHARE * enough)
        for found, values in ((prediction, scored), (label, said)):
            found[name] = np.where(judged, mean_of(call, np.where(known, values, np.nan), length_s), np.nan)
    scored = np.isfinite(floats(table, names[0]))
    signs = {"n": np.bincount(call[scored], minlength=n).astype(float)}
    signs["novelty"] = mean_of(call, np.where(scored, floats(table, "novelty"), np.nan), np.full(len(call), np.nan))
    return Rows(group[first], signs, prediction, label)


def calls_of(table: pa.Table) -> np.ndarray:
    """The number of each utterance's call, a session and a role, (U,): its row in the scores' table of sessions."""
    role = codes(table["role"]) if "role" in table.column_names else np.zeros(len(table), np.int64)
    key = codes(table["session_id"]) * (role.max(initial=0) + 1) + role
    return np.unique(key, return_inverse=True)[1]


def mean_of(call: np.ndarray, values: np.ndarray, length_s: np.ndarray) -> np.ndarray:
    """The mean of each call's known values, by length, or plain where a length is not known; NaN where there is none.

    Args:
        call: (U,) whole numbers from 0.
        values: (U,), NaN = not known.
        length_s: (U,), NaN = not known.
    """
    n, known = int(call.max(initial=-1)) + 1, np.isfinite(values)
    plain = np.bincount(call[known & ~np.isfinite(length_s)], minlength=n) > 0
    weight = np.where(known, np.where(plain[call], 1.0, np.nan_to_num(length_s)), 0.0)
    total = np.bincount(call, weight, minlength=n)
    summed = np.bincount(call, weight * np.where(known, values, 0.0), minlength=n)
    return np.divide(summed, total, out=np.full(n, np.nan), where=total > 0)


def groups_of(table: pa.Table) -> np.ndarray:
    """The number of each utterance's group, (U,): sessions that are linked by speakers."""
    ids = table["session_id"]
    speaker = table["speaker_id"].fill_null("") if "speaker_id" in table.column_names else None
    if speaker is None:
        return codes(ids)
    unnamed = pc.equal(speaker, "")
    # Without a speaker a session is its own group.
    return linked_sessions(codes(ids), codes(pc.if_else(unnamed, pc.binary_join_element_wise(ids, "", "\0"), speaker)))


def order_in_session(table: pa.Table, name: str) -> np.ndarray:
    """How many utterances of the session that have a score of this name stand before each one, (U,)."""
    session, scored = codes(table["session_id"]), np.isfinite(floats(table, name))
    order = np.argsort(session, kind="stable")
    before = np.cumsum(scored[order]) - scored[order]
    first = np.r_[True, np.diff(session[order]) != 0] if len(order) else np.zeros(0, bool)
    start = np.maximum.accumulate(np.where(first, before, 0))
    found = np.empty(len(order))
    found[order] = before - start
    return found


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN for null, and throughout where there is no such column."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
