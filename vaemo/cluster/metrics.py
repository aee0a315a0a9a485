"""Metrics of a job for a cluster's monitoring, through Ray: see `docs/cluster.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter


class JobMetrics:
    """Counters of a job, reported by its driver: `vaemo_utterances` by status, `vaemo_audio_seconds`, `vaemo_parts`."""

    def __init__(self) -> None:
        self._utterances = Counter("vaemo_utterances", "Finished utterances, by status.", ("status",))
        self._audio_s = Counter("vaemo_audio_seconds", "Seconds of speech done.")
        self._parts = Counter("vaemo_parts", "Parts written.")

    def add(self, made: Mapping[str, Any]) -> None:
        """Count what a worker returned for a shard."""
        counts = json.loads(made["part"]["counts"])
        for status, n in counts["statuses"].items():
            _count(self._utterances, n, {"status": status})
        _count(self._audio_s, counts["audio_s"])
        _count(self._parts, 1)


class Seconds:
    """A counter of seconds spent, reported by the process that spends them.

    Args:
        name: Of the counter.
        description: What it counts.
    """

    def __init__(self, name: str, description: str) -> None:
        self._counter = Counter(name, description)

    def add(self, seconds: float) -> None:
        """Count seconds."""
        _count(self._counter, seconds)


def _count(counter: Counter, n: float, tags: dict[str, str] | None = None) -> None:
    # Ray does not accept zero.
    if n > 0:
        counter.inc(n, tags or {})
