"""The built-in extractors, without weights: `logmel` (speech) and `ltas` (speaker).

Both describe the frames of an utterance that carry speech: those within 40 dB of its loudest. Letters: F frames,
M mel bands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vaemo.features.base import fingerprint_of
from vaemo.units import SAMPLING_RATE_HZ

_WINDOW = 400
_HOP = 160
_FFT = 512
_ACTIVE_DB = 40.0


class LogMel:
    """Statistics of 40 log-mel bands: mean, deviation, and deviation of their change.

    120 numbers in dB: per band the mean and the deviation over active frames, and the deviation of its change over
    50 ms. Loudness is kept, because it carries arousal.
    """

    name = "logmel"
    version = "1"
    uses_gpu = False
    bands = 40
    dim = 3 * bands
    _LAG = 5

    def __init__(self) -> None:
        self.fingerprint = fingerprint_of(name=self.name, version=self.version)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`."""
        return _stack([self._describe(samples) for samples in utterances], self.dim)

    def _describe(self, samples: np.ndarray) -> Tensor:
        level, active = _mel_level(samples, self.bands)
        speech = level[active]
        change = level[self._LAG :] - level[: -self._LAG]
        change = change[active[self._LAG :] | active[: -self._LAG]]
        if not len(change):
            change = torch.zeros(1, self.bands)
        return torch.cat([speech.mean(0), speech.std(0, correction=0), change.std(0, correction=0)])


class LongTermSpectrum:
    """Long-term average spectrum in 64 mel bands: shape alone, no loudness, of unit length.

    The mean level of every band over active frames, in dB, the mean over bands taken away, and what lies more than 50
    dB under the strongest band raised to that (a band that a telephone cuts off carries no information on the speaker).
    """

    name = "ltas"
    version = "1"
    uses_gpu = False
    dim = 64
    _DEPTH_DB = 50.0

    def __init__(self) -> None:
        self.fingerprint = fingerprint_of(name=self.name, version=self.version)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`."""
        return _stack([self._describe(samples) for samples in utterances], self.dim)

    def _describe(self, samples: np.ndarray) -> Tensor:
        # Normalised first, so that the floor under the logarithm does not depend on loudness.
        scaled = samples / max(float(samples.std()), 1e-8)
        level, active = _mel_level(scaled, self.dim)
        average = level[active].mean(0)
        average = average.clamp_min(average.max() - self._DEPTH_DB)
        return torch.nn.functional.normalize(average - average.mean(), dim=0)


def _mel_level(samples: np.ndarray, bands: int) -> tuple[Tensor, Tensor]:
    """Levels of mel bands in dB of full scale, (F, M), not under -90, and which frames are active, (F,)."""
    signal = torch.from_numpy(np.ascontiguousarray(samples))
    signal = torch.nn.functional.pad(signal, (0, max(_WINDOW - len(signal), 0)))
    frames = signal.unfold(0, _WINDOW, _HOP) * _window()
    power = torch.fft.rfft(frames, n=_FFT).abs().square()
    energy = power.sum(1)
    mel = power @ mel_filters(bands)
    active = energy >= energy.max() * 10.0 ** (-_ACTIVE_DB / 10.0)
    return 10.0 * torch.log10(mel / float(_window().sum()) ** 2 + 1e-9), active


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(_WINDOW, periodic=False)


@functools.cache
def mel_filters(bands: int) -> Tensor:
    """Triangles between neighbouring points of the HTK mel scale, 20 Hz to 8 kHz, (bins of the FFT, M).

    Source:
        torchaudio 2.11, `functional.melscale_fbanks` with norm None (BSD 2-clause, Copyright (c) 2017 Facebook Inc.
        (Soumith Chintala)), written out: equal to the bit.
    """
    hz = torch.linspace(0, SAMPLING_RATE_HZ // 2, _FFT // 2 + 1)
    low, high = (2595.0 * math.log10(1.0 + edge / 700.0) for edge in (20.0, SAMPLING_RATE_HZ / 2))
    points = 700.0 * (10.0 ** (torch.linspace(low, high, bands + 2) / 2595.0) - 1.0)
    widths = points.diff()
    slopes = points - hz[:, None]
    return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp_min(0)


def _stack(vectors: Sequence[Tensor], dim: int) -> np.ndarray:
    return torch.stack(list(vectors)).numpy() if vectors else np.zeros((0, dim), np.float32)
