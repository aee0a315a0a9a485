"""Training on a local Ray: workers equal one, whatever dies, and folds hold out every row."""

import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch
from finetune_cases import Heard
from processes import kill, kill_job, meanwhile, start_job, workers
from training_cases import train

import vaemo
from vaemo import files, scores
from vaemo.ablation.baselines import rivals
from vaemo.config import Config
from vaemo.data.sessions import read_sessions
from vaemo.errors import ClusterError, LabelError, NonFiniteFeatureError, OtherRunError, UsageError
from vaemo.evaluation.evaluate import evaluate
from vaemo.features.speech import SpeechEncoder
from vaemo.metrics import Moments, ccc
from vaemo.model.checkpoint import load_checkpoint
from vaemo.pipeline.training import headline
from vaemo.store import FeatureStore
from vaemo.stream import Stream
from vaemo.testing import linear_world, write_store
from vaemo.training.data import TrainingData
from vaemo.training.waveforms import Waveforms

pytestmark = pytest.mark.ray

SAME_RUN = 1e-6
"""A run that was killed and went on, against one that was not: the same operations on the same machine."""
OTHER_WORLD_SIZE = 1e-4
"""float32 sums in another order, over 3 epochs."""

OVERRIDES = [
    "model.scan=chunk",  # a second less in each process than loading the compiled one
    "model.d_c=8",
    "model.head_hidden=16",
    "model.feedback=scheduled",
    "updater.d_model=16",
    "train.weight_averaging=0.9",
    "train.min_labelled=32",
    "train.epochs=6",
    "train.lr=3e-3",
]


def make_store(path):
    return write_store(linear_world(5, sessions=(120, 12, 6), lengths=(20, 60), features=8, noise=2.0), str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def config(*overrides):
    return Config.load("seed", [*OVERRIDES, *overrides])


def lines(out):
    path = files.join(out, "metrics.jsonl")
    return [json.loads(line) for line in files.read_bytes(path).splitlines()] if files.exists(path) else []


def assert_same_lines(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"utterances_per_s"}:
            assert one[key] == pytest.approx(other[key], abs=tolerance), (one["epoch"], key)


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """A run that nothing happened to."""
    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    out = str(tmp_path_factory.mktemp("undisturbed") / "run")
    train(store, out, config())
    return out


def expected_rivals(store):
    sessions = TrainingData.open(store, config()).pack()
    return rivals(sessions.split(0, "train"), sessions.split(0, "dev"), ["speech"])


@pytest.mark.slow
def test_what_is_to_be_beaten_is_said_once_and_kept_whatever_the_workers(store, local_ray, tmp_path, capfd):
    train(store, str(tmp_path / "run"), config("train.epochs=1"), workers=2)
    found = load_checkpoint(tmp_path / "run" / "best").metrics["rivals"]
    assert found == expected_rivals(store)
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "to beat" in line]
    for title, name in (("ridge on the features", "ridge"), ("on them and their causal EMA", "ridge_ema")):
        assert f"{title} {found[name]['dev_ccc_avg']:.3f} (valence {found[name]['dev_ccc_valence']:.3f}" in said
    assert "rivals" not in lines(tmp_path / "run")[0]


def test_run_folder(undisturbed, store):
    checkpoint = load_checkpoint(Path(undisturbed, "best"))
    summary = json.loads(Path(undisturbed, "summary.json").read_text())
    kept = lines(undisturbed)[summary["kept_epoch"] - 1]
    assert checkpoint.metrics.pop("rivals") == expected_rivals(store)
    assert checkpoint.metrics.pop("error_by_position")["from"][0] == 1
    assert checkpoint.metrics == kept
    assert checkpoint.features is None
    assert checkpoint.config.train == config().train
    assert checkpoint.provenance["sequence_by"] == "session"
    assert checkpoint.provenance["synthetic"] is False
    assert [line["epoch"] for line in lines(undisturbed)] == list(range(1, 7))
    assert Path(undisturbed, "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(Path(undisturbed, "tensorboard").iterdir())
    assert kept["dev_ccc_avg"] > 0.5
    rows = FeatureStore.open(store).read(["utt_id", "split"])
    used = rows.filter(pc.is_in(rows["split"], pa.array(["train", "dev"])))["utt_id"].to_pylist()
    assert 0 < len(used) < rows.num_rows
    assert files.read_parquet(Path(undisturbed, "used.parquet"))["utt_id"].to_pylist() == used


@pytest.mark.parametrize(("peak", "said"), [(0.311, ""), (0.591, " (it was 0.591 at epoch 3: ")])
def test_an_earlier_epoch_that_was_clearly_better_is_named(peak, said):
    summary = {"dev_ccc_avg": 0.311, "kept_epoch": 9, "epochs": 9, "peak_dev_ccc_avg": peak, "peak_epoch": 3}
    line = headline(summary)
    assert line.startswith("dev CCC-avg 0.311 at epoch 9 of 9" + said)
    assert line.endswith(")") == bool(said)


def test_finished_run_is_left_alone(undisturbed, store, capsys):
    before = Path(undisturbed, "metrics.jsonl").stat().st_mtime_ns
    summary = train(store, undisturbed, config("train.keep_checkpoints=5"), workers=2)
    assert summary == json.loads(Path(undisturbed, "summary.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert Path(undisturbed, "metrics.jsonl").stat().st_mtime_ns == before


def test_other_settings_are_refused(undisturbed, store):
    with pytest.raises(OtherRunError, match=r"train.lr was 0.003, is now 0.002"):
        train(store, undisturbed, config("train.lr=2e-3"))


def test_two_workers_equal_one(undisturbed, store, local_ray, tmp_path):
    out = str(tmp_path / "run")
    train(store, out, config("train.epochs=6"), workers=2)
    assert_same_lines(lines(out)[:3], lines(undisturbed)[:3], OTHER_WORLD_SIZE)


def kill_a_worker(out, after, delay_s):
    """SIGKILL one training worker of this process's Ray, `delay_s` into the epoch that follows `after` lines."""
    deadline = time.monotonic() + 120
    while len(lines(out)) < after and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay_s)
    found = []
    while not found and time.monotonic() < deadline:
        found = workers("RayTrainWorker") or workers("ImplicitFunc")
    # The newest: workers of the run before may still be on their way out.
    kill(found[-1])


def survive_worker_kill(undisturbed, store, out, workers, after, delay_s):
    with meanwhile(kill_a_worker, out, after, delay_s):
        train(store, out, config(), workers=workers)
    assert_same_lines(lines(out), lines(undisturbed), SAME_RUN if workers == 1 else OTHER_WORLD_SIZE)


def test_worker_killed_within_an_epoch(undisturbed, store, local_ray, tmp_path, capsys):
    survive_worker_kill(undisturbed, store, str(tmp_path / "run"), workers=1, after=2, delay_s=0.1)
    assert "going on after epoch " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_workers_killed_anywhere(undisturbed, store, local_ray, tmp_path, seed):
    chance = random.Random(seed)
    survive_worker_kill(
        undisturbed, store, str(tmp_path / "run"), chance.choice([1, 2]), chance.randrange(0, 5), chance.uniform(0, 1)
    )


def start_training(store, out, *more, **environment):
    arguments = ["--config", "seed", "--store", store, "--out", out, *more]
    return start_job("train", *arguments, overrides=OVERRIDES, **environment)


def survive_driver_kill(undisturbed, store, out, after, delay_s, *more, **environment):
    job = start_training(store, out, *more, **environment)
    kill_job(job, due=lambda: len(lines(out)) >= after, delay_s=delay_s)
    assert len(lines(out)) < len(lines(undisturbed)), "the run ended before it could be killed"

    again = start_training(store, out, *more, **environment)
    said, complained = again.communicate(timeout=240)
    assert again.returncode == 0, complained
    assert_same_lines(lines(out), lines(undisturbed), SAME_RUN)
    assert "done: dev CCC-avg" in said
    return said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_drivers_killed_anywhere(undisturbed, store, tmp_path, seed):
    chance = random.Random(seed)
    survive_driver_kill(undisturbed, store, str(tmp_path / "run"), chance.randrange(0, 4), chance.uniform(0, 0.5))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_driver_killed_while_the_encoder_is_trained(tmp_path):
    corpus = Heard(tmp_path / "heard", sessions=(24, 6))
    trained = ["train.encoder=all", "train.encoder_lr=1e-3", "train.encoder_from_epoch=1", "train.window=3"]
    more = ["--manifest", corpus.manifest, *(part for override in trained for part in ("--set", override))]
    whole = str(tmp_path / "whole")
    job = start_training(corpus.store.path, whole, *more)
    _, complained = job.communicate(timeout=400)
    assert job.returncode == 0, complained
    survive_driver_kill(whole, corpus.store.path, str(tmp_path / "run"), 3, 0.2, *more)
    found, expected = (SpeechEncoder(load_checkpoint(f"{out}/best").features) for out in (tmp_path / "run", whole))
    samples = Waveforms.of_store(corpus.store, corpus.manifest, corpus.config()).read(["s0-0", "s1-0"])
    np.testing.assert_allclose(found(samples), expected(samples), atol=SAME_RUN)


def test_folds(store, local_ray, tmp_path, capfd):
    out = str(tmp_path / "run")
    summary = train(store, out, config("train.epochs=2"), folds="k=2")
    table = scores.read_utterances(str(Path(out, "oof")))
    rows = FeatureStore.open(store).read(["utt_id", "valence", "arousal"])
    assert table["utt_id"].to_pylist() == rows["utt_id"].to_pylist()
    assert set(table["fold"].to_pylist()) == {"0", "1"}
    assert set(table["split"].to_pylist()) == {"test"}
    predictions = np.column_stack([table[name].to_numpy() for name in ("valence", "arousal")])
    labels = np.column_stack([rows[name].to_numpy() for name in ("valence", "arousal")])
    assert summary["pooled"]["ccc_avg"] == pytest.approx(ccc(predictions, labels).mean(), abs=1e-6)
    fold = np.array(table["fold"].to_pylist())
    means = [ccc(predictions[fold == name], labels[fold == name]).mean() for name in ("0", "1")]
    assert summary["fold_mean"]["ccc_avg"] == pytest.approx(np.mean(means), abs=1e-6)
    session = np.unique(table["session_id"].to_pylist(), return_inverse=True)[1]
    within = Moments.within(predictions, labels, session).ccc()
    assert summary["pooled"]["within_ccc_avg"] == pytest.approx(within.mean(), abs=1e-6)
    weights = np.column_stack([table[name].to_numpy() for name in scores.WEIGHT_SCHEMA.names])
    position = table["position"].to_numpy()
    for name in ("0", "1"):
        errors = load_checkpoint(Path(out, f"fold-{name}", "best")).errors
        np.testing.assert_allclose(weights[fold == name], errors.weights(position[fold == name]), rtol=1e-6)
        trained_on = {s.session_id for s in read_sessions(FeatureStore.open(store), config())}
        held_out = set(np.array(table["session_id"].to_pylist())[fold == name])
        assert 0 < len(held_out) < len(trained_on)
        metrics = load_checkpoint(Path(out, f"fold-{name}", "best")).metrics
        assert metrics["epoch"] == 2
        assert metrics["rivals"]["ridge_ema"]["dev_ccc_avg"] > 0.3
    assert train(store, out, config("train.epochs=2"), folds="k=2") == summary
    said = [line for line in capfd.readouterr().out.splitlines() if "to beat" in line]
    assert sorted(line[:7] for line in said) == ["fold 0,", "fold 1,"]


@pytest.mark.slow
def test_folds_with_an_encoder_each(local_ray, tmp_path):
    corpus = Heard(tmp_path / "heard", sessions=(8, 0), lengths=(4, 5))
    settings = corpus.config(epochs=1, encoder_lr=1e-2)
    train(corpus.store.path, str(tmp_path / "run"), settings, folds="k=2", manifest=corpus.manifest)
    rows = scores.read_utterances(str(tmp_path / "run" / "oof"))
    waveforms = Waveforms.of_store(corpus.store, corpus.manifest, settings)
    for fold in ("0", "1"):
        held_out = rows.filter(pc.equal(rows["fold"], fold))
        session = held_out.filter(pc.equal(held_out["session_id"], held_out["session_id"][0]))
        stream = Stream(tmp_path / "run" / f"fold-{fold}" / "best")
        heard = [stream.push(samples, 16_000) for samples in waveforms.read(session["utt_id"].to_pylist())]
        for name in ("valence", "arousal"):
            found = [getattr(prediction, name) for prediction in heard]
            assert session[name].to_pylist() == pytest.approx(found, abs=1e-5)
        assert load_checkpoint(tmp_path / "run" / f"fold-{fold}" / "best").has_encoder


def test_labels_are_looked_at_before_the_folder_is_claimed(tmp_path):
    world = linear_world(5, sessions=(6, 2, 2), lengths=(4, 8), features=3, unlabelled=1.0)
    store = write_store(world, str(tmp_path / "store"))
    with pytest.raises(LabelError, match="no utterance of the split 'train' has a label for valence"):
        train(store, str(tmp_path / "run"), config())
    assert not Path(tmp_path, "run").exists()


def test_features_that_are_no_numbers_end_the_run(local_ray, tmp_path):
    world = linear_world(5, sessions=(6, 2, 2), lengths=(4, 8), features=3)
    speech = world.table["speech"].combine_chunks().flatten().to_numpy().copy()
    speech[4] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(speech), 3)
    broken = dataclasses.replace(
        world, table=world.table.set_column(world.table.column_names.index("speech"), "speech", column)
    )
    store = write_store(broken, str(tmp_path / "store"))
    with pytest.raises(NonFiniteFeatureError, match="speech of utterance 's0000-0001' holds NaN"):
        train(store, str(tmp_path / "run"), config())


def test_lanes_must_be_shared_evenly(store, tmp_path):
    with pytest.raises(UsageError, match=r"train.lanes is 16, which 3 workers cannot share"):
        train(store, str(tmp_path / "run"), config(), workers=3)


def test_speech_is_not_in_a_store(store, tmp_path):
    with pytest.raises(UsageError, match=r"train.encoder is 'all', and a feature store holds pooled features"):
        train(store, str(tmp_path / "run"), config("train.encoder=all"))


def test_too_few_cpus(store, local_ray, tmp_path):
    with pytest.raises(ClusterError, match="--workers 4 need 4 CPUs; the Ray cluster has 2"):
        train(store, str(tmp_path / "run"), config(), workers=4)


@pytest.mark.slow
def test_driver_killed_and_job_run_again_with_all_in_a_bucket(undisturbed, bucket, local_ray, monkeypatch):
    """The cluster lives on, as after `ray job submit`."""
    store, out = make_store(f"{bucket}/store"), f"{bucket}/run"
    address = ray.get_runtime_context().gcs_address
    said = survive_driver_kill(undisturbed, store, out, after=2, delay_s=0.1, RAY_ADDRESS=address)
    assert "going on after epoch " in said
    best, expected = load_checkpoint(f"{out}/best"), load_checkpoint(Path(undisturbed, "best"))
    assert best.metrics["epoch"] == expected.metrics["epoch"]
    weights = best.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=SAME_RUN, rtol=0)
    assert files.read_bytes(f"{out}/curves.png").startswith(b"\x89PNG")
    assert len(files.list_files(f"{out}/tensorboard")) == 2, "one of each job"

    vaemo.score(input=store, checkpoint=f"{out}/best", out=f"{bucket}/scores", executor="process")
    evaluate(f"{bucket}/scores", store, f"{bucket}/numbers", Config(), split="dev", checkpoint=f"{out}/best")
    found = files.read_json(f"{bucket}/numbers/metrics.json")
    assert found["pooled"]["ccc_avg"] == pytest.approx(best.metrics["dev_ccc_avg"], abs=OTHER_WORLD_SIZE)
    assert "label_fed" in found
