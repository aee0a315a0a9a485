"""Shards run to the end on clusters of any size, and mistakes come home as they were raised."""

import os

import pytest
import ray
from ray.cluster_utils import Cluster

from vaemo.cluster import runtime
from vaemo.errors import ClusterError, LabelError

pytestmark = pytest.mark.ray


def square():
    """The worker's class, made here so that it travels by value: workers cannot import a test module."""

    class Square:
        def __init__(self, power):
            self.power = power

        def __call__(self, shard):
            if shard["n"] < 0:
                raise LabelError(f"shard {shard['n']} is negative")
            return {"n": shard["n"] ** self.power, "pid": os.getpid(), "bytes": len(shard["payload"])}

    return Square


@pytest.fixture
def cluster(request):
    """Raylets with as many CPUs as the parameter says, one number for each node."""
    ray.shutdown()
    head, *others = request.param
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": head})
    for cpus in others:
        nodes.add_node(num_cpus=cpus)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    yield request.param
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.parametrize("cluster", [[1], [2], [16], [0, 2, 1]], indirect=True, ids=str)
def test_shards_run_without_deadlock(cluster):
    runtime.connect()
    pool = runtime.fit_pool()
    assert pool.workers == sum(cluster)
    for cpus in cluster:
        assert cpus == 0 or cpus - cpus * pool.cpus >= 1 or pool.cpus == 0
    shards = [{"n": n, "payload": b"x" * n} for n in range(3)]
    rows = list(runtime.run_shards(square(), {"power": 2}, shards))
    assert sorted((row["n"], row["bytes"]) for row in rows) == [(0, 0), (1, 1), (4, 2)]


def test_no_shards_need_no_cluster():
    assert list(runtime.run_shards(square(), {"power": 2}, [])) == []


def test_a_workers_mistake_comes_home(local_ray):
    runtime.connect()
    with pytest.raises(LabelError, match="shard -1 is negative"):
        list(runtime.run_shards(square(), {"power": 2}, [{"n": -1, "payload": b""}]))


def test_a_worker_that_cannot_start_is_a_bug_with_its_traceback(local_ray):
    runtime.connect()
    with pytest.raises(Exception, match="unexpected keyword argument 'nonsense'"):
        list(runtime.run_shards(square(), {"nonsense": 2}, [{"n": 1, "payload": b""}]))


def test_a_gpu_that_is_not_there_is_refused(local_ray):
    with pytest.raises(ClusterError, match=r"needs 1 GPU, and no node"):
        runtime.fit_pool(gpus=1)


@pytest.mark.parametrize("cluster", [[0]], indirect=True, ids=str)
def test_a_cluster_without_cpus_is_refused(cluster):
    with pytest.raises(ClusterError, match="no node of the Ray cluster has a CPU"):
        runtime.fit_pool()
