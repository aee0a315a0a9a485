"""The feature store: Parquet parts of whole sessions, written by `jobs/extract.py` or any other program.

A store is a folder of `part-*.parquet`, one row an utterance, sessions whole within a part. Only `session_id`, `utt_id`
and one of the streams are needed; absent columns get the defaults of the contract on reading. `_vaemo.json` describes
the features; a store written by hand need not have it. Other names of the files, folders such as `split=train/` between
them (whose names are a column then), and a single file are read as well. Other folders are not read; if there are
features in them, a note says so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaemo import files
from vaemo.errors import ColumnError, ReadStoreError
from vaemo.progress import say
from vaemo.tables import (
    holds_vectors,
    kind_of_file,
    length_of_vectors,
    near_misses,
    session_order,
    shown,
    typed,
    vectors,
    with_column,
)
from vaemo.targets import Target, label_names
from vaemo.units import DIMENSIONS, STATUSES, STREAMS

SCHEMA_VERSION = 1
INFO = "_vaemo.json"

_COLUMNS = {
    "session_id": pa.string(),
    "utt_id": pa.string(),
    "speaker_id": pa.string(),
    "position": pa.int32(),
    "split": pa.string(),
    "fold": pa.string(),
    "channel": pa.int32(),
    "n_channels": pa.int32(),
    "role": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "duration_s": pa.float64(),
    "bandwidth_hz": pa.float32(),
    "status": pa.string(),
    "reason": pa.string(),
}
_AFTER = {
    "duplicate_of": pa.string(),
    "lost_s": pa.float64(),
    "voice": pa.int32(),
    "voice_margin": pa.float32(),
    "role_by": pa.string(),
    "role_margin": pa.float32(),
    "audio_path": pa.string(),
    "offset_s": pa.float64(),
    "level_db": pa.float32(),
    "snr_db": pa.float32(),
}
"""Columns whose place in a part is after the labels and the observed values, which are float32."""
_IDS = ("session_id", "utt_id")
_DECISIVE = (*_IDS, "position", "start_s", "end_s", "status")

_READERS = 16
_PROBED = 10
_MAGIC = b"PAR1"
SUFFIXES = (".parquet", ".pq", ".parq")
"""How the names of a store's files end."""

_WALKED = 100_000
"""Files that are looked at below a store for Parquet files that are not read."""

_A_STORE = "a feature store is a folder of part-*.parquet files"
_OTHERS = {
    "model.safetensors": "is a checkpoint",
    "_run.json": "is a run of training",
    "_sweep.json": "is a sweep",
    "deltas.safetensors": "holds personal models",
    "_provenance.json": "holds scores",
    "metrics.json": "holds an evaluation",
}
"""Other folders that vaemo writes, by a name in them; the first that is there says it."""

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".pkl", ".pickle", ".feather", ".arrow", ".npz", ".npy", ".pt", ".h5")
"""Suffixes of other formats that features are kept in."""


def part_schema(dims: Mapping[str, int], targets: Sequence[str | Target] = DIMENSIONS) -> pa.Schema:
    """The columns of a part, in order: ids, place, status, labels, then one fixed-size list of float32 per stream."""
    labels = [(name, pa.float32()) for name in label_names(targets)]
    streams = [(stream, pa.list_(pa.float32(), dims[stream])) for stream in STREAMS if stream in dims]
    return pa.schema([*_COLUMNS.items(), *labels, *_AFTER.items(), *streams])


@dataclass(frozen=True)
class FeatureStore:
    """An opened store: its parts, columns and dimensions.

    Attributes:
        path: The folder, or the single file.
        parts: Paths of its Parquet files, sorted.
        dims: Dimension of each stream that the store has.
        columns: Names of the columns that are in any of the files.
        info: The content of `_vaemo.json`, empty where there is none.
    """

    path: str
    parts: tuple[str, ...]
    dims: Mapping[str, int]
    columns: frozenset[str]
    info: Mapping[str, Any] = field(default_factory=dict)
    _distinct: set[tuple[str, ...]] = field(default_factory=set, init=False, repr=False, compare=False)
    """Sets of files whose ids were found to be distinct, so that this is checked once."""

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """By stream, the fingerprint of the extractor that made it, as far as the store records it."""
        return {stream: facts.get("fingerprint") for stream, facts in self.info.get("extractors", {}).items()}

    @staticmethod
    def open(
        path: str, parts: Sequence[str] | None = None, listed: Sequence[files.Found] | None = None
    ) -> FeatureStore:
        """Find a store's parts, columns and dimensions: reads the footer of every part and hardly any rows.

        Args:
            path: Of the folder or the file.
            parts: What `find_parts` found there; None finds them.
            listed: All that lies in the folder, if that is known.

        Raises:
            ReadStoreError: if there is no part, a required column is missing, some parts lack a stream for utterances
                with status `ok`, or `_vaemo.json` has another schema.
        """
        parts = find_parts(path, listed) if parts is None else parts
        if not parts:
            raise ReadStoreError(f"{path} {_without_parts(path, listed)}; {_A_STORE}.")
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                footers = list(pool.map(functools.partial(_read_footer, path), parts))
        except ReadStoreError:
            if found := _other_folder(path):
                raise ReadStoreError(f"{path} {found}; {_A_STORE}.") from None
            raise
        _note_unread(path, listed)
        dims = {stream: _dimension(footers, stream) for stream in STREAMS}
        dims = {stream: dim for stream, dim in dims.items() if dim}
        for stream in dims:
            _require_stream(footers, stream)
        columns = frozenset(name for footer in footers for name in footer.names)
        if near := near_misses(sorted(columns), {*_COLUMNS, *label_names(DIMENSIONS)} - columns):
            say(f"{path} has columns that are not read: {near}.")
        return FeatureStore(path, tuple(parts), dims, columns, _read_info(path))

    def read(self, columns: Sequence[str] | None = None, parts: Sequence[str] | None = None) -> pa.Table:
        """Rows with every column of the contract, defaults filled in, sessions contiguous and in order.

        Args:
            columns: Only these, others than the contract's being numbers, such as labels of further targets; streams
                are read only where they are asked for. None is all of the contract.
            parts: Only these files; None is all.

        Raises:
            ReadStoreError: as `read_parts`.
        """
        return pa.concat_tables(self.read_parts(columns, parts))

    def read_parts(self, columns: Sequence[str] | None = None, parts: Sequence[str] | None = None) -> list[pa.Table]:
        """What `read` returns, file by file.

        Raises:
            ReadStoreError: for a missing column, a column of another type, a stream of another dimension, a status that
                does not exist, a session whose rows have a position, or else a time, in part, a repeated utterance, or
                a session in two of the files; names the file, and where it can the row, counted from 1.
        """
        wanted = list(part_schema(self.dims).names if columns is None else columns)
        paths = self.parts if parts is None else tuple(parts)
        with ThreadPoolExecutor(_READERS) as pool:
            tables = list(pool.map(functools.partial(self._read_part, [*wanted, *_IDS]), paths))
        if paths not in self._distinct:
            _refuse_repeated(tables, paths)
            self._distinct.add(paths)
        return [table.select(wanted) for table in tables]

    def _read_part(self, wanted: Sequence[str], path: str) -> pa.Table:
        with _opened(path) as file:
            footer = _Footer.of(file, self.path, path)
            # Columns that decide order, status and defaults are always read; streams only on request.
            needed = {*wanted, *_DECISIVE}
            table = file.read([name for name in file.schema_arrow.names if name in needed])
        try:
            for name, value in footer.partition.items():
                table = _with_partition(table, name, value)
            return _normalise(table, wanted, self.dims)
        except ColumnError as error:
            where = path
            if error.row is not None:
                utt_id = table["utt_id"][error.row].as_py()
                where = f"{path}, row {error.row + 1}, utterance {shown(utt_id)}"
            raise ReadStoreError(f"{where}: {error.text}.") from None


def find_parts(path: str, listed: Sequence[files.Found] | None = None) -> list[str]:
    """The Parquet files of a store: below a folder, also in folders `column=value`; or the one file that it is.

    Args:
        path: Of the folder or the file.
        listed: All that lies in the folder, if that is known.
    """
    if listed is None and files.is_file(path):
        return [path]
    found = files.list_partitioned(path, listed)
    named = [part for name, part in found if name.lower().endswith(SUFFIXES)]
    # Some programs write files without a suffix.
    bare = [part for name, part in found if "." not in name]
    if named or not any(files.head(part) == _MAGIC for part in bare[:_PROBED]):
        return named
    return [part for part in bare if files.head(part) == _MAGIC]


def is_store(path: str, parts: Sequence[str] | None = None) -> bool:
    """Whether a path is a store, and not a manifest, a table of calls, or recordings.

    A folder is one that has a `_vaemo.json`, or a Parquet file with `session_id`, `utt_id` and a stream of vectors; a
    file is one that is such a file.

    Args:
        path: Of a file or folder.
        parts: What `find_parts` found there; None finds them.
    """
    if not files.is_file(path) and files.exists(files.join(path, INFO)):
        return True
    found = find_parts(path) if parts is None else parts
    return any(files.head(part) == _MAGIC and _holds_features(path, part) for part in found)


def write_part(folder: str, name: str, table: pa.Table) -> None:
    """Write one part, whole or not at all."""
    files.write_parquet_whole(files.join(folder, name), table)


def store_info(
    extractors: Mapping[str, Mapping[str, Any]],
    label_range: Sequence[float],
    native_range: Sequence[float] | Mapping[str, Sequence[float]] | None,
    settings: Mapping[str, Any],
    targets: Sequence[str] = DIMENSIONS,
) -> dict[str, Any]:
    """The content of `_vaemo.json`, without the fingerprint.

    Args:
        extractors: Per stream its `name`, `version`, `dim` and `fingerprint`.
        label_range: The scale of the labels in the store.
        native_range: The scale that they came on, or that of each target; null where it is the same.
        settings: The config's sections that decide what the features are.
        targets: Whose labels are on that scale; those of others are as they came.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "extractors": dict(extractors),
        "label_range": list(label_range),
        "native_range": _plain_range(native_range) if native_range else None,
        "targets": list(targets),
        "settings": dict(settings),
    }


def _plain_range(native: Sequence[float] | Mapping[str, Sequence[float]]) -> Any:
    return {name: list(ends) for name, ends in native.items()} if isinstance(native, Mapping) else list(native)


def partition_of(store: str, path: str) -> dict[str, str | None]:
    """Columns and values that the folders of a store, such as `split=train`, name for a file; null as None."""
    (_, folder), (_, inner) = files.filesystem_of(store), files.filesystem_of(path)
    pairs = (each.partition("=") for each in inner[len(folder.rstrip("/")) + 1 :].split("/")[:-1])
    return {unquote(name): None if value == _NULL_PARTITION else unquote(value) for name, _, value in pairs}


@dataclass(frozen=True)
class _Footer:
    """The metadata of a file, without its rows.

    Attributes:
        path: The file.
        types: Arrow types of its columns.
        partition: Columns and values that its folders name; null as None.
        n_rows: How many rows it has.
    """

    path: str
    types: Mapping[str, pa.DataType]
    partition: Mapping[str, str | None]
    n_rows: int

    @property
    def names(self) -> list[str]:
        return [*self.types, *(name for name in self.partition if name not in self.types)]

    @staticmethod
    def of(file: pq.ParquetFile, store: str, path: str) -> _Footer:
        schema = file.schema_arrow
        types = dict(zip(schema.names, schema.types, strict=True))
        footer = _Footer(path, types, partition_of(store, path), file.metadata.num_rows)
        held = ", ".join(footer.names)
        missing = [name for name in _IDS if name not in footer.names]
        if missing:
            raise ReadStoreError(f"{path} lacks the column {missing[0]}; it has {held}.")
        if not any(stream in footer.types for stream in STREAMS):
            raise ReadStoreError(f"{path} has none of the feature columns {', '.join(STREAMS)}; it has {held}.")
        if len(footer.types) < len(schema.names):
            repeated = next(name for name in schema.names if schema.names.count(name) > 1)
            raise ReadStoreError(f"{path} has the column {repeated} twice; one is needed.")
        return footer


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    filesystem, inner = files.filesystem_of(path)
    try:
        with filesystem.open_input_file(inner) as source:
            yield pq.ParquetFile(source, pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno or files.is_uri(path)):
            raise
        found = kind_of_file(files.head(path, 8)) or " ".join(str(error).split())
        what = "a damaged Parquet file" if isinstance(error, OSError) else "not a Parquet file"
        raise ReadStoreError(f"{path} is {what} ({found}); remove it or write it again.") from None


def _read_footer(store: str, path: str) -> _Footer:
    with _opened(path) as file:
        return _Footer.of(file, store, path)


def _holds_features(store: str, path: str) -> bool:
    try:
        types = _read_footer(store, path).types
    except ReadStoreError:
        return False
    return any(stream in types and holds_vectors(types[stream]) for stream in STREAMS)


def _other_folder(path: str) -> str | None:
    """What a folder is that vaemo writes, in words; None if it may be a store."""
    if files.is_file(path) or files.exists(files.join(path, INFO)):
        return None
    return next((what for name, what in _OTHERS.items() if files.exists(files.join(path, name))), None)


def _unread(path: str, listed: Sequence[files.Found] | None) -> Iterator[files.Found]:
    """Parquet files in folders that `find_parts` does not enter, one of each folder."""
    folders = set()
    for item in itertools.islice(files.walk(path) if listed is None else listed, _WALKED):
        *above, name = item.name.split("/")
        entered = all("=" in each for each in above)
        if entered or any(each.startswith("_") for each in (*above, name)) or tuple(above) in folders:
            continue
        if name.lower().endswith(SUFFIXES):
            folders.add(tuple(above))
            yield item


def _note_unread(path: str, listed: Sequence[files.Found] | None) -> None:
    """Print a note if a folder below a store, which is no store of its own, has features that are not read."""
    if files.is_file(path):
        return
    for item in _unread(path, listed):
        folder = item.name.rpartition("/")[0]
        if not files.exists(files.join(path, folder, INFO)) and _holds_features(path, item.path):
            say(
                f"{path}: {item.name} is not read, though it has features: below a store only folders named "
                f"column=value are read. Move it up, or rename {folder}, for example to split=train."
            )
            return


def _without_parts(path: str, listed: Sequence[files.Found] | None) -> str:
    if not files.exists(path):
        return "does not exist"
    if what := _other_folder(path):
        return what
    if unread := list(_unread(path, listed)):
        name = next((item.name for item in unread if _holds_features(path, item.path)), unread[0].name)
        folder = name.rpartition("/")[0]
        return (
            f"holds Parquet files only in folders that are not read, such as {name}: give that folder, move the "
            f"files up, or rename {folder} as column=value, for example split=train"
        )
    other = next((name for name, _ in files.list_partitioned(path) if name.lower().endswith(_TABLES)), None)
    return "holds no Parquet files" + (f", but {other}: write it with pandas' DataFrame.to_parquet" if other else "")


def _read_info(path: str) -> dict[str, Any]:
    info_path = files.join(path, INFO)
    if files.is_file(path) or not files.exists(info_path):
        return {}
    info = files.read_json(info_path)
    if not isinstance(info, dict) or info.get("schema_version") != SCHEMA_VERSION:
        found = info.get("schema_version") if isinstance(info, dict) else info
        raise ReadStoreError(
            f"{info_path} says schema_version {found!r}; this vaemo reads {SCHEMA_VERSION}. "
            "Extract the store again, or use the vaemo that wrote it."
        )
    return info


def _dimension(footers: Sequence[_Footer], stream: str) -> int:
    """Length of the first vector of a stream; 0 where the whole store has none."""
    for footer in footers:
        if stream not in footer.types or not footer.n_rows:
            continue
        try:
            # Of fixed-size lists the type says it; of others as few rows are read as it takes.
            length = length_of_vectors(pa.nulls(0, footer.types[stream]), stream)
            if length is None:
                with _opened(footer.path) as file:
                    batches = file.iter_batches(1024, columns=[stream])
                    lengths = (length_of_vectors(batch[stream], stream) for batch in batches)
                    length = next(filter(None, lengths), None)
        except ColumnError as error:
            raise ReadStoreError(f"{footer.path}: {error.text}.") from None
        if length:
            return length
    return 0


def _require_stream(footers: Sequence[_Footer], stream: str) -> None:
    """Refuse a stream that some parts have and others lack, unless nothing in them has features."""
    having = next(footer.path for footer in footers if stream in footer.types)
    for footer in footers:
        if stream in footer.types or not footer.n_rows:
            continue
        status = pa.nulls(1, pa.string())
        if "status" in footer.types:
            with _opened(footer.path) as file:
                status = file.read(["status"])["status"]
        if pc.any(pc.fill_null(pc.equal(typed(status, "status", pa.string()), "ok"), True)).as_py():
            raise ReadStoreError(
                f"{footer.path} lacks the column {stream}, which {having} has; give every utterance with status ok "
                "the same streams, or drop the column."
            )


def _normalise(table: pa.Table, wanted: Sequence[str], dims: Mapping[str, int]) -> pa.Table:
    """The columns that are wanted, and `_DECISIVE` ones, typed, filled, in session order."""
    n = table.num_rows

    def column(name: str) -> pa.Array:
        type_ = _type_of(name)
        return typed(table[name], name, type_) if name in table.column_names else pa.nulls(n, type_)

    held = dict.fromkeys([*_DECISIVE, *wanted])
    columns: dict[str, Any] = {name: column(name) for name in held if name not in dims}
    for name in _IDS:
        absent = pc.index(columns[name].is_null(), True).as_py()
        if absent >= 0:
            raise ColumnError(f"it has no {name}; every utterance needs one", absent)
    if "speaker_id" in columns:
        columns["speaker_id"] = columns["speaker_id"].fill_null(columns["session_id"])
    columns["status"] = status = columns["status"].fill_null("ok")
    unknown = pc.index(pc.invert(pc.is_in(status, pa.array(STATUSES))), True).as_py()
    if unknown >= 0:
        raise ColumnError(
            f"status {shown(status[unknown].as_py())} is unknown; allowed are {', '.join(STATUSES)}", unknown
        )
    if "duration_s" in columns:
        length = pc.subtract(columns["end_s"], columns["start_s"])
        columns["duration_s"] = pc.coalesce(columns["duration_s"], length)
    ok = pc.equal(status, "ok")
    for stream in wanted:
        if stream not in dims:
            continue
        type_ = pa.list_(pa.float32(), dims[stream])
        held = vectors(table[stream], stream, dims[stream]) if stream in table.column_names else pa.nulls(n, type_)
        absent = pc.index(pc.and_(held.is_null(), ok), True).as_py()
        if absent >= 0:
            raise ColumnError(f"it has status ok but no {stream} vector; give it one, or another status", absent)
        columns[stream] = held
    order, position = session_order(
        columns["session_id"], columns["position"], columns["start_s"], ok.to_numpy(zero_copy_only=False)
    )
    columns["position"] = pa.array(position)
    normalised = pa.table(columns)
    return normalised if order is None else normalised.take(pa.array(order))


def _with_partition(table: pa.Table, name: str, value: str | None) -> pa.Table:
    """The table with the column that its folder names; where the file has the column too, its gaps filled.

    Raises:
        ColumnError: if a value in the file is another than the folder's.
    """
    named = pa.repeat(pa.scalar(value, pa.string()), table.num_rows)
    if name not in table.column_names:
        return table.append_column(name, named)
    type_ = _type_of(name)
    held, named = typed(table[name], name, type_), typed(named, name, type_)
    other = pc.index(pc.not_equal(held, named), True).as_py()
    if other >= 0:
        raise ColumnError(
            f"{name} is {shown(held[other].as_py())} in a folder that is named {name}={value}; move the row, or drop "
            "the column from the file",
            other,
        )
    return with_column(table, name, pc.coalesce(held, named))


def _type_of(name: str) -> pa.DataType:
    return {**_COLUMNS, **_AFTER}.get(name, pa.float32())


def _refuse_repeated(tables: Sequence[pa.Table], paths: Sequence[str]) -> None:
    """Refuse a session that is in two files, and an utterance that occurs twice."""
    sessions = [pc.unique(table["session_id"]) for table in tables]
    for name, ids, advice in (
        ("session_id", sessions, "a session must be whole within one file"),
        ("utt_id", [table["utt_id"] for table in tables], "ids must be unique"),
    ):
        chunks = [chunk for each in ids for chunk in (each.chunks if isinstance(each, pa.ChunkedArray) else [each])]
        joined = pa.chunked_array(chunks, pa.string())
        if len(pc.unique(joined)) == len(joined):
            continue
        counts = pc.value_counts(joined)
        repeated = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
        where = [path for path, each in zip(paths, ids, strict=True) if pc.any(pc.equal(each, repeated)).as_py()]
        what = f"{'session' if name == 'session_id' else name} {shown(repeated.as_py())}"
        found = f"in {where[0]} and in {where[1]}" if len(where) > 1 else f"more than once in {where[0]}"
        raise ReadStoreError(f"{what} occurs {found}; {advice}.")
