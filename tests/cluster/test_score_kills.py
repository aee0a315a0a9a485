"""Scoring on Ray: as in one process, and as undisturbed when driver, worker or node are killed."""

import os
import random
import time

import pytest
import ray
from commands import run_job_here
from processes import kill, meanwhile, start_job, workers
from ray.cluster_utils import Cluster
from scoring_cases import assert_close, make_checkpoint, make_world, rows_of, run, written

from vaemo import files
from vaemo.scores import read_sessions
from vaemo.testing import write_store

pytestmark = pytest.mark.ray

PARTS = 24
SETTINGS = ["score.lanes=4", "score.chunk=16", "score.shard_sessions=4", "extract.shard_recordings=2"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A store whose scoring takes some seconds, a checkpoint, and the undisturbed scores."""
    folder = tmp_path_factory.mktemp("archive")
    store = write_store(make_world(sessions=10 * PARTS, lengths=(40, 80)), str(folder / "store"), parts=PARTS)
    checkpoint = make_checkpoint(folder / "checkpoint")
    run(store, checkpoint, folder / "undisturbed")
    return store, checkpoint, folder / "undisturbed"


def assert_undisturbed(out, archive):
    assert_close(rows_of(out), rows_of(archive[2]))
    order = [("session_id", "ascending")]
    sessions, expected = (read_sessions(str(folder)).sort_by(order) for folder in (out, archive[2]))
    names = ["session_id", "role", "n_utterances", "n_scored", "n_failed", "talk_s", "run_id"]
    assert sessions.select(names).equals(expected.select(names))


def start_scoring(archive, out):
    """The command in a process of its own, on this process's Ray."""
    arguments = ["--input", archive[0], "--checkpoint", archive[1], "--out", out]
    return start_job("score", *arguments, overrides=SETTINGS, RAY_ADDRESS=ray.get_runtime_context().gcs_address)


def wait_for_parts(out, n, process=None):
    """Until so many parts are finished."""
    until = time.monotonic() + 120
    while len(files.list_files(str(out / "utterances"))) < n:
        assert time.monotonic() < until, "no part came"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
def test_the_cluster_scores_as_one_process_does(local_ray, archive, tmp_path):
    run(*archive[:2], tmp_path / "out", "ray")
    assert_undisturbed(tmp_path / "out", archive)


# Extraction, whose driver is killed in every run of the tests, makes its parts by the same code.
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_driver_loses_and_doubles_nothing(local_ray, archive, tmp_path, seed):
    out = tmp_path / "out"
    process = start_scoring(archive, out)
    wait_for_parts(out, 1, process)
    time.sleep(random.Random(seed).uniform(0, 1))
    process.kill()
    process.wait()
    # Workers outlive their driver for a moment: what they finish is kept, and not done again.
    before = written(out / "utterances")
    again = start_scoring(archive, out)
    _, complained = again.communicate(timeout=120)
    assert again.returncode == 0, complained
    after = written(out / "utterances")
    assert {path: after[path] for path in before} == before
    assert_undisturbed(out, archive)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_killed_worker_loses_and_doubles_nothing(local_ray, archive, tmp_path, seed):
    out, killed = tmp_path / "out", []

    def kill_one():
        wait_for_parts(out, 1)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        for worker in workers("ray::MapWorker")[:1]:
            kill(worker)
            killed.append(worker)

    with meanwhile(kill_one):
        run(*archive[:2], out, "ray")
    assert killed
    assert_undisturbed(out, archive)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_node_loses_and_doubles_nothing(archive, tmp_path, seed):
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    lost = nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    out, killed = tmp_path / "out", []

    def lose_node():
        wait_for_parts(out, 1)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        lost.kill_raylet()
        killed.append(lost)

    try:
        with meanwhile(lose_node):
            run(*archive[:2], out, "ray")
        assert killed
        assert_undisturbed(out, archive)
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_the_command_ends_with_the_right_exit_codes(archive, tmp_path):
    def code(*arguments):
        done = run_job_here("score", "--checkpoint", archive[1], "--out", tmp_path / "out", *arguments)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, message = code("--input", archive[0], "--set", "score.chunks=3")
    assert status == 2
    assert message.startswith("score.py: unknown config key 'score.chunks'. Did you mean score.chunk? Allowed: ")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    status, message = code("--input", archive[0])
    assert (status, "is not an output folder of this job" in message) == (1, True)
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
