"""Processes that a test started, found by descent: nobody else's are ever counted or killed."""

import contextlib
import os

import psutil


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


def memory(pid):
    """Proportional memory (PSS) of a process and all below it, in bytes."""
    total = 0
    for process in [psutil.Process(pid), *below(pid)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total
