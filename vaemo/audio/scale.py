"""The scale of samples: full scale is 1. Another scale is detected, and excess samples are clipped."""

from __future__ import annotations

import numpy as np

LOUDEST = 4.0
"""The largest plausible magnitude of a sample: 12 dB over full scale. Files of floats do go beyond 1."""

_STRAY = 1e-3
"""Share of samples that may lie beyond: where more do, the scale is another one."""

_SCALES = (("int16", 2**15), ("24-bit", 2**23), ("int32", 2**31))


class Scale:
    """How far samples stick out, over as many blocks as there are.

    Args:
        n_least: Fewer samples are judged as if there were this many.

    Attributes:
        n: Samples that were taken.
        n_beyond: How many of them exceed `LOUDEST` in magnitude; infinities are counted nowhere.
        loudest: The largest magnitude among those.
    """

    def __init__(self, n_least: int = 1000) -> None:
        self._n_least = n_least
        self.n = self.n_beyond = 0
        self.loudest = 0.0

    def take(self, samples: np.ndarray) -> np.ndarray:
        """Count floats of any shape, and give them with what exceeds `LOUDEST` clipped; NaN and infinities stay."""
        self.n += samples.size
        if max(samples.max(initial=0.0), -samples.min(initial=0.0)) <= LOUDEST:
            return samples
        magnitude = np.abs(samples)
        beyond = (magnitude > LOUDEST) & np.isfinite(samples)
        if not beyond.any():
            return samples
        self.n_beyond += int(beyond.sum())
        self.loudest = max(self.loudest, float(magnitude[beyond].max()))
        return np.where(beyond, np.copysign(LOUDEST, samples), samples).astype(samples.dtype)

    @property
    def mistake(self) -> str | None:
        """What is wrong where more than one sample in a thousand lies beyond, and what to do; else None."""
        if self.n_beyond <= _STRAY * max(self.n, self._n_least):
            return None
        found = (
            f"{self.n_beyond} of {self.n} samples exceed {LOUDEST:g} in magnitude, the largest is {self.loudest:g}; "
            "floats are in [-1, 1]"
        )
        for name, full in _SCALES:
            # Resampling and filters overshoot.
            if self.loudest <= 2 * full:
                return f"{found}. They are on the {name} scale, it seems: divide by {full}"
        return f"{found}. They are on no scale that is known"
