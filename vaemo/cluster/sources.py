"""What can be scored: a feature store, a manifest, or recordings; listed by the driver, read by the workers.

A source is light and travels to every worker. Its listing (`list`) stays on the driver: the sessions, their keys for
`vaemo.shards`, and `pack`, which describes some of them to a worker. `read` turns such a description into rows of a
feature store, whole sessions in order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.cluster.extract import list_recordings
from vaemo.cluster.runtime import from_bytes, to_bytes
from vaemo.config import Config
from vaemo.errors import ReadRecordingsError, UsageError
from vaemo.extract import AUDIO_SUFFIXES, extract_recording, extract_utterances
from vaemo.features import Extractor
from vaemo.manifest import COLUMNS, read_manifest
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import NOT_KNOWN, RoleRules, cut_by_vaemo
from vaemo.sessions import OBSERVED, label_range
from vaemo.shards import digest
from vaemo.store import FeatureStore, find_parts, is_store
from vaemo.tables import codes, with_column


@dataclass(frozen=True, eq=False)
class Listing:
    """The sessions of a source.

    Attributes:
        session_ids: All different.
        contents: Per session, a digest of what may not change once it is scored; may be empty.
        weights: Per session, what it adds to a shard.
        pack: Describes the sessions at these indices to a worker: numbers, texts and bytes.
        unit: What is counted, for people.
        n_cut: Sessions with speech that vaemo cut, or will cut, from a recording.
        roles: Distinct roles that the data names.
    """

    session_ids: Sequence[str]
    contents: Sequence[str]
    weights: Sequence[int]
    pack: Callable[[Sequence[int]], dict[str, Any]]
    unit: str
    n_cut: int
    roles: tuple[str, ...]

    def select(self, indices: Sequence[int]) -> Listing:
        """The sessions at these indices."""
        return replace(
            self,
            session_ids=[self.session_ids[index] for index in indices],
            contents=[self.contents[index] for index in indices],
            weights=[self.weights[index] for index in indices],
            pack=lambda picked: self.pack([indices[index] for index in picked]),
        )

    def without(self, indices: Collection[int]) -> Listing:
        """The other sessions."""
        if not indices:
            return self
        gone = frozenset(indices)
        return self.select([index for index in range(len(self.session_ids)) if index not in gone])


@dataclass(frozen=True, eq=False)
class Tools:
    """What a worker needs to compute features: empty for a store."""

    extractors: Mapping[str, Extractor]
    config: Config
    decoder: Decoder | None
    rules: RoleRules


class Source(Protocol):
    """Where sessions come from."""

    needs_features: bool
    """Whether features are still to be computed."""

    def list(self) -> Listing:
        """Find the sessions, on the driver."""
        ...

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None) -> pa.Table:
        """Rows of a feature store for what `pack` described, on a worker."""
        ...


def open_source(path: str, root: str | None = None) -> Source:
    """The source that a path names: a feature store (see `vaemo.store.is_store`), a manifest, or recordings.

    Args:
        path: What `--input` names.
        root: Below which everything that a manifest names must lie.

    Raises:
        UsageError: if there is nothing, or a single recording.
        ReadStoreError: for a store that cannot be read, and a folder that holds nothing but other Parquet files.
    """
    if not files.exists(path):
        raise UsageError(f"--input {path} does not exist; give a feature store, a manifest or a folder of recordings.")
    if is_store(path):
        return StoreSource(FeatureStore.open(path))
    if files.is_file(path):
        if path.lower().endswith(AUDIO_SUFFIXES):
            raise UsageError(f"--input {path} is a recording; give the folder that it lies in.")
        return ManifestSource(path, root)
    try:
        if find_parts(path):
            list_recordings(path)
        return RecordingsSource(path)
    except ReadRecordingsError:
        # Tables may lie beside recordings. Alone they were meant as a store: this says what they lack.
        return StoreSource(FeatureStore.open(path))


@dataclass(frozen=True)
class StoreSource:
    """A feature store: shards follow its parts, so that each part is read once, by one worker."""

    store: FeatureStore
    needs_features = False

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

        cut = cut_by_vaemo(table)
        return Listing(
            session_ids=session_ids,
            contents=_digests(table["utt_id"].to_pylist(), starts),
            weights=weights.tolist(),
            pack=pack,
            unit="sessions",
            n_cut=int(np.add.reduceat(cut, starts).astype(bool).sum()) if len(starts) else 0,
            roles=tuple(pc.unique(table["role"]).drop_null().to_pylist()),
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None) -> pa.Table:
        """The rows of the parts; roles that are missing come from the calls, or the channels' fixed order."""
        table = self.store.read(parts=json.loads(packed["parts"]))
        if packed["only"]:
            table = table.filter(pc.is_in(table["session_id"], pa.array(json.loads(packed["only"]))))
        table = label_range(tools.config, self.store).mapped(table, OBSERVED, self.store.path)
        return _with_roles(table, tools.rules, calls)


@dataclass(frozen=True)
class ManifestSource:
    """A manifest: its utterances are cut and their features computed."""

    path: str
    root: str | None = None
    needs_features = True

    def list(self) -> Listing:
        """Read the manifest."""
        table = read_manifest(self.path, root=self.root)
        starts, session_ids = _runs(table, [table.num_rows])
        sizes = np.diff(np.r_[starts, table.num_rows])
        texts = [pc.fill_null(table[name].cast(pa.string()), "") for name in COLUMNS if name not in ("split", "fold")]
        lines = pc.binary_join_element_wise(*texts, "\t").to_pylist()
        cut = cut_by_vaemo(table)

        def pack(indices: Sequence[int]) -> dict[str, Any]:
            return {"rows": to_bytes(pa.concat_tables([table.slice(starts[i], sizes[i]) for i in indices]))}

        return Listing(
            session_ids=session_ids,
            contents=_digests(lines, starts),
            weights=[1] * len(session_ids),
            pack=pack,
            unit="sessions",
            n_cut=int(np.add.reduceat(cut, starts).astype(bool).sum()),
            roles=tuple(pc.unique(table["role"]).drop_null().to_pylist()),
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None) -> pa.Table:
        """Features of the rows."""
        rows = from_bytes(packed["rows"])
        label_range(tools.config).mapped(rows, OBSERVED, self.path)
        table = extract_utterances(rows, extractors=tools.extractors, config=tools.config, decoder=tools.decoder)
        return _with_roles(table, tools.rules, calls)


@dataclass(frozen=True)
class RecordingsSource:
    """A folder of recordings: utterances are found in each, channel by channel."""

    path: str
    needs_features = True

    def list(self) -> Listing:
        """List the files that may be audio; nothing is opened."""
        found = list_recordings(self.path)

        def pack(indices: Sequence[int]) -> dict[str, Any]:
            return {"recordings": json.dumps([found[index] for index in indices])}

        return Listing(found, [""] * len(found), [1] * len(found), pack, "recordings", len(found), ())

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None) -> pa.Table:
        """Find the utterances and compute the features of those that may be heard."""
        return pa.concat_tables(
            self._read_one(name, tools, calls.roles.get(name, ()) if calls else ())
            for name in json.loads(packed["recordings"])
        )

    def _read_one(self, name: str, tools: Tools, said: Sequence[str | None]) -> pa.Table:
        rules = tools.rules
        return extract_recording(
            files.join(self.path, name),
            name,
            extractors=tools.extractors,
            config=tools.config,
            decoder=tools.decoder,
            roles_of=lambda n_channels: rules.of_channels(n_channels, said),
            hears=lambda role: rules.scores(role, cut=True) or role in rules.context,
        )


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
    # What extraction wrote for want of a name is no name.
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


def _known(role: str, cut: bool) -> str | None:
    """A role that nobody said is null where somebody declared the utterance: that is research data."""
    return role if cut or role not in NOT_KNOWN else None
