"""How often work on each shard has begun. Imports nothing heavy: a process of its own counts."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts how often work on each shard has begun, on the job's own node: workers die, and forget.

    It also hands out what lies on that node.
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count once more; how often, this time included."""
        self._begun[number] += 1
        return self._begun[number]

    def rows(self, spooled: str) -> bytes:
        """Rows of a manifest that lie on this node, for a worker on another one."""
        from vaemo.data.spool import packed_rows

        return packed_rows({"rows": b"", "spooled": spooled})
