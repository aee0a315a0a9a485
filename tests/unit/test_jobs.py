"""Trainings as jobs in this process: what they leave, what is done again, what a failure leaves behind."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_trainings import SMALL, write_small_store

from vaemo import scores
from vaemo.config import Config
from vaemo.errors import DivergedError, StorageError, TrainingFailedError, UsageError
from vaemo.model.checkpoint import load_checkpoint
from vaemo.pipeline import training
from vaemo.pipeline.ablation import ablate
from vaemo.pipeline.executors import InProcess
from vaemo.pipeline.training import headline, train
from vaemo.training.jobs import Failure, Job, Jobs, run_here


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_small_store(tmp_path_factory.mktemp("store"))


def config(*overrides):
    return Config.load("default", [*SMALL, "train.epochs=2", *overrides])


def assert_same_weights(one, other):
    one, other = (load_checkpoint(path).model.state_dict() for path in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def ensemble(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "run"
    return out, train(store, str(out), config("train.seed=3"), InProcess(), seeds=2)


@pytest.mark.long
def test_seeds_are_trainings_of_their_own(ensemble, store, tmp_path):
    out, trained = ensemble
    assert trained.checkpoints == (f"{out}/seed-0/best", f"{out}/seed-1/best")
    alone = train(store, str(tmp_path / "alone"), config("train.seed=4"), InProcess())
    assert_same_weights(alone.checkpoints[0], out / "seed-1" / "best")
    assert load_checkpoint(out / "best").fingerprint == load_checkpoint(out / "seed-0" / "best").fingerprint
    values = [each["dev_ccc_avg"] for each in trained.summary["seeds"]]
    assert values[1] == alone.summary["dev_ccc_avg"]
    assert trained.summary["dev_ccc_avg"] == pytest.approx(np.mean(values))
    assert trained.summary["dev_ccc_avg_sd"] == pytest.approx(np.std(values, ddof=1))
    assert "over 2 seeds" in headline(trained.summary)


def test_what_is_finished_is_not_trained_again(ensemble, store):
    out, trained = ensemble
    (out / "summary.json").unlink()
    (out / "seed-1" / "summary.json").unlink()
    before = (out / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    assert train(store, str(out), config("train.seed=3"), InProcess(), seeds=2) == trained
    assert (out / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.long
def test_held_out_rows_are_scored_by_the_seeds_of_their_fold(store, tmp_path):
    once = ["train.epochs=1"]
    both = tmp_path / "both"
    trained = train(store, str(both), config(*once), InProcess(), folds="k=2", seeds=2)
    alone = []
    for seed in range(2):
        out = tmp_path / f"seed{seed}"
        other = train(store, str(out), config(*once, f"train.seed={seed}"), InProcess(), folds="k=2")
        alone.append(scores.read_utterances(other.held_out)["valence"].to_numpy())
        for fold in ("fold-0", "fold-1"):
            assert_same_weights(out / fold / "best", both / fold / f"seed-{seed}" / "best")
    found = scores.read_utterances(trained.held_out)
    np.testing.assert_allclose(found["valence"].to_numpy(), np.mean(alone, axis=0), atol=1e-6)
    np.testing.assert_allclose(found["valence_sd"].to_numpy(), np.std(alone, axis=0, ddof=1), atol=1e-6)
    assert_same_weights(both / "fold-1" / "best", both / "fold-1" / "seed-0" / "best")


class Broken(training.Fitting):
    """Fails in one fold."""

    def __call__(self, job, sessions, place):
        if job.part == "0":
            raise ZeroDivisionError("a bug")
        yield from super().__call__(job, sessions, place)


@pytest.mark.long
def test_one_that_fails_leaves_its_traceback_and_the_others_are_finished(store, tmp_path, monkeypatch):
    out, once = tmp_path / "run", config("train.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(training, "Fitting", Broken)
        with pytest.raises(TrainingFailedError, match=r"fold 0 failed: ZeroDivisionError: a bug\. The traceback is in"):
            train(store, str(out), once, InProcess(), folds="k=2")
    assert "raise ZeroDivisionError" in (out / "fold-0" / "failure.txt").read_text()
    before = (out / "fold-1" / "summary.json").stat().st_mtime_ns
    train(store, str(out), once, InProcess(), folds="k=2")
    assert not (out / "fold-0" / "failure.txt").exists()
    assert (out / "fold-1" / "summary.json").stat().st_mtime_ns == before


def test_a_mistake_of_the_users_is_raised_as_it_is(store, tmp_path):
    with pytest.raises(DivergedError, match="the loss is not a finite number"):
        train(store, str(tmp_path / "run"), config("train.weight_decay=1e300"), InProcess())


def test_a_full_disk_is_no_failure_of_a_job(tmp_path):
    def work(job, sessions, place):
        raise OSError(28, "No space left on device", "somewhere")
        yield

    def ended(*told):
        pytest.fail("it has not ended")

    with pytest.raises(StorageError, match="No space left on device"):
        run_here(Jobs(work, [Job(0, "", str(tmp_path), Config())], lambda part: None, ended, 1, ""))
    assert not list(tmp_path.iterdir())


def test_a_failure_is_told_in_one_line_and_keeps_its_traceback():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failure = Failure.of(error)
    assert failure.text == "ValueError: two lines"
    assert 'raise ValueError("two' in failure.trace


def test_a_grid_in_this_process(store, tmp_path):
    rows = ablate(store, str(tmp_path), config("evaluate.bootstrap=50"), InProcess(), seeds=1, only=["ridge"])
    assert [(row["variant"], row["n_seeds"]) for row in rows] == [("full", 1), ("ridge", 1)]


def test_several_workers_need_ray(store, tmp_path):
    with pytest.raises(UsageError, match="2 workers train together on Ray"):
        train(store, str(tmp_path / "run"), config(), InProcess(), workers=2)


def test_threads_are_as_they_were(store, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(store, str(tmp_path / "run"), config("train.epochs=1"), InProcess())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_no_ray_is_imported():
    code = "import sys, vaemo.pipeline.training, vaemo.pipeline.ablation; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_is_its_own_copy():
    """Ray Tune copies what it is given; a job holds a config of a hundred fields."""
    job = Job(0, "", "out", Config(), point={"train.lr": 1e-3})
    assert copy.deepcopy({"job": job})["job"] is job
