"""Several nodes do what one does, and what is left of them goes on when one is lost.

Lost nodes of extraction and scoring stand beside their other tests, `test_extract.py` and `test_score_kills.py`.
"""

import contextlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from processes import kill_tree
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from scoring_cases import assert_close, rows_of

from vaemo import files
from vaemo.cluster import extract
from vaemo.cluster import train as train_job
from vaemo.cluster.prepare import Request
from vaemo.cluster.score import score
from vaemo.cluster.train import train
from vaemo.config import Config
from vaemo.demo.corpus import make_corpus
from vaemo.errors import ClusterError
from vaemo.testing import linear_world, write_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

OTHER_WORLD_SIZE = 1e-4
"""float32 sums in another order, over some epochs."""

SMALL = ["model.d_c=8", "model.head_hidden=16", "updater.d_model=16", "train.min_labelled=32", "train.trackers=[]"]
QUICK = Config.load("default", [*SMALL, "train.epochs=6", "train.lanes=4"])


@contextlib.contextmanager
def raylets(*cpus):
    """A cluster with a node for each number of CPUs; the first is the head."""
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0]})
    for n in cpus[1:]:
        nodes.add_node(num_cpus=n)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def lose_a_node(nodes):
    """Kill the newest node as a machine that fails does, its workers with it: alone they would live on for a while."""
    kill_tree(nodes.list_all_nodes()[-1].all_processes["raylet"][0].process.pid)


def lines(out):
    path = Path(out, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(n, count, timeout_s=300.0):
    deadline = time.monotonic() + timeout_s
    while count() < n:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_course(out, expected):
    found, wanted = lines(out), lines(expected)
    assert len(found) == len(wanted) == QUICK.train.epochs
    for one, other in zip(found, wanted, strict=True):
        for name in ("train_loss", "dev_ccc_valence", "dev_ccc_arousal"):
            assert one[name] == pytest.approx(other[name], abs=OTHER_WORLD_SIZE), (one["epoch"], name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    world = linear_world(5, sessions=(240, 24, 6), lengths=(20, 60), features=8, noise=2.0)
    return write_store(world, str(tmp_path_factory.mktemp("store")))


@pytest.fixture
def undisturbed(store, local_ray, tmp_path):
    train(store, str(tmp_path / "undisturbed"), QUICK)
    return str(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_node_of_two_that_does_not_come_back_ends_training_clearly(undisturbed, store, tmp_path, monkeypatch):
    monkeypatch.setattr(train_job, "PLACE_TRY_S", 3.0)
    monkeypatch.setattr(train_job, "NO_PROGRESS_S", 6.0)
    out = str(tmp_path / "run")
    with raylets(1, 1) as nodes:

        def lose():
            wait_for(2, lambda: len(lines(out)))
            lose_a_node(nodes)

        loser = threading.Thread(target=lose)
        loser.start()
        with pytest.raises(ClusterError, match=r"2 workers found no place on the cluster for 6 s: a node was lost"):
            train(store, out, QUICK, workers=2)
        loser.join()
        assert 2 <= len(lines(out)) < QUICK.train.epochs
        # What the message says: the same command, with as many workers as there are nodes.
        train(store, out, QUICK, workers=1)
    assert_same_course(out, undisturbed)


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (ControllerError(TimeoutError("no place")), ClusterError, r"1 workers found no place on the cluster for 900 s"),
        (WorkerGroupError("died", {0: ActorDiedError()}), ClusterError, r"training workers have died 9 times"),
        (WorkerGroupError("bug", {0: ZeroDivisionError("a bug")}), WorkerGroupError, "bug"),
    ],
    ids=["no place", "dead workers", "a bug"],
)
def test_what_ends_a_run_of_ray_train_is_said(local_ray, store, tmp_path, monkeypatch, failure, raised, message):
    def fit(trainer):
        raise failure

    monkeypatch.setattr(train_job.TorchTrainer, "fit", fit)
    with pytest.raises(raised, match=message):
        train(store, str(tmp_path / "run"), QUICK)


@pytest.mark.slow
def test_a_node_that_is_replaced_costs_training_nothing(undisturbed, store, tmp_path):
    out, ended = str(tmp_path / "run"), []
    with raylets(1, 1) as nodes:
        job = threading.Thread(target=lambda: ended.append(train(store, out, QUICK, workers=2)))
        job.start()
        wait_for(2, lambda: len(lines(out)))
        lose_a_node(nodes)
        # Nodes are added by the main thread alone.
        nodes.add_node(num_cpus=1)
        job.join(600)
    assert ended
    assert_same_course(out, undisturbed)


def pipeline(manifest, out):
    """Every stage that a cluster runs, each on what the one before has written."""
    quick = Config.load("default", ["features.prosody=none", "extract.shard_utterances=12", *SMALL, "train.epochs=2"])
    extract.run(quick, f"{out}/store", manifest=manifest)
    train(f"{out}/store", f"{out}/run", quick, workers=2)
    score(Request(f"{out}/store", (f"{out}/run/best",), f"{out}/scores"), quick)


@pytest.mark.slow
def test_three_nodes_give_what_one_gives(tmp_path):
    manifest = str(make_corpus(tmp_path / "corpus", n_sessions=12))
    for name, cpus in (("one", [2]), ("three", [1, 1, 1])):
        with raylets(*cpus):
            pipeline(manifest, str(tmp_path / name))
    for folder in ("store", "scores/utterances", "scores/sessions"):
        one, three = (
            {path.rsplit("/", 1)[-1] for path in files.list_files(tmp_path / name / folder)}
            for name in ("one", "three")
        )
        assert one == three
    # Gradients are summed in the same order, by two workers each.
    one, three = (rows_of(tmp_path / name / "scores") for name in ("one", "three"))
    assert one.num_rows > 300
    assert_close(one.drop(["run_id"]), three.drop(["run_id"]))
    assert np.isfinite(one["valence"].to_numpy()).all()
