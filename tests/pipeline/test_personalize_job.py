"""`personalize`, `score --personal` and `evaluate --exclude` as one path: what a speaker's ten labels are worth."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run_job, run_job_here
from scoring_cases import run
from speaker_world import biased_world

from vaemo.config import Config
from vaemo.model.checkpoint import save_checkpoint
from vaemo.training.trainer import Trainer

SPEAKERS, UTTERANCES, FIRST = 20, 60, 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of speakers with a bias of their own, and a model that has learned the world from others."""
    folder = tmp_path_factory.mktemp("speakers")
    sessions = biased_world(SPEAKERS, seed=5, utterances=UTTERANCES)
    labels = np.concatenate([session.labels for session in sessions])
    rows = {
        "session_id": [session.session_id for session in sessions for _ in session.utt_ids],
        "utt_id": [utt_id for session in sessions for utt_id in session.utt_ids],
        "speaker_id": [speaker for session in sessions for speaker in session.speaker_ids],
        "valence": labels[:, 0],
        "arousal": labels[:, 1],
        **{name: list(np.concatenate([s.streams[name] for s in sessions])) for name in ("speech", "speaker")},
    }
    (folder / "store").mkdir()
    pq.write_table(pa.table(rows), folder / "store" / "part-0.parquet")
    config = Config.load("default").replace(
        {
            "model": {"updater": "mamba2", "d_c": 16, "film_hidden": 32, "head_hidden": 32},
            "updater": {"d_model": 32, "headdim": 16},
            "train": {"epochs": 25, "lr": 3e-3},
        }
    )
    trainer = Trainer(biased_world(32, seed=0, utterances=40), biased_world(4, seed=1, utterances=40), config)
    list(trainer)
    save_checkpoint(folder / "best", trainer.kept, config)
    return folder


def test_ten_labels_help_their_speaker_on_the_rest(world, tmp_path, monkeypatch):
    deltas = tmp_path / "deltas"
    ended = run_job("personalize", "--store", world / "store", "--checkpoint", world / "best", "--out", deltas)
    assert ended.returncode == 0, ended.stderr
    kept = pq.read_table(deltas / "speakers.parquet")["kept"].to_pylist()
    assert f"{sum(kept)} of {SPEAKERS} speakers changed; see {deltas}/speakers.parquet" in ended.stdout
    assert any(kept)

    found = {}
    for name, options in (("plain", {}), ("personal", {"personal": str(deltas)})):
        run(world / "store", str(world / "best"), tmp_path / name, **options)
        arguments = ["--scores", tmp_path / name, "--labels", world / "store", "--out", tmp_path / f"{name}-numbers"]
        arguments += ["--exclude", deltas / "used.parquet", "--set", "evaluate.bootstrap=50"]
        ended = run_job_here("evaluate", *arguments)
        assert ended.returncode == 0, ended.stderr
        found[name] = json.loads((tmp_path / f"{name}-numbers" / "metrics.json").read_text())["pooled"]
        assert found[name]["n"] == SPEAKERS * (UTTERANCES - FIRST)
    assert found["personal"]["ccc_avg"] > found["plain"]["ccc_avg"]


def test_a_folder_that_holds_something_else_is_left_alone(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    ended = run_job_here("personalize", "--store", world / "store", "--checkpoint", world / "best", "--out", tmp_path)
    assert ended.returncode == 1
    assert "is not an output folder of this job" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]
