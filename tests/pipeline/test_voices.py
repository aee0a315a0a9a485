"""Mono calls from recording to scores: voices brought or found, roles by evidence, everybody else unscored."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from commands import run_job
from processes import kill_job, start_job
from scoring_cases import make_audio_checkpoint, rows_of, run
from speech_cases import call

import vaemo
from vaemo import commands
from vaemo.config import Config, FeatureConfig
from vaemo.errors import ExtractorError, OtherRunError, ReadVoicesError, UsageError
from vaemo.evaluation.diarisation import evaluate_voices
from vaemo.features import campplus
from vaemo.files import read_json, write_parquet_whole
from vaemo.scores import read_provenance, read_sessions
from vaemo.store import FeatureStore
from vaemo.voices import channels
from vaemo.voices.turns import Turn, rttm

RATE = 16_000
FEATURES = FeatureConfig(prosody="none", speaker="none")
AUTO = Config().replace({"voices": {"mode": "auto"}}).voices


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A folder of one mono call and one voicemail, the turns of the call, and a checkpoint."""
    folder = tmp_path_factory.mktemp("calls")
    both, turns = call(8)
    (folder / "in").mkdir()
    soundfile.write(folder / "in" / "call.wav", both.sum(axis=0), RATE)
    soundfile.write(folder / "in" / "voicemail.wav", both[0], RATE)
    (folder / "agents" / "ann").mkdir(parents=True)
    other, _ = call(12, seed=3)
    soundfile.write(folder / "agents" / "ann" / "a.wav", other[1], RATE)
    spoken = [Turn(start_s, end_s, ("customer", "agent")[who]) for who, start_s, end_s in turns]
    return folder, spoken, make_audio_checkpoint(folder / "model", features=FEATURES)


def table(folder, **columns):
    path = str(folder / "calls.parquet")
    write_parquet_whole(path, pa.table({"session_id": ["call.wav", "voicemail.wav"], **columns}))
    return path


def score(world, out, **options):
    """Scores as rows of dicts of the call, and of the voicemail."""
    folder, _, checkpoint = world
    run(str(folder / "in"), checkpoint, str(out), **options)
    rows = rows_of(out).to_pylist()
    return [[row for row in rows if row["session_id"] == name] for name in ("call.wav", "voicemail.wav")]


def write_rttm(folder, turns, name="call"):
    path = folder / "turns.rttm"
    path.write_text(rttm(name, turns))
    return str(path)


def test_brought_voices_with_roles_are_scored_as_customers_alone(calls, tmp_path, capsys):
    path = write_rttm(tmp_path, calls[1])
    rows, voicemail = score(calls, tmp_path / "s", voices_from=path)
    assert "several channels" not in capsys.readouterr().out
    assert {(row["speaker_id"], row["voice"], row["role"], row["role_by"], row["status"]) for row in rows} == {
        ("call.wav#c0v0", 0, "customer", "voices_from", "ok"),
        ("call.wav#c0v1", 1, "agent", "voices_from", "not_scored_role"),
    }
    assert [row["utt_id"] for row in rows] == [f"call.wav#c0-{n:05d}" for n in range(len(rows))]
    assert all((row["valence"] is None) == (row["role"] != "customer") for row in rows)
    assert {(row["voice"], row["role"], row["status"]) for row in voicemail} == {(None, "mixed", "not_scored_role")}
    sessions = {(row["session_id"], row["role"]): row for row in read_sessions(str(tmp_path / "s")).to_pylist()}
    assert sessions["call.wav", "customer"]["role_by"] == "voices_from"
    assert read_provenance(str(tmp_path / "s"))["voices"] == {"voices_from": path}
    # What is brought decides: other turns of a finished call are refused, the same ones are the same run.
    assert score(calls, tmp_path / "s", voices_from=path)[0] == rows
    with pytest.raises(OtherRunError, match="have changed since"):
        score(calls, tmp_path / "s", voices_from=write_rttm(tmp_path, calls[1][:-1]))


def test_error_rates_of_voices_against_a_reference(calls, tmp_path, capsys):
    path = write_rttm(tmp_path, calls[1])
    score(calls, tmp_path / "s", voices_from=path)
    commands.evaluate(["--scores", str(tmp_path / "s"), "--rttm", path, "--out", str(tmp_path / "e")])
    held = read_json(str(tmp_path / "e" / "diarisation.json"))
    assert held["n_voices_right"] == held["n_calls"] == 1
    assert held["collar_0.25_s"]["der"] < 0.05 < held["collar_0.00_s"]["der"] < 0.3
    assert "collar 0.25" in capsys.readouterr().out
    swapped = write_rttm(tmp_path, [dataclasses.replace(turn, speaker="one") for turn in calls[1]])
    assert evaluate_voices(str(tmp_path / "s"), swapped, str(tmp_path / "e"))["collar_0.25_s"]["confusion"] > 0.3


def test_found_voices_and_the_agent_who_is_verified(calls, tmp_path):
    folder = calls[0]
    voices = str(tmp_path / "voices.parquet")
    commands.enrol([str(folder / "agents"), "--out", voices])
    agents = table(tmp_path, agent_id=["ann", "bob"])
    config = {"speakers": voices, "calls": agents, "set": ["voices.mode=auto"]}
    score(calls, tmp_path / "s", limit=1, **config)
    rows, voicemail = score(calls, tmp_path / "s", **config)
    assert (rows, voicemail) == tuple(score(calls, tmp_path / "once", **config))
    assert {(row["voice"], row["role"], row["role_by"], row["status"]) for row in rows} == {
        (0, "customer", "verified", "ok"),
        (1, "agent", "verified", "not_scored_role"),
    }
    assert min(row["voice_margin"] for row in rows) > 0.15
    assert min(row["role_margin"] for row in rows) > 0.15
    # One voice, and nobody knows the agent's.
    assert {(row["voice"], row["voice_margin"], row["role"], row["role_by"]) for row in voicemail} == {
        (0, None, "unknown", None)
    }
    assert voicemail[0]["reason"] == "no voice of its agent_id is enrolled"
    about = read_provenance(str(tmp_path / "s"))["voices"]
    assert (about["voices_compared"], about["voices_enrolled"]) == ("verification of agent_id", 1)
    commands.enrol(["--erase", "ann", "--out", voices])
    rows, _ = score(calls, tmp_path / "t", **config)
    assert {row["role"] for row in rows} == {"unknown"}


def test_a_store_of_voices_is_scored_by_what_calls_say(calls, tmp_path):
    folder, _, checkpoint = calls
    settings = ["voices.mode=diarize", "features.prosody=none", "extract.keep_speaker=false"]
    store = str(tmp_path / "store")
    vaemo.extract(input=folder / "in", out=store, set=settings, executor="process")
    held = FeatureStore.open(store)
    assert set(held.dims) == {"speech"}
    assert set(held.read(["role", "voice"])["role"].to_pylist()) == {"unknown"}
    said = table(tmp_path, role_v0=["agent", "customer"], role_v1=["customer", None])
    run(store, checkpoint, str(tmp_path / "s"), calls=said)
    rows = rows_of(tmp_path / "s").to_pylist()
    assert {(row["session_id"], row["voice"], row["role"], row["status"], row["role_by"]) for row in rows} == {
        ("call.wav", 0, "agent", "not_scored_role", "calls"),
        ("call.wav", 1, "customer", "ok", "calls"),
        ("voicemail.wav", 0, "customer", "ok", "calls"),
    }
    # A channel's role says nothing of the voices in a mix; of a voice alone in it, it does.
    run(store, checkpoint, str(tmp_path / "t"), set=["score.channel_roles=[customer]"])
    rows = rows_of(tmp_path / "t").to_pylist()
    assert {(row["session_id"], row["status"]) for row in rows} == {
        ("call.wav", "not_scored_role"),
        ("voicemail.wav", "ok"),
    }


def test_a_line_of_each_party_is_diarised_on_its_own(calls, tmp_path, capsys):
    both, _ = call(6)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "two.wav", both.T, RATE)
    options = {"set": ["voices.mode=diarize", "score.channel_roles=[agent,customer]"]}
    # Turns without channels are those of a mono recording, and change nothing here.
    options["voices_from"] = write_rttm(tmp_path, calls[1], "two")
    run(str(tmp_path / "in"), calls[2], str(tmp_path / "s"), **options)
    assert "1 recordings have several channels, and turns that name none" in capsys.readouterr().out
    rows = rows_of(tmp_path / "s").to_pylist()
    assert {(row["speaker_id"], row["role"], row["role_by"]) for row in rows} == {
        ("two.wav#c0v0", "agent", "channel"),
        ("two.wav#c1v0", "customer", "channel"),
    }


def test_turns_of_another_recording_are_a_row(calls, tmp_path):
    late = [*calls[1], Turn(900.0, 901.0, "agent")]
    options = {"voices_from": write_rttm(tmp_path, late), "set": ["score.max_failed_fraction=1"]}
    rows, _ = score(calls, tmp_path / "s", **options)
    assert [(row["status"], row["start_s"]) for row in rows] == [("bad_voices", None)]
    assert "reaches to 901.0 s" in rows[0]["reason"]


@pytest.mark.parametrize(
    ("samples", "status"),
    [
        (np.zeros(5 * RATE), "silent"),
        (0.3 * np.sin(2 * np.pi * 440 * np.arange(5 * RATE) / RATE), "silent"),
    ],
)
def test_where_nobody_speaks_nobody_is_found(calls, tmp_path, samples, status):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", samples, RATE)
    options = {"set": ["voices.mode=auto", "score.channel_roles=[customer]", "score.max_silent_fraction=1"]}
    run(str(tmp_path / "in"), calls[2], str(tmp_path / "s"), **options)
    assert rows_of(tmp_path / "s")["status"].to_pylist() == [status]


def test_what_cannot_be_done_is_refused_at_once(calls, tmp_path, monkeypatch):
    folder, turns, _ = calls
    with pytest.raises(ReadVoicesError, match="of none of the 2 recordings"):
        score(calls, tmp_path / "s", voices_from=write_rttm(tmp_path, turns, "strange"))
    with pytest.raises(UsageError, match="no enrolled voice to compare with"):
        score(calls, tmp_path / "s", set=["voices.mode=auto", "voices.identification=DPIA", "score.channel_roles=[x]"])
    other = str(tmp_path / "other.parquet")
    write_parquet_whole(other, pa.table({"speaker_id": ["ann"], "speaker": [[1.0, 0.0]], "role": ["agent"]}))
    agents = table(tmp_path, agent_id=["ann", "ann"])
    with pytest.raises(ReadVoicesError, match="made with an encoder that it does not name"):
        score(calls, tmp_path / "s", set=["voices.mode=auto"], speakers=other, calls=agents)
    with pytest.raises(UsageError, match="uses no enrolments"):
        score(calls, tmp_path / "s", speakers=other, calls=agents)
    monkeypatch.setattr(campplus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtractorError, match=r"vaemo\[diarize\]"):
        vaemo.extract(input=folder / "in", out=tmp_path / "t", set=["voices.mode=auto"], executor="process")


@pytest.mark.slow
@pytest.mark.ray
def test_what_was_killed_and_run_again_is_equal_row_for_row(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(8):
        soundfile.write(tmp_path / "in" / f"{n}.wav", call(6, seed=n)[0].sum(axis=0), RATE)
    settings = ["voices.mode=auto", "features.prosody=none", "features.speaker=campplus", "extract.shard_recordings=1"]
    once = vaemo.extract(input=tmp_path / "in", out=tmp_path / "once", set=settings, executor="process")
    options = ["--input", tmp_path / "in", "--out", tmp_path / "store"]
    parts = tmp_path / "store"
    kill_job(start_job("extract", *options, overrides=settings), lambda: len(list(parts.glob("*.parquet"))) > 2)
    n_parts = len(list(parts.glob("*.parquet")))
    done = run_job("extract", *options, *(part for setting in settings for part in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    assert 0 < n_parts < once.sessions["all"]
    rows, expected = (FeatureStore.open(str(tmp_path / name)).read().sort_by("utt_id") for name in ("store", "once"))
    vectors = [name for name in rows.column_names if pa.types.is_fixed_size_list(rows.schema.field(name).type)]
    assert "speaker" in vectors
    floats = [name for name in rows.column_names if pa.types.is_floating(rows.schema.field(name).type)]
    assert rows.drop_columns([*vectors, *floats]).equals(expected.drop_columns([*vectors, *floats]))
    for name in [*vectors, *floats]:
        found, wanted = (np.array(table[name].to_pylist(), float) for table in (rows, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)


def test_vectors_of_windows_are_all_that_is_kept_of_a_long_call(monkeypatch):
    """An hour of speech in utterances of 6 s, none of whose samples stay in memory."""
    monkeypatch.setattr(channels, "find_voices", lambda vectors, *_: vectors[:1])
    cutter = channels.VoiceCutter(1, AUTO, Config().vad, embed=lambda w: np.zeros((len(w), 192), np.float32) + 1)
    samples = np.zeros(6 * RATE, np.float32)
    for n in range(600):
        cutter.push(channels.Utterance(0, 6.0 * n, 6.0 * n + 6, samples.copy()))
    held = sum(one.vectors.nbytes + one.power.nbytes + one.starts_s.nbytes for one in cutter._heard[0])
    assert held < 20e6 < 600 * samples.nbytes
    assert len(cutter.finish()[0]) == 600
