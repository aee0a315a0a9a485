"""An archive that changes between two runs: what grows, is replaced, copied, restored, erased, or comes to be named."""

import json
import os
import shutil

import boto3
import pyarrow.compute as pc
import pytest
import soundfile
from scoring_cases import make_audio_checkpoint, make_checkpoint, make_world, run, written
from speech_cases import call

import vaemo
from vaemo import files
from vaemo.audio import READING
from vaemo.config import Config, FeatureConfig
from vaemo.errors import OtherRunError, TooManyFailuresError
from vaemo.scores import read_provenance, read_utterances
from vaemo.scoring.erase import erase_sessions
from vaemo.scoring.ids import KEY_VARIABLE, IdKey
from vaemo.store import FeatureStore
from vaemo.testing import write_store

KEY = "a key of sixteen or more"
LENIENT = {"score": {"max_failed_fraction": 1.0}, "extract": {"shard_recordings": 2, "max_failed_fraction": 1.0}}
QUICK = Config().replace({"features": {"prosody": "none"}, **LENIENT})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_audio_checkpoint(tmp_path_factory.mktemp("model") / "best", features=FeatureConfig(prosody="none"))


def write_call(path, seed, turns=2):
    samples, _ = call(turns, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.T, 16000)


def score_all(archive, checkpoint, out, **options):
    return run(archive, checkpoint, out, roles_unknown=True, **LENIENT, **options)


def rows(out, name):
    table = read_utterances(str(out))
    return table.filter(pc.equal(table["session_id"], name)).to_pylist()


def test_a_recording_that_went_on_is_told_and_done_again_where_asked(checkpoint, tmp_path, capsys):
    archive, out = tmp_path / "archive", tmp_path / "out"
    for number in range(3):
        write_call(archive / f"{number}.wav", number)
    whole = (archive / "1.wav").read_bytes()
    (archive / "1.wav").write_bytes(whole[: len(whole) // 2])
    score_all(archive, checkpoint, out)
    half, before = rows(out, "1.wav"), written(out)
    (archive / "1.wav").write_bytes(whole)
    # A copy with another time is no change.
    os.utime(archive / "2.wav", (1, 1))
    score_all(archive, checkpoint, out)
    assert rows(out, "1.wav") == half
    assert {path: before[path] for path in before} == {path: written(out)[path] for path in before}
    assert "1  changed since they were done, and keep their rows: 1.wav" in capsys.readouterr().out
    with pytest.raises(TooManyFailuresError, match="1 of 3 sessions failed"):
        run(archive, checkpoint, out, roles_unknown=True)
    others = [rows(out, name) for name in ("0.wav", "2.wav")]
    score_all(archive, checkpoint, out, changed="redo")
    assert len(rows(out, "1.wav")) > len(half)
    assert [rows(out, name) for name in ("0.wav", "2.wav")] == others
    assert (
        score_all(archive, checkpoint, tmp_path / "again")
        .drop(["run_id"])
        .equals(
            read_utterances(str(out)).sort_by([("session_id", "ascending"), ("position", "ascending")]).drop(["run_id"])
        )
    )


def test_an_extracted_recording_likewise(tmp_path, capsys):
    archive, out = tmp_path / "archive", str(tmp_path / "store")
    for number in range(2):
        write_call(archive / f"{number}.wav", number)
    vaemo.extract(config=QUICK, out=out, input=str(archive), executor="process")
    before = FeatureStore.open(out).read().num_rows
    write_call(archive / "1.wav", 1, turns=4)
    tally = vaemo.extract(config=QUICK, out=out, input=str(archive), executor="process")
    assert (tally.changed, FeatureStore.open(out).read().num_rows) == (("1.wav",), before)
    tally = vaemo.extract(config=QUICK, out=out, input=str(archive), changed="redo", executor="process")
    assert tally.changed == ()
    assert FeatureStore.open(out).read().num_rows > before


def test_features_replaced_under_the_same_ids_are_refused(tmp_path):
    store, out = write_store(make_world(sessions=6), str(tmp_path / "store"), parts=2), tmp_path / "out"
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    first = run(store, checkpoint, out)
    part = files.list_files(store, ".parquet")[0]
    table = files.read_parquet(part)
    files.write_parquet_whole(part, table)
    assert run(store, checkpoint, out).equals(first)
    vectors = table["speech"].combine_chunks()
    numbers = pc.multiply(vectors.flatten(), 2.0).cast(vectors.type.value_type)
    doubled = vectors.from_arrays(numbers, type=vectors.type)
    files.write_parquet_whole(part, table.set_column(table.column_names.index("speech"), "speech", doubled))
    with pytest.raises(OtherRunError, match=r"holds scores of other data: the features of 3 sessions .* 's0000'"):
        run(store, checkpoint, out)
    again = run(store, checkpoint, out, changed="redo")
    changed = set(table["session_id"].to_pylist())
    for name in set(first["session_id"].to_pylist()):
        one, other = (rows.filter(pc.equal(rows["session_id"], name))["valence"] for rows in (first, again))
        assert one.equals(other) == (name not in changed)


def test_twins_are_scored_once_and_erased_together(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    archive, out = tmp_path / "archive", str(tmp_path / "out")
    write_call(archive / "a.wav", 1)
    write_call(archive / "other.wav", 2)
    shutil.copy(archive / "a.wav", archive / "b.wav")
    score_all(archive, checkpoint, out)
    (twin,) = rows(out, "b.wav")
    assert (twin["status"], twin["duplicate_of"], twin["valence"]) == ("duplicate", "a.wav", None)
    erase_sessions(["b.wav"], IdKey(KEY), scores=out)
    assert set(read_utterances(out)["session_id"].to_pylist()) == {"other.wav"}
    score_all(archive, checkpoint, out)
    assert set(read_utterances(out)["session_id"].to_pylist()) == {"other.wav"}


def test_twins_are_erased_together_where_ids_are_hidden(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    archive, out = tmp_path / "archive", str(tmp_path / "out")
    write_call(archive / "Ann's call.wav", 1)
    shutil.copy(archive / "Ann's call.wav", archive / "copy.wav")
    write_call(archive / "other.wav", 2)
    hidden = {**LENIENT, "score": {**LENIENT["score"], "hash_ids": True}}
    run(archive, checkpoint, out, roles_unknown=True, **hidden)
    assert "Ann" not in str(read_utterances(out).to_pylist())
    erase_sessions(["Ann's call.wav"], IdKey(KEY), scores=out)
    assert set(read_utterances(out)["session_id"].to_pylist()) == {IdKey(KEY).hash("other.wav")}
    run(archive, checkpoint, out, roles_unknown=True, **hidden)
    assert set(read_utterances(out)["session_id"].to_pylist()) == {IdKey(KEY).hash("other.wav")}


def test_files_left_out_are_not_scored(checkpoint, tmp_path):
    archive = tmp_path / "archive"
    write_call(archive / "a.wav", 1)
    write_call(archive / "Redacted" / "a.wav", 2)
    found = score_all(archive, checkpoint, tmp_path / "out", exclude=("Redacted/*",))
    assert set(found["session_id"].to_pylist()) == {"a.wav"}


def test_an_archived_object_is_listed_and_taken_once_it_is_back(bucket, checkpoint, tmp_path):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for number, tier in enumerate(("STANDARD", "GLACIER")):
        write_call(tmp_path / "call.wav", number)
        client.put_object(
            Bucket=name, Key=f"in/{number}.wav", Body=(tmp_path / "call.wav").read_bytes(), StorageClass=tier
        )
    out = str(tmp_path / "out")
    score_all(f"{bucket}/in", checkpoint, out)
    (cold,) = rows(out, "1.wav")
    assert cold["status"] == "archived"
    assert {row["status"] for row in rows(out, "0.wav")} == {"ok"}
    client.put_object(Bucket=name, Key="in/1.wav", Body=(tmp_path / "call.wav").read_bytes())
    score_all(f"{bucket}/in", checkpoint, out)
    assert rows(out, "1.wav") == [cold]
    score_all(f"{bucket}/in", checkpoint, out, retry_failed=True)
    assert {row["status"] for row in rows(out, "1.wav")} == {"ok"}


def test_a_call_that_the_table_comes_to_name_is_scored_then(checkpoint, tmp_path):
    archive, out, table = tmp_path / "archive", tmp_path / "out", tmp_path / "calls.jsonl"
    for number in range(2):
        write_call(archive / f"00{number}.wav", number)
    lines = [{"path": f"./00{number}.wav", "role_ch0": "customer", "role_ch1": "agent"} for number in range(2)]
    table.write_text(json.dumps(lines[0]))
    run(archive, checkpoint, out, calls=str(table), **LENIENT)
    (unnamed,) = rows(out, "001.wav")
    assert (unnamed["status"], unnamed["reason"]) == ("not_scored_role", "not in the table of calls")
    table.write_text("\n".join(map(json.dumps, lines)))
    run(archive, checkpoint, out, calls=str(table), **LENIENT)
    assert {(row["role"], row["status"]) for row in rows(out, "001.wav")} == {
        ("customer", "ok"),
        ("agent", "not_scored_role"),
    }


def test_another_reading_is_another_run(checkpoint, tmp_path, monkeypatch):
    archive, out = tmp_path / "archive", str(tmp_path / "out")
    write_call(archive / "a.wav", 1)
    score_all(archive, checkpoint, out)
    vaemo.extract(config=QUICK, out=str(tmp_path / "store"), input=str(archive), executor="process")
    assert read_provenance(out)["settings"]["reading"] == READING
    for module in ("vaemo.pipeline.prepare", "vaemo.pipeline.extraction"):
        monkeypatch.setattr(f"{module}.READING", READING + 1)
    with pytest.raises(OtherRunError, match=f"reading was {READING}, is now {READING + 1}"):
        score_all(archive, checkpoint, out)
    with pytest.raises(OtherRunError, match=f"reading was {READING}, is now {READING + 1}"):
        vaemo.extract(config=QUICK, out=str(tmp_path / "store"), input=str(archive), executor="process")
