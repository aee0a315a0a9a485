"""An actor on the driver's node for all workers: it prints their lines, holds their training data, and passes on
requests to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray

from vaemo.cluster.nodes import driver_node
from vaemo.progress import say

POLL_S = 0.3


class Desk:
    """Prints what workers `tell` it, and holds what they `fetch`, for as long as the context is open.

    The data is in Ray's object store, once per node; it is packed when the first job of its part begins.

    Args:
        pack: What the jobs of a part learn from.
    """

    def __init__(self, pack: Callable[[str | None], Any]) -> None:
        self.actor: Any = ray.remote(num_cpus=0)(_Desk).options(scheduling_strategy=driver_node()).remote()
        self._pack = pack
        self._held: set[str | None] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        ray.kill(self.actor)

    def hold(self, part: str | None) -> None:
        """Provide the training data of a part's jobs."""
        if part not in self._held:
            # Inside a list it stays a reference, which the actor does not resolve.
            ray.get(self.actor.hold.remote(part, [ray.put(self._pack(part))]))
            self._held.add(part)

    def drop(self, part: str | None) -> None:
        """Release it: no job of the part is left."""
        self._held.discard(part)
        self.actor.drop.remote(part)

    def _print(self) -> None:
        last = False
        while not last:
            # Once more after closing, to print the last lines.
            last = self._closing.wait(POLL_S)
            for text in ray.get(self.actor.take.remote()):
                say(text)


def tell(desk: Any, text: str) -> None:
    """Have the driver print a line, from any process of the cluster; does not wait for it."""
    desk.put.remote(text)


def ask_to_stop(desk: Any, number: int) -> None:
    """Ask the workers of a job to stop after the current epoch."""
    desk.ask_to_stop.remote(number)


def asked_to_stop(desk: Any, number: int) -> bool:
    """Whether the workers of a job are asked to stop."""
    return bool(ray.get(desk.asked_to_stop.remote(number)))


def fetch(desk: Any, part: str | None) -> Any:
    """The training data of a part's jobs, on this node."""
    (held,) = ray.get(desk.look.remote(part))
    return ray.get(held)


class _Desk:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._parts: dict[str | None, list[Any]] = {}
        self._stopping: set[int] = set()

    def put(self, text: str) -> None:
        self._lines.append(text)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken

    def ask_to_stop(self, number: int) -> None:
        self._stopping.add(number)

    def asked_to_stop(self, number: int) -> bool:
        return number in self._stopping

    def hold(self, part: str | None, held: list[Any]) -> None:
        self._parts[part] = held

    def look(self, part: str | None) -> list[Any]:
        return self._parts[part]

    def drop(self, part: str | None) -> None:
        self._parts.pop(part, None)
