"""The index is a copy: whatever happens to it, what it says is what the parts hold."""

import json
import os
import random

import pyarrow as pa
import pytest

from vaemo import files
from vaemo.errors import OtherRunError
from vaemo.parts.index import FOLDER, Entry, Index, forget
from vaemo.parts.shards import tag_keys
from vaemo.parts.tally import Tally


def write(folder, name, sessions, status="ok"):
    """A part of sessions of one utterance; gives what its writer says of it."""
    n = len(sessions)
    rows = pa.table(
        {
            "session_id": sessions,
            "utt_id": [f"{session}-1" for session in sessions],
            "status": [status] * n,
            "reason": pa.array([None if status == "ok" else "why"] * n, pa.string()),
            "start_s": [0.0] * n,
            "end_s": [2.0] * n,
        }
    )
    stamps = {session: [[1, 2, "x"]] for session in sessions}
    files.write_parquet_whole(f"{folder}/{name}", tag_keys(rows, sessions, stamps))
    return Entry.of(str(folder), name)


def index_files(folder):
    return sorted((folder / FOLDER).glob("*.parquet")) if (folder / FOLDER).exists() else []


def rebuilt(folder):
    """What the parts alone say."""
    names = [path.removeprefix(f"{folder}/") for path in files.list_files(folder, ".parquet", recursive=True)]
    return {name: Entry.of(str(folder), name) for name in names}


def opened(monkeypatch):
    """Counts the parts that are opened from here on."""
    seen, of = [], Entry.of
    monkeypatch.setattr(Entry, "of", staticmethod(lambda folder, name: seen.append(name) or of(folder, name)))
    return seen


def test_what_was_reported_is_not_opened_again(tmp_path, monkeypatch):
    with Index.open(str(tmp_path)) as index:
        for number in range(5):
            index.add(write(tmp_path, f"date=2026-11-0{number}/part-{number}.parquet", [f"s{number}"]))
    seen = opened(monkeypatch)
    assert Index.open(str(tmp_path)).entries == index.entries
    assert seen == []
    monkeypatch.undo()
    assert index.entries == rebuilt(tmp_path)


def test_a_run_that_is_not_closed_writes_nothing(tmp_path):
    write(tmp_path, "part-a.parquet", ["a"])
    assert Index.open(str(tmp_path)).entries.keys() == {"part-a.parquet"}
    assert not index_files(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_the_parts_win_whatever_happens_to_the_index(tmp_path, seed):
    rng = random.Random(seed)
    for turn in range(4):
        with Index.open(str(tmp_path)) as index:
            assert index.entries == rebuilt(tmp_path)
            for number in range(rng.randint(0, 5)):
                entry = write(tmp_path, f"part-{turn}-{number}.parquet", [f"s{turn}-{number}"])
                if rng.random() < 0.7:  # else the driver died before it heard of the part
                    index.add(entry)
        for path in [path for path in tmp_path.glob("*.parquet") if rng.random() < 0.2]:
            path.unlink()
        for path in [path for path in tmp_path.glob("*.parquet") if rng.random() < 0.2]:
            write(tmp_path, path.name, [f"again-{path.name}"], "missing")
        for path in index_files(tmp_path):
            match rng.randint(0, 4):
                case 0:
                    path.unlink()
                case 1:
                    os.truncate(path, rng.randint(0, path.stat().st_size - 1))
                case 2:
                    content = bytearray(path.read_bytes())
                    content[rng.randrange(len(content))] ^= 0xFF
                    path.write_bytes(content)
    assert Index.open(str(tmp_path)).entries == rebuilt(tmp_path)


def test_many_files_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("vaemo.parts.index._FLUSH_S", 0.0)
    monkeypatch.setattr("vaemo.parts.index._MOST_FILES", 4)
    with Index.open(str(tmp_path)) as index:
        for number in range(9):
            index.add(write(tmp_path, f"part-{number}.parquet", [f"s{number}"]))
        assert len(index_files(tmp_path)) == 9
    assert len(index_files(tmp_path)) == 1
    assert Index.open(str(tmp_path)).entries == index.entries


def test_what_is_erased_is_forgotten(tmp_path):
    with Index.open(str(tmp_path)) as index:
        index.add(write(tmp_path, "part-a.parquet", ["Ann's call", "b"]))
        index.add(write(tmp_path, "part-b.parquet", ["c"]))
    forget(str(tmp_path), ["Ann's call"])
    for path in index_files(tmp_path):
        assert "Ann" not in str(files.read_parquet(path).to_pydict())
    assert Index.open(str(tmp_path)).entries.keys() == {"part-a.parquet", "part-b.parquet"}


def test_a_strangers_part_is_refused(tmp_path):
    files.write_parquet_whole(tmp_path / "part-x.parquet", pa.table({"session_id": ["a"]}))
    with pytest.raises(OtherRunError, match="was not written by this job"):
        Index.open(str(tmp_path))


def test_it_sums_up_as_the_parts_do(tmp_path):
    entries = [
        write(tmp_path, "part-a.parquet", ["a", "b"]),
        write(tmp_path, "part-b.parquet", ["c"], "missing"),
        write(tmp_path, "part-c.parquet", ["d", "e"], "silent"),
    ]
    tally = Tally()
    for entry in entries:
        tally.add(json.loads(entry.counts))
    assert tally.to_dict() == {
        "utterances": {"ok": 2, "missing": 1, "silent": 2},
        "sessions": {"all": 5, "failed": 1, "silent": 2, "changed": 0},
        "failed_fraction": pytest.approx(1 / 3),
        "audio_s": 10.0,
    }
