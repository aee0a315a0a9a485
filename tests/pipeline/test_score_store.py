"""A feature store is scored: every session once, whatever happens to the list of sessions, the rest refused."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scoring_cases import SINGLE, SMALL, assert_close, make_checkpoint, make_world, run, written

from vaemo import files
from vaemo.config import FeatureConfig
from vaemo.errors import (
    FeatureMismatchError,
    NonFiniteFeatureError,
    OtherRunError,
    ReadRecordingsError,
    ReadScoresError,
    ReadStoreError,
    RolesError,
    TooManyFailuresError,
    UsageError,
)
from vaemo.model.regressor import SessionRegressor
from vaemo.parts.index import Index
from vaemo.parts.shards import session_of
from vaemo.scores import read_provenance, read_sessions
from vaemo.scoring.table import score_table
from vaemo.store import FeatureStore
from vaemo.testing import write_store


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def store(tmp_path):
    return write_store(make_world(), str(tmp_path / "store"), parts=5)


def write_table(path, name, table):
    files.write_parquet_whole(files.join(str(path), name), table)


def test_a_store_is_scored_by_the_contract(store, checkpoint, tmp_path):
    rows = run(store, checkpoint, tmp_path / "out")
    world = make_world().table
    expected = score_table(world, [SessionRegressor.from_pretrained(checkpoint).eval()], lanes=4, chunk=16)
    assert rows["utt_id"].to_pylist() == expected["utt_id"].to_pylist()
    for name in ("valence", "arousal"):
        assert np.abs(rows[name].to_numpy() - expected[name].to_numpy()).max() < SINGLE
    parts = [files.list_files(str(tmp_path / "out" / kind)) for kind in ("utterances", "sessions")]
    names = [[path.rsplit("/", 1)[-1] for path in kind] for kind in parts]
    assert names[0] == names[1]
    assert len(names[0]) == 5  # as the store has
    assert sorted(read_sessions(str(tmp_path / "out"))["session_id"].to_pylist()) == sorted(
        pc.unique(world["session_id"]).to_pylist()
    )
    facts = read_provenance(str(tmp_path / "out"))
    assert set(rows["run_id"].to_pylist()) == {facts["run_id"]} == {facts["fingerprint"][:12]}
    assert facts["roles"] == "none declared"
    assert facts["label_range"] == [0.0, 1.0]
    assert facts["scan"] == "compiled"


def test_a_store_without_speakers_is_compared_by_session_and_says_so_once(store, tmp_path, capsys):
    norm = {**SMALL, "model": {**SMALL["model"], "speaker_norm": ["speech"]}}
    checkpoint = make_checkpoint(tmp_path / "compared", config=norm)
    rows = run(store, checkpoint, tmp_path / "out")
    assert "has no speaker_id" not in capsys.readouterr().out
    table = make_world().table
    write_table(tmp_path / "nameless", "part-0.parquet", table.drop(["speaker_id"]))
    # In this world every session is of one speaker.
    found = run(tmp_path / "nameless", checkpoint, tmp_path / "again")
    assert capsys.readouterr().out.count("has no speaker_id") == 1
    for name in ("valence", "arousal"):
        assert np.abs(found[name].to_numpy() - rows[name].to_numpy()).max() < SINGLE


def test_a_store_without_the_stream_that_is_compared_is_refused(store, tmp_path):
    norm = {**SMALL, "model": {**SMALL["model"], "speaker_norm": ["prosody"]}}
    checkpoint = make_checkpoint(tmp_path / "compared", config=norm, dims={"speech": 6, "prosody": 5})
    with pytest.raises(FeatureMismatchError, match=r"the store .* has no stream 'prosody', which the checkpoint uses"):
        run(store, checkpoint, tmp_path / "out")


def test_running_again_writes_nothing(store, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(store, checkpoint, out)
    before, summary = written(out), capsys.readouterr().out
    run(store, checkpoint, out)
    assert written(out) == before
    assert capsys.readouterr().out == f"nothing to do: all 20 sessions are scored\n{summary}"


def test_a_limit_and_then_the_rest_are_the_whole(store, checkpoint, tmp_path):
    whole = run(store, checkpoint, tmp_path / "whole")
    for limit in (3, 11, None):
        rows = run(store, checkpoint, tmp_path / "out", limit=limit)
        n_sessions = len(pc.unique(rows["session_id"]))
        assert n_sessions == (limit or 20)
    assert_close(rows, whole)
    # A part is stamped with its own sessions alone: another's erasure does not lead there.
    for entry in Index.open(str(tmp_path / "out" / "utterances")).entries.values():
        assert json.loads(entry.stamps).keys() == set(map(session_of, json.loads(entry.keys)))


def test_a_grown_store_has_only_its_new_sessions_scored(store, checkpoint, tmp_path):
    out = tmp_path / "out"
    first = run(store, checkpoint, out)
    before = written(out)
    more = make_world(1).table
    renamed = pc.binary_join_element_wise(pa.scalar("new-"), more["session_id"], "")
    utt_ids = pc.binary_join_element_wise(pa.scalar("new-"), more["utt_id"], "")
    more = more.set_column(0, "session_id", renamed).set_column(1, "utt_id", utt_ids)
    write_table(store, "part-00002x.parquet", more)
    rows = run(store, checkpoint, out)
    assert rows.filter(pc.invert(pc.starts_with(rows["session_id"], "new-"))).equals(first)
    assert rows.num_rows == first.num_rows + more.num_rows
    assert {path: time for path, time in written(out).items() if path in before} == before


def test_a_store_that_was_cut_anew_is_not_scored_twice(checkpoint, tmp_path):
    world = make_world()
    out = tmp_path / "out"
    first = run(write_store(world, str(tmp_path / "a"), parts=5), checkpoint, out, limit=13)
    rows = run(write_store(world, str(tmp_path / "b"), parts=2), checkpoint, out)
    assert rows["utt_id"].to_pylist() == world.table["utt_id"].to_pylist()
    kept = pc.is_in(rows["session_id"], pc.unique(first["session_id"]))
    assert rows.filter(kept).equals(first)


def test_changed_utterances_of_a_scored_session_are_refused(store, checkpoint, tmp_path):
    run(store, checkpoint, tmp_path / "out")
    part = files.list_files(store)[0]
    files.write_parquet_whole(part, files.read_parquet(part).slice(1))
    with pytest.raises(OtherRunError, match="session 's0000' is finished"):
        run(store, checkpoint, tmp_path / "out")


def test_other_settings_are_refused_and_nothing_is_touched(store, checkpoint, tmp_path):
    out = tmp_path / "out"
    run(store, checkpoint, out)
    before = written(out)
    with pytest.raises(OtherRunError, match=r"score.chunk was 16, is now 32"):
        run(store, checkpoint, out, score={"chunk": 32})
    with pytest.raises(OtherRunError, match="checkpoints was"):
        run(store, make_checkpoint(tmp_path / "other", 1), out)
    assert written(out) == before
    run(store, checkpoint, out, score={"max_failed_fraction": 0.5})


def test_failures_are_rows_a_table_and_an_exit_code(store, checkpoint, tmp_path, capsys):
    part = files.list_files(store)[0]
    table = files.read_parquet(part)
    status = pa.array(["nan_audio" if i % 2 else "ok" for i in range(len(table))])
    files.write_parquet_whole(part, table.set_column(table.column_names.index("status"), "status", status))
    for _ in range(2):  # the second run finds everything done, and ends as the first did
        with pytest.raises(TooManyFailuresError, match=r"score.max_failed_fraction allows 5.0%"):
            run(store, checkpoint, tmp_path / "out")
        assert f"{len(table) // 2}  nan_audio" in capsys.readouterr().out
    rows = run(store, checkpoint, tmp_path / "out", score={"max_failed_fraction": 0.9})
    failed = rows.filter(pc.equal(rows["status"], "nan_audio"))
    assert len(failed) == failed["valence"].null_count == len(table) // 2


def test_a_dry_run_writes_nothing(store, checkpoint, tmp_path, capsys):
    with pytest.raises(ReadScoresError):
        run(store, checkpoint, tmp_path / "out", limit=9, dry_run=True)
    assert "would score 9 of 9 sessions in 3 parts" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_several_checkpoints_give_their_deviation(store, tmp_path):
    paths = [make_checkpoint(tmp_path / f"c{seed}", seed) for seed in range(2)]
    rows = run(store, ",".join(paths), tmp_path / "out")
    singles = [run(store, path, tmp_path / f"out{i}")["arousal"].to_numpy() for i, path in enumerate(paths)]
    assert np.abs(rows["arousal_sd"].to_numpy() - np.std(singles, axis=0, ddof=1)).max() < SINGLE
    other = make_checkpoint(tmp_path / "wide", config={**SMALL, "model": {"label_range": [-1, 1]}})
    with pytest.raises(FeatureMismatchError, match=r"differ in .*label range.*\[0.0, 1.0\] and .*\[-1.0, 1.0\]"):
        run(store, f"{paths[0]},{other}", tmp_path / "out2")


def test_features_that_the_checkpoint_was_not_made_for_are_refused(store, tmp_path):
    other = make_checkpoint(tmp_path / "other", dims={"speech": 7})
    with pytest.raises(
        FeatureMismatchError, match=r"'speech' of the store .* has 6 numbers; the checkpoint was made for 7"
    ):
        run(store, other, tmp_path / "out")
    marked = make_checkpoint(tmp_path / "marked", feature_fingerprints={"speech": "aaaa"})
    info = {"schema_version": 1, "extractors": {"speech": {"fingerprint": "bbbb"}}}
    files.write_json(files.join(store, "_vaemo.json"), info)
    with pytest.raises(FeatureMismatchError, match="made by the extractor bbbb"):
        run(store, marked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_differs_from_training_is_warned_of(store, tmp_path, capsys):
    checkpoint = make_checkpoint(
        tmp_path / "c", config={**SMALL, "sessions": {"sequence_by": "speaker"}}, synthetic=True
    )
    run(store, checkpoint, tmp_path / "out")
    said = capsys.readouterr().out
    assert "sessions.sequence_by is session, the checkpoint was trained with speaker" in said
    assert "trained on synthetic speech" in said
    files.write_json(files.join(store, "_vaemo.json"), {"schema_version": 1, "synthetic": True})
    run(store, checkpoint, tmp_path / "out2", sessions={"sequence_by": "speaker"})
    assert "warning" not in capsys.readouterr().out


def test_observed_values_are_mapped_to_the_range_of_the_model(store, checkpoint, tmp_path):
    plain = run(store, checkpoint, tmp_path / "plain")

    def watched(value, label_range, out):
        for part in files.list_files(store):
            table = files.read_parquet(part)
            observed = pa.array(np.where(np.arange(len(table)) % 7 == 0, value, np.nan), pa.float32(), from_pandas=True)
            index = table.column_names.index("observed_valence")
            files.write_parquet_whole(part, table.set_column(index, "observed_valence", observed))
        files.write_json(files.join(store, "_vaemo.json"), {"schema_version": 1, "label_range": label_range})
        return run(store, checkpoint, tmp_path / out)

    here, there = watched(0.75, [0, 1], "here"), watched(0.5, [-1, 1], "there")
    assert_close(here, there)
    assert not here["valence"].equals(plain["valence"])


def test_a_session_in_two_parts_is_refused(store, checkpoint, tmp_path):
    part = files.list_files(store)[0]
    table = files.read_parquet(part)
    utt_ids = pc.binary_join_element_wise(table["utt_id"], pa.scalar("x"), "")
    write_table(store, "part-9.parquet", table.set_column(1, "utt_id", utt_ids).slice(0, 1))
    with pytest.raises(ReadStoreError, match=r"session 's0000' occurs in .* and in .*part-9.parquet; a session"):
        run(store, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("number", [None, float("nan"), float("inf")])
def test_vectors_that_hold_no_number_are_refused(number, checkpoint, tmp_path):
    # pandas writes a NaN in a vector as null.
    vectors = [[0.5] * 6, [0.5, number, *[0.5] * 4]]
    (tmp_path / "store").mkdir()
    ids = {"utt_id": ["a", "b"], "session_id": ["s", "s"]}
    pq.write_table(pa.table({**ids, "speech": vectors}), tmp_path / "store" / "a.parquet")
    with pytest.raises(NonFiniteFeatureError, match="speech of utterance 'b' holds NaN or infinity"):
        run(tmp_path / "store", checkpoint, tmp_path / "out")


def test_inputs_that_are_nothing_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="does not exist; give a feature store, a manifest or a folder"):
        run(str(tmp_path / "none"), checkpoint, tmp_path / "out")
    (tmp_path / "call.WAV").write_bytes(b"RIFF")
    with pytest.raises(UsageError, match=r"call\.WAV is a recording; give the folder that it lies in"):
        run(str(tmp_path / "call.WAV"), checkpoint, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeatureMismatchError, match="does not say which extractors"):
        run(str(tmp_path / "empty"), checkpoint, tmp_path / "out")
    full = make_checkpoint(
        tmp_path / "full", features=FeatureConfig(prosody="none", speaker="none"), dims={"speech": 120}
    )
    with pytest.raises(ReadRecordingsError, match="holds no recordings"):
        run(str(tmp_path / "empty"), full, tmp_path / "out")


def test_calls_bring_dates_and_columns(store, checkpoint, tmp_path):
    ids = [f"s{number:04d}" for number in range(20)]
    days = [f"2026-11-{20 + number % 3}" for number in range(20)]
    calls = pa.table({"session_id": ids, "date": days, "queue": [f"q{number % 4}" for number in range(20)]})
    write_table(tmp_path, "calls.parquet", calls)
    plain = run(store, checkpoint, tmp_path / "plain")
    out = tmp_path / "out"
    rows = run(store, checkpoint, out, calls=str(tmp_path / "calls.parquet"), limit=7)
    rows = run(store, checkpoint, out, calls=str(tmp_path / "calls.parquet"))
    folders = sorted(set(os.listdir(out / "utterances")) - {"_index"})
    assert folders == sorted(os.listdir(out / "sessions")) == [f"date=2026-11-{day}" for day in (20, 21, 22)]
    assert rows["utt_id"].equals(plain["utt_id"])
    assert np.abs(rows["valence"].to_numpy() - plain["valence"].to_numpy()).max() < SINGLE
    queues = dict(zip(rows["session_id"].to_pylist(), rows["queue"].to_pylist(), strict=True))
    assert queues == dict(zip(ids, calls["queue"].to_pylist(), strict=True))
    sessions = read_sessions(str(out))
    assert dict(zip(sessions["session_id"].to_pylist(), map(str, sessions["date"].to_pylist()), strict=True)) == dict(
        zip(ids, days, strict=True)
    )
    # Readers that look at the folders' names agree.
    assert pq.read_table(out / "utterances").num_rows == rows.num_rows


def cut_store(tmp_path):
    """A store of two-channel recordings in which utterances were found, without roles."""
    table = make_world(sessions=6).table
    channel = np.arange(len(table)) % 2
    utt_ids = [
        f"{s}#c{c}-{i:05d}" for i, (s, c) in enumerate(zip(table["session_id"].to_pylist(), channel, strict=True))
    ]
    names = table.column_names
    table = table.set_column(names.index("channel"), "channel", pa.array(channel, pa.int32()))
    write_table(
        tmp_path / "cut", "part-0.parquet", table.set_column(names.index("utt_id"), "utt_id", pa.array(utt_ids))
    )
    return str(tmp_path / "cut"), channel


def test_a_store_of_recordings_needs_roles(checkpoint, tmp_path):
    store, channel = cut_store(tmp_path)
    with pytest.raises(RolesError, match="nothing says who speaks"):
        run(store, checkpoint, tmp_path / "out")
    rows = run(store, checkpoint, tmp_path / "out", score={"channel_roles": ["agent", "customer"]})
    two_channels = np.array(rows["role"].to_pylist()) != "mixed"
    assert two_channels.sum() >= len(rows) - 2  # a session of one row shows one channel
    expected = np.where((channel == 1) & two_channels, "ok", "not_scored_role")
    assert rows["status"].to_pylist() == expected.tolist()
    alone = FeatureStore.open(store).read()
    alone = alone.filter(pa.array((channel == 1) & two_channels))
    model = SessionRegressor.from_pretrained(checkpoint).eval()
    customers = rows.filter(pc.equal(rows["status"], "ok"))
    assert np.abs(
        customers["valence"].to_numpy() - score_table(alone, [model], lanes=4, chunk=16)["valence"].to_numpy()
    ).max() < SINGLE  # fmt: skip


def test_roles_unknown_says_that_employees_may_be_included(checkpoint, tmp_path, capsys):
    store, _ = cut_store(tmp_path)
    rows = run(store, checkpoint, tmp_path / "out", roles_unknown=True)
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert "employees may be included" in capsys.readouterr().out
    assert "employees may be included" in read_provenance(str(tmp_path / "out"))["notice"]


def test_agents_of_any_origin_need_an_exception(store, checkpoint, tmp_path):
    for part in files.list_files(store):
        table = files.read_parquet(part)
        role = pa.array(["agent" if i % 3 == 0 else None for i in range(len(table))])
        files.write_parquet_whole(part, table.set_column(table.column_names.index("role"), "role", role))
    rows = run(store, checkpoint, tmp_path / "out")
    agents = pc.equal(rows["role"], "agent").fill_null(False)
    assert set(rows.filter(agents)["status"].to_pylist()) == {"not_scored_role"}
    assert set(rows.filter(pc.invert(agents))["status"].to_pylist()) == {"ok"}
    exception = {"agents_exception": "outside_eu", "agents_exception_reference": "memo 12"}
    everybody = run(store, checkpoint, tmp_path / "out2", score=exception)
    assert set(everybody["status"].to_pylist()) == {"ok"}
    facts = read_provenance(str(tmp_path / "out2"))
    assert (facts["agents_exception"], facts["agents_exception_reference"]) == ("outside_eu", "memo 12")
    heard = run(store, checkpoint, tmp_path / "out3", score={**exception, "context_roles": ["agent"]})
    assert heard["status"].equals(rows["status"])
    assert not heard["valence"].equals(rows["valence"])
