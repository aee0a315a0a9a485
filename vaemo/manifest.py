"""Manifests: which utterances there are, where their audio lies, what is known of them.

Reads and writes JSON Lines and Parquet, one utterance a line, columns of the contract (`COLUMNS`) and any others,
which travel along. A table that was read is typed, checked, and in the order of its sessions.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from vaemo import files
from vaemo.errors import ReadManifestError
from vaemo.tables import codes, with_column
from vaemo.units import DIMENSIONS, SPLITS

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

_REFERENCE = re.compile(r"(.*\.parquet)#(\d+)", re.DOTALL)
_BLOCK_BYTES = 1 << 24
_NAMES = {pa.string(): "text", pa.float64(): "a number", pa.int32(): "a whole number"}


def embedded(path: str) -> tuple[str, int] | None:
    """The manifest and the row in which a path's audio lies; None where it is a file's own (`EMBEDDED`).

    What looks like a reference and is a local file is that file.
    """
    match = _REFERENCE.fullmatch(path)
    if match is None or (not files.is_uri(path) and os.path.lexists(path)):
        return None
    return match[1], int(match[2])


def read_manifest(path: str | Path, *, label_range: Sequence[float] | None = None, root: str | None = None) -> pa.Table:
    """The utterances of a manifest, typed, checked, sessions contiguous and in order.

    Sessions come in the order of their first line. Inside one, utterances are ordered by `position` where every
    line of the session has it, else by `start_s` where every line has it, else as the lines stand. `audio_path` is
    absolute or a URI; where a Parquet manifest carries `audio` bytes instead, it points to them (`EMBEDDED`), so that
    the table stays light.

    Args:
        path: A `.parquet` file, or anything else as JSON Lines; local or a URI.
        label_range: Closed native range that labels must lie in; None does not check them.
        root: Folder or URI below which all audio must lie, symbolic links followed; None does not check it.

    Returns:
        All of `COLUMNS` (null where the manifest has nothing), then the manifest's other columns. `position` is filled.

    Raises:
        ReadManifestError: if the file is missing, empty or unreadable, a line lacks a required key or holds a value
            of another type, a `utt_id` stands twice, `end_s` is not after `start_s`, a label is outside the range, or
            audio outside the root.
    """
    text = str(path)
    try:
        raw = _read_parquet(text) if text.endswith(".parquet") else _read_json_lines(text)
    except FileNotFoundError:
        raise ReadManifestError(f"there is no manifest {text}; give a JSON Lines or a Parquet file.") from None
    except OSError as error:
        raise ReadManifestError(f"manifest {text} cannot be read: {error}.") from None
    if not raw.num_rows:
        raise ReadManifestError(f"manifest {text} is empty; it needs one utterance a line.")
    table = _typed(raw, text)
    _check(table, text, label_range)
    table = _resolved(table, text)
    if root is not None:
        _check_root(table["audio_path"], text, root)
    return _in_order(table)


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


def _read_json_lines(path: str) -> pa.Table:
    # A fold may be a number, and nobody minds.
    schema = pa.schema([(name, type_) for name, type_ in COLUMNS.items() if name != "fold"])
    content = files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise ReadManifestError(f"manifest {path} is empty; it needs one utterance a line.")
    try:
        content.decode()
        return pyarrow.json.read_json(
            pa.BufferReader(content),
            read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer"),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        _explain(content, path, error)


def _explain(content: bytes, path: str, error: Exception) -> NoReturn:
    """Raise for the first line that is not a JSON object with values of the right types."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as reason:
            detail = f"is not JSON in UTF-8 ({reason})"
            raise ReadManifestError(f"{path}, line {number}: {detail}; one JSON object a line is needed.") from None
        if not isinstance(row, dict):
            raise ReadManifestError(f"{path}, line {number}: is {type(row).__name__}; one JSON object is needed.")
        for name, value in row.items():
            if name in COLUMNS and name != "fold" and not _fits(value, COLUMNS[name]):
                raise ReadManifestError(
                    f"{path}, line {number}: {name} is {json.dumps(value)}; it must be {_NAMES[COLUMNS[name]]}."
                )
    raise ReadManifestError(f"{path}: {error}. One JSON object a line is needed, each key of one type.") from None


def _fits(value: Any, type_: pa.DataType) -> bool:
    if value is None:
        return True
    if type_ == pa.string():
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    return isinstance(value, int if type_ == pa.int32() else (int, float))


def _read_parquet(path: str) -> pa.Table:
    try:
        schema = files.read_parquet_schema(path)
        names = [name for name in schema.names if name != "audio"]
        table = files.read_parquet(path, names)
        if "audio" not in schema.names:
            return table
        filesystem, inner = files.filesystem_of(path)
        with filesystem.open_input_file(inner) as source:
            groups = pq.ParquetFile(source)
            # Only whether there are bytes is asked here; the bytes are read where they are decoded.
            present = [batch["audio"].is_valid() for batch in groups.iter_batches(batch_size=256, columns=["audio"])]
    except pa.ArrowInvalid as error:
        raise ReadManifestError(f"{path} is not a Parquet file ({error}); write it again.") from None
    references = pa.array([f"{_absolute(path)}#{row}" for row in range(table.num_rows)])
    embedded = pc.if_else(pa.chunked_array(present), references, pa.scalar(None, pa.string()))
    if "audio_path" in names:
        embedded = pc.coalesce(embedded, table["audio_path"].cast(pa.string()))
        table = table.drop_columns("audio_path")
    return table.append_column("audio_path", embedded)


def _typed(raw: pa.Table, path: str) -> pa.Table:
    columns = {}
    for name, type_ in COLUMNS.items():
        if name not in raw.column_names:
            columns[name] = pa.nulls(raw.num_rows, type_)
            continue
        column = raw[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_floating(column.type):
            # NaN is how Python and pandas write a missing number.
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if type_ == pa.string() and name != "fold" and not _is_text(column.type):
            raise ReadManifestError(f"{path}: column {name} is {column.type}; it must be text.")
        try:
            columns[name] = column.cast(type_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ReadManifestError(f"{path}: column {name} must be {_NAMES[type_]}: {error}.") from None
    others = {name: raw[name] for name in raw.column_names if name not in COLUMNS}
    return pa.table({**columns, **others})


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)


def _check(table: pa.Table, path: str, label_range: Sequence[float] | None) -> None:
    for name in REQUIRED:
        _check_present(table[name], name, path)
    start_s, end_s, channel, split = (table[name] for name in ("start_s", "end_s", "channel", "split"))
    _refuse(
        pc.less(start_s, 0.0),
        path,
        lambda row: f"start_s is {start_s[row]}; it counts seconds from the start of the recording.",
    )
    _refuse(
        pc.less_equal(end_s, pc.fill_null(start_s, 0.0)),
        path,
        lambda row: f"end_s is {end_s[row]}, not after start_s, which is {start_s[row].as_py() or 0.0}.",
    )
    _refuse(pc.less(channel, 0), path, lambda row: f"channel is {channel[row]}; the first channel is 0.")
    _refuse(
        pc.invert(pc.is_in(split, pa.array([*SPLITS, None]))),
        path,
        lambda row: f"split is '{split[row]}'; allowed are {', '.join(SPLITS)}.",
    )
    if label_range:
        for name in [*DIMENSIONS, *(f"observed_{name}" for name in DIMENSIONS)]:
            _check_range(table[name], name, path, *map(float, label_range))
    _check_unique(table["utt_id"], path)


def _check_present(column: pa.ChunkedArray, name: str, path: str) -> None:
    absent = pc.fill_null(pc.equal(column, ""), True)
    _refuse(absent, path, lambda _: f"lacks the key '{name}'; every utterance needs {', '.join(REQUIRED)}.")


def _check_range(column: pa.ChunkedArray, name: str, path: str, low: float, high: float) -> None:
    _refuse(
        pc.or_(pc.less(column, low), pc.greater(column, high)),
        path,
        lambda row: (
            f"{name} is {column[row]}, outside the range [{low:g}, {high:g}]. "
            "Say the corpus's own range in labels.range, or mend the label."
        ),
    )


def _check_root(paths: pa.ChunkedArray, path: str, root: str) -> None:
    """Refuse audio outside the root; what the manifest itself holds is inside."""
    distinct, manifest = paths.unique(), _absolute(path)

    def allowed(audio: str) -> bool:
        reference = embedded(audio)
        place = reference[0] if reference else audio
        return place == manifest or files.lies_below(place, root)

    inside = distinct.filter(pa.array(map(allowed, distinct.to_pylist()), pa.bool_()))
    _refuse(
        pc.invert(pc.is_in(paths, inside)),
        path,
        lambda row: f"audio_path leads to '{paths[row]}', outside extract.root, which is '{root}'. Drop that line.",
    )


def _refuse(wrong: pa.ChunkedArray, path: str, message: Callable[[int], str]) -> None:
    """Raise for the first row that is wrong, if there is one."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise ReadManifestError(f"{path}, {_place(path, row)}: {message(row)}")


def _check_unique(ids: pa.ChunkedArray, path: str) -> None:
    number = codes(ids)
    first = np.unique(number, return_index=True)[1]
    if len(first) == len(number):
        return
    repeated = np.ones(len(number), bool)
    repeated[first] = False
    row = int(np.argmax(repeated))
    earlier = int(first[number[row]])
    raise ReadManifestError(
        f"{path}, {_place(path, row)}: utt_id '{ids[row]}' already stands in {_place(path, earlier)}; "
        "every utterance needs an id of its own."
    )


def _place(path: str, row: int) -> str:
    """`line 18` of JSON Lines (blank lines counted), `row 17` of a Parquet file."""
    if path.endswith(".parquet"):
        return f"row {row}"
    filled = [number for number, line in enumerate(files.read_bytes(path).split(b"\n"), 1) if line.strip()]
    return f"line {filled[row]}"


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
    sessions = codes(table["session_id"])
    n_sessions = int(sessions.max()) + 1

    def complete(name: str) -> np.ndarray:
        absent = table[name].is_null().to_numpy()
        return (np.bincount(sessions, absent, n_sessions) == 0)[sessions]

    def key(name: str, usable: np.ndarray) -> np.ndarray:
        return np.where(usable, table[name].cast(pa.float64()).fill_null(0.0).to_numpy(), 0.0)

    positioned = complete("position")
    order = np.lexsort((key("start_s", complete("start_s")), key("position", positioned), sessions))
    ordered = sessions[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    position = np.where(positioned[order], key("position", positioned)[order], rank).astype(np.int32)
    if not np.array_equal(order, np.arange(len(order))):
        table = table.take(pa.array(order))
    return with_column(table, "position", pa.array(position))
