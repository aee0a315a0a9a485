"""Recordings as a source: each alone, or several of them as one session."""

from __future__ import annotations

import functools
import itertools
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.archive import Listing as Recordings
from vaemo.audio.archive import Stamp, is_still, list_recordings, shown
from vaemo.audio.several import Member, plain
from vaemo.config import AudioConfig, Config
from vaemo.errors import ReadManifestError, named
from vaemo.files import Found
from vaemo.parts.shards import digest
from vaemo.pipeline.sources.base import Batch, Listing, Part, Tools, problems_of
from vaemo.pipeline.sources.roles import evidence_of
from vaemo.scoring.calls import Calls
from vaemo.utterances import Course, Parties, Problem, extract_recording, extract_session, unsaid_roles
from vaemo.voices.roles import expected_voice, roles_of_voices
from vaemo.voices.turns import Turn, turns_of_json


@dataclass(frozen=True)
class RecordingsSource:
    """A folder of recordings: utterances are found in each, channel by channel.

    Attributes:
        path: The folder, or a table of paths.
        audio: How headerless files are read; None is the default.
        exclude: Patterns of names to leave out.
        min_age_s: Files that are younger wait for the next run.
        listed: What lies there, where that has been looked up; stays on the driver.
    """

    path: str
    audio: AudioConfig | None = None
    exclude: tuple[str, ...] = ()
    min_age_s: float = 0.0
    listed: Sequence[Found] | None = field(default=None, repr=False, compare=False)
    kind = "recordings"
    needs_features = True
    replaceable = True
    counts_rows = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "listed": None}

    def shard_size(self, config: Config) -> int:
        """The number of recordings in a shard."""
        return config.extract.shard_recordings

    def list(self, calls: Calls | None = None) -> Listing:
        """List the files that may be audio; nothing is opened."""
        members = calls.members if calls else {}
        listed = list_recordings(
            self.path,
            self.audio,
            exclude=self.exclude,
            min_age_s=self.min_age_s,
            found=self.listed,
            several={name for name, of_it in members.items() if len(of_it) > 1},
        )
        found, several, notes = _put_together(listed, members, self.path) if members else (listed.recordings, {}, ())
        # A table may not say how large its recordings are: then it is not seen whether they have changed, or are twins.
        unsized = files.is_file(self.path)

        def described(index: int) -> tuple[str, Any]:
            parts = several.get(index)
            return found[index].name, [part[:4] for part in parts] if parts else found[index].path

        alone = [index for index in range(len(found)) if index not in several]
        return Listing(
            session_ids=[item.name for item in found],
            contents=[""] * len(found),
            weights=[len(several[index]) if index in several else 1 for index in range(len(found))],
            pack=lambda indices: {"recordings": json.dumps(list(map(described, indices)))},
            still=_Still(found, several, unsized),
            units=[1] * len(found),
            unit="sessions" if several else "recordings",
            n_cut=len(found),
            roles=(),
            problems={index: Problem(*item.problem) for index, item in enumerate(found) if item.problem},
            notes=[*listed.notes, *notes],
            files=() if unsized and not all(found[i].size or found[i].problem for i in alone) else found,
            places=[self.path, *itertools.islice((item.path for item in found if not item.problem), 1)],
            several=several,
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Find the utterances and compute the features of those that may be scored."""
        problems, tables, stamps, every = problems_of(packed), [], {}, list[Part]()
        brought = {name: turns_of_json(held) for name, held in json.loads(packed.get("turns", "{}")).items()}
        for session_id, told in json.loads(packed["recordings"]):
            problem = problems.get(session_id)
            parts = [Part(session_id, told)] if isinstance(told, str) else [Part(*each) for each in told]
            every += parts
            if problem is None or problem.status == "duplicate":
                stamps[session_id] = [
                    Stamp(0, 0) if part.problem else Stamp.of(part.path) or Stamp(0, 0) for part in parts
                ]
                if not isinstance(told, str):
                    stamps[session_id].insert(0, _composition(parts))
            extract = functools.partial(self._read_one, session_id, tools, calls, brought)
            if isinstance(told, str) or problem:
                tables.append(extract(parts[0], problem))
            else:
                each = [(part.offset_s, functools.partial(extract, part, None)) for part in parts]
                tables.append(extract_session(each))
        table = pa.concat_tables(tables)
        return Batch(table, stamps, _n_unused_turns(table, every, brought))

    def _read_one(
        self,
        session_id: str,
        tools: Tools,
        calls: Calls | None,
        brought: Mapping[str, Sequence[Turn]],
        part: Part,
        problem: Problem | None,
        course: Course | None = None,
    ) -> pa.Table:
        rules, key = tools.rules, calls.key_of(session_id, part.name) if calls else session_id
        said = calls.roles.get(key, ()) if calls else ()
        evidence, how = evidence_of(calls, key), tools.config.voices
        return extract_recording(
            part.path,
            session_id,
            extractors=tools.extractors,
            config=tools.config,
            decoder=tools.decoder,
            parties=Parties(
                roles_of=(lambda n_channels: rules.of_channels(n_channels, said)) if rules else unsaid_roles,
                scored=lambda role: rules is None or rules.scores(role, cut=True) or role in rules.context,
                turns=brought.get(part.name),
                roles_of_voices=lambda voices, roles: roles_of_voices(voices, roles, evidence, tools.prints, how),
                verifies=tools.prints is not None,
                expected=expected_voice(evidence, tools.prints, how),
            ),
            problem=problem or (Problem(*part.problem) if part.problem else None),
            course=course,
        )


@dataclass(frozen=True, eq=False)
class _Still:
    """`Listing.still` of recordings.

    Attributes:
        found: The file of each session; of one with several recordings, one without size.
        several: By index, the recordings of such a session.
        unsized: Whether a recording may be listed without its size.
    """

    found: Sequence[Found]
    several: Mapping[int, Sequence[Part]]
    unsized: bool

    def __call__(self, index: int, stamps: Sequence[Sequence[Any]]) -> bool:
        parts = self.several.get(index)
        if parts is None:
            return all(self._is_same(self.found[index], stamp) for stamp in stamps)
        made, *of_parts = stamps
        if tuple(made) != _composition(parts) or len(of_parts) != len(parts):
            return False
        return all(map(self._is_same, parts, of_parts))

    def _is_same(self, item: Found | Part, stamp: Sequence[Any]) -> bool:
        unknown = item.problem or (self.unsized and not item.size)
        return bool(unknown) or is_still(item.path, item.size, item.mtime_ns, stamp)


def _put_together(
    listed: Recordings, members: Mapping[str, Sequence[Member]], where: str
) -> tuple[list[Found], dict[int, list[Part]], list[str]]:
    """The sessions of a folder, sorted: recordings that stand alone, and those that a table puts together.

    Returns:
        found: One per session; of one with several recordings, a file without size, which matches no other as a
            duplicate.
        several: By index, the recordings of sessions whose id is not the name of their only one.
        notes: Lines for people.
    """
    by_name = {plain(item.name): item for item in listed.recordings}
    by_path: dict[str, Found] = {}
    if any(plain(member.path) not in by_name for of_it in members.values() for member in of_it):
        by_path = {plain(item.path): item for item in listed.recordings}
    waiting, excluded = (frozenset(map(plain, names)) for names in (listed.waiting, listed.excluded))
    root = posixpath.dirname(where) if files.is_file(where) else where
    taken: set[str] = set()
    session_of: dict[str, str] = {}
    parts_of: dict[str, list[Part]] = {}
    n_waiting = 0
    for session_id, of_session in members.items():
        of_it = [by_name.get(plain(member.path)) or by_path.get(plain(member.path)) for member in of_session]
        _require_own(session_id, filter(None, of_it), session_of)
        if len(of_session) == 1 and plain(session_id) in by_name:
            continue
        there = {item.name for item in of_it if item}
        if not there:
            continue
        taken |= there
        if any(plain(member.path) in waiting for member in of_session):
            n_waiting += 1
            continue
        parts_of[session_id] = [
            _part(item, member, where, root)
            for item, member in zip(of_it, of_session, strict=True)
            if plain(member.path) not in excluded
        ]
    alone = [item for item in listed.recordings if item.name not in taken]
    if double := next((item.name for item in alone if item.name in parts_of), None):
        raise ReadManifestError(
            f"{named(double)} is a recording below {where}, and by the table a session of other recordings. Give the "
            "session another id."
        )
    together = [
        Found(name, next((part.path for part in parts if not part.problem), where)) for name, parts in parts_of.items()
    ]
    found = sorted([*alone, *together], key=lambda item: item.name)
    several = {index: parts_of[item.name] for index, item in enumerate(found) if item.name in parts_of}
    waits = f"{n_waiting:,} sessions have a recording that is too young, and wait for the next run"
    return found, several, [waits] if n_waiting else []


def _require_own(session_id: str, recordings: Iterable[Found], session_of: dict[str, str]) -> None:
    """Note whose recordings these are; refuse one that is of another session already."""
    for item in recordings:
        if (other := session_of.setdefault(item.name, session_id)) != session_id:
            raise ReadManifestError(
                f"by the table of calls the recording {named(item.name)} is of the session {named(other)} and of the "
                f"session {named(session_id)}. A recording is in one session, once; drop a row."
            )


def _n_unused_turns(table: pa.Table, parts: Sequence[Part], brought: Mapping[str, Sequence[Turn]]) -> int:
    """How many recordings have several channels and turns that name none of them."""
    unnamed = {name for name, turns in brought.items() if any(turn.channel is None for turn in turns)}
    with_several = set(table["audio_path"].filter(pc.greater(table["n_channels"], 1)).to_pylist()) if unnamed else ()
    return sum(part.name in unnamed and shown(part.path) in with_several for part in parts)


def _part(item: Found | None, member: Member, where: str, root: str) -> Part:
    """A recording of a session as it is listed; as missing where it is not."""
    if item:
        return Part(item.name, item.path, member.offset_s, item.problem, item.size, item.mtime_ns)
    absolute = files.is_uri(member.path) or posixpath.isabs(member.path)
    path = member.path if absolute else files.join(root, member.path)
    missing = "missing", f"the table names it, and it is not among the recordings of {where}"
    return Part(member.path, path, member.offset_s, missing)


def _composition(parts: Sequence[Part]) -> Stamp:
    """A digest that shows whether a session still has the same recordings."""
    return Stamp(len(parts), 0, digest(*(f"{part.name}\t{part.offset_s}" for part in parts))[:16])
