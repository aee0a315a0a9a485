"""Several nodes do what one does, and what is left of them goes on when one is lost.

Lost nodes of extraction and scoring stand beside their other tests, `test_extract.py` and `test_score_kills.py`.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from extract_cases import CONFIG as QUICK_EXTRACTION
from extract_cases import expected_rows, parts, write_corpus
from extract_cases import rows_of as stored_rows
from processes import kill_tree, meanwhile, workers
from ray.cluster_utils import Cluster
from scoring_cases import assert_close, rows_of
from small_trainings import write_space
from training_cases import train

import vaemo
from vaemo import files
from vaemo.cluster import group, jobs, runtime
from vaemo.cluster.tune import tune
from vaemo.config import Config
from vaemo.demo.corpus import make_corpus
from vaemo.errors import ClusterError
from vaemo.testing import linear_world, write_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

SAME_RUN = 1e-6
"""A run that was interrupted or made elsewhere: the same operations on the same machine."""
OTHER_WORLD_SIZE = 1e-4
"""float32 sums in another order, over some epochs."""
PATIENCE_S = 90.0
"""With a cluster on which nothing moves, not 15 minutes; longer than workers take to start on a busy machine."""

SMALL = ["model.d_c=8", "model.head_hidden=16", "updater.d_model=16", "train.min_labelled=32", "train.trackers=[]"]
SMALL += ["model.scan=chunk"]  # a second less in each process than loading the compiled one
QUICK = Config.load("default", [*SMALL, "train.epochs=6", "train.lanes=4"])


@contextlib.contextmanager
def raylets(*cpus):
    """A cluster with a node for each number of CPUs; the first is the head."""
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    try:
        for n in cpus[1:]:
            nodes.add_node(num_cpus=n)
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
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


def ended(sweep):
    """The files of what each trial gave, by its number."""
    return {path.parent.name: path.read_bytes() for path in Path(sweep, "trials").glob("*/result.json")}


def assert_same_trials(sweep, expected, tolerance):
    found, wanted = ({number: json.loads(held) for number, held in ended(out).items()} for out in (sweep, expected))
    assert found.keys() == wanted.keys()
    for number, record in found.items():
        assert (record["status"], record["point"]) == ("done", wanted[number]["point"])
        for name in ("dev_ccc_valence", "dev_ccc_arousal"):
            assert record["metrics"][name] == pytest.approx(wanted[number]["metrics"][name], abs=tolerance), number


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
    monkeypatch.setattr(group, "PLACE_TRY_S", 3.0)
    monkeypatch.setattr(jobs, "NO_PROGRESS_S", 6.0)
    out = str(tmp_path / "run")
    with raylets(1, 1) as nodes:

        def lose():
            wait_for(2, lambda: len(lines(out)))
            lose_a_node(nodes)

        refused = pytest.raises(
            ClusterError, match=r"no training found a place on the cluster for 6 s: a node was lost"
        )
        with meanwhile(lose), refused:
            train(store, out, QUICK, workers=2)
        assert 2 <= len(lines(out)) < QUICK.train.epochs
        # What the message says: the same command, with as many workers as there are nodes.
        train(store, out, QUICK, workers=1)
    assert_same_course(out, undisturbed)


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


SPACE = {"train.lr": {"choice": [5e-4, 1e-3, 2e-3, 4e-3]}}


def sweep_over(store, out, space, workers=1):
    return tune(store, space, out, QUICK, search="grid", scheduler="none", workers=workers)


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory):
    """A grid of trials to which nothing happens, and its space."""
    folder = tmp_path_factory.mktemp("swept")
    with raylets(2):
        sweep_over(store, str(folder / "sweep"), write_space(folder, SPACE))
    return str(folder / "sweep"), write_space(folder, SPACE)


def lose_a_node_in_a_sweep(nodes, out, seen):
    """Once a trial has ended, while others run on the node; what had ended by then, and who ran there, is noted."""
    wait_for(1, lambda: len(ended(out)))
    raylet = nodes.list_all_nodes()[-1].all_processes["raylet"][0].process.pid
    seen.extend([ended(out), workers("ImplicitFunc", raylet)])
    lose_a_node(nodes)


@pytest.mark.slow
def test_a_node_lost_in_a_sweep_costs_no_trial(swept, store, tmp_path):
    (expected, space), out, seen = swept, str(tmp_path / "sweep"), []
    with raylets(1, 1) as nodes, meanwhile(lose_a_node_in_a_sweep, nodes, out, seen):
        sweep_over(store, out, space)
    kept, killed = seen
    assert killed
    assert 0 < len(kept) < len(ended(expected))
    assert kept.items() <= ended(out).items()
    assert_same_trials(out, expected, SAME_RUN)


@pytest.mark.slow
@pytest.mark.parametrize(("cpus", "workers"), [((0, 1), 1), ((1, 1), 2)], ids=["one worker", "two workers"])
def test_a_sweep_that_finds_no_place_any_more_ends_clearly(swept, store, tmp_path, monkeypatch, cpus, workers):
    monkeypatch.setattr(jobs, "NO_PROGRESS_S", PATIENCE_S)
    (expected, space), out, seen = swept, str(tmp_path / "sweep"), []
    with raylets(*cpus) as nodes:
        refused = pytest.raises(
            ClusterError, match=r"no training found a place on the cluster for 90 s: a node was lost"
        )
        with meanwhile(lose_a_node_in_a_sweep, nodes, out, seen), refused:
            sweep_over(store, out, space, workers)
        kept = ended(out)
        assert seen[0].items() <= kept.items()
        assert 0 < len(kept) < len(ended(expected))
        # What the message says: the same command, once there is a place.
        if cpus == (0, 1):
            nodes.add_node(num_cpus=1)
        sweep_over(store, out, space, workers=1)
    assert kept.items() <= ended(out).items()
    assert_same_trials(out, expected, OTHER_WORLD_SIZE if workers > 1 else SAME_RUN)


@pytest.mark.slow
def test_an_extraction_whose_nodes_are_all_lost_ends_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "NO_PROGRESS_S", PATIENCE_S)
    manifest, _ = write_corpus(tmp_path / "corpus", 12)
    expected, out = expected_rows(manifest), tmp_path / "out"
    # The job is still at the last recording, a pipe into which nobody writes, when its node is lost.
    last, away = tmp_path / "corpus" / "11.wav", tmp_path / "away.wav"
    last.rename(away)
    os.mkfifo(last)
    with raylets(0, 1) as nodes:

        def lose():
            wait_for(2, lambda: len(parts(out)))
            lose_a_node(nodes)

        refused = pytest.raises(
            ClusterError, match=r"nothing moved on the cluster for 90 s: .*run the same command again"
        )
        with meanwhile(lose), refused:
            vaemo.extract(config=QUICK_EXTRACTION, out=str(out), manifest=str(manifest))
        kept = parts(out)
        assert 2 <= len(kept) < 6
        away.replace(last)
        nodes.add_node(num_cpus=1)
        vaemo.extract(config=QUICK_EXTRACTION, out=str(out), manifest=str(manifest))
    assert kept.items() <= parts(out).items()
    assert stored_rows(out) == expected


def pipeline(manifest, out, space):
    """Every stage that a cluster runs, each on what the one before has written."""
    quick = Config.load("default", ["features.prosody=none", "extract.shard_utterances=12", *SMALL, "train.epochs=2"])
    vaemo.extract(config=quick, out=f"{out}/store", manifest=manifest)
    train(f"{out}/store", f"{out}/run", quick, workers=2)
    tune(f"{out}/store", space, f"{out}/sweep", quick, trials=2, scheduler="none")
    vaemo.score(input=f"{out}/store", checkpoint=f"{out}/run/best", out=f"{out}/scores", config=quick)


@pytest.mark.slow
def test_three_nodes_give_what_one_gives(tmp_path):
    manifest = str(make_corpus(tmp_path / "corpus", n_sessions=12))
    for name, cpus in (("one", [2]), ("three", [1, 1, 1])):
        with raylets(*cpus):
            pipeline(manifest, str(tmp_path / name), write_space(tmp_path, SPACE))
    for folder in ("store", "scores/utterances", "scores/sessions"):
        one, three = (
            {path.rsplit("/", 1)[-1] for path in files.list_files(tmp_path / name / folder)}
            for name in ("one", "three")
        )
        assert one == three
    assert_same_trials(tmp_path / "three" / "sweep", tmp_path / "one" / "sweep", SAME_RUN)
    # Gradients are summed in the same order, by two workers each.
    one, three = (rows_of(tmp_path / name / "scores") for name in ("one", "three"))
    assert one.num_rows > 300
    assert_close(one.drop(["run_id"]), three.drop(["run_id"]))
    assert np.isfinite(one["valence"].to_numpy()).all()
