"""Synthetic speech for the demonstration: espeak-ng through ctypes, and a spectral tilt.

espeak-ng (GPL) is not linked into vaemo: the `demo` extra brings its library and voices (`espeakng-loader`).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from vaemo.errors import VaemoError

_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(VaemoError):
    """espeak-ng is not installed, or refuses a voice or a text."""


def speak(
    text: str, voice: str, *, rate: int = 175, volume: int = 100, pitch: int = 50, pitch_range: int = 50
) -> tuple[np.ndarray, int]:
    """Say a text.

    Args:
        text: What to say.
        voice: Language and variant, such as `en-us+f3`.
        rate: Words a minute, 80 to 450.
        volume: 0 to 200; 100 is normal.
        pitch: Of the voice, 0 to 100; 50 is normal.
        pitch_range: Its movement, 0 (monotone) to 100; 50 is normal.

    Returns:
        samples: (n,) float32 in [-1, 1].
        sampling_rate: In Hz.

    Raises:
        SpeechError: if espeak-ng is not installed, has no such voice, or makes no sound.
    """
    engine = _engine()
    samples = engine.synthesise(text, voice, {_RATE: rate, _VOLUME: volume, _PITCH: pitch, _RANGE: pitch_range})
    if not samples.any():
        raise SpeechError(f"espeak-ng makes no sound for the text {text!r}; give words that can be spoken.")
    return samples, engine.sampling_rate


class _Engine:
    """The library, loaded once per process; it keeps global state, so there can only be one."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise SpeechError("espeak-ng is not installed; install the extra: pip install 'vaemo[demo]'.") from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.sampling_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        self._blocks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def synthesise(self, text: str, voice: str, parameters: dict[int, int]) -> np.ndarray:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechError(f"espeak-ng has no voice '{voice}'; give a language and variant such as en-us+f3.")
        for parameter, value in parameters.items():
            self._library.espeak_SetParameter(parameter, int(value), 0)
        encoded = text.encode()
        self._blocks = []
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _UTF8, None, None)
        return np.concatenate([np.zeros(0, np.int16), *self._blocks]).astype(np.float32) / 32768.0

    def _receive(self, samples: Any, n_samples: int, events: Any) -> int:
        if samples and n_samples > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0


@functools.cache
def _engine() -> _Engine:
    return _Engine()


def trim(samples: np.ndarray, sampling_rate: int, threshold: float = 1e-3) -> np.ndarray:
    """The samples between the first and the last that is louder than `threshold`, 10 ms around them kept."""
    loud = np.flatnonzero(np.abs(samples) > threshold)
    if not len(loud):
        return samples[:0]
    margin = sampling_rate // 100
    return samples[max(loud[0] - margin, 0) : loud[-1] + margin]


def tilt(samples: np.ndarray, sampling_rate: int, db_per_octave: float, pivot_hz: float = 500.0) -> np.ndarray:
    """Raise (positive) or lower (negative) the spectrum above `pivot_hz` by a slope in dB per octave, loudness kept.

    Below 100 Hz the gain stays as it is there. The filter has no phase of its own.
    """
    spectrum = np.fft.rfft(samples)
    hz = np.maximum(np.fft.rfftfreq(len(samples), 1 / sampling_rate), 100.0)
    gain = 10.0 ** (db_per_octave * np.log2(hz / pivot_hz) / 20.0)
    tilted = np.fft.irfft(spectrum * gain, n=len(samples))
    power, tilted_power = np.mean(samples**2, dtype=np.float64), np.mean(tilted**2)
    if tilted_power == 0.0:
        return samples
    return (tilted * np.sqrt(power / tilted_power)).astype(np.float32)


def resample(samples: np.ndarray, sampling_rate: int, wanted_hz: int) -> np.ndarray:
    """The samples at another rate, band-limited; exact for what fits between the two Nyquist frequencies."""
    n = round(len(samples) * wanted_hz / sampling_rate)
    spectrum = np.fft.rfft(samples)[: n // 2 + 1]
    return (np.fft.irfft(spectrum, n=n) * (n / len(samples))).astype(np.float32)
