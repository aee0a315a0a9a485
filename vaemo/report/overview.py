"""The numbers of a report: the archive in aggregate, one line per call and role, the curves of the calls drawn.

Reads a folder of scores part by part, so that an archive need not fit in memory. Nothing is ever grouped by a column
of the table of calls, which may name employees: only by role, date and status.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import scores
from vaemo.scoring.roles import NOT_KNOWN
from vaemo.targets import SUMMARY, Target, session_names, utterance_names
from vaemo.units import DIMENSIONS, NOT_FAILED, LabelScale

BINS = 24
"""Bars of a distribution, and cells of the plane along each side."""

EXAMPLES = 3
"""Reasons that are shown for one status."""

WITHIN_RECORDING_S = 86_400.0
"""Times from here on are clock times rather than positions in a recording, which would last for a day."""

MIN_SCORED = 5
"""A call with fewer scored utterances is not called one that falls."""

_COUNTS = ("n_utterances", "n_scored", "n_failed", "talk_s")


def columns_of(targets: Sequence[str | Target]) -> list[str]:
    """Numbers of a call that the table of calls can be sorted by."""
    summaries = [f"{name}_{summary}" for name in utterance_names(targets) for summary in SUMMARY]
    return [*_COUNTS, *summaries, *session_names(targets)]


def _rankings(names: Sequence[str], columns: Sequence[str]) -> list[tuple[str, str]]:
    """Why a call is shown: low, falling, ending low in the first target, and high in the second."""
    first, second = names[0], names[1:2]
    of_first = [(f"{first}_{summary}", "ascending") for summary in ("slope_per_min", "end_weighted")]
    return [
        (of_call(first, columns), "ascending"),
        *(ranking for ranking in of_first if ranking[0] in columns),
        *((of_call(name, columns), "descending") for name in second),
    ]


def of_call(name: str, columns: Collection[str]) -> str:
    """The main column of a target in the table of calls: its mean, or itself if it is of the whole call."""
    return mean if (mean := f"{name}_mean") in columns else name


_SAID_ELSEWHERE = ("ok", "not_scored_role")
"""Statuses that are not among the reasons why something has no score."""


@dataclass
class Overview:
    """The archive in aggregate, added up part by part.

    Attributes:
        scale: The range of the scores.
        names: The targets of utterances, K; where there are none those of calls, which count once a call.
        of_calls: Whether they are those.
        histogram: (K, BINS) scored utterances by each target.
        planes: (K, K, BINS, BINS) scored utterances by two targets, the first across, the second upwards (rows).
        statuses: Utterances by status.
        reasons: Of each failed status, how often each reason was given.
        speech_s: Length of all scored utterances that have times.
        n_scored: Scored utterances.
        totals: (K,) sums of their targets.
        session_ids: Of all utterances.
    """

    scale: LabelScale
    names: tuple[str, ...] = DIMENSIONS
    of_calls: bool = False
    histogram: np.ndarray = field(init=False)
    planes: np.ndarray = field(init=False)
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    speech_s: float = 0.0
    n_scored: int = 0
    totals: np.ndarray = field(init=False)
    session_ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        n = len(self.names)
        self.histogram, self.totals = np.zeros((n, BINS), np.int64), np.zeros(n)
        self.planes = np.zeros((n, n, BINS, BINS), np.int64)

    @property
    def plane(self) -> np.ndarray | None:
        """(BINS, BINS) scored utterances by the second target (rows, upwards) and the first; None of a single one."""
        return self.planes[0, 1] if len(self.names) > 1 else None

    @staticmethod
    def of(folder: str) -> Overview:
        """All of a folder of scores."""
        targets = scores.read_targets(folder)
        names = utterance_names(targets)
        overview = Overview(scores.read_scales(folder)[0], names or session_names(targets), not names)
        columns = ["session_id", *overview.names, "start_s", "end_s", "status", "reason"]
        for part in scores.scan_utterances(folder, columns):
            overview.add(part)
        return overview

    def add(self, part: pa.Table) -> None:
        """Count the utterances of one part."""
        self.session_ids.update(part["session_id"].unique().to_pylist())
        self.statuses.update({item["values"]: item["counts"] for item in part["status"].value_counts().to_pylist()})
        unscored = part.filter(pc.invert(pc.is_in(part["status"], pa.array(_SAID_ELSEWHERE))))
        for row in unscored.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist():
            self.reasons[row["status"]][row["reason"] or ""] += row["count_all"]
        scored = part.filter(pc.is_valid(part[self.names[0]]))
        values = [scored[name].to_numpy() for name in self.names]
        cells = [self._cell(value) for value in values]
        for k, across in enumerate(cells):
            self.histogram[k] += np.bincount(across, minlength=BINS)
            for other, upwards in enumerate(cells):
                if other != k:
                    found = np.bincount(upwards * BINS + across, minlength=BINS * BINS)
                    self.planes[k, other] += found.reshape(BINS, BINS)
        self.n_scored += scored.num_rows
        self.totals += [value.sum(dtype=np.float64) for value in values]
        heard = part.filter(pc.equal(part["status"], "ok")) if self.of_calls else scored
        self.speech_s += pc.sum(pc.subtract(heard["end_s"], heard["start_s"])).as_py() or 0.0

    def to_plain(self) -> dict[str, Any]:
        """The data of the page."""
        unscored = {status: n for status, n in self.statuses.items() if status not in _SAID_ELSEWHERE}
        return {
            "low": self.scale.low,
            "high": self.scale.high,
            "histogram": dict(zip(self.names, self.histogram.tolist(), strict=True)),
            "plane": None if self.plane is None else self.plane.tolist(),
            "planes": {
                f"{across},{upwards}": self.planes[k, other].tolist()
                for k, across in enumerate(self.names)
                for other, upwards in enumerate(self.names)
                if other != k and len(self.names) > 2
            },
            "mean": {
                name: round(total / self.n_scored, 4) if self.n_scored else None
                for name, total in zip(self.names, self.totals.tolist(), strict=True)
            },
            "n_scored": self.n_scored,
            "n_failed": sum(n for status, n in unscored.items() if status not in NOT_FAILED),
            "n_not_scored_role": self.statuses["not_scored_role"],
            "speech_s": round(self.speech_s, 1),
            "failures": [
                {
                    "status": status,
                    "n": n,
                    "reasons": [reason for reason, _ in self.reasons[status].most_common(EXAMPLES) if reason],
                }
                for status, n in sorted(unscored.items(), key=lambda item: -item[1])
            ],
        }

    def _cell(self, values: np.ndarray) -> np.ndarray:
        share = (values.astype(np.float64) - self.scale.low) / self.scale.width
        return np.clip((share * BINS).astype(np.int64), 0, BINS - 1)


def choose_calls(
    sessions: pa.Table, top: int, names: Sequence[str] = DIMENSIONS, also: Collection[str] = ()
) -> list[str]:
    """The calls that are drawn: all where there are at most `top`, else the first of each ranking in turn, and some.

    The rankings: lowest mean of the first target (valence), its steepest fall, its lowest end, and the highest mean of
    the second (arousal).

    Returns:
        Session ids, in the order of `sessions`.
    """
    distinct = sessions["session_id"].unique()
    if len(distinct) <= top:
        return distinct.to_pylist()
    rankings = []
    for column, order in _rankings(names, sessions.column_names):
        some = sessions.filter(pc.is_valid(sessions[column]))
        if column.endswith("_slope_per_min"):
            some = some.filter(pc.greater_equal(some["n_scored"], MIN_SCORED))
        # Each ranking in full could be needed only if the others held nothing else.
        indices = pc.select_k_unstable(some, k=min(top, some.num_rows), sort_keys=[(column, order)])
        rankings.append(some["session_id"].take(indices).to_pylist())
    chosen: dict[str, None] = {}
    for place in range(top):
        for ranking in rankings:
            if place < len(ranking) and len(chosen) < top:
                chosen.setdefault(ranking[place])
    return [name for name in distinct.to_pylist() if name in chosen or name in also]


def calls_table(
    sessions: pa.Table, drawn: list[str], targets: Sequence[str | Target] = DIMENSIONS
) -> dict[str, list[Any]]:
    """The rows of the table of calls, column by column: those of the calls drawn, without unscored roles."""
    of_interest = pc.greater(pc.add(sessions["n_scored"], sessions["n_failed"]), 0)
    kept = sessions.filter(pc.and_(of_interest, pc.is_in(sessions["session_id"], pa.array(drawn, pa.string()))))
    table: dict[str, list[Any]] = {
        "session_id": kept["session_id"].to_pylist(),
        "role": kept["role"].to_pylist(),
    }
    if "date" in kept.column_names:
        table["date"] = [None if value is None else str(value) for value in kept["date"].to_pylist()]
    for name in columns_of(targets):
        table[name] = [None if value is None else round(value, 4) for value in kept[name].to_pylist()]
    return table


def unscored_calls(sessions: pa.Table, most: int = 500) -> dict[str, Any]:
    """Calls without a scored speaker and with a speaker of unknown role, whose role should be looked up.

    Returns:
        `n`, and `session_id` of the first.
    """
    unknown = pc.is_in(sessions["role"], pa.array(NOT_KNOWN))
    by_call = sessions.append_column("unknown", unknown.cast(pa.int32())).group_by("session_id", use_threads=False)
    calls = by_call.aggregate([("n_scored", "sum"), ("n_failed", "sum"), ("unknown", "max")])
    left = pc.and_(pc.equal(calls["n_scored_sum"], 0), pc.equal(calls["unknown_max"], 1))
    found = calls.filter(pc.and_(left, pc.equal(calls["n_failed_sum"], 0)))["session_id"].to_pylist()
    return {"n": len(found), "session_id": found[:most]}


def over_time(sessions: pa.Table, most: int = 60, names: Sequence[str] = DIMENSIONS) -> list[dict[str, Any]]:
    """Calls and the means of their targets by day, or by month or year where there are more than `most`."""
    if "date" not in sessions.column_names:
        return []
    dates = pc.utf8_slice_codeunits(sessions["date"].cast(pa.string()), 0, 10)
    for length in (10, 7, 4):
        period = pc.utf8_slice_codeunits(dates, 0, length)
        if len(period.unique()) <= most:
            break
    values = {name: sessions[of_call(name, sessions.column_names)] for name in names}
    grouped = (
        pa.table({"period": period, **values})
        .filter(pc.is_valid(values[names[0]]))
        .group_by("period")
        .aggregate([*((name, "mean") for name in names), ([], "count_all")])
        .sort_by("period")
    )
    return [
        {
            "period": row["period"],
            "n": row["count_all"],
            **{name: round(row[f"{name}_mean"], 4) for name in names},
        }
        for row in grouped.to_pylist()
        if row["period"] is not None
    ]


def curves(
    utterances: pa.Table, labels: pa.Table | None, names: Sequence[str] = DIMENSIONS
) -> dict[str, dict[str, Any]]:
    """The utterances of each call drawn.

    Args:
        utterances: Of those calls, with the columns of `scores.UTTERANCE_SCHEMA`.
        labels: `session_id`, `utt_id` and the targets on the scale of the scores, or None.
        names: The targets of utterances.

    Returns:
        By session: `who` (names of those who speak: roles, else speakers, else channels), `timed` (whether `start`
        and `end` are seconds, or places in the session), `from_s` (where the session begins, of times that are a
        clock's; else 0), and per utterance `id`, `speaks` (index into `who`), `start` and `end` since then,
        `valence`, `arousal`, `status`; where there are labels `label_valence`, `label_arousal`, and where several
        models scored `valence_sd`, `arousal_sd`, and where the model is calibrated `valence_low`, ...; and `lowest`,
        by dimension the index of the utterance that the table of sessions would call the lowest of all of them, None
        where nothing is scored. Of a session of several recordings also `recordings`, their paths, and per utterance
        `recording` (index into them) and `offset` (seconds from the session's begin to its own).
    """
    table = utterances.append_column("row", pa.array(np.arange(utterances.num_rows)))
    if labels is not None:
        labelled = [name for name in names if name in labels.column_names]
        named = labels.select(["session_id", "utt_id", *labelled])
        named = named.rename_columns(["session_id", "utt_id", *(f"label_{name}" for name in labelled)])
        table = table.join(named, keys=["session_id", "utt_id"], join_type="left outer").sort_by("row")
    by_session: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in table.to_pylist():
        by_session[row["session_id"]].append(row)
    return {session: _curve(rows, names) for session, rows in by_session.items()}


def _curve(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    timed = all(row["start_s"] is not None and row["end_s"] is not None for row in rows if row["status"] == "ok")
    timed = timed and any(row["start_s"] is not None for row in rows)
    several = any(row["offset_s"] is not None for row in rows)
    if several and timed:
        rows = [row | {name: _in_session(row, name) for name in ("start_s", "end_s")} for row in rows]
    if timed:
        rows = sorted((row for row in rows if row["start_s"] is not None), key=lambda row: row["start_s"])
    from_s = rows[0]["start_s"] if timed and rows[0]["start_s"] >= WITHIN_RECORDING_S else 0.0
    speaking = [_who(row) for row in rows]
    # Those with scores first: the first colours are theirs.
    who = list(
        dict.fromkeys(
            name
            for with_score in (True, False)
            for name, row in zip(speaking, rows, strict=True)
            if (row[names[0]] is not None) == with_score
        )
    )
    curve: dict[str, Any] = {
        "who": who,
        "timed": timed,
        "from_s": from_s,
        "id": [row["utt_id"] for row in rows],
        "speaks": [who.index(name) for name in speaking],
        "start": [round(row["start_s"] - from_s, 2) if timed else place + 1 for place, row in enumerate(rows)],
        "end": [round(row["end_s"] - from_s, 2) if timed else place + 1 for place, row in enumerate(rows)],
        "status": [row["status"] for row in rows],
    }
    if several and timed:
        paths = list(dict.fromkeys(row["audio_path"] for row in rows))
        curve["recordings"], curve["recording"] = paths, [paths.index(row["audio_path"]) for row in rows]
        curve["offset"] = [row["offset_s"] for row in rows]
    forms = ("label_{}", "{}_sd", "{}_low", "{}_high")
    further = (form.format(name) for form in forms for name in names)
    for name in (*names, *further):
        values = [row.get(name) for row in rows]
        if name in names or any(value is not None for value in values):
            curve[name] = [None if value is None else round(value, 4) for value in values]
    curve["lowest"] = {name: scores.lowest_of(rows, name) for name in names}
    return curve


def _in_session(row: Mapping[str, Any], name: str) -> float | None:
    """A time of an utterance, from the begin of its session."""
    return None if row[name] is None else row[name] + (row["offset_s"] or 0.0)


def _who(row: Mapping[str, Any]) -> str:
    """Who speaks. A role hides the speaker's name, which may be an employee's; voices of one role stay apart."""
    if row["role"]:
        return row["role"] if row["voice"] is None else f"{row['role']}, voice {row['voice']}"
    if row["speaker_id"]:
        return row["speaker_id"]
    return "speaker" if row["channel"] is None else f"channel {row['channel']}"
