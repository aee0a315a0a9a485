"""What it costs the driver to plan a manifest of millions of utterances, and to list a bucket of a million objects.

A plan is made as the job makes it, up to the first part that a worker would get; what workers do is not in it.
`VAEMO_PLAN_UTTERANCES` (10,000,000) says how many.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.perf, pytest.mark.timeout(3600)]

UTTERANCES, EACH = int(os.environ.get("VAEMO_PLAN_UTTERANCES", "10000000")), 50
BLOCK = 100_000

RUN = """
import json, resource, sys, time
start = time.perf_counter()
from vaemo.config import Config
from vaemo.parts.index import Index
from vaemo.pipeline.extraction import plan_extraction
from vaemo.pipeline.sources import open_source

config = Config().replace({"features": {"prosody": "none"}})
source = open_source(sys.argv[1], config)
listing = source.list()
listed_s = time.perf_counter() - start
work = plan_extraction(source, listing, Index(sys.argv[2]), config)
first = work.shards[0]
begun_s = time.perf_counter() - start
n_bytes = sum(sum(len(value) for value in shard.values()) for shard in work.shards)
print(json.dumps({"listed_s": listed_s, "begun_s": begun_s, "all_s": time.perf_counter() - start,
                  "parts": len(work.shards), "mb": n_bytes / 1e6,
                  "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def blocks(n):
    """Rows of a manifest as corpora have them: long paths, times, labels; sessions of `EACH` utterances."""
    rng = np.random.default_rng(0)
    for first in range(0, n, BLOCK):
        row = np.arange(first, min(first + BLOCK, n))
        session = row // EACH
        yield pa.table(
            {
                "utt_id": [f"call-{s:08d}-{r % EACH:04d}" for s, r in zip(session, row, strict=True)],
                "session_id": [f"call-{s:08d}" for s in session],
                "speaker_id": [f"speaker-{s % 9973:05d}-{r % 2}" for s, r in zip(session, row, strict=True)],
                "audio_path": [f"/archive/calls/2026/{s % 365:03d}/call-{s:08d}.wav" for s in session],
                "start_s": (row % EACH) * 4.25,
                "end_s": (row % EACH) * 4.25 + 3.5,
                "channel": (row % 2).astype(np.int32),
                "role": np.where(row % 2, "agent", "customer"),
                "valence": np.round(rng.uniform(1, 7, len(row)), 3),
                "arousal": np.round(rng.uniform(1, 7, len(row)), 3),
                "split": np.where(session % 10, "train", "dev"),
            }
        )


def write_manifest(path, n):
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, next(blocks(1)).schema) as writer:
            for block in blocks(n):
                writer.write_table(block)
        return
    with open(path, "w") as file:
        for block in blocks(n):
            file.writelines(json.dumps(row) + "\n" for row in block.to_pylist())


def planned(path, out):
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, out],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_plan_of_millions_of_utterances(tmp_path, capsys, kind):
    table = ["| utterances | read, s | first part, s | driver, GB |", "|---|---|---|---|"]
    for n in (UTTERANCES // 10, UTTERANCES):
        path = tmp_path / f"{n}.{kind}"
        write_manifest(path, n)
        found = planned(path, tmp_path / "store")
        path.unlink()
        table.append(f"| {n:,} {kind} | {found['listed_s']:.1f} | {found['begun_s']:.1f} | {found['rss_gb']:.2f} |")
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert found["begun_s"] < 180 * UTTERANCES / 10_000_000
    assert found["rss_gb"] < 4
