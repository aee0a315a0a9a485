"""A trial: equal optimiser steps whatever the window, the mean over folds and seeds, and going on after a save."""

import itertools

import numpy as np
import pytest
import yaml

from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.testing import linear_world
from vaemo.training.data import SplitSessions
from vaemo.training.trainer import Trainer
from vaemo.tuning.space import read_space
from vaemo.tuning.trial import METRIC, Trial, equal_steps, saved_point, schedule_end, total_steps

SMALL = [
    "model.d_c=4",
    "model.head_hidden=8",
    "updater.d_model=8",
    "train.epochs=4",
    "train.lanes=4",
    "train.min_labelled=16",
]
SAME_RUN = 1e-6
"""The same operations in the same order, in float32."""


def config(*overrides):
    return Config.load("default", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def data():
    world = linear_world(3, sessions=(16, 6, 0), lengths=(8, 30), features=4, noise=1.0)
    sessions = world.sessions("train") + world.sessions("dev")
    halves = [["train" if number % 2 == fold else "dev" for number in range(len(sessions))] for fold in (0, 1)]
    splits = [[session.split for session in sessions], *halves]
    return SplitSessions(PackedSessions.of(sessions), np.array(splits, object))


def only(data, *folds):
    return SplitSessions(data.sessions, data.splits[list(folds)])


def run(trial):
    return list(trial)


@pytest.mark.parametrize(("window", "lanes"), [(3, 16), (10, 1), (10, 4), (40, 2), (40, 16)])
def test_every_trial_makes_the_same_steps(data, window, lanes):
    plain = only(data, 0)
    reference = config("train.epochs=20")
    wanted = Trial(plain, reference, 1).first.total_steps
    assert total_steps(plain, reference) == wanted
    made = equal_steps(config("train.epochs=20", f"train.window={window}", f"train.lanes={lanes}"), plain, wanted)
    trainer = Trial(plain, made, 1).first
    longest = max(len(schedule) for schedule in trainer.schedules)
    assert made.train.epochs != 20
    # A step that holds more than the whole data still has an epoch of one step.
    assert abs(trainer.total_steps - wanted) <= longest / 2


def test_the_reference_itself_is_unchanged(data):
    assert equal_steps(config(), data, total_steps(data, config())) == config()


def test_patience_goes_with_the_epochs(data):
    given = config("train.window=5", "train.epochs=20", "train.patience=10")
    made = equal_steps(given, data, total_steps(data, config("train.epochs=20")))
    assert made.train.epochs < 20
    assert made.train.patience == pytest.approx(10 * made.train.epochs / 20, abs=0.5)


def test_a_trial_of_one_training_is_that_training(data):
    trainer = Trainer(data.split(0, "train"), data.split(0, "dev"), config())
    lines = list(trainer)
    trial = Trial(only(data, 0), config(), 1)
    measured = run(trial)
    assert [metrics[METRIC] for metrics in measured] == pytest.approx([line[METRIC] for line in lines], abs=SAME_RUN)
    assert measured[-1]["curve"] == [(line["step"], pytest.approx(line[METRIC], abs=SAME_RUN)) for line in lines]
    assert [metrics["finished"] for metrics in measured] == [False, False, False, True]
    assert f"{METRIC}_sd" not in measured[-1]


@pytest.mark.long
def test_folds_and_seeds_are_averaged(data):
    trial = Trial(only(data, 1, 2), config(), 2)
    last = run(trial)[-1]
    alone = []
    for fold, seed in itertools.product((1, 2), (0, 1)):
        trainer = Trainer(data.split(fold, "train"), data.split(fold, "dev"), config(f"train.seed={seed}"))
        alone.append([line[METRIC] for line in trainer][-1])
    assert len(set(alone)) == 4
    assert last["runs"] == 4
    assert last[METRIC] == pytest.approx(np.mean(alone), abs=SAME_RUN)
    assert last[f"{METRIC}_sd"] == pytest.approx(np.std(alone, ddof=1), abs=SAME_RUN)


@pytest.mark.parametrize("epochs_before", [1, 3, 4])
def test_a_saved_trial_goes_on_as_if_nothing_had_happened(data, epochs_before):
    undisturbed = run(Trial(only(data, 1, 2), config(), 1))
    first = Trial(only(data, 1, 2), config(), 1)
    list(itertools.islice(first, epochs_before))
    saved = first.save({"model.alpha": 0.5})
    assert saved_point(saved) == {"model.alpha": 0.5}
    second = Trial(only(data, 1, 2), config(), 1)
    second.restore(saved)
    left = run(second)
    assert len(left) == max(4 - epochs_before, 1)
    assert left[-1]["curve"] == [(step, pytest.approx(value, abs=SAME_RUN)) for step, value in undisturbed[-1]["curve"]]
    for key in undisturbed[-1].keys() - {"train_s", "curve"}:
        assert left[-1][key] == pytest.approx(undisturbed[-1][key], abs=SAME_RUN), key
    assert left[-1]["train_s"] >= first.metrics()["train_s"]


@pytest.mark.parametrize(
    ("entries", "feedback", "end"),
    [
        ({"model.alpha": {"uniform": [0.5, 0.9]}}, "observed", 0),
        ({"model.alpha": {"uniform": [0.5, 0.9]}}, "scheduled", 80),
        ({"train.sampling_end_fraction": {"uniform": [0.1, 0.4]}}, "scheduled", 90),
        ({"model.feedback": {"choice": ["none", "scheduled"]}}, "none", 80),
        (
            {
                "model.feedback": {"choice": ["none", "scheduled"]},
                "train.sampling_end_fraction": {"uniform": [0.05, 0.4], "when": {"model.feedback": "scheduled"}},
            },
            "none",
            95,
        ),
    ],
)
def test_when_the_last_run_of_a_space_is_free_of_labels(tmp_path, entries, feedback, end):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    assert schedule_end(read_space(path, config(f"model.feedback={feedback}")), 100) == end
