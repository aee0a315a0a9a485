"""A manifest as a source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.audio.archive import Stamp, is_still
from vaemo.config import Config
from vaemo.data.manifest import file_of, with_labels
from vaemo.data.sessions import label_ranges
from vaemo.data.spool import open_rows, read_rows
from vaemo.pipeline.sources.base import (
    Batch,
    Listing,
    Tools,
    problems_of,
    stamp_of,
    starts_of_sessions,
    with_problems,
)
from vaemo.pipeline.sources.roles import with_roles
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import cut_by_vaemo
from vaemo.targets import Target, observed_names
from vaemo.units import DIMENSIONS
from vaemo.utterances import extract_utterances, listed_only


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
            now = [stamp_of(path) for path in paths]
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
            notes=held.notes,
            places=held.rows(0)["audio_path"][:1].to_pylist(),
        )

    def read(self, packed: Mapping[str, Any], tools: Tools, calls: Calls | None = None) -> Batch:
        """Features of the rows."""
        rows = read_rows(packed)
        targets = tools.config.model.targets
        label_ranges(tools.config).mapped(with_labels(rows, targets), observed_names(targets), self.path)
        starts, session_ids = starts_of_sessions(rows, [rows.num_rows])
        paths = rows["audio_path"].combine_chunks()
        edges = [*starts.tolist(), rows.num_rows]
        # Taken before reading, so that a write in the meantime shows as a change.
        stamps = {
            session_id: [Stamp.of(path) or Stamp(0, 0) for path in _audio_files(paths[first:stop])]
            for session_id, (first, stop) in zip(session_ids, itertools.pairwise(edges), strict=True)
        }
        problems = problems_of(packed)
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
        table = with_problems(pa.concat_tables(tables), packed)
        order = pc.index_in(rows["utt_id"], value_set=table["utt_id"].combine_chunks())
        table = table.take(order)
        return Batch(with_roles(table, tools.rules, calls) if tools.rules else table, stamps)


def _audio_files(paths: pa.Array | pa.ChunkedArray) -> Sequence[str]:
    """The different files that rows of a manifest are cut from, in their order."""
    return list(dict.fromkeys(map(file_of, paths.to_pylist())))
