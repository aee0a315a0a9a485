"""Local paths and URIs, and atomic writes.

A path is local, or a URI (`file://`, `s3://`, `gs://`, or anything that fsspec knows). A reader never sees half a
file: on a file system a file is written under a hidden name and renamed, on an object store it is one upload.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import posixpath
import re
import stat
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vaemo.errors import StorageError, UsageError, cause

if TYPE_CHECKING:
    from torch import Tensor

_S3_ATTEMPTS = 12
"""Of one request; the pauses between them grow to 20 s, some two minutes in all."""

_S3_FOLDERS = 1_000
_S3_LISTED_AT_ONCE = 8
"""Folders of a bucket whose objects are listed side by side, where there are not more than the first."""

_S3_SILENCE_S = 60.0
"""Seconds after which a silent request has failed and is retried."""


_OPTIONS = re.compile(r"\?(?:(?:region|scheme|endpoint_override|allow_bucket_creation|anonymous)=[^&/?]*&?)+$")
"""The options behind a bucket's URI, which are not part of a name."""

_COLD = ("GLACIER", "DEEP_ARCHIVE")
"""Storage classes of S3 whose objects cannot be read before they are restored."""


def is_uri(path: str | Path) -> bool:
    """Whether a path names its file system, as in `s3://bucket/key`."""
    return "://" in str(path)


def filesystem_of(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system that a path names, and the path within it.

    Names in a bucket are taken as they are: blanks, `#`, `?`, `%` and letters of any script are part of them.

    Returns:
        filesystem: pyarrow's own for local paths, S3 and GCS, otherwise fsspec's.
        path: Its path on that file system; absolute for local paths.

    Raises:
        UsageError: for a URI scheme that no installed package can read.
    """
    text = str(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), os.path.abspath(text)
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        literal = "/" + rest.partition("/")[2]
        return pafs.LocalFileSystem(), literal if os.path.lexists(literal) else urllib.parse.unquote(literal)
    rest, options = _without_options(rest)
    bucket, _, key = rest.partition("/")
    if scheme in ("s3", "gs", "gcs"):
        # Settings in the environment are part of a store's identity.
        told = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        return _bucket(f"{scheme}://{bucket}{options}", told), posixpath.join(bucket, key) if key else bucket
    try:
        return pafs.FileSystem.from_uri(text)
    except pa.ArrowInvalid:
        import fsspec
    try:
        filesystem, inner = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"'{text}' cannot be reached ({error}); give a path, or a URI such as s3://, gs:// or file://."
        ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def _without_options(text: str) -> tuple[str, str]:
    """What names a place, and the options behind it, such as `?region=eu-west-1`."""
    found = _OPTIONS.search(text)
    return (text[: found.start()], found[0]) if found else (text, "")


@functools.lru_cache(maxsize=64)
def _bucket(uri: str, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """The file system of a bucket, made once per process: finding its region takes a request."""
    try:
        return _patient(pafs.FileSystem.from_uri(uri)[0])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"'{uri}' is not the address of a bucket ({error}).") from None


def _patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same file system; S3 with minutes of retries while it refuses or stalls; pyarrow's default is seconds."""
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
    text = str(folder)
    text, options = _without_options(text) if is_uri(text) else (text, "")
    return posixpath.join(text, *names) + options


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
    try:
        return [path for name, path in _listed(folder, recursive=recursive) if name.endswith(suffix)]
    except NotADirectoryError:
        raise UsageError(f"{folder} is a file; a folder is needed in its place.") from None


def list_partitioned(folder: str | Path, found: Sequence[Found] | None = None) -> list[tuple[str, str]]:
    """The files in a folder, and in folders below it that are all named `column=value`; sorted.

    Hidden names are left out as in `list_files`, and so are other folders.

    Args:
        folder: Where.
        found: All that `walk` finds there, if that is known.

    Returns:
        Name relative to the folder, and path, of each.
    """
    if found is not None:
        parts = ((item, item.name.split("/")) for item in found if not item.name.endswith("/"))
        return sorted(
            (item.name, item.path)
            for item, (*folders, name) in parts
            if all("=" in each for each in folders) and not any(each.startswith("_") for each in (*folders, name))
        )
    return _listed(folder, recursive=True, enter=lambda name: "=" in name)


def _listed(
    folder: str | Path, *, recursive: bool, enter: Callable[[str], bool] = lambda name: True
) -> list[tuple[str, str]]:
    """Name relative to a folder, and path, of the files below it that are not hidden; sorted.

    Args:
        folder: What is listed; nothing where it is not there.
        recursive: Whether folders are entered.
        enter: Which of them, by their own name.
    """
    filesystem, inner = filesystem_of(folder)
    names: list[str] = []
    if isinstance(filesystem, pafs.LocalFileSystem):
        # pyarrow fails at names that are not UTF-8.
        if os.path.lexists(inner) and not os.path.isdir(inner):
            raise NotADirectoryError(inner)
        for where, folders, found in os.walk(inner):
            below = "" if where == inner else f"{os.path.relpath(where, inner)}/"
            names += [below + name for name in found if not name.startswith((".", "_"))]
            folders[:] = [name for name in folders if recursive and not name.startswith((".", "_")) and enter(name)]
    else:
        selector = pafs.FileSelector(inner, allow_not_found=True)
        infos = _infos(filesystem, selector)
        entered = [info.base_name for info in infos if info.type == pafs.FileType.Directory]
        if recursive and any(enter(name) for name in entered if not name.startswith((".", "_"))):
            infos = _infos(filesystem, pafs.FileSelector(inner, recursive=True, allow_not_found=True))
        skip = len(inner.rstrip("/")) + 1
        for info in infos:
            *folders, name = info.path[skip:].split("/")
            if info.type == pafs.FileType.File and not any(part.startswith((".", "_")) for part in (*folders, name)):
                names += ["/".join((*folders, name))] if all(map(enter, folders)) else []
    return [(name, join(folder, name)) for name in sorted(names)]


def _infos(filesystem: pafs.FileSystem, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
    try:
        return filesystem.get_file_info(selector)
    except FileNotFoundError:
        # Created between pyarrow's two requests: the first found nothing, the second found it.
        return filesystem.get_file_info(selector)


class Found(NamedTuple):
    """A file below a folder, as `walk` finds it.

    Attributes:
        name: Relative to the folder. Bytes that are no UTF-8 are lone surrogates in it, as `os.fsdecode` has them.
        path: What the functions of this module take.
        size: Bytes; 0 where there is a problem.
        mtime_ns: When it was last written, in ns since 1970; 0 where the storage does not say.
        problem: Status (`vaemo.units.STATUSES`) and reason where it is known already that it cannot be read.
    """

    name: str
    path: str
    size: int = 0
    mtime_ns: int = 0
    problem: tuple[str, str] | None = None


def walk(folder: str | Path) -> Iterator[Found]:
    """Every file below a folder, whatever its name; in no particular order.

    Names that begin with `.` are left out, and what lies below them. Links are followed; a folder that is reached by
    several names is walked once, under its own name where that lies below. What cannot be read (a folder without
    rights, a broken link, an object in an archive tier) is a `Found` with a problem; a folder's name ends in `/`.
    """
    filesystem, inner = filesystem_of(folder)
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from _walk_disk(inner)
        return
    listed = _walk_s3(str(folder)) if isinstance(filesystem, pafs.S3FileSystem) else None
    if listed is None:
        infos = _infos(filesystem, pafs.FileSelector(inner, recursive=True, allow_not_found=True))
        skip = len(inner.rstrip("/")) + 1
        listed = [
            Found(info.path[skip:], "", info.size or 0, info.mtime_ns or 0)
            for info in infos
            if info.type == pafs.FileType.File
        ]
    for found in listed:
        if not any(part.startswith(".") for part in found.name.split("/")):
            yield found._replace(path=join(folder, found.name))


def _walk_disk(root: str) -> Iterator[Found]:
    walked: set[tuple[int, int]] = set()
    folders: list[tuple[str, str]] = [(root, "")]
    links: list[tuple[str, str]] = []
    while folders or links:
        # Links come last, so that a folder below the root has its own name.
        path, prefix = folders.pop() if folders else links.pop()
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in walked:
                continue
            walked.add((about.st_dev, about.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, f"{name}/"))
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append((entry.path, f"{name}/"))
                    else:
                        yield _on_disk(entry, name)
        except OSError as error:
            if prefix:
                yield Found(prefix, path, problem=("unreadable", f"the folder cannot be listed: {said(error)}"))
            elif not isinstance(error, FileNotFoundError):
                raise


def _on_disk(entry: os.DirEntry, name: str) -> Found:
    try:
        about = entry.stat()
    except FileNotFoundError:
        return Found(name, entry.path, problem=("missing", "it is a link to a file that is not there"))
    except OSError as error:
        return Found(name, entry.path, problem=("unreadable", said(error)))
    if not stat.S_ISREG(about.st_mode):
        return Found(name, entry.path, problem=("unreadable", "it is not a file but a pipe, a socket or a device"))
    return Found(name, entry.path, about.st_size, about.st_mtime_ns)


def _s3_client(options: Mapping[str, str]) -> Any:
    """A client of boto3, for what pyarrow does not offer; None if it is not installed."""
    if importlib.util.find_spec("boto3") is None:
        return None
    import boto3
    import botocore.session
    from botocore.config import Config

    endpoint = options.get("endpoint_override")
    session = botocore.session.get_session()
    # Of a listing most of the time went into dates, which it takes in any form.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_s3_time)
    return boto3.Session(botocore_session=session).client(
        "s3",
        region_name=options.get("region"),
        endpoint_url=f"{options.get('scheme', 'https')}://{endpoint}" if endpoint else None,
        config=Config(retries={"mode": "standard", "total_max_attempts": _S3_ATTEMPTS}, read_timeout=_S3_SILENCE_S),
    )


def _s3_time(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp

        return parse_timestamp(text)


def _in_bucket(uri: str) -> tuple[Any, str, str]:
    """A client of boto3 or None, the bucket, and the key in it."""
    place, options = _without_options(uri)
    bucket, _, key = place.partition("://")[2].partition("/")
    return _s3_client(dict(urllib.parse.parse_qsl(options.removeprefix("?")))), bucket, key


def _walk_s3(uri: str) -> list[Found] | None:
    """The objects below a prefix with their storage classes, which pyarrow does not give; None where boto3 cannot."""
    client, bucket, prefix = _in_bucket(uri)
    if client is None:
        return None
    from botocore.exceptions import BotoCoreError, ClientError

    root = f"{prefix.rstrip('/')}/" if prefix else ""

    def pages(prefix: str, **options: Any) -> Iterator[Mapping[str, Any]]:
        listed = client.get_paginator("list_objects_v2")
        yield from listed.paginate(Bucket=bucket, Prefix=prefix, OptionalObjectAttributes=["RestoreStatus"], **options)

    def below(prefix: str) -> list[Found]:
        return [item for page in pages(prefix) for item in _objects(page, root)]

    try:
        found: list[Found] = []
        folders: list[str] = []
        for page in pages(root, Delimiter="/"):
            folders += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
            if len(folders) > _S3_FOLDERS:
                # One request each would be more than the objects take.
                return below(root)
            found += _objects(page, root)
        with ThreadPoolExecutor(_S3_LISTED_AT_ONCE) as pool:
            for of_folder in pool.map(below, folders):
                found += of_folder
        return found
    except (BotoCoreError, ClientError):
        # It may find other credentials than pyarrow, or none.
        return None


def _objects(page: Mapping[str, Any], root: str) -> list[Found]:
    """The objects of a page of a listing, less what stands for a folder."""
    return [
        Found(
            item["Key"][len(root) :],
            "",
            item["Size"],
            int(item["LastModified"].timestamp() * 1e9),
            archived(item.get("StorageClass"), item.get("RestoreStatus", {})),
        )
        for item in page.get("Contents", ())
        if not item["Key"].endswith("/")
    ]


def create_object(uri: str, content: bytes) -> bool | None:
    """Create an S3 object; whether it did not exist before. None where boto3 cannot, and nothing was written."""
    client, bucket, key = _in_bucket(uri)
    if client is None:
        return None
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
    except ClientError as error:
        taken = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
        return False if taken else None
    except BotoCoreError:
        return None
    return True


def archive_tier(uri: str) -> str | None:
    """Why an S3 object that was refused cannot be read, where it lies in an archive tier; None where it does not."""
    client, bucket, key = _in_bucket(uri) if uri.startswith("s3://") else (None, "", "")
    if client is None:
        return None
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        about = client.head_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError):
        return None
    said = about.get("Restore", "")
    restored = {"IsRestoreInProgress": 'request="true"' in said, "RestoreExpiryDate": "expiry-date" in said}
    # Objects of intelligent tiering keep their class and name the tier apart.
    cold = archived("GLACIER" if about.get("ArchiveStatus") else about.get("StorageClass"), restored)
    return cold and cold[1]


def archived(storage_class: str | None, restored: Mapping[str, Any]) -> tuple[str, str] | None:
    """Status and reason of an object in an archive tier that is not restored; None for any other."""
    if storage_class not in _COLD or restored.get("RestoreExpiryDate"):
        return None
    under_way = ", which is under way" if restored.get("IsRestoreInProgress") else ""
    reason = f"it lies in the archive tier {storage_class}; restore it{under_way}, then run with --retry-failed"
    return "archived", reason


def said(error: OSError) -> str:
    """The message of an operating system or storage about a failure, without numbers and paths."""
    return (error.strerror or " ".join(str(error).split()) or type(error).__name__).lower()


def size_and_time(path: str) -> tuple[int, int] | None:
    """Bytes of a file, and when it was last written, in ns since 1970 (0 where the storage does not say).

    None where there is no such file; OSError where the storage does not answer.
    """
    if not is_uri(path):
        # pyarrow takes no names that are not UTF-8.
        try:
            about = os.stat(path)
        except FileNotFoundError:
            return None
        return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None
    filesystem, inner = filesystem_of(path)
    info = filesystem.get_file_info(inner)
    return (info.size, info.mtime_ns or 0) if info.is_file else None


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; FileNotFoundError and PermissionError as from `open`."""
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        StorageError: if it holds anything else.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path} is not JSON ({cause(error)}): it was cut short or changed by hand. Restore the original file."
        ) from None


@contextlib.contextmanager
def storage_at(path: str | Path) -> Iterator[None]:
    """Raise StorageError, naming the path, where the block fails for lack of space, rights or an answer."""
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
    """Write a file atomically; an older one of that name is replaced.

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
    # Measured numbers hardly repeat: a dictionary of them costs time and space.
    repeated = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=repeated)
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
    """Write tensors as safetensors, whole, one after the other: without a second copy in memory or on disk.

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
    """The header of a safetensors file, which is JSON; its length is in the first eight bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return safetensors_header(content).get("__metadata__", {})
