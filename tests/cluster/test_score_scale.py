"""Archives of a million calls: time and memory grow with them, linearly, and planning is quick."""

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

from vaemo import files
from vaemo.cluster.prepare import Request, Run
from vaemo.cluster.score import plan
from vaemo.cluster.sources import open_source
from vaemo.config import Config
from vaemo.scores import scan_utterances
from vaemo.scoring.roles import RoleRules

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

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
        scored = [part["session_id"] for part in scan_utterances(str(tmp_path / f"out{n}"), ["session_id"])]
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
    source = open_source(str(tmp_path))
    listing = source.list()
    request = Request(str(tmp_path), ("checkpoint",), str(tmp_path / "out"))
    run = Run(request, Config(), [], source, listing, RoleRules(), None, {}, None, None)
    shards, n_missing = plan(run)
    took_s, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capsys.disabled():
        print(f"\n1,000,000 recordings planned in {took_s:.1f} s, peak {peak / 2**30:.2f} GiB")
    assert (n_missing, len(shards)) == (1_000_000, 125_000)
    assert took_s < 60
    assert peak < 2e9
