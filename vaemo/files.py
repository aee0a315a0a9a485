"""Paths of every kind, and writes that happen whole or not at all.

A path is local, or a URI (`file://`, `s3://`, `gs://`, or anything that fsspec knows). A reader never sees half a
file: on a file system a file is written under a hidden name and renamed, on an object store it is one upload.
"""

from __future__ import annotations

import json
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq


def is_uri(path: str | Path) -> bool:
    """Whether a path names its file system, as in `s3://bucket/key`."""
    return "://" in str(path)


def filesystem_of(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system that a path names, and the path within it.

    Returns:
        filesystem: pyarrow's own for local paths, S3 and GCS, otherwise fsspec's.
        path: What that file system calls it; absolute for local paths.
    """
    text = str(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), os.path.abspath(text)
    try:
        return pafs.FileSystem.from_uri(text)
    except pa.ArrowInvalid:
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(text)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def join(folder: str | Path, *names: str) -> str:
    """`folder/name/...`, for paths and URIs alike."""
    return posixpath.join(str(folder), *names)


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = filesystem_of(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def list_files(folder: str | Path, suffix: str = "", *, recursive: bool = False) -> list[str]:
    """Sorted paths of the files below a folder; empty where there is no folder.

    Hidden names (a leading `.` or `_`) are left out: they are bookkeeping, or a write under way.
    """
    filesystem, inner = filesystem_of(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=recursive, allow_not_found=True))
    skip = len(inner.rstrip("/")) + 1
    return sorted(
        join(folder, info.path[skip:])
        for info in infos
        if info.type == pafs.FileType.File
        and info.base_name.endswith(suffix)
        and not any(part.startswith((".", "_")) for part in info.path[skip:].split("/"))
    )


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; FileNotFoundError and PermissionError as from `open`."""
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds."""
    return json.loads(read_bytes(path))


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all; an older one of that name is replaced."""
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
