"""What it costs the driver to plan a manifest of millions of utterances, and to list a bucket of a million objects.

A plan is made as the job makes it, up to the first part that a worker would get; what workers do is not in it.
`VAEMO_PLAN_UTTERANCES` (10,000,000) and `VAEMO_PLAN_OBJECTS` (1,000,000) say how many.
"""

import ast
import os
import subprocess
import sys
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from perf_cases import in_a_process

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
print(json.dumps({"listed_s": listed_s, "begun_s": begun_s, "cpu_s": time.process_time(),
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
            texts = [type_ == pa.string() for type_ in block.schema.types]
            fields = (
                f'"{name}": ' + ('"%s"' if text else "%r") for name, text in zip(block.column_names, texts, strict=True)
            )
            line = f"{{{', '.join(fields)}}}\n"
            file.writelines(line % row for row in zip(*block.to_pydict().values(), strict=True))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_plan_of_millions_of_utterances(tmp_path, capsys, kind):
    table = ["| utterances | read, s | first part, s | driver, GB |", "|---|---|---|---|"]
    for n in (UTTERANCES // 10, UTTERANCES):
        path = tmp_path / f"{n}.{kind}"
        write_manifest(path, n)
        found = in_a_process(RUN, path, tmp_path / "store")
        path.unlink()
        table.append(f"| {n:,} {kind} | {found['listed_s']:.1f} | {found['begun_s']:.1f} | {found['rss_gb']:.2f} |")
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert found["begun_s"] < 180 * UTTERANCES / 10_000_000
    assert found["rss_gb"] < 4


OBJECTS = int(os.environ.get("VAEMO_PLAN_OBJECTS", "1000000"))
PAGE, DELAY_S = 1_000, 0.05

SERVER = """
import sys, threading, time, urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

N, FOLDERS, PAGE, DELAY_S = (float(text) if "." in text else int(text) for text in sys.argv[1:])
EACH = N // FOLDERS
ITEM = ("<Contents><Key>%s</Key><LastModified>2026-11-28T10:00:00.000Z</LastModified><ETag>&quot;0&quot;</ETag>"
        "<Size>480044</Size><StorageClass>STANDARD</StorageClass></Contents>")
lock, asked = threading.Lock(), {}

def keys(prefix, first):
    "Names below a prefix, from a place on; nothing is held."
    folder = prefix.removeprefix("calls/").rstrip("/")
    whole = [int(folder)] if folder else range(FOLDERS)
    total = EACH * len(whole)
    for number in range(first, min(first + PAGE, total)):
        yield f"calls/{whole[number // EACH]:04d}/call-{number % EACH:07d}.wav" if FOLDERS > 1 else (
            f"calls/call-{number:07d}.wav")
    return

class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        said = dict(urllib.parse.parse_qsl(query))
        if path == "/_asked":
            return self.say(repr(asked).encode(), "text/plain")
        time.sleep(DELAY_S)
        if "list-type" not in said:
            return self.say(b"<Error><Code>NoSuchKey</Code></Error>", status=404)
        prefix, first = said.get("prefix", ""), int(said.get("continuation-token", 0))
        total, body = (EACH if prefix.count("/") > 1 else N), []
        if int(said.get("max-keys", PAGE)) < PAGE:
            # Whether anything is there.
            total, body = 0, [ITEM % next(keys("calls/", 0))] if "calls/".startswith(prefix) else []
            return self.page(prefix, body, first, total)
        with lock:
            asked[prefix, first] = asked.get((prefix, first), 0) + 1
        if said.get("delimiter") and FOLDERS > 1 and prefix.count("/") <= 1:
            total = 0
            body = [f"<CommonPrefixes><Prefix>calls/{n:04d}/</Prefix></CommonPrefixes>" for n in range(FOLDERS)]
        else:
            body = [ITEM % key for key in keys(prefix, first)]
        self.page(prefix, body, first, total)

    def page(self, prefix, body, first, total):
        more = first + PAGE < total
        token = f"<NextContinuationToken>{first + PAGE}</NextContinuationToken>" if more else ""
        text = (f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>b</Name><Prefix>{prefix}</Prefix><KeyCount>{len(body)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(body)}</ListBucketResult>")
        self.say(text.encode())

    def do_HEAD(self):
        time.sleep(DELAY_S)
        self.say(b"", status=404)

    def say(self, content, kind="application/xml", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
print(server.server_port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
server.serve_forever()
"""

LIST = """
import json, resource, sys, time
start = time.perf_counter()
from vaemo.config import Config
from vaemo.pipeline.sources import open_source

listing = open_source(sys.argv[1], Config()).list()
print(json.dumps({"listed_s": time.perf_counter() - start, "n": len(listing.session_ids),
                  "cpu_s": time.process_time(),
                  "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


@pytest.mark.parametrize("folders", [1, 100, 1_000])
def test_a_million_objects_are_listed_once(capsys, folders):
    told = [str(value) for value in (OBJECTS, folders, PAGE, DELAY_S)]
    server = subprocess.Popen([sys.executable, "-c", SERVER, *told], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        door = f"http://127.0.0.1:{int(server.stdout.readline())}"
        environment = {
            "AWS_ENDPOINT_URL": door,
            **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none"),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        found = in_a_process(LIST, "s3://b/calls", **environment)
        with urllib.request.urlopen(f"{door}/_asked") as answer:
            asked = ast.literal_eval(answer.read().decode())
    finally:
        server.stdin.close()
        server.wait(10)
    with capsys.disabled():
        print(f"\n{folders:,} folders: {found}, {sum(asked.values()):,} requests")
    assert found["n"] == OBJECTS
    assert set(asked.values()) == {1}, [name for name, n in asked.items() if n > 1][:5]
    assert found["listed_s"] < 120
