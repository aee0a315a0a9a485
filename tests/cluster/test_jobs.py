"""Trainings side by side on Ray Tune: what a kill costs, what is never read back, and places for all of them."""

import dataclasses
import json
import pickle
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from processes import kill, kill_job, start_job, workers
from ray.cluster_utils import Cluster
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util import placement_group_table
from small_trainings import SMALL, write_small_store
from training_cases import train

from vaemo.cluster.jobs import _Run, run_jobs
from vaemo.cluster.nodes import Nodes, Share
from vaemo.config import Config
from vaemo.errors import ClusterError, StorageError, UsageError
from vaemo.training.jobs import Job, Jobs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_small_store(tmp_path_factory.mktemp("store"), (40, 8, 8), (10, 30), 6)


def a_gpu_and(cpus, nodes=1):
    return [Nodes({"CPU": float(cpus), "GPU": 1.0}, nodes, alive=True)]


@pytest.mark.parametrize(
    ("there", "workers", "gpus", "jobs", "share"),
    [
        (a_gpu_and(16), 1, None, 5, Share(1, 0.25, 4)),
        (a_gpu_and(16), 1, None, 1, Share(1, 1.0, 1)),
        (a_gpu_and(2), 1, None, 9, Share(1, 0.25, 2)),
        (a_gpu_and(16), 2, None, 5, Share(2, 0.0, 5)),
        (a_gpu_and(16, nodes=4), 2, None, 9, Share(2, 1.0, 2)),
        (a_gpu_and(16), 1, 0.0, 20, Share(1, 0.0, 16)),
        (a_gpu_and(16), 2, 0.5, 20, Share(2, 0.5, 1)),
        ([Nodes({"CPU": 3.0}, 2, alive=True), Nodes({"CPU": 4.0}, 1, alive=False)], 1, None, 20, Share(1, 0.0, 10)),
    ],
)
def test_jobs_share_what_a_cluster_has(monkeypatch, there, workers, gpus, jobs, share):
    """None of them waits for a GPU that another holds as long as it trains."""
    monkeypatch.setattr("vaemo.cluster.nodes.capacity", lambda: there)
    assert Share.of(workers, gpus, jobs) == share


@pytest.mark.parametrize(
    ("workers", "gpus", "error", "says"),
    [
        (17, None, ClusterError, "--workers 17 need 17 CPUs; the Ray cluster has 16"),
        (1, 2.0, ClusterError, "--gpus 2 for each process, and the Ray cluster has 1 GPUs"),
        (3, 0.5, ClusterError, "--gpus 0.5 for each process, .* on nodes with CPUs for 2 of 3"),
        (1, -1.0, UsageError, "--gpus -1: give a share of a GPU"),
    ],
)
def test_a_share_that_no_cluster_has(monkeypatch, workers, gpus, error, says):
    monkeypatch.setattr("vaemo.cluster.nodes.capacity", lambda: a_gpu_and(16))
    with pytest.raises(error, match=says):
        Share.of(workers, gpus, 5)


def jobs_of(n, folder, ended, epochs=4):
    """Jobs whose workers do as little as may be."""

    # Within, so that it travels to workers that do not know this file.
    def work(job, sessions, place):
        for step in range(epochs):
            time.sleep(0.05)
            yield {"step": step, "where": str(place.device), "sessions": sessions, "finished": False}
        yield {"step": epochs, "finished": True}

    made = [Job(number, f"job {number}", f"{folder}/{number}", Config()) for number in range(n)]
    return Jobs(work, made, lambda part: "packed", ended, n, f"{folder}/_ray")


def a_run(folder, ended, deaths=3):
    """What becomes of one job that is under way, and the job."""
    jobs = dataclasses.replace(jobs_of(1, str(folder), ended), deaths=deaths)
    run = _Run(jobs, SimpleNamespace(hold=lambda part: None, drop=lambda part: None))
    return run, run.next()


def test_a_job_has_failed_when_its_process_has_died_too_often_in_all_rounds(tmp_path):
    """That Ray Tune gives up a job of a lost node before its time is told by the tests of lost nodes."""
    failures = []
    run, job = a_run(tmp_path, lambda job, line, failure: failures.append(failure))
    for number, _ in enumerate(run.rounds()):
        assert run.next() is job, "what was given up goes on"
        run.died(job, 2, None)
        assert len(failures) == number
    assert failures[0].text == "its process died 4 times (unknown)"
    assert "its process died 4 times" in (tmp_path / "0" / "failure.txt").read_text()


def test_a_full_disk_of_the_driver_fails_no_job_and_ends_the_run(tmp_path):
    def full(job, line, failure):
        raise StorageError("storage failed: No space left on device")

    run, job = a_run(tmp_path, full)
    run.end(job, {"finished": True}, None)
    assert run.next() is None
    with pytest.raises(StorageError, match="No space left on device"):
        run.raise_held()


class Bomb:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (Path(self._path),)


def test_nothing_that_ray_has_left_is_read_back(store, local_ray, tmp_path):
    """Whoever may write into an output folder may not run a program as the one who goes on in it."""
    out, fuse = tmp_path / "run", tmp_path / "exploded"
    first = Config.load("default", [*SMALL, "train.epochs=1"])
    for name in ("", "jobs-0123456789ab"):
        folder = out / "_ray" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("tuner.pkl", "trainable.pkl", "searcher-state-0.pkl", "experiment_state-2026-01-01_00-00-00.json"):
            (folder / file).write_bytes(pickle.dumps(Bomb(fuse)))
    stranger = out / "_ray"
    moved = tmp_path / "aside"
    stranger.rename(moved)
    train(store, str(out), first, seeds=2)
    (out / "summary.json").unlink()
    (out / "seed-1" / "summary.json").unlink()
    moved.rename(stranger)
    train(store, str(out), first, seeds=2)
    assert not fuse.exists()
    assert not stranger.exists(), "Ray's bookkeeping is deleted at the end"


def finished(out):
    """What had ended: the summary of each training, the cells of a grid, the results of trials."""
    patterns = ("seed-*/summary.json", "fold-*/**/summary.json", "cells/*.parquet", "trials/*/result.json")
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in Path(out).glob(pattern)}


def space_of(folder):
    path = Path(folder, "space.yaml")
    path.write_text("train.lr: {choice: [5.0e-4, 1.0e-3, 2.0e-3, 4.0e-3]}\n")
    return str(path)


WORK = {
    "seeds": ["train", "--seeds", "4"],
    "folds": ["train", "--folds", "k=2", "--seeds", "2"],
    "grid": ["ablate", "--seeds", "1", "--only", "no-state,no-film,ridge"],
    "sweep": ["tune", "--search", "grid", "--scheduler", "none"],
}


def begin(what, store, folder):
    """A job that trains several times, in a process of its own on the Ray of this one."""
    name, *more = WORK[what]
    more += ["--space", space_of(folder)] if name == "tune" else []
    options = ["--store", store, "--out", Path(folder, "out"), *more]
    address = ray.get_runtime_context().gcs_address
    return start_job(name, *options, overrides=[*SMALL, "train.epochs=6"], RAY_ADDRESS=address)


def survive(what, victim, store, folder, chance):
    """Kill the driver with all below it, a worker or a node; run again; nothing that had ended is lost or done anew.

    Args:
        what: A key of `WORK`.
        victim: `driver`, `worker`, or a function that kills.
        store: The store.
        folder: Where the job may write.
        chance: Says when.
    """
    out = Path(folder, "out")
    job, due = begin(what, store, folder), chance.randrange(0, 3)
    if victim == "driver":
        kill_job(job, due=lambda: len(finished(out)) >= due, delay_s=chance.uniform(0, 2))
    else:
        deadline = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < deadline and len(finished(out)) < due:
            time.sleep(0.05)
        if victim != "worker":
            victim()
        elif found := workers("ImplicitFunc"):
            kill(chance.choice(found))
    before = finished(out)
    if victim == "driver":
        job = begin(what, store, folder)
    said, complained = job.communicate(timeout=280)
    assert job.returncode == 0, complained + said
    after = finished(out)
    assert len(after) >= 3
    assert before.items() <= after.items(), "what had ended was done again"
    assert not list(out.rglob("failure.txt"))
    epochs = [path.read_text().count("\n") for path in out.rglob("metrics.jsonl")]
    assert set(epochs) <= {6}


@pytest.mark.timeout(600)
def test_seeds_whose_driver_is_killed_go_on(store, local_ray, tmp_path):
    survive("seeds", "driver", store, tmp_path, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("what", WORK)
def test_killed_anywhere_and_run_again(store, local_ray, tmp_path, what, seed):
    chance = random.Random(seed)
    survive(what, chance.choice(["driver", "worker"]), store, tmp_path, chance)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", WORK)
def test_one_of_three_nodes_is_lost(store, tmp_path, what):
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second, _ = (nodes.add_node(num_cpus=1) for _ in range(2))
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    try:
        survive(what, second.all_processes["raylet"][0].process.kill, store, tmp_path, random.Random(1))
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", WORK)
def test_all_on_sixteen_cpus_and_a_gpu_that_ray_counts(store, tmp_path, what):
    """None waits for a GPU that another holds: a quarter each, four at a time."""
    ray.shutdown()
    ray.init(num_cpus=16, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        said, complained = begin(what, store, tmp_path).communicate(timeout=600)
    finally:
        ray.shutdown()
    assert re.search(r"\b[34] at a time\b", said), complained + said
    assert len(finished(tmp_path / "out")) >= 3


class StopsAll(FIFOScheduler):
    """Ends every job at its second line."""

    def on_trial_result(self, tune_controller, trial, result):
        return TrialScheduler.STOP if result.get("step", 0) >= 1 else TrialScheduler.CONTINUE


@pytest.fixture
def four_cpus():
    ray.shutdown()
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_jobs_of_two_workers_that_are_ended_early_leave_nothing(four_cpus, tmp_path):
    """In Ray 2.60 nobody frees what they had reserved where Ray Tune ends them: see `vaemo.cluster.jobs._Gently`."""
    lines = {}

    def ended(job, line, failure):
        assert failure is None, failure
        lines[job.number] = line

    run_jobs(jobs_of(20, str(tmp_path), ended, epochs=1000), workers=2, decide=StopsAll)
    assert sorted(lines) == list(range(20))
    assert all(line["step"] < 10 and not line["finished"] for line in lines.values())
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4:
        assert time.monotonic() < deadline, "CPUs are held by nobody"
        time.sleep(0.5)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_ended_early_on_one_worker_and_what_is_shared_is_there(local_ray, tmp_path):
    lines = {}
    run_jobs(
        jobs_of(3, str(tmp_path), lambda job, line, failure: lines.update({job.number: (line, failure)}), epochs=1000),
        decide=StopsAll,
    )
    assert sorted(lines) == [0, 1, 2]
    for line, failure in lines.values():
        assert failure is None
        assert (line["step"], line["sessions"], line["where"]) == (1, "packed", "cpu")
    assert json.dumps(lines[0][0]["finished"]) == "false"
