"""The commands `evaluate` and `report`, as a user calls them: what they write, what they say, how they end."""

import json
import re
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from commands import run_job, run_job_here

from vaemo import scores
from vaemo.config import ScoreConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of scores of eight calls with labels and audio, as a run of scoring leaves it."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows, lines = [], []
    (folder / "audio").mkdir()
    for session in range(8):
        level = rng.uniform(0.3, 0.7, 2)
        soundfile.write(folder / "audio" / f"call-{session}.wav", rng.normal(0, 0.05, 8_000 * 40), 8_000)
        for i in range(12):
            label = np.clip(level + rng.normal(0, 0.12, 2), 0, 1)
            score = np.clip(label + rng.normal(0, 0.1, 2), 0, 1)
            place = {
                "session_id": f"call-{session}.wav",
                "utt_id": f"call-{session}.wav#c0-{i:05d}",
                "speaker_id": f"s{session}",
                "role": "customer",
                "start_s": 3.0 * i,
                "end_s": 3.0 * i + 2,
                "split": "test" if session > 2 else "train",
            }
            rows.append(place | {"valence": score[0], "arousal": score[1], "status": "ok"})
            lines.append(place | {"audio_path": "a.wav", "valence": label[0], "arousal": label[1]})
    scores.write_part(str(folder / "scores"), "part-0.parquet", pa.Table.from_pylist(rows), ScoreConfig())
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_evaluate_prints_a_table_and_writes_metrics(world, tmp_path):
    ended = run_job(
        "evaluate", "--scores", world / "scores", "--labels", world / "labels.jsonl", "--out", tmp_path,
        "--set", "evaluate.bootstrap=100",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["pooled"]["n"] == 60
    assert set(metrics["per_split"]) == {"train", "test"}
    low, high = metrics["pooled"]["ci95"]["ccc_avg"]
    assert f"{metrics['pooled']['ccc_avg']:.3f} [{low:.3f}, {high:.3f}]" in ended.stdout
    for picture in ("calibration.png", "error_over_session.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scores", "nowhere", "--labels", "labels.jsonl"], 1, r"has no utterances/part-\*\.parquet"),
        (["--scores", "scores", "--labels", "nowhere.jsonl"], 1, "there is nothing at"),
        (["--scores", "scores", "--labels", "labels.jsonl", "--split", "tset"], 1, "in the split 'tset'"),
        (["--scores", "scores", "--labels", "labels.jsonl", "--set", "evaluate.boot=1"], 2, "evaluate.bootstrap"),
        (["--scores", "scores"], 2, "--labels"),
    ],
)
def test_evaluate_refuses_in_one_line(world, tmp_path, arguments, code, message):
    ended = run_job_here("evaluate", *arguments, "--out", tmp_path / "out", cwd=world)
    assert ended.returncode == code
    assert re.search(message, ended.stderr)
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_relative_path_inside_a_ray_job_is_wrong_usage(world):
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    for job in ("report", "evaluate", "demo"):
        ended = run_job_here(job, "--scores", "scores", "--labels", "l.jsonl", "--out", "out", cwd=world, **environment)
        assert ended.returncode == 2
        assert "is a relative path" in ended.stderr or "unrecognized arguments" in ended.stderr


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    ended = run_job(
        "report", "--scores", world / "scores", "--labels", world / "labels.jsonl", "--audio", world / "audio",
        "--out", folder, "--set", "evaluate.bootstrap=100",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"8 calls, 8 drawn: open {folder}/index.html" in ended.stdout
    return folder


def test_report_writes_a_page_and_pictures(report):
    assert (report / "index.html").stat().st_size > 30_000
    assert len(list((report / "pictures").glob("call-*.png"))) == 8


def test_report_without_scores_is_refused(world, tmp_path):
    ended = run_job_here("report", "--scores", world / "audio", "--out", tmp_path / "out")
    assert ended.returncode == 1
    assert re.search(r"has no sessions/part-\*\.parquet; give a folder", ended.stderr)


VISIT = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const all = (what) => [...document.querySelectorAll(what)];
const seen = {};
seen.rows = all("tbody tr").length;
const search = document.querySelector("input[type=search]");
search.value = "call-3"; search.dispatchEvent(new Event("input"));
seen.found = all("tbody tr").map((row) => row.querySelector(".name").textContent);
search.value = ""; search.dispatchEvent(new Event("input"));
all("th button").find((button) => button.textContent === "Valence").click();
seen.sorted = all("tbody tr td:nth-child(6)").map((cell) => Number(cell.textContent));
document.querySelector("tbody a").click();
await wait(500);
seen.call = document.querySelector("h1").textContent;
const chart = document.querySelector(".chart");
chart.focus();
for (const key of ["ArrowRight", "ArrowRight", "End"])
  chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
seen.now = document.querySelector(".now").textContent;
seen.circles = chart.querySelectorAll("circle").length;
seen.audio = document.querySelector("audio").src;
document.querySelector("#theme").click();
seen.theme = document.documentElement.dataset.theme;
location.hash = "";
await wait(500);
seen.back = document.querySelector("h1").textContent;
"""


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)"
)


def visit(report, code, profile):
    """What `code` puts into `seen` on the report's page in a browser, and what the browser logs."""
    script = (
        f"<script>setTimeout(async () => {{ {code} document.body.innerHTML = "
        '`<pre id="seen">${JSON.stringify(seen)}</pre>`; }, 1000);</script>'
    )
    page = report / "visit.html"
    page.write_text((report / "index.html").read_text().replace("</body>", script + "</body>"))
    ended = subprocess.run(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--window-size=1400,1000", "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    page.unlink()
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', ended.stdout, re.S)[1].replace("&amp;", "&"))
    return seen, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_report_in_a_browser(report, world, tmp_path):
    """Search, sort, open a call, step through it by keyboard; nothing on the console, nothing from elsewhere."""
    seen, logged = visit(report, VISIT, tmp_path)
    assert logged == []
    assert seen["rows"] == 8
    assert seen["found"] == ["call-3.wav"]
    assert seen["sorted"] == sorted(seen["sorted"], reverse=True)
    assert re.fullmatch(r"call-\d\.wav", seen["call"])
    assert seen["now"].startswith("0:33 to 0:35customervalence 0.")
    assert "(label 0." in seen["now"]
    # A dot an utterance and dimension, the lowest of each ringed, the chosen one ringed.
    assert seen["circles"] == 2 * (12 + 1 + 1)
    assert seen["audio"] == (world / "audio" / seen["call"]).as_uri()
    assert seen["theme"] == "dark"
    assert seen["back"] == "Valence and arousal of the calls"


LISTEN = """
const seen = {};
for (const name of ["call-1.wav", "call-2.wav"]) {
  location.hash = `call=${name}`;
  await new Promise((done) => setTimeout(done, 1500));
  const audio = document.querySelector("audio");
  const note = [...document.querySelectorAll("p.note")].find((p) => p.textContent.includes("no longer beside"));
  seen[name] = [audio.src, !note.hidden];
}
"""


@needs_browser
def test_a_report_that_was_moved_with_its_recordings_plays_them_and_names_what_is_missing(report, world, tmp_path):
    shutil.copytree(report, tmp_path / report.name)
    shutil.copytree(world / "audio", tmp_path / world.name / "audio")
    (tmp_path / world.name / "audio" / "call-2.wav").unlink()
    seen, _ = visit(tmp_path / report.name, LISTEN, tmp_path / "profile")
    there = (tmp_path / world.name / "audio").as_uri()
    assert seen == {"call-1.wav": [f"{there}/call-1.wav", False], "call-2.wav": [f"{there}/call-2.wav", True]}
