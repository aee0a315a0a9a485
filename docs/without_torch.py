"""Scores of a conversation without PyTorch: features in numpy, the model's step in onnxruntime, nothing of vaemo.

    vaemo export --checkpoint RUN/best --out step.onnx           once, where vaemo[onnx] is installed
    python without_torch.py step.onnx one.wav two.wav ...        needs numpy and onnxruntime

Each WAV is an utterance of the conversation, in order: mono, 16 bits, 16 kHz; `caller/one.wav` is spoken by `caller`.
The model is one of the built-in extractors (features.speech=logmel, features.speaker=ltas, features.prosody=none).
"""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime

RATE, WINDOW, HOP, FFT = 16_000, 400, 160, 512
ACTIVE_DB, DEPTH_DB, LAG = 40.0, 50.0, 5


def mel_filters(bands: int) -> np.ndarray:
    """Triangles between neighbouring points of the HTK mel scale, 20 Hz to 8 kHz, (bins, bands)."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (20.0, RATE / 2))
    points = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    slopes = points - np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    rising, falling = -slopes[:, :-2] / np.diff(points)[:-1], slopes[:, 2:] / np.diff(points)[1:]
    return np.maximum(np.minimum(rising, falling), 0)


def mel_level(samples: np.ndarray, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels of mel bands in dB of full scale, (frames, bands), and which frames carry speech, (frames,)."""
    padded = np.pad(samples.astype(np.float64), (0, max(WINDOW - len(samples), 0)))
    window = np.hanning(WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * window
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2
    energy = power.sum(1)
    active = energy >= energy.max() * 10 ** (-ACTIVE_DB / 10)
    return 10 * np.log10(power @ mel_filters(bands) / window.sum() ** 2 + 1e-9), active


def logmel(samples: np.ndarray) -> np.ndarray:
    """Mean and deviation of 40 bands, and the deviation of their change over 50 ms, (120,)."""
    level, active = mel_level(samples, 40)
    change = (level[LAG:] - level[:-LAG])[active[LAG:] | active[:-LAG]]
    change = change if len(change) else np.zeros((1, 40))
    return np.concatenate([level[active].mean(0), level[active].std(0), change.std(0)]).astype(np.float32)


def ltas(samples: np.ndarray) -> np.ndarray:
    """The long-term average spectrum in 64 bands, of unit length, (64,)."""
    level, active = mel_level(samples / max(float(samples.std()), 1e-8), 64)
    average = level[active].mean(0)
    average = np.maximum(average, average.max() - DEPTH_DB)
    shape = average - average.mean()
    return (shape / max(float(np.linalg.norm(shape)), 1e-12)).astype(np.float32)


EXTRACTORS = {"logmel": logmel, "ltas": ltas}


class Session:
    """A conversation: its memory, and what was heard of each speaker.

    Args:
        path: What `vaemo export` wrote.
    """

    def __init__(self, path: str) -> None:
        self.step = onnxruntime.InferenceSession(path)
        about = self.step.get_modelmeta().custom_metadata_map
        self.about = {name: json.loads(value) for name, value in about.items() if name != "description"}
        extractors = self.about["extractors"] or {}
        unknown = [name for name in extractors.values() if name not in EXTRACTORS]
        if unknown or not extractors or self.about["speaker_aggregation"] == "enrolled":
            raise SystemExit(f"{path}: made for features that this example does not compute: {extractors}")
        if self.about["simulate_telephone"]:
            raise SystemExit(f"{path}: made for telephones (audio.simulate_telephone), which this example leaves out")
        self.extractors = {stream: EXTRACTORS[name] for stream, name in extractors.items()}
        self.names = self.about["outputs"]
        self.states: dict[str, dict[str, np.ndarray]] = {}
        self.sums: dict[tuple[str, str], np.ndarray] = {}

    def push(self, samples: np.ndarray, speaker: str = "") -> dict[str, float]:
        """The scores of the next utterance, by target; samples (n,), float32 in [-1, 1], at 16 kHz."""
        vectors = {stream: extract(samples) for stream, extract in self.extractors.items()}
        if "speaker" in vectors and self.about["speaker_aggregation"] == "running_mean":
            total = self._add("mean", speaker, vectors["speaker"])[:-1]
            vectors["speaker"] = (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)
        key = speaker if self.about["sequence_by"] == "speaker" else ""
        state = self.states.get(key) or self._fresh()
        inputs = {name: vector[None] for name, vector in vectors.items()} | state
        pasts = [name.removesuffix(".sum") for name in self.about["inputs"] if name.endswith(".sum")]
        for past in pasts:
            whose, stream = past.split(".")
            heard = self.sums.get((past, speaker if whose == "speaker" else key), np.zeros(len(vectors[stream]) + 1))
            inputs[f"{past}.sum"] = heard[None, :-1].astype(np.float32)
            inputs[f"{past}.count"] = heard[-1:].astype(np.float32)
        inputs["observed"] = np.full((1, len(self.about["targets"])), np.nan, np.float32)
        given = {name: inputs.get(name, np.zeros(self._shape(name), np.float32)) for name in self.about["inputs"]}
        found = dict(zip(self.names, self.step.run(None, given), strict=True))
        self.states[key] = {name: found[name.replace("state.", "next.")] for name in state}
        for past in pasts:
            whose, stream = past.split(".")
            self._add(past, speaker if whose == "speaker" else key, vectors[stream])
        return {target: float(found[target][0]) for target in self.about["targets"]}

    def _add(self, what: str, whose: str, vector: np.ndarray) -> np.ndarray:
        """The sum of what was heard, and its number, with one more vector."""
        before = self.sums.get((what, whose), np.zeros(len(vector) + 1))
        self.sums[what, whose] = before + np.append(vector.astype(np.float64), 1)
        return self.sums[what, whose]

    def _fresh(self) -> dict[str, np.ndarray]:
        kinds = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(int64)": np.int64}
        types = {given.name: kinds[given.type] for given in self.step.get_inputs()}
        return {name: np.full(self._shape(name), value, types[name]) for name, value in self.about["fresh"].items()}

    def _shape(self, name: str) -> list[int]:
        return [1, *self.about["inputs"][name][1:]]


def read(path: str) -> np.ndarray:
    """The samples of a WAV file, (n,), float32."""
    with wave.open(path) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"{path}: this example reads mono WAV of 16 bits at 16 kHz")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def main(model: str, *paths: str) -> None:
    """Print the scores of every utterance as a line of JSON."""
    session = Session(model)
    for path in paths:
        print(json.dumps({"path": path, **session.push(read(path), Path(path).parent.name)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
