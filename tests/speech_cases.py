"""Calls of two synthetic speakers whose speech is known to the sample, for the tests of detection and extraction."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torchaudio

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
    resampled = torchaudio.functional.resample(torch.from_numpy(samples), spoken_hz, SAMPLING_RATE_HZ).numpy()
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
