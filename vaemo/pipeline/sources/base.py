"""What a source of sessions is: its listing on the driver, and what workers read from it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.archive import Stamp
from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.features import Extractor
from vaemo.files import Found
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import RoleRules
from vaemo.tables import codes, with_column
from vaemo.utterances import Problem
from vaemo.voices.prints import Voiceprints
from vaemo.voices.turns import Turn, digest_of, read_voices, turns_to_json


@dataclass(frozen=True, eq=False)
class Listing:
    """The sessions of a source.

    Attributes:
        session_ids: All different.
        contents: Per session, a digest of what may not change once it is done; may be empty.
        weights: Per session, what it adds to a shard.
        pack: Describes the sessions at these indices to a worker, less what is known of their problems: numbers, texts
            and bytes.
        still: Whether the session at an index is what was read when its stamps (the fields of `Stamp`) were taken.
        units: Per session, how many of `unit` it holds.
        unit: What is counted, for people.
        n_cut: Sessions with speech that vaemo cut, or will cut, from a recording.
        roles: Distinct roles that the data names.
        problems: By index, the sessions that are listed and not read.
        notes: Lines for people.
        files: Of recordings, the file of each.
        places: What every worker must be able to see: some of what is read.
        turns: By the name of a recording, who speaks when in it, if given.
        several: By index, the recordings of a session whose id is not the name of its only one.
    """

    session_ids: Sequence[str]
    contents: Sequence[str]
    weights: Sequence[int]
    pack: Callable[[Sequence[int]], dict[str, Any]]
    still: Callable[[int, Sequence[Sequence[Any]]], bool]
    units: Sequence[int]
    unit: str
    n_cut: int
    roles: tuple[str, ...]
    problems: Mapping[int, Problem] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Sequence[Found] = ()
    places: Sequence[str] = ()
    turns: Mapping[str, Sequence[Turn]] = field(default_factory=dict)
    several: Mapping[int, Sequence[Part]] = field(default_factory=dict)

    def recordings_of(self, index: int) -> Sequence[str]:
        """The names of a session's recordings, where it is made of recordings."""
        several = self.several.get(index)
        return [part.name for part in several] if several else [self.session_ids[index]]

    def select(self, indices: Sequence[int]) -> Listing:
        """The sessions at these indices."""
        place = {index: number for number, index in enumerate(indices)}
        return replace(
            self,
            session_ids=[self.session_ids[index] for index in indices],
            contents=[self.contents[index] for index in indices],
            weights=[self.weights[index] for index in indices],
            units=[self.units[index] for index in indices],
            pack=lambda picked: self.pack([indices[index] for index in picked]),
            still=lambda index, stamps: self.still(indices[index], stamps),
            problems={place[index]: problem for index, problem in self.problems.items() if index in place},
            files=[self.files[index] for index in indices] if self.files else (),
            several={place[index]: parts for index, parts in self.several.items() if index in place},
        )

    def without(self, indices: Collection[int]) -> Listing:
        """The other sessions."""
        if not indices:
            return self
        gone = frozenset(indices)
        return self.select([index for index in range(len(self.session_ids)) if index not in gone])

    def described(self, indices: Sequence[int]) -> dict[str, Any]:
        """The description of these sessions for a worker: `pack`, and their problems."""
        known = {self.session_ids[index]: vars(self.problems[index]) for index in indices if index in self.problems}
        names = itertools.chain.from_iterable(map(self.recordings_of, indices)) if self.turns else ()
        brought = {name: turns_to_json(self.turns[name]) for name in names if name in self.turns}
        return {
            **self.pack(indices),
            "problems": json.dumps(known),
            **({"turns": json.dumps(brought)} if brought else {}),
        }

    def with_turns(self, path: str) -> Listing:
        """The sessions, with who speaks when as `--voices-from` brings it.

        Raises:
            UsageError: if utterances are not to be found in these sessions.
            ReadVoicesError: as `read_voices`.
        """
        if not self.files:
            raise UsageError(
                f"--voices-from {path} separates voices in recordings, and the input is none: its utterances were "
                "found before. Give it when they are extracted."
            )
        of_session = [self.recordings_of(index) for index in range(len(self.session_ids))]
        names = list(itertools.chain.from_iterable(of_session))
        turns = {names[number]: found for number, found in read_voices(path, names).items()}
        contents = []
        for content, of_it in zip(self.contents, of_session, strict=True):
            told = [turn for name in of_it for turn in turns.get(name, ())]
            contents.append(f"{content},voices {digest_of(told)}" if turns.keys() & set(of_it) else content)
        notes = [*self.notes]
        if without := len(names) - len(turns):
            notes.append(f"--voices-from {path} is of {len(turns):,} recordings, and has none of {without:,} others")
        if silent := sum(not found for found in turns.values()):
            notes.append(
                f"--voices-from {path} has no turns in its files of {silent:,} recordings; it tells nothing of them"
            )
        return replace(self, turns=turns, contents=contents, notes=notes)


class Part(NamedTuple):
    """A recording of a session of several.

    Attributes:
        name: As the source lists it.
        path: Of the file.
        offset_s: Where it begins in the session; None is where the one before it ends.
        problem: Status and reason where it is known already that it cannot be read.
        size: Bytes.
        mtime_ns: When it was last written.
    """

    name: str
    path: str
    offset_s: float | None = None
    problem: tuple[str, str] | None = None
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, eq=False)
class Tools:
    """What a worker needs to compute features: empty for a store.

    `rules` are None where all speech is wanted, of any role; `prints` are voices of persons, where roles of voices
    may follow from them.
    """

    extractors: Mapping[str, Extractor]
    config: Config
    decoder: Decoder | None
    rules: RoleRules | None
    prints: Voiceprints | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """What a worker has read.

    Attributes:
        table: Rows of a feature store.
        stamps: Of each session's inputs.
        n_unused_turns: Recordings with several channels and turns that name none of them.
    """

    table: pa.Table
    stamps: Mapping[str, Sequence[Stamp]]
    n_unused_turns: int = 0


class Source(Protocol):
    """A source of sessions."""

    @property
    def path(self) -> str:
        """What `--input` names."""
        ...

    kind: str
    """`store`, `manifest` or `recordings`."""

    needs_features: bool
    """Whether features are still to be computed."""

    replaceable: bool
    """Whether inputs that have changed are listed while the others go on, or refused."""

    counts_rows: bool
    """Whether its unit is the utterance."""

    def list(self, calls: Calls | None = None) -> Listing:
        """Find the sessions, on the driver; the table of calls may say which recordings are one."""
        ...

    def shard_size(self, config: Config) -> int:
        """The weight of a shard."""
        ...

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Rows of a feature store for what `Listing.described` told, on a worker."""
        ...


def problems_of(packed: Mapping[str, Any]) -> dict[str, Problem]:
    """The problems of the sessions that `Listing.described` told, by id."""
    return {name: Problem(**facts) for name, facts in json.loads(packed.get("problems", "{}")).items()}


def with_problems(table: pa.Table, packed: Mapping[str, Any]) -> pa.Table:
    """The rows, those of sessions with a problem under its status."""
    problems = problems_of(packed)
    if not problems:
        return table
    row = pc.index_in(table["session_id"], value_set=pa.array(list(problems), pa.string()))
    for name in ("status", "reason"):
        values = pa.array([getattr(problem, name) for problem in problems.values()], pa.string())
        table = with_column(table, name, pc.coalesce(values.take(row), table[name]))
    return table


def starts_of_sessions(table: pa.Table, part_lengths: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Where each session starts, and its id; a new part starts a new one."""
    n = table.num_rows
    if not n:
        return np.zeros(0, np.int64), []
    session = codes(table["session_id"])
    new = np.r_[True, session[1:] != session[:-1]]
    part_starts = np.cumsum([0, *part_lengths[:-1]])
    new[part_starts[part_starts < n]] = True
    starts = np.flatnonzero(new)
    return starts, table["session_id"].take(pa.array(starts)).to_pylist()


def stamp_of(path: str) -> Stamp | None:
    """Size and time of a file; None where it cannot be asked."""
    try:
        found = files.size_and_time(path)
    except OSError:
        return None
    return Stamp(*found) if found else None
