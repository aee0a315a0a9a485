"""Jobs as a user calls them, to the end: in a process of their own, or in this one, which has loaded all they need."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from unittest import mock

from processes import ROOT, start_job


def run_job(name, *arguments):
    """`jobs/NAME.py` in a process of its own; gives `returncode`, `stdout` and `stderr`."""
    job = start_job(name, *arguments)
    said, complained = job.communicate(timeout=200)
    return subprocess.CompletedProcess(job.args, job.returncode, said, complained)


def run_job_here(name, *arguments, cwd=None, **environment):
    """What `run_job` gives, without the seconds in which a new process loads PyTorch and Ray."""
    command = [str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
        contextlib.chdir(cwd or os.getcwd()),
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, environment),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(command, code, said.getvalue(), complained.getvalue())
