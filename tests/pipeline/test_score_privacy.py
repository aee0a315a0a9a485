"""Hidden ids, erased calls, personal deltas: what is left of a person, and what is not."""

import json
import runpy
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from scoring_cases import SINGLE, make_checkpoint, make_world, run, written

import vaemo
from vaemo import files
from vaemo.config import Config
from vaemo.errors import OtherRunError, ReadCheckpointError, ReadStoreError, UsageError, VaemoError
from vaemo.model.checkpoint import load_checkpoint
from vaemo.parts.lease import lease
from vaemo.parts.shards import read_keys
from vaemo.personalize import PERSONAL_FILE, SPEAKERS, USED, Personal
from vaemo.pipeline import scoring
from vaemo.scores import read_sessions
from vaemo.scoring import tend
from vaemo.scoring.erase import Tombstones, erase_sessions
from vaemo.scoring.ids import KEY_VARIABLE, IdKey
from vaemo.scoring.table import score_table
from vaemo.store import FeatureStore
from vaemo.testing import write_store

KEY = "correct horse battery"
HASHED = {"score": {"hash_ids": True}}


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def store(tmp_path):
    return write_store(make_world(sessions=12), str(tmp_path / "store"), parts=4)


def everything_in(folder):
    """All bytes of a folder, Parquet as text."""
    contents = []
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
            contents.append(str(table.to_pylist()) + str(table.schema.metadata))
        elif path.is_file():
            contents.append(path.read_bytes().decode(errors="replace"))
        contents.append(path.name)
    return "\n".join(contents)


def test_no_id_is_written_and_the_key_neither(store, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    plain = run(store, checkpoint, tmp_path / "plain")
    hidden = run(store, checkpoint, out, **HASHED)
    key = IdKey(KEY)
    by_hash = {key.hash(row["utt_id"]): row["valence"] for row in plain.to_pylist()}
    assert by_hash == {row["utt_id"]: row["valence"] for row in hidden.to_pylist()}
    assert set(read_sessions(str(out))["session_id"].to_pylist()) == {key.hash(f"s{n:04d}") for n in range(12)}
    text = everything_in(out) + capsys.readouterr().out
    assert not any(name in text for name in ("s0000", "s0007-", "p0003", KEY))
    before = written(out)
    run(store, checkpoint, out, **HASHED)
    assert written(out) == before


def test_another_key_is_another_run(store, checkpoint, tmp_path, monkeypatch):
    run(store, checkpoint, tmp_path / "out", **HASHED)
    monkeypatch.setenv(KEY_VARIABLE, "another secret of mine")
    with pytest.raises(OtherRunError, match="id_key was"):
        run(store, checkpoint, tmp_path / "out", **HASHED)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UsageError, match=r"score.hash_ids needs a secret key"):
        run(store, checkpoint, tmp_path / "out", **HASHED)


def test_errors_name_no_id(store, checkpoint, tmp_path):
    part = files.list_files(store)[0]
    table = files.read_parquet(part)
    copy = table.slice(0, 1).set_column(1, "utt_id", pa.array(["x"]))
    files.write_parquet_whole(files.join(store, "part-9.parquet"), copy)
    with pytest.raises(ReadStoreError, match=r"session 's0000' occurs in .* and in "):
        run(store, checkpoint, tmp_path / "plain")
    with pytest.raises(VaemoError, match=r"occurs in .* and in ") as caught:
        run(store, checkpoint, tmp_path / "out", **HASHED)
    assert "s0000" not in str(caught.value)


def test_a_call_that_is_erased_while_a_run_prepares_does_not_come_back(store, checkpoint, tmp_path, monkeypatch):
    out, prepare = tmp_path / "out", scoring.prepare

    def prepare_meanwhile(request, config):
        prepared = prepare(request, config)
        erase_sessions(["s0005"], IdKey(KEY), scores=str(out))
        return prepared

    monkeypatch.setattr(scoring, "prepare", prepare_meanwhile)
    rows = run(store, checkpoint, out)
    assert (len(rows["session_id"].unique()), "s0005" in rows["session_id"].to_pylist()) == (11, False)
    # One that has begun knows of no later tombstone.
    with lease(str(out)), pytest.raises(OtherRunError, match="is being written by another run"):
        erase_sessions(["s0006"], IdKey(KEY), scores=str(out))


@pytest.mark.parametrize("options", [{}, HASHED], ids=["plain", "hashed"])
def test_an_erased_call_is_gone_and_stays_away(store, checkpoint, tmp_path, options):
    out = tmp_path / "out"
    whole = run(store, checkpoint, out, **options)
    name = IdKey(KEY).hash("s0005") if options else "s0005"
    n = pc.sum(pc.equal(whole["session_id"], name)).as_py()
    removed, *_ = erase_sessions(["s0005"], IdKey(KEY), scores=str(out), stores=[store])
    assert {kind: count for kind, count in removed.items() if count} == {"utterances": n, "sessions": 1, "stores": n}
    for folder in (out, tmp_path / "store"):
        text = everything_in(folder)
        assert "s0005" not in text
        assert f"'{name}'" not in text
    rest = whole.filter(pc.not_equal(whole["session_id"], name))
    assert run(store, checkpoint, out, **options).equals(rest)
    # The archive may still hold it: it is not scored again.
    again = write_store(make_world(sessions=12), str(tmp_path / "again"), parts=3)
    assert run(again, checkpoint, out, **options).equals(rest)
    assert erase_sessions(["s0005"], IdKey(KEY), scores=str(out))[0]["utterances"] == 0
    for part in files.list_files(str(out / "utterances")):
        assert name not in "".join(read_keys(part)[0])


def write_noise(folder, n=4):
    """Recordings of noise and a manifest of them, one utterance each."""
    folder.mkdir()
    lines = []
    for number in range(n):
        name = f"s{number}.wav"
        soundfile.write(folder / name, np.random.default_rng(number).normal(scale=0.1, size=8000), 8000)
        lines.append(json.dumps({"utt_id": f"u{number}", "session_id": name, "speaker_id": "p", "audio_path": name}))
    (folder / "m.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("given", ["input", "manifest"])
def test_an_erased_call_is_not_extracted_again(tmp_path, given):
    archive, out = tmp_path / "archive", str(tmp_path / "out")
    write_noise(archive)
    source = {given: str(archive / "m.jsonl" if given == "manifest" else archive)}
    sections = {"extract": {"shard_recordings": 2, "shard_utterances": 2, "max_failed_fraction": 1.0}}
    config = Config().replace({**sections, "features": {"prosody": "none"}})
    vaemo.extract(config=config, out=out, **source, executor="process")
    assert set(FeatureStore.open(out).read()["session_id"].to_pylist()) == {f"s{number}.wav" for number in range(4)}
    erase_sessions(["s1.wav"], IdKey(KEY), scores=str(tmp_path / "scores"), stores=[out])
    write_noise(tmp_path / "more", 6)
    for path in (tmp_path / "more").iterdir():
        path.replace(archive / path.name)
    for options in ({"limit": 5}, {}, {"retry_failed": True}):
        vaemo.extract(config=config, out=out, **source, **options, executor="process")
    rows = FeatureStore.open(out).read()
    assert sorted(rows["session_id"].to_pylist()) == ["s0.wav", "s2.wav", "s3.wav", "s4.wav", "s5.wav"]
    assert "s1.wav" not in everything_in(tmp_path / "out")
    for number in (0, 2, 3, 4, 5):
        erase_sessions([f"s{number}.wav"], IdKey(KEY), scores=str(tmp_path / "scores"), stores=[out])
    vaemo.extract(config=config, out=out, **source, executor="process")
    assert FeatureStore.open(out).read().num_rows == 0


def test_tombstones_need_the_key_that_made_them(store, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(store, checkpoint, out)
    erase_sessions(["s0005"], IdKey(KEY), scores=str(out))
    with pytest.raises(OtherRunError, match="was written with another key"):
        erase_sessions(["s0006"], IdKey("another secret of mine"), scores=str(out))
    monkeypatch.setenv(KEY_VARIABLE, "another secret of mine")
    with pytest.raises(OtherRunError, match="or what was erased would come back"):
        run(store, checkpoint, out)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UsageError, match="which says what was erased, needs a secret key"):
        run(store, checkpoint, out)
    assert Tombstones.read(str(tmp_path / "nowhere")).erased(["a"]) == []


def test_the_command_erases_reports_and_deltas_too(checkpoint, store, tmp_path, capsys):
    out, deltas = tmp_path / "out", personal(store, tmp_path)
    run(store, checkpoint, out)
    (tmp_path / "report" / "pictures").mkdir(parents=True)
    for name in ("index.html", "pictures/s0005.png", "mine.txt"):
        (tmp_path / "report" / name).write_text("s0005")
    speakers = set(pq.read_table(deltas + "/speakers.parquet")["speaker_id"].to_pylist())
    arguments = ["erase", "--session", "s0005", "--scores", str(out), "--report", str(tmp_path / "report")]
    tend.main([*arguments, "--personal", deltas])
    assert "1 from sessions" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "report").rglob("*") if path.is_file()] == ["mine.txt"]
    left = set(pq.read_table(deltas + "/speakers.parquet")["speaker_id"].to_pylist())
    assert speakers - left == {"p0005"}
    assert "p0005" not in Personal.load(deltas, fingerprint=load_checkpoint(tmp_path / "film").fingerprint).index
    # As an editor of Windows saves it. What is not there, such as an id with a slip, is said.
    (tmp_path / "ids.txt").write_text("\ufeffs0006\r\n\r\ns0055\r\n", encoding="utf-8")
    (tmp_path / "wide.txt").write_text("s0007\ns0007 \n", encoding="utf-16")
    for name, said in (("ids.txt", "warning: no row is of a call 's0055'. Tombstones stay"), ("wide.txt", "")):
        tend.main(["erase", "--sessions", str(tmp_path / name), "--scores", str(out)])
        printed = capsys.readouterr().out
        assert "1 from sessions" in printed
        assert said in printed
        assert ("warning" in printed) == bool(said)
    with pytest.raises(UsageError, match="--session is empty"):
        tend.main(["erase", "--session", "", "--scores", str(out)])


@pytest.mark.parametrize("option", ["--scores", "--store", "--report", "--personal"])
def test_a_folder_that_is_not_there_is_not_made_by_erasing(checkpoint, store, tmp_path, option):
    out = tmp_path / "out"
    run(store, checkpoint, out)
    before = everything_in(out)
    with pytest.raises(UsageError, match="none does not exist, so nothing was erased"):
        tend.main(["erase", "--session", "s0005", "--scores", str(out), option, str(tmp_path / "none")])
    assert everything_in(out) == before
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_goes_by_the_name_of_the_scores(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scores", "erase", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vaemo.scores", run_name="__main__")
    assert ended.value.code == 0
    assert "--session ID" in capsys.readouterr().out


def with_speakers(store):
    """Speaker embeddings beside the speech of a store."""
    random = np.random.default_rng(0)
    for part in files.list_files(store):
        table = files.read_parquet(part)
        vectors = random.standard_normal((len(table), 4)).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
        files.write_parquet_whole(part, table.append_column("speaker", column))
    return store


def personal(store, tmp_path):
    """Deltas of p0001 and p0005 as jobs/personalize.py writes them; their checkpoint is tmp_path/film."""
    with_speakers(store)
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "film", dims={"speech": 6, "speaker": 4}))
    last, speakers = checkpoint.model.film.last, ["p0001", "p0005"]
    torch.manual_seed(0)
    parameters = {name: 0.1 * torch.randn(2, *tensor.shape) for name, tensor in last.state_dict(prefix="last.").items()}
    deltas = str(tmp_path / "deltas")
    Personal(parameters, {name: row for row, name in enumerate(speakers)}, checkpoint.fingerprint).save(deltas)
    files.write_parquet_whole(files.join(deltas, SPEAKERS), pa.table({"speaker_id": speakers}))
    used = pa.table({"session_id": ["s0001", "s0005"], "utt_id": ["s0001-0000", "s0005-0000"], "speaker_id": speakers})
    files.write_parquet_whole(files.join(deltas, USED), used)
    files.write_json(files.join(deltas, PERSONAL_FILE), {"fingerprint": "1234"})
    return deltas


def test_personal_deltas_change_their_speakers_alone(store, tmp_path):
    deltas, checkpoint = personal(store, tmp_path), str(tmp_path / "film")
    plain = run(store, checkpoint, tmp_path / "plain")
    changed = run(store, checkpoint, tmp_path / "out", personal=deltas)
    known = Personal.load(deltas, fingerprint=load_checkpoint(checkpoint).fingerprint)
    own = np.array([speaker in known.index for speaker in plain["speaker_id"].to_pylist()])
    difference = np.abs(plain["valence"].to_numpy() - changed["valence"].to_numpy())
    assert difference[own].max() > 1e-4 > SINGLE > difference[~own].max(initial=0)
    assert 0 < own.sum() < len(own)
    table = pa.concat_tables(files.read_parquet(part) for part in files.list_files(store))
    alone = table.filter(pc.equal(table["session_id"], "s0005"))
    model = load_checkpoint(checkpoint).model.eval()
    expected = score_table(alone, [model], lanes=4, chunk=16, personal=known)
    found = changed.filter(pc.equal(changed["session_id"], "s0005"))
    assert np.abs(found["valence"].to_numpy() - expected["valence"].to_numpy()).max() < SINGLE
    with pytest.raises(OtherRunError, match="personal was"):
        run(store, checkpoint, tmp_path / "out")


def test_deltas_of_another_checkpoint_are_refused(store, tmp_path):
    deltas = personal(store, tmp_path)
    other = make_checkpoint(tmp_path / "other", 1, dims={"speech": 6, "speaker": 4})
    with pytest.raises(ReadCheckpointError, match="belongs to the checkpoint"):
        run(store, other, tmp_path / "out", personal=deltas)
    with pytest.raises(UsageError, match="--personal belongs to one checkpoint, and 2 are given"):
        run(store, f"{tmp_path / 'film'},{other}", tmp_path / "out", personal=deltas)
