"""Outcomes in a folder of parts: counted per part, summed up for people and for schedulers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.errors import TooManyFailuresError
from vaemo.progress import say
from vaemo.units import NOT_FAILED

_COLUMNS = ["session_id", "utt_id", "status", "reason", "duration_s", "start_s", "end_s", "audio_path", "offset_s"]
_TOLD = ("status", "utt_id", "reason")
_FEWEST = 20
"""With fewer sessions the silent share is not checked."""

_SHOWN = 5
_TOUCHING_S = 0.01


def count(table: pa.Table) -> dict[str, Any]:
    """Counts of the rows of a part, fit for JSON.

    `statuses` are of utterances, with the first of each as an example. The others are of sessions: `heard`, in which
    something was used or has failed; `lost`, of these, where nothing was used; `silent`, without any speech. Where
    recordings of one session overlap, `overlaps` says in how many sessions, with the first and its seconds.
    """
    status = table["status"]
    used = pc.equal(status, "ok")
    failed = pc.invert(pc.is_in(status, pa.array(NOT_FAILED)))
    well, ill, mute = (
        set(table["session_id"].filter(rows).unique().to_pylist())
        for rows in (used, failed, pc.equal(status, "silent"))
    )
    # Where no row has a reason, some programs write a column of no type.
    told = table.select(list(_TOLD)).cast(pa.schema(dict.fromkeys(_TOLD, pa.string())))
    groups = told.group_by("status", use_threads=False)
    first = groups.aggregate([("status", "count"), ("utt_id", "first"), ("reason", "first")]).to_pylist()
    return {
        "statuses": {row["status"]: row["status_count"] for row in first},
        "examples": {row["status"]: [row["utt_id_first"], row["reason_first"]] for row in first},
        "sessions": len(table["session_id"].unique()),
        "heard": len(well | ill),
        "lost": len(ill - well),
        "silent": len(mute - well - ill),
        "audio_s": _seconds(table),
        **_overlaps(table),
    }


def count_file(path: str) -> dict[str, Any]:
    """`count` of a part as it was written."""
    names = files.read_parquet_schema(path).names
    return count(files.read_parquet(path, [name for name in _COLUMNS if name in names]))


def _seconds(table: pa.Table) -> float:
    if "duration_s" in table.column_names:
        return pc.sum(table["duration_s"]).as_py() or 0.0
    return pc.sum(pc.subtract(table["end_s"], table["start_s"])).as_py() or 0.0


def _overlaps(table: pa.Table) -> dict[str, Any]:
    """Of the sessions in which a recording begins before all speech of an earlier one has ended."""
    if "offset_s" not in table.column_names or table["offset_s"].null_count == table.num_rows:
        return {}
    rows = table.filter(table["offset_s"].is_valid())
    times = pa.table({name: rows[name] for name in ("session_id", "audio_path", "offset_s")})
    times = times.append_column("end_s", pc.add(rows["offset_s"], rows["end_s"]))
    found = times.group_by(["session_id", "audio_path", "offset_s"], use_threads=False)
    places = found.aggregate([("end_s", "max")]).to_pylist()
    overlaps: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    with_speech = (place for place in places if place["end_s_max"] is not None)
    for place in sorted(with_speech, key=lambda place: place["offset_s"]):
        name, before_s = place["session_id"], ended_s.get(place["session_id"], 0.0)
        if before_s - place["offset_s"] > _TOUCHING_S:
            overlaps[name] = max(overlaps.get(name, 0.0), before_s - place["offset_s"])
        ended_s[name] = max(before_s, place["end_s_max"])
    return {"overlaps": [len(overlaps), *min(overlaps.items())]} if overlaps else {}


class Tally:
    """Sums of `count` over parts.

    Attributes:
        statuses: Utterances by status.
        examples: Id and reason of one utterance of each status.
        sessions: All sessions.
        heard: Sessions in which something was used or has failed.
        lost: Of these, those in which nothing was used.
        silent: Sessions without any speech.
        audio_s: Speech, in seconds.
        overlaps: Sessions whose recordings overlap.
        overlapping: The first of them, and by how many seconds.
        changed: Sessions whose input has changed since they were done.
    """

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.examples: dict[str, Sequence[str]] = {}
        self.sessions = self.heard = self.lost = self.silent = self.overlaps = 0
        self.overlapping: tuple[str, float] | None = None
        self.audio_s = 0.0
        self.changed: Sequence[str] = ()

    @property
    def failed(self) -> int:
        """Utterances that have failed."""
        return sum(n for status, n in self.statuses.items() if status not in NOT_FAILED)

    def add(self, counts: Mapping[str, Any]) -> None:
        """Take the counts of one more part."""
        self.statuses.update(counts["statuses"])
        self.examples = {**counts["examples"], **self.examples}
        for name in ("sessions", "heard", "lost", "silent", "audio_s"):
            setattr(self, name, getattr(self, name) + counts[name])
        if "overlaps" in counts:
            n, session_id, seconds = counts["overlaps"]
            self.overlaps += n
            self.overlapping = self.overlapping or (session_id, seconds)

    def say(self, unit: str) -> None:
        """Print a line for each status that is no result, and for what has changed.

        Args:
            unit: What sessions are called.
        """
        if self.silent:
            say(f"  {self.silent:>8,}  {unit} without any speech")
        told = {status: n for status, n in self.statuses.items() if status not in ("ok", "not_scored_role", "silent")}
        for status, n in sorted(told.items(), key=lambda item: -item[1]):
            utt_id, reason = self.examples[status]
            say(f"  {n:>8,}  {status:<12} such as {utt_id}: {reason}")
        if self.overlapping:
            session_id, seconds = self.overlapping
            say(f"  {self.overlaps:>8,}  sessions whose recordings overlap, such as {session_id}, by {seconds:.1f} s")
        if self.changed:
            named = ", ".join(self.changed[:_SHOWN]) + (", ..." if len(self.changed) > _SHOWN else "")
            say(f"  {len(self.changed):>8,}  changed since they were done, and keep their rows: {named}")
            say("  --changed redo does them again")

    def check(self, section: str, max_failed: float, max_silent: float, where: str) -> None:
        """Raise an error if too many have failed.

        Args:
            section: Of the config, for the message.
            max_failed: Largest share of utterances, and of sessions, that may have failed.
            max_silent: Largest share of sessions that may hold no speech, where there are at least 20.
            where: The end of the message: where failures are listed, and what to do.

        Raises:
            TooManyFailuresError: if there are more.
        """
        judged = self.statuses["ok"] + self.failed
        # A recording that cannot be read is one row: by rows alone an archive of them would go unnoticed.
        lost, heard = self.lost + len(self.changed), max(self.heard, len(self.changed))
        for unit, n, of in (("utterances", self.failed, judged), ("sessions", lost, heard)):
            if n > max_failed * of:
                raise TooManyFailuresError(
                    f"{n:,} of {of:,} {unit} failed ({n / of:.1%}); {section}.max_failed_fraction allows "
                    f"{max_failed:.1%}. {where}",
                    self.to_dict(),
                )
        if self.sessions >= _FEWEST and self.silent > max_silent * self.sessions:
            raise TooManyFailuresError(
                f"{self.silent:,} of {self.sessions:,} sessions hold no speech ({self.silent / self.sessions:.1%}); "
                f"{section}.max_silent_fraction allows {max_silent:.1%}. The archive may be misread: listen to some "
                "of them, or raise it.",
                self.to_dict(),
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        judged = self.statuses["ok"] + self.failed
        return {
            "utterances": dict(self.statuses),
            "sessions": {
                "all": self.sessions,
                "failed": self.lost,
                "silent": self.silent,
                "changed": len(self.changed),
            },
            "failed_fraction": self.failed / judged if judged else 0.0,
            "audio_s": round(self.audio_s, 3),
        }
