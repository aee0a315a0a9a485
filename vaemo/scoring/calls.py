"""The table of calls (`--calls`): per recording or session, who speaks on which channel, and whatever else is known.

Reads Parquet, CSV or JSON Lines. Columns: `session_id` or `path`, `role_ch0`, `role_ch1`, ..., and any others, which
travel to the scores; a `date` partitions them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from vaemo import files
from vaemo.errors import ReadManifestError
from vaemo.scores import SESSION_SCHEMA, SPREAD_SCHEMA, UTTERANCE_SCHEMA
from vaemo.store import part_schema

DATE = "date"
"""Column by which scores are partitioned, as `date=2026-11-23`."""

_ROLE = re.compile(r"role_ch(\d+)")
_OURS = {*UTTERANCE_SCHEMA.names, *SESSION_SCHEMA.names, *SPREAD_SCHEMA.names, *part_schema({}).names}


@dataclass(frozen=True, eq=False)
class Calls:
    """What is known of calls, one row each.

    Attributes:
        rows: `session_id`, then `role_ch0` ... as text without gaps, then the columns that travel.
    """

    rows: pa.Table

    @property
    def travel(self) -> list[str]:
        """Names of the columns that travel to the scores."""
        return [name for name in self.rows.column_names if name != "session_id" and not _ROLE.fullmatch(name)]

    @property
    def has_roles(self) -> bool:
        """Whether it names any role."""
        return any(self.rows[name].null_count < len(self.rows) for name in self._role_columns)

    def take(self, session_ids: Sequence[str]) -> Calls:
        """The rows of these sessions, in their order; null where a session is not in the table."""
        row = pc.index_in(pa.array(session_ids, pa.string()), value_set=self.rows["session_id"].combine_chunks())
        taken = self.rows.take(row)
        return Calls(taken.set_column(0, "session_id", pa.array(session_ids, pa.string())))

    def contains(self, session_ids: Sequence[str]) -> np.ndarray:
        """Which sessions are in the table, bool."""
        known = self.rows["session_id"].combine_chunks()
        return pc.is_in(pa.array(session_ids, pa.string()), value_set=known).to_numpy(zero_copy_only=False)

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str | None, ...]]:
        """By session, the role of each channel."""
        columns = [self.rows[name].to_pylist() for name in self._role_columns]
        roles = zip(*columns, strict=True) if columns else itertools.repeat(())
        return dict(zip(self.rows["session_id"].to_pylist(), roles, strict=False))

    @property
    def _role_columns(self) -> list[str]:
        return [name for name in self.rows.column_names if _ROLE.fullmatch(name)]


def read_calls(path: str, root: str = "") -> Calls:
    """A table of calls.

    Args:
        path: `.parquet`, `.csv`, or anything else as JSON Lines.
        root: Folder of the recordings; a `path` in the table may be relative to it or begin with it.

    Raises:
        ReadManifestError: if the file cannot be read, has neither `session_id` nor `path`, names a call twice, or has
            a column that the scores have too.
    """
    table = _read(path)
    key = next((name for name in ("session_id", "path") if name in table.column_names), None)
    if key is None:
        raise ReadManifestError(
            f"the table of calls {path} has neither session_id nor path; it has {', '.join(table.column_names)}."
        )
    ids = table[key].cast(pa.string())
    if key == "path" and root:
        prefix = root.rstrip("/") + "/"
        inside = pc.starts_with(ids, prefix)
        ids = pc.if_else(inside, pc.utf8_slice_codeunits(ids, len(prefix)), ids)
    if ids.null_count:
        raise ReadManifestError(f"the table of calls {path} has a row without {key}; every call needs one.")
    counts = ids.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ReadManifestError(
            f"the table of calls {path} names the call '{repeated.field('values')[0]}' more than once; one row a call."
        )
    others = [name for name in table.column_names if name not in ("session_id", "path")]
    taken = [name for name in others if name in _OURS]
    if taken:
        raise ReadManifestError(
            f"the table of calls {path} has a column {taken[0]}, which the scores have too. Rename or drop it."
        )
    columns = {"session_id": ids}
    numbered = {int(match[1]): name for name in others if (match := _ROLE.fullmatch(name))}
    for channel in range(max(numbered, default=-1) + 1):
        name = f"role_ch{channel}"
        roles = table[name].cast(pa.string()) if name in others else pa.nulls(len(table), pa.string())
        columns[name] = pc.if_else(pc.equal(pc.utf8_trim_whitespace(roles), ""), pa.scalar(None, pa.string()), roles)
    columns |= {name: table[name] for name in others if name not in columns}
    if DATE in columns:
        columns[DATE] = pc.utf8_slice_codeunits(columns[DATE].cast(pa.string()), 0, 10)
    return Calls(pa.table(columns))


def _read(path: str) -> pa.Table:
    try:
        if path.endswith(".parquet"):
            return files.read_parquet(path)
        content = pa.BufferReader(files.read_bytes(path))
        return pyarrow.csv.read_csv(content) if path.endswith(".csv") else pyarrow.json.read_json(content)
    except (OSError, pa.ArrowInvalid) as error:
        raise ReadManifestError(
            f"the table of calls {path} cannot be read as Parquet, CSV or JSON Lines: {' '.join(str(error).split())}"
        ) from None
