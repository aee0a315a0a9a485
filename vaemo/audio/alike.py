"""Channels that hold the same audio, such as mono saved as stereo: there a channel does not tell who speaks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np

from vaemo.units import SAMPLING_RATE_HZ

_ALIKE = 0.95
"""Magnitude of the correlation from which one second of two channels is the same; their levels and signs may differ."""

_STEADY = math.log(4.0)
"""How much the ratio of their energies may vary (6 dB): where each is the other's echo, it depends on who speaks."""

_SHARE = 0.9
"""Share of the seconds with speech that have to be the same."""

_LEAST = 1e-12

_SPOKEN_SHARE = 0.5
"""Of what is found on one channel, how much is found on the other too: fainter copies are crosstalk, which is cut."""


class AlikeChannels:
    """Compares the channels of a recording that arrives in blocks, second by second."""

    def __init__(self) -> None:
        self._seconds: list[np.ndarray] = []
        self._waiting: np.ndarray | None = None

    def look(self, block: np.ndarray) -> None:
        """Take the next samples, (C, n), float32, 16 kHz."""
        if len(block) < 2:
            return
        waiting = block if self._waiting is None else np.concatenate([self._waiting, block], axis=1)
        whole = waiting.shape[1] // SAMPLING_RATE_HZ
        for second in range(whole):
            self._compare(waiting[:, second * SAMPLING_RATE_HZ : (second + 1) * SAMPLING_RATE_HZ])
        self._waiting = waiting[:, whole * SAMPLING_RATE_HZ :]

    def _compare(self, samples: np.ndarray) -> None:
        # Differences have little of hum and no offset.
        change = np.diff(np.nan_to_num(samples, posinf=0.0, neginf=0.0))
        self._seconds.append(change @ change.T)

    def channels(self, spoken: Iterable[tuple[int, float, float]]) -> frozenset[int]:
        """Channels that hold the same as another one.

        Args:
            spoken: (channel, start_s, end_s) of speech that was found.
        """
        if self._waiting is not None and self._waiting.shape[1] > 1:
            self._compare(self._waiting)
            self._waiting = None
        if not self._seconds:
            return frozenset()
        products = np.stack(self._seconds).astype(np.float64)
        spoken_s, heard = np.zeros(products.shape[1]), np.zeros(len(products), bool)
        for channel, start_s, end_s in spoken:
            spoken_s[channel] += end_s - start_s
            heard[int(start_s) : math.ceil(end_s)] = True
        products = products[heard]
        pairs = itertools.combinations(np.flatnonzero(spoken_s).tolist(), 2)
        return frozenset(
            channel
            for one, other in pairs
            if min(spoken_s[[one, other]]) >= _SPOKEN_SHARE * max(spoken_s[[one, other]])
            and _are_alike(products[:, one, one], products[:, other, other], products[:, one, other])
            for channel in (one, other)
        )


def _are_alike(one: np.ndarray, other: np.ndarray, both: np.ndarray) -> bool:
    """Whether two channels are the same, by the energies of each in every second and the products of both."""
    level = np.log(np.maximum(one, _LEAST) / np.maximum(other, _LEAST))
    same = (np.abs(both) > _ALIKE * np.sqrt(one * other)) & (np.abs(level - np.median(level)) < _STEADY)
    return bool(same.mean() >= _SHARE)
