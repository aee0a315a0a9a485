"""Rows become sessions: whole, in order, labels where they were, nothing that is not finite."""

import numpy as np
import pyarrow as pa
import pytest

from vaemo import files
from vaemo.config import Config
from vaemo.data.sessions import assemble_sessions, label_ranges, read_sessions
from vaemo.errors import ColumnError, LabelError, NonFiniteFeatureError
from vaemo.store import FeatureStore
from vaemo.testing import linear_world, write_store


def table(**columns):
    n = len(columns["session_id"])
    defaults = {
        "utt_id": [f"u{row}" for row in range(n)],
        "speech": pa.array([[float(row), 1.0] for row in range(n)], pa.list_(pa.float32(), 2)),
    }
    return pa.table(defaults | columns)


def test_scattered_rows_come_together_in_order():
    mixed = table(session_id=list("abacb"), position=[1, 5, 0, 0, 2], valence=[0.1, None, 0.3, 0.4, 0.5])
    sessions = assemble_sessions(mixed)
    assert [session.session_id for session in sessions] == ["a", "b", "c"]
    assert [session.rows.tolist() for session in sessions] == [[2, 0], [4, 1], [3]]
    assert [session.utt_ids.tolist() for session in sessions] == [["u2", "u0"], ["u4", "u1"], ["u3"]]
    assert sessions[0].streams["speech"].tolist() == [[2, 1], [0, 1]]
    assert sessions[0].streams["speech"].dtype == np.float32
    np.testing.assert_allclose(sessions[1].labels, [[0.5, np.nan], [np.nan, np.nan]], rtol=1e-6)
    assert np.isnan(sessions[0].observed).all()
    assert [len(session) for session in sessions] == [2, 2, 1]


def test_absent_columns_have_defaults():
    (session,) = assemble_sessions(table(session_id=["a", "a"]))
    assert session.rows.tolist() == [0, 1]
    assert session.speaker_ids.tolist() == ["a", "a"]
    assert session.split is session.fold is None
    assert np.isnan(session.start_s).all()


def test_rows_that_are_not_ok_are_left_out():
    holed = table(
        session_id=list("aabb"),
        status=["ok", "silent", "missing", "missing"],
        speech=pa.array([[1.0, 2.0], None, None, None], pa.list_(pa.float32(), 2)),
    )
    (session,) = assemble_sessions(holed)
    assert session.utt_ids.tolist() == ["u0"]
    assert assemble_sessions(holed.slice(2)) == []


def test_one_sequence_per_speaker():
    two = table(session_id=list("aaaabb"), speaker_id=list("xyxyxy"), split=["train"] * 4 + ["dev", "test"])
    sessions = assemble_sessions(two, sequence_by="speaker")
    assert [(s.session_id, s.speaker_ids[0], s.rows.tolist()) for s in sessions] == [
        ("a", "x", [0, 2]),
        ("a", "y", [1, 3]),
        ("b", "x", [4]),
        ("b", "y", [5]),
    ]
    assert [session.split for session in assemble_sessions(two)] == ["train", None]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_view(pa.float32())])
def test_any_list_type_in_any_chunks(kind, chunks):
    values = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
    whole = table(session_id=list("abcabc"), speech=pa.array(values.tolist(), kind))
    parts = [whole.slice(start, 6 // chunks) for start in range(0, 6, 6 // chunks)]
    sessions = assemble_sessions(pa.concat_tables(parts))
    for session in sessions:
        np.testing.assert_array_equal(session.streams["speech"], values[session.rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_must_be_finite(bad):
    with pytest.raises(NonFiniteFeatureError, match="speech of utterance 'u1' holds NaN or infinity"):
        assemble_sessions(table(session_id=["a", "a"], speech=[[0.0, 1.0], [bad, 0.0]]))


def test_without_positions_time_orders_and_what_is_there_in_part_is_refused():
    timed = table(session_id=list("aab"), start_s=[2.0, 1.0, 0.0])
    assert [session.rows.tolist() for session in assemble_sessions(timed)] == [[1, 0], [2]]
    with pytest.raises(ColumnError, match="row 2: session 'a' has no position in this row"):
        assemble_sessions(table(session_id=list("aaa"), position=[0, None, 1]))


@pytest.mark.parametrize("native", [(1, 7), (0.1, 0.3), (-100, 100), (0, 10)])
def test_every_label_of_a_range_fits_into_the_model_range(native):
    config = Config().replace({"labels": {"range": list(native)}})
    labels = pa.array(np.linspace(*native, 50), pa.float32())
    mapped = label_ranges(config).mapped(pa.table({"utt_id": ["u"] * 50, "valence": labels}), ["valence"], "here")
    np.testing.assert_allclose(mapped["valence"].to_numpy(), np.linspace(0, 1, 50), atol=1e-6)
    assert 0 <= mapped["valence"].to_numpy().min() < mapped["valence"].to_numpy().max() <= 1


def test_labels_on_the_models_own_range_stay_as_they_are():
    values = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    config = Config().replace({"model": {"label_range": [-1, 1]}})
    rows = pa.table({"utt_id": ["u"] * 100, "valence": values})
    assert label_ranges(config).mapped(rows, ["valence"], "here").equals(rows)


@pytest.mark.parametrize("name", ["valence", "observed_arousal"])
def test_values_outside_their_range_are_refused_before_they_are_mapped(tmp_path, name):
    rows = rows_of_two_sessions() | {name: [1.0, 2.0, 7.5, 7.0]}
    files.write_parquet_whole(tmp_path / "part-0.parquet", pa.table(rows))
    store = FeatureStore.open(str(tmp_path))
    cures = ((None, r"\[0, 1\]\. Give the corpus's"), ([1, 7], r"\[1, 7\], which is labels\.range\. Correct"))
    for labels, cure in cures:
        with pytest.raises(LabelError, match=rf"{name} of utterance 'u[12]' in .* is (2|7\.5), outside {cure}"):
            read_sessions(store, Config().replace({"labels": {"range": labels}}))


def rows_of_two_sessions():
    return {"session_id": list("aabb"), "utt_id": [f"u{row}" for row in range(4)], "speech": [[1.0, 2.0]] * 4}


def test_labels_are_mapped_to_the_models_range(tmp_path):
    world = linear_world(0, sessions=(3, 2, 2), lengths=(4, 6), features=3)
    path = write_store(world, str(tmp_path))
    store = FeatureStore.open(path)
    plain = read_sessions(store, Config())
    wide = read_sessions(store, Config().replace({"labels": {"range": [-1, 3]}}))
    for one, other in zip(plain, wide, strict=True):
        np.testing.assert_allclose((one.labels + 1) / 4, other.labels, atol=1e-6)
    split = np.full(len(store.read(["split"])), "test", object)
    assert {session.split for session in read_sessions(store, Config(), split=split)} == {"test"}
