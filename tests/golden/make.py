"""Make the golden files: what a version of vaemo writes, small, for every later version to read and go on with.

Not run by the tests. The files of v0.1.0 were made from commit 7d2b53e, its code first on the path:

    git clone . /tmp/old && git -C /tmp/old checkout 7d2b53e
    PYTHONPATH=/tmp/old:tests python tests/golden/make.py

Everything is done by the version's own functions, in one process (`golden_cases.in_this_process`). What nothing reads
again is left out: pictures, model cards, states of what has ended, the recordings of the corpus. The voices are made of
numbers, a pulse train through gliding formants, so that nothing else is needed to make them again.

    config.yaml         of everything here, as the version prints it; no field is left out
    recordings/         calls to be scored: two channels, one channel
    store/              from a manifest, all three streams, a row that failed, observed values
    run/, run-half/     a finished training; the same killed after two of four epochs
    sweep/, sweep-half/ two trials; the same killed in the second
    scores/, scores-half/, scores-personal/, scores-enrolled/    of the store; half is `--limit 3`
    store-recordings/, scores-recordings/    of the recordings
    personal/           changes of FiLM
    enrolled/           a checkpoint and the file of voices that it was trained with
    encoder/            a checkpoint with a speech encoder of its own, and its scores of the recordings
    ablation/           a grid that has ended
    stream.safetensors, live.safetensors    memories in the middle of call.flac
    state.safetensors   the state of a model
    expected.json       fingerprints of the config, and what the memories went on to predict
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from golden_cases import GOLDEN, Killed, in_this_process, waves
from training_cases import ablate, train

import vaemo
from vaemo.cluster.tune import tune
from vaemo.config import Config
from vaemo.live import LiveSession
from vaemo.model.checkpoint import load_checkpoint
from vaemo.personalize import personalize_store
from vaemo.stream import Stream

RATE = 8000
COMMIT = "7d2b53e"

CALL = ((0, 0.3, 0.5), (0, 1.3, 0.9), (1, 1.32, 0.33), (1, 2.8, 0.6))
"""Turns of call.flac: channel, start_s, seconds. The third has ended, and waits for the second, in live.safetensors."""

SMALL = {
    "features": {"prosody": "gemaps", "opensmile_license": "research"},
    "vad": {"join_gap_s": 0.1},
    "labels": {"range": [1, 7]},
    "model": {"d_c": 4, "film_hidden": 2, "prosody_hidden": 4, "prosody_dim": 4, "head_hidden": 4},
    "updater": {"d_model": 4, "d_state": 4},
    "train": {
        "epochs": 4, "lanes": 4, "window": 4, "lr": 3e-3, "min_labelled": 8, "weight_averaging": 0.9, "trackers": [],
        "keep_checkpoints": 1,
    },
    "extract": {"shard_recordings": 2, "shard_utterances": 25},
    "score": {
        "lanes": 4, "chunk": 8, "shard_sessions": 12, "channel_roles": ["customer", "agent"],
        "max_failed_fraction": 0.2,
    },
    "personalize": {"utterances": 6, "optim_steps": 20},
}  # fmt: skip

VOWELS = np.array([(700, 1200, 2500), (300, 2200, 2900), (350, 800, 2400), (500, 1800, 2500), (450, 1000, 2400)], float)
WIDTHS, GAINS = (80, 100, 150), (1, 0.6, 0.3)


def say(seed, pitch, seconds, level):
    """A voice: vowels that glide into one another, four and a half a second; (n,), in steps of 1/512."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    f0 = pitch * (1 + 0.15 * np.sin(2 * np.pi * (0.8 * times + random.random())))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    order = random.integers(0, len(VOWELS), 20)
    number, place = np.divmod(4.5 * times, 1)
    number = number.astype(int)
    glide = np.clip((place - 0.7) / 0.3, 0, 1)[:, None]
    formants = VOWELS[order[number % 20]] * (1 - glide) + VOWELS[order[(number + 1) % 20]] * glide
    sound = 0.02 * random.standard_normal(len(times))
    for harmonic in range(1, int(3800 / (0.8 * pitch))):
        hz = harmonic * f0
        strength = 0.01 / harmonic + sum(
            gain / (1 + ((hz - formants[:, formant]) / width) ** 2)
            for formant, (width, gain) in enumerate(zip(WIDTHS, GAINS, strict=True))
        )
        sound += strength * (hz < 3800) * np.sin(harmonic * phase)
    sound *= np.clip(np.sin(np.pi * place) ** 0.7, 0.05, 1)
    sound *= np.minimum(1, np.minimum(np.arange(len(times)), np.arange(len(times))[::-1]) / (0.03 * RATE))
    return np.round(level * sound / np.abs(sound).max() * 512) / 512


def call(turns):
    """A call of (channel, start_s, seconds): (channels, n), half a second of silence at its end."""
    n = max(start_s + seconds for _, start_s, seconds in turns) + 0.5
    samples = np.zeros((1 + max(channel for channel, *_ in turns), round(n * RATE)))
    for number, (channel, start_s, seconds) in enumerate(turns):
        said = say(number, (110, 210)[channel] + 8 * number, seconds, 0.4)
        samples[channel, round(start_s * RATE) :][: len(said)] = said
    return samples


def write_corpus(folder):
    """Sessions of two voices: arousal is how loud and high they are, valence how long."""
    random = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for session in range(7):
        split = "train" if session < 3 else "dev" if session < 5 else "test"
        at, parts = 0, []
        for step in range(random.integers(4, 7)):
            valence, arousal = random.uniform(1.5, 6.5, 2).round(2)
            voice = step % 2
            seconds = 0.25 + 0.08 * valence
            said = say(1000 * session + step, (100, 200)[voice] + 6 * arousal, seconds, 0.05 + 0.09 * arousal)
            parts.append(said)
            line = {
                "utt_id": f"s{session}-{step}", "session_id": f"s{session}",
                "speaker_id": f"{split}-{voice}", "audio_path": f"s{session}.wav",
                "start_s": at / RATE, "end_s": (at + len(said)) / RATE, "role": ("customer", "agent")[voice],
                "valence": valence, "arousal": arousal, "split": split, "fold": f"f{session % 3}",
            }  # fmt: skip
            if step == 1:
                line["observed_valence"] = valence
            if (session, step) == (1, 2):
                line["end_s"] = line["start_s"] + 0.05
            if (session, step) == (2, 3):
                line["valence"] = None
            lines.append(line)
            at += len(said)
        soundfile.write(folder / f"s{session}.wav", np.concatenate(parts), RATE)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_encoder(folder):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, conv_dim=(4, 4),
        conv_kernel=(32, 40), conv_stride=(16, 20), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).eval().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def killed(after, trial=None):
    """What ends a training after an epoch, or a sweep in one of its trials."""

    def report(metrics):
        if metrics.get("trial") == trial and (metrics["epoch"] if trial is None else len(metrics["curve"])) == after:
            raise Killed

    return report


def scored(source, checkpoint, out, config, **options):
    vaemo.score(input=source, checkpoint=checkpoint, out=out, config=config, **options, executor="process")


def heard(prediction):
    return [prediction.status, prediction.start_s, prediction.end_s, prediction.valence, prediction.arousal]


def memories(config):
    """What a stream, a live session and a model go on to predict after the memories that they leave."""
    samples = call(CALL).astype(np.float32)
    by_speaker = config.replace(
        {"sessions": {"sequence_by": "speaker"}, "features": {"speaker_aggregation": "running_mean"}}
    )
    stream, said = Stream("run/best", config=by_speaker), []
    # Both voices are heard twice: the last two utterances have a past.
    for number, (channel, start_s, seconds) in enumerate([*CALL[:3:2], *CALL[1::2]]):
        if number == 2:
            stream.save("stream.safetensors")
        cut = samples[channel, round(start_s * RATE) :][: round(seconds * RATE)]
        said.append([channel, start_s, seconds, *heard(stream.push(cut, RATE, speaker=f"c{channel}"))[3:]])

    live, at, before = LiveSession(Stream("run/best"), RATE, channels=2, vad=config.vad), 0, []
    while not live._waiting:
        before += live.push(samples[:, at : at + 160])
        at += 160
    live.save("live.safetensors")
    after = [*live.push(samples[:, at:]), *live.finish()]
    assert (len(before), len(after)) == (1, 3)

    model = load_checkpoint("run/best").model.eval()
    with torch.inference_mode():
        state = model.step(waves(model.dims, 1.0), model.fresh_state(2))[1]
        predicted = model.step(waves(model.dims, 2.0), state)[0]
    state.save("state.safetensors")
    return {
        "stream": said[2:],
        "live": {"from_sample": at, "heard": [[p.channel, *heard(p)] for p in after]},
        "state": predicted.tolist(),
    }


def make(patch):
    config = Config().replace(SMALL)
    Path("config.yaml").write_text(config.to_yaml())
    write_corpus(Path("corpus"))
    Path("recordings").mkdir()
    for name, turns in (("call.flac", CALL), ("voice.flac", ((0, 0.4, 0.7),))):
        soundfile.write(f"recordings/{name}", call(turns).T, RATE)

    in_this_process(patch)
    vaemo.extract(config=config, out="store", manifest="corpus/manifest.jsonl", executor="process")
    vaemo.extract(config=config, out="store-recordings", input="recordings", executor="process")
    train("store", "run", config)
    in_this_process(patch, killed(after=2))
    with pytest.raises(Killed):
        train("store", "run-half", config)

    in_this_process(patch)
    Path("space.yaml").write_text("train.lr: {loguniform: [1.0e-3, 1.0e-2]}\nmodel.alpha: {choice: [0.3, 0.6]}\n")
    tune("store", "space.yaml", "sweep", config, trials=2, scheduler="none")
    in_this_process(patch, killed(after=2, trial=1))
    with pytest.raises(Killed):
        tune("store", "space.yaml", "sweep-half", config, trials=2, scheduler="none")

    in_this_process(patch)
    ablate("store", "ablation", config, seeds=1, only=["no-state", "ridge"])
    scored("store", "run/best", "scores", config)
    scored("store", "run/best", "scores-half", config, limit=3)
    scored("recordings", "run/best", "scores-recordings", config)
    personalize_store("store", "run/best", "personal", config)
    scored("store", "run/best", "scores-personal", config, personal="personal")
    expected = {"made_by": f"vaemo {vaemo.__version__}, commit {COMMIT}", **memories(config)}
    sections = [field.name for field in dataclasses.fields(config)]
    expected["fingerprints"] = {section: config.fingerprint(section) for section in sections}
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")

    enrolling = config.replace({"features": {"speaker_aggregation": "enrolled"}})
    train("store", "enrolled", enrolling)
    scored("store", "enrolled/best", "scores-enrolled", enrolling, speakers="enrolled/speakers.parquet")

    write_encoder("speech-encoder")
    listening = config.replace(
        {
            "features": {
                "speech": "speech-encoder",
                "prosody": "none",
                "speaker": "none",
                "speech_pooling": "attention",
            },
            "train": {"encoder": "all", "epochs": 2, "encoder_from_epoch": 1},
        }
    )
    plain = listening.replace({"features": {"speech_pooling": "mean"}, "train": {"encoder": "frozen"}})
    where = {"manifest": "corpus/manifest.jsonl", "executor": "process"}
    vaemo.extract(config=plain, out="encoder-store", **where)
    train("encoder-store", "encoder", listening, manifest="corpus/manifest.jsonl")
    scored("recordings", "encoder/best", "encoder/scores", config)


LEFT_OUT = (
    "corpus", "encoder-store", "speech-encoder", "*/curves.png", "*/_ray", "**/README.md", "*/pictures", "*/index.html",
    "run/_state", "enrolled/_*", "enrolled/*.json*", "enrolled/used.parquet", "encoder/_*", "encoder/*.json*",
    "encoder/used.parquet", "sweep/trials/*/state.safetensors", "sweep/trials/0000/best",
    "sweep-half/trials/0000/state.safetensors", "ablation/ablation.*", "scores-personal/sessions",
    "scores-enrolled/sessions", "encoder/scores/sessions",
)  # fmt: skip


def main():
    if GOLDEN.exists():
        sys.exit(f"{GOLDEN} is there, which no later version may change. Only where it was lost it is made again.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with pytest.MonkeyPatch.context() as patch:
            make(patch)
        for pattern in LEFT_OUT:
            for path in list(Path().glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder, GOLDEN)
        os.chdir(GOLDEN)


if __name__ == "__main__":
    main()
