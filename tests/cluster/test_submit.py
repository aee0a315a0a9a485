"""Jobs submitted to a running cluster give what they give when run directly, and fail visibly."""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from extract_cases import QUICK as QUICK_EXTRACTION
from extract_cases import expected_rows, parts, rows_of, write_corpus
from processes import kill_tree

import vaemo
from vaemo import files
from vaemo.config import Config
from vaemo.demo.corpus import make_corpus
from vaemo.testing import linear_world, write_store
from vaemo.training.data import TrainingData
from vaemo.training.trainer import Trainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
QUICK = ["features.prosody=none", "train.epochs=2", "train.lanes=4", "train.trackers=[]"]
QUICK += ["model.scan=chunk"]  # a submitted copy of vaemo would first compile the compiled one


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """A Ray head of this test's own, on the loopback, with token authentication on both sides."""

    def __init__(self, folder):
        token = folder / "token"
        token.write_text("a" * 64)
        token.chmod(0o600)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        # Between finding a free port and Ray's taking it another Ray may have it: then once more, elsewhere.
        for attempt in range(3):
            if self.start(folder, folder / f"head-{attempt}.log"):
                return
        raise AssertionError((folder / "head-2.log").read_text())

    def start(self, folder, log):
        """Whether the head came up."""
        self.port = free_port()
        command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
        command += [f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}"]
        agent_ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        command += [f"--{name}={free_port()}" for name in agent_ports]
        # A short path: Ray's sockets lie below it, and a socket's path has 107 bytes at most.
        command += [f"--temp-dir={tempfile.mkdtemp(prefix='r')}", "--include-dashboard=true", "--disable-usage-stats"]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, env=self.env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.answers():
                return True
            time.sleep(0.5)
        self.stop()
        return False

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def answers(self):
        request = urllib.request.Request(f"{self.address}/api/version", headers={"Authorization": f"Bearer {'a' * 64}"})
        try:
            with urllib.request.urlopen(request, timeout=2):
                return True
        except OSError:
            return False

    def job(self, verb, *arguments, env=None):
        """`ray job VERB`."""
        return subprocess.run(
            [RAY, "job", verb, "--address", self.address, *arguments],
            cwd=ROOT,
            env=env or self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def submit(self, *command, env=None, options=()):
        return self.job("submit", "--working-dir", ".", *options, "--", *command, env=env)

    def stop(self):
        if self.process.poll() is None:
            kill_tree(self.process.pid)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = Head(tmp_path_factory.mktemp("h"))
    yield head
    head.stop()


def settings(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def rows(folder):
    parts = [files.read_parquet(path) for path in files.list_files(folder, ".parquet", recursive=True)]
    return sorted((row for part in parts for row in part.to_pylist()), key=lambda row: json.dumps(row, default=str))


def metrics(path):
    return untimed([json.loads(line) for line in Path(path).read_text().splitlines()])


def untimed(lines):
    return [
        {name: value for name, value in line.items() if "_per_s" not in name and name[-2:] != "_s"} for line in lines
    ]


def metrics_here(store):
    """Lines of a training of this process, without a cluster."""
    config = Config.load("default", QUICK)
    sessions = TrainingData.open(store, config).pack()
    return untimed(list(Trainer(sessions.split(0, "train"), sessions.split(0, "dev"), config)))


def test_a_submitted_training_gives_what_one_process_gives(head, tmp_path):
    world = linear_world(5, sessions=(12, 4, 0), lengths=(10, 30), features=6, noise=2.0)
    store, out = write_store(world, str(tmp_path / "store")), tmp_path / "run"
    done = head.submit("python", "jobs/train.py", "--store", store, "--out", str(out), *settings(*QUICK))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert metrics(out / "metrics.jsonl") == metrics_here(store)


@pytest.mark.slow
def test_submitted_jobs_give_what_one_process_gives(head, tmp_path, monkeypatch):
    """Extract, train, score: one after the other on the cluster, and in this process without it."""
    manifest, out, here = str(make_corpus(tmp_path / "corpus", n_sessions=12)), tmp_path / "job", str(tmp_path / "here")
    quick = settings(*QUICK)
    commands = [
        ["jobs/extract.py", "--manifest", manifest, "--out", f"{out}/store", *quick],
        ["jobs/train.py", "--store", f"{out}/store", "--out", f"{out}/run", *quick],
        ["jobs/score.py", "--input", f"{out}/store", "--checkpoint", f"{out}/run/best", "--out", f"{out}/scores"],
    ]
    done = head.submit("sh", "-c", " && ".join(shlex.join(["python", *command]) for command in commands))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    config = Config.load("default", QUICK)
    vaemo.extract(config=config, out=f"{here}/store", manifest=manifest, executor="process")
    assert rows(f"{here}/store") == rows(f"{out}/store")

    assert metrics_here(f"{here}/store") == metrics(out / "run" / "metrics.jsonl")
    vaemo.score(input=f"{here}/store", checkpoint=f"{out}/run/best", out=f"{here}/scores", executor="process")
    found, expected = rows(f"{out}/scores"), rows(f"{here}/scores")
    assert len(found) > 300
    assert [{**row, "run_id": ""} for row in found] == [{**row, "run_id": ""} for row in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "/nowhere/store", "--out", "/nowhere/run"], "/nowhere/store does not exist"),
        pytest.param(
            *(["--store", "store", "--out", "/nowhere/run"], "'store' is a relative path"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_failing_job_exits_non_zero_and_says_why(head, arguments, message):
    done = head.submit("python", "jobs/train.py", *arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_a_submit_without_the_token_is_refused(head, tmp_path):
    env = {**head.env, "RAY_AUTH_MODE": "disabled"}
    done = head.submit("python", "-c", "print('ran')", env=env)
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "nauth" in done.stdout + done.stderr


def stop_after(head, name, progress, *command):
    """Submit a job, and stop it as soon as `progress` is true."""
    sent = head.submit(*command, options=("--no-wait", "--submission-id", name))
    assert sent.returncode == 0, sent.stdout + sent.stderr
    deadline = time.monotonic() + 120
    while not progress():
        assert time.monotonic() < deadline, head.job("logs", name).stdout
        time.sleep(0.02)
    assert head.job("stop", name).returncode == 0
    assert f"'{name}' was stopped" in head.job("status", name).stdout


@pytest.mark.slow
def test_an_extraction_that_was_stopped_goes_on(head, tmp_path):
    manifest, _ = write_corpus(tmp_path / "c", 12)
    expected, out = expected_rows(manifest), tmp_path / "out"
    # The job gets stuck at the last recording, a pipe into which nobody writes, until it is stopped.
    last, away = tmp_path / "c" / "11.wav", tmp_path / "away.wav"
    last.rename(away)
    os.mkfifo(last)
    command = ["python", "jobs/extract.py", "--manifest", str(manifest), "--out", str(out)]
    command += settings(*QUICK_EXTRACTION)
    stop_after(head, "extract-1", lambda: out.exists() and len(parts(out)) >= 2, *command)
    kept = parts(out)
    assert 2 <= len(kept) < 6
    away.replace(last)
    done = head.submit(*command)
    assert done.returncode == 0, done.stdout[-3000:]
    assert kept.items() <= parts(out).items()
    assert rows_of(out) == expected


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on(head, tmp_path):
    manifest = str(make_corpus(tmp_path / "corpus", n_sessions=12))
    store = str(tmp_path / "store")
    longer = settings(*QUICK, "train.epochs=60")
    assert head.submit("python", "jobs/extract.py", "--manifest", manifest, "--out", store, *longer).returncode == 0

    def command(out):
        return ["python", "jobs/train.py", "--store", store, "--out", str(out), "--workers", "2", *longer]

    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    log = stopped / "metrics.jsonl"
    stop_after(head, "train-1", lambda: log.exists() and len(metrics(log)) >= 2, *command(stopped))
    assert 2 <= len(metrics(log)) < 60
    for out in (stopped, undisturbed):
        done = head.submit(*command(out))
        assert done.returncode == 0, done.stdout[-3000:]
    assert metrics(log) == metrics(undisturbed / "metrics.jsonl")
