"""Archives of a million calls: time and memory grow with them, linearly, and planning and summing up are quick.

Whole jobs are timed, Ray's start included: the machine must have nothing else to do from the first to the last.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from processes import memory, watching, workers
from scoring_cases import make_checkpoint

from vaemo import files, scores
from vaemo.config import Config, ScoreConfig
from vaemo.parts.index import Index
from vaemo.pipeline.prepare import Request, Run
from vaemo.pipeline.scoring import plan_scoring
from vaemo.pipeline.sources import open_source
from vaemo.scoring.roles import RoleRules

pytestmark = [pytest.mark.perf, pytest.mark.ray, pytest.mark.timeout(3600)]

JOB = Path(__file__).parents[2] / "jobs" / "score.py"
PART = 20_000


def write_short_sessions(path, n):
    """So many sessions of one utterance each."""
    random = np.random.default_rng(0)
    for first in range(0, n, PART):
        size = min(PART, n - first)
        ids = [f"call-{number:07d}" for number in range(first, first + size)]
        vectors = pa.array(random.standard_normal(size * 40).astype(np.float32))
        table = pa.table(
            {
                "session_id": ids,
                "utt_id": [f"{name}-0" for name in ids],
                "start_s": np.zeros(size),
                "end_s": np.full(size, 3.0),
                "speech": pa.FixedSizeListArray.from_arrays(vectors, 40),
            }
        )
        files.write_parquet_whole(files.join(str(path), f"part-{first:07d}.parquet"), table)


def largest_worker(pid):
    return max((memory(worker.pid) for worker in workers("ray::MapWorker", pid)), default=0)


def test_a_million_sessions_take_ten_times_a_hundred_thousand(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config={}, dims={"speech": 40})
    took_s, peak_bytes = {}, {}
    for n in (10_000, 100_000, 1_000_000):
        write_short_sessions(tmp_path / f"store{n}", n)
        command = [sys.executable, str(JOB), "--input", str(tmp_path / f"store{n}"), "--checkpoint", checkpoint]
        start = time.perf_counter()
        job = subprocess.Popen([*command, "--out", str(tmp_path / f"out{n}")], stderr=subprocess.DEVNULL)
        with watching(lambda pid=job.pid: largest_worker(pid), every_s=1.0) as seen:
            _, status, usage = os.wait4(job.pid, 0)
        assert status == 0
        took_s[n], peak_bytes[n] = time.perf_counter() - start, usage.ru_maxrss * 1024
        scored = [part["session_id"] for part in scores.scan_utterances(str(tmp_path / f"out{n}"), ["session_id"])]
        ids = pa.chunked_array([chunk for column in scored for chunk in column.chunks])
        assert len(ids) == len(ids.unique()) == n
        with capsys.disabled():
            print(
                f"\n{n:,} sessions: {took_s[n]:.0f} s, driver's peak {peak_bytes[n] / 2**30:.2f} GiB, "
                f"a worker's (PSS) {max(seen) / 2**30:.2f} GiB"
            )
    per_session_s = (took_s[100_000] - took_s[10_000]) / 90_000
    assert took_s[1_000_000] < took_s[10_000] + 1.5 * per_session_s * 990_000
    per_session_bytes = 2_000
    assert peak_bytes[1_000_000] < peak_bytes[10_000] + per_session_bytes * 990_000


def test_a_million_recordings_are_planned_in_a_minute(tmp_path, capsys):
    for folder in range(1000):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(1000):
            os.mknod(tmp_path / f"{folder:03d}" / f"call-{number:03d}.wav")
    start = time.perf_counter()
    source = open_source(str(tmp_path), Config())
    listing = source.list()
    request = Request(str(tmp_path), ("checkpoint",), str(tmp_path / "out"))
    run = Run(request, Config(), [], source, listing, RoleRules(), None, {}, None, None)
    work = plan_scoring(run, Index.open(str(tmp_path / "out")))
    took_s, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capsys.disabled():
        print(f"\n1,000,000 recordings planned in {took_s:.1f} s, peak {peak / 2**30:.2f} GiB")
    assert (work.n_sessions, len(work.shards)) == (1_000_000, 125_000)
    assert took_s < 60
    assert peak < 2e9


def test_summing_up_two_hundred_thousand_sessions_against_one_after_the_other():
    n, turns, sample = 200_000, 12, 200
    random = np.random.default_rng(0)
    start_s = np.tile(20.0 * np.arange(turns), n)
    rows = {
        "session_id": np.repeat([f"call-{number:06d}" for number in range(n)], turns),
        "utt_id": [f"u-{number}" for number in range(n * turns)],
        "role": np.tile(["customer", "agent"], n * turns // 2),
        "position": np.tile(np.arange(turns), n),
        "start_s": start_s,
        "end_s": start_s + random.uniform(0.3, 6, n * turns),
        "valence": random.random(n * turns),
        "arousal": random.random(n * turns),
        "status": ["ok"] * (n * turns),
    }
    table = scores.conform(pa.table(rows))
    start = time.perf_counter()
    summary = scores.summarise_sessions(table, ScoreConfig())
    together_s = (time.perf_counter() - start) / n
    start = time.perf_counter()
    alone = [scores.summarise_sessions(table.slice(number * turns, turns), ScoreConfig()) for number in range(sample)]
    alone_s = (time.perf_counter() - start) / sample
    assert summary.num_rows == 2 * n
    assert summary.slice(0, 2 * sample).equals(pa.concat_tables(alone))
    ratio = alone_s / together_s
    print(f"\n{1e6 * together_s:.0f} us a session, alone {1e6 * alone_s:.0f} us: {ratio:.0f} times faster")
    assert ratio > 20
