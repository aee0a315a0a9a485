"""The jobs' executor on Ray: workers on every node, encoders where there are GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vaemo.cluster.encoders import encoder_stage
from vaemo.cluster.metrics import JobMetrics
from vaemo.cluster.runtime import connect, fit_pool, run_shards
from vaemo.pipeline.executors import Parts
from vaemo.training.jobs import Jobs


class OnRay:
    """Runs workers on the cluster that RAY_ADDRESS names, or on a Ray started on this machine.

    See `vaemo.pipeline.executors.Executor`.
    """

    def workers(self, most: int) -> int:
        """The number that fits the cluster at its largest."""
        connect()
        return min(fit_pool().most, most)

    def run(self, parts: Parts) -> Iterator[dict[str, Any]]:
        """What workers return for each shard, in the order of completion.

        Raises:
            ClusterError: if the cluster cannot run it, or makes no progress.
            VaemoError: what a worker raised first.
        """
        connect()
        with encoder_stage(parts.extractors, parts.config, len(parts.shards)) as encoders:
            metrics, arguments = JobMetrics(), {**parts.arguments, "ready": encoders}
            for made in run_shards(parts.worker, arguments, parts.shards, needs=parts.needs):
                metrics.add(made)
                yield made

    def train(self, jobs: Jobs, *, workers: int = 1) -> None:
        """Run jobs of training side by side: see `vaemo.cluster.jobs`."""
        # Ray Tune takes a second to import.
        from vaemo.cluster.jobs import run_jobs

        run_jobs(jobs, workers=workers)
