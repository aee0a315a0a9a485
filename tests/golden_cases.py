"""Training and sweeps in this process; and where the golden files lie."""

import dataclasses
from pathlib import Path

import torch

from vaemo.cluster import tune
from vaemo.cluster.executor import OnRay
from vaemo.model.streams import Streams
from vaemo.training.jobs import run_here
from vaemo.tuning import trial

GOLDEN = Path(__file__).parent / "golden" / "v0.1.0"
"""What version 0.1.0 wrote: see `golden/make.py`."""


class Killed(BaseException):
    """Stands for a SIGKILL, which no `except Exception` sees."""


def in_this_process(patch, report=None):
    """Let jobs work without Ray: `patch` is a MonkeyPatch, `report` is called after every epoch of a training."""

    def run(*given, **_):
        *_, jobs = given
        heard = (lambda job, line: report({"trial": job.number, **line})) if report else jobs.heard
        run_here(dataclasses.replace(jobs, heard=heard))

    patch.setattr(OnRay, "train", run)
    patch.setattr(tune, "run_jobs", run)
    patch.setattr(trial, "SAVED_EVERY_S", 0.0)


def waves(dims, hz):
    """Features of two lanes that are neither random nor constant."""
    return Streams(**{name: torch.sin(hz * torch.arange(2 * dim).reshape(2, dim)) for name, dim in dims.items()})
