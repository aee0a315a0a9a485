"""Acoustic measures without a model: usability, bandwidth, and simulation of a telephone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vaemo.audio.recording import AudioProblem, Resampler
from vaemo.units import SAMPLING_RATE_HZ

_SILENCE = 1e-4
"""Deviation below which an utterance is silent: -80 dB of full scale, some three steps of 16 bits."""

_EDGE = 160
_FFT = 512
_BAND_BINS = 8
_BAND_FLOOR_DB = 50.0
_QUIET, _LEAST = 0.1, 1e-6
_MU = 255.0


def require_usable(samples: np.ndarray, min_s: float) -> None:
    """Refuse samples that no extractor can use.

    Raises:
        AudioProblem: nan_audio for NaN or infinity, too_short for less than `min_s`, silent where nothing but a
            constant offset is there.
    """
    if not np.isfinite(samples).all():
        n_bad = int((~np.isfinite(samples)).sum())
        raise AudioProblem("nan_audio", f"{n_bad} of {len(samples)} samples are NaN or infinite")
    duration_s = len(samples) / SAMPLING_RATE_HZ
    if duration_s < min_s:
        raise AudioProblem("too_short", f"it lasts {duration_s:.3f} s; {min_s:g} s are needed")
    # Resampling a constant rings at its ends.
    deviation = float(samples[_EDGE:-_EDGE].std(dtype=np.float64)) if len(samples) > 2 * _EDGE else 0.0
    if deviation < _SILENCE:
        raise AudioProblem("silent", f"its level is {20 * np.log10(max(deviation, 1e-10)):.0f} dB of full scale")


class Sound(NamedTuple):
    """Acoustic measures of an utterance, independent of its words.

    Attributes:
        bandwidth_hz: The frequency up to which speech reaches: about 3400-4000 for telephone, 7000 and more for
            wideband speech. The upper edge of the highest band (250 Hz) whose level, in the loudest twentieth of the
            frames, is within 50 dB of the strongest band's.
        level_db: Root mean square against full scale.
        snr_db: Power over that of the background, which in each band is what the quietest tenth of the frames do not
            exceed; less the background, and at most 60. Speech without a pause, whose sounds hide the background,
            seems noisier than it is.
    """

    bandwidth_hz: float
    level_db: float
    snr_db: float


def sound_of(samples: np.ndarray) -> Sound:
    """How samples sound.

    Args:
        samples: (n,) at 16 kHz, not silent.
    """
    padded = np.pad(samples, (0, max(_FFT - len(samples), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[:: _FFT // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(_FFT).astype(np.float32), axis=1)[:, 1:]) ** 2
    bands = power.reshape(len(power), -1, _BAND_BINS).mean(axis=2)
    level = 10 * np.log10(np.quantile(bands, 0.95, axis=0) + 1e-12)
    highest = int(np.flatnonzero(level > level.max() - _BAND_FLOOR_DB)[-1])
    whole, background = bands.mean(axis=0).sum(), np.quantile(bands, _QUIET, axis=0).sum()
    snr = max(whole - background, _LEAST * whole) / max(background, _LEAST * whole)
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    return Sound(
        (highest + 1) * _BAND_BINS * SAMPLING_RATE_HZ / _FFT,
        float(20 * np.log10(max(rms, 1e-10))),
        float(10 * np.log10(snr)),
    )


def simulate_telephone(samples: np.ndarray) -> np.ndarray:
    """The samples after a call: 8 kHz, 8 bits of mu-law, and back to 16 kHz, (n,), float32.

    Source: mu-law companding as in ITU-T G.711, its continuous curve instead of the segments.
    """
    narrow = _halve.between(samples.astype(np.float32))[: -(-len(samples) // 2)].clip(-1.0, 1.0)
    compressed = np.sign(narrow) * np.log1p(_MU * np.abs(narrow)) / np.log1p(_MU)
    heard = np.round(compressed * 127.0) / 127.0
    expanded = np.sign(heard) * np.expm1(np.abs(heard) * np.log1p(_MU)) / _MU
    return _double.between(expanded.astype(np.float32))[: len(samples)]


_halve, _double = Resampler(2, 1), Resampler(1, 2)
