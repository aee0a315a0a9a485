"""The demonstration from end to end: memory helps, beyond the spread over seeds, and nothing is done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vaemo import scores

ROOT = Path(__file__).parents[2]


def run_demo(out):
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "demo.py"), "--out", str(out)],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def content(folder):
    """When every result was last written."""
    results = ("store", "run/best", "baselines", "scores", "corpus")
    paths = (path for name in results for path in (folder / name).rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in paths if path.name != "README.md"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demonstration(tmp_path):
    out = tmp_path / "demo"
    ended = run_demo(out)
    assert ended.returncode == 0, ended.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    with_memory, without = (np.array(summary["models"][name]["ccc_avg"]) for name in ("vaemo", "no-memory"))
    assert len(with_memory) == len(without) == 3
    spread = max(with_memory.std(ddof=1), without.std(ddof=1))
    assert with_memory.mean() - without.mean() > 2 * spread
    assert with_memory.min() > without.max()
    assert summary["compare"]["ci95"][0] > 0
    assert summary["models"]["mean"]["ccc_avg"] == [pytest.approx(0.0, abs=1e-9)]
    assert summary["speech_found"] > 0.9
    assert summary["found_is_speech"] > 0.9
    assert min(summary["recordings_ccc"].values()) > 0.3

    provenance = json.loads((out / "run" / "best" / "provenance.json").read_text())
    assert provenance["synthetic"] is True
    assert "Trained on synthetic speech" in (out / "run" / "best" / "README.md").read_text()
    recordings = scores.read_utterances(str(out / "scores" / "recordings"))
    by_role = {role: recordings.filter(scores.pc.equal(recordings["role"], role)) for role in ("customer", "agent")}
    assert by_role["agent"]["valence"].null_count == by_role["agent"].num_rows > 0
    assert by_role["customer"]["valence"].null_count == 0
    for name in ("report/index.html", "report-test/index.html", "evaluation/metrics.json"):
        assert str(out / name) in ended.stdout
        assert (out / name).stat().st_size > 1000

    # Only evaluation and reports are made again.
    before = content(out)
    again = run_demo(out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert content(out) == before
    assert json.loads((out / "summary.json").read_text()) == summary
