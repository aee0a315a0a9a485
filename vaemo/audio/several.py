"""Sessions of several recordings: which recordings a table puts together, in what order, and where each of them begins.

Rows that share a `session_id` and differ in `path` are one session. Its recordings follow each other by `offset_s`
where the table has it, else by `date`, else as the rows stand.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from vaemo.errors import ColumnError, ReadManifestError, named
from vaemo.tables import typed

OFFSET = "offset_s"
"""Column that says how many seconds after its session a recording begins."""


class Member(NamedTuple):
    """A recording of a session.

    Attributes:
        path: As the table names it.
        offset_s: Seconds from the begin of the session to that of the recording; None where it begins when the one
            before it ends.
        row: Of the table, from 0.
    """

    path: str
    offset_s: float | None
    row: int


def read_offsets(column: pa.Array | pa.ChunkedArray | None, n: int, where: str) -> list[float | None]:
    """The column `OFFSET` of a table, None if it is empty.

    Raises:
        ReadManifestError: for what is no number of seconds, or less than none.
    """
    if column is None:
        return [None] * n
    try:
        offsets = typed(column, OFFSET, pa.float64()).to_pylist()
    except ColumnError as error:
        at = where if error.row is None else f"{where}, row {error.row + 1}"
        raise ReadManifestError(f"{at}: {error.text}.") from None
    for row, offset_s in enumerate(offsets):
        if offset_s is not None and (offset_s < 0 or not math.isfinite(offset_s)):
            raise ReadManifestError(
                f"{where}, row {row + 1}: {OFFSET} is {offset_s:g}; it counts seconds from the begin of the session, 0 "
                "or more."
            )
    return offsets


def group_members(
    session_ids: Sequence[str],
    paths: Sequence[str | None],
    offsets: Sequence[float | None],
    dates: Sequence[str | None],
    where: str,
) -> dict[str, tuple[Member, ...]]:
    """The recordings of each session that a table names with a path, in order.

    Args:
        session_ids: One per row.
        paths: One per row; a session of one recording may have none.
        offsets: As `read_offsets` gives them.
        dates: Days or times as text that sorts (ISO 8601), or None.
        where: The table, for messages.

    Raises:
        ReadManifestError: if a recording is in two rows, or some rows of a session have a path, or else an offset,
            and others none.
    """
    found: dict[str, list[Member]] = {}
    for row, (session_id, path) in enumerate(zip(session_ids, paths, strict=True)):
        found.setdefault(session_id, []).append(Member(path or "", offsets[row], row))
    members: dict[str, tuple[Member, ...]] = {}
    row_of: dict[str, int] = {}
    # Sessions of one recording may share it: a store or a manifest cuts them from one file.
    for session_id, several in sorted(found.items(), key=lambda item: len(item[1]) == 1):
        for member in several:
            place = plain(member.path)
            first = row_of.setdefault(place, member.row) if len(several) > 1 else row_of.get(place, member.row)
            if place and first != member.row:
                raise ReadManifestError(
                    f"{where}, row {member.row + 1}: the recording {named(member.path)} stands in row {first + 1} "
                    f"already, of the session {named(session_ids[first])}. A recording is in one session, once; "
                    "drop a row."
                )
        if len(several) > 1:
            for what, missing in (
                ("path", [not member.path for member in several]),
                (OFFSET, [member.offset_s is None for member in several]),
            ):
                if any(missing) and (what == "path" or not all(missing)):
                    row = several[missing.index(True)].row
                    raise ReadManifestError(
                        f"{where}, row {row + 1}: the session {named(session_id)} has several rows, and no {what} in "
                        f"this one. Give {what} in every row of a session of several recordings"
                        + (", one row a call otherwise." if what == "path" else ", or in none of them.")
                    )
            # Rows without a date keep their place behind those that have one.
            several.sort(key=lambda member: (member.offset_s or 0.0, dates[member.row] or "\U0010ffff"))
        if several[0].path:
            members[session_id] = tuple(several)
    return members


def plain(name: str) -> str:
    r"""How a path is compared: `./a\b.wav` and `a/b.wav` are the same, and so are composed and decomposed letters."""
    parts = unicodedata.normalize("NFC", name.strip()).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def lies_at(path: str, name: str) -> bool:
    """Whether a path is meant by a name: by its last parts, as a table relative to some folder gives them."""
    whole, end = plain(path), plain(name)
    return whole == end or whole.endswith(f"/{end}")
