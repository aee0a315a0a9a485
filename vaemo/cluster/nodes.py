"""The nodes of a cluster: their resources, those the autoscaler may add, and the paths they can see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
import ray._private.state
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vaemo import files
from vaemo.data.manifest import file_of
from vaemo.errors import ClusterError, UsageError, named

_GROUP_LABEL = "ray.io/node-group"
_SHOWN = 3


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind.

    Attributes:
        resources: Of each of them.
        count: How many.
        alive: Whether they are there; else the autoscaler starts them when there is work.
    """

    resources: Mapping[str, float]
    count: int
    alive: bool

    @property
    def cpus(self) -> int:
        """Whole CPUs of one node."""
        return math.floor(self.resources.get("CPU", 0))


def capacity() -> list[Nodes]:
    """The nodes that are alive, and those that the cluster's autoscaler may add to them."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [Nodes(node["Resources"], 1, alive=True) for node in alive]
    # The autoscaler's state as Ray's own libraries read it.
    config = ray._private.state.state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        running = sum((node["Labels"] or {}).get(_GROUP_LABEL) == group.name for node in alive)
        if group.max_count > running:
            found.append(Nodes(dict(group.resources), group.max_count - running, alive=False))
    return found


def total(resource: str) -> float:
    """How much of a resource, `CPU` or `GPU`, the cluster has or may grow to."""
    return sum(nodes.count * nodes.resources.get(resource, 0.0) for nodes in capacity())


GPU_SHARE = 0.25
"""GPU share of each of several jobs: a session model is small, and four keep a GPU busy."""


@dataclass(frozen=True)
class Share:
    """A job's share of the cluster.

    Attributes:
        workers: Processes that compute it together, a CPU for each.
        gpus: Share of a GPU for each of them.
        at_once: Jobs that fit side by side.
    """

    workers: int
    gpus: float
    at_once: int

    @staticmethod
    def of(workers: int, gpus: float | None, jobs: int) -> Share:
        """The resources of each of a number of jobs.

        Args:
            workers: As above.
            gpus: As above; None is a whole GPU for a job alone, or for each of several workers where there are as many,
                a part of one for others.
            jobs: How many there are.

        Raises:
            UsageError: for a negative share.
            ClusterError: if the cluster is too small for one job.
        """
        cpus, there = int(total("CPU")), total("GPU")
        if cpus < workers:
            raise ClusterError(f"--workers {workers} need {workers} CPUs; the Ray cluster has {cpus}.")
        if gpus is not None and gpus < 0:
            raise UsageError(f"--gpus {gpus:g}: give a share of a GPU, 0 or more.")
        if gpus is None:
            gpus = GPU_SHARE if workers == 1 and jobs > 1 and there else float(there >= workers)
        fit = sum(
            nodes.count * min(nodes.cpus, math.floor(nodes.resources.get("GPU", 0.0) / gpus) if gpus else nodes.cpus)
            for nodes in capacity()
        )
        if fit < workers:
            raise ClusterError(
                f"--gpus {gpus:g} for each process, and the Ray cluster has {there:g} GPUs, on nodes with CPUs for "
                f"{fit} of {workers}."
            )
        return Share(workers, gpus, max(1, min(fit // workers, jobs)))


def driver_node() -> NodeAffinitySchedulingStrategy:
    """Places an actor on the driver's node, so that it does not depend on other nodes."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_visible(paths: Iterable[str], *, timeout_s: float = 120.0) -> None:
    """Refuse paths that the driver sees and a worker node does not, such as local disks or missing rights.

    Costs a task on every node, so it runs once per job. Nodes that join later are not checked.

    Args:
        paths: Files or folders; what is not there for the job itself is left out.
        timeout_s: A node that has not answered by then is skipped: it is lost, and its work goes elsewhere.

    Raises:
        ClusterError: naming the path and the nodes.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and (node["Resources"].keys() & {"CPU", "GPU"})
    ]
    wanted = sorted({path for path in map(file_of, paths) if files.exists(path)}) if others else []
    if not wanted:
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_unseen)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(wanted): (
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        )
        for node in others
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    blind: dict[str, list[str]] = {}
    for task in answered:
        try:
            unseen = ray.get(task)
        except RayTaskError:
            raise
        except RayError:
            continue
        for path in unseen:
            blind.setdefault(path, []).append(asked[task])
    for path, names in blind.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ClusterError(
            f"{named(path)} is there on this node, but not on {', '.join(sorted(names)[:_SHOWN])}{more}. Workers run "
            "on every node: give a path on storage that all of them mount, or a URI (s3://, gs://) that all of them "
            "may read."
        )


def _unseen(paths: Sequence[str]) -> list[str]:
    """The paths that do not exist for this process."""
    return [path for path in paths if not _seen(path)]


def _seen(path: str) -> bool:
    try:
        return files.exists(path)
    except OSError:
        return False
