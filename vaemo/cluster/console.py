"""What workers anywhere on the cluster say, printed by the driver as it stands, without Ray's own notes around it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import ray

from vaemo.cluster.nodes import driver_node
from vaemo.progress import say

POLL_S = 0.3


class Console:
    """Prints what `tell` is told, for as long as the context is open.

    Example:
        with Console() as console:
            run_somewhere(console.lines)  # there: tell(lines, "half way")
    """

    def __init__(self) -> None:
        self.lines: Any = ray.remote(num_cpus=0)(_Lines).options(scheduling_strategy=driver_node()).remote()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> Console:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        ray.kill(self.lines)

    def _print(self) -> None:
        last = False
        while not last:
            # Once more after closing: what was said last is still to be taken.
            last = self._closing.wait(POLL_S)
            for text in ray.get(self.lines.take.remote()):
                say(text)


def tell(lines: Any, text: str) -> None:
    """Have the driver print a line, from any process of the cluster; does not wait for it."""
    lines.put.remote(text)


class _Lines:
    def __init__(self) -> None:
        self._held: list[str] = []

    def put(self, text: str) -> None:
        self._held.append(text)

    def take(self) -> list[str]:
        held, self._held = self._held, []
        return held
