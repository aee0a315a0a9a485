"""Stores made on the cluster equal what the plain functions give, whatever is killed, and are made once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile
from extract_cases import CONFIG, QUICK, expected_rows, parts, rows_of, write_corpus, write_rows
from processes import kill, kill_tree, workers
from ray.cluster_utils import Cluster
from speech_cases import call

from vaemo.cluster import extract
from vaemo.config import Config
from vaemo.errors import OtherRunError, ReadManifestError, ReadRecordingsError, TooManyFailuresError
from vaemo.extract import extract_recording
from vaemo.features import load_extractors
from vaemo.store import FeatureStore
from vaemo.units import STREAMS

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
DRIVER = """
import runpy, sys, ray
cpus, sys.argv = int(sys.argv[1]), ["extract.py", *sys.argv[2:]]
ray.init(num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
runpy.run_path("jobs/extract.py", run_name="__main__")
"""


def start_job(*arguments, cpus, env=None):
    """`jobs/extract.py` in a process of its own, on a Ray with so many logical CPUs."""
    settings = [part for item in QUICK for part in ("--set", item)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(cpus), *map(str, arguments), *settings],
        cwd=ROOT,
        env={**os.environ, **(env or {}), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 10)


def test_a_store_holds_what_the_plain_functions_give(local_ray, corpus, tmp_path):
    manifest, rows = corpus
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest))
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
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest))
    assert parts(tmp_path / "out") == before


def test_recordings_are_extracted_once_and_others_passed_over(local_ray, tmp_path):
    folder = tmp_path / "calls"
    (folder / "deep").mkdir(parents=True)
    samples, _ = call(4, seed=1)
    soundfile.write(folder / "a.wav", samples.T, 16000)
    soundfile.write(folder / "deep" / "b.FLAC", samples.T, 16000, format="FLAC")
    (folder / "broken.wav").write_text("no audio")
    (folder / "notes.txt").write_text("no recording")
    config = CONFIG.replace({"extract": {"max_failed_fraction": 0.5}})
    extract.run(config, str(tmp_path / "out"), folder=str(folder))
    found = rows_of(tmp_path / "out")
    extractors = load_extractors(config.features)
    for name in ("a.wav", "deep/b.FLAC", "broken.wav"):
        table = extract_recording(str(folder / name), name, extractors=extractors, config=config)
        assert table.to_pylist() == [row for row in found.values() if row["session_id"] == name]
    assert {row["session_id"] for row in found.values()} == {"a.wav", "deep/b.FLAC", "broken.wav"}

    before = parts(tmp_path / "out")
    soundfile.write(folder / "c.wav", samples.T, 16000)
    extract.run(config, str(tmp_path / "out"), folder=str(folder))
    after = parts(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_a_grown_manifest_adds_its_new_sessions_alone(local_ray, tmp_path):
    manifest, rows = write_corpus(tmp_path / "c", 7)
    write_rows(tmp_path / "c", rows[:9])
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest))
    before = parts(tmp_path / "out")
    write_rows(tmp_path / "c", rows)
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest))
    after = parts(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert rows_of(tmp_path / "out") == expected_rows(manifest)

    write_rows(tmp_path / "c", [{**rows[0], "valence": 0.75}, *rows[1:], {**rows[0], "utt_id": "x", "session_id": "x"}])
    with pytest.raises(OtherRunError, match=r"session 's0' is finished in .*, but its utterances have changed"):
        extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest))


def test_another_config_on_the_same_folder_is_refused_with_what_differs(local_ray, corpus, tmp_path):
    manifest, _ = corpus
    out = str(tmp_path / "out")
    extract.run(CONFIG, out, manifest=str(manifest), limit=1)
    before = parts(out)
    other = CONFIG.replace({"audio": {"simulate_telephone": True}})
    with pytest.raises(OtherRunError, match=r"audio.simulate_telephone was False, is now True"):
        extract.run(other, out, manifest=str(manifest))
    assert parts(out) == before
    # What cannot change a row may change.
    harmless = CONFIG.replace(
        {"extract": {"batch_s": 5.0}, "features": {"opensmile_license": "research", "speaker_aggregation": "enrolled"}}
    )
    extract.run(harmless, out, manifest=str(manifest), limit=1)


def test_a_limit_takes_whole_sessions_and_the_rest_follows(local_ray, corpus, tmp_path):
    manifest, _ = corpus
    out = tmp_path / "out"
    extract.run(CONFIG, str(out), manifest=str(manifest), limit=4)
    assert len(rows_of(out)) == 6
    extract.run(CONFIG, str(out), manifest=str(manifest), limit=10)
    assert len(rows_of(out)) == 12
    extract.run(CONFIG, str(out), manifest=str(manifest))
    assert rows_of(out) == expected_rows(manifest)


def test_failures_are_rows_then_an_error_then_tried_again(local_ray, tmp_path, capsys):
    manifest, _rows = write_corpus(tmp_path / "c", 6)
    away = tmp_path / "away.wav"
    (tmp_path / "c" / "2.wav").rename(away)
    out = tmp_path / "out"
    with pytest.raises(TooManyFailuresError, match=r"3 of 18 utterances failed \(16.7%\).*allows 5.0%"):
        extract.run(CONFIG, str(out), manifest=str(manifest))
    assert "3  missing      such as s2-0: there is no such file" in capsys.readouterr().out
    broken = rows_of(out)
    assert [row["utt_id"] for row in broken.values() if row["status"] == "missing"] == ["s2-0", "s2-1", "s2-2"]
    before = parts(out)

    lenient = CONFIG.replace({"extract": {"max_failed_fraction": 0.2}})
    extract.run(lenient, str(out), manifest=str(manifest))
    assert parts(out) == before

    away.rename(tmp_path / "c" / "2.wav")
    extract.run(CONFIG, str(out), manifest=str(manifest), retry=True)
    after = parts(out)
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in after) == 1
    assert rows_of(out) == expected_rows(manifest)
    # Its parts still say which sessions they hold.
    extract.run(CONFIG, str(out), manifest=str(manifest))
    assert parts(out) == after


def test_failed_recordings_are_tried_again_whole(local_ray, tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    samples, _ = call(3, seed=2)
    soundfile.write(folder / "a.wav", samples.T, 16000)
    (folder / "b.wav").write_bytes(b"")
    config = CONFIG.replace({"extract": {"max_failed_fraction": 1.0, "shard_recordings": 2}})
    extract.run(config, str(tmp_path / "out"), folder=str(folder))
    assert rows_of(tmp_path / "out")["b.wav#c0-00000"]["status"] == "undecodable"
    soundfile.write(folder / "b.wav", samples.T, 16000)
    extract.run(config, str(tmp_path / "out"), folder=str(folder), retry=True)
    found = rows_of(tmp_path / "out")
    assert {row["status"] for row in found.values()} == {"ok"}
    assert len({row["session_id"] for row in found.values()}) == 2


def test_a_dry_run_says_what_it_would_do_and_does_nothing(local_ray, corpus, tmp_path, capsys):
    manifest, rows = corpus
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(manifest), dry_run=True)
    said = capsys.readouterr().out
    assert "30 utterances, 0 of them finished; 5 parts to write." in said
    assert "x real time" in said
    assert "with 2 workers" in said
    assert not (tmp_path / "out").exists()

    broken = [{**row, "audio_path": "none.wav"} for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, broken)))
    extract.run(CONFIG, str(tmp_path / "out"), manifest=str(tmp_path / "m.jsonl"), dry_run=True)
    assert "would have no features" in capsys.readouterr().out


def test_input_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(ReadManifestError, match="there is no manifest"):
        extract.run(CONFIG, str(tmp_path / "out"), manifest=str(tmp_path / "m.jsonl"))
    with pytest.raises(ReadRecordingsError, match="does not exist"):
        extract.run(CONFIG, str(tmp_path / "out"), folder=str(tmp_path / "none"))
    (tmp_path / "x").mkdir()
    with pytest.raises(ReadRecordingsError, match=r"holds no recordings; files are taken that end in .wav"):
        extract.run(CONFIG, str(tmp_path / "out"), folder=str(tmp_path / "x"))
    assert not (tmp_path / "out").exists()


def test_the_licence_of_opensmile_is_asked_for(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract, "estimate", lambda *_: None)
    base = Config.load("default")
    extract.run(base, str(tmp_path / "out"), manifest=str(corpus[0]), dry_run=True)
    assert "features.opensmile_license=research (or commercial)" in capsys.readouterr().out
    stated = base.replace({"features": {"opensmile_license": "research"}})
    extract.run(stated, str(tmp_path / "out"), manifest=str(corpus[0]), dry_run=True)
    assert capsys.readouterr().out == ""


def wait_for_parts(out, n, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while len(list(Path(out).glob("part-*.parquet"))) < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_driver(manifest, out, after_parts):
    """Start the job and kill everything that it started once so many parts are there."""
    job = start_job("--manifest", manifest, "--out", out, cpus=2)
    try:
        wait_for_parts(out, after_parts)
    finally:
        kill_tree(job.pid)
        job.communicate()


@pytest.mark.parametrize("cpus", [1])
def test_a_killed_driver_costs_nothing(tmp_path, cpus):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"
    kill_driver(manifest, out, 3)
    kept = parts(out)
    assert 3 <= len(kept) < 20
    again = start_job("--manifest", manifest, "--out", out, cpus=cpus)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert {name: time for name, time in parts(out).items() if name in kept} == kept
    assert rows_of(out) == expected_rows(manifest)
    assert "40 sessions" in output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_drivers_killed_again_and_again_cost_nothing(tmp_path, seed):
    manifest, _ = write_corpus(tmp_path / "c", 40)
    out = tmp_path / "out"
    rng = np.random.default_rng(seed)
    for after in sorted(rng.choice(np.arange(1, 18), 2, replace=False)):
        kill_driver(manifest, out, int(after))
    again = start_job("--manifest", manifest, "--out", out, cpus=2)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
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
    killer = threading.Thread(target=kill_workers, args=(out, times, stop, killed))
    killer.start()
    extract.run(CONFIG, str(out), manifest=str(manifest))
    stop.set()
    killer.join()
    assert killed
    assert rows_of(out) == expected_rows(manifest)


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

    killer = threading.Thread(target=lose_node)
    try:
        killer.start()
        extract.run(CONFIG, str(out), manifest=str(manifest))
        killer.join()
        assert rows_of(out) == expected_rows(manifest)
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def bucket(monkeypatch):
    """An S3 of this machine, its address and keys in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="calls")
    yield client, settings
    server.stop()


def test_manifest_audio_and_store_may_lie_on_s3(bucket, corpus, tmp_path):
    client, settings = bucket
    manifest, rows = corpus
    for session in range(9):
        client.upload_file(str(manifest.parent / f"{session}.wav"), "calls", f"in/{session}.wav")
    client.upload_file(str(manifest), "calls", "in/m.jsonl")
    arguments = ("--manifest", "s3://calls/in/m.jsonl", "--out", "s3://calls/store")
    job = start_job(*arguments, "--set", "extract.max_failed_fraction=0.2", cpus=3, env=settings)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    store = FeatureStore.open("s3://calls/store")
    table = store.read()
    expected = expected_rows(manifest)
    assert table.num_rows == len(rows)
    for row in table.to_pylist():
        if row["session_id"] == "s9":
            assert (row["status"], row["reason"]) == ("missing", "there is no such file")
        else:
            for stream in STREAMS[::2]:
                assert row[stream] == expected[row["utt_id"]][stream]
