"""Archives of recordings: listing, duplicates, and detection of changes.

Works on names, sizes and times; a file is opened only where these cannot tell, and then its bytes alone are compared.
Knows no audio beyond the ends of names (`vaemo.audio.formats`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import itertools
import math
import posixpath
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv

from vaemo import files
from vaemo.audio.formats import foreign_reason, kind_of
from vaemo.config import AudioConfig
from vaemo.errors import ReadRecordingsError, cause
from vaemo.files import Found
from vaemo.tables import delimiter_of

_SAMPLE_BYTES = 1 << 16
"""Bytes read at the head, middle and tail of a file whose size and time do not show whether it has changed."""

_READERS = 16
_SHOWN_SUFFIXES = 6


@dataclass(frozen=True)
class Listing:
    """The recordings of a folder, sorted by name.

    Attributes:
        recordings: What is to be read, or has a problem already. Names are as they are shown: bytes that are no UTF-8
            and control characters are escaped, as `shown` has them.
        notes: Lines that name what was skipped, and why.
        waiting: Names of those that are too young.
        excluded: Names of those that were left out.
    """

    recordings: Sequence[Found]
    notes: Sequence[str] = ()
    waiting: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()


def list_recordings(
    folder: str,
    audio: AudioConfig | None = None,
    *,
    exclude: Sequence[str] = (),
    min_age_s: float = 0.0,
    found: Sequence[Found] | None = None,
    several: Collection[str] = (),
) -> Listing:
    """Every file below a folder whose name ends as a recording's does, or every file that a table of paths names.

    Args:
        folder: A path or URI; a file is a table as `read_paths` takes it, and no folder is listed then.
        audio: Says whether headerless files are read; None is the default.
        exclude: Patterns (`fnmatch`) of names to leave out: relative paths, or their last part.
        min_age_s: Files modified less than this many seconds ago wait for the next run.
        found: What `vaemo.files.walk` finds in the folder, if that is known.
        several: Ids that a table of paths may give to several recordings; these have the names of their paths.

    Raises:
        ReadRecordingsError: if there is none, or the table cannot be read.
    """
    there, notes = list[Found](), list[str]()
    others: Counter[str] = Counter()
    excluded, young = set[str](), set[str]()
    youngest_ns = time.time_ns() - int(min_age_s * 1e9)
    kind_by_suffix = functools.cache(lambda suffixes: kind_of(f"_.{suffixes}", audio or AudioConfig()))
    table = files.is_file(folder)
    for item in _named(read_paths(folder, several) if table else found or files.walk(folder)):
        # A folder that cannot be listed ends in "/".
        file = item.path if table else item.name
        kind = "folder" if file[-1] == "/" else kind_by_suffix(".".join(file.rsplit(".", 2)[1:]))
        # What a table names is meant, whatever its suffix: the decoder says what it is.
        if kind == "other" and not table:
            others[shown(posixpath.splitext(file)[1].lower()) or "without a suffix"] += 1
        elif any(fnmatch.fnmatchcase(name, glob) for glob in exclude for name in (item.name, _last(item.name))):
            excluded.add(item.name)
        elif min_age_s and item.mtime_ns > youngest_ns:
            young.add(item.name)
        elif kind == "foreign" and not item.problem:
            there.append(item._replace(problem=("undecodable", foreign_reason(file) or "")))
        else:
            there.append(item)
    if others:
        listed = ", ".join(f"{n:,} {suffix}" for suffix, n in others.most_common(_SHOWN_SUFFIXES))
        more = f", {len(others) - _SHOWN_SUFFIXES} more kinds" if len(others) > _SHOWN_SUFFIXES else ""
        notes.append(f"passed over {others.total():,} files whose names do not end as a recording's: {listed}{more}")
    if excluded:
        notes.append(f"left out {len(excluded):,} files that --exclude names")
    if young:
        notes.append(
            f"{len(young):,} files are younger than {min_age_s:g} s (extract.min_age_s) and wait for the next run"
        )
    if not there:
        state = "holds no recordings to read" if files.exists(folder) else "does not exist"
        hint = "; ".join(notes) or "files are taken whose names end as a recording's, such as .wav, .flac or .mp3"
        raise ReadRecordingsError(f"{folder} {state}: {hint}.")
    there.sort(key=lambda item: item.name)
    return Listing(there, notes, frozenset(young), frozenset(excluded))


_INVENTORY = ("bucket", "key", "size", "last_modified_date")
"""The first columns of an S3 inventory, whose CSV files have no header."""


_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_COLUMNS = (*_INVENTORY, "path", "session_id", "utt_id")


def _named_column(name: str) -> str:
    """The name of a column of a table of paths, met in any case."""
    return lower if (lower := name.strip().lower()) in _COLUMNS else name


def is_table_of_paths(path: str) -> bool:
    """Whether a file is a table of paths by its columns: a CSV, or a Parquet file without `utt_id`."""
    if path.lower().endswith(_CSV):
        return True
    if not path.lower().endswith(".parquet"):
        return False
    names = set(map(_named_column, files.read_parquet_schema(path).names))
    return "utt_id" not in names and bool(names & {"path", "key"})


def read_paths(path: str, several: Collection[str] = ()) -> Iterator[Found]:
    """The recordings that a table names, unseen: nothing is listed or opened.

    Args:
        path: Parquet or CSV. `path` is relative to the table, absolute or a URI; or `bucket` and `key` as in an S3
            inventory, whose CSV needs no header. Where they are there: `session_id` (else the path as it stands, or
            the key), `size` in bytes, and `last_modified_date`. Blanks around a path, a key or an id do not count.
        several: Ids of several recordings each, which have the names of their paths.

    Raises:
        ReadRecordingsError: if it has none of these columns, a row without a path or without the bucket of its key, or
            two rows of one id or of one recording.
    """
    table = _table_of_paths(path)
    keys = table.get("key")
    if keys is not None and ("bucket" in table or "path" not in table):
        buckets = list(map(_text, table.get("bucket") or [""] * len(keys)))
        many = len(set(buckets)) > 1
        # Inventories write keys as URLs do.
        keys = [urllib.parse.unquote_plus(_text(key)) for key in keys]
        for row, (bucket, key) in enumerate(zip(buckets, keys, strict=True), 1):
            if key and not bucket:
                raise ReadRecordingsError(
                    f"{path}, row {row}: it has a key and no bucket. Give both, or the whole path in a column 'path'."
                )
        places = [f"s3://{bucket}/{key}" if key else "" for bucket, key in zip(buckets, keys, strict=True)]
        names = [f"{bucket}/{key}" if many else key for bucket, key in zip(buckets, keys, strict=True)]
    else:
        root = posixpath.dirname(path)
        names = list(map(_text, table["path"]))
        places = [
            place if not place or files.is_uri(place) or posixpath.isabs(place) else files.join(root, place)
            for place in names
        ]
    ids = [_text(name) or place for name, place in zip(table.get("session_id") or names, names, strict=True)]
    if several:
        ids = [name if session_id in several else session_id for session_id, name in zip(ids, names, strict=True)]
    seen: set[str] = set()
    row_of: dict[str, int] = {}
    for row, (name, place) in enumerate(zip(ids, places, strict=True), 1):
        if not place:
            raise ReadRecordingsError(f"{path}, row {row}: it names no recording. Every row needs a path.")
        if name in seen:
            raise ReadRecordingsError(
                f"{path}, row {row}: '{name}' is already there. Every row needs its own id; which recordings are "
                "one call is said by --calls, which may be the same table."
            )
        seen.add(name)
        # The keys of a bucket are names as they stand.
        local = place.removeprefix("file://")
        if (first := row_of.setdefault(place if files.is_uri(local) else posixpath.normpath(local), row)) != row:
            raise ReadRecordingsError(
                f"{path}, row {row}: '{names[row - 1]}' is the recording of row {first}, '{names[first - 1]}'. Every "
                "recording is in one row; drop one of them."
            )
    sizes = table.get("size") or [0] * len(ids)
    times = table.get("last_modified_date") or [None] * len(ids)
    for row, (name, place, size, time_) in enumerate(zip(ids, places, sizes, times, strict=True), 1):
        yield Found(name, place, _as_bytes(size, f"{path}, row {row}"), _as_ns(time_))


def _table_of_paths(path: str) -> dict[str, list[Any]]:
    if not path.lower().endswith((*_CSV, ".parquet")):
        raise ReadRecordingsError(
            f"{path} is a single file. Give the folder that it lies in, or a table of paths (.csv, .parquet); a "
            "manifest of utterances is given as --manifest."
        )
    try:
        if path.lower().endswith(".parquet"):
            table = files.read_parquet(path)
            table = table.rename_columns([_named_column(name) for name in table.column_names])
        else:
            data = files.read_bytes(path)
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            first = data.partition(b"\n")[0].decode("utf-8-sig").strip()
            delimiter = delimiter_of(data)
            header = [_named_column(name.strip().strip('"')) for name in first.split(delimiter)]
            has_names = not {"path", "key"}.isdisjoint(header) or len(header) < 2
            names = header if has_names else [*_INVENTORY, *map(str, range(4, len(header)))][: len(header)]
            # Threads that still hold the content when the process ends abort it.
            read = pa.csv.ReadOptions(column_names=names, skip_rows=int(has_names), use_threads=False)
            wanted = dict.fromkeys(("path", "key", "bucket", "session_id", "last_modified_date"), pa.string())
            convert = pa.csv.ConvertOptions(column_types=wanted, strings_can_be_null=True, null_values=[""])
            parse = pa.csv.ParseOptions(delimiter=delimiter)
            table = pa.csv.read_csv(
                pa.BufferReader(data), read_options=read, parse_options=parse, convert_options=convert
            )
            last = str(table.slice(max(table.num_rows - 1, 0)).to_pylist())
            if data.count(b'"') % 2 and "\\n" in last:
                raise ReadRecordingsError(
                    f"the table of paths {path} cannot be read: a quote is not closed, and all behind it is one value."
                )
            if not has_names and table["bucket"].unique().to_pylist() != [header[0]]:
                # An inventory is of one bucket: this is a header with other names.
                table = table.rename_columns(header)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ReadRecordingsError(f"the table of paths {path} cannot be read: {cause(error)}") from None
    if not {"path", "key"} & set(table.column_names):
        found = ", ".join(table.column_names)
        what_to_do = (
            "It is a manifest of utterances: extract takes it as --manifest, in JSON Lines or Parquet."
            if {"utt_id", "audio_path"} <= set(table.column_names)
            else "Name the column with the recordings 'path'."
        )
        raise ReadRecordingsError(
            f"the table of paths {path} has neither 'path' nor 'key'; it has {found}. {what_to_do}"
        )
    if twice := next((name for name in _COLUMNS if table.column_names.count(name) > 1), None):
        raise ReadRecordingsError(f"the table of paths {path} has two columns '{twice}'; drop or rename one.")
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: column.to_pylist() for name, column in columns if name in _COLUMNS}


def _text(value: Any) -> str:
    """A path or an id as it is meant; empty where there is none."""
    return "" if value is None else str(value).strip()


def _as_bytes(size: Any, where: str) -> int:
    """A size; 0 where there is none."""
    try:
        number = float(size or 0)
        n_bytes = 0 if math.isnan(number) else int(number)
    except (ValueError, OverflowError):
        n_bytes = -1
    if n_bytes < 0:
        raise ReadRecordingsError(f"{where}: size is {size!r}; give a whole number of bytes, or nothing.")
    return n_bytes


def _as_ns(when: Any) -> int:
    """A time as ns since 1970; 0 where there is none."""
    if isinstance(when, str):
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(when.replace("Z", "+00:00"))
    if not isinstance(when, datetime):
        return 0
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1e9)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _named(found: Iterable[Found]) -> Iterator[Found]:
    """The files under names that can be written anywhere, all different."""
    items = list(found)
    taken = {item.name for item in items if shown(item.name) == item.name}
    for item in items:
        name = shown(item.name)
        if name == item.name:
            yield item
            continue
        while name in taken:
            name = name.replace("\\", "\\\\")
        taken.add(name)
        yield item._replace(name=name)


def shown(name: str) -> str:
    r"""A file's name as text: control characters, and bytes that are no UTF-8, become `\xe4`."""
    if name.isascii() and name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


class Stamp(NamedTuple):
    """What tells whether a file has changed: its size, then its time, then a digest of samples of its bytes.

    Attributes:
        size: Bytes.
        mtime_ns: When it was last written; a copy or a restore changes it alone.
        digest: Of head, middle and tail, 16 hex digits; empty where they were not read.
    """

    size: int
    mtime_ns: int
    digest: str = ""

    @staticmethod
    def of(path: str) -> Stamp | None:
        """Of a file as it is now; None where it cannot be read."""
        try:
            found = files.size_and_time(path)
            return Stamp(*found, sample_digest(path, found[0])) if found else None
        except (OSError, pa.ArrowException):
            return None

    def same(self, other: Stamp) -> bool:
        """Whether another stamp, taken later, is of the same file."""
        if self.size != other.size:
            return False
        return self.mtime_ns == other.mtime_ns or not self.digest or self.digest == other.digest


def is_still(path: str, size: int, mtime_ns: int, before: Sequence[Any]) -> bool:
    """Whether a file of this size and time is the one of an earlier stamp; only where the time differs it is opened.

    Args:
        path: Of the file.
        size: Its bytes now.
        mtime_ns: When it was last written.
        before: The fields of the `Stamp`.
    """
    if size != before[0] or mtime_ns == before[1]:
        return size == before[0]
    return not before[2] or sample_digest(path, size) == before[2]


def sample_digest(path: str, size: int) -> str:
    """16 hex digits of the size, and of head, middle and tail of a file."""
    found = hashlib.blake2b(str(size).encode(), digest_size=8)
    for chunk in _samples(path, size):
        found.update(chunk)
    return found.hexdigest()


def _samples(path: str, size: int) -> Iterator[bytes]:
    starts = sorted({0, max(size - _SAMPLE_BYTES, 0) // 2, max(size - _SAMPLE_BYTES, 0)})
    if not files.is_uri(path):
        # pyarrow takes no names that are not UTF-8.
        with open(path, "rb", buffering=0) as file:
            for start in starts:
                file.seek(start)
                yield file.read(_SAMPLE_BYTES)
        return
    filesystem, inner = files.filesystem_of(path)
    with filesystem.open_input_file(inner) as remote:
        for start in starts:
            yield remote.read_at(_SAMPLE_BYTES, start)


def find_twins(
    recordings: Sequence[Found], *, known: Mapping[str, str], group: Callable[[str], Hashable]
) -> dict[str, str]:
    """Recordings whose bytes are those of an earlier one: their names, and the name of the first.

    Sizes are compared first, then samples of those of one size, then all bytes. What was read in an earlier run comes
    first, and is opened only for the last look.

    Args:
        recordings: As `list_recordings` gives them.
        known: Those that were read in an earlier run, with their digests (`Stamp.digest`), or an empty text.
        group: What recordings must have in common besides, by name.
    """
    by_size: dict[Hashable, list[Found]] = {}
    for item in recordings:
        if not item.problem and item.size:
            by_size.setdefault((item.size, group(item.name)), []).append(item)
    # If all are known, they were compared when they were new.
    alike = [items for items in by_size.values() if len(items) > 1 and any(item.name not in known for item in items)]

    def digest_of(item: Found) -> str:
        try:
            return known.get(item.name) or sample_digest(item.path, item.size)
        except (OSError, pa.ArrowException):
            return item.name

    twins: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        flat = list(itertools.chain.from_iterable(alike))
        digests = dict(zip((item.name for item in flat), pool.map(digest_of, flat), strict=True))
    for items in alike:
        firsts: dict[str, list[Found]] = {}
        for item in sorted(items, key=lambda item: (item.name not in known, item.name)):
            same = firsts.setdefault(digests[item.name], [])
            first = next((other for other in same if item.name not in known and _equal(other, item)), None)
            if first is None:
                same.append(item)
            else:
                twins[item.name] = first.name
    return twins


def _equal(one: Found, other: Found) -> bool:
    """Whether two files of one size hold the same bytes."""
    try:
        with _opened(one.path) as a, _opened(other.path) as b:
            while True:
                left, right = a.read(1 << 20), b.read(1 << 20)
                if left != right:
                    return False
                if not left:
                    return True
    except (OSError, pa.ArrowException):
        return False


def _opened(path: str) -> Any:
    if not files.is_uri(path):
        return open(path, "rb")
    filesystem, inner = files.filesystem_of(path)
    return filesystem.open_input_stream(inner)
