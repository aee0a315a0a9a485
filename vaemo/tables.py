"""Columns of tables from any program: one set of rules for manifests (JSON Lines or Parquet) and feature stores.

Programs write the same column in many Arrow types. `typed` brings ids, numbers and whole numbers to the type of the
contract, `vectors` features, `session_order` the rows of a session to their order. An invalid value is a
`ColumnError`, to which the reader of the file adds where it stands.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.errors import ColumnError, named

LARGEST = 1e11
"""Of every number: as seconds 3,000 years, so that times of day since 1970 fit, in seconds and not in milliseconds."""

_BOUNDS = {"channel": (0, 1023), "n_channels": (0, 1024)}
"""Where a column has bounds of its own: audio files have 1,024 channels at most."""

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_KINDS = {
    b"ARROW1": "Arrow IPC (Feather)",
    b"FEA1": "Feather",
    b"\x80": "a pickle",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF": "HDF5",
    b"SQLite": "SQLite",
    b"PK": "a ZIP archive, as Excel, NumPy and PyTorch write them",
    b"\x1f\x8b": "packed by gzip, which its name must say (.gz)",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_NESTED = 64
"""Most nested objects and lists in a line that goes to Arrow's reader of JSON."""

_SHOWN = 200
_EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
"""Up to where whole numbers of a type are all different."""


def with_column(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with a column in the place of the one that has its name."""
    return table.set_column(table.column_names.index(name), name, column)


def near_misses(found: Iterable[str], absent: Iterable[str]) -> str:
    """The columns that are close to an absent one, each with it, for a note; empty if there are none.

    Close are other case, other separators, and times without their unit: `Split`, `speaker id`, `start`.
    """
    meant = {_letters(name): name for name in absent}
    meant |= {_letters(name).removesuffix("s"): name for name in meant.values() if name in ("start_s", "end_s")}
    near = {name: meant[_letters(name)] for name in found if _letters(name) in meant}
    return ", ".join(f"'{name}' (is {wanted} meant?)" for name, wanted in near.items())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def joined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array; pyarrow would copy a single chunk too."""
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column


def codes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The number of each row's value, (rows,), int64: from 0, in the order of first appearance, null like any other."""
    return pc.dictionary_encode(joined(column), null_encoding="encode").indices.to_numpy().astype(np.int64)


def to_bytes(table: pa.Table) -> bytes:
    """A table as it travels to another process, for `from_bytes`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(content: bytes) -> pa.Table:
    """The table that `to_bytes` packed."""
    return pa.ipc.open_stream(content).read_all()


def typed(column: pa.Array | pa.ChunkedArray, name: str, type_: pa.DataType) -> pa.Array:
    """A column in the type of the contract.

    Text is text, or whole numbers, or UUIDs; a number may be of any numeric type or plain text with a decimal point;
    a whole number may be a float such as 2.0. NaN and empty text are null: so Python, pandas and CSV write what is
    missing. Booleans and dates are neither text nor numbers.

    Args:
        column: Of any type.
        name: For messages; `channel` and `n_channels` have bounds.
        type_: `string`, `int32`, `float32` or `float64`.

    Raises:
        ColumnError: for a column of another type, or the first invalid value: text that is no number or
            not UTF-8, a fraction where a whole number is needed, an infinity, a number beyond `LARGEST`.
    """
    array = _plain(column)
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), type_)
    return _texts(array, name) if type_ == pa.string() else _numbers(array, name, type_)


def from_values(values: Sequence[Any], name: str, type_: pa.DataType) -> pa.Array:
    """A column in the type of the contract, from what JSON holds; texts and numbers may be mixed.

    Raises:
        ColumnError: as `typed`.
    """
    texts: list[str | None] = [None] * len(values)
    numbers: list[float | None] = [None] * len(values)
    for row, value in enumerate(values):
        if isinstance(value, (bool, list, dict)):
            raise ColumnError(f"{name} is {shown(value)}; it must be {_needed(type_)}", row)
        if isinstance(value, str) or (isinstance(value, int) and type_ == pa.string()):
            texts[row] = str(value)
        elif value is not None:
            try:
                numbers[row] = float(value)
            except OverflowError:
                raise ColumnError(f"{name} is {shown(value)}; it must be {_needed(type_)}", row) from None
    given = [typed(pa.array(each), name, type_) for each in (texts, numbers)]
    return pc.coalesce(*given)


def others(values: Sequence[Any]) -> pa.Array:
    """A column that no contract knows, from what JSON holds; values that have no type in common become text.

    Text stays as it is then, everything else becomes its JSON text.
    """
    texts = all(value is None or isinstance(value, str) for value in values)
    if not texts and len({isinstance(value, bool) for value in values if value is not None}) == 1:
        try:
            array = pa.array(values)
            if _storable(array.type):
                return array
        except (pa.ArrowException, OverflowError):
            pass
    return as_text(values)


def as_text(values: Sequence[Any]) -> pa.Array:
    """Texts as they are, everything else as its JSON."""
    return pa.array(
        [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ],
        pa.string(),
    )


def shown(value: Any) -> str:
    """A value as a message shows it: text in quotes, as all messages quote ids, everything else as JSON; cut."""
    text = json.dumps(float(value) if isinstance(value, Decimal) else value, ensure_ascii=False, default=str)
    if isinstance(value, str):
        # An id is shown as it is, so that its hash is that of the tables; what cannot be printed is escaped.
        return named(value if value.isprintable() and len(value) <= _SHOWN else text[1:-1][:_SHOWN])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..." + text[-1]


def kind_of_file(head: bytes) -> str | None:
    """What else than Parquet or text a file is, from its first bytes; None where they do not tell."""
    letter = head[:2].replace(b"\0", b"")
    if len(letter) == 1 < len(head) and letter.isascii():
        return "text in UTF-16"
    return next((kind for start, kind in _KINDS.items() if head.startswith(start)), None)


def delimiter_of(content: bytes) -> str:
    """The mark between the cells of a CSV: of comma, semicolon and tab the one that its first line has most of."""
    head = content.partition(b"\n")[0]
    return max(",;\t", key=lambda mark: head.count(mark.encode()))


def too_nested(content: bytes, lines: Sequence[bytes]) -> bool:
    """Whether a line of JSON may be so deeply nested that Arrow's reader kills the process."""
    nested = content.count(b"{") + content.count(b"[") > len(lines)
    return nested and max(line.count(b"{") + line.count(b"[") for line in lines) > _NESTED


def length_of_vectors(column: pa.Array | pa.ChunkedArray, name: str) -> int | None:
    """How many numbers the first vector of a column has; None where there is none.

    Raises:
        ColumnError: if the column holds no vectors of numbers.
    """
    for chunk in _chunks(column):
        lists = _lists(chunk, name)
        if pa.types.is_fixed_size_list(lists.type):
            return lists.type.list_size
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        if lengths.any():
            return int(lengths[np.argmax(lengths > 0)])
    return None


def vectors(column: pa.Array | pa.ChunkedArray, name: str, dim: int) -> pa.ChunkedArray:
    """Vectors of `dim` numbers as fixed-size lists of float32, null where there is none or an empty one.

    Any type that holds a vector of numbers: lists, large lists, list views, fixed-size lists, tensors of one
    dimension (Arrow's of fixed and of variable shape, Ray's), dictionaries of them, or nulls alone; of floats,
    integers or decimals.

    Raises:
        ColumnError: for a column of another type, or a vector of another length.
    """
    type_, done, rows = pa.list_(pa.float32(), dim), [], 0
    # Chunk by chunk: joined, the offsets of a large part would not fit.
    for chunk in _chunks(column):
        lists = _lists(chunk, name)
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        wrong = (lengths != dim) & (lengths != 0)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ColumnError(
                f"the {name} vector has {lengths[row]} numbers, others have {dim}; a stream has one dimension",
                rows + row,
            )
        done.append(lists if lists.type == type_ else _fixed(lists, lengths == 0, type_))
        rows += len(lists)
    return pa.chunked_array(done, type_)


def holds_vectors(type_: pa.DataType) -> bool:
    """Whether a column of this type may be a stream of features."""
    try:
        _lists(pa.nulls(0, type_), "")
    except ColumnError:
        return False
    return True


def session_order(
    session_ids: pa.Array | pa.ChunkedArray,
    position: pa.Array | pa.ChunkedArray,
    start_s: pa.Array | pa.ChunkedArray,
    decides: np.ndarray | None = None,
) -> tuple[np.ndarray | None, np.ndarray]:
    """How rows are to be put so that sessions are contiguous and in order, and the position of each row.

    A session is ordered by `position`, then time, where its rows have positions; else by `start_s` where they have
    times; else as the rows stand. Sessions come by their first row. Positions that are not given are counted from 0.

    Args:
        session_ids: One per row.
        position: int32.
        start_s: Seconds.
        decides: Rows that must agree on what they have; None is all. The others come last where they lack it.

    Returns:
        order: Row numbers; None where the rows stand so.
        position: int32, of the rows as they stood.

    Raises:
        ColumnError: if some deciding rows of a session have a position, or else a time, and others have none.
    """
    session = codes(session_ids)
    n, n_sessions = len(session), int(session.max(initial=-1)) + 1
    deciding = np.ones(n, bool) if decides is None else decides
    n_deciding = np.bincount(session[deciding], minlength=n_sessions)

    def usable(column: pa.Array | pa.ChunkedArray, name: str, there: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Sessions that have a column throughout, among those that want it."""
        n_there = np.bincount(session[there & deciding], minlength=n_sessions)
        partly = wanted & (n_there > 0) & (n_there < n_deciding)
        if partly.any():
            row = int(np.argmax(partly[session] & deciding & ~there))
            raise ColumnError(
                f"session {shown(session_ids[row].as_py())} has no {name} in this row, and has one in others; "
                f"give {name} in every row of a session, or in none",
                row,
            )
        n_any = np.bincount(session[there], minlength=n_sessions)
        return wanted & (np.where(n_deciding, n_there, n_any) > 0)

    has_position, has_start = (column.is_valid().to_numpy(zero_copy_only=False) for column in (position, start_s))
    by_position = usable(position, "position", has_position, np.ones(n_sessions, bool))
    by_time = usable(start_s, "start_s", has_start, ~by_position)
    timed = np.bincount(session[has_start & deciding], minlength=n_sessions) == n_deciding

    place = pc.fill_null(position, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not has_position.all():
        # What has failed may lack its place: it comes last.
        last = np.zeros(n_sessions, np.int64)
        np.maximum.at(last, session, place)
        place = np.where(has_position, place, np.minimum(last + 1, np.iinfo(np.int32).max)[session])
    place = np.where(by_position[session], place, 0)
    time = np.where(has_start, pc.fill_null(start_s, 0.0).to_numpy(zero_copy_only=False), np.inf)
    time = np.where((by_time | (by_position & timed))[session], time, 0.0)
    order = np.lexsort((time, place, session))
    ordered = session[order]
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n) - np.searchsorted(ordered, ordered)
    found = np.where(by_position[session], place, rank).astype(np.int32)
    return (None if np.array_equal(order, np.arange(n)) else order), found


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of a type that is neither an extension nor a dictionary."""
    array = joined(column)
    if isinstance(array.type, pa.BaseExtensionType):
        kind, array = array.type.extension_name, array.storage
        if kind == "arrow.uuid":
            return pa.array([None if raw is None else str(uuid.UUID(bytes=raw)) for raw in array.to_pylist()])
        if kind == "arrow.bool8":
            return array.cast(pa.bool_())
    return array.dictionary.take(array.indices) if pa.types.is_dictionary(array.type) else array


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def is_bytes(type_: pa.DataType) -> bool:
    """Whether a type is binary, of whatever layout; null is not."""
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_)


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)


def _needed(type_: pa.DataType) -> str:
    return {pa.string(): "text or a whole number", pa.int32(): "a whole number"}.get(type_, "a number")


def _texts(array: pa.Array, name: str) -> pa.Array:
    kind, needed = array.type, _needed(pa.string())
    if _is_text(kind) or is_bytes(kind):
        texts = _utf8(array, name)
    elif pa.types.is_integer(kind):
        return array.cast(pa.string())
    elif pa.types.is_floating(kind):
        array = _without_nan(array)
        values = array.cast(pa.float64())
        exact = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), float(_EXACT[kind])))
        _refuse_first(pc.invert(exact), array, name, needed)
        return values.cast(pa.int64()).cast(pa.string())
    elif pa.types.is_decimal(kind):
        texts = array.cast(pa.string())
        _refuse_first(pc.invert(pc.match_substring_regex(texts, r"^-?[0-9]+(\.0*)?$")), array, name, needed)
        return pc.replace_substring_regex(texts, r"\.0*$", "")
    else:
        raise ColumnError(f"column {name} is {kind}; it must be {needed}")
    empty = pc.equal(texts, "")
    return pc.if_else(empty, pa.scalar(None, pa.string()), texts) if pc.any(empty).as_py() else texts


def _utf8(array: pa.Array, name: str) -> pa.Array:
    try:
        texts = array.cast(pa.string())
        texts.validate(full=True)
        return texts
    except pa.ArrowInvalid:
        for row, raw in enumerate(array.cast(pa.large_binary()).to_pylist()):
            try:
                (raw or b"").decode()
            except UnicodeDecodeError:
                raise ColumnError(f"{name} is {shown(str(raw)[2:-1])}, which is not UTF-8", row) from None
        raise


def _numbers(array: pa.Array, name: str, type_: pa.DataType) -> pa.Array:
    needed = _needed(type_)
    if _is_text(array.type):
        texts = pc.utf8_trim_whitespace(array.cast(pa.string()))
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        wrong = pc.invert(pc.match_substring_regex(texts, _NUMBER))
        _refuse_first(wrong, array, name, f"{needed}, its decimals behind a point")
        array = texts.cast(pa.float64())
    elif not _is_number(array.type):
        raise ColumnError(f"column {name} is {array.type}; it must be {needed}")
    array = _without_nan(array)
    values = array if array.type == type_ else array.cast(pa.float64(), safe=False)
    low, high = _BOUNDS.get(name, (-(2**31), 2**31 - 1) if type_ == pa.int32() else (-LARGEST, LARGEST))
    found = pc.min_max(values).as_py()
    if found["min"] is not None and not (low <= found["min"] and found["max"] <= high):
        wrong = pc.or_(pc.less(values, low), pc.greater(values, high))
        _refuse_first(wrong, array, name, f"{needed} from {_plainly(low)} to {_plainly(high)}")
    if values.type == type_:
        return values
    if type_ == pa.int32():
        _refuse_first(pc.not_equal(values, pc.floor(values)), array, name, needed)
    return values.cast(type_)


def _plainly(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _without_nan(array: pa.Array) -> pa.Array:
    if not pa.types.is_floating(array.type):
        return array
    missing = pc.is_nan(array)
    return pc.if_else(missing, pa.scalar(None, array.type), array) if pc.any(missing).as_py() else array


def _refuse_first(wrong: pa.Array, array: pa.Array, name: str, needed: str) -> None:
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ColumnError(f"{name} is {shown(array[row].as_py())}; it must be {needed}", row)


def _storable(type_: pa.DataType, depth: int = 0) -> bool:
    """Whether Parquet takes a type: it has no struct without fields; and nothing is nested beyond use."""
    if pa.types.is_struct(type_) and not type_.num_fields:
        return False
    return depth < 16 and all(_storable(type_.field(child).type, depth + 1) for child in range(type_.num_fields))


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def _lists(array: pa.Array, name: str) -> pa.Array:
    """Lists of numbers, of whatever kind of list."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        _refuse_shapes([getattr(kind, "shape", None) or ()], name)
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary.take(array.indices)
    if pa.types.is_struct(array.type) and {field.name for field in array.type} == {"data", "shape"}:
        _refuse_shapes(pc.struct_field(array, "shape").to_pylist(), name)
        array = pc.struct_field(array, "data")
    type_ = array.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    if any(is_one(type_) for is_one in (*lists, *views)):
        held = type_.value_type
        held = held.value_type if pa.types.is_dictionary(held) else held
        if _is_number(held) or pa.types.is_null(held):
            return array
    elif pa.types.is_null(type_):
        return pa.nulls(len(array), pa.list_(pa.float32()))
    raise ColumnError(f"column {name} is {kind}; it must be lists of numbers")


def _fixed(lists: pa.Array, absent: np.ndarray, type_: pa.FixedSizeListType) -> pa.Array:
    """Lists that are all of one length, or absent, as fixed-size lists."""
    numbers = lists.flatten()
    if pa.types.is_dictionary(numbers.type):
        numbers = numbers.dictionary_decode()
    numbers = numbers.cast(type_.value_type, safe=False)
    if not absent.any():
        return pa.FixedSizeListArray.from_arrays(numbers, type=type_)
    matrix = np.zeros((len(lists), type_.list_size), np.float32)
    matrix[~absent] = numbers.to_numpy(zero_copy_only=False).reshape(-1, type_.list_size)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), type=type_, mask=pa.array(absent))


def _refuse_shapes(shapes: Sequence[Sequence[int] | None], name: str) -> None:
    for row, shape in enumerate(shapes):
        if shape and sum(size != 1 for size in shape) > 1:
            raise ColumnError(f"column {name} holds tensors of shape {list(shape)}; it must hold vectors", row)
