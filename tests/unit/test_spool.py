"""The rows of a manifest on disk are those that are read at once, however they stand in it."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.data import manifest, spool
from vaemo.data.manifest import read_manifest
from vaemo.data.spool import is_here, open_rows, packed_rows, read_rows
from vaemo.errors import ReadManifestError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything that is cut, cut small."""
    monkeypatch.setattr(manifest, "_PIECE_BYTES", 400)
    monkeypatch.setattr(manifest, "_PIECE_ROWS", 5)
    monkeypatch.setattr(spool, "_BLOCK", 4)
    monkeypatch.setattr(spool, "_SEEN", 3)
    monkeypatch.setattr(spool, "IN_MEMORY", 8)


def rows_of(seed):
    """A manifest of a few sessions: in one piece each or scattered, by position, by time, or as the lines stand."""
    rng, rows = random.Random(seed), []
    for number in range(rng.randint(1, 7)):
        how = rng.choice(["position", "start_s", "line"])
        for n in range(rng.randint(1, 9)):
            row = {"utt_id": f"u{number}-{n}", "session_id": f"s{number}", "speaker_id": "p", "audio_path": f"{n}.wav"}
            row |= {"valence": rng.choice([None, 2.5]), "role": rng.choice([None, "agent", "customer"])}
            row |= {} if how == "line" else {how: 10 - n}
            row |= {"note": rng.choice([1, 2.5, "x", None])} if rng.random() < 0.5 else {}
            rows.append(row)
    if rng.random() < 0.5:
        rng.shuffle(rows)
    return rows


def write(path, rows):
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row if name != "note")
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_the_manifest(tmp_path, seed, kind):
    path = write(tmp_path / f"m.{kind}", rows_of(seed))
    table, held = read_manifest(path), open_rows(path)
    assert held.session_ids == list(dict.fromkeys(table["session_id"].to_pylist()))
    assert pa.concat_tables([held.rows(index) for index in range(len(held.session_ids))]).equals(table)
    assert sorted(held.roles) == sorted(set(table["role"].drop_null().to_pylist()))
    picked = [index for index in range(len(held.session_ids)) if (index + seed) % 3]
    told = held.described(picked)
    expected = [row for row in table.to_pylist() if held.session_ids.index(row["session_id"]) in picked]
    if picked:
        assert read_rows(told).to_pylist() == expected
    if "spooled" in told and picked:
        assert is_here(told["spooled"])
        assert read_rows({"rows": packed_rows(told)}).to_pylist() == expected
        folder = Path(json.loads(told["spooled"])[0][0][0]).parent
        del held
        assert not folder.exists()
        assert not is_here(told["spooled"])


def test_what_is_finished_keeps_its_digest(tmp_path, monkeypatch):
    """In memory or on disk, in order or not: folders know sessions by it, and those of older versions too."""
    rows = [row for row in rows_of(5) if row.pop("note", None) or True]
    path = write(tmp_path / "m.jsonl", rows)
    held = open_rows(path)
    monkeypatch.setattr(spool, "IN_MEMORY", 1_000)
    assert dict(zip(held.session_ids, held.contents, strict=True)) == dict(
        zip(*(getattr(open_rows(path), name) for name in ("session_ids", "contents")), strict=True)
    )
    path = write(
        tmp_path / "one.jsonl",
        [{"utt_id": "u", "session_id": "s", "speaker_id": "p", "audio_path": "x/a.wav", "start_s": 0.5, "end_s": 2}],
    )
    assert open_rows(path).contents == ["d10c871c8daf465a"]


def test_an_id_that_stands_twice_is_found_across_pieces(tmp_path):
    rows = [
        {"utt_id": f"u{n % 17}", "session_id": f"s{n % 17}", "speaker_id": "p", "audio_path": "a.wav"}
        for n in range(20)
    ]
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(ReadManifestError, match=r"line 35: utt_id 'u0' is already in line 1;"):
        open_rows(path)
    rows[19] |= {"utt_id": "v", "start_s": -1}
    with pytest.raises(ReadManifestError, match=r"line 39: start_s is -1"):
        open_rows(write(tmp_path / "m.jsonl", rows))
    with pytest.raises(ReadManifestError, match="session 's3' has no start_s in this row, and has one in others"):
        open_rows(write(tmp_path / "m.jsonl", [*rows[:16], {**rows[3], "utt_id": "w", "start_s": 1}]))


def test_columns_that_may_be_meant_otherwise_and_rows_of_one_file_without_times_are_noted(tmp_path):
    row = {"session_id": "s", "speaker_id": "p", "audio_path": "a.wav"}
    timed = [{**row, "utt_id": f"u{number}", "start_s": number, "end_s": number + 1} for number in range(3)]
    files = [
        {**row, "utt_id": f"v{number}", "session_id": "t", "audio_path": f"{number}.wav", "Split": None}
        for number in range(3)
    ]
    channels = [
        {**row, "utt_id": f"w{number}", "session_id": "t", "audio_path": "b.wav", "channel": number}
        for number in range(2)
    ]
    assert open_rows(write(tmp_path / "plain.jsonl", [*timed, *files, *channels])).notes == []
    path = write(tmp_path / "m.jsonl", [{**row, "utt_id": f"u{number}", "start": number} for number in range(3)])
    assert open_rows(path).notes == [
        f"{path} has columns that are not read: 'start' (is start_s meant?).",
        f"{path}: 3 utterances have neither start_s nor end_s and share a recording and channel with others: each of "
        "them is the whole recording.",
    ]


def test_columns_that_extraction_computes_are_noted_and_others_of_a_store_are_typed(tmp_path):
    row = {"utt_id": "u", "session_id": "s", "speaker_id": "p", "audio_path": "a.wav", "voice": 1, "role_by": "me"}
    path = write(tmp_path / "m.jsonl", [{**row, "reason": "why", "status": "bad", "level_db": "loud", "note": "x"}])
    assert open_rows(path).notes == [
        f"{path} has columns that are not kept: status, reason, level_db. Extraction computes columns of these names; "
        "rename yours if you need them."
    ]
    assert open_rows(write(tmp_path / "n.jsonl", [row])).notes == []
    with pytest.raises(ReadManifestError, match=r"o.jsonl, line 1: voice is 'alto'; it must be a whole number"):
        open_rows(write(tmp_path / "o.jsonl", [{**row, "voice": "alto"}]))
