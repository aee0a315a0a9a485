"""The table of calls (`--calls`): per recording or session, who speaks on which channel, and further columns.

Reads Parquet, CSV or JSON Lines. Columns: `session_id` or `path`, `role_ch0`, `role_ch1`, ... of its channels,
`role_v0`, `role_v1`, ... of the voices in its one channel, `process`, and any others, which are copied to the scores; a
`date` partitions them, and `agent_id` says whose enrolled voice the agent's must be. With `session_id` and `path`, rows
of one session and different paths are a session of several recordings (`vaemo.audio.several`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from vaemo import files
from vaemo.audio.several import OFFSET, Member, group_members, lies_at, plain, read_offsets
from vaemo.errors import ReadManifestError, cause, named
from vaemo.scores import SESSION_SCHEMA, SPREAD_SCHEMA, TRUST_SCHEMA, UTTERANCE_SCHEMA, WEIGHT_SCHEMA
from vaemo.store import part_schema
from vaemo.tables import as_text, delimiter_of, kind_of_file, too_nested, with_column

DATE = "date"
"""Column by which scores are partitioned, as `date=2026-11-23`."""

PROCESS = "process"
"""Column that is `false` for a call that must not be processed: an objection, or no notice was given."""

AGENT_ID = "agent_id"
"""Column that names the agent, as `--speakers` does; copied to the scores."""

_OF = "\0"
"""Between a session and one of its recordings in the ids of the rows of `Calls`."""

_DAY_OR_TIME = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?$"
_ROLE = re.compile(r"role_(ch|v)(\d+)")
_ID_COLUMNS = ("session_id", "path")
_CSV = (".csv", ".tsv", ".tab", ".txt")
_MOST = 64
"""Channels of a recording, or voices in it, that a table of calls may number."""
_ROLE_NAMES = tuple(f"role_{kind}{number}" for kind in ("ch", "v") for number in range(_MOST))
_SCHEMAS = (UTTERANCE_SCHEMA, SESSION_SCHEMA, SPREAD_SCHEMA, TRUST_SCHEMA, WEIGHT_SCHEMA, part_schema({}))
_OURS = {name for schema in _SCHEMAS for name in schema.names} - {"audio_path"}


@dataclass(frozen=True, eq=False)
class Calls:
    """What is known of calls, one row each.

    Attributes:
        rows: `session_id`, then `role_ch0` ... and `role_v0` ... as text without gaps, `process` (bool), then the
            copied columns. Behind the rows of sessions stand those of the recordings of sessions of several, whose
            `session_id` is that of the session, a NUL and the path; the session's own row is that of its first.
        members: By session, the recordings that the table names with their paths, in order.
    """

    rows: pa.Table
    members: Mapping[str, Sequence[Member]] = field(default_factory=dict)

    @property
    def session_ids(self) -> list[str]:
        """Of the sessions that it names."""
        return [name for name in self.rows["session_id"].to_pylist() if _OF not in name]

    @property
    def travel(self) -> list[str]:
        """Names of the columns that are copied to the scores."""
        ours = ("session_id", PROCESS)
        return [name for name in self.rows.column_names if name not in ours and not _ROLE.fullmatch(name)]

    @property
    def has_roles(self) -> bool:
        """Whether it names any role."""
        return any(self.rows[name].null_count < len(self.rows) for name in self._role_columns)

    def take(self, session_ids: Sequence[str]) -> Calls:
        """The rows of these sessions, in their order; null where a session is not in the table."""
        row = pc.index_in(pa.array(session_ids, pa.string()), value_set=self.rows["session_id"].combine_chunks())
        taken = self.rows.take(row)
        return Calls(taken.set_column(0, "session_id", pa.array(session_ids, pa.string())), self.members)

    def of_recordings(self, session_ids: Sequence[str]) -> pa.Table:
        """The rows of the recordings of these sessions, where they have several."""
        keys = [key for name in session_ids if name in self._recordings for _, key in self._recordings[name]]
        known = self.rows["session_id"].combine_chunks()
        return self.rows.take(pc.index_in(pa.array(keys, pa.string()), value_set=known))

    def keys_of(self, session_id: str) -> list[str]:
        """The ids of the rows that say something of a session: its own, or those of its recordings."""
        return [key for _, key in self._recordings.get(session_id, ())] or [session_id]

    def key_of(self, session_id: str, path: str | None) -> str:
        """The id of the row that says who speaks in a recording of a session; the session's own where none does."""
        fitting = [
            (len(name), key) for name, key in self._recordings.get(session_id, ()) if path and lies_at(path, name)
        ]
        return max(fitting)[1] if fitting else session_id

    @functools.cached_property
    def _recordings(self) -> dict[str, list[tuple[str, str]]]:
        """By session of several recordings, their paths and the ids of their rows."""
        found: dict[str, list[tuple[str, str]]] = {}
        ids = self.rows["session_id"]
        for key in ids.filter(pc.match_substring(ids, _OF)).to_pylist():
            session_id, _, path = key.partition(_OF)
            found.setdefault(session_id, []).append((path, key))
        return found

    def has_several(self, session_id: str) -> bool:
        """Whether a session has several recordings."""
        return session_id in self._recordings

    def contains(self, session_ids: Sequence[str]) -> np.ndarray:
        """Which sessions are in the table, bool."""
        known = self.rows["session_id"].combine_chunks()
        return pc.is_in(pa.array(session_ids, pa.string()), value_set=known).to_numpy(zero_copy_only=False)

    def withheld(self, session_ids: Sequence[str]) -> np.ndarray:
        """Which sessions may not be processed, bool."""
        known = pa.array(session_ids, pa.string())
        return pc.is_in(known, value_set=self._objections).to_numpy(zero_copy_only=False)

    def stray_objections(self, session_ids: Sequence[str]) -> list[str]:
        """The calls that may not be processed and are none of these sessions."""
        known = set(session_ids)
        return [name for name in self._objections.to_pylist() if name not in known and _OF not in name]

    @functools.cached_property
    def _objections(self) -> pa.Array:
        """The ids of calls that may not be processed."""
        if PROCESS not in self.rows.column_names:
            return pa.array([], pa.string())
        return self.rows["session_id"].filter(pc.invert(self.rows[PROCESS])).combine_chunks()

    def spelled_as(self, session_ids: Sequence[str]) -> Calls:
        """The table with its ids as these sessions spell them, where they differ as paths do and no two are alike.

        Raises:
            ReadManifestError: if two rows turn out to be of one session.
        """
        known = dict.fromkeys(session_ids)
        ids = self.rows["session_id"].to_pylist()
        strange = [number for number, name in enumerate(ids) if name not in known]
        if not strange:
            return self
        spelled: dict[str, list[str]] = {}
        for name in known:
            spelled.setdefault(plain(name), []).append(name)
        taken = set(ids)
        for number in strange:
            match spelled.get(plain(ids[number]), []):
                case [name] if name in taken:
                    raise ReadManifestError(
                        f"the table of calls names {named(name)} and {named(ids[number])}, which are one."
                    )
                case [name]:
                    ids[number] = name
                    taken.add(name)
        return Calls(self.rows.set_column(0, "session_id", pa.array(ids, pa.string())), self.members)

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str | None, ...]]:
        """By session, the role of each channel."""
        return self._roles_of("ch")

    @functools.cached_property
    def voice_roles(self) -> dict[str, tuple[str | None, ...]]:
        """By session, the role of each voice in its one channel."""
        return self._roles_of("v")

    @functools.cached_property
    def agent_ids(self) -> dict[str, str]:
        """By session, the id of the agent, where it is given."""
        if AGENT_ID not in self.rows.column_names:
            return {}
        agents = _text(self.rows[AGENT_ID], AGENT_ID, "of this run").to_pylist()
        named_ones = zip(self.rows["session_id"].to_pylist(), agents, strict=True)
        return {name: agent.strip() for name, agent in named_ones if agent and agent.strip()}

    def _roles_of(self, kind: str) -> dict[str, tuple[str | None, ...]]:
        names = [name for name in self._role_columns if name.startswith(f"role_{kind}")]
        columns = [self.rows[name].to_pylist() for name in names]
        roles = zip(*columns, strict=True) if columns else itertools.repeat(())
        return dict(zip(self.rows["session_id"].to_pylist(), roles, strict=False))

    @property
    def _role_columns(self) -> list[str]:
        return [name for name in self.rows.column_names if _ROLE.fullmatch(name)]


def read_calls(path: str, root: str = "") -> Calls:
    """A table of calls.

    Ids, paths, roles and days are the text in the file: `00123`, `1e5`, `NA` and `2026-11-23` stay what they are.

    Args:
        path: `.parquet`, `.csv` (`.tsv`, `.tab`, `.txt`), or anything else as JSON Lines; the suffix in any case, text
            also packed (`.csv.gz`).
        root: Folder of the recordings; a `path` in the table may be relative to it or begin with it.

    Raises:
        ReadManifestError: if the file cannot be read, has neither `session_id` nor `path`, names a call or a recording
            twice, says only of some recordings of a session where they begin, has a column that the scores have too,
            says of `process` neither true nor false, or has a `date` that is no day such as `2026-11-23`.
    """
    table = _read(path)
    key = next((name for name in _ID_COLUMNS if name in table.column_names), None)
    if key is None:
        raise ReadManifestError(
            f"the table of calls {path} has neither session_id nor path; it has {', '.join(table.column_names)}."
        )
    ids = _below(_text(table[key], key, path), root if key == "path" else "")
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise ReadManifestError(f"the table of calls {path} has a row without {key}; every call needs one.")
    if DATE in table.column_names:
        days, strange = days_of(table[DATE])
        if strange is not None:
            raise ReadManifestError(
                f"the table of calls {path}, row {strange + 1}: {DATE} of the call {named(ids[strange].as_py())} is "
                f"'{table[DATE][strange].as_py()}'; it must be a day such as 2026-11-23, with or without a time "
                "behind it, or empty."
            )
    members = _members(table, ids, path, root) if key == "session_id" and "path" in table.column_names else {}
    several = {name: of_it for name, of_it in members.items() if len(of_it) > 1}
    counts = ids.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if strangers := [name for name in repeated if name not in several]:
        raise ReadManifestError(
            f"the table of calls {path} names the call {named(strangers[0])} more than once; one row a call is needed, "
            "or session_id and path of each of its recordings."
        )
    others = [name for name in table.column_names if name not in _ID_COLUMNS and not (members and name == OFFSET)]
    taken = [name for name in others if name in _OURS]
    if taken:
        raise ReadManifestError(
            f"the table of calls {path} has a column {taken[0]}, which the scores have too. Rename or drop it."
        )
    columns = {"session_id": ids}
    numbered = [match for name in others if (match := _ROLE.fullmatch(name))]
    if beyond := [match[0] for match in numbered if int(match[2]) >= _MOST]:
        raise ReadManifestError(
            f"the table of calls {path} has a column {beyond[0]}; channels and voices are counted from 0, up to "
            f"{_MOST - 1}. Rename or drop it."
        )
    for kind, channel in (
        (kind, number)
        for kind in ("ch", "v")
        for number in range(max((int(match[2]) for match in numbered if match[1] == kind), default=-1) + 1)
    ):
        name = f"role_{kind}{channel}"
        roles = _text(table[name], name, path) if name in others else pa.nulls(len(table), pa.string())
        columns[name] = pc.if_else(pc.equal(pc.utf8_trim_whitespace(roles), ""), pa.scalar(None, pa.string()), roles)
    if PROCESS in others:
        columns[PROCESS] = _flags(table[PROCESS], path)
    columns |= {name: table[name] for name in others if name not in columns}
    if DATE in columns:
        columns[DATE] = days
    return Calls(_with_recordings(pa.table(columns), several), members)


def days_of(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int | None]:
    """The days of a column of dates, with or without times.

    Returns:
        days: As text such as `2026-11-23`, null where the column is empty.
        strange: The first row that holds anything else, or None.
    """
    if pa.types.is_nested(column.type):
        column = pa.chunked_array([as_text(column.to_pylist())])
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    days = pc.utf8_slice_codeunits(texts, 0, 10)
    known = pa.array([day for day in days.unique().to_pylist() if day and _is_day(day)], pa.string())
    right = pc.and_(pc.is_in(days, value_set=known), pc.match_substring_regex(texts, _DAY_OR_TIME))
    wrong = pc.and_(texts.is_valid(), pc.invert(right))
    strange = pc.index(wrong, True).as_py()
    return days, strange if strange >= 0 else None


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _below(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Paths that begin with a folder, relative to it."""
    prefix = root.rstrip("/") + "/"
    inside = pc.starts_with(paths, prefix)
    return pc.if_else(inside, pc.utf8_slice_codeunits(paths, len(prefix)), paths) if root else paths


def _members(table: pa.Table, ids: pa.ChunkedArray, path: str, root: str) -> dict[str, tuple[Member, ...]]:
    """The recordings of the sessions of a table that has both `session_id` and `path`."""
    where, n = f"the table of calls {path}", table.num_rows
    offsets = read_offsets(table[OFFSET] if OFFSET in table.column_names else None, n, where)
    dates = table[DATE].cast(pa.string()).to_pylist() if DATE in table.column_names else [None] * n
    paths = _below(_text(table["path"], "path", path), root).to_pylist()
    return group_members(ids.to_pylist(), paths, offsets, dates, where)


def _with_recordings(rows: pa.Table, several: Mapping[str, Sequence[Member]]) -> pa.Table:
    """One row a session, then the rows of the recordings of those that have several."""
    if not several:
        return rows
    of_several = {member.row for members in several.values() for member in members[1:]}
    kept = [row for row in range(rows.num_rows) if row not in of_several]
    own, firsts = rows.take(pa.array(kept)), {members[0].row: members for members in several.values()}
    if PROCESS in rows.column_names:
        # An objection in any row applies to the whole call.
        said = rows[PROCESS].to_pylist()
        flags = [all(said[member.row] for member in firsts[row]) if row in firsts else said[row] for row in kept]
        own = with_column(own, PROCESS, pa.array(flags, pa.bool_()))
    listed = [(f"{name}{_OF}{member.path}", member.row) for name, members in several.items() for member in members]
    further = rows.take(pa.array([row for _, row in listed]))
    further = further.set_column(0, "session_id", pa.array([key for key, _ in listed], pa.string()))
    return pa.concat_tables([own, further])


def _read(path: str) -> pa.Table:
    """The table, its column names without blanks around them, and without columns that have none."""
    suffix = posixpath.splitext(path.lower().removesuffix(".gz"))[1]
    try:
        if suffix == ".parquet":
            table = files.read_parquet(path)
        else:
            content = files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
            if (kind := kind_of_file(content)) is not None:
                raise ValueError(f"it is {kind}; save it as CSV in UTF-8")
            content.decode()  # the readers do not say where
            table = _read_csv(content) if suffix in _CSV else _read_json_lines(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ReadManifestError(
            f"the table of calls {path} cannot be read as Parquet, CSV or JSON Lines: {cause(error)}"
        ) from None
    # A spreadsheet leaves columns without a name behind its last one.
    table = table.select([number for number, name in enumerate(table.column_names) if name.strip()])
    names = [_named(name.strip()) for name in table.column_names]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ReadManifestError(f"the table of calls {path} has two columns '{repeated}'; drop or rename one.")
    return table.rename_columns(names)


def _named(name: str) -> str:
    """The name of a column; those that mean something here are met in any case: an objection must not be missed."""
    lower = name.lower()
    if numbered := _ROLE.fullmatch(lower):
        return f"role_{numbered[1]}{int(numbered[2])}"
    return lower if lower in (*_ID_COLUMNS, PROCESS, AGENT_ID, DATE, OFFSET) else name


def _read_csv(content: bytes) -> pa.Table:
    """Copied columns have the types that their values show; a number that is written otherwise stays text."""
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter_of(content), newlines_in_values=True)
    # Threads that still hold the content when the process ends abort it.
    read = functools.partial(
        pyarrow.csv.read_csv, read_options=pyarrow.csv.ReadOptions(use_threads=False), parse_options=parse
    )
    typed = read(pa.BufferReader(content))
    as_text = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(typed.column_names, pa.string()), strings_can_be_null=False, null_values=[]
    )
    text = read(pa.BufferReader(content), convert_options=as_text)
    for number, name in enumerate(typed.column_names):
        known = _named(name.strip())
        values, texts = typed.column(number), text.column(number)
        ours = known in (*_ID_COLUMNS, PROCESS, DATE) or _ROLE.fullmatch(known)
        # `NA` is a missing number, and a text like any other.
        numbers = known != AGENT_ID and not pa.types.is_null(values.type)
        if ours or not _written_so(values, texts) or not (numbers or _is_blank(texts.filter(values.is_null()))):
            typed = typed.set_column(number, name, texts)
    return typed


def _is_blank(texts: pa.ChunkedArray) -> bool:
    """Whether none of the texts has a character that is seen."""
    return pc.all(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py() is not False


def _written_so(values: pa.ChunkedArray, texts: pa.ChunkedArray) -> bool:
    """Whether numbers are written as one writes numbers: no leading zero or plus, no exponent, none too long."""
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return True
    written = pc.match_substring_regex(texts, r"^\s*(-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?)?\s*$")
    return pc.all(pc.or_(written, values.is_null())).as_py() is not False


def _read_json_lines(content: bytes) -> pa.Table:
    """Ids, paths and roles as text, a number among them as it is written."""
    as_text = pa.schema([(name, pa.string()) for name in (*_ID_COLUMNS, *_ROLE_NAMES)])
    options = pyarrow.json.ParseOptions(explicit_schema=as_text)
    lines, table = content.splitlines(), None
    with contextlib.suppress(pa.ArrowInvalid):
        if not too_nested(content, lines):
            table = pyarrow.json.read_json(pa.BufferReader(content), parse_options=options)
    if table is None:
        rows = [_object(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        names = dict.fromkeys(_keys(rows))
        table = pa.table({name: pa.array([_written(row.get(name)) for row in rows], pa.string()) for name in names})
    ours = (name for name in as_text.names if name in table.column_names)
    unused = [name for name in ours if table[name].null_count == len(table)]
    return table.drop_columns(unused)


def _object(line: bytes, number: int) -> dict[str, object]:
    try:
        row = json.loads(line, parse_int=str, parse_float=str)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not one JSON object; write one a line, and no list around them")
    return row


def _keys(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    for row in rows:
        yield from row


def _written(value: object) -> str | None:
    """A value as its line writes it, text without quotes."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
    """A column of ids or roles as text; numbers only where no digit of them was lost."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
        if pc.all(whole).as_py() is not False:
            column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise ReadManifestError(
            f"the table of calls {path}: column {name} is {column.type}; it must be text. Write the ids as text."
        )
    return column.cast(pa.string())


_FLAGS = {"true": True, "yes": True, "1": True, "": True, "false": False, "no": False, "0": False}


def _flags(column: pa.ChunkedArray, path: str) -> pa.Array:
    """A column that says true or false, as bool; nothing is true."""
    said = [("" if value is None else str(value)).strip().lower() for value in column.to_pylist()]
    strange = next((value for value in said if value not in _FLAGS), None)
    if strange is not None:
        raise ReadManifestError(
            f"the table of calls {path}: column {PROCESS} says '{strange}' of a call; it must be true or false."
        )
    return pa.array([_FLAGS[value] for value in said], pa.bool_())


def _is_text(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(type_) for is_kind in kinds)
