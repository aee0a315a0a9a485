"""States of a run: whole, the last ones kept, and one choice for all workers."""

import os

import pytest

from vaemo import files
from vaemo.config import Config
from vaemo.errors import StorageError
from vaemo.testing import linear_world
from vaemo.training.group import Group
from vaemo.training.run_folder import restore_state, save_state
from vaemo.training.trainer import Trainer

SETTINGS = ["model.d_c=4", "model.head_hidden=4", "updater.d_model=8", "train.epochs=4", "train.min_labelled=8"]


class Second(Group):
    """The other of two workers; the first has found the state after `epoch`."""

    rank, size = 1, 2

    def __init__(self, epoch):
        self.epoch = epoch

    def add(self, tensor):
        return tensor + self.epoch


def make_trainer(group=None):
    world = linear_world(1, sessions=(6, 3, 1), lengths=(3, 9), features=3, noise=1.0)
    return Trainer(world.sessions("train"), world.sessions("dev"), Config.load("seed", SETTINGS), group=group)


@pytest.fixture
def after_three_epochs(tmp_path):
    """A trainer, and its run folder."""
    trainer, out = make_trainer(), str(tmp_path / "run")
    for metrics in trainer:
        save_state(trainer, out, keep=2)
        if metrics["epoch"] == 3:
            return trainer, out


def test_a_state_is_written_where_it_stays_and_nowhere_else(after_three_epochs, monkeypatch):
    trainer, out = after_three_epochs
    before = sorted(os.listdir(f"{out}/_state"))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    save_state(trainer, out, keep=2)
    assert sorted(os.listdir(f"{out}/_state")) == before


def test_the_last_states_are_kept_and_the_newest_is_taken(after_three_epochs):
    trainer, out = after_three_epochs
    assert sorted(os.listdir(f"{out}/_state")) == ["000002.safetensors", "000003.safetensors"]
    resumed = make_trainer()
    assert restore_state(resumed, out)
    assert resumed.history == trainer.history


def test_without_a_state_there_is_nothing_to_go_on_from(tmp_path):
    trainer = make_trainer()
    assert not restore_state(trainer, str(tmp_path))
    assert not trainer.history


def test_a_write_that_was_cut_short_is_no_state(after_three_epochs, monkeypatch):
    trainer, out = after_three_epochs
    next(iter(trainer))

    def killed(*_):
        raise OSError("cut short")

    with monkeypatch.context() as cut:
        cut.setattr(os, "replace", killed)
        with pytest.raises(StorageError, match=r"000004\.safetensors: cut short"):
            save_state(trainer, out, keep=2)
    # What a SIGKILL in that moment leaves behind.
    files.write_whole(f"{out}/_state/.000004.safetensors.f00", b"half")
    resumed = make_trainer()
    assert restore_state(resumed, out)
    assert len(resumed.history) == 3


def test_all_workers_go_on_from_what_the_first_has_found(after_three_epochs):
    _, out = after_three_epochs
    second = make_trainer(Second(epoch=2))
    assert restore_state(second, out)
    assert len(second.history) == 2
    assert not restore_state(make_trainer(Second(epoch=0)), out)
