"""The jobs as functions: in this process without Ray, and on Ray with equal tables; nothing of the caller's changes."""

import importlib
import logging
import os
import pkgutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from scoring_cases import SMALL, make_audio_checkpoint, rows_of

import vaemo
from vaemo.config import Config, FeatureConfig
from vaemo.errors import ConfigValueError, OtherRunError, UsageError
from vaemo.store import FeatureStore
from vaemo.testing import linear_world, write_store

CONFIG = Config().replace({**SMALL, "features": {"prosody": "none"}})


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two recordings of noise in bursts, which count as speech of unknown people."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(2):
        rng = np.random.default_rng(number)
        soundfile.write(folder / f"{number}.wav", rng.normal(scale=0.1, size=16_000), 8000)
    rows = [
        f'{{"utt_id": "u{n}", "session_id": "s{n}", "speaker_id": "p", "audio_path": "{n}.wav", "valence": 0.{n}}}'
        for n in range(2)
    ]
    (folder / "m.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    features = FeatureConfig(prosody="none")
    return make_audio_checkpoint(tmp_path_factory.mktemp("model") / "best", features=features)


NOTEBOOK = """
import logging, os, sys, warnings
import torch  # it sets filters of its own
import vaemo
before = dict(os.environ), logging.getLogger().level, list(warnings.filters)
outcome = vaemo.score(input="m.jsonl", checkpoint=sys.argv[1], out=sys.argv[2], executor="process",
                      config=vaemo.Config().replace({"score": {"lanes": 4, "chunk": 16}}))
assert outcome.utterances == {"ok": 2}, outcome
assert outcome.sessions["all"] == 2
assert (dict(os.environ), logging.getLogger().level, list(warnings.filters)) == before
assert not [name for name in sys.modules if name.split(".")[0] == "ray"]
"""


@pytest.mark.ray
def test_in_this_process_and_on_ray(archive, checkpoint, tmp_path, local_ray):
    """The first as a notebook does it, without Ray; relative paths are taken from where the caller is."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, checkpoint, tmp_path / "here"], cwd=archive, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = ("", "ray", "ray.tune", "vaemo")
    before = dict(os.environ), [logging.getLogger(name).level for name in names], list(warnings.filters)
    threads = torch.get_num_threads()
    config = Config().replace({"score": {"lanes": 4, "chunk": 16}})
    vaemo.score(input=archive / "m.jsonl", checkpoint=[checkpoint], out=tmp_path / "there", config=config)
    assert before == (dict(os.environ), [logging.getLogger(name).level for name in names], list(warnings.filters))
    assert torch.get_num_threads() == threads
    assert rows_of(tmp_path / "here").equals(rows_of(tmp_path / "there"))


def test_from_recordings_to_numbers(archive, checkpoint, tmp_path):
    store, scores = tmp_path / "store", tmp_path / "scores"
    extracted = vaemo.extract(manifest=archive / "m.jsonl", out=store, config=CONFIG, executor="process")
    assert (extracted.out, extracted.utterances, extracted.failed_fraction) == (str(store), {"ok": 2}, 0.0)
    assert extracted.audio_s == pytest.approx(4.0)
    assert FeatureStore.open(str(store)).read().num_rows == 2
    settings = ["score.lanes=4", "score.chunk=16"]
    vaemo.score(input=store, checkpoint=checkpoint, out=scores, set=settings, executor="process")
    found = vaemo.evaluate(scores=scores, labels=store, out=tmp_path / "numbers", set=["evaluate.bootstrap=0"])
    assert found["pooled"]["n"] == 2
    assert (tmp_path / "numbers" / "summary.json").exists()


def test_a_training_in_this_process(tmp_path):
    store = write_store(linear_world(0, sessions=(6, 3, 3), lengths=(10, 20), features=6), str(tmp_path / "store"))
    settings = ["train.epochs=1", "train.lanes=4", "model.d_c=8", "updater.d_model=16"]
    trained = vaemo.train(store=store, out=tmp_path / "run", set=settings, executor="process")
    assert trained.checkpoints == (str(tmp_path / "run" / "best"),)
    again = vaemo.train(store=store, out=tmp_path / "run", set=settings, executor="process")
    assert again.summary == trained.summary
    assert not (tmp_path / "run" / "_lease.json").exists()
    with pytest.raises(OtherRunError, match=r"train.epochs was 1, is now 2"):
        vaemo.train(store=store, out=tmp_path / "run", set=[*settings, "train.epochs=2"], executor="process")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vaemo.extract(out="x"), UsageError, "give one of manifest and input"),
        (lambda: vaemo.extract(out="x", input="a", manifest="b"), UsageError, "give one of manifest and input"),
        (lambda: vaemo.extract(out="x", input="a", executor="dask"), UsageError, "executor is 'dask'; allowed are"),
        (lambda: vaemo.extract(out="x", input="a", changed="maybe"), UsageError, "changed is 'maybe'; allowed are"),
        (lambda: vaemo.extract(out="x", input="a", set=["score.lanes=0"]), ConfigValueError, "score.lanes"),
        (lambda: vaemo.score(input="/none", checkpoint="/none", out="x", executor="process"), vaemo.VaemoError, "none"),
    ],
)
def test_mistakes_are_errors_of_vaemo(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call()
    assert not (tmp_path / "x").exists()


def test_no_module_has_the_name_of_a_public_function():
    """Importing a module puts its name into its package: `vaemo.extract` would be that module from then on."""
    for module in pkgutil.walk_packages(vaemo.__path__, "vaemo."):
        if not module.name.startswith(("vaemo.cluster", "vaemo.presets")):
            importlib.import_module(module.name)
    for name in ("extract", "train", "score", "evaluate"):
        assert callable(getattr(vaemo, name))
