"""Prosody by Praat, for those who may not use openSMILE: pitch, intensity, voice quality, formants, spectral tilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vaemo.features.base import fingerprint_of, needed_version
from vaemo.features.watch import begin_utterance
from vaemo.units import SAMPLING_RATE_HZ

MEASURES = (
    *("f0_mean", "f0_deviation", "f0_low", "f0_high", "f0_range", "f0_slope", "voiced_share", "voiced_runs_per_s"),
    *("intensity_mean", "intensity_deviation", "intensity_range", "intensity_slope"),
    *("jitter_local", "jitter_ppq5", "shimmer_local", "shimmer_apq5", "hnr_mean", "hnr_deviation"),
    *("f1_mean", "f1_deviation", "f2_mean", "f2_deviation", "f3_mean", "f3_deviation"),
    *("tilt", "hammarberg", "alpha_ratio"),
)
"""What is measured. F0 in semitones above 27.5 Hz, slopes per second, levels in dB, formants in
kHz. Where nothing is voiced, what needs voice is 0."""

_F0_HZ = (60.0, 600.0)
_STEP_S = 0.01
_REFERENCE_HZ = 27.5


class Praat:
    """The measures of `MEASURES`, by praat-parselmouth.

    Raises:
        ExtractorError: if praat-parselmouth is not installed.

    Source:
        Boersma (1993), accurate short-term analysis of the fundamental frequency; Boersma and Weenink, Praat.
    """

    name = "praat"
    dim = len(MEASURES)
    uses_gpu = False

    def __init__(self) -> None:
        self.version = needed_version("praat-parselmouth", "features.prosody is 'praat'")
        self.fingerprint = fingerprint_of(name=self.name, version=self.version, measures=MEASURES)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; a row of NaN where an utterance is too short to measure a pitch."""
        return np.array([self._measure(samples) for samples in utterances], np.float32).reshape(-1, self.dim)

    def _measure(self, samples: np.ndarray) -> list[float]:
        import parselmouth

        begin_utterance()
        sound = parselmouth.Sound(samples.astype(np.float64), SAMPLING_RATE_HZ)
        try:
            pitch = sound.to_pitch(time_step=_STEP_S, pitch_floor=_F0_HZ[0], pitch_ceiling=_F0_HZ[1])
            intensity = sound.to_intensity(minimum_pitch=100.0, time_step=_STEP_S)
        except parselmouth.PraatError:
            return [np.nan] * self.dim
        return [
            *_of_pitch(pitch.selected_array["frequency"], len(samples) / SAMPLING_RATE_HZ),
            *_of_intensity(intensity.values[0]),
            *_of_voice(sound),
            *_of_formants(sound, pitch),
            *_of_spectrum(samples),
        ]


def _of_pitch(hz: np.ndarray, duration_s: float) -> list[float]:
    voiced = hz > 0
    if not voiced.any():
        return [0.0] * 8
    semitones = 12 * np.log2(hz[voiced] / _REFERENCE_HZ)
    low, high = np.quantile(semitones, [0.05, 0.95])
    runs = int(np.count_nonzero(np.diff(np.r_[0, voiced.astype(int)]) == 1))
    slope = _slope(np.flatnonzero(voiced) * _STEP_S, semitones)
    return [semitones.mean(), semitones.std(), low, high, high - low, slope, voiced.mean(), runs / duration_s]


def _of_intensity(db: np.ndarray) -> list[float]:
    heard = db[db >= db.max() - 40.0]
    low, high = np.quantile(heard, [0.05, 0.95])
    return [heard.mean(), heard.std(), high - low, _slope(np.arange(len(db)) * _STEP_S, db.clip(db.max() - 40.0))]


def _of_voice(sound: Any) -> list[float]:
    from parselmouth import PraatError
    from parselmouth.praat import call

    points = call(sound, "To PointProcess (periodic, cc)", *_F0_HZ)
    span = (0, 0, 0.0001, 0.02, 1.3)
    values = [
        call(points, "Get jitter (local)", *span),
        call(points, "Get jitter (ppq5)", *span),
        call([sound, points], "Get shimmer (local)", *span, 1.6),
        call([sound, points], "Get shimmer (apq5)", *span, 1.6),
    ]
    try:
        db = sound.to_harmonicity_cc(time_step=_STEP_S, minimum_pitch=_F0_HZ[0]).values
    except PraatError:
        db = np.zeros(0)
    voiced = db[db > -200.0]
    values += [voiced.mean(), voiced.std()] if len(voiced) else [0.0, 0.0]
    return [0.0 if np.isnan(value) else float(value) for value in values]


def _of_formants(sound: Any, pitch: Any) -> list[float]:
    formants = sound.to_formant_burg(time_step=_STEP_S, maximum_formant=5500.0)
    times = pitch.xs()[pitch.selected_array["frequency"] > 0]
    values: list[float] = []
    for number in (1, 2, 3):
        khz = np.array([formants.get_value_at_time(number, time) for time in times]) / 1000.0
        khz = khz[~np.isnan(khz)]
        values += [khz.mean(), khz.std()] if len(khz) else [0.0, 0.0]
    return values


def _of_spectrum(samples: np.ndarray) -> list[float]:
    """Slope of the spectrum in dB per octave (100 Hz to 5 kHz), and two ratios of its lower to its upper part."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2 + 1e-12
    hz = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE_HZ)
    edges = 100.0 * 2.0 ** (np.arange(0, 18) / 3.0)
    sums = np.add.reduceat(power, np.searchsorted(hz, edges))[:-1]
    tilt = _slope(np.arange(len(sums)) / 3.0, 10 * np.log10(sums))

    def level(low: float, high: float, reduce: Any) -> float:
        return float(10 * np.log10(reduce(power[(hz >= low) & (hz < high)])))

    hammarberg = level(0, 2000, np.max) - level(2000, 5000, np.max)
    return [tilt, hammarberg, level(50, 1000, np.sum) - level(1000, 5000, np.sum)]


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    spread = float((centred**2).sum())
    return float((centred * y).sum()) / spread if spread > 0 else 0.0
