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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vaemo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

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
    skip = len(inner.rstrip("/")) + 1
    return sorted(
        join(folder, info.path[skip:])
        for info in infos
        if info.type == pafs.FileType.File
        and info.base_name.endswith(suffix)
        and not any(part.startswith((".", "_")) for part in info.path[skip:].split("/"))
    )


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


def write_whole(path: str | Path, content: bytes | memoryview | Iterator[bytes | memoryview]) -> None:
    """Write a file so that it is there complete or not at all; an older one of that name is replaced.

    Args:
        path: The file; folders are made.
        content: All of it, or its pieces.

    Raises:
        StorageError: if the disk is full, or the storage refuses or fails.
    """
    with storage_at(path):
        _write_whole(path, content if isinstance(content, Iterator) else [content])


def _write_whole(path: str | Path, pieces: Iterable[bytes | memoryview]) -> None:
    filesystem, inner = filesystem_of(path)
    folder, name = posixpath.split(inner)
    filesystem.create_dir(folder, recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:
            for piece in pieces:
                stream.write(piece)
        return
    hidden = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(hidden, "wb") as file:
            for piece in pieces:
                file.write(piece)
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


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole, one after the other: they are not in memory, or on another disk, twice.

    Raises:
        StorageError: as `write_whole`.
    """
    write_whole(path, safetensors_pieces(tensors, metadata))


def safetensors_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """What `write_safetensors` writes: the length of the header, the header, and each tensor."""
    import torch

    # The largest numbers first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        kind = str(tensor.dtype).removeprefix("torch.")
        short = {"bool": "BOOL", "bfloat16": "BF16"}.get(kind) or kind[0].upper() + kind.lstrip("floatuin")
        header[name] = {"dtype": short, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def safetensors_header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file, which is JSON; its length stands in the first eight bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return safetensors_header(content).get("__metadata__", {})
