"""Sources of features and scores: a feature store, a manifest, or recordings.

A source is light and is sent to every worker. Its listing (`list`) stays on the driver: the sessions, their keys for
`vaemo.parts.shards`, and `pack`, which describes some of them to a worker. `read` turns such a description into rows
of a feature store, whole sessions in order, and stamps from which a later run detects changed input.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.archive import Listing as Recordings
from vaemo.audio.archive import Stamp, is_still, is_table_of_paths, list_recordings
from vaemo.audio.formats import kind_of
from vaemo.audio.recording import Decoder
from vaemo.audio.several import Member, plain
from vaemo.config import AudioConfig, Config
from vaemo.data.manifest import file_of, with_labels
from vaemo.data.sessions import label_ranges
from vaemo.data.speakers import unit
from vaemo.data.spool import open_rows, read_rows
from vaemo.errors import ReadManifestError, UsageError, named
from vaemo.features import Extractor
from vaemo.files import Found
from vaemo.parts.shards import digest
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import NOT_KNOWN, RoleRules, cut_by_vaemo
from vaemo.store import FeatureStore, find_parts, is_store, part_schema
from vaemo.tables import codes, with_column
from vaemo.targets import Target, observed_names
from vaemo.units import DIMENSIONS, STREAMS
from vaemo.utterances import (
    Course,
    Parties,
    Problem,
    extract_recording,
    extract_session,
    extract_utterances,
    listed_only,
    unsaid_roles,
)
from vaemo.voices.channels import Voice
from vaemo.voices.prints import Voiceprints
from vaemo.voices.roles import UNKNOWN, Evidence, VoiceRole, expected_voice, of_piece, roles_of_voices
from vaemo.voices.turns import Turn, digest_of, read_voices, turns_of_json, turns_to_json

_DIGESTED = 16
"""How many numbers of every vector enter a session's digest."""


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
        without = len(names) - len(turns)
        note = (
            [f"--voices-from {path} is of {len(turns):,} recordings, and has none of {without:,} others"]
            if without
            else []
        )
        return replace(self, turns=turns, contents=contents, notes=[*self.notes, *note])


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
    """What a worker has read: rows of a feature store, and the stamps of each session's inputs."""

    table: pa.Table
    stamps: Mapping[str, Sequence[Stamp]]


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


def open_source(path: str, config: Config, *, exclude: Sequence[str] = ()) -> Source:
    """The source that a path names: a feature store (see `vaemo.store.is_store`), a manifest, or recordings.

    Recordings are those of a folder, or those that a table of paths names (`vaemo.audio.archive.read_paths`).

    Args:
        path: What `--input` names.
        config: Sections audio and extract.
        exclude: Patterns of recordings to leave out.

    Raises:
        UsageError: if there is nothing, or a single recording.
        ReadStoreError: for a store that cannot be read, and a folder that holds nothing but other Parquet files.
    """
    if not files.exists(path):
        raise UsageError(f"--input {path} does not exist; give a feature store, a manifest or a folder of recordings.")
    single = files.is_file(path)
    # A bucket is listed once, whatever its content; on a disk most of it need not be listed.
    listed = list(files.walk(path)) if files.is_uri(path) and not single else None
    parts = find_parts(path, listed)
    if is_store(path, parts):
        source: Source = StoreSource(FeatureStore.open(path, parts))
    elif single:
        if kind_of(path, config.audio) == "audio":
            raise UsageError(f"--input {path} is a recording; give the folder that it lies in.")
        if is_table_of_paths(path):
            return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s)
        source = ManifestSource(path, config.extract.root)
    elif parts and all(kind_of(item.name, config.audio) == "other" for item in listed or files.walk(path)):
        # Tables may be beside recordings. Alone they were meant as a store: the error names what they lack.
        source = StoreSource(FeatureStore.open(path, parts))
    else:
        return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s, listed)
    if exclude:
        raise UsageError(f"--exclude leaves out recordings of a folder, and --input {path} is none.")
    return source


@dataclass(frozen=True)
class StoreSource:
    """A feature store: shards follow its parts, so that each part is read once, by one worker."""

    store: FeatureStore
    kind = "store"
    needs_features = False
    replaceable = False
    counts_rows = False

    @property
    def path(self) -> str:
        """The store."""
        return self.store.path

    def shard_size(self, config: Config) -> int:
        """Replaying costs little: many sessions."""
        return config.score.shard_sessions

    def list(self, calls: Calls | None = None) -> Listing:
        """Read the ids of every part; a part's first session carries the weight of all of it."""
        counted = self.store.read_parts(["session_id", "utt_id", "channel", "role"])
        lengths = [table.num_rows for table in counted]
        table = pa.concat_tables(counted).combine_chunks()
        starts, session_ids = _runs(table, lengths)
        part = np.searchsorted(np.cumsum(lengths), starts, side="right")
        sessions_in = np.bincount(part, minlength=len(lengths))
        firsts = np.r_[True, part[1:] != part[:-1]]
        weights = np.where(firsts, sessions_in[part], 0)

        def pack(indices: Sequence[int]) -> dict[str, Any]:
            parts, n_picked = np.unique(part[list(indices)], return_counts=True)
            whole = (n_picked == sessions_in[parts]).all()
            return {
                "parts": json.dumps([self.store.parts[number] for number in parts]),
                "only": "" if whole else json.dumps([session_ids[index] for index in indices]),
            }

        @functools.cache
        def now(number: int) -> Stamp | None:
            return _stat(self.store.parts[number])

        @functools.cache
        def digests(number: int) -> dict[str, str]:
            return _content_digests(self.store.read(parts=[self.store.parts[number]]), self.store.dims)

        def still(index: int, stamps: Sequence[Sequence[Any]]) -> bool:
            current, number = now(int(part[index])), int(part[index])
            (before,) = stamps
            if current is None or (current.size, current.mtime_ns) == tuple(before[:2]):
                return True
            return digests(number)[session_ids[index]] == before[2]

        cut = cut_by_vaemo(table)
        return Listing(
            session_ids=session_ids,
            contents=_digests(table["utt_id"].to_pylist(), starts),
            weights=weights.tolist(),
            pack=pack,
            still=still,
            units=[1] * len(session_ids),
            unit="sessions",
            n_cut=int(np.add.reduceat(cut, starts).astype(bool).sum()) if len(starts) else 0,
            roles=tuple(pc.unique(table["role"]).drop_null().to_pylist()),
            places=[self.store.path],
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """The rows of the parts; roles that are missing come from the calls, or the channels' fixed order."""
        tables, stamps, targets = [], {}, tools.config.model.targets
        for part in json.loads(packed["parts"]):
            held = self.store.read(part_schema(self.store.dims, targets).names, [part])
            about = _stat(part) or Stamp(0, 0)
            for session_id, content in _content_digests(held, self.store.dims).items():
                stamps[session_id] = [about._replace(digest=content)]
            tables.append(held)
        table = pa.concat_tables(tables)
        if packed["only"]:
            table = table.filter(pc.is_in(table["session_id"], pa.array(json.loads(packed["only"]))))
        table = label_ranges(tools.config, self.store).mapped(table, observed_names(targets), self.store.path)
        table = _with_problems(table, packed)
        if tools.rules:
            table = _with_voice_roles(_with_roles(table, tools.rules, calls), tools, tools.rules, calls)
        return Batch(table, stamps)


@dataclass(frozen=True)
class ManifestSource:
    """A manifest: its utterances are cut and their features computed.

    Attributes:
        path: Of the manifest.
        root: Below which everything that it names must lie; None is anywhere.
        label_range: Native range of each target that labels must lie in; None does not check them.
        targets: Whose labels and observed values are read.
    """

    path: str
    root: str | None = None
    label_range: Mapping[str, tuple[float, float]] | None = None
    targets: Sequence[str | Target] = DIMENSIONS
    kind = "manifest"
    needs_features = True
    replaceable = True
    counts_rows = True

    def shard_size(self, config: Config) -> int:
        """The number of utterances in a shard."""
        return config.extract.shard_utterances

    def list(self, calls: Calls | None = None) -> Listing:
        """Read the manifest."""
        held = open_rows(self.path, label_range=self.label_range, root=self.root, targets=self.targets)
        cut = np.zeros(len(held.session_ids), bool)
        for first, table in held.tables():
            cut[np.searchsorted(held.starts, first + np.flatnonzero(cut_by_vaemo(table)), side="right") - 1] = True

        def still(index: int, stamps: Sequence[Sequence[Any]]) -> bool:
            paths = _audio_files(held.rows(index)["audio_path"])
            now = [_stat(path) for path in paths]
            # Missing audio was deleted at the end of its retention; results made from it stay.
            return len(stamps) != len(paths) or all(
                current is None or is_still(path, current.size, current.mtime_ns, before)
                for before, current, path in zip(stamps, now, paths, strict=True)
            )

        sizes = held.sizes.tolist()
        return Listing(
            session_ids=held.session_ids,
            contents=held.contents,
            weights=sizes,
            pack=held.described,
            still=still,
            units=sizes,
            unit="utterances",
            n_cut=int(cut.sum()),
            roles=tuple(held.roles),
            places=held.rows(0)["audio_path"][:1].to_pylist(),
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Features of the rows."""
        rows = read_rows(packed)
        targets = tools.config.model.targets
        label_ranges(tools.config).mapped(with_labels(rows, targets), observed_names(targets), self.path)
        starts, session_ids = _runs(rows, [rows.num_rows])
        paths = rows["audio_path"].combine_chunks()
        edges = [*starts.tolist(), rows.num_rows]
        # Taken before reading, so that a write in the meantime shows as a change.
        stamps = {
            session_id: [Stamp.of(path) or Stamp(0, 0) for path in _audio_files(paths[first:stop])]
            for session_id, (first, stop) in zip(session_ids, itertools.pairwise(edges), strict=True)
        }
        problems = _problems_of(packed)
        unread = pc.is_in(rows["session_id"], pa.array(list(problems), pa.string()))
        tables = [
            listed_only(rows.filter(unread), extractors=tools.extractors, config=tools.config),
            extract_utterances(
                rows.filter(pc.invert(unread)),
                extractors=tools.extractors,
                config=tools.config,
                decoder=tools.decoder,
            ),
        ]
        table = _with_problems(pa.concat_tables(tables), packed)
        order = pc.index_in(rows["utt_id"], value_set=table["utt_id"].combine_chunks())
        table = table.take(order)
        return Batch(_with_roles(table, tools.rules, calls) if tools.rules else table, stamps)


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

        def is_same(item: Found | Part, stamp: Sequence[Any]) -> bool:
            unknown = item.problem or (unsized and not item.size)
            return bool(unknown) or is_still(item.path, item.size, item.mtime_ns, stamp)

        def still(index: int, stamps: Sequence[Sequence[Any]]) -> bool:
            parts = several.get(index)
            if parts is None:
                return all(is_same(found[index], stamp) for stamp in stamps)
            made, *of_parts = stamps
            if tuple(made) != _composition(parts) or len(of_parts) != len(parts):
                return False
            return all(map(is_same, parts, of_parts))

        def described(index: int) -> tuple[str, Any]:
            parts = several.get(index)
            return found[index].name, [part[:4] for part in parts] if parts else found[index].path

        alone = [index for index in range(len(found)) if index not in several]
        return Listing(
            session_ids=[item.name for item in found],
            contents=[""] * len(found),
            weights=[len(several[index]) if index in several else 1 for index in range(len(found))],
            pack=lambda indices: {"recordings": json.dumps(list(map(described, indices)))},
            still=still,
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
        problems, tables, stamps = _problems_of(packed), [], {}
        brought = {name: turns_of_json(held) for name, held in json.loads(packed.get("turns", "{}")).items()}
        for session_id, told in json.loads(packed["recordings"]):
            problem = problems.get(session_id)
            parts = [Part(session_id, told)] if isinstance(told, str) else [Part(*each) for each in told]
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
        return Batch(pa.concat_tables(tables), stamps)

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
    parts_of: dict[str, list[Part]] = {}
    n_waiting = 0
    for session_id, of_session in members.items():
        if len(of_session) == 1 and plain(session_id) in by_name:
            continue
        of_it = [by_name.get(plain(member.path)) or by_path.get(plain(member.path)) for member in of_session]
        there = {item.name for item in of_it if item}
        if not there:
            continue
        taken |= there
        if any(plain(member.path) in waiting for member in of_session):
            n_waiting += 1
            continue
        parts_of[session_id] = [
            Part(item.name, item.path, member.offset_s, item.problem, item.size, item.mtime_ns)
            if item
            else Part(
                member.path,
                member.path
                if files.is_uri(member.path) or posixpath.isabs(member.path)
                else files.join(root, member.path),
                member.offset_s,
                _missing(where),
            )
            for item, member in zip(of_it, of_session, strict=True)
            if plain(member.path) not in excluded
        ]
    alone = [item for item in listed.recordings if item.name not in taken]
    if double := next((item.name for item in alone if item.name in parts_of), None):
        raise ReadManifestError(
            f"{named(double)} is a recording below {where}, and by the table a session of other recordings. Give the "
            "session another id."
        )
    for name, parts in parts_of.items():
        alone.append(Found(name, next((part.path for part in parts if not part.problem), where)))
    found = alone
    found.sort(key=lambda item: item.name)
    several = {index: parts_of[item.name] for index, item in enumerate(found) if item.name in parts_of}
    notes = (
        [f"{n_waiting:,} sessions have a recording that is too young, and wait for the next run"] if n_waiting else []
    )
    return found, several, notes


def _missing(where: str) -> tuple[str, str]:
    return "missing", f"the table names it, and it is not among the recordings of {where}"


def _composition(parts: Sequence[Part]) -> Stamp:
    """A digest that shows whether a session still has the same recordings."""
    return Stamp(len(parts), 0, digest(*(f"{part.name}\t{part.offset_s}" for part in parts))[:16])


def evidence_of(calls: Calls | None, session_id: str) -> Evidence:
    """The table of calls on the voices of a session."""
    if calls is None:
        return Evidence()
    return Evidence(calls.voice_roles.get(session_id, ()), calls.agent_ids.get(session_id))


def _audio_files(paths: pa.Array | pa.ChunkedArray) -> Sequence[str]:
    """The different files that rows of a manifest are cut from, in their order."""
    return list(dict.fromkeys(map(file_of, paths.to_pylist())))


def _stat(path: str) -> Stamp | None:
    """Size and time of a file; None where it cannot be asked."""
    try:
        found = files.size_and_time(path)
    except OSError:
        return None
    return Stamp(*found) if found else None


def _content_digests(table: pa.Table, dims: Mapping[str, int]) -> dict[str, str]:
    """By session, a digest of what its scores follow from, of every vector some numbers."""
    starts, session_ids = _runs(table, [table.num_rows])
    texts = [table[name].cast(pa.string()).fill_null("") for name in ("utt_id", "speaker_id", "channel", "status")]
    lines = pc.binary_join_element_wise(*texts, "\t").to_pylist()
    vectors = []
    for stream in STREAMS:
        if stream in dims:
            column = table[stream].combine_chunks()
            matrix = np.zeros((len(column), dims[stream]), np.float32)
            matrix[column.is_valid().to_numpy(zero_copy_only=False)] = (
                column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dims[stream])
            )
            vectors.append(np.ascontiguousarray(matrix[:, :: max(dims[stream] // _DIGESTED, 1)]))
    found = {}
    for session_id, (first, stop) in zip(session_ids, itertools.pairwise([*starts.tolist(), len(lines)]), strict=True):
        content = hashlib.blake2b("\n".join(lines[first:stop]).encode(), digest_size=8)
        for matrix in vectors:
            content.update(matrix[first:stop].data)
        found[session_id] = content.hexdigest()
    return found


def _problems_of(packed: Mapping[str, Any]) -> dict[str, Problem]:
    return {name: Problem(**facts) for name, facts in json.loads(packed.get("problems", "{}")).items()}


def _with_problems(table: pa.Table, packed: Mapping[str, Any]) -> pa.Table:
    """The rows, those of sessions with a problem under its status."""
    problems = _problems_of(packed)
    if not problems:
        return table
    row = pc.index_in(table["session_id"], value_set=pa.array(list(problems), pa.string()))
    for name in ("status", "reason"):
        values = pa.array([getattr(problem, name) for problem in problems.values()], pa.string())
        table = with_column(table, name, pc.coalesce(values.take(row), table[name]))
    return table


def _runs(table: pa.Table, part_lengths: Sequence[int]) -> tuple[np.ndarray, list[str]]:
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


def _digests(lines: list[str], starts: np.ndarray) -> list[str]:
    edges = [*starts.tolist(), len(lines)]
    return [digest(*lines[a:b])[:16] for a, b in itertools.pairwise(edges)]


def _with_roles(table: pa.Table, rules: RoleRules, calls: Calls | None) -> pa.Table:
    """Fill in the roles that rows with a channel lack, from the calls or the channels' fixed order.

    Where no row says how many channels the recording had (`n_channels`), it had those that its rows name: were the
    last ones silent all along, fewer are found than the calls name, and none of them gets a role.
    """
    cut = cut_by_vaemo(table)
    # A role that extraction filled in (`mixed`) was not declared.
    unnamed = table["role"].is_null().to_numpy() | (cut & pc.is_in(table["role"], pa.array(NOT_KNOWN)).to_numpy())
    # `mixed` in one of several channels is what was heard: they hold the same.
    alike = pc.and_(pc.equal(table["role"], "mixed"), pc.greater(table["n_channels"], 1))
    unnamed &= ~alike.fill_null(False).to_numpy()
    if not unnamed.any() or not (cut.any() or calls or rules.channel_roles):
        return table
    channel = table["channel"].cast(pa.int64()).fill_null(-1).to_numpy()
    recording, keys = _recordings_in(table, calls)
    n_channels = np.zeros(len(keys), np.int64)
    np.maximum.at(n_channels, recording, np.maximum(channel + 1, table["n_channels"].fill_null(0).to_numpy()))
    from_calls = calls.roles if calls else {}
    by_recording = [
        rules.of_channels(int(n), from_calls.get(key, ())) if n else () for key, n in zip(keys, n_channels, strict=True)
    ]
    roles = table["role"].to_pylist()
    for row in np.flatnonzero(unnamed):
        roles[row] = _known(by_recording[recording[row]][channel[row]], cut[row]) if channel[row] >= 0 else None
    return with_column(table, "role", pa.array(roles, pa.string()))


def _recordings_in(table: pa.Table, calls: Calls | None) -> tuple[np.ndarray, list[str]]:
    """Which recording each row is of, (rows,), and for each recording the id under which the calls know it."""
    starts, session_ids = _runs(table, [table.num_rows])
    session = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, table.num_rows]))
    apart = np.array([bool(calls and calls.has_several(name)) for name in session_ids], bool)
    if "offset_s" in table.column_names:
        apart[session[table["offset_s"].is_valid().to_numpy()]] = True
    if not apart.any():
        return session, session_ids
    path = np.where(apart[session], codes(table["audio_path"]), -1)
    _, first, recording = np.unique(session * (path.max() + 2) + path, return_index=True, return_inverse=True)
    paths = table["audio_path"].take(pa.array(first)).to_pylist()
    of_session = [session_ids[number] for number in session[first]]
    keys = [calls.key_of(name, path) if calls else name for name, path in zip(of_session, paths, strict=True)]
    return recording, keys


def _with_voice_roles(table: pa.Table, tools: Tools, rules: RoleRules, calls: Calls | None) -> pa.Table:
    """The roles of voices within a channel; the channel's own role does not apply to them."""
    if table["voice"].null_count == table.num_rows:
        return table
    held = table.select(
        ["channel", "n_channels", "voice", "voice_margin", "start_s", "end_s", "role", "role_by"]
    ).to_pylist()
    margins = table["role_margin"].to_pylist()
    recording, keys = _recordings_in(table, calls)
    for number, key in enumerate(keys):
        places = np.flatnonzero(recording == number)
        rows = [held[place] for place in places]
        if all(row["voice"] is None for row in rows):
            continue
        n_channels = max(max(row["n_channels"] or 0, (row["channel"] or 0) + 1) for row in rows)
        said = rules.of_channels(n_channels, calls.roles.get(key, ()) if calls else ())
        voices = _voices_of(table.take(pa.array(places)), rows, tools)
        roles = roles_of_voices(voices, said, evidence_of(calls, key), tools.prints, tools.config.voices)
        with_voices = {voice.channel for voice in voices}
        for place, row in zip(places, rows, strict=True):
            if row["channel"] not in with_voices:
                continue
            known = roles.get((row["channel"], row["voice"]), VoiceRole(UNKNOWN))
            decided = of_piece(known, row["voice_margin"], tools.config.voices)
            row["role"], row["role_by"], margins[place] = decided.role, decided.by, decided.margin
    for name in ("role", "role_by"):
        table = with_column(table, name, pa.array([row[name] for row in held], pa.string()))
    return with_column(table, "role_margin", pa.array(margins, pa.float32()))


def _voices_of(table: pa.Table, rows: Sequence[Mapping[str, Any]], tools: Tools) -> list[Voice]:
    """The voices in a session of a store, their vectors from its speaker stream where persons are known by that."""
    vectors: list[Any] = table["speaker"].to_pylist() if tools.prints else [None] * len(rows)
    found: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        if row["voice"] is not None:
            found.setdefault((row["channel"], row["voice"]), []).append(number)
    voices = []
    for (channel, voice), numbers in sorted(found.items()):
        least = tools.config.voices.min_margin
        own = [
            np.array(vectors[n])
            for n in numbers
            if vectors[n] is not None and (rows[n]["voice_margin"] is None or rows[n]["voice_margin"] >= least)
        ]
        brought = [rows[n]["role"] for n in numbers if rows[n]["role_by"] == "voices_from"]
        speech_s = sum((rows[n]["end_s"] or 0.0) - (rows[n]["start_s"] or 0.0) for n in numbers)
        vector = unit(np.sum(own, axis=0)) if own else None
        voices.append(Voice(channel, voice, speech_s, vector, role=brought[0] if brought else None))
    return voices


def _known(role: str, cut: bool) -> str | None:
    """A missing role is null for an utterance that the data declares: that is research data."""
    return role if cut or role not in NOT_KNOWN else None
