"""Processes that a test started, found by descent: nobody else's are ever counted or killed."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def start_job(name, *arguments, overrides=(), **environment):
    """`jobs/NAME.py` in a process of its own, which talks into pipes; on a Ray of its own, or that of RAY_ADDRESS."""
    command = [sys.executable, ROOT / "jobs" / f"{name}.py", *arguments]
    command += [part for override in overrides for part in ("--set", override)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_job(job, due, within_s=120, delay_s=0.0):
    """SIGKILL to a job and all below it, `delay_s` after `due()` holds, or the job has ended by itself."""
    deadline = time.monotonic() + within_s
    while not due() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    time.sleep(delay_s)
    if job.poll() is None:
        kill_tree(job.pid)
    job.communicate()


def below(pid=None):
    """Processes under one (this one), directly or not, the newest last."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(psutil.Process(pid or os.getpid()).children(recursive=True), key=psutil.Process.create_time)
    return []


def workers(name, pid=None):
    """Ray workers of a class under one process (this one), the newest last."""
    found = []
    for process in below(pid):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill(process):
    """SIGKILL to a process; one that is gone already is no mistake."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def kill_tree(pid):
    """SIGKILL to a process and all below it, as when a machine fails: the first alone would take its Ray down well."""
    family = below(pid)
    for process in [psutil.Process(pid), *family]:
        kill(process)


@contextlib.contextmanager
def meanwhile(act, *arguments):
    """Calls `act` in a thread beside the block, which ends when both have."""
    thread = threading.Thread(target=act, args=arguments, daemon=True)
    thread.start()
    yield
    thread.join()


@contextlib.contextmanager
def watching(look, every_s=0.1):
    """Calls `look` now and as long as the block runs; gives a list of what it returned."""
    seen, ended = [look()], threading.Event()

    def watch():
        while not ended.wait(every_s):
            seen.append(look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def memory(pid=None):
    """Proportional memory (PSS) of a process (this one) and all below it, in bytes; 0 once it is gone."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *below(pid)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total
