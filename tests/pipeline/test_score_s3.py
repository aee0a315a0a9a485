"""Recordings in a bucket are scored into a bucket, in two runs as in one."""

import boto3
import pytest
from moto.server import ThreadedMotoServer
from scoring_cases import assert_close, make_audio_checkpoint, rows_of, run, run_inline, write_calls

from vaemo import files
from vaemo.cluster import score as job

ORDER = {"channel_roles": ["customer", "agent"]}


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="scored-calls")
    yield client
    server.stop()


def test_recordings_and_scores_may_lie_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "run_shards", run_inline)
    monkeypatch.setattr(job, "connect", lambda: None)
    monkeypatch.setattr(job, "gpu_share", lambda extractors: 0.0)
    names, _ = write_calls(tmp_path / "in" / "2026", utterances=2)
    checkpoint = make_audio_checkpoint(tmp_path / "checkpoint")
    for name in names:
        bucket.upload_file(str(tmp_path / "in" / "2026" / name), "scored-calls", f"in/2026/{name}")
    for limit in (1, None):
        run("s3://scored-calls/in", checkpoint, "s3://scored-calls/scores", score=ORDER, limit=limit)
    assert len(files.list_files("s3://scored-calls/scores/utterances")) == 2
    local = run(tmp_path / "in", checkpoint, tmp_path / "out", score=ORDER)
    assert_close(rows_of("s3://scored-calls/scores"), local)
