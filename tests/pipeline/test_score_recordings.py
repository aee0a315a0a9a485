"""Recordings and manifests are scored: customers alone unless somebody says otherwise, every bad file a row."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile
from scoring_cases import (
    SINGLE,
    assert_close,
    make_audio_checkpoint,
    make_checkpoint,
    run,
    write_calls,
)
from speech_cases import call

from vaemo.audio.decoder import Decoder
from vaemo.config import Config, FeatureConfig
from vaemo.data.manifest import read_manifest
from vaemo.errors import (
    FeatureMismatchError,
    LabelError,
    OtherRunError,
    ReadManifestError,
    RolesError,
    TooManyFailuresError,
    UsageError,
)
from vaemo.features import load_extractors
from vaemo.model.checkpoint import load_checkpoint
from vaemo.scores import read_provenance, read_sessions
from vaemo.scoring.table import score_table
from vaemo.store import write_part
from vaemo.units import SAMPLING_RATE_HZ
from vaemo.utterances import extract_recording, extract_utterances

ORDER = {"channel_roles": ["customer", "agent"]}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return folder, *write_calls(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_audio_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best")


@pytest.fixture(scope="module")
def scored(recordings, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "out"
    return run(recordings[0], checkpoint, out, score=ORDER), out


def test_only_customers_are_scored(recordings, scored):
    rows, out = scored
    customer = pc.equal(rows["role"], "customer").to_numpy()
    assert np.array_equal(customer, rows["channel"].to_numpy() == 0)
    assert set(rows.filter(pa.array(customer))["status"].to_pylist()) == {"ok"}
    agents = rows.filter(pa.array(~customer))
    assert set(agents["status"].to_pylist()) == {"not_scored_role"}
    assert agents["valence"].null_count == agents["arousal"].null_count == len(agents)
    assert read_provenance(str(out))["roles"] == ["agent", "customer"]
    sessions = read_sessions(str(out)).to_pylist()
    assert {(row["role"], row["n_scored"] > 0) for row in sessions} == {("customer", True), ("agent", False)}


def test_utterances_are_where_somebody_speaks(recordings, scored):
    rows = scored[0].to_pylist()
    for name, turns in recordings[2].items():
        for channel, start_s, end_s in turns:
            found = [row for row in rows if row["session_id"] == name and row["channel"] == channel]
            heard = sum(max(0, min(row["end_s"], end_s) - max(row["start_s"], start_s)) for row in found)
            assert heard > 0.9 * (end_s - start_s)
        assert all(row["utt_id"].startswith(f"{name}#c{row['channel']}-") for row in rows if row["session_id"] == name)


def test_a_store_of_the_same_recordings_scores_the_same(recordings, checkpoint, scored, tmp_path):
    rows = run(store_of(*recordings[:2], tmp_path / "store"), checkpoint, tmp_path / "out", score=ORDER)
    # What is not scored is not even read where recordings are scored, and was read for the store.
    others = ["run_id", "lost_s"]
    assert_close(rows.drop(others), scored[0].drop(others))


def test_nothing_without_roles(recordings, checkpoint, tmp_path):
    with pytest.raises(RolesError, match=r"nothing says who speaks.*--calls with role_ch0"):
        run(recordings[0], checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_of_calls_says_it_call_by_call(recordings, checkpoint, scored, tmp_path):
    folder, names, _ = recordings
    lines = [
        {"path": str(folder / names[0]), "role_ch0": "customer", "role_ch1": "agent", "queue": "a"},
        {"path": names[1], "role_ch0": "agent", "role_ch1": "Customer", "queue": "b"},
    ]
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = run(folder, checkpoint, tmp_path / "out", calls=str(tmp_path / "calls.jsonl"))

    def scored_channels(table, name):
        of_call = table.filter(pc.equal(table["session_id"], name))
        return set(of_call.filter(pc.equal(of_call["status"], "ok"))["channel"].to_pylist())

    assert [scored_channels(rows, name) for name in names] == [{0}, {1}, set()]
    # A call that the table does not name may be an employee's: it is not even decoded.
    (missing,) = rows.filter(pc.equal(rows["session_id"], names[2])).to_pylist()
    assert (missing["status"], missing["reason"]) == ("not_scored_role", "not in the table of calls")
    assert (missing["start_s"], missing["channel"]) == (None, None)
    assert set(rows["queue"].to_pylist()) == {"a", "b", None}
    first = pc.equal(rows["session_id"], names[0])
    expected = scored[0].filter(pc.equal(scored[0]["session_id"], names[0])).drop(["run_id"])
    assert_close(rows.filter(first).drop(["run_id", "queue"]), expected)
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text(json.dumps({"path": "elsewhere.wav", "role_ch0": "customer"}))
    with pytest.raises(
        ReadManifestError, match=r"called such as 'call0\.wav', those in the table such as 'elsewhere\.wav'"
    ):
        run(folder, checkpoint, tmp_path / "out2", calls=str(nothing))


def test_a_call_that_may_not_be_processed_is_not_decoded(recordings, checkpoint, tmp_path, monkeypatch, capsys):
    folder, names, _ = recordings
    opened, path = [], tmp_path / "calls.csv"
    monkeypatch.setattr(Decoder, "open", lambda *given, real=Decoder.open: opened.append(given[1]) or real(*given))
    path.write_text("path,role_ch0,role_ch1,process\n" + "".join(f"{name},customer,agent,No\n" for name in names[:2]))
    with open(path, "a") as file:
        file.write(f"{names[2]},customer,agent,\nmistyped.wav,,,false\n")
    rows = run(folder, checkpoint, tmp_path / "out", calls=str(path))
    said = "".join(capsys.readouterr())
    assert "note: 1 of the calls that may not be processed (process: false) are not in this source, such as" in said
    assert "'mistyped.wav'" in said
    assert {name.rpartition("/")[2] for name in opened} == {names[2]}
    assert "process" not in rows.column_names
    status = {name: rows.filter(pc.equal(rows["session_id"], name))["status"].to_pylist() for name in names}
    assert [status[name] for name in names[:2]] == [["withheld"], ["withheld"]]
    assert "ok" in status[names[2]]
    # Once it may be, the same command scores it; what has been scored stays, for `erase` to take it.
    path.write_text(path.read_text().replace(f"{names[0]},customer,agent,No", f"{names[0]},customer,agent,yes"))
    path.write_text(path.read_text().replace(f"{names[2]},customer,agent,", f"{names[2]},customer,agent,false"))
    again = run(folder, checkpoint, tmp_path / "out", calls=str(path))
    for name, known in zip(names, (None, ["withheld"], status[names[2]]), strict=True):
        found = again.filter(pc.equal(again["session_id"], name))["status"].to_pylist()
        assert ("ok" in found) if known is None else (found == known)
    path.write_text(f"path,role_ch0,process\n{names[0]},customer,perhaps\n")
    with pytest.raises(ReadManifestError, match="column process says 'perhaps' of a call; it must be true or false"):
        run(folder, checkpoint, tmp_path / "out", calls=str(path))


def test_an_objection_holds_for_copies_of_the_recording(recordings, checkpoint, tmp_path):
    folder, names, _ = recordings
    copies, path = tmp_path / "copies", tmp_path / "calls.csv"
    copies.mkdir()
    for name, source in (("a.wav", names[0]), ("b.wav", names[0]), ("c.wav", names[1])):
        shutil.copy(Path(folder, source), copies / name)
    # The first name is the one that stays where copies are done once.
    path.write_text(
        "path,role_ch0,role_ch1,process\na.wav,customer,agent,\nb.wav,agent,customer,no\nc.wav,customer,agent,\n"
    )
    rows = run(copies, checkpoint, tmp_path / "out", calls=str(path)).to_pylist()
    status = {
        name: {row["status"] for row in rows if row["session_id"] == name} for name in ("a.wav", "b.wav", "c.wav")
    }
    assert status["a.wav"] == status["b.wav"] == {"withheld"}
    assert "ok" in status["c.wav"]
    assert {row["reason"] for row in rows if row["session_id"] == "a.wav"} == {
        "the table of calls says that a recording with the same bytes may not be processed"
    }


def test_roles_unknown_scores_every_channel(recordings, checkpoint, tmp_path):
    rows = run(recordings[0], checkpoint, tmp_path / "out", roles_unknown=True)
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert set(rows["role"].to_pylist()) == {"unknown"}
    assert "employees may be included" in read_provenance(str(tmp_path / "out"))["notice"]


def test_an_exception_scores_agents_or_lets_them_move_the_memory(recordings, checkpoint, scored, tmp_path):
    folder, names, _ = recordings
    exception = {**ORDER, "agents_exception": "safety", "agents_exception_reference": "case 4"}
    everybody = run(folder, checkpoint, tmp_path / "all", score=exception, limit=1)
    assert set(everybody["status"].to_pylist()) == {"ok"}
    assert read_provenance(str(tmp_path / "all"))["agents_exception_reference"] == "case 4"
    heard = run(folder, checkpoint, tmp_path / "heard", score={**exception, "context_roles": ["agent"]}, limit=1)
    alone = scored[0].filter(pc.equal(scored[0]["session_id"], names[0]))
    assert heard["status"].equals(alone["status"])
    customers = pc.equal(heard["role"], "customer")
    difference = np.abs(heard.filter(customers)["valence"].to_numpy() - alone.filter(customers)["valence"].to_numpy())
    assert difference[0] < SINGLE < difference[1:].max()


def test_one_channel_is_mixed_whatever_was_said(recordings, checkpoint, tmp_path, capsys):
    folder, names, _ = recordings
    samples, rate = soundfile.read(folder / names[0])
    (tmp_path / "mono").mkdir()
    soundfile.write(tmp_path / "mono" / "a.wav", samples.mean(axis=1), rate)
    (tmp_path / "calls.jsonl").write_text(json.dumps({"path": "a.wav", "role_ch0": "customer", "role_ch1": "agent"}))
    for number, options in enumerate([{"score": ORDER}, {"calls": str(tmp_path / "calls.jsonl")}]):
        rows = run(tmp_path / "mono", checkpoint, tmp_path / f"out{number}", **options)
        assert set(rows["role"].to_pylist()) == {"mixed"}
        assert set(rows["status"].to_pylist()) == {"not_scored_role"}
        assert "warning: no utterance was scored: none is of a customer." in capsys.readouterr().out
    one = run(tmp_path / "mono", checkpoint, tmp_path / "one", score={"channel_roles": ["customer"]})
    assert set(one["status"].to_pylist()) == {"ok"}
    assert "no utterance was scored" not in capsys.readouterr().out


def store_of(folder, names, path):
    extractors = load_extractors(FeatureConfig())
    for name in names:
        table = extract_recording(str(folder / name), name, extractors=extractors, config=Config())
        write_part(str(path), f"part-{name}.parquet", table)
    return path


def test_channels_that_hold_the_same_are_mixed(checkpoint, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    samples, _ = call(2, seed=3)
    held = {"one": np.stack([samples.sum(axis=0)] * 2), "two": samples}
    for name, channels in held.items():
        soundfile.write(calls / f"{name}.wav", channels.T, SAMPLING_RATE_HZ)
    customers = run(calls, checkpoint, tmp_path / "out", score=ORDER)
    assert customers["role"].to_pylist() == ["mixed"] * 4 + ["customer", "agent"]
    assert customers["status"].to_pylist() == ["not_scored_role"] * 4 + ["ok", "not_scored_role"]
    assert "holds the same as another one" in customers["reason"][0].as_py()
    store = store_of(calls, [f"{name}.wav" for name in held], tmp_path / "store")
    again = run(store, checkpoint, tmp_path / "again", score=ORDER)
    assert again["status"].equals(customers["status"])
    # A table that names one of them does not make that one the customer's alone.
    (tmp_path / "calls.csv").write_text("session_id,role_ch0\none.wav,customer\ntwo.wav,customer\n")
    half = run(calls, checkpoint, tmp_path / "half", calls=str(tmp_path / "calls.csv"))
    assert half["role"].to_pylist() == ["mixed"] * 4 + ["customer", "unknown"]
    assert half["status"].equals(customers["status"])
    everyone = run(calls, checkpoint, tmp_path / "everyone", roles_unknown=True)
    assert set(everyone["status"].to_pylist()) == {"ok"}


def test_a_store_knows_of_silent_channels_and_of_single_ones(recordings, checkpoint, tmp_path):
    folder, names, _ = recordings
    samples, rate = soundfile.read(folder / names[0])
    calls = tmp_path / "calls"
    calls.mkdir()
    soundfile.write(calls / "quiet_agent.wav", samples * [1.0, 0.0], rate)
    soundfile.write(calls / "mono.wav", samples.mean(axis=1), rate)
    store = store_of(calls, ("quiet_agent.wav", "mono.wav"), tmp_path / "store")
    said = {"quiet_agent.wav": "customer", "mono.wav": "mixed"}
    for roles in (["customer", "agent"], ["customer"]):
        heard = run(calls, checkpoint, tmp_path / f"heard{len(roles)}", score={"channel_roles": roles})
        stored = run(store, checkpoint, tmp_path / f"stored{len(roles)}", score={"channel_roles": roles})
        assert_close(stored.drop(["run_id", "lost_s"]), heard.drop(["run_id", "lost_s"]))
        found = dict(zip(heard["session_id"].to_pylist(), heard["role"].to_pylist(), strict=True))
        assert found == said
        said = {"quiet_agent.wav": "unknown", "mono.wav": "customer"}


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    return make_audio_checkpoint(
        tmp_path_factory.mktemp("enrolled") / "best", features=FeatureConfig(speaker_aggregation="enrolled")
    )


def write_voices(path, speaker_ids, dim=64, seed=0):
    """An enrolment for each speaker, as somebody else's program writes it."""
    vectors = np.random.default_rng(seed).normal(size=(len(speaker_ids), dim)).astype(np.float32)
    pq.write_table(pa.table({"speaker_id": speaker_ids, "speaker": list(vectors)}), path)
    return {name: vector / np.linalg.norm(vector) for name, vector in zip(speaker_ids, vectors, strict=True)}


@pytest.mark.parametrize("kind", ["recordings", "manifest", "store"])
def test_speakers_are_enrolled_from_a_file(recordings, enrolled, tmp_path, kind):
    folder, names, _ = recordings
    manifest = kind == "manifest"
    speakers = [f"{name}-{channel}" if manifest else f"{name}#c{channel}" for name in names for channel in (0,)]
    voices = write_voices(tmp_path / "speakers.parquet", speakers)
    source = {
        "recordings": lambda: folder,
        "manifest": lambda: write_manifest(tmp_path / "m.jsonl", recordings),
        "store": lambda: store_of(folder, names, tmp_path / "store"),
    }[kind]()
    options = {"score": {} if manifest else ORDER, "speakers": str(tmp_path / "speakers.parquet")}
    rows = run(source, enrolled, tmp_path / "out", **options)

    # The same with the vectors put in by hand.
    extractors = load_extractors(FeatureConfig())
    tables = (
        [extract_utterances(read_manifest(source), extractors=extractors, config=Config())]
        if manifest
        else [extract_recording(str(folder / name), name, extractors=extractors, config=Config()) for name in names]
    )
    table = pa.concat_tables(tables)
    table = table.filter(pc.equal(table["channel"], 0))
    column = pa.array([voices[speaker] for speaker in table["speaker_id"].to_pylist()], table["speaker"].type)
    table = table.set_column(table.column_names.index("speaker"), "speaker", column)
    expected = score_table(table, [load_checkpoint(enrolled).model.eval()], lanes=4, chunk=16)
    found = rows.filter(pc.equal(rows["status"], "ok"))
    assert found["utt_id"].to_pylist() == expected["utt_id"].to_pylist()
    assert np.abs(found["valence"].to_numpy() - expected["valence"].to_numpy()).max() < SINGLE
    write_voices(tmp_path / "speakers.parquet", speakers, seed=1)
    with pytest.raises(OtherRunError, match="speakers was"):
        run(source, enrolled, tmp_path / "out", **options)


def test_enrolments_that_are_missing_or_not_meant_are_refused(recordings, checkpoint, enrolled, tmp_path):
    folder, names, _ = recordings
    voices = str(tmp_path / "speakers.parquet")
    write_voices(voices, [f"{names[0]}#c0"])
    with pytest.raises(UsageError, match=r"trained on enrolled speakers .*: give their voices with --speakers FILE"):
        run(folder, enrolled, tmp_path / "out", score=ORDER)
    with pytest.raises(UsageError, match=r"--speakers .* uses no enrolments .*speaker_aggregation is utterance"):
        run(folder, checkpoint, tmp_path / "out", score=ORDER, speakers=voices)
    features = FeatureConfig(speaker="none", speaker_aggregation="enrolled")
    deaf = make_checkpoint(tmp_path / "deaf", features=features, dims={"speech": 120})
    with pytest.raises(UsageError, match="it has no speaker stream"):
        run(store_of(folder, names[:1], tmp_path / "store"), deaf, tmp_path / "out", score=ORDER, speakers=voices)
    with pytest.raises(FeatureMismatchError, match=f"speaker '{names[1]}#c0' of session '{names[1]}' has no enrolment"):
        run(folder, enrolled, tmp_path / "out", score=ORDER, speakers=voices)
    write_voices(voices, [f"{name}#c0" for name in names], dim=5)
    with pytest.raises(FeatureMismatchError, match="have 5 numbers; the checkpoint's speaker stream has 64"):
        run(folder, enrolled, tmp_path / "out2", score=ORDER, speakers=voices)


def test_a_bad_recording_is_one_row_and_an_exit_code(recordings, checkpoint, tmp_path, capsys):
    folder, names, _ = recordings
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.wav").symlink_to(folder / names[0])
    (mixed / "broken.mp3").write_bytes(b"no music")
    (mixed / "notes.txt").write_text("not audio")
    with pytest.raises(TooManyFailuresError, match="1 of 3 utterances failed"):
        run(mixed, checkpoint, tmp_path / "out", score=ORDER)
    assert "1  undecodable" in capsys.readouterr().out
    with pytest.raises(TooManyFailuresError, match="1 of 2 sessions failed"):
        run(mixed, checkpoint, tmp_path / "out", score={**ORDER, "max_failed_fraction": 0.4})
    rows = run(mixed, checkpoint, tmp_path / "out", score={**ORDER, "max_failed_fraction": 0.5})
    (bad,) = rows.filter(pc.equal(rows["session_id"], "broken.mp3")).to_pylist()
    assert (bad["utt_id"], bad["status"], bad["start_s"], bad["valence"]) == (
        "broken.mp3#c0-00000", "undecodable", None, None
    )  # fmt: skip
    assert "notes.txt" not in rows["session_id"].to_pylist()


def test_a_checkpoint_that_does_not_name_its_extractors_is_refused(recordings, tmp_path):
    with pytest.raises(FeatureMismatchError, match="does not say which extractors"):
        run(recordings[0], make_checkpoint(tmp_path / "c"), tmp_path / "out", roles_unknown=True)


def write_manifest(path, recordings, *, roles=("customer", "agent"), **columns):
    folder, names, spoken = recordings
    lines = []
    for name in names:
        for index, (channel, start_s, end_s) in enumerate(spoken[name]):
            line = {"utt_id": f"{name}:{index}", "session_id": name, "speaker_id": f"{name}-{channel}"}
            line |= {"audio_path": str(folder / name), "start_s": start_s, "end_s": end_s, "channel": channel}
            line |= {"role": roles[channel]} if roles else {}
            lines.append(line | {key: values[index] for key, values in columns.items()})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_manifest_brings_its_own_utterances(recordings, checkpoint, tmp_path):
    rows = run(write_manifest(tmp_path / "m.jsonl", recordings), checkpoint, tmp_path / "out")
    assert [row["status"] for row in rows.to_pylist()] == ["ok", "not_scored_role"] * (len(rows) // 2)
    research = run(write_manifest(tmp_path / "r.jsonl", recordings, roles=None), checkpoint, tmp_path / "research")
    assert set(research["status"].to_pylist()) == {"ok"}
    assert read_provenance(str(tmp_path / "research"))["roles"] == "none declared"


def test_observed_values_of_a_manifest_are_on_the_corpus_range(recordings, checkpoint, tmp_path):
    plain = run(write_manifest(tmp_path / "p.jsonl", recordings), checkpoint, tmp_path / "plain")
    observed = {"observed_valence": [6.5, *[None] * 3], "observed_arousal": [1.5, *[None] * 3]}
    path = write_manifest(tmp_path / "o.jsonl", recordings, **observed)
    with pytest.raises(
        LabelError, match=r"observed_valence of utterance .* is 6.5, outside \[0, 1\]\. Give the corpus"
    ):
        run(path, checkpoint, tmp_path / "out")
    rows = run(path, checkpoint, tmp_path / "out2", labels={"range": [1, 7]})
    first = rows["position"].to_numpy() == 0
    assert np.array_equal(rows.filter(pa.array(first))["valence"], plain.filter(pa.array(first))["valence"])
    later = pa.array(~first & pc.equal(rows["status"], "ok").to_numpy())
    assert (rows.filter(later)["valence"].to_numpy() != plain.filter(later)["valence"].to_numpy()).all()


def test_a_manifest_that_leads_out_of_its_root_is_refused(recordings, checkpoint, tmp_path):
    path = write_manifest(tmp_path / "m.jsonl", recordings)
    assert run(path, checkpoint, tmp_path / "out", extract={"root": str(recordings[0])}).num_rows
    with pytest.raises(ReadManifestError, match=r"m.jsonl, line 1: audio_path leads to .*, outside extract.root"):
        run(path, checkpoint, tmp_path / "out2", extract={"root": str(tmp_path)})


def test_a_changed_manifest_is_refused(recordings, checkpoint, tmp_path):
    path = write_manifest(tmp_path / "m.jsonl", recordings)
    run(path, checkpoint, tmp_path / "out", limit=1)
    run(path, checkpoint, tmp_path / "out")
    path.write_text(path.read_text().replace('"agent"', '"customer"'))
    with pytest.raises(OtherRunError, match="its utterances have changed"):
        run(path, checkpoint, tmp_path / "out")
    again = run(path, checkpoint, tmp_path / "out", changed="redo")
    assert again.equals(run(path, checkpoint, tmp_path / "new"))
    assert read_sessions(str(tmp_path / "out")).num_rows == read_sessions(str(tmp_path / "new")).num_rows
