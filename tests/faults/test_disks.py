"""A full disk ends in one clear line and loses nothing; a full object store does not even end the job."""

import os
import subprocess

import numpy as np
import pytest
import ray
from extract_cases import CONFIG, expected_rows, parts, rows_of, write_corpus
from training_cases import train

import vaemo
from vaemo import files
from vaemo.cluster import runtime
from vaemo.cluster.tune import tune
from vaemo.config import Config
from vaemo.errors import StorageError
from vaemo.testing import linear_world, write_store

pytestmark = pytest.mark.ray

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system with room for some parts of a store, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *more):
        options = ",".join((*more, f"size={size}"))
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)

    made = mount("96k")
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder, lambda: mount("16m", "remount").check_returncode()
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_nothing(local_ray, disk, tmp_path):
    folder, enlarge = disk
    manifest, _ = write_corpus(tmp_path / "c", 40)
    with pytest.raises(
        StorageError, match=r"storage failed at .*part-.*: .*No space left on device.*run the same comm"
    ):
        vaemo.extract(config=CONFIG, out=str(folder), manifest=str(manifest))
    kept = parts(folder)
    assert 0 < len(kept) < 20
    assert 0 < len(rows_of(folder)) < 120
    # Nothing half written, hidden or not, takes the room that is needed.
    assert set(os.listdir(folder)) - {"_index", "summary.json"} == {*kept, "_vaemo.json"}

    enlarge()
    vaemo.extract(config=CONFIG, out=str(folder), manifest=str(manifest))
    assert rows_of(folder) == expected_rows(manifest)
    assert kept.items() <= parts(folder).items()


@pytest.mark.slow
def test_a_full_disk_ends_all_workers_of_a_training(local_ray, disk, tmp_path):
    folder, enlarge = disk
    world = linear_world(5, sessions=(40, 4, 2), lengths=(4, 8), features=3)
    store = write_store(world, str(tmp_path / "store"))
    config = Config.load("seed", ["model.d_c=8", "train.epochs=3", "train.min_labelled=32", "train.trackers=[]"])
    with pytest.raises(StorageError, match=r"storage failed at .*No space left on device.*run the same command again"):
        train(store, str(folder / "run"), config, workers=2)
    enlarge()
    summary = train(store, str(folder / "run"), config, workers=2)
    assert summary == train(store, str(tmp_path / "run"), config, workers=2)


@pytest.mark.slow
def test_a_full_disk_ends_a_sweep_and_fails_no_trial(local_ray, disk, tmp_path):
    folder, enlarge = disk
    world = linear_world(5, sessions=(40, 8, 0), lengths=(10, 30), features=6, noise=2.0)
    store = write_store(world, str(tmp_path / "store"))
    space = tmp_path / "space.yaml"
    space.write_text("model.alpha: {uniform: [0.3, 0.95]}\n")
    config = Config.load("default", ["model.d_c=4", "model.head_hidden=8", "updater.d_model=8", "train.epochs=3"])
    with pytest.raises(StorageError, match=r"storage failed.*No space left on device.*run the same command again"):
        tune(store, str(space), str(folder / "sweep"), config, trials=3, scheduler="none")
    enlarge()
    summary = tune(store, str(space), str(folder / "sweep"), config, trials=3, scheduler="none")
    assert (summary["done"], summary["failed"]) == (3, 0)


def test_a_disk_too_full_to_begin_says_so(disk, tmp_path):
    folder, _ = disk
    (folder / "film").write_bytes(bytes(96 << 10))
    with pytest.raises(StorageError, match="No space left on device"):
        files.write_json(folder / "out" / "_vaemo.json", {"a": "x" * 5000})
    assert not list((folder / "out").iterdir())


@pytest.mark.slow
def test_an_object_store_smaller_than_the_work_is_enough():
    """Shards of manifests carry their rows: all of them together may be larger than Ray's memory for objects."""
    ray.shutdown()
    ray.init(num_cpus=2, object_store_memory=80 * MIB, include_dashboard=False, log_to_driver=False)
    runtime.connect()

    class Measure:
        def __call__(self, shard):
            return {"n": shard["n"], "sum": int(np.frombuffer(shard["payload"], np.uint8).sum())}

    random = np.random.default_rng(0)
    payloads = [random.integers(0, 256, 10 * MIB, np.uint8) for _ in range(12)]
    shards = [{"n": n, "payload": payload.tobytes()} for n, payload in enumerate(payloads)]
    try:
        found = {row["n"]: row["sum"] for row in runtime.run_shards(Measure, {}, shards)}
    finally:
        ray.shutdown()
    assert found == {n: int(payload.sum()) for n, payload in enumerate(payloads)}
