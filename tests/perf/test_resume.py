"""What a run costs that finds nearly everything done: 1,000,000 recordings in 125,000 parts, 8 of which are missing.

The folders are real, the parts are not: a part is a file of one byte, and the index, of the size that real ones have,
says what it holds. So it is seen whether the driver opens a part: it cannot.
"""

import json
import os
import resource
import time

import pytest
from perf_cases import in_a_process

pytestmark = [pytest.mark.perf, pytest.mark.timeout(3600)]

RECORDINGS, EACH, MISSING = 1_000_000, 8, 8

RUN = """
import json, resource, sys, time
start = time.perf_counter()
from vaemo.config import Config
from vaemo.pipeline.extraction import extract

class Reached(BaseException):
    pass

class Executor:
    def workers(self, most):
        return most
    def run(self, parts):
        global begun, n
        begun, n = time.perf_counter() - start, len(parts.shards)
        return iter(())

from vaemo.pipeline.sources import RecordingsSource
config = Config().replace({"features": {"prosody": "none"}, "extract": {"shard_recordings": 8}})
source = RecordingsSource(sys.argv[1], config.audio)
extract(source, sys.argv[2], config, Executor())
end = time.perf_counter() - start
print(json.dumps({"begun_s": begun, "summary_s": end - begun, "parts": n, "cpu_s": time.process_time(),
                  "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def make_archive(folder):
    """Empty files in folders of a thousand; their names."""
    names = []
    for group in range(RECORDINGS // 1000):
        (folder / f"{group:04d}").mkdir(parents=True)
        for number in range(1000):
            names.append(f"{group:04d}/call-{number:04d}.wav")
            os.close(os.open(folder / names[-1], os.O_CREAT | os.O_WRONLY))
    return names


def make_store(out, archive, names):
    """A store that holds all of them but the last parts; its index is as a run leaves it."""
    from vaemo.config import Config
    from vaemo.features import load_extractors
    from vaemo.parts import index
    from vaemo.parts.index import Entry
    from vaemo.parts.shards import plan_shards
    from vaemo.pipeline.extraction import claim_store

    config = Config().replace({"features": {"prosody": "none"}})
    claim_store(str(out), config, load_extractors(config.features), source="recordings", about={})
    stamps = {name: (found.st_size, found.st_mtime_ns) for name, found in ((n, os.stat(archive / n)) for n in names)}
    entries = []
    for shard in plan_shards(names, [1] * len(names), EACH)[:-MISSING]:
        (out / shard.name).write_bytes(b"x")
        about = os.stat(out / shard.name)
        counts = {"statuses": {"ok": 400}, "examples": {"ok": ["a", None]}, "sessions": EACH, "heard": EACH, "lost": 0}
        counts |= {"silent": 0, "audio_s": 2400.0}
        noted = {name: [[*stamps[name], "0" * 16]] for name in shard.keys}
        entries.append(
            Entry(shard.name, about.st_size, about.st_mtime_ns, *map(json.dumps, (shard.keys, noted, counts)))
        )
    index._write(str(out), entries)


def test_resume_of_a_million(tmp_path, capsys):
    archive, out = tmp_path / "archive", tmp_path / "store"
    names = make_archive(archive)
    make_store(out, archive, names)
    started = time.perf_counter()
    found = in_a_process(RUN, archive, out)
    with capsys.disabled():
        print(f"\n{found}, {time.perf_counter() - started:.0f} s in all, {resource.getpagesize()} B pages")
    assert found["parts"] == MISSING
    assert found["begun_s"] < 30
    assert found["summary_s"] < 10
    assert found["rss_gb"] < 2
