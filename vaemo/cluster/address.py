"""Which Ray a job runs on: the one that RAY_ADDRESS names, one that answers on this machine, or one of its own.

Ray itself uses any address it finds, and tries for many minutes to reach a cluster that no longer exists. Here an
address is validated first: its form, and whether a Ray head answers there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import grpc
from ray._common.utils import get_default_ray_temp_dir, get_ray_address_file
from ray._private.services import find_gcs_addresses

from vaemo.errors import ClusterError, StorageError, UsageError
from vaemo.progress import say

ADDRESS = "RAY_ADDRESS"

LOCAL, RUNNING = "local", "auto"
"""The addresses that mean a new local Ray, and the one that already runs on this machine."""

ANSWER_S = 5.0
"""Seconds after which a head counts as absent: it normally answers within milliseconds."""

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")

_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_{}/sockets/plasma_store"
"""The longest path that Ray creates below its folder."""

_SHORT, _ROOM = "/tmp/ray", 10_000_000


def find_cluster() -> str | None:
    """The address of the Ray cluster that the job is to run on, as `ray.init` takes it.

    Returns:
        `LOCAL` where one is to be started for the job; None for the one that Ray has recorded, if it answers.

    Raises:
        UsageError: if RAY_ADDRESS is no address of a cluster.
        ClusterError: if nothing answers there.
    """
    asked = os.environ.get(ADDRESS, "").strip()
    if asked == LOCAL:
        return LOCAL
    if asked and asked != RUNNING:
        _check_form(asked)
        if not _answers(asked):
            raise ClusterError(
                f"{ADDRESS} is '{asked}', and no Ray cluster answers there. Give the address of one that runs, or "
                f"unset {ADDRESS}: Ray then starts on this machine."
            )
        return asked
    file = get_ray_address_file(None)
    noted = ""
    with contextlib.suppress(OSError):
        noted = Path(file).read_text(errors="replace").strip()
    if noted and _answers(noted):
        return asked or None
    if asked == RUNNING:
        if running := [address for address in sorted(find_gcs_addresses()) if _answers(address)]:
            return running[0]
        where = f"at {noted[:80]}, which {file} names" if noted else "on this machine"
        raise ClusterError(
            f"{ADDRESS} is 'auto', and no Ray cluster answers {where}. "
            f"Start one with `ray start --head`, or unset {ADDRESS}: Ray then starts here for the job alone."
        )
    if noted:
        say(f"the Ray cluster at {noted[:80]}, which {file} names, does not answer: Ray starts here")
    return LOCAL


def temporary_folder() -> str | None:
    """Where a Ray that is started here keeps its files, whose sockets' paths may have 107 bytes; None leaves it.

    Raises:
        UsageError: if RAY_TMPDIR is too long.
        StorageError: if there is too little room: Ray would then fail to start without saying why.
    """
    folder, most = os.path.dirname(get_default_ray_temp_dir()), _LONGEST_SOCKET - len(_SOCKET.format(os.getpid())) - 1
    if len(os.fsencode(folder)) <= most:
        _check_room(folder)
        return None
    if os.environ.get("RAY_TMPDIR"):
        raise UsageError(
            f"RAY_TMPDIR is '{folder}', which is too long for Ray's sockets: it has {len(os.fsencode(folder))} bytes, "
            f"and {most} are possible. Give a shorter path."
        )
    say(f"TMPDIR is too long for Ray's sockets ({most} bytes are possible): Ray keeps its files in {_SHORT}")
    _check_room("/tmp")
    return _SHORT


def _check_room(folder: str) -> None:
    with contextlib.suppress(OSError):  # Ray creates a missing folder, or refuses it
        free = shutil.disk_usage(folder).free
        if free < _ROOM:
            raise StorageError(
                f"{folder}, where Ray keeps its files while a job runs, has {free / 1e6:.1f} MB left. Make room there, "
                "or set RAY_TMPDIR to a short path on another disk."
            )


def _check_form(asked: str) -> None:
    if asked.startswith(("http://", "https://")):
        raise UsageError(
            f"{ADDRESS} is '{asked}', the address of a dashboard, which is for `ray job submit`. To run the job "
            "directly, on a node of the cluster, give that of its head, host:port (6379 unless changed), or unset "
            f"{ADDRESS}: Ray then starts on this machine."
        )
    if "://" in asked:
        raise UsageError(
            f"{ADDRESS} is '{asked}', and jobs do not run through a Ray Client. Submit the job with `ray job submit`, "
            f"or run it on a node of the cluster with {ADDRESS}=host:port."
        )
    found = _ADDRESS.fullmatch(asked)
    if not found or not 0 < int(found["port"]) < 65536:
        raise UsageError(
            f"{ADDRESS} is '{asked}', which is no address; give host:port, auto, local, or unset it: Ray then starts "
            "on this machine."
        )


def _answers(address: str) -> bool:
    """Whether a gRPC server, such as a Ray head, answers at an address."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        return False
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), ANSWER_S).close()
    except OSError:
        return False
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0", "false", "False"):
        return True
    # A port may since have gone to another program, and a head that hangs still takes connections.
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            return False
    return True
