"""One driver at a time: a lease on an output folder, renewed while its holder lives.

The lease is a file, `_lease.json`. On a disk it is created exclusively; in an S3 bucket by a conditional write where
`boto3` is installed, and elsewhere it is written and read back. A holder that was killed leaves it behind: on its own
host it is known to be gone, elsewhere the lease is taken over when it has not been renewed for `STALE_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vaemo import files
from vaemo.errors import OtherRunError, VaemoError

LEASE = "_lease.json"
_held: set[str] = set()
"""Tokens of the leases that this process holds."""

RENEW_S = 10.0
STALE_S = 60.0
_SETTLES_S = 0.2
_LENGTH = 512
"""Bytes of a lease, blanks at its end included."""


@contextlib.contextmanager
def lease(folder: str) -> Iterator[None]:
    """Hold the lease on a folder while the block runs.

    Raises:
        OtherRunError: if another process holds it, naming its host and when it started.
    """
    path = files.join(folder, LEASE)
    ours: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    _take(path, folder, ours)
    _held.add(ours["token"])
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, ours, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        _held.discard(ours["token"])
        with contextlib.suppress(VaemoError, OSError):
            if _read(path)[0].get("token") == ours["token"]:
                files.delete(path)


def _take(path: str, folder: str, ours: dict[str, Any]) -> None:
    """Write our lease if there is none, or if the holder of the present one no longer exists."""
    content = _content(ours)
    if _create(path, content):
        return
    theirs, age_s = _read(path)
    if not theirs:
        # Who has just created it may not have written it yet.
        time.sleep(_SETTLES_S)
        theirs, age_s = _read(path)
    if theirs and not _is_gone(theirs, age_s):
        raise OtherRunError(
            f"{folder} is being written by another run, on {theirs['host']} (process {theirs['pid']}) since "
            f"{theirs['started']}; its last sign of life came {age_s:.0f} s ago. Wait for it, or stop it: its place "
            f"is free {STALE_S:.0f} s after its last sign."
        )
    files.write_whole(path, content)
    # Of several that find it free at once the last one to write has it.
    time.sleep(_SETTLES_S)
    if _read(path)[0].get("token") != ours["token"]:
        raise OtherRunError(f"{folder} has just been taken by another run; run this one again when that has ended.")


def _create(path: str, content: bytes) -> bool:
    """Write a file that is not there; whether it was not."""
    filesystem, inner = files.filesystem_of(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with files.storage_at(path):
            Path(inner).parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(inner, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                return False
            with open(handle, "wb") as file:
                file.write(content)
        return True
    done = files.create_object(path, content) if isinstance(filesystem, pafs.S3FileSystem) else None
    if done is None:
        if files.exists(path):
            return False
        files.write_whole(path, content)
        return True
    return done


def _read(path: str) -> tuple[dict[str, Any], float]:
    """What a lease says, and its age in seconds; empty where there is none, or it was cut short."""
    try:
        held = json.loads(files.read_bytes(path))
        return held, max(time.time() - float(held["renewed"]), 0.0)
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0.0


def _is_gone(theirs: dict[str, Any], age_s: float) -> bool:
    if theirs.get("host") == socket.gethostname():
        if theirs["pid"] == os.getpid():
            # One that this process could not give back: the storage was away.
            return theirs.get("token") not in _held
        # A process of the same number may be another one.
        return _born(theirs["pid"]) is None or _born(theirs["pid"]) != theirs.get("born")
    return age_s > STALE_S


def _born(pid: int) -> str | None:
    """When a process of this host began, in a form to compare; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _renew(path: str, ours: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        with contextlib.suppress(VaemoError, OSError):
            files.write_whole(path, _content(ours))


def _content(ours: dict[str, Any]) -> bytes:
    # Always as long, since pyarrow asks an object store for the length first: it may be renewed before it is read.
    return json.dumps({**ours, "renewed": time.time()}).ljust(_LENGTH).encode()
