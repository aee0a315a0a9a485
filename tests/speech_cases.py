"""Calls of two synthetic speakers whose speech is known to the sample, for the tests of detection and extraction."""

from __future__ import annotations

import functools

import numpy as np
import torch

from vaemo.audio.sinc import resample
from vaemo.demo.speech import speak, trim
from vaemo.units import SAMPLING_RATE_HZ

SENTENCES = (
    "Good morning, thank you for calling, how can I help you today?",
    "I have been waiting for my order since the beginning of the month.",
    "Let me look that up for you. Could you tell me the number on the invoice?",
    "Yes, one moment please, it should be in front of me somewhere.",
    "I am really not happy with this, it is the third time that it happens.",
    "I understand. We will send a new one tomorrow, free of charge.",
)
VOICES = ("en-us+f3", "en-us+m3")


@functools.cache
def sentence(index: int, voice: str, rate: int = 165) -> np.ndarray:
    """One sentence at 16 kHz, (n,), without silence around it."""
    samples, spoken_hz = speak(SENTENCES[index % len(SENTENCES)], voice, rate=rate, pitch=40 + 7 * index % 30)
    resampled = resample(torch.from_numpy(samples), spoken_hz, SAMPLING_RATE_HZ).numpy()
    return trim(resampled, SAMPLING_RATE_HZ)


def call(turns: int, seed: int = 0, gap_s: tuple[float, float] = (0.6, 1.4)) -> tuple[np.ndarray, list]:
    """A call at 16 kHz: two channels taking turns over a faint noise.

    Returns:
        samples: (2, n), float32.
        turns: (channel, start_s, end_s) of every sentence.
    """
    rng = np.random.default_rng(seed)
    pieces, spans, at = [], [], 0
    for turn in range(turns):
        at += int(rng.uniform(*gap_s) * SAMPLING_RATE_HZ)
        said = sentence(turn, VOICES[turn % 2])
        pieces.append((turn % 2, at, said))
        spans.append((turn % 2, at / SAMPLING_RATE_HZ, (at + len(said)) / SAMPLING_RATE_HZ))
        at += len(said)
    samples = rng.normal(scale=2e-4, size=(2, at + SAMPLING_RATE_HZ)).astype(np.float32)
    for channel, start, said in pieces:
        samples[channel, start : start + len(said)] += said
    return samples, spans


def both_talk(turns: int, seed: int = 0, level_db: tuple[float, float] = (-41.0, -31.0)) -> tuple[np.ndarray, list]:
    """As `call`, but neither waits for the other, and every sentence has a level of its own, in dB of full scale."""
    rng = np.random.default_rng(seed)
    pieces, spans = [], []
    for channel in (0, 1):
        at = 0
        for turn in range(turns):
            at += int(rng.uniform(0.5, 2.0) * SAMPLING_RATE_HZ)
            said = at_level(sentence(turn + 3 * channel, VOICES[channel]), rng.uniform(*level_db))
            pieces.append((channel, at, said))
            spans.append((channel, at / SAMPLING_RATE_HZ, (at + len(said)) / SAMPLING_RATE_HZ))
            at += len(said)
    n = max(start + len(said) for _, start, said in pieces) + SAMPLING_RATE_HZ
    samples = rng.normal(scale=2e-4, size=(2, n)).astype(np.float32)
    for channel, start, said in pieces:
        samples[channel, start : start + len(said)] += said
    return samples, spans


def at_level(samples: np.ndarray, level_db: float) -> np.ndarray:
    """The samples with a root mean square of so many dB of full scale, float32."""
    level = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    return (samples * (10 ** (level_db / 20) / level)).astype(np.float32)


def tone(n: int, *hz: float, level_db: float = -20.0) -> np.ndarray:
    """Tones at once, (n,), alike in level; `level_db` is that of their sum."""
    return at_level(sum(np.sin(2 * np.pi * f * np.arange(n) / SAMPLING_RATE_HZ) for f in hz), level_db)


def noise(n: int, low_hz: float, high_hz: float, level_db: float, seed: int = 0) -> np.ndarray:
    """Noise of a band, (n,)."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=n))
    hz = np.fft.rfftfreq(n, 1 / SAMPLING_RATE_HZ)
    return at_level(np.fft.irfft(np.where((hz >= low_hz) & (hz <= high_hz), spectrum, 0), n), level_db)


def overlap(found: list, spoken: list, channels: int = 2) -> tuple[float, float]:
    """Share of the speech that was found, and share of what was found that is speech."""
    both = n_found = n_spoken = 0
    for channel in range(channels):
        length = int(max([end for _, _, end in [*found, *spoken]]) * 1000) + 1
        marks = np.zeros((2, length), bool)
        for row, spans in enumerate((found, spoken)):
            for where, start_s, end_s in spans:
                if where == channel:
                    marks[row, int(start_s * 1000) : int(end_s * 1000)] = True
        both += int((marks[0] & marks[1]).sum())
        n_found += int(marks[0].sum())
        n_spoken += int(marks[1].sum())
    return both / n_spoken, both / max(n_found, 1)
