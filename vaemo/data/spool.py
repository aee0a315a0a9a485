"""The rows of a manifest as a plan needs them: session after session in order, on disk where there are many.

Reads a manifest some rows at a time (`vaemo.data.manifest.scan_manifest`) and keeps of it what fits any memory: where
each session stands, and a digest of it. The rows themselves lie in Arrow files in a temporary folder of this machine,
sorted where the manifest is not; who does a part of the plan reads its rows there. Few rows stay in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.data.manifest import COLUMNS, COMPUTED, Places, as_schema, check_unique, common_schema, scan_manifest
from vaemo.tables import codes, from_bytes, near_misses, session_order, to_bytes, with_column
from vaemo.targets import Target, label_names
from vaemo.units import DIMENSIONS

IN_MEMORY = 1 << 20
"""More rows than this go to disk."""

_BLOCK = 1 << 19
"""Rows that are sorted at a time."""

_SEEN = 1 << 18
"""Rows that are looked at again at a time."""


@dataclass(frozen=True, eq=False)
class ManifestRows:
    """The sessions of a manifest and where their rows are.

    Attributes:
        session_ids: In the order of their first lines.
        starts: Of each, its first row, (sessions,).
        sizes: Of each, its rows, (sessions,).
        contents: Of each, 16 hex digits that follow from its rows: not from where its audio lies, but from its names.
        roles: That rows name.
        notes: Lines for people: columns that are not read or not kept, and utterances that are not told apart.
    """

    session_ids: Sequence[str]
    starts: np.ndarray
    sizes: np.ndarray
    contents: Sequence[str]
    roles: Sequence[str]
    notes: Sequence[str]
    _spool: _Spool

    def rows(self, index: int) -> pa.Table:
        """The rows of a session."""
        first = int(self.starts[index])
        return _with_position(self._spool.slice(first, first + int(self.sizes[index])))

    def described(self, indices: Sequence[int]) -> dict[str, Any]:
        """The rows of sessions, or where they are, for `read_rows`."""
        ranges: list[list[int]] = []
        for index in indices:
            first, stop = int(self.starts[index]), int(self.starts[index] + self.sizes[index])
            if ranges and ranges[-1][1] == first:
                ranges[-1][1] = stop
            else:
                ranges.append([first, stop])
        if self._spool.folder is not None:
            return {"rows": b"", "spooled": json.dumps([self._spool.places(*range_) for range_ in ranges])}
        table = pa.concat_tables([self._spool.slice(*range_) for range_ in ranges])
        return {"rows": to_bytes(_with_position(table))}

    def tables(self) -> Iterator[tuple[int, pa.Table]]:
        """All rows, some at a time, each with the number of its first."""
        return self._spool.tables()


def read_rows(packed: Mapping[str, Any]) -> pa.Table:
    """The rows that `ManifestRows.described` packed, or says where to find on this machine.

    Raises:
        FileNotFoundError: if they are on another one.
    """
    if packed["rows"]:
        return from_bytes(packed["rows"])
    pieces = itertools.chain.from_iterable(json.loads(packed["spooled"]))
    # Copied: what is read of it later may come when the file is gone.
    table = from_bytes(to_bytes(pa.concat_tables([_map(path).slice(first, n) for path, first, n in pieces])))
    return _with_position(table)


def is_here(spooled: str) -> bool:
    """Whether the files that `ManifestRows.described` names are on this machine."""
    return all(Path(path).exists() for path, _, _ in itertools.chain.from_iterable(json.loads(spooled)))


def packed_rows(packed: Mapping[str, Any]) -> bytes:
    """What another machine is sent in place of `spooled`."""
    return to_bytes(read_rows(packed))


def open_rows(
    path: str,
    *,
    label_range: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    root: str | None = None,
    targets: Sequence[str | Target] = DIMENSIONS,
) -> ManifestRows:
    """The rows of a manifest; arguments and errors as of `vaemo.data.manifest.read_manifest`."""
    spool, schemas, places = _Spool(), list[pa.Schema](), list[Places]()
    number_of: dict[str, int] = {}
    session, hashes = list[np.ndarray](), list[np.ndarray]()
    position, start_s = list[pa.Array](), list[pa.Array]()
    filled, whole = set[str](), list[np.ndarray]()
    for table, of_table in scan_manifest(path, label_range=label_range, root=root, targets=targets):
        names = pc.dictionary_encode(table["session_id"].combine_chunks())
        numbers = [number_of.setdefault(name, len(number_of)) for name in names.dictionary.to_pylist()]
        session.append(np.array(numbers, np.int32)[names.indices.to_numpy()])
        hashes.append(np.fromiter(map(hash, table["utt_id"].to_pylist()), np.int64, table.num_rows))
        position += table["position"].chunks
        offset_s = table["offset_s"].fill_null(0.0) if "offset_s" in table.column_names else 0.0
        start_s += pc.add(table["start_s"], offset_s).chunks
        filled |= {name for name in table.column_names if table[name].null_count < table.num_rows}
        whole.append(_untimed(table))
        places.append(of_table)
        schemas.append(table.schema)
        spool.add(table)
    where = Places(path, places[0].unit, np.concatenate([each.number for each in places]))
    schema, of_row = common_schema(schemas), np.concatenate(session)
    notes = _notes(path, filled, {*COLUMNS, *label_names(targets)} - filled, np.concatenate(whole))
    del places, session, schemas
    spool.conform(schema)
    session_ids = list(number_of)
    with where.named():
        _check_unique(hashes, spool, where)
        ids = pa.DictionaryArray.from_arrays(pa.array(of_row), pa.array(session_ids, pa.string()))
        order, _ = session_order(ids, pa.chunked_array(position, pa.int32()), pa.chunked_array(start_s, pa.float64()))
    del hashes, position, start_s, where, ids
    if order is not None:
        spool, of_row = spool.sorted(order), of_row[order]
    starts = np.flatnonzero(np.r_[True, of_row[1:] != of_row[:-1]])
    sizes = np.diff(np.r_[starts, len(of_row)])
    contents, roles = _contents(spool, starts, sizes, targets)
    return ManifestRows(session_ids, starts, sizes, contents, roles, notes, spool)


def _untimed(table: pa.Table) -> np.ndarray:
    """Hashes of the recordings and channels that rows without times take whole."""
    rows = table.filter(pc.and_(pc.is_null(table["start_s"]), pc.is_null(table["end_s"])))
    pairs = zip(rows["audio_path"].to_pylist(), rows["channel"].to_pylist(), strict=True)
    return np.fromiter(map(hash, pairs), np.int64, rows.num_rows)


def _notes(path: str, filled: Iterable[str], absent: Iterable[str], whole: np.ndarray) -> list[str]:
    notes = []
    if near := near_misses(sorted(filled), absent):
        notes.append(f"{path} has columns that are not read: {near}.")
    if replaced := [name for name in COMPUTED if name in filled]:
        notes.append(
            f"{path} has columns that are not kept: {', '.join(replaced)}. Extraction computes columns of these names; "
            "rename yours if you need them."
        )
    counts = np.unique(whole, return_counts=True)[1]
    if n_alike := int(counts[counts > 1].sum()):
        notes.append(
            f"{path}: {n_alike:,} utterances have neither start_s nor end_s and share a recording and channel with "
            "others: each of them is the whole recording."
        )
    return notes


class _Spool:
    """Tables one after the other, in memory, or in files of a temporary folder that ends with this object.

    Attributes:
        folder: Of the files; None where the tables are in memory.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self._tables: list[pa.Table] = []
        self._paths: list[str] = []
        self._firsts = [0]
        self._schemas: list[pa.Schema] = []
        self._open: dict[int, pa.Table] = {}

    def add(self, table: pa.Table) -> None:
        self._firsts.append(self._firsts[-1] + table.num_rows)
        self._schemas.append(table.schema)
        self._tables.append(table)
        if self.folder is None and self._firsts[-1] > IN_MEMORY:
            self.folder = tempfile.mkdtemp(prefix="vaemo-manifest-")
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        if self.folder is not None:
            for held in self._tables:
                self._paths.append(f"{self.folder}/{len(self._paths):06d}.arrow")
                _write(self._paths[-1], held)
            self._tables = []

    def conform(self, schema: pa.Schema) -> None:
        """Give all tables the same columns."""
        if self.folder is None:
            self._tables = [as_schema(table, schema) for table in self._tables]
            return
        for path, held in zip(self._paths, self._schemas, strict=True):
            if held != schema:
                _write(path, as_schema(_read(path), schema))

    def slice(self, first: int, stop: int) -> pa.Table:
        pieces = [self._mapped(number).slice(begin, n) for number, begin, n in self._pieces(first, stop)]
        return pa.concat_tables(pieces)

    def places(self, first: int, stop: int) -> list[tuple[str, int, int]]:
        """The files that hold rows, and in each the first and how many."""
        return [(self._paths[number], begin, n) for number, begin, n in self._pieces(first, stop)]

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows by their numbers."""
        of_table = np.searchsorted(self._firsts, rows, side="right") - 1
        pieces, places = [], []
        for number in np.unique(of_table):
            picked = np.flatnonzero(of_table == number)
            # Where the pages of a file lie side by side they are read once.
            picked = picked[np.argsort(rows[picked], kind="stable")]
            pieces.append(self._mapped(number).take(pa.array(rows[picked] - self._firsts[number])))
            places.append(picked)
        back = np.empty(len(rows), np.int64)
        back[np.concatenate(places)] = np.arange(len(rows))
        return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))

    def sorted(self, order: np.ndarray) -> _Spool:
        """The same rows in another order."""
        done = _Spool()
        for first in range(0, len(order), _BLOCK):
            done.add(self.take(order[first : first + _BLOCK]))
        return done

    def tables(self) -> Iterator[tuple[int, pa.Table]]:
        """All rows, some at a time, each with the number of its first; not mapped, so that memory is given back."""
        for number, first in enumerate(self._firsts[:-1]):
            table = self._tables[number] if self.folder is None else _read(self._paths[number])
            for begin in range(0, table.num_rows, _SEEN):
                yield first + begin, table.slice(begin, _SEEN)

    def _mapped(self, number: int) -> pa.Table:
        if self.folder is None:
            return self._tables[number]
        if number not in self._open:
            self._open[number] = _map(self._paths[number])
        return self._open[number]

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        number = int(np.searchsorted(self._firsts, first, side="right")) - 1
        while first < stop:
            end = min(stop, self._firsts[number + 1])
            yield number, first - self._firsts[number], end - first
            first, number = end, number + 1


def _check_unique(hashes: list[np.ndarray], spool: _Spool, where: Places) -> None:
    """Refuse an id that occurs twice; only ids of one hash are compared."""
    every = np.concatenate(hashes)
    held = np.sort(every)
    twice = np.unique(held[1:][held[1:] == held[:-1]])
    if len(twice):
        rows = np.flatnonzero(np.isin(every, twice))
        alike = Places(where.path, where.unit, where.number[rows])
        with alike.named():
            check_unique(spool.take(rows)["utt_id"], alike)


def _contents(
    spool: _Spool, starts: np.ndarray, sizes: np.ndarray, targets: Sequence[str | Target]
) -> tuple[list[str], list[str]]:
    """A digest of each session, and the roles that are named."""
    edges = np.r_[starts, starts[-1] + sizes[-1]]
    contents: list[str] = []
    roles: dict[str, None] = {}
    held: list[str] = []
    for first, table in spool.tables():
        stop = first + table.num_rows
        roles |= dict.fromkeys(pc.unique(table["role"]).drop_null().to_pylist())
        row = np.arange(first, stop)
        rank = row - edges[np.searchsorted(edges, row, side="right") - 1]
        lines = _lines(_with_rank(table, rank), targets)
        begin = 0
        for end in edges[np.searchsorted(edges, first, side="right") : np.searchsorted(edges, stop, side="right")]:
            held += lines[begin : end - first]
            contents.append(hashlib.sha256("\0".join(held).encode()).hexdigest()[:16])
            begin, held = int(end - first), []
        held += lines[begin:]
    return contents, list(roles)


def _lines(table: pa.Table, targets: Sequence[str | Target]) -> list[str]:
    """What a session's digest follows from, one text a row."""
    # Where a corpus lies may change between two runs, what it holds may not.
    names = pc.replace_substring_regex(table["audio_path"], r"^.*/", "")
    further = [name for name in label_names(targets) if name not in COLUMNS]
    texts = [names, *(table[name] for name in (*COLUMNS, *further) if name != "audio_path")]
    texts = [pc.fill_null(text.cast(pa.string()), "") for text in texts]
    return pc.binary_join_element_wise(*texts, "\t").to_pylist()


def _with_position(table: pa.Table) -> pa.Table:
    """Whole sessions in order; missing positions are counted from 0."""
    session = codes(table["session_id"])
    starts = np.flatnonzero(np.r_[True, session[1:] != session[:-1]])
    sizes = np.diff(np.r_[starts, len(session)])
    return _with_rank(table, np.arange(len(session)) - np.repeat(starts, sizes))


def _with_rank(table: pa.Table, rank: np.ndarray) -> pa.Table:
    return with_column(table, "position", pc.coalesce(table["position"], pa.array(rank.astype(np.int32))))


def _write(path: str, table: pa.Table) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _read(path: str) -> pa.Table:
    with pa.OSFile(path) as source:
        return pa.ipc.open_file(source).read_all()


def _map(path: str) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(path)).read_all()
