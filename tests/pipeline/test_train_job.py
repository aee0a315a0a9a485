"""jobs/train.py as a user calls it: one clear line and the right exit code for a mistake, before Ray is started."""

import pytest
from commands import run_job, run_job_here

from vaemo.parts.shards import claim_folder
from vaemo.testing import linear_world, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    world = linear_world(5, sessions=(6, 2, 2), lengths=(4, 8), features=3)
    return write_store(world, str(tmp_path_factory.mktemp("store")))


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--set", "train.learning_rate=1"], 2, "unknown config key 'train.learning_rate'"),
        (["--workers", "5"], 2, "train.lanes is 16, which 5 workers cannot share evenly"),
        (["--set", "train.encoder=all"], 2, "train.encoder is 'all', and a feature store holds pooled features"),
        (["--manifest", "m.jsonl"], 2, "--manifest is there to train the encoder; set train.encoder to last_k or all"),
        (["--folds", "by=day"], 2, "--folds by=day: give by=fold, by=speaker, or k=N"),
        (["--folds", "by=fold"], 1, "the column 'fold' has 0 values"),
        (["--set", "labels.range=[0.4, 0.6]"], 1, "outside [0.4, 0.6], which is labels.range"),
        (["--set", "features.speaker_aggregation=enrolled"], 2, "does not record what its features are"),
        (["--speakers", "voices.parquet"], 2, "speaker_aggregation is utterance; enrolments need enrolled"),
        (["--set", "features.speaker_aggregation=running_mean"], 2, "does not record what its features are"),
    ],
)
def test_mistakes_are_one_line(store, tmp_path, args, code, says):
    ended = run_job_here("train", "--store", store, "--out", tmp_path / "run", *args)
    assert ended.returncode == code
    (line,) = ended.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "run").exists()


def test_no_store(tmp_path):
    ended = run_job("train", "--store", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert ended.returncode == 1
    assert "does not exist; a feature store is a folder of part-*.parquet" in ended.stderr


def test_a_folder_of_another_run_is_left_alone(store, tmp_path):
    claim_folder(str(tmp_path), "_run.json", "another", {"settings": {"train": {"lr": 7.0}}})
    held = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ended = run_job_here("train", "--store", store, "--out", tmp_path)
    assert ended.returncode == 1
    assert "holds a run with other settings" in ended.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == held
