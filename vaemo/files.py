"""Paths of every kind, and writes that happen whole or not at all.

A path is local, or a URI (`file://`, `s3://`, `gs://`, or anything that fsspec knows). A reader never sees half a
file: on a file system a file is written under a hidden name and renamed, on an object store it is one upload.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vaemo.errors import StorageError, UsageError

_S3_ATTEMPTS = 12
"""Of one request; the pauses between them grow to 20 s, some two minutes in all."""

_S3_SILENCE_S = 60.0
"""A request that stays silent for so long has failed, and is tried again."""


def is_uri(path: str | Path) -> bool:
    """Whether a path names its file system, as in `s3://bucket/key`."""
    return "://" in str(path)


def filesystem_of(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system that a path names, and the path within it.

    Returns:
        filesystem: pyarrow's own for local paths, S3 and GCS, otherwise fsspec's.
        path: What that file system calls it; absolute for local paths.

    Raises:
        UsageError: for a URI of a kind that nothing installed here can read.
    """
    text = str(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), os.path.abspath(text)
    try:
        filesystem, inner = pafs.FileSystem.from_uri(text)
    except pa.ArrowInvalid:
        import fsspec

        try:
            filesystem, inner = fsspec.core.url_to_fs(text)
        except (ValueError, ImportError) as error:
            raise UsageError(
                f"'{text}' cannot be reached ({error}); give a path, or a URI such as s3://, gs:// or file://."
            ) from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner
    return _patient(filesystem), inner


def _patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same file system; S3 with the patience for minutes in which it refuses or stalls, pyarrow has but seconds."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    _, (settings,) = filesystem.__reduce__()
    patience = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        "request_timeout": _S3_SILENCE_S,
    }
    return pafs.S3FileSystem(**settings | patience)


def join(folder: str | Path, *names: str) -> str:
    """`folder/name/...`, for paths and URIs alike."""
    return posixpath.join(str(folder), *names)


def lies_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path lies below a folder, symbolic links followed.

    A URI does not where it holds what its file system may read as something else than a name: `..`, `?`, `#`, `::`.
    """
    place = _real(path)
    strange = is_uri(place) and (".." in place.split("/") or any(mark in place for mark in ("?", "#", "::")))
    return not strange and place.startswith(_real(folder).rstrip("/") + "/")


def _real(path: str | Path) -> str:
    text = str(path)
    return text if is_uri(text) and not text.startswith("file://") else os.path.realpath(filesystem_of(text)[1])


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = filesystem_of(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def is_file(path: str | Path) -> bool:
    """Whether a file is there, and no folder."""
    filesystem, inner = filesystem_of(path)
    return filesystem.get_file_info(inner).type == pafs.FileType.File


def head(path: str | Path, n: int = 4) -> bytes:
    """The first bytes of a file."""
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_file(inner) as file:
        return file.read(n)


def list_files(folder: str | Path, suffix: str = "", *, recursive: bool = False) -> list[str]:
    """Sorted paths of the files below a folder; empty where there is no folder.

    Hidden names (a leading `.` or `_`) are left out: they are bookkeeping, or a write under way.

    Raises:
        UsageError: if it is a file.
    """
    filesystem, inner = filesystem_of(folder)
    try:
        infos = _infos(filesystem, pafs.FileSelector(inner, recursive=recursive, allow_not_found=True))
    except NotADirectoryError:
        raise UsageError(f"{folder} is a file; a folder is needed in its place.") from None
    below = _below(infos, folder, inner)
    return sorted(path for path, info in below.items() if info.type == pafs.FileType.File and path.endswith(suffix))


def list_partitioned(folder: str | Path) -> list[str]:
    """Sorted paths of the files in a folder, and of those in folders below it that are all named `column=value`.

    Hidden names are left out as in `list_files`, and so are other folders.
    """
    filesystem, inner = filesystem_of(folder)
    below = _below(_infos(filesystem, pafs.FileSelector(inner, allow_not_found=True)), folder, inner)
    if any(info.type == pafs.FileType.Directory and "=" in info.base_name for info in below.values()):
        below = _below(_infos(filesystem, pafs.FileSelector(inner, recursive=True)), folder, inner)
    skip = len(str(folder).rstrip("/")) + 1
    return sorted(
        path
        for path, info in below.items()
        if info.type == pafs.FileType.File and all("=" in name for name in path[skip:].split("/")[:-1])
    )


def _below(infos: list[pafs.FileInfo], folder: str | Path, inner: str) -> dict[str, pafs.FileInfo]:
    """What was listed, by its path; without what is hidden."""
    skip = len(inner.rstrip("/")) + 1
    return {
        join(folder, info.path[skip:]): info
        for info in infos
        if not any(part.startswith((".", "_")) for part in info.path[skip:].split("/"))
    }


def _infos(filesystem: pafs.FileSystem, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
    try:
        return filesystem.get_file_info(selector)
    except FileNotFoundError:
        # Made between pyarrow's two looks: the first found nothing to list, the second that it is there.
        return filesystem.get_file_info(selector)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; FileNotFoundError and PermissionError as from `open`."""
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        StorageError: if it holds something else.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise StorageError(
            f"{path} is not JSON ({error}): it was cut short or changed by hand. Put back what was written there."
        ) from None


@contextlib.contextmanager
def storage_at(path: str | Path) -> Iterator[None]:
    """What fails in the block for want of room, rights or an answer is a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError.of(error, str(path)) from error


def delete(path: str | Path) -> None:
    """Delete a file.

    Raises:
        StorageError: if it is not there, or the storage refuses or fails.
    """
    filesystem, inner = filesystem_of(path)
    with storage_at(path):
        filesystem.delete_file(inner)


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file so that it is there complete or not at all; an older one of that name is replaced.

    Raises:
        StorageError: if the disk is full, or the storage refuses or fails.
    """
    with storage_at(path):
        _write_whole(path, content)


def _write_whole(path: str | Path, content: bytes | memoryview) -> None:
    filesystem, inner = filesystem_of(path)
    folder, name = posixpath.split(inner)
    filesystem.create_dir(folder, recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(content)
        return
    hidden = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(hidden, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, inner)
    except BaseException:
        Path(hidden).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_parquet_whole(path: str | Path, table: pa.Table) -> None:
    """Write a table as Parquet, whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue())


def read_parquet(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it."""
    filesystem, inner = filesystem_of(path)
    return pq.read_table(inner, filesystem=filesystem, columns=columns, partitioning=None)


def read_parquet_schema(path: str | Path) -> pa.Schema:
    """The schema of a Parquet file, metadata included; reads its footer alone."""
    filesystem, inner = filesystem_of(path)
    return pq.read_schema(inner, filesystem=filesystem)


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, its length stands in the first eight bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})
