"""Channels that hold the same audio, such as mono saved as stereo: there a channel does not tell who speaks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np

from vaemo.units import SAMPLING_RATE_HZ

_BAND_HZ = (300, 3400)
"""What is compared: the band of a telephone, which has no hum, and little of the noise that codecs make."""

_REACH_S = 0.25
"""How much later one of two channels may be: legs of a conference, or a codec on one of them."""

_ALIKE = 0.8
"""Magnitude of the correlation from which one second of two channels is the same; their levels and signs may differ.
Copies through codecs at 12 kb/s, or with noise at 20 dB, have 0.9 and more, two persons 0.5 and less."""

_STEADY = math.log(4.0)
"""How much the ratio of their energies may vary (6 dB): where each is the other's echo, it depends on who speaks."""

_SHARE = 0.9
"""Share of the seconds with speech that have to be the same."""

_NO_ECHO, _EXACTLY_ALIKE = math.log(6.3), 0.95
"""A copy whose level is not that of the other (within 8 dB) has to come at the same time, with such a correlation: else
it may be the echo of a person who speaks nearly alone."""

_SILENT = 1e-6
"""Energy of a second, relative to what is around it, below which rounding is larger."""

_LEAST = 1e-12

_SPOKEN_SHARE = 0.5
"""Of what is found on one channel, how much is found on the other too: fainter copies are crosstalk, which is cut."""

_RATE_HZ = SAMPLING_RATE_HZ // 2
_REACH = round(_REACH_S * _RATE_HZ)


class AlikeChannels:
    """Compares the channels of a recording that arrives in blocks, second by second.

    Of every second three numbers per pair of channels are kept.
    """

    def __init__(self) -> None:
        self._seconds: list[np.ndarray] = []
        self._waiting: np.ndarray | None = None

    def look(self, block: np.ndarray) -> None:
        """Take the next samples, (C, n), float32, 16 kHz."""
        if len(block) < 2:
            return
        before = np.zeros((len(block), 2 * _REACH), np.float32) if self._waiting is None else self._waiting
        waiting = np.concatenate([before, block], axis=1)
        whole = max(waiting.shape[1] - 4 * _REACH, 0) // SAMPLING_RATE_HZ
        for second in range(whole):
            begin = second * SAMPLING_RATE_HZ
            self._seconds.append(_compared(waiting[:, begin : begin + SAMPLING_RATE_HZ + 4 * _REACH]))
        self._waiting = waiting[:, whole * SAMPLING_RATE_HZ :]

    def groups(self, spoken: Iterable[tuple[int, float, float]]) -> list[list[int]]:
        """Channels that hold the same, group by group, in each the one with the most speech first.

        Args:
            spoken: (channel, start_s, end_s) of speech that was found.
        """
        if self._waiting is None:
            return []
        n_channels = len(self._waiting)
        if self._waiting.size:
            # The last second may be short, and silence follows it.
            self.look(np.zeros((n_channels, SAMPLING_RATE_HZ + 2 * _REACH - 1), np.float32))
            self._waiting = self._waiting[:, :0]
        spoken_s, heard = np.zeros(n_channels), np.zeros(len(self._seconds), bool)
        for channel, start_s, end_s in spoken:
            spoken_s[channel] += end_s - start_s
            heard[int(start_s) : math.ceil(end_s)] = True
        seconds = np.stack(self._seconds)[heard]
        group_of = {channel: {channel} for channel in range(n_channels)}
        for index, (one, other) in enumerate(itertools.combinations(group_of, 2)):
            least, most = sorted(spoken_s[[one, other]])
            if least and least >= _SPOKEN_SHARE * most and _are_alike(*seconds[:, index].T):
                group_of[one] |= group_of[other]
                group_of.update(dict.fromkeys(group_of[one], group_of[one]))
        groups = {min(group): sorted(group, key=lambda channel: -spoken_s[channel]) for group in group_of.values()}
        return [group for group in groups.values() if len(group) > 1]


def _compared(samples: np.ndarray) -> np.ndarray:
    """What is known of a second of all pairs of channels, (C * (C - 1) / 2, 3), float32.

    The largest magnitude of their correlation within the reach, where it lies in s, and the ratio of their energies
    there as a logarithm.

    Args:
        samples: The second and the reach before and behind it, (C, n), 16 kHz.
    """
    n = samples.shape[1]
    spectrum = np.fft.rfft(np.nan_to_num(samples, posinf=0.0, neginf=0.0))[:, : n // 4 + 1]
    low, high = (round(hz * n / SAMPLING_RATE_HZ) for hz in _BAND_HZ)
    spectrum[:, :low] = spectrum[:, high:] = 0.0
    band = np.fft.irfft(spectrum, n // 2)
    # Of the second that begins at each place, and of the one in the middle.
    energies = np.pad(np.cumsum(np.square(band, dtype=np.float64), axis=1), ((0, 0), (1, 0)))
    energies = np.maximum(energies[:, _RATE_HZ:] - energies[:, :-_RATE_HZ], _SILENT * energies[:, -1:] + _LEAST)
    own = energies[:, _REACH]
    middles, around = np.fft.rfft(band[:, _REACH:-_REACH], n // 2).conj(), np.fft.rfft(band)
    found = []
    for one, other in itertools.combinations(range(len(samples)), 2):
        products = np.fft.irfft(middles[one] * around[other], n // 2)[: energies.shape[1]]
        alike = np.abs(products) / np.sqrt(own[one] * energies[other])
        at = int(alike.argmax())
        found.append((alike[at], (at - _REACH) / _RATE_HZ, math.log(own[one] / energies[other, at])))
    return np.array(found, np.float32)


def _are_alike(correlation: np.ndarray, delay_s: np.ndarray, level: np.ndarray) -> bool:
    """Whether two channels are the same, by what is known of every second."""
    usual = np.median(level)
    same = correlation > _ALIKE if abs(usual) < _NO_ECHO else (correlation > _EXACTLY_ALIKE) & (delay_s == 0)
    return bool((same & (np.abs(level - usual) < _STEADY)).mean() >= _SHARE)
