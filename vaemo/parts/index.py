"""The index of a folder of parts: what each part holds, so that a run need not open the parts again.

The index lies beside the parts, in a few Parquet files under `_index`. It is a copy: the parts win. A part that the
index lacks, or that was rewritten since, is opened once; an entry whose part is gone is dropped. So the index may be
deleted, truncated or out of date at any time.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa

from vaemo import files
from vaemo.errors import VaemoError
from vaemo.parts.shards import read_keys
from vaemo.parts.tally import count_file

FOLDER = "_index"

_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("keys", pa.string()),
        ("stamps", pa.string()),
        ("counts", pa.string()),
    ]
)
_FLUSH_S = 20.0
_MOST_FILES = 100
"""More index files than this are joined into one when a run ends."""

_READERS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """The index entry of a part.

    Attributes:
        name: Path below the folder.
        size: Bytes of the file.
        mtime_ns: When it was written.
        keys: JSON list of the keys of its sessions.
        stamps: JSON object: by session, the stamps of its inputs.
        counts: JSON object: what `vaemo.parts.tally.count` says of it.
    """

    name: str
    size: int
    mtime_ns: int
    keys: str
    stamps: str
    counts: str

    @staticmethod
    def of(folder: str, name: str) -> Entry:
        """The entry of a part in its folder; opens the part.

        Raises:
            OtherRunError: if it was not written by a job.
        """
        path = files.join(folder, name)
        size, mtime_ns = files.size_and_time(path) or (0, 0)
        keys, stamps = read_keys(path)
        return Entry(name, size, mtime_ns, json.dumps(keys), json.dumps(stamps), json.dumps(count_file(path)))

    @staticmethod
    def written(folder: str, name: str, keys: Sequence[str], stamps: Mapping[str, Any], counts: Any) -> Entry:
        """Of a part that this process has just written."""
        size, mtime_ns = files.size_and_time(files.join(folder, name)) or (0, 0)
        return Entry(name, size, mtime_ns, json.dumps(keys), json.dumps(stamps), json.dumps(counts))


class Index:
    """The parts of a folder and what they hold; a context that closes it.

    Attributes:
        folder: Where the parts are, and below.
        entries: By the name of the part.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._fresh: list[Entry] = []
        self._flushed = time.monotonic()
        self._stale = False

    @staticmethod
    def open(folder: str) -> Index:
        """Read the index of a folder and bring it up to date with the parts.

        Raises:
            OtherRunError: if a part was not written by a job.
        """
        index = Index(folder)
        there = {found.name: found for found in files.walk(folder) if _is_part(found.name)}
        known = {entry.name: entry for entry in _read(folder)}
        for name, entry in known.items():
            found = there.get(name)
            if found and (found.size, found.mtime_ns) == (entry.size, entry.mtime_ns):
                index.entries[name] = entry
            else:
                index._stale = True
        unknown = sorted(there.keys() - index.entries.keys())
        with ThreadPoolExecutor(_READERS) as pool:
            index._fresh = list(pool.map(lambda name: Entry.of(folder, name), unknown))
        index.entries |= {entry.name: entry for entry in index._fresh}
        return index

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Report the error that ended the run, not a second one from writing the index.
        with contextlib.suppress(*(() if error is None else (VaemoError, OSError))):
            self.close()

    def add(self, entry: Entry) -> dict[str, Any]:
        """Take a part that was written, and give its counts; the index files follow soon, or at `close`."""
        self.entries[entry.name] = entry
        self._fresh.append(entry)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._flush()
        return json.loads(entry.counts)

    def replace(self, names: Iterable[str], entry: Entry) -> None:
        """Take a part that holds what others held."""
        for name in names:
            del self.entries[name]
        self._fresh = [held for held in self._fresh if held.name in self.entries]
        self._stale = True
        self.add(entry)

    def close(self) -> None:
        """Write what is new; join the files where there are many, or some of what they say is out of date."""
        self._flush()
        held = _files(self.folder)
        if len(held) > _MOST_FILES or self._stale:
            _write(self.folder, self.entries.values())
            for path in held:
                files.delete(path)
            self._stale = False

    def _flush(self) -> None:
        if self._fresh:
            _write(self.folder, self._fresh)
        self._fresh, self._flushed = [], time.monotonic()


def forget(folder: str, sessions: Iterable[str]) -> None:
    """Remove every entry that names one of these sessions: its part is opened again by the next run."""
    names = [json.dumps(session)[1:-1] for session in sessions]
    for path in _files(folder):
        entries = list(_read_file(path))
        told = [entry.keys + entry.stamps + entry.counts for entry in entries]
        kept = [entry for entry, said in zip(entries, told, strict=True) if not any(name in said for name in names)]
        if len(kept) < len(entries):
            if kept:
                _write(folder, kept)
            files.delete(path)


def _is_part(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith("_") for part in name.split("/"))


def _files(folder: str) -> list[str]:
    return files.list_files(files.join(folder, FOLDER), ".parquet")


def _read(folder: str) -> Iterator[Entry]:
    """The entries of all index files, later ones of a part last."""
    with ThreadPoolExecutor(_READERS) as pool:
        for entries in pool.map(_read_file, _files(folder)):
            yield from entries


def _read_file(path: str) -> list[Entry]:
    try:
        columns = files.read_parquet(path, _SCHEMA.names).to_pydict()
    except (OSError, pa.ArrowException, KeyError):
        # The parts are authoritative; a damaged index file is ignored.
        return []
    return [Entry(*row) for row in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]


def _write(folder: str, entries: Iterable[Entry]) -> None:
    held = list(entries)
    columns = {name: [getattr(entry, name) for entry in held] for name in _SCHEMA.names}
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    files.write_parquet_whole(files.join(folder, FOLDER, name), pa.table(columns, schema=_SCHEMA))
