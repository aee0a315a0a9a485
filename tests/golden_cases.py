"""Training and sweeps in this process; and where the golden files lie."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from vaemo.cluster import ablate, encoders, train, tune, tune_trial
from vaemo.model.streams import Streams
from vaemo.training.group import Group
from vaemo.tuning.sweep import read_state

GOLDEN = Path(__file__).parent / "golden" / "v0.1.0"
"""What version 0.1.0 wrote: see `golden/make.py`."""


class Killed(BaseException):
    """Stands for a SIGKILL, which no `except Exception` sees."""


class _Here:
    """What jobs take of Ray, for one process."""

    def __init__(self, report):
        self.train = SimpleNamespace(
            torch=SimpleNamespace(get_device=lambda: torch.device("cpu")), report=report or (lambda metrics: None)
        )

    @staticmethod
    def put(value):
        return value

    get = put


def in_this_process(patch, report=None):
    """Let jobs work without Ray: `patch` is a MonkeyPatch, `report` is called after every epoch of a training."""
    for module in (train, tune, tune_trial, ablate):
        patch.setattr(module, "ray", _Here(report))
    for module in (train, tune):
        patch.setattr(module, "connect", lambda: None)
        patch.setattr(module, "check_visible", lambda paths: None)
    for module in (encoders, train, tune):
        patch.setattr(module, "total", lambda kind: float(kind == "CPU"))
    patch.setattr(train, "_fit", lambda job: train._train(job))
    patch.setattr(train, "Console", lambda: nullcontext(SimpleNamespace(lines=None)))
    patch.setattr(train, "tell", lambda lines, text: None)
    patch.setattr(tune_trial, "SAVED_EVERY_S", 0.0)
    patch.setattr(tune, "_run", lambda *given: _run_trials(report, *given))


def _run_trials(report, job, recorder, scheduler, sweep, points, left, slots):
    """The trials one after the other, each to its end."""
    for number in left:
        point = sweep.unfinished.get(number)
        if point is None:
            point = points.point(number)
            sweep.begin(number, point)
        state = read_state(sweep.folder(number))
        for metrics, _ in tune_trial._epochs(number, point, state, job, Group(), "cpu"):
            if report:
                report({"trial": number, **metrics})
        given = {"number": number, "point": point}
        recorder.on_trial_complete(0, [], SimpleNamespace(last_result=metrics, config=given, trial_id=str(number)))


def waves(dims, hz):
    """Features of two lanes that are neither random nor constant."""
    return Streams(**{name: torch.sin(hz * torch.arange(2 * dim).reshape(2, dim)) for name, dim in dims.items()})
