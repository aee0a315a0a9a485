"""Counts of attempts per shard. Imports nothing heavy, because it runs in its own process."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts attempts per shard on the driver's node, because workers die and lose their counts.

    It also provides data that is on that node only.
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count one more attempt; returns the number so far."""
        self._begun[number] += 1
        return self._begun[number]

    def rows(self, spooled: str) -> bytes:
        """Rows of a manifest on this node, for a worker on another one."""
        from vaemo.data.spool import packed_rows

        return packed_rows({"rows": b"", "spooled": spooled})
