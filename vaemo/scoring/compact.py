"""Joining small parts of scores, so that an archive scored every night has few files, not thousands.

`python -m vaemo.scores compact --scores SCORES`. Parts of one folder (of one date) are joined up to a size. What is
being joined is noted in SCORES/`JOINING` first: a kill at any moment loses nothing, vaemo reads every row once, and the
next `compact` or the next scoring ends what was begun. Keys and stamps are kept, so that scoring finds everything
finished.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from vaemo import files
from vaemo.errors import OtherRunError
from vaemo.parts.index import Entry, Index
from vaemo.parts.lease import lease
from vaemo.parts.shards import digest, read_keys, tag_keys
from vaemo.parts.tally import count
from vaemo.scores import JOINING, PROVENANCE, SESSIONS, UTTERANCES, joined, superseded

TARGET_BYTES = 128 << 20
"""Size of a joined file where none is given."""


def compact(scores: str, target_bytes: int = TARGET_BYTES) -> tuple[int, int]:
    """Join small parts of a folder of scores.

    Args:
        scores: The folder.
        target_bytes: Size that a joined file comes near to and does not exceed, by the sizes of its parts.

    Returns:
        How many files of utterances there were, and are.

    Raises:
        OtherRunError: if a run is writing the folder, or a part was not written by a job.
    """
    if not files.exists(files.join(scores, PROVENANCE)):
        raise OtherRunError(f"{scores} has no {PROVENANCE}; give a folder that jobs/score.py wrote.")
    folder = files.join(scores, UTTERANCES)
    with lease(scores):
        end_joining(scores)
        with Index.open(folder) as index:
            before = len(index.entries)
            for names in list(_groups(index.entries, target_bytes)):
                _join(scores, index, names)
            return before, len(index.entries)


def end_joining(scores: str) -> None:
    """Complete an interrupted `compact`, if there is one. The caller holds the lease."""
    path = files.join(scores, JOINING)
    if not files.exists(path):
        return
    gone = superseded(scores)
    # Last those of the utterances: a part without them is none.
    for kind in (SESSIONS, UTTERANCES):
        for name in sorted(gone):
            part = files.join(scores, kind, name)
            if files.exists(part):
                files.delete(part)
    files.delete(path)


def _groups(entries: Mapping[str, Entry], target_bytes: int) -> Iterator[list[str]]:
    """Parts to be joined, at least two each."""
    small = sorted(name for name, entry in entries.items() if entry.size <= target_bytes // 2)
    for _, names in groupby(small, posixpath.dirname):
        held: list[str] = []
        size = 0
        for name in names:
            if held and size + entries[name].size > target_bytes:
                if len(held) > 1:
                    yield held
                held, size = [], 0
            held.append(name)
            size += entries[name].size
        if len(held) > 1:
            yield held


def _join(scores: str, index: Index, names: Sequence[str]) -> None:
    folder = files.join(scores, UTTERANCES)
    tables, keys, stamps = [], list[str](), dict[str, Any]()
    for name in names:
        path = files.join(folder, name)
        tables.append(files.read_parquet(path))
        more, noted = read_keys(path)
        keys += more
        stamps |= noted
    rows = joined([table.replace_schema_metadata(None) for table in tables])
    sessions = joined(
        [files.read_parquet(files.join(scores, SESSIONS, name)).replace_schema_metadata(None) for name in names]
    )
    whole = posixpath.join(posixpath.dirname(names[0]), f"part-{digest(*keys)[:16]}.parquet")
    files.write_json(files.join(scores, JOINING), {"part": whole, "of": list(names)})
    files.write_parquet_whole(files.join(scores, SESSIONS, whole), sessions)
    # From here on the joined part counts.
    files.write_parquet_whole(files.join(folder, whole), tag_keys(rows, keys, stamps))
    entry = Entry.written(folder, whole, keys, stamps, count(rows))
    end_joining(scores)
    index.replace(names, entry)
