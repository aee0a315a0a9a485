"""A feature store as a source."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.audio.archive import Stamp
from vaemo.config import Config
from vaemo.data.sessions import label_ranges
from vaemo.parts.shards import digest
from vaemo.pipeline.sources.base import Batch, Listing, Tools, stamp_of, starts_of_sessions, with_problems
from vaemo.pipeline.sources.roles import with_roles, with_voice_roles
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import cut_by_vaemo
from vaemo.store import FeatureStore, part_schema
from vaemo.tables import joined
from vaemo.targets import observed_names
from vaemo.units import STREAMS

_DIGESTED = 16
"""How many numbers of every vector enter a session's digest."""


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
        starts, session_ids = starts_of_sessions(table, lengths)
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
            still=_Still(self.store, part, session_ids),
            units=[1] * len(session_ids),
            unit="sessions",
            n_cut=int(np.add.reduceat(cut, starts).astype(bool).sum()) if len(starts) else 0,
            roles=tuple(pc.unique(table["role"]).drop_null().to_pylist()),
            places=[self.store.path],
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """The rows of the parts; roles that are missing come from the calls, or the channels' fixed order."""
        tables, stamps, targets = [], {}, tools.config.model.targets
        only = pa.array(json.loads(packed["only"]), pa.string()) if packed["only"] else None
        for part in json.loads(packed["parts"]):
            held = self.store.read(part_schema(self.store.dims, targets).names, [part])
            # Before the next part is read, and before stamps name sessions that are not described.
            held = held if only is None else held.filter(pc.is_in(held["session_id"], only))
            about = stamp_of(part) or Stamp(0, 0)
            for session_id, content in _content_digests(held, self.store.dims).items():
                stamps[session_id] = [about._replace(digest=content)]
            tables.append(held)
        table = pa.concat_tables(tables)
        table = label_ranges(tools.config, self.store).mapped(table, observed_names(targets), self.store.path)
        table = with_problems(table, packed)
        if tools.rules:
            table = with_voice_roles(with_roles(table, tools.rules, calls), tools, tools.rules, calls)
        return Batch(table, stamps)


class _Still:
    """`Listing.still` of a store; a part is looked at once, and read once if it was written again.

    Args:
        store: The store.
        part: The number of each session's part.
        session_ids: Of the sessions.
    """

    def __init__(self, store: FeatureStore, part: np.ndarray, session_ids: Sequence[str]) -> None:
        self._store, self._part, self._session_ids = store, part, session_ids
        self._now = functools.cache(lambda number: stamp_of(store.parts[number]))
        self._digests = functools.cache(
            lambda number: _content_digests(store.read(parts=[store.parts[number]]), store.dims)
        )

    def __call__(self, index: int, stamps: Sequence[Sequence[Any]]) -> bool:
        number = int(self._part[index])
        current, (before,) = self._now(number), stamps
        if current is None or (current.size, current.mtime_ns) == tuple(before[:2]):
            return True
        return self._digests(number)[self._session_ids[index]] == before[2]


def _content_digests(table: pa.Table, dims: Mapping[str, int]) -> dict[str, str]:
    """By session, a digest of what its scores follow from, of every vector some numbers."""
    starts, session_ids = starts_of_sessions(table, [table.num_rows])
    texts = [table[name].cast(pa.string()).fill_null("") for name in ("utt_id", "speaker_id", "channel", "status")]
    lines = pc.binary_join_element_wise(*texts, "\t").to_pylist()
    vectors = []
    for stream in STREAMS:
        if stream in dims:
            column = joined(table[stream])
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


def _digests(lines: list[str], starts: np.ndarray) -> list[str]:
    edges = [*starts.tolist(), len(lines)]
    return [digest(*lines[a:b])[:16] for a, b in itertools.pairwise(edges)]
