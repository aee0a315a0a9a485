"""A folder has one driver at a time; one that was killed does not keep it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from vaemo import files
from vaemo.errors import OtherRunError
from vaemo.parts import lease as module
from vaemo.parts.lease import LEASE, lease

HOLDER = """
import sys, time
from vaemo.parts.lease import lease
with lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["disk", "bucket", "bucket without boto3"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return str(tmp_path / "out")
    if request.param == "bucket without boto3":
        monkeypatch.setattr(files, "create_object", lambda uri, content: None)
    return f"{request.getfixturevalue('bucket')}/out"


def foreign(folder, **facts):
    """A lease that another host holds."""
    held = {"host": "elsewhere", "pid": 7, "born": "1", "started": "2026-11-28T10:00:00+00:00", "token": "theirs"}
    files.write_json(files.join(folder, LEASE), {**held, "renewed": time.time(), **facts})


def test_a_second_driver_is_told_who_holds_it(folder):
    with lease(folder):
        with (
            pytest.raises(OtherRunError, match=rf"on {socket.gethostname()} \(process {os.getpid()}\) since 20"),
            lease(folder),
        ):
            pass
        assert files.exists(files.join(folder, LEASE))
    assert not files.exists(files.join(folder, LEASE))
    with lease(folder):
        pass


def test_one_of_another_host_is_kept_until_it_is_stale(folder):
    foreign(folder)
    with pytest.raises(OtherRunError, match=r"on elsewhere \(process 7\) since 2026-11-28T10:00:00"), lease(folder):
        pass
    foreign(folder, renewed=time.time() - module.STALE_S - 1)
    with lease(folder):
        assert files.read_json(files.join(folder, LEASE))["pid"] == os.getpid()


def test_a_lease_that_was_cut_short_is_taken(folder):
    files.write_whole(files.join(folder, LEASE), b'{"host": "els')
    with lease(folder):
        pass


def test_one_that_is_created_and_not_written_yet_is_not_taken(tmp_path):
    (tmp_path / LEASE).touch()
    written = threading.Timer(0.05, foreign, [str(tmp_path)])
    written.start()
    with pytest.raises(OtherRunError, match="on elsewhere"), lease(str(tmp_path)):
        pass
    written.join()


def test_it_is_renewed_and_what_another_took_is_not_deleted(folder, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    with lease(folder):
        first = files.read_json(files.join(folder, LEASE))["renewed"]
        until = time.monotonic() + 20
        while files.read_json(files.join(folder, LEASE))["renewed"] == first:
            assert time.monotonic() < until
            time.sleep(0.05)
        monkeypatch.setattr(module, "_renew", lambda *_: None)


def test_what_another_host_took_over_stays_its_own(tmp_path):
    folder = str(tmp_path)
    with lease(folder):
        foreign(folder)
    assert files.read_json(files.join(folder, LEASE))["token"] == "theirs"


def test_a_killed_holder_is_known_to_be_gone_at_once(tmp_path):
    folder = str(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OtherRunError, match=f"process {holder.pid}"), lease(folder):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lease(folder):
        pass
    # Its number may have gone to another process.
    held = {"host": socket.gethostname(), "pid": os.getpid(), "born": "0", "started": "then", "token": "t"}
    (tmp_path / LEASE).write_text(json.dumps({**held, "renewed": time.time()}))
    with lease(folder):
        pass
