"""What the tests of scoring share: small checkpoints, stores, recordings, and the job run in this process."""

import os

import numpy as np
import soundfile
import torch

import vaemo
from vaemo import files
from vaemo.audio.sinc import resample
from vaemo.config import Config, FeatureConfig
from vaemo.demo.speech import speak, trim
from vaemo.features import describe, load_extractors
from vaemo.model.checkpoint import save_checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.scores import read_utterances
from vaemo.testing import linear_world

SINGLE = 2e-6
"""Rounding of float32 over a session of 60 steps, on a range of width 1."""

SMALL = {"model": {"d_c": 8, "head_hidden": 16}, "updater": {"d_model": 16}, "score": {"lanes": 4, "chunk": 16}}


def make_world(seed=0, sessions=20, lengths=(1, 40)):
    return linear_world(seed, sessions=(sessions, 0, 0), lengths=lengths, features=6)


def make_checkpoint(path, seed=0, *, config=SMALL, features=None, dims=None, **provenance):
    """An untrained model, which listens to its feedback."""
    torch.manual_seed(seed)
    settings = Config().replace(config)
    model = SessionRegressor.from_config(settings.model, settings.updater, dims or {"speech": 6})
    with torch.no_grad():
        model.updater.input.weight[:, -2:] *= 20
    save_checkpoint(path, model, settings, features=features, provenance=provenance)
    return str(path)


def make_audio_checkpoint(path, seed=0, features=None, config=SMALL, **provenance):
    """A checkpoint for recordings, with the built-in extractors."""
    features = features or FeatureConfig()
    described = describe(load_extractors(features))
    return make_checkpoint(
        path,
        seed,
        config=config,
        features=features,
        dims={stream: facts["dim"] for stream, facts in described.items()},
        feature_fingerprints={stream: facts["fingerprint"] for stream, facts in described.items()},
        **provenance,
    )


def run(source, checkpoint, out, executor="process", **options):
    """The job, in this process unless it is told otherwise; returns the utterances in the order of sessions."""
    config = Config().replace(SMALL).replace({"score": {"shard_sessions": 4}, "extract": {"shard_recordings": 2}})
    sections = {name: options.pop(name) for name in ("score", "sessions", "labels", "extract") if name in options}
    where = {"input": source, "checkpoint": checkpoint.split(","), "out": out, "executor": executor}
    vaemo.score(**where, config=config.replace(sections), **options)
    return rows_of(out)


def rows_of(out):
    return read_utterances(str(out)).sort_by([("session_id", "ascending"), ("position", "ascending")])


def assert_close(rows, others):
    """The same rows, their scores up to rounding."""
    assert rows.drop(["valence", "arousal"]).equals(others.drop(["valence", "arousal"]))
    for name in ("valence", "arousal"):
        assert rows[name].is_null().equals(others[name].is_null())
        if rows.num_rows > rows[name].null_count:
            difference = rows[name].drop_null().to_numpy() - others[name].drop_null().to_numpy()
            assert np.abs(difference).max() < SINGLE


def written(out):
    """When each file was written, but that which every run writes."""
    found = (path for path in files.list_files(str(out), recursive=True) if not path.endswith("/summary.json"))
    return {path: os.stat(path).st_mtime_ns for path in found}


def write_calls(folder, *, seed=0, utterances=4, formats=("wav", "flac", "mp3")):
    """Two-channel telephone calls, caller and agent by turns; returns their names and when who speaks."""
    random = np.random.default_rng(seed)
    words = ["seven", "old", "ships", "sail", "past", "the", "harbour", "wall", "while", "nobody", "is", "looking"]
    names, spoken = [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(formats):
        blocks, at, turns = [], 0.0, []
        for turn in range(utterances):
            voice = ("en-us+f2", "en-us+m3")[turn % 2]
            samples, rate = speak(" ".join(random.choice(words, 6)), voice, rate=int(random.integers(140, 200)))
            samples = trim(samples, rate)
            pause = np.zeros((rate // 2, 2), np.float32)
            block = np.zeros((len(samples), 2), np.float32)
            block[:, turn % 2] = 0.7 * samples
            blocks += [pause, block]
            turns.append((turn % 2, at + 0.5, at + 0.5 + len(samples) / rate))
            at += 0.5 + len(samples) / rate
        call = torch.from_numpy(np.concatenate(blocks).T.copy())
        call = resample(call, rate, 8000).numpy().T
        names.append(f"call{number}.{kind}")
        spoken[names[-1]] = turns
        soundfile.write(folder / names[-1], call, 8000, **({"subtype": "ULAW"} if kind == "wav" else {}))
    return names, spoken
