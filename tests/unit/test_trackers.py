"""Trackers get every epoch's numbers through their own clients."""

import sys
import types
from importlib.util import find_spec

import pytest

from vaemo.errors import StorageError, UsageError
from vaemo.training.trackers import Trackers

LINE = {"epoch": 3, "train_loss": 0.5, "feedback_gain_valence": None}


tensorboard = pytest.mark.skipif(not find_spec("tensorboard"), reason="the extra trackers is not installed")


@tensorboard
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_tensorboard_writes_what_it_is_told_whole_after_every_epoch(tmp_path, scheme):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], f"{scheme}{tmp_path}", "run", {})
    trackers.log(LINE)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(3, 0.5)]
    assert "feedback_gain_valence" not in events.Tags()["scalars"]
    trackers.log(LINE | {"epoch": 4})
    trackers.close()
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [3, 4]


@tensorboard
def test_a_disk_without_room_for_tensorboard_says_so(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(writer):
        raise OSError(28, "No space left on device")

    trackers = Trackers(["tensorboard"], str(tmp_path), "run", {})
    monkeypatch.setattr(SummaryWriter, "flush", full)
    with pytest.raises(StorageError, match=r"storage failed at .*/tensorboard: .*No space left on device"):
        trackers.log(LINE)


def test_mlflow_and_wandb(monkeypatch, tmp_path):
    calls = []

    def note(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    mlflow = types.ModuleType("mlflow")
    for name in ("start_run", "log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, note(name))
    run = types.SimpleNamespace(log=note("wandb.log"), finish=note("finish"))
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: calls.append(("init", (), kwargs)) or run
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers(["mlflow", "wandb"], str(tmp_path), "run-1", {"train": {"lr": 0.1}})
    trackers.log(LINE)
    trackers.close()
    numbers = {"epoch": 3, "train_loss": 0.5}
    assert ("log_params", ({"train.lr": 0.1},), {}) in calls
    assert ("log_metrics", (numbers,), {"step": 3}) in calls
    assert ("wandb.log", (numbers,), {"step": 3}) in calls
    assert ("init", (), {"name": "run-1", "id": "run-1", "resume": "allow", "config": {"train": {"lr": 0.1}}}) in calls
    assert [name for name, _, _ in calls][-2:] == ["end_run", "finish"]


def test_unknown_tracker(tmp_path):
    with pytest.raises(UsageError, match="names 'neptune'; allowed are tensorboard, mlflow, wandb"):
        Trackers(["neptune"], str(tmp_path), "run", {})


def test_tracker_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"'mlflow', which is not installed.*train.trackers=\[\]"):
        Trackers(["mlflow"], str(tmp_path), "run", {})
