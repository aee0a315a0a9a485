"""A call in several recordings is one session: one memory, one row of the sessions; a bad file is a row of it."""

import csv
import os
import re

import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile
from scoring_cases import make_audio_checkpoint, run, written
from speech_cases import call

import vaemo
from vaemo.config import Config, FeatureConfig
from vaemo.data.manifest import write_manifest
from vaemo.errors import ReadManifestError
from vaemo.scores import read_sessions
from vaemo.scoring.erase import erase_sessions
from vaemo.scoring.ids import IdKey
from vaemo.store import FeatureStore

ORDER = {"channel_roles": ["customer", "agent"]}
CONFIG = Config().replace({"features": {"prosody": "none"}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    features = FeatureConfig(prosody="none")
    return make_audio_checkpoint(tmp_path_factory.mktemp("model") / "best", features=features)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A call whole, and the same in two recordings that were cut between two sentences; seconds of the first."""
    folder = tmp_path_factory.mktemp("archive")
    samples, turns = call(4, gap_s=(2.0, 2.4))
    cut = int((turns[1][2] + turns[2][1]) / 2 * 16_000)
    for name, part in (("whole", samples), ("late", samples[:, cut:]), ("early", samples[:, :cut])):
        soundfile.write(folder / f"{name}.wav", part.T, 16_000)
    return folder, cut / 16_000


def table(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def of(rows, session_id):
    return rows.filter(pc.equal(rows["session_id"], session_id))


ROLES = {"role_ch0": "customer", "role_ch1": "agent"}
FILES = [("c1", "early.wav"), ("c1", "late.wav"), ("w", "whole.wav")]
CALLS = [{"session_id": name, "path": path, **ROLES} for name, path in FILES]


def test_scores_are_those_of_one_recording(archive, checkpoint, tmp_path):
    folder, cut_s = archive
    rows = run(folder, checkpoint, tmp_path / "out", calls=table(tmp_path / "calls.csv", CALLS))
    parts, whole = of(rows, "c1"), of(rows, "w")
    assert parts["utt_id"].to_pylist() == [utt_id.replace("w#", "c1#") for utt_id in whole["utt_id"].to_pylist()]
    assert [os.path.basename(path) for path in pc.unique(parts["audio_path"]).to_pylist()] == ["early.wav", "late.wav"]
    assert np.allclose(pc.unique(parts["offset_s"]).to_numpy(), [0, cut_s], atol=0.04)
    # Times count in the recording that the row names; with its offset they are those of the session.
    at = pc.add(parts["start_s"], parts["offset_s"]).to_numpy()
    assert np.allclose(at, whole["start_s"].to_numpy(), atol=0.1)
    assert parts["speaker_id"].unique().to_pylist() == ["c1#c0", "c1#c1"]
    # A memory of its own for each recording would differ far more than another cut of the speech.
    customer = pc.equal(parts["role"], "customer")
    scored, expected = (table_["valence"].filter(customer).to_numpy() for table_ in (parts, whole))
    assert np.allclose(scored, expected, atol=0.01)
    sessions = read_sessions(str(tmp_path / "out")).filter(pc.field("role") == "customer").to_pylist()
    assert sorted(row["session_id"] for row in sessions) == ["c1", "w"]
    for name in ("valence_mean", "valence_min_at_s", "valence_slope_per_min", "arousal_end_weighted", "talk_s"):
        one, other = (row[name] for row in sorted(sessions, key=lambda row: row["session_id"]))
        assert one == pytest.approx(other, rel=0.1, abs=0.05), name


def test_an_objection_under_a_name_that_no_recording_has_is_not_passed_over(archive, tmp_path):
    calls = table(tmp_path / "calls.csv", [{"path": "/elsewhere/w.wav", "process": "false"}])
    with pytest.raises(ReadManifestError, match=r"names none of .* such as '/elsewhere/w.wav'"):
        vaemo.extract(input=archive[0], calls=calls, out=tmp_path / "store", config=CONFIG, executor="process")


def test_a_store_says_where_the_audio_is(archive, checkpoint, tmp_path, monkeypatch):
    folder, _ = archive
    calls = table(tmp_path / "calls.csv", CALLS[:2])
    vaemo.extract(input=folder, calls=calls, out=tmp_path / "store", config=CONFIG, executor="process")
    rows = of(FeatureStore.open(str(tmp_path / "store")).read(), "c1")
    assert rows["position"].to_pylist() == list(range(len(rows)))
    # As a manifest, the same rows give the same features.
    names = ["utt_id", "session_id", "speaker_id", "audio_path", "start_s", "end_s", "channel", "offset_s"]
    write_manifest(tmp_path / "m.parquet", rows.select(names))
    vaemo.extract(manifest=tmp_path / "m.parquet", out=tmp_path / "again", config=CONFIG, executor="process")
    again = FeatureStore.open(str(tmp_path / "again")).read()
    assert again.select(["utt_id", "offset_s", "speech"]).equals(rows.select(["utt_id", "offset_s", "speech"]))
    # Who speaks where may differ between the recordings of a call, for a store too.
    swapped = [CALLS[0], {**CALLS[1], "role_ch0": "agent", "role_ch1": "customer"}]
    calls = table(tmp_path / "swapped.csv", swapped)
    for source in (folder, tmp_path / "store"):
        found = of(run(source, checkpoint, tmp_path / f"of-{source.name}", calls=calls), "c1")
        said = zip(
            found["audio_path"].to_pylist(), found["channel"].to_pylist(), found["role"].to_pylist(), strict=True
        )
        assert {(os.path.basename(path), channel) for path, channel, role in said if role == "customer"} == {
            ("early.wav", 0),
            ("late.wav", 1),
        }
    monkeypatch.setenv("VAEMO_ID_KEY", "k" * 32)
    folders = {"scores": str(tmp_path / "of-store"), "stores": [str(tmp_path / "store")]}
    erased, *_ = erase_sessions(["c1"], IdKey("k" * 32), **folders)
    assert erased["utterances"] == erased["stores"] == len(rows)
    outcome = vaemo.extract(input=folder, calls=calls, out=tmp_path / "store", config=CONFIG, executor="process")
    assert outcome.sessions["all"] == 1
    hidden = run(folder, checkpoint, tmp_path / "hidden", calls=calls, score={"hash_ids": True})
    told = str(hidden.to_pylist())
    assert len(hidden["audio_path"].unique().drop_null()) == 2
    assert "early" not in told
    assert not re.search(r"'c1['#]", told)


def test_one_file_may_be_missing_and_come(archive, checkpoint, tmp_path, capsys):
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "early.wav").write_bytes((archive[0] / "early.wav").read_bytes())
    calls = table(tmp_path / "calls.csv", [{**row, "offset_s": n} for n, row in enumerate(CALLS[:2])])
    options = {"calls": calls, "score": {"max_failed_fraction": 1.0}}
    rows = run(folder, checkpoint, tmp_path / "out", **options)
    (missing,) = rows.filter(pc.equal(rows["status"], "missing")).to_pylist()
    assert "not among the recordings" in missing["reason"]
    assert missing["audio_path"].endswith("late.wav")
    assert (missing["start_s"], missing["offset_s"]) == (None, 1.0)
    assert "ok" in rows["status"].to_pylist()
    before = written(tmp_path / "out")
    run(folder, checkpoint, tmp_path / "out", **options)
    assert written(tmp_path / "out") == before
    (folder / "late.wav").write_bytes((archive[0] / "late.wav").read_bytes())
    capsys.readouterr()
    run(folder, checkpoint, tmp_path / "out", **options)
    assert "1  changed since they were done" in capsys.readouterr().out
    rows = run(folder, checkpoint, tmp_path / "out", changed="redo", **options)
    assert "missing" not in rows["status"].to_pylist()
    # Recordings that run at once are listed; who speaks in the second is somebody else.
    assert "1  sessions whose recordings overlap, such as c1, by " in capsys.readouterr().out
    assert "c1#c0f2" in rows["speaker_id"].to_pylist()
    # Another place in the session is a change too.
    table(tmp_path / "calls.csv", [{**row, "offset_s": 100 * n} for n, row in enumerate(CALLS[:2])])
    run(folder, checkpoint, tmp_path / "out", **options)
    assert "1  changed since they were done" in capsys.readouterr().out
    rows = run(folder, checkpoint, tmp_path / "out", changed="redo", **options)
    assert "overlap" not in capsys.readouterr().out
    assert "c1#c0f2" not in rows["speaker_id"].to_pylist()


def test_a_table_of_paths_may_say_it_too(archive, checkpoint, tmp_path, capsys):
    folder, _ = archive
    rows = [{**row, "path": str(folder / row["path"]), "date": f"2026-11-23T1{n}:00"} for n, row in enumerate(CALLS)]
    # In order of time, however the rows stand.
    paths = table(tmp_path / "paths.csv", rows[::-1])
    found = run(paths, checkpoint, tmp_path / "out", calls=paths)
    assert set(found["session_id"].to_pylist()) == {"c1", "w"}
    names = [os.path.basename(path) for path in of(found, "c1")["audio_path"].to_pylist()]
    assert names == sorted(names)
    assert len(of(found, "c1")) == len(of(found, "w"))
    assert "score: 2 of 2 sessions" in capsys.readouterr().err


def test_what_may_not_be_processed_is_no_part_of_it(archive, checkpoint, tmp_path):
    rows = [{**CALLS[0], "process": "true"}, {**CALLS[1], "process": "false"}, {**CALLS[2], "process": ""}]
    calls = table(tmp_path / "calls.csv", rows)
    scored = run(archive[0], checkpoint, tmp_path / "out", calls=calls)
    assert of(scored, "c1")["status"].to_pylist() == ["withheld"]
    outcome = vaemo.extract(input=archive[0], calls=calls, out=tmp_path / "s", config=CONFIG, executor="process")
    assert outcome.utterances["withheld"] == 1
    rows[1]["process"] = "true"
    calls = table(tmp_path / "calls.csv", rows)
    outcome = vaemo.extract(input=archive[0], calls=calls, out=tmp_path / "s", config=CONFIG, executor="process")
    assert "withheld" not in outcome.utterances
