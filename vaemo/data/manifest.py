"""Manifests: the utterances of a corpus, where their audio is, and their labels and metadata.

Reads and writes JSON Lines and Parquet, one utterance a line, the columns of the contract (`COLUMNS`) and any others,
which are kept. A table that is read is typed, validated and ordered by session.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from vaemo import files
from vaemo.errors import ColumnError, ReadManifestError, cause
from vaemo.store import part_schema
from vaemo.tables import (
    as_text,
    codes,
    from_values,
    is_bytes,
    kind_of_file,
    others,
    session_order,
    shown,
    too_nested,
    typed,
    with_column,
)
from vaemo.targets import Target, label_names, rater_columns
from vaemo.units import CALIB, DIMENSIONS, SPLITS, STREAMS

COLUMNS = {
    "utt_id": pa.string(),
    "session_id": pa.string(),
    "speaker_id": pa.string(),
    "audio_path": pa.string(),
    "valence": pa.float64(),
    "arousal": pa.float64(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "channel": pa.int32(),
    "role": pa.string(),
    "position": pa.int32(),
    "split": pa.string(),
    "fold": pa.string(),
    "observed_valence": pa.float64(),
    "observed_arousal": pa.float64(),
}
"""Columns of a manifest. Labels and observed values are on the corpus's own scale."""

REQUIRED = ("utt_id", "session_id", "speaker_id", "audio_path")

EMBEDDED = ".parquet#"
"""`FOLDER/M.parquet#17` is the audio in row 17 of that manifest's `audio` column."""

_KNOWN = {
    **COLUMNS,
    "n_channels": pa.int32(),
    "offset_s": pa.float64(),
    "duplicate_of": pa.string(),
    "voice": pa.int32(),
    "voice_margin": pa.float32(),
    "role_by": pa.string(),
    "role_margin": pa.float32(),
}
"""Columns whose type is fixed; the last are copied into the store's columns of those names."""

COMPUTED = tuple(name for name in part_schema({}).names if name not in _KNOWN)
"""Columns of a store that extraction computes: those of a manifest are not kept."""

_REFERENCE = re.compile(r"(.*\.parquet)#(\d+)", re.DOTALL)
_BLOCK_BYTES = 1 << 24
_PIECE_BYTES = 1 << 26
_PIECE_ROWS = 1 << 19
"""Bytes and rows of a manifest that are read at once."""

_OPEN, _CLOSE = b"{}"


@dataclass(frozen=True)
class Places:
    """Where the rows of a table are in its file: `line 18` of JSON Lines (blank lines counted), `row 18` of Parquet.

    Attributes:
        path: The file.
        unit: `line` or `row`.
        number: From 1, one per row of the table.
    """

    path: str
    unit: str
    number: np.ndarray

    def __getitem__(self, row: int) -> str:
        return f"{self.unit} {self.number[row]}"

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Add the file, and the line or row, to a column's error raised in the block."""
        try:
            yield
        except ColumnError as error:
            where = self.path if error.row is None else f"{self.path}, {self[error.row]}"
            raise ReadManifestError(f"{where}: {error.text}.") from None


def embedded(path: str) -> tuple[str, int] | None:
    """The manifest and the row that hold a path's audio (`EMBEDDED`); None for a file of its own.

    An existing local file takes precedence over a reference of the same form.
    """
    match = _REFERENCE.fullmatch(path)
    if match is None or (not files.is_uri(path) and os.path.lexists(path)):
        return None
    return match[1], int(match[2])


def read_manifest(
    path: str | Path,
    *,
    label_range: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    root: str | None = None,
    targets: Sequence[str | Target] = DIMENSIONS,
) -> pa.Table:
    """The utterances of a manifest, typed, checked, sessions contiguous and in order.

    Sessions come in the order of their first line, utterances inside one by `vaemo.tables.session_order`.
    `audio_path` is absolute or a URI; where a Parquet manifest carries `audio` bytes instead, it points to them
    (`EMBEDDED`), so that the table stays light.

    Args:
        path: A Parquet file, or anything else as JSON Lines; local or a URI.
        label_range: Closed native range that labels must lie in, or that of each target; None does not check them.
        root: Folder or URI below which all audio must lie, symbolic links followed; None does not check it.
        targets: Whose labels and observed values are read.

    Returns:
        All of `COLUMNS` and the labels (null where the manifest has nothing), typed by `vaemo.tables.typed`, then the
        manifest's other columns unchanged, without those named like a stream. `position` is filled. Where JSON Lines
        hold several types under one key that is not ours, all become text, other values as their JSON.

    Raises:
        ReadManifestError: if the file is missing, empty or unreadable, a line lacks a required key, holds a value of
            another type or repeats a key, a `utt_id` is repeated, `end_s` is not after `start_s`, some utterances of a
            session have a position and others none, or else a time, a label is outside the range, or audio outside the
            root. It names the line, or the row of a Parquet file; both are counted from 1.
    """
    tables, of_tables = zip(*scan_manifest(path, label_range=label_range, root=root, targets=targets), strict=True)
    places = Places(str(path), of_tables[0].unit, np.concatenate([each.number for each in of_tables]))
    schema = common_schema([table.schema for table in tables])
    table = pa.concat_tables([as_schema(table, schema) for table in tables])
    with places.named():
        check_unique(table["utt_id"], places)
        return _in_order(table)


def scan_manifest(
    path: str | Path,
    *,
    label_range: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    root: str | None = None,
    targets: Sequence[str | Target] = DIMENSIONS,
) -> Iterator[tuple[pa.Table, Places]]:
    """The utterances of a manifest as they stand in it, some at a time, typed and each checked alone.

    Args and errors as of `read_manifest`, which alone sees whether an id occurs twice. Columns that are not ours may
    differ between the tables: see `common_schema`.
    """
    text, n = str(path), 0
    try:
        for table, places in _read(text):
            n += table.num_rows
            with places.named():
                table = with_labels(table, targets)
                _check(table, label_range, targets)
                table = _resolved(table, text)
                if root is not None:
                    _check_root(table["audio_path"], text, root)
                yield table, places
    except FileNotFoundError:
        raise ReadManifestError(f"there is no manifest {text}; give a JSON Lines or a Parquet file.") from None
    except OSError as error:
        raise ReadManifestError(f"manifest {text} cannot be read: {cause(error)}.") from None
    if not n:
        raise ReadManifestError(f"manifest {text} is empty; it needs one utterance a line.")


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all tables of a manifest, in the order of their first appearance; text where types differ."""
    types: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            of_name = types.setdefault(field.name, [])
            if field.type not in of_name:
                of_name.append(field.type)
    return pa.schema([(name, _common_type(of_name)) for name, of_name in types.items()])


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    if len(types) == 1:
        return types[0]
    fields = [pa.schema([("", type_)]) for type_ in types]
    try:
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of a manifest with the columns that all of them have (`common_schema`)."""
    if table.schema == schema:
        return table
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif field.type == pa.string() and table[field.name].type != pa.string():
            columns.append(as_text(table[field.name].to_pylist()))
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema)


def file_of(audio_path: str) -> str:
    """The file that holds an utterance's audio: the manifest itself where the audio is embedded in it."""
    reference = embedded(audio_path)
    return reference[0] if reference else audio_path


def write_manifest(path: str | Path, table: pa.Table) -> None:
    """Write utterances as Parquet where the name ends in `.parquet`, else as JSON Lines; whole or not at all.

    JSON Lines leave out what is null.
    """
    if str(path).endswith(".parquet"):
        files.write_parquet_whole(path, table)
        return
    lines = io.StringIO()
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            kept = {key: value for key, value in row.items() if value is not None}
            lines.write(json.dumps(kept, ensure_ascii=False) + "\n")
    files.write_whole(path, lines.getvalue().encode())


def _read(path: str) -> Iterator[tuple[pa.Table, Places]]:
    """The rows, typed, and where they stand, some at a time."""
    if path.lower().endswith(".parquet"):
        yield from _read_parquet(path)
        return
    n_before = 0
    for content in _pieces(path):
        if not n_before:
            if content.startswith(b"PAR1"):
                yield from _read_parquet(path)
                return
            if (kind := kind_of_file(content)) is not None:
                raise ReadManifestError(
                    f"{path} is {kind}; give JSON Lines in UTF-8, one object an utterance, or Parquet."
                )
            content = content.removeprefix(b"\xef\xbb\xbf")
        every = [line.strip() for line in content.splitlines()]
        numbers = [number for number, line in enumerate(every, n_before + 1) if line]
        places, lines = Places(path, "line", np.array(numbers, np.int64)), list(filter(None, every))
        n_before += len(every)
        del every, numbers
        if lines:
            with places.named():
                table = _parse_fast(content, lines)
                yield _parse(lines) if table is None else table, places


def _pieces(path: str) -> Iterator[bytes]:
    """The content of a file, whole lines at a time."""
    filesystem, inner = files.filesystem_of(path)
    with filesystem.open_input_stream(inner) as stream:
        held = b""
        while read := stream.read(_PIECE_BYTES):
            end = held.rfind(b"\n") + 1
            if end:
                yield held[:end]
            held = held[end:] + read
        if held:
            yield held


def _parse_fast(content: bytes, lines: Sequence[bytes]) -> pa.Table | None:
    """The rows as Arrow reads them; None if it cannot, or might read them differently from `_parse`."""
    # Arrow accepts several objects on a line and objects over several lines, and crashes on some invalid lines.
    if not all(line[0] == _OPEN and line[-1] == _CLOSE for line in lines):
        return None
    if too_nested(content, lines):
        return None
    schema = {name: pa.float64() for name, type_ in COLUMNS.items() if type_ != pa.string()}
    try:
        table = _read_json(content, schema)
        # A quoted value is text, even if it looks like a date.
        dates = {field.name: pa.string() for field in table.schema if pa.types.is_timestamp(field.type)}
        table = _read_json(content, schema | dates) if dates else table
        inferred = [table[name] for name in table.column_names if name not in schema]
        return _typed(table) if len(table) == len(lines) and all(map(_is_exact, inferred)) else None
    except (pa.ArrowInvalid, ColumnError):
        return None


def _read_json(content: bytes, schema: Mapping[str, pa.DataType]) -> pa.Table:
    reading = pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES)
    parsing = pyarrow.json.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="infer")
    return pyarrow.json.read_json(pa.BufferReader(content), reading, parsing)


def _is_exact(column: pa.ChunkedArray) -> bool:
    """Whether Arrow is certain to have read a column of JSON without changing its values."""
    if pa.types.is_nested(column.type):
        return not any(name in str(column.type) for name in ("timestamp", "double", "struct<>"))
    # Larger integers became floats and lost digits.
    largest = pc.max(pc.abs(column)).as_py() if pa.types.is_floating(column.type) else None
    return largest is None or largest < 2**53


def _parse(lines: Sequence[bytes]) -> pa.Table:
    """The rows, typed, parsed line by line: slower, and exact in what is accepted and refused."""
    columns: dict[str, list[Any]] = {}
    for row, line in enumerate(lines):
        try:
            value = json.loads(line, object_pairs_hook=_once)
            if b"\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()
        except ColumnError as error:
            raise ColumnError(error.text, row) from None
        except UnicodeEncodeError:
            raise ColumnError("holds half a character, a surrogate without the other one", row) from None
        except (ValueError, RecursionError) as error:
            found = f"{error.msg}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else cause(error)
            raise ColumnError(f"is not JSON in UTF-8 ({found}); one JSON object a line is needed", row) from None
        if not isinstance(value, dict):
            kind = "a list" if isinstance(value, list) else shown(value)
            raise ColumnError(
                f"is {kind}; one JSON object a line is needed (pandas: to_json(orient='records', lines=True))", row
            )
        for name in value:
            if name not in columns:
                columns[name] = [None] * row
        for name, held in columns.items():
            held.append(value.get(name))
    known = {name: from_values(columns.pop(name), name, type_) for name, type_ in _KNOWN.items() if name in columns}
    return _filled(known | {name: others(values) for name, values in columns.items()}, len(lines))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ColumnError(f"has the key {shown(repeated)} twice; one value is needed")
    return row


def _read_parquet(path: str) -> Iterator[tuple[pa.Table, Places]]:
    try:
        held = files.read_parquet_schema(path).names
        names = [name for name in held if name != "audio" and name not in STREAMS]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ReadManifestError(f"{path} has the column {repeated} twice; one is needed.")
        first = 0
        with Places(path, "row", np.zeros(0, np.int64)).named():
            present = _embedded_in(path) if "audio" in held else None
        filesystem, inner = files.filesystem_of(path)
        with filesystem.open_input_file(inner) as source:
            for table in _in_pieces(pq.ParquetFile(source), names):
                places = Places(path, "row", np.arange(first + 1, first + table.num_rows + 1))
                with places.named():
                    yield _typed(table if present is None else _with_embedded(table, present, path, first)), places
                first += table.num_rows
    except pa.ArrowException as error:
        found = kind_of_file(files.head(path, 8)) or " ".join(str(error).split())
        raise ReadManifestError(f"{path} is not a Parquet file ({found}); write it again.") from None


def _in_pieces(held: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.Table]:
    """Rows of some columns, row groups together up to `_PIECE_ROWS`."""
    if held.metadata.num_rows <= _PIECE_ROWS:
        yield held.read(names)
        return
    for batch in held.iter_batches(_PIECE_ROWS, columns=names):
        yield pa.table(batch)


def embedded_bytes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The bytes in an `audio` column, which holds them directly or, as in Hugging Face data sets, in structs with a
    field `bytes`.

    Raises:
        ColumnError: if it holds anything else.
    """
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not is_bytes(column.type):
        raise ColumnError(f"column audio is {kind}; it must be the bytes of a recording, or be left out")
    return column


def _embedded_in(path: str) -> pa.ChunkedArray:
    """Which rows of a Parquet file hold audio, bool."""
    filesystem, inner = files.filesystem_of(path)
    with filesystem.open_input_file(inner) as source:
        # Only the presence of bytes is checked here; they are read when they are decoded.
        batches = pq.ParquetFile(source).iter_batches(batch_size=256, columns=["audio"])
        return pa.chunked_array([embedded_bytes(batch["audio"]).is_valid() for batch in batches], pa.bool_())


def _with_embedded(table: pa.Table, present: pa.ChunkedArray, path: str, first: int) -> pa.Table:
    references = pa.array([f"{_absolute(path)}#{first + row}" for row in range(table.num_rows)], pa.string())
    inside = present.slice(first, table.num_rows)
    embedded = pc.if_else(inside, references, pa.scalar(None, pa.string()))
    if "audio_path" in table.column_names:
        embedded = pc.coalesce(embedded, typed(table["audio_path"], "audio_path", pa.string()))
        table = table.drop_columns("audio_path")
    return table.append_column("audio_path", embedded)


def _typed(raw: pa.Table) -> pa.Table:
    columns: dict[str, Any] = {}
    for name in raw.column_names:
        if name in _KNOWN:
            columns[name] = typed(raw[name], name, _KNOWN[name])
            continue
        columns[name] = raw[name]
        try:
            raw[name].validate(full=True)
        except pa.ArrowInvalid as error:
            raise ColumnError(f"column {name} cannot be read ({' '.join(str(error).split())})") from None
    return _filled(columns, raw.num_rows)


def _filled(columns: Mapping[str, Any], n: int) -> pa.Table:
    """Every column of the contract, in order, then the others, without those that extraction makes."""
    known = {name: columns.get(name, pa.nulls(n, type_)) for name, type_ in COLUMNS.items()}
    rest = {name: column for name, column in columns.items() if name not in known and name not in STREAMS}
    return pa.table({**known, **rest})


def with_labels(table: pa.Table, targets: Sequence[str | Target]) -> pa.Table:
    """The table with labels, observed values and rater statistics as numbers; missing labels are null.

    Raises:
        ColumnError: if a value is no number.
    """
    for name in (*label_names(targets), *rater_columns(targets)):
        if name not in table.column_names:
            if name not in label_names(targets):
                continue
            table = table.append_column(name, pa.nulls(table.num_rows, pa.float64()))
        elif table[name].type != pa.float64():
            table = with_column(table, name, typed(table[name], name, pa.float64()))
    return table


def _check(
    table: pa.Table,
    label_range: Sequence[float] | Mapping[str, Sequence[float]] | None,
    targets: Sequence[str | Target],
) -> None:
    for name in REQUIRED:
        _check_text(table[name], name)
    start_s, end_s, split = (table[name] for name in ("start_s", "end_s", "split"))
    _refuse(
        pc.less(start_s, 0.0),
        lambda row: f"start_s is {start_s[row]}; it counts seconds from the start of the recording",
    )
    _refuse(
        pc.less_equal(end_s, pc.fill_null(start_s, 0.0)),
        lambda row: f"end_s is {end_s[row]}, not after start_s, which is {start_s[row].as_py() or 0.0}",
    )
    _refuse(
        pc.invert(pc.is_in(split, pa.array([*SPLITS, CALIB, None]))),
        lambda row: f"split is {shown(split[row].as_py())}; allowed are {', '.join((*SPLITS, CALIB))}",
    )
    if label_range:
        for name in label_names(targets):
            target = name.removeprefix("observed_")
            low, high = label_range[target] if isinstance(label_range, Mapping) else label_range
            _check_range(table[name], name, float(low), float(high))


def _check_text(column: pa.ChunkedArray, name: str) -> None:
    _refuse(column.is_null(), lambda _: f"lacks the key '{name}'; every utterance needs {', '.join(REQUIRED)}")
    _refuse(
        pc.match_substring(column, "\0"),
        lambda row: f"{name} is {shown(column[row].as_py())}, which holds a NUL character",
    )


def _check_range(column: pa.ChunkedArray, name: str, low: float, high: float) -> None:
    _refuse(
        pc.or_(pc.less(column, low), pc.greater(column, high)),
        lambda row: (
            f"{name} is {column[row]}, outside the range [{low:g}, {high:g}]. "
            "Correct the label, or labels.range, which is the corpus's own range"
        ),
    )


def _check_root(paths: pa.ChunkedArray, path: str, root: str) -> None:
    """Refuse audio outside the root; audio in the manifest itself is allowed."""
    distinct, manifest = paths.unique(), _absolute(path)

    def allowed(audio: str) -> bool:
        place = file_of(audio)
        return place == manifest or files.lies_below(place, root)

    inside = distinct.filter(pa.array(map(allowed, distinct.to_pylist()), pa.bool_()))
    _refuse(
        pc.invert(pc.is_in(paths, inside)),
        lambda row: (
            f"audio_path leads to {shown(paths[row].as_py())}, outside extract.root, which is '{root}'. Drop that line"
        ),
    )


def _refuse(wrong: pa.ChunkedArray, message: Callable[[int], str]) -> None:
    """Raise an error for the first wrong row, if there is one."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ColumnError(message(row), row)


def check_unique(ids: pa.ChunkedArray, places: Places) -> None:
    """Refuse an id that occurs twice.

    Raises:
        ColumnError: naming both places.
    """
    number = codes(ids)
    first = np.unique(number, return_index=True)[1]
    if len(first) == len(number):
        return
    repeated = np.ones(len(number), bool)
    repeated[first] = False
    row = int(np.argmax(repeated))
    earlier = places[int(first[number[row]])]
    repeats = f"utt_id {shown(ids[row].as_py())} is already in {earlier}"
    raise ColumnError(f"{repeats}; every utterance needs an id of its own", row)


def _resolved(table: pa.Table, path: str) -> pa.Table:
    """`audio_path` relative to the manifest made absolute."""
    folder = posixpath.dirname(_absolute(path))
    given = table["audio_path"]
    whole = pc.match_substring_regex(given, r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)")
    resolved = pc.if_else(whole, given, pc.binary_join_element_wise(pa.scalar(folder), given, "/"))
    return with_column(table, "audio_path", resolved)


def _absolute(path: str) -> str:
    return path if files.is_uri(path) else str(Path(path).absolute())


def _in_order(table: pa.Table) -> pa.Table:
    start_s = table["start_s"]
    if "offset_s" in table.column_names:
        start_s = pc.add(start_s, table["offset_s"].fill_null(0.0))
    order, position = session_order(table["session_id"], table["position"], start_s)
    table = with_column(table, "position", pa.array(position))
    return table if order is None else table.take(pa.array(order))
