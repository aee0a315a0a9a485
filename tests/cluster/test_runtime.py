"""Shards run to the end on clusters of any size, and mistakes come home as they were raised."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray
from announced import announce
from processes import kill_tree
from ray.cluster_utils import Cluster

from vaemo.cluster import nodes as cluster_nodes
from vaemo.cluster import runtime
from vaemo.errors import ClusterError, LabelError, StorageError
from vaemo.features import watch

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


def deadly():
    """A worker that one shard kills each time, as a crash in a library would."""

    class Deadly:
        def __call__(self, shard):
            if shard["n"] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"n": shard["n"]}

    return Deadly


def hanging():
    """A worker that one shard hangs, as native code would, unless it is careful."""

    class Hanging:
        def __call__(self, shard):
            with watch.watched(1.0):
                watch.begin_utterance()
                if shard["n"] == 1 and "careful" not in shard:
                    time.sleep(600)
            return {"n": shard["n"]}

    return Hanging


def asleep():
    """A worker that does not come to an end."""

    class Asleep:
        def __call__(self, shard):
            time.sleep(3600)

    return Asleep


def locked_out():
    """A worker whose storage refuses."""

    class LockedOut:
        def __call__(self, shard):
            raise PermissionError(13, "Permission denied", "/archive/a.parquet")

    return LockedOut


@pytest.fixture
def head():
    """A cluster whose head has no CPUs, and which has no other node yet."""
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_an_address_that_a_killed_head_left_costs_nothing(monkeypatch, tmp_path_factory, capsys):
    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short, for the sockets below it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        note = Path(folder, "ray", "ray_current_cluster")
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        runtime.connect()
        assert ray.cluster_resources()["CPU"] >= 1
        assert "127.0.0.1:1" in capsys.readouterr().out
        ray.shutdown()


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            ConnectionError("Failed to connect\nto Ray cluster"),
            ClusterError,
            "it failed: Failed to connect to Ray cluster",
        ),
        (RuntimeError("Version mismatch"), ClusterError, "it failed: Version mismatch"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), ClusterError, "it failed: AF_UNIX path length"),
        (
            OSError(28, "No space left on device", "/tmp/ray/x"),
            StorageError,
            "storage failed: .*No space left.*/tmp/ray/x",
        ),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(monkeypatch, error, kind, says):
    def init(*_, **__):
        raise error

    monkeypatch.setattr(ray, "init", init)
    for address in ("local", None, "127.0.0.1:6379"):
        with pytest.raises(kind, match=says) as refusal:
            runtime._init(address)
        assert "\n" not in str(refusal.value)


def test_a_ray_that_is_waited_for_is_not_waited_for_in_silence(monkeypatch, capsys):
    said = threading.Event()
    monkeypatch.setattr(runtime, "SILENCE_S", 0.01)
    monkeypatch.setattr(runtime, "say", lambda text: (print(text), said.set()))
    monkeypatch.setattr(ray, "init", lambda *_, **__: said.wait(60))
    runtime._init("127.0.0.1:6379")
    assert "waiting for the Ray cluster at 127.0.0.1:6379" in capsys.readouterr().out


def test_a_cluster_of_any_size_has_a_pool_that_does_not_deadlock(head, tmp_path):
    runtime.connect()
    with pytest.raises(ClusterError, match="no node of the Ray cluster has a CPU"):
        runtime.fit_pool()
    mine = f"/proc/self/task/{os.getpid()}"
    shards = [{"n": n, "payload": b"x" * n} for n in range(3)]
    cluster = []
    for cpus in (1, 2, 16):
        cluster.append(cpus)
        head.add_node(num_cpus=cpus)
        pool = runtime.fit_pool()
        assert pool.workers == sum(cluster)
        assert all(cpus - cpus * pool.cpus >= 1 or pool.cpus == 0 for cpus in cluster)
        rows = list(runtime.run_shards(square(), {"power": 2}, shards))
        assert sorted((row["n"], row["bytes"]) for row in rows) == [(0, 0), (1, 1), (4, 2)]
        cluster_nodes.check_visible([str(tmp_path), str(tmp_path / "not_yet_there")])
        with pytest.raises(
            ClusterError, match=rf"'{mine}' is there on this node, but not on .+ \([\d.]+\)\. Workers run on"
        ):
            cluster_nodes.check_visible([str(tmp_path), mine])


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


def test_a_shard_that_kills_its_worker_each_time_ends_the_job(local_ray, monkeypatch):
    monkeypatch.setattr(runtime, "MAX_ATTEMPTS", 2)
    runtime.connect()
    shards = [{"n": n, "name": f"part-{n}.parquet"} for n in range(3)]
    with pytest.raises(ClusterError, match=r"part part-1.parquet has ended its worker 2 times: .*Run the same"):
        list(runtime.run_shards(deadly(), {}, shards))


def test_a_worker_that_hangs_is_ended_and_its_shard_done_with_care(local_ray):
    runtime.connect()
    shards = [{"n": n, "name": f"part-{n}.parquet"} for n in range(3)]
    assert sorted(done["n"] for done in runtime.run_shards(hanging(), {}, shards)) == [0, 1, 2]


def test_storage_that_refuses_a_worker_is_a_mistake_that_comes_home(local_ray):
    runtime.connect()
    with pytest.raises(StorageError, match=r"Permission denied: '/archive/a.parquet'. No file is half written"):
        list(runtime.run_shards(locked_out(), {}, [{"n": 1}]))


def test_a_cluster_on_which_nothing_moves_is_not_waited_for(local_ray, monkeypatch):
    monkeypatch.setattr(runtime, "NO_PROGRESS_S", 2.0)
    runtime.connect()
    with pytest.raises(ClusterError, match=r"nothing moved on the cluster for 2 s: .*run the same command again"):
        list(runtime.run_shards(asleep(), {}, [{"n": 1}]))
    ray.shutdown()  # With it ends the worker that sleeps.


@pytest.mark.slow
def test_a_cluster_that_starts_from_nothing_is_waited_for():
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    try:
        runtime.connect()
        announce({"CPU": 2}, most=3)
        assert cluster_nodes.total("CPU") == 6
        assert runtime.fit_pool() == runtime.Pool(workers=1, most=6, cpus=0.5, gpus=0.0)
        shards, rows = [{"n": n, "payload": b""} for n in range(4)], []
        job = threading.Thread(target=lambda: rows.extend(runtime.run_shards(square(), {"power": 2}, shards)))
        job.start()
        job.join(3.0)
        assert job.is_alive()
        assert not rows
        nodes.add_node(num_cpus=2)
        job.join(60.0)
        assert sorted(row["n"] for row in rows) == [0, 1, 4, 9]
    finally:
        ray.shutdown()
        nodes.shutdown()


BLIND_NODE = """
mount --make-rprivate / && mount -t tmpfs tmpfs "$1" &&
exec "$2" start --address "$3" --num-cpus 1 --block --disable-usage-stats
"""


@pytest.fixture
def blind_node(tmp_path):
    """A second node that sees another, empty disk where `shared` lies."""
    shared = tmp_path / "shared"
    shared.mkdir()
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    command = ["unshare", "--mount", "sh", "-c", BLIND_NODE, "sh", shared]
    command += [Path(sys.executable).with_name("ray"), nodes.address]
    with (tmp_path / "node.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        while process.poll() is None and sum(node["Alive"] for node in ray.nodes()) < 2:
            time.sleep(0.1)
        if process.poll() is not None:
            pytest.skip(f"no node with a view of its own can be started here: {(tmp_path / 'node.log').read_text()}")
        yield shared
    finally:
        ray.shutdown()
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()
        nodes.shutdown()


@pytest.mark.slow
def test_a_path_that_one_node_does_not_see_is_refused_at_once(blind_node, tmp_path):
    runtime.connect()
    for folder in (blind_node, tmp_path):
        (folder / "_vaemo.json").write_text("{}")
    everywhere, nowhere = str(tmp_path / "_vaemo.json"), str(blind_node / "not_yet_there")
    cluster_nodes.check_visible([everywhere, nowhere])
    shards = [{"n": 1, "payload": b""}]
    with pytest.raises(
        ClusterError, match=r"/shared/_vaemo.json' is there on this node, but not on .+ \([\d.]+\)\. Work"
    ):
        list(runtime.run_shards(square(), {"power": 2}, shards, needs=[str(blind_node / "_vaemo.json"), everywhere]))
