"""What the tests of extraction share: corpora of noise that take no time, and the rows that a store should hold."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from vaemo.config import Config
from vaemo.data.manifest import read_manifest
from vaemo.features import load_extractors
from vaemo.utterances import extract_utterances

QUICK = ["features.prosody=none", "extract.shard_utterances=6", "extract.shard_recordings=1"]
CONFIG = Config.load("default", QUICK)


def write_corpus(folder, sessions, utterances=3):
    """A manifest of sessions of noise, each cut from a recording of its own."""
    folder.mkdir(exist_ok=True)
    rows = []
    for session in range(sessions):
        rng = np.random.default_rng(session)
        soundfile.write(folder / f"{session}.wav", rng.normal(scale=0.1, size=(16000, 2)), 8000)
        for utterance in range(utterances):
            rows.append(
                {
                    "utt_id": f"s{session}-{utterance}",
                    "session_id": f"s{session}",
                    "speaker_id": f"p{session % 3}",
                    "audio_path": f"{session}.wav",
                    "start_s": 0.4 * utterance,
                    "end_s": 0.4 * utterance + 0.3,
                    "channel": utterance % 2,
                    "valence": 0.5,
                }
            )
    write_rows(folder, rows)
    return folder / "m.jsonl", rows


def write_rows(folder, rows):
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_loud(path, start, stop):
    """Let a recording be loud in a span of its frames."""
    samples, rate = soundfile.read(path)
    samples[start:stop] = np.copysign(0.99, samples[start:stop])
    soundfile.write(path, samples, rate)


def rows_of(store):
    """Every row of a store, by id, as files hold them; none twice."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(store).glob("*.parquet")))
    rows = {row["utt_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


def expected_rows(manifest, config=CONFIG):
    table = extract_utterances(read_manifest(manifest), extractors=load_extractors(config.features), config=config)
    return {row["utt_id"]: row for row in table.to_pylist()}


def parts(store):
    """When each part of a store was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(store).glob("*.parquet")}
