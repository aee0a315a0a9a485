"""A corpus that is heard: sessions of tones in noise, a tiny encoder, and its store, for training end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
from tiny_models import write_speech_model

from vaemo import files
from vaemo.config import Config
from vaemo.data.manifest import read_manifest
from vaemo.data.sessions import read_sessions
from vaemo.features import describe, load_extractors
from vaemo.store import FeatureStore, store_info, write_part
from vaemo.training.end_to_end import EndToEnd
from vaemo.training.trainer import Trainer
from vaemo.utterances import extract_utterances

RATE = 16_000
SHORT = {"conv_dim": (16, 16), "conv_kernel": (32, 40), "conv_stride": (16, 20), "num_feat_extract_layers": 2}
"""Two convolutions in place of seven: 50 frames a second at a tenth of the cost."""

SMALL = {
    "features": {"prosody": "none", "speaker": "none"},
    "model": {"d_c": 8, "head_hidden": 16, "dropout": 0.1},
    "updater": {"d_model": 8, "d_state": 4},
    "train": {
        "epochs": 2, "lanes": 4, "window": 4, "lr": 3e-3, "min_labelled": 8, "weight_averaging": 0.9,
        "encoder": "all", "encoder_lr": 1e-3,
    },
}  # fmt: skip

LEARNED = {"features": {"speech_pooling": "attention", "speech_layer": "weighted"}}
"""Attention over frames and weights of layers, trained too; both begin as plain means."""


def write_encoder(folder: Path, kind: str, **changes) -> str:
    return str(write_speech_model(folder, kind, **{**SHORT, **changes}))


def write_corpus(folder: Path, *, sessions=(6, 2), lengths=(2, 5), seed=0) -> str:
    """A manifest and its recordings, one a session.

    Valence is the level of a low tone and arousal that of a high one. Between them sounds a third, as loud, which says
    nothing, and there is noise.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(sum(sessions)):
        at, pieces = 0, []
        for step in range(random.integers(lengths[0], lengths[1] + 1)):
            valence, arousal = random.uniform(0.1, 0.9, 2)
            seconds = np.arange(int(random.uniform(0.25, 0.5) * RATE)) / RATE
            tones = [(valence, 450, 550), (arousal, 2700, 3300), (random.uniform(0, 2), 1200, 1400)]
            heard = 0.3 * random.standard_normal(len(seconds))
            for level, low, high in tones:
                heard += level * np.sin(2 * np.pi * (random.uniform(low, high) * seconds + random.random()))
            pieces.append((0.1 * heard).astype(np.float32))
            lines.append(
                {
                    "utt_id": f"s{number}-{step}", "session_id": f"s{number}", "speaker_id": f"p{number}",
                    "audio_path": f"s{number}.wav", "start_s": at / RATE, "end_s": (at + len(seconds)) / RATE,
                    "valence": valence, "arousal": arousal, "split": "train" if number < sessions[0] else "dev",
                }
            )  # fmt: skip
            at += len(seconds)
        soundfile.write(folder / f"s{number}.wav", np.concatenate(pieces), RATE, subtype="FLOAT")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(manifest)


def extract(manifest: str, store: Path, config: Config) -> FeatureStore:
    """The store that jobs/extract.py would write, made in this process."""
    extractors = load_extractors(config.features)
    table = extract_utterances(read_manifest(manifest), extractors=extractors, config=config)
    write_part(str(store), "part-0.parquet", table)
    settings = {name: config.to_dict()[name] for name in ("audio", "vad", "features", "labels")}
    info = store_info(describe(extractors), config.model.label_range, None, settings)
    files.write_json(store / "_vaemo.json", {**info, "source": "manifest"})
    return FeatureStore.open(str(store))


class Heard:
    """A corpus, an encoder and the store of both, in a folder."""

    def __init__(self, folder: Path, kind: str = "wav2vec2", *, features=None, audio=None, encoder=None, **corpus):
        self.encoder = write_encoder(folder / "encoder", kind, **(encoder or {}))
        self.manifest = write_corpus(folder / "corpus", **corpus)
        made = {"features": {"speech": self.encoder, **(features or {})}, "audio": audio or {}}
        self.store = extract(self.manifest, folder / "store", Config().replace(SMALL).replace(made))

    def config(self, *, features=None, model=None, **train) -> Config:
        return Config().replace(SMALL).replace({"train": train, "features": features or {}, "model": model or {}})

    def end_to_end(self, config: Config, store: FeatureStore | None = None, manifest: str | None = None) -> EndToEnd:
        return EndToEnd.open(store or self.store, manifest or self.manifest, config)

    def sessions(self, config: Config):
        read = read_sessions(self.store, config)
        return [s for s in read if s.split == "train"], [s for s in read if s.split == "dev"]

    def trainer(self, config: Config) -> Trainer:
        end_to_end = self.end_to_end(config) if config.train.encoder != "frozen" else None
        return Trainer(*self.sessions(config), config, end_to_end=end_to_end)
