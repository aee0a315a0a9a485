"""Executors, which make the parts of a job: the protocol, and the executor in this process.

The other form, on a Ray cluster, is `vaemo.cluster.executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vaemo.config import Config
from vaemo.features import Extractor

if TYPE_CHECKING:
    from vaemo.training.jobs import Jobs


class Worker(Protocol):
    """Makes parts, one after the other; models, extractors and decoder are loaded once."""

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Make and write the part of a shard; returns facts for the driver, as JSON."""
        ...

    def close(self) -> None:
        """End the processes that belong to it."""
        ...


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts to make: the shards, and how workers make a part of each.

    Attributes:
        shards: Flat dicts of numbers, texts and bytes: light descriptions of work.
        worker: Made with `arguments`, and `ready`: extractors that need not be loaded, by stream.
        arguments: Keyword arguments of the worker.
        config: Sections extract and features.
        extractors: Extractors of the workers, by stream.
        needs: Paths that every worker reads or writes.
    """

    shards: Sequence[Mapping[str, Any]]
    worker: Callable[..., Worker]
    arguments: Mapping[str, Any]
    config: Config
    extractors: Mapping[str, Extractor]
    needs: Sequence[str] = ()


class Executor(Protocol):
    """Runs workers over shards, and jobs of training."""

    def workers(self, most: int) -> int:
        """How many workers would run side by side, `most` at most."""
        ...

    def run(self, parts: Parts) -> Iterator[dict[str, Any]]:
        """What workers return for each shard, in the order of completion.

        Raises:
            VaemoError: what a worker raised first.
        """
        ...

    def train(self, jobs: Jobs, *, workers: int = 1) -> None:
        """Run jobs of training.

        Args:
            jobs: The jobs, with callbacks.
            workers: Processes that compute one job together.

        Raises:
            ClusterError: if there are no resources for them.
            StorageError: if a disk is full or refuses.
        """
        ...


class InProcess:
    """Runs one worker in this process, one shard after the other; starts no Ray and changes no setting.

    An extractor that crashes ends this process: on Ray only its worker would end, and the utterance would be a row.
    """

    def workers(self, most: int) -> int:
        """One."""
        return min(most, 1)

    def run(self, parts: Parts) -> Iterator[dict[str, Any]]:
        """See `Executor.run`."""
        worker = parts.worker(**parts.arguments, ready=parts.extractors)
        try:
            yield from map(worker, parts.shards)
        finally:
            worker.close()

    def train(self, jobs: Jobs, *, workers: int = 1) -> None:
        """Run jobs one after the other; see `Executor.train`."""
        from vaemo.training.jobs import run_here

        run_here(jobs, workers=workers)
