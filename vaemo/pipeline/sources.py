"""What features and scores are made of: a feature store, a manifest, or recordings.

A source is light and travels to every worker. Its listing (`list`) stays on the driver: the sessions, their keys for
`vaemo.parts.shards`, and `pack`, which describes some of them to a worker. `read` turns such a description into rows
of a feature store, whole sessions in order, and stamps by which a later run tells whether the input has changed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.archive import Stamp, is_still, is_table_of_paths, list_recordings
from vaemo.audio.formats import kind_of
from vaemo.audio.recording import Decoder
from vaemo.config import AudioConfig, Config
from vaemo.data.manifest import COLUMNS, file_of, read_manifest, with_labels
from vaemo.data.sessions import label_ranges
from vaemo.errors import UsageError
from vaemo.features import Extractor
from vaemo.files import Found
from vaemo.parts.shards import digest
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import NOT_KNOWN, RoleRules, cut_by_vaemo
from vaemo.store import FeatureStore, find_parts, is_store, part_schema
from vaemo.tables import codes, from_bytes, to_bytes, with_column
from vaemo.targets import Target, label_names, observed_names
from vaemo.units import DIMENSIONS, STREAMS
from vaemo.utterances import Problem, extract_recording, extract_utterances, listed_only, unsaid_roles
from vaemo.voices.channels import Voice
from vaemo.voices.clustering import unit
from vaemo.voices.prints import Voiceprints
from vaemo.voices.roles import UNKNOWN, Evidence, VoiceRole, expected_voice, of_piece, roles_of_voices
from vaemo.voices.turns import Turn, digest_of, read_voices, turns_of_json, turns_to_json

_DIGESTED = 16
"""Numbers of every vector that a session's digest is made of."""


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
        turns: By index, who speaks when in a recording, where somebody has brought that.
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
    turns: Mapping[int, Sequence[Turn]] = field(default_factory=dict)

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
            turns={place[index]: turns for index, turns in self.turns.items() if index in place},
        )

    def without(self, indices: Collection[int]) -> Listing:
        """The other sessions."""
        if not indices:
            return self
        gone = frozenset(indices)
        return self.select([index for index in range(len(self.session_ids)) if index not in gone])

    def described(self, indices: Sequence[int]) -> dict[str, Any]:
        """What a worker is told of these sessions: `pack`, and their problems."""
        known = {self.session_ids[index]: vars(self.problems[index]) for index in indices if index in self.problems}
        brought = {
            self.session_ids[index]: turns_to_json(self.turns[index]) for index in indices if index in self.turns
        }
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
                f"--voices-from {path} tells voices apart in recordings, and the input is none: its utterances were "
                "found before. Give it when they are extracted."
            )
        turns = read_voices(path, self.session_ids)
        contents = [
            f"{content},voices {digest_of(turns[number])}" if number in turns else content
            for number, content in enumerate(self.contents)
        ]
        without = len(self.session_ids) - len(turns)
        note = (
            [f"--voices-from {path} is of {len(turns):,} recordings, and says nothing of {without:,}"]
            if without
            else []
        )
        return replace(self, turns=turns, contents=contents, notes=[*self.notes, *note])


@dataclass(frozen=True, eq=False)
class Tools:
    """What a worker needs to compute features: empty for a store.

    `rules` are None where all speech is wanted, whoever speaks; `prints` are voices of persons, where roles of voices
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
    """Where sessions come from."""

    kind: str
    """`store`, `manifest` or `recordings`."""

    needs_features: bool
    """Whether features are still to be computed."""

    replaceable: bool
    """Whether inputs that have changed are listed while the others go on, or refused."""

    counts_rows: bool
    """Whether its unit is the utterance."""

    def list(self) -> Listing:
        """Find the sessions, on the driver."""
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
    parts = find_parts(path)
    if is_store(path, parts):
        source: Source = StoreSource(FeatureStore.open(path))
    elif files.is_file(path):
        if kind_of(path, config.audio) == "audio":
            raise UsageError(f"--input {path} is a recording; give the folder that it lies in.")
        if is_table_of_paths(path):
            return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s)
        source = ManifestSource(path, config.extract.root)
    elif parts and all(kind_of(item.name, config.audio) == "other" for item in files.walk(path)):
        # Tables may lie beside recordings. Alone they were meant as a store: this says what they lack.
        source = StoreSource(FeatureStore.open(path))
    else:
        return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s)
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

    def shard_size(self, config: Config) -> int:
        """Replaying costs little: many sessions."""
        return config.score.shard_sessions

    def list(self) -> Listing:
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
        """So many utterances."""
        return config.extract.shard_utterances

    def list(self) -> Listing:
        """Read the manifest."""
        table = read_manifest(self.path, label_range=self.label_range, root=self.root, targets=self.targets)
        starts, session_ids = _runs(table, [table.num_rows])
        sizes = np.diff(np.r_[starts, table.num_rows])
        # Where a corpus lies may change between two runs, what it holds may not.
        names = pc.replace_substring_regex(table["audio_path"], r"^.*/", "")
        of_further = [name for name in label_names(self.targets) if name not in COLUMNS]
        texts = [names, *(table[name] for name in (*COLUMNS, *of_further) if name != "audio_path")]
        texts = [pc.fill_null(text.cast(pa.string()), "") for text in texts]
        lines = pc.binary_join_element_wise(*texts, "\t").to_pylist()
        cut = cut_by_vaemo(table)

        def rows(index: int) -> pa.Table:
            return table.slice(starts[index], sizes[index])

        def still(index: int, stamps: Sequence[Sequence[Any]]) -> bool:
            paths = _audio_files(rows(index)["audio_path"])
            now = [_stat(path) for path in paths]
            # Audio that is gone was deleted when its time was over; what was made of it stays.
            return len(stamps) != len(paths) or all(
                current is None or is_still(path, current.size, current.mtime_ns, before)
                for before, current, path in zip(stamps, now, paths, strict=True)
            )

        return Listing(
            session_ids=session_ids,
            contents=_digests(lines, starts),
            weights=sizes.tolist(),
            pack=lambda indices: {"rows": to_bytes(pa.concat_tables(map(rows, indices)))},
            still=still,
            units=sizes.tolist(),
            unit="utterances",
            n_cut=int(np.add.reduceat(cut, starts).astype(bool).sum()),
            roles=tuple(pc.unique(table["role"]).drop_null().to_pylist()),
            places=table["audio_path"][:1].to_pylist(),
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Features of the rows."""
        rows = from_bytes(packed["rows"])
        targets = tools.config.model.targets
        label_ranges(tools.config).mapped(with_labels(rows, targets), observed_names(targets), self.path)
        starts, session_ids = _runs(rows, [rows.num_rows])
        paths = rows["audio_path"].combine_chunks()
        edges = [*starts.tolist(), rows.num_rows]
        # Taken before anything is read: what is written meanwhile shows as a change.
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
    """

    path: str
    audio: AudioConfig | None = None
    exclude: tuple[str, ...] = ()
    min_age_s: float = 0.0
    kind = "recordings"
    needs_features = True
    replaceable = True
    counts_rows = False

    def shard_size(self, config: Config) -> int:
        """So many recordings."""
        return config.extract.shard_recordings

    def list(self) -> Listing:
        """List the files that may be audio; nothing is opened."""
        listed = list_recordings(self.path, self.audio, exclude=self.exclude, min_age_s=self.min_age_s)
        found = listed.recordings
        # A table may not say how large its recordings are: then it is not seen whether they have changed, or are twins.
        unsized = files.is_file(self.path)

        def still(index: int, stamps: Sequence[Sequence[Any]]) -> bool:
            item = found[index]
            unknown = item.problem or (unsized and not item.size)
            return bool(unknown) or all(is_still(item.path, item.size, item.mtime_ns, stamp) for stamp in stamps)

        return Listing(
            session_ids=[item.name for item in found],
            contents=[""] * len(found),
            weights=[1] * len(found),
            pack=lambda indices: {"recordings": json.dumps([(found[i].name, found[i].path) for i in indices])},
            still=still,
            units=[1] * len(found),
            unit="recordings",
            n_cut=len(found),
            roles=(),
            problems={index: Problem(*item.problem) for index, item in enumerate(found) if item.problem},
            notes=listed.notes,
            files=() if unsized and not all(item.size or item.problem for item in found) else found,
            places=[self.path, *itertools.islice((item.path for item in found if not item.problem), 1)],
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Find the utterances and compute the features of those that may be scored."""
        problems, tables, stamps = _problems_of(packed), [], {}
        brought = {name: turns_of_json(held) for name, held in json.loads(packed.get("turns", "{}")).items()}
        for name, path in json.loads(packed["recordings"]):
            problem = problems.get(name)
            if problem is None or problem.status == "duplicate":
                stamps[name] = [Stamp.of(path) or Stamp(0, 0)]
            tables.append(self._read_one(name, path, tools, calls, problem, brought.get(name)))
        return Batch(pa.concat_tables(tables), stamps)

    def _read_one(
        self,
        name: str,
        path: str,
        tools: Tools,
        calls: Calls | None,
        problem: Problem | None,
        turns: Sequence[Turn] | None,
    ) -> pa.Table:
        rules, said = tools.rules, calls.roles.get(name, ()) if calls else ()
        evidence, how = evidence_of(calls, name), tools.config.voices
        return extract_recording(
            path,
            name,
            extractors=tools.extractors,
            config=tools.config,
            decoder=tools.decoder,
            roles_of=(lambda n_channels: rules.of_channels(n_channels, said)) if rules else unsaid_roles,
            hears=lambda role: rules is None or rules.scores(role, cut=True) or role in rules.context,
            problem=problem,
            turns=turns,
            roles_of_voices=lambda voices, roles: roles_of_voices(voices, roles, evidence, tools.prints, how),
            verifies=tools.prints is not None,
            expected=expected_voice(evidence, tools.prints, how),
        )


def evidence_of(calls: Calls | None, session_id: str) -> Evidence:
    """What a table of calls says of the voices of a session."""
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
                column.drop_null().flatten().to_numpy().reshape(-1, dims[stream])
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
    # A role that extraction filled in (`mixed`) was not given by anybody.
    unnamed = table["role"].is_null().to_numpy() | (cut & pc.is_in(table["role"], pa.array(NOT_KNOWN)).to_numpy())
    if not unnamed.any() or not (cut.any() or calls or rules.channel_roles):
        return table
    starts, session_ids = _runs(table, [table.num_rows])
    channel = table["channel"].cast(pa.int64()).fill_null(-1).to_numpy()
    n_channels = np.maximum.reduceat(np.maximum(channel + 1, table["n_channels"].fill_null(0).to_numpy()), starts)
    from_calls = calls.roles if calls else {}
    by_session = [
        rules.of_channels(int(n), from_calls.get(name, ())) if n else ()
        for name, n in zip(session_ids, n_channels, strict=True)
    ]
    session = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, table.num_rows]))
    roles = table["role"].to_pylist()
    for row in np.flatnonzero(unnamed):
        roles[row] = _known(by_session[session[row]][channel[row]], cut[row]) if channel[row] >= 0 else None
    return with_column(table, "role", pa.array(roles, pa.string()))


def _with_voice_roles(table: pa.Table, tools: Tools, rules: RoleRules, calls: Calls | None) -> pa.Table:
    """The roles of what is told apart by voice; the channel's alone says nothing of them."""
    if table["voice"].null_count == table.num_rows:
        return table
    held = table.select(
        ["channel", "n_channels", "voice", "voice_margin", "start_s", "end_s", "role", "role_by"]
    ).to_pylist()
    margins = table["role_margin"].to_pylist()
    starts, session_ids = _runs(table, [table.num_rows])
    for session_id, (first, stop) in zip(
        session_ids, itertools.pairwise([*starts.tolist(), table.num_rows]), strict=True
    ):
        rows = held[first:stop]
        if all(row["voice"] is None for row in rows):
            continue
        n_channels = max(max(row["n_channels"] or 0, (row["channel"] or 0) + 1) for row in rows)
        said = rules.of_channels(n_channels, calls.roles.get(session_id, ()) if calls else ())
        voices = _voices_of(table.slice(first, stop - first), rows, tools)
        roles = roles_of_voices(voices, said, evidence_of(calls, session_id), tools.prints, tools.config.voices)
        with_voices = {voice.channel for voice in voices}
        for number, row in enumerate(rows):
            if row["channel"] not in with_voices:
                continue
            known = roles.get((row["channel"], row["voice"]), VoiceRole(UNKNOWN))
            decided = of_piece(known, row["voice_margin"], tools.config.voices)
            row["role"], row["role_by"], margins[first + number] = decided.role, decided.by, decided.margin
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
    """A role that nobody said is null where somebody declared the utterance: that is research data."""
    return role if cut or role not in NOT_KNOWN else None
