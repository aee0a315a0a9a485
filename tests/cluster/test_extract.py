"""Stores made on the cluster equal what the plain functions give, whatever is killed, and are made once."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from extract_cases import CONFIG, QUICK, expected_rows, parts, rows_of, write_corpus
from processes import kill, kill_job, meanwhile, start_job, workers
from ray.cluster_utils import Cluster

import vaemo
from vaemo import files
from vaemo.store import FeatureStore
from vaemo.units import STREAMS

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 10)


def test_a_store_holds_what_the_plain_functions_give(local_ray, corpus, tmp_path):
    manifest, rows = corpus
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest))
    assert rows_of(tmp_path / "out") == expected_rows(manifest)
    store = FeatureStore.open(str(tmp_path / "out"))
    assert dict(store.dims) == {"speech": 120, "speaker": 64}
    assert store.info["extractors"]["speech"]["name"] == "logmel"
    assert store.info["source"] == "manifest"
    assert store.read(["utt_id"]).num_rows == len(rows)
    for path in store.parts:
        sessions = pq.read_table(path, columns=["session_id"])["session_id"].to_pylist()
        assert len(sessions) == 6

    before = parts(tmp_path / "out")
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest))
    assert parts(tmp_path / "out") == before


def test_a_dry_run_says_what_it_would_do_and_does_nothing(local_ray, corpus, tmp_path, capsys):
    manifest, rows = corpus
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest), dry_run=True)
    said = capsys.readouterr().out
    assert "30 utterances, 0 of them finished; 5 parts to write." in said
    assert "x real time" in said
    assert "with 2 workers" in said
    assert not (tmp_path / "out").exists()

    broken = [{**row, "audio_path": "none.wav"} for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, broken)))
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(tmp_path / "m.jsonl"), dry_run=True)
    assert "would have no features" in capsys.readouterr().out


def wait_for_parts(out, n, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while len(list(Path(out).glob("part-*.parquet"))) < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_driver_costs_nothing(local_ray, tmp_path):
    """The cluster lives on, as after `ray job submit`."""
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"

    def start():
        address = ray.get_runtime_context().gcs_address
        return start_job("extract", "--manifest", manifest, "--out", out, overrides=QUICK, RAY_ADDRESS=address)

    kill_job(start(), due=lambda: len(parts(out)) >= 3)
    kept = parts(out)
    assert 3 <= len(kept) < 20
    again = start()
    said, complained = again.communicate(timeout=200)
    assert again.returncode == 0, complained
    assert {name: time for name, time in parts(out).items() if name in kept} == kept
    assert rows_of(out) == expected_rows(manifest)
    assert "40 sessions" in said


@pytest.mark.slow
def test_of_two_drivers_at_once_one_makes_the_store(local_ray, tmp_path):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    arguments = ("extract", "--manifest", manifest, "--out", tmp_path / "out")
    address = ray.get_runtime_context().gcs_address
    jobs = [start_job(*arguments, overrides=QUICK, RAY_ADDRESS=address) for _ in range(2)]
    complaints = [job.communicate(timeout=200)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 1], complaints
    (refused,) = [said for job, said in zip(jobs, complaints, strict=True) if job.returncode]
    assert "is being written by another run, on " in refused or "has just been taken by another run" in refused
    assert len(refused.strip().splitlines()) == 1
    assert rows_of(tmp_path / "out") == expected_rows(manifest)


def damage_index(out, rng, saved):
    """Take the index away, cut it short, put back an earlier one, or take parts away that it knows."""
    index = Path(out) / "_index"
    held = {path: path.read_bytes() for path in index.glob("*.parquet")}
    match rng.integers(4):
        case 0:
            shutil.rmtree(index, ignore_errors=True)
        case 1:
            for path, content in held.items():
                path.write_bytes(content[: rng.integers(len(content))])
        case 2:
            for path in held:
                path.unlink()
            for path, content in saved.items():
                path.write_bytes(content)
        case 3:
            for name in list(parts(out))[::3]:
                (Path(out) / name).unlink()
    saved |= held


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_drivers_killed_beside_an_index_that_is_damaged_cost_nothing(local_ray, tmp_path, seed):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out, rng, saved = tmp_path / "out", np.random.default_rng(seed), {}
    address = ray.get_runtime_context().gcs_address

    def start():
        return start_job("extract", "--manifest", manifest, "--out", out, overrides=QUICK, RAY_ADDRESS=address)

    for after in (6, 13, 20):
        kill_job(start(), due=lambda after=after: len(parts(out)) >= after, delay_s=rng.uniform(0, 0.5))
        damage_index(out, rng, saved)
    for _ in range(2):
        again = start()
        said, complained = again.communicate(timeout=200)
        assert again.returncode == 0, complained
        assert rows_of(out) == expected_rows(manifest)
    assert "nothing to do" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_drivers_killed_again_and_again_with_their_ray_cost_nothing(tmp_path, seed):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"
    rng = np.random.default_rng(seed)
    for after in sorted(rng.choice(np.arange(1, 18), 2, replace=False)):
        job = start_job("extract", "--manifest", manifest, "--out", out, overrides=QUICK)
        kill_job(job, due=lambda after=after: len(parts(out)) >= after)
    again = start_job("extract", "--manifest", manifest, "--out", out, overrides=QUICK)
    _, complained = again.communicate(timeout=200)
    assert again.returncode == 0, complained
    assert rows_of(out) == expected_rows(manifest)


def kill_workers(out, times, stop, killed):
    """Kill an actor of our own Ray each time another part is there, and note it."""
    for n in range(1, times + 1):
        while len(list(Path(out).glob("part-*.parquet"))) < n and not stop.is_set():
            time.sleep(0.01)
        for worker in workers("ray::MapWorker")[:1]:
            kill(worker)
            killed.append(worker)


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_workers_cost_nothing(local_ray, tmp_path, times):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"
    stop, killed = threading.Event(), []
    with meanwhile(kill_workers, out, times, stop, killed):
        vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest))
        stop.set()
    assert killed
    assert rows_of(out) == expected_rows(manifest)


@pytest.mark.slow
def test_manifest_audio_and_store_may_lie_on_s3(bucket, local_ray, corpus):
    manifest, rows = corpus
    for session in range(9):
        files.write_whole(f"{bucket}/in/{session}.wav", (manifest.parent / f"{session}.wav").read_bytes())
    files.write_whole(f"{bucket}/in/m.jsonl", manifest.read_bytes())
    lenient = CONFIG.replace({"extract": {"max_failed_fraction": 0.2}})
    vaemo.extract(config=lenient, out=f"{bucket}/store", manifest=f"{bucket}/in/m.jsonl")
    table = FeatureStore.open(f"{bucket}/store").read()
    expected = expected_rows(manifest)
    assert table.num_rows == len(rows)
    for row in table.to_pylist():
        if row["session_id"] == "s9":
            assert (row["status"], row["reason"]) == ("missing", "there is no such file")
        else:
            for stream in STREAMS[::2]:
                assert row[stream] == expected[row["utt_id"]][stream]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_lost_node_costs_nothing(tmp_path, seed):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    after = int(np.random.default_rng(seed).integers(1, 10))

    def lose_node():
        wait_for_parts(out, after)
        os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    try:
        with meanwhile(lose_node):
            vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest))
        assert rows_of(out) == expected_rows(manifest)
    finally:
        ray.shutdown()
        nodes.shutdown()
