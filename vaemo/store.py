"""The feature store: Parquet parts of whole sessions, read from anyone and written by `jobs/extract.py`.

A store is a folder of `part-*.parquet`, one row an utterance, sessions whole within a part. Only `session_id`,
`utt_id` and one of the streams are needed; what is absent gets the defaults of the contract on reading. What the
features are stands in `_vaemo.json`, which a store written by hand need not have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.errors import ReadStoreError
from vaemo.tables import codes
from vaemo.units import STATUSES, STREAMS

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
    "valence": pa.float32(),
    "arousal": pa.float32(),
    "observed_valence": pa.float32(),
    "observed_arousal": pa.float32(),
    "lost_s": pa.float64(),
}


def part_schema(dims: Mapping[str, int]) -> pa.Schema:
    """The columns of a part, in order: ids, place, status, labels, then one fixed-size list of float32 per stream."""
    streams = [(stream, pa.list_(pa.float32(), dims[stream])) for stream in STREAMS if stream in dims]
    return pa.schema([*_COLUMNS.items(), *streams])


@dataclass(frozen=True)
class FeatureStore:
    """A store that was opened: where its parts are and what they hold.

    Attributes:
        path: The folder.
        parts: Paths of its Parquet files, sorted.
        dims: Dimension of each stream that the store has.
        columns: Names of the columns that are in the files.
        info: The content of `_vaemo.json`, empty where there is none.
    """

    path: str
    parts: tuple[str, ...]
    dims: Mapping[str, int]
    columns: frozenset[str]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """By stream, the fingerprint of the extractor that made it, as far as the store says."""
        return {stream: facts.get("fingerprint") for stream, facts in self.info.get("extractors", {}).items()}

    @staticmethod
    def open(path: str) -> FeatureStore:
        """Find a store's parts and dimensions, without reading its rows.

        Raises:
            ReadStoreError: if there is no part, a required column is missing, or `_vaemo.json` has another schema.
        """
        parts = tuple(files.list_files(path, ".parquet"))
        if not parts:
            found = "holds no Parquet files" if files.exists(path) else "does not exist"
            raise ReadStoreError(f"{path} {found}; a feature store is a folder of part-*.parquet files.")
        info_path = files.join(path, INFO)
        info = files.read_json(info_path) if files.exists(info_path) else {}
        if info and info.get("schema_version") != SCHEMA_VERSION:
            raise ReadStoreError(
                f"{info_path} says schema_version {info.get('schema_version')!r}; this vaemo reads {SCHEMA_VERSION}. "
                "Extract the store anew, or use the vaemo that wrote it."
            )
        schema = _read_schema(parts[0])
        _require_columns(parts[0], schema.names)
        dims = {stream: _dimension(parts, stream) for stream in STREAMS if stream in schema.names}
        return FeatureStore(
            path, parts, {stream: dim for stream, dim in dims.items() if dim}, frozenset(schema.names), info
        )

    def read(self, columns: Sequence[str] | None = None, parts: Sequence[str] | None = None) -> pa.Table:
        """Rows with every column of the contract, defaults filled in, sessions contiguous and in order.

        Args:
            columns: Only these; streams are read only where they are asked for. None is all.
            parts: Only these files; None is all.

        Raises:
            ReadStoreError: for a missing column, a column of another type, a stream of another dimension, a status
                that does not exist, or an utterance that stands twice; names the file, and the row where it can.
        """
        wanted = list(part_schema(self.dims).names if columns is None else columns)
        with ThreadPoolExecutor(4) as pool:
            tables = list(pool.map(functools.partial(self._read_part, wanted), parts or self.parts))
        return pa.concat_tables(tables)

    def _read_part(self, wanted: Sequence[str], path: str) -> pa.Table:
        names = _read_schema(path).names
        _require_columns(path, names)
        # What order, status and defaults follow from is read in any case; streams are heavy and are not.
        needed = {*wanted, "session_id", "utt_id", "position", "start_s", "end_s", "status"}
        table = _normalise(
            files.read_parquet(path, [name for name in names if name in needed]),
            path,
            {stream: dim for stream, dim in self.dims.items() if stream in wanted},
        )
        return table.select(wanted)


def write_part(folder: str, name: str, table: pa.Table) -> None:
    """Write one part, whole or not at all."""
    files.write_parquet_whole(files.join(folder, name), table)


def store_info(
    extractors: Mapping[str, Mapping[str, Any]],
    label_range: Sequence[float],
    native_range: Sequence[float] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What `_vaemo.json` says beside the fingerprint.

    Args:
        extractors: Per stream its `name`, `version`, `dim` and `fingerprint`.
        label_range: The scale of the labels in the store.
        native_range: The scale that they came on, null where it is the same.
        settings: The config's sections that decide what the features are.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "extractors": dict(extractors),
        "label_range": list(label_range),
        "native_range": list(native_range) if native_range else None,
        "settings": dict(settings),
    }


def _read_schema(path: str) -> pa.Schema:
    try:
        return files.read_parquet_schema(path)
    except pa.ArrowInvalid as error:
        raise ReadStoreError(f"{path} is not a Parquet file ({error}); remove it or write it again.") from None


def _require_columns(path: str, names: Sequence[str]) -> None:
    missing = [name for name in ("session_id", "utt_id") if name not in names]
    if missing:
        raise ReadStoreError(f"{path} lacks the column {missing[0]}; it has {', '.join(names)}.")
    if not any(stream in names for stream in STREAMS):
        raise ReadStoreError(f"{path} has none of the feature columns {', '.join(STREAMS)}; it has {', '.join(names)}.")


def _dimension(parts: Sequence[str], stream: str) -> int:
    """Length of the first vector of a stream; 0 where the whole store has none."""
    for path in parts:
        type_ = _read_schema(path).field(stream).type
        if pa.types.is_fixed_size_list(type_):
            return type_.list_size
        lengths = pc.drop_null(_lengths(files.read_parquet(path, [stream])[stream], stream, path))
        if len(lengths):
            return int(lengths[0].as_py())
    return 0


def _normalise(table: pa.Table, path: str, dims: Mapping[str, int]) -> pa.Table:
    n = table.num_rows
    columns: dict[str, pa.Array] = {}
    for name, type_ in _COLUMNS.items():
        columns[name] = _cast(name, table[name], type_, path) if name in table.column_names else pa.nulls(n, type_)
    for name in ("session_id", "utt_id"):
        if columns[name].null_count:
            row = int(np.flatnonzero(columns[name].is_null().to_numpy(zero_copy_only=False))[0])
            raise ReadStoreError(f"{path}: row {row} has no {name}; every utterance needs one.")
    repeated = n - len(columns["utt_id"].unique())
    if repeated:
        counts = columns["utt_id"].value_counts()
        first = next(item["values"].as_py() for item in counts if item["counts"].as_py() > 1)
        raise ReadStoreError(f"{path}: utt_id '{first}' stands there more than once; ids must be unique.")
    columns["speaker_id"] = columns["speaker_id"].fill_null(columns["session_id"])
    columns["status"] = columns["status"].fill_null("ok")
    unknown = set(columns["status"].unique().to_pylist()) - set(STATUSES)
    if unknown:
        raise ReadStoreError(f"{path}: status '{sorted(unknown)[0]}' is unknown; allowed are {', '.join(STATUSES)}.")
    if columns["duration_s"].null_count:
        length = pc.subtract(columns["end_s"], columns["start_s"])
        columns["duration_s"] = pc.coalesce(columns["duration_s"], length)
    for stream, dim in dims.items():
        columns[stream] = _vectors(table[stream], stream, dim, columns, path)
    order, position = _session_order(columns)
    columns["position"] = pa.array(position)
    normalised = pa.table(columns)
    return normalised if order is None else normalised.take(pa.array(order))


def _cast(name: str, column: pa.ChunkedArray, type_: pa.DataType, path: str) -> pa.Array:
    array = column.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        # NaN is how pandas writes a missing number.
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        return array.cast(type_)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ReadStoreError(f"{path}: column {name} is {array.type}; it must be {type_} ({error}).") from None


def _lengths(array: pa.Array | pa.ChunkedArray, stream: str, path: str) -> pa.Array | pa.ChunkedArray:
    if not hasattr(array.type, "value_type") or not pa.types.is_floating(array.type.value_type):
        raise ReadStoreError(f"{path}: column {stream} is {array.type}; it must be a list of float32.")
    return pc.list_value_length(array)


def _vectors(
    column: pa.ChunkedArray, stream: str, dim: int, columns: Mapping[str, pa.Array], path: str
) -> pa.FixedSizeListArray:
    array = column.combine_chunks()
    lengths = _lengths(array, stream, path)
    wrong = pc.and_(pc.is_valid(lengths), pc.not_equal(lengths, dim)).fill_null(False)
    if pc.any(wrong).as_py():
        row = wrong.index(True).as_py()
        raise ReadStoreError(
            f"{path}: utterance '{columns['utt_id'][row]}' has a {stream} vector of {lengths[row]} numbers, "
            f"others have {dim}; a store has one dimension per stream."
        )
    absent = pc.and_(pc.is_null(lengths), pc.equal(columns["status"], "ok"))
    if pc.any(absent).as_py():
        row = absent.index(True).as_py()
        raise ReadStoreError(
            f"{path}: utterance '{columns['utt_id'][row]}' has status ok but no {stream} vector; "
            "give it one, or another status."
        )
    return array.cast(pa.list_(pa.float32(), dim))


def _session_order(columns: Mapping[str, pa.Array]) -> tuple[np.ndarray | None, np.ndarray]:
    """The permutation that makes sessions contiguous and ordered (None where they are), and each row's position."""
    sessions = codes(columns["session_id"])
    n = len(sessions)
    within = np.arange(n)
    starts = np.flatnonzero(np.r_[True, sessions[1:] != sessions[:-1]]) if n else np.zeros(0, np.int64)
    if len(starts) == len(np.unique(sessions)):
        row_order = within - np.repeat(starts, np.diff(np.r_[starts, n]))
    else:
        grouped = np.argsort(sessions, kind="stable")
        counts = np.bincount(sessions)
        row_order = np.empty(n, np.int64)
        row_order[grouped] = within - np.repeat(np.cumsum(counts) - counts, counts)
    given = columns["position"]
    position = pc.fill_null(given, 0).to_numpy(zero_copy_only=False).astype(np.int32)
    if given.null_count:
        position = np.where(given.is_null().to_numpy(zero_copy_only=False), row_order, position).astype(np.int32)
    order = np.lexsort((row_order, position, sessions))
    return (None if np.array_equal(order, within) else order), position
