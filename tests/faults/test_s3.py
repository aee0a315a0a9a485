"""An object store that refuses and stalls for a while costs time alone; one that stays away is one clear error."""

import math
import threading
import time

import boto3
import pytest
from extract_cases import CONFIG, expected_rows, write_corpus
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

import vaemo
from vaemo import files
from vaemo.errors import StorageError
from vaemo.pipeline import extraction
from vaemo.store import FeatureStore

STORM_S = 12.0
"""How long it refuses: pyarrow by itself gives up after 30 attempts, 6 to 8 s."""

SILENCE_S = 4.0
"""How long it lets a request wait: pyarrow by itself takes one as lost after 3 s."""


class MoodyS3:
    """moto's S3 behind a door that refuses (503) until a time, and keeps the next requests waiting."""

    def __init__(self):
        self._app = DomainDispatcherApplication(create_backend_app)
        self.refuse_until = 0.0
        self.stall = self.refused = self.stalled = 0

    def __call__(self, environ, start_response):
        if time.monotonic() < self.refuse_until:
            self.refused += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if self.stall:
            self.stall, self.stalled = self.stall - 1, self.stalled + 1
            time.sleep(SILENCE_S)
        return self._app(environ, start_response)


@pytest.fixture
def s3(monkeypatch):
    moody = MoodyS3()
    server = make_server("127.0.0.1", 0, moody, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    moody.client = boto3.client("s3")
    # moto keeps what it holds as long as the process lives.
    moody.bucket = f"moody-{server.server_port}"
    moody.client.create_bucket(Bucket=moody.bucket)
    yield moody
    server.shutdown()
    thread.join()


@pytest.fixture
def corpus(s3, tmp_path, monkeypatch):
    """A manifest in the bucket, extracted in this process, and the rows that are to come of it."""
    manifest, _ = write_corpus(tmp_path / "c", 6)
    for path in (tmp_path / "c").iterdir():
        s3.client.upload_file(str(path), s3.bucket, f"in/{path.name}")
    return expected_rows(manifest)


def extract_now(s3):
    vaemo.extract(
        config=CONFIG, out=f"s3://{s3.bucket}/store", manifest=f"s3://{s3.bucket}/in/m.jsonl", executor="process"
    )


def stored(s3):
    rows = FeatureStore.open(f"s3://{s3.bucket}/store").read(["utt_id", "status", "reason", "speech"]).to_pylist()
    assert len({row["utt_id"] for row in rows}) == len(rows)
    return {row["utt_id"]: (row["status"], row["speech"]) for row in rows}


@pytest.mark.slow
def test_refusals_and_silence_for_a_while_cost_nothing(s3, corpus, monkeypatch):
    write_part = extraction.write_part

    def write_part_in_a_storm(*arguments):
        """At the end of the first part the storm begins, and lasts into the reading of the second."""
        if not s3.refused:
            s3.refuse_until, s3.stall = time.monotonic() + STORM_S, 1
        write_part(*arguments)

    monkeypatch.setattr(extraction, "write_part", write_part_in_a_storm)
    extract_now(s3)
    assert s3.refused > 1
    assert s3.stalled == 1
    assert stored(s3) == {name: (row["status"], row["speech"]) for name, row in corpus.items()}


def test_an_object_store_that_stays_away_is_one_clear_error(s3, corpus, monkeypatch):
    monkeypatch.setattr(files, "_S3_ATTEMPTS", 2)
    write_part, written = extraction.write_part, []

    def write_part_then_nothing(*arguments):
        if written:
            s3.refuse_until = math.inf
        write_part(*arguments)
        written.append(arguments[1])

    monkeypatch.setattr(extraction, "write_part", write_part_then_nothing)
    with pytest.raises(StorageError, match=r"storage failed at s3://moody-.*/store/part-.*503.*run the same command"):
        extract_now(s3)
    s3.refuse_until = 0.0
    monkeypatch.setattr(extraction, "write_part", write_part)
    assert len(stored(s3)) == 6
    extract_now(s3)
    assert stored(s3) == {name: (row["status"], row["speech"]) for name, row in corpus.items()}
