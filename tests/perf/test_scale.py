"""What more workers bring: the driver's own work at up to 1,000 of them, and throughput on 1, 2 and 3 nodes.

The first is simulated: the driver's real code runs, the workers are entries of a clock that turns as fast as it can, so
that Ray's own scheduling is not in it. The second is measured on nodes of one CPU each, on this machine.
"""

import heapq
import json
import os
import time
from dataclasses import asdict

import pytest
import ray
from extract_cases import CONFIG, parts, write_corpus
from ray.cluster_utils import Cluster
from scoring_cases import make_checkpoint, make_world, run
from timed import Timed

import vaemo
from vaemo.audio.archive import Listing
from vaemo.features import load_extractors
from vaemo.files import Found
from vaemo.parts.index import Entry, Index
from vaemo.pipeline import extraction
from vaemo.pipeline.sources import RecordingsSource
from vaemo.testing import write_store

pytestmark = [pytest.mark.perf, pytest.mark.timeout(3600)]

RECORDINGS_EACH = 1_000
"""Recordings for every worker of the simulation."""

CALL_S = 300.0
SPEED = 50.0
"""Length of a recording, and how many times faster than real time a worker extracts it."""


def counts_of(n):
    nothing = {"examples": {}, "heard": n, "lost": 0, "silent": 0, "audio_s": n * CALL_S}
    return {"statuses": {"ok": n}, "sessions": n, **nothing}


def entry_of(number, n):
    return asdict(Entry(f"part-{number}.parquet", 1, 1, "[]", "{}", json.dumps(counts_of(n))))


class Clock:
    """An executor whose workers take shards as they come free, in a time that passes in no time.

    Attributes:
        elapsed_s: How long the simulated cluster has worked.
        busy_s: How long workers were at work in it, all together.
    """

    def __init__(self, workers):
        self._workers = workers
        self.elapsed_s = self.busy_s = 0.0

    def run(self, parts):
        shards, running = iter(parts.shards), []
        for number, shard in zip(range(self._workers), shards, strict=False):
            heapq.heappush(running, self._begin(shard, number))
        while running:
            self.elapsed_s, number, counts = heapq.heappop(running)
            yield json.loads(counts)
            for shard in shards:
                heapq.heappush(running, self._begin(shard, number))
                break

    def _begin(self, shard, number):
        n = len(json.loads(shard["keys"]))
        work_s = n * CALL_S / SPEED
        self.busy_s += work_s
        return (
            self.elapsed_s + work_s,
            number,
            json.dumps({"units": n, "part": entry_of(number, n)}),
        )


def test_bookkeeping_does_not_grow_with_the_workers(tmp_path, monkeypatch, capsys):
    extractors = load_extractors(CONFIG.features)
    config = CONFIG.replace({"extract": {"shard_recordings": 8}})
    table = [
        "| workers | recordings | planned in, s | s a part | driver busy | workers busy |",
        "|---|---|---|---|---|---|",
    ]
    shares = {}
    for workers in (1, 10, 100, 1_000):
        recordings = [f"2026/{number // 1000:04d}/call-{number:07d}.wav" for number in range(workers * RECORDINGS_EACH)]
        found = [Found(name, f"/calls/{name}", 8_000 + number) for number, name in enumerate(recordings)]
        source = RecordingsSource("/calls")
        monkeypatch.setattr("vaemo.pipeline.sources.recordings.list_recordings", lambda *_, **__: Listing(found))  # noqa: B023
        start = time.perf_counter()
        index = Index(str(tmp_path / "none"))
        work = extraction.plan_extraction(source, source.list(), index, config)
        plan_s = time.perf_counter() - start
        clock = Clock(workers)
        start = time.perf_counter()
        extraction._extract_missing(source, work, index, config, extractors, clock)
        run_s = time.perf_counter() - start
        shares[workers] = (plan_s + run_s) / clock.elapsed_s
        table.append(
            f"| {workers:,} | {len(recordings):,} | {plan_s:.2f} | {run_s / len(work.shards):.1e} | "
            f"{shares[workers]:.2%} | {clock.busy_s / (workers * clock.elapsed_s):.1%} |"
        )
    with capsys.disabled():
        print("\n" + "\n".join(table))
    # The driver is one process: at its limit it would be busy all the time.
    assert shares[1_000] < 0.1


def test_throughput_on_one_two_and_three_nodes(tmp_path, capsys):
    manifest, _ = write_corpus(tmp_path / "c", 160, 5)
    config = CONFIG.replace({"features": {"prosody": "egemaps"}, "extract": {"shard_utterances": 25}})
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    store = write_store(make_world(sessions=1_200, lengths=(40, 80)), str(tmp_path / "store"), parts=30)
    table = ["| nodes of 1 CPU | extract, utterances/s | score, sessions/s |", "|---|---|---|"]
    rates = {}
    for count in (1, 2, 3):
        ray.shutdown()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(count - 1):
            nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
        try:
            extracting, scoring = Timed(), Timed()
            vaemo.extract(config=config, out=tmp_path / f"out{count}", manifest=manifest, executor=extracting)
            run(store, checkpoint, tmp_path / f"scores{count}", scoring, score={"shard_sessions": 40})
            extracted, scored = extracting.rate(), scoring.rate()
        finally:
            ray.shutdown()
            nodes.shutdown()
        assert len(parts(tmp_path / f"out{count}")) >= 30
        rates[count] = (extracted, scored)
        ratios = [rate / rates[1][column] for column, rate in enumerate(rates[count])]
        table.append(f"| {count} | {extracted:,.0f} ({ratios[0]:.2f}) | {scored:,.0f} ({ratios[1]:.2f}) |")
    with capsys.disabled():
        print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n" + "\n".join(table))
    assert rates[2][0] > 1.2 * rates[1][0]
