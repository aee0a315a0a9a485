"""Words and scales that every stage shares: dimensions, streams, statuses, label scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DIMENSIONS = ("valence", "arousal")
"""The targets where `model.targets` names no others."""

STREAMS = ("speech", "prosody", "speaker")
"""The three feature streams of an utterance; any of them may be absent from a store."""

SPLITS = ("train", "dev", "test")

CALIB = "calib"
"""A further split, of sessions that intervals are calibrated on: never trained on, never asked when to stop."""

UNKNOWN, MIXED = "unknown", "mixed"
"""Roles of speech whose speaker is not known, and of a channel that holds all speakers."""

SAMPLING_RATE_HZ = 16_000
"""Every extractor receives mono float32 samples at this rate, in [-1, 1]."""

SAMPLING_RATES_HZ = (2_000, 768_000)
"""The lowest and the highest rate of what is heard."""

STATUSES = (
    "ok",
    "too_short",
    "too_long",
    "silent",
    "undecodable",
    "missing",
    "unreadable",
    "bad_channel",
    "nan_audio",
    "timeout",
    "not_scored_role",
    "archived",
    "duplicate",
    "withheld",
    "unfit",
    "damaged",
    "bad_voices",
)
"""What can become of an utterance; all but `ok` carry a reason and no features or scores."""

NOT_FAILED = ("ok", "not_scored_role", "silent", "duplicate", "withheld", "unfit", "damaged")
"""The statuses that are an outcome and no failure."""


@dataclass(frozen=True)
class LabelScale:
    """A closed range of label values, and the linear maps between two such ranges.

    Example:
        >>> LabelScale(1, 7).to(LabelScale(0, 1), 4.0)
        0.5
    """

    low: float
    high: float

    def to(self, other: LabelScale, value: Any) -> Any:
        """Map a number or an array from this range to `other`, linearly, without clipping."""
        return other.low + (value - self.low) * (other.width / self.width)

    @property
    def width(self) -> float:
        """High minus low."""
        return self.high - self.low

    @property
    def middle(self) -> float:
        """Halfway between low and high: the first feedback of a session."""
        return (self.low + self.high) / 2

    def contains(self, value: float) -> bool:
        """Whether a value lies in the closed range."""
        return self.low <= value <= self.high
