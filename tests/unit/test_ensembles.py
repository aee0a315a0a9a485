"""A run folder where a checkpoint is asked for: all its seeds, its one model, or a refusal."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from commands import run_job_here
from small_trainings import SMALL, write_small_store

import vaemo
from vaemo import scores
from vaemo.config import Config
from vaemo.errors import ReadCheckpointError, UsageError
from vaemo.model.checkpoint import checkpoints_in, one_checkpoint
from vaemo.pipeline.executors import InProcess
from vaemo.pipeline.training import train
from vaemo.store import FeatureStore

pytestmark = pytest.mark.long

CONFIG = Config.load("default", [*SMALL, "train.epochs=1"])
CLOSE = 1e-6
"""Means of float32 predictions, in another order."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_small_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "run"
    train(store, str(out), CONFIG, InProcess(), seeds=3)
    return out


def score(store, checkpoint, out):
    vaemo.score(input=store, checkpoint=checkpoint, out=out, executor="process")
    return scores.read_utterances(str(out))


def test_what_a_path_names(run, store, tmp_path):
    seeds = [f"{run}/seed-{seed}/best" for seed in range(3)]
    assert checkpoints_in(run) == seeds
    assert checkpoints_in(run / "seed-1") == checkpoints_in(seeds[1]) == [seeds[1]]
    assert one_checkpoint(run / "best") == f"{run}/best"
    assert checkpoints_in(tmp_path / "nowhere") == [f"{tmp_path}/nowhere"]
    folded = train(store, str(tmp_path / "folded"), CONFIG, InProcess(), folds="k=2", seeds=2)
    assert checkpoints_in(tmp_path / "folded" / "fold-1") == list(folded.checkpoints[2:])
    with pytest.raises(ReadCheckpointError, match=r"run with folds.*folded/oof; .* give the models: .*fold-0/seed-0/b"):
        checkpoints_in(tmp_path / "folded")


def test_what_is_in_no_fold_is_not_among_the_held_out(tmp_path, capsys):
    store, n_open = write_small_store(tmp_path / "store"), 0
    for path in sorted(Path(store).glob("*.parquet")):
        table = pq.read_table(path)
        number = pc.cast(pc.utf8_slice_codeunits(table["session_id"], 1), pa.int32())
        odd = pc.equal(pc.bit_wise_and(number, 1), 1)
        fold = pc.if_else(pc.less(number, 3), None, pc.if_else(odd, "a", "b"))
        pq.write_table(table.set_column(table.column_names.index("fold"), "fold", fold), path)
        n_open += fold.null_count
    trained = train(store, str(tmp_path / "run"), CONFIG, InProcess(), folds="by=fold")
    held_out = scores.read_utterances(trained.held_out)
    assert held_out["valence"].null_count == 0
    assert len(held_out) == FeatureStore.open(store).read(["fold"])["fold"].is_valid().to_numpy().sum()
    assert f"note: {n_open} utterances are in no fold" in capsys.readouterr().out


def test_a_model_that_is_given_twice_is_refused(run, store, tmp_path):
    twice = [f"{run}/seed-0/best", run]
    with pytest.raises(UsageError, match=r"seed-0/best and .*seed-0/best are the same model; give each model once"):
        vaemo.score(input=store, checkpoint=twice, out=tmp_path / "scores", executor="process")


def test_a_run_is_scored_by_all_its_seeds(run, store, tmp_path):
    whole = score(store, str(run), tmp_path / "whole")
    each = [score(store, f"{run}/seed-{seed}/best", tmp_path / str(seed)) for seed in range(3)]
    for name in ("valence", "arousal"):
        found = np.stack([table[name].to_numpy() for table in each])
        np.testing.assert_allclose(whole[name].to_numpy(), found.mean(axis=0), atol=CLOSE)
        np.testing.assert_allclose(whole[f"{name}_sd"].to_numpy(), found.std(axis=0, ddof=1), atol=CLOSE)


def test_a_run_is_evaluated_by_the_mean_of_its_seeds(run, store, tmp_path):
    scored = tmp_path / "scores"
    score(store, str(run), scored)
    evaluate = {"scores": scored, "labels": store, "config": CONFIG, "split": "dev"}
    found = vaemo.evaluate(**evaluate, out=tmp_path / "all", checkpoint=run)
    # Running free it is what was scored.
    assert found["label_fed"]["ccc_avg"]["second"] == pytest.approx(found["pooled"]["ccc_avg"], abs=1e-5)
    one = vaemo.evaluate(**evaluate, out=tmp_path / "one", checkpoint=run / "best")
    assert one["label_fed"]["ccc_avg"]["second"] != pytest.approx(found["pooled"]["ccc_avg"], abs=1e-5)


def test_a_run_whose_seeds_are_not_all_trained_is_refused(run, tmp_path):
    (tmp_path / "seed-0" / "best").mkdir(parents=True)
    with pytest.raises(ReadCheckpointError, match="a run whose seeds are not all trained; run its training again"):
        checkpoints_in(tmp_path)


def test_personalize_takes_one(run, store, tmp_path):
    ended = run_job_here("personalize", "--store", store, "--checkpoint", run, "--out", tmp_path / "personal")
    assert ended.returncode == UsageError.exit_code
    (line,) = ended.stderr.splitlines()
    assert f"'{run}' holds 3 models, one for each seed" in line
    assert f"give {run}/seed-0/best" in line
