"""The folder of scores: its schemas, its parts, and the sum of every session against a plain loop."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from score_rows import make_utterances

from vaemo import files, scores
from vaemo.config import ScoreConfig
from vaemo.errors import ReadScoresError
from vaemo.units import DIMENSIONS, LabelScale

# The table keeps float32, the loop below works in float64.
FLOAT32 = 2e-6

SCORE = ScoreConfig(low_valence=0.45, low_arousal=0.55, end_half_life_s=20.0)


def expected(rows, everyone):
    """One row of the session table, said as the documentation says it."""
    scored = [row for row in rows if row["status"] == "ok"]
    end_s = max(row["end_s"] for row in everyone)
    result = {
        "n_utterances": len(rows),
        "n_scored": len(scored),
        "n_failed": len(rows) - len(scored),
        "talk_s": sum(row["end_s"] - row["start_s"] for row in rows),
    }
    length = np.array([row["end_s"] - row["start_s"] for row in scored])
    minute = np.array([(row["start_s"] + row["end_s"]) / 120 for row in scored])
    recency = np.array([2 ** ((row["end_s"] - end_s) / SCORE.end_half_life_s) for row in scored])
    for dimension, low in zip(DIMENSIONS, (SCORE.low_valence, SCORE.low_arousal), strict=True):
        value = np.array([row[dimension] for row in scored])
        weight = np.array([row.get(f"{dimension}_weight", 1.0) for row in scored])
        slope = np.polyfit(minute, value, 1, w=np.sqrt(length * weight))[0]
        settled = np.average(value, weights=length * weight)
        lowest = int((settled + weight * (value - settled)).argmin())
        result |= {
            f"{dimension}_mean": np.average(value, weights=length),
            f"{dimension}_min": value[lowest],
            f"{dimension}_min_at_s": scored[lowest]["start_s"],
            f"{dimension}_slope_per_min": slope,
            f"{dimension}_below_s": length[value < low].sum(),
            f"{dimension}_end_weighted": np.average(value, weights=length * recency),
        }
    return result


def weighed(table, seed=3):
    """The table with weights where there are scores, as a checkpoint that knows its error by position leaves them."""
    scored, random = table["valence"].is_valid(), np.random.default_rng(seed)
    for name in scores.WEIGHT_SCHEMA.names:
        weight = pa.array(random.uniform(0.05, 1, table.num_rows), pa.float32())
        table = table.append_column(name, pc.if_else(scored, weight, pa.scalar(None, pa.float32())))
    return table


@pytest.mark.parametrize("make", [make_utterances, lambda: weighed(make_utterances())], ids=["alike", "weighed"])
def test_a_session_is_what_a_plain_loop_says(make):
    table = make()
    rows = table.to_pylist()
    summary = scores.summarise_sessions(table, SCORE)
    assert summary.schema.equals(scores.SESSION_SCHEMA)
    keys = list(dict.fromkeys((row["session_id"], row["role"]) for row in rows))
    assert [(row["session_id"], row["role"]) for row in summary.to_pylist()] == keys
    for row in summary.to_pylist():
        everyone = [other for other in rows if other["session_id"] == row["session_id"]]
        own = [other for other in everyone if other["role"] == row["role"]]
        for name, value in expected(own, everyone).items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=FLOAT32), name
        assert row["run_id"] == "0123456789ab"


def test_the_first_utterance_is_the_lowest_only_where_it_is_trusted():
    value, start = [0.30, 0.5, 0.35, 0.6, 0.55, 0.6], np.arange(6) * 5.0
    table = pa.table(
        {
            "session_id": ["a"] * 6,
            "utt_id": list("123456"),
            "start_s": start,
            "end_s": start + 4,
            "valence": value,
            "arousal": [0.5] * 6,
        }
    )
    rising = scores.summarise_sessions(table, SCORE).to_pylist()[0]
    weights = pa.array([0.2, 0.4, 1, 1, 1, 1], pa.float32())
    table = table.append_column("valence_weight", weights).append_column("arousal_weight", weights)
    settled = scores.summarise_sessions(table, SCORE).to_pylist()[0]
    assert (rising["valence_min"], rising["valence_min_at_s"]) == pytest.approx((0.30, 0.0))
    assert (settled["valence_min"], settled["valence_min_at_s"]) == pytest.approx((0.35, 10.0))
    assert settled["valence_mean"] == rising["valence_mean"]
    assert scores.lowest_of(table.to_pylist(), "valence") == 2
    assert scores.lowest_of(table.drop(["valence_weight"]).to_pylist(), "valence") == 0
    assert scores.lowest_of([{"valence": None}], "valence") is None


def test_a_session_does_not_depend_on_the_others_in_its_part():
    table = weighed(make_utterances())
    whole = {(row["session_id"], row["role"]): row for row in scores.summarise_sessions(table, SCORE).to_pylist()}
    alone = table.filter(pa.compute.equal(table["session_id"], "call-3"))
    for row in scores.summarise_sessions(alone, SCORE).to_pylist():
        assert row == whole[row["session_id"], row["role"]]


def test_without_times_only_what_needs_none_is_said():
    table = pa.table(
        {"session_id": ["a", "a", "a"], "utt_id": ["1", "2", "3"], "valence": [0.2, 0.9, 0.1], "arousal": [0.5] * 3}
    )
    (row,) = scores.summarise_sessions(table, SCORE).to_pylist()
    assert row["valence_mean"] == pytest.approx(0.4, abs=FLOAT32)
    assert row["valence_min"] == pytest.approx(0.1, abs=FLOAT32)
    assert row["role"] is None
    assert row["n_scored"] == 3
    needs_times = ("talk_s", "valence_min_at_s", "valence_slope_per_min", "valence_below_s", "valence_end_weighted")
    assert [row[name] for name in needs_times] == [None] * 5


def test_a_session_without_a_score_has_counts_and_nulls():
    table = pa.table(
        {
            "session_id": ["bad.wav", "b", "b"],
            "utt_id": ["bad.wav#c0-00000", "b1", "b2"],
            "start_s": pa.array([None, 0.0, 5.0], pa.float64()),
            "end_s": pa.array([None, 2.0, 6.0], pa.float64()),
            "valence": pa.array([None, None, None], pa.float32()),
            "arousal": pa.array([None, None, None], pa.float32()),
            "status": ["undecodable", "not_scored_role", "nan_audio"],
        }
    )
    bad, b = scores.summarise_sessions(table, SCORE).to_pylist()
    assert (bad["n_utterances"], bad["n_scored"], bad["n_failed"], bad["talk_s"]) == (1, 0, 1, None)
    assert (b["n_utterances"], b["n_scored"], b["n_failed"], b["talk_s"]) == (2, 0, 1, 3.0)
    assert all(b[f"{dimension}_{name}"] is None for dimension in DIMENSIONS for name in ("mean", "min", "below_s"))


def test_one_scored_utterance_has_no_slope():
    table = make_utterances().slice(0, 1)
    (row,) = scores.summarise_sessions(table, SCORE).to_pylist()
    assert row["n_scored"] == 1
    assert row["valence_slope_per_min"] is None
    assert row["valence_mean"] == row["valence_min"] == pytest.approx(row["valence_end_weighted"], abs=FLOAT32)


def test_times_of_a_clock_give_the_same_numbers():
    table = make_utterances()
    begun_s = 1_764_000_000.0
    moved = table
    for name in ("start_s", "end_s"):
        column = pc.add(table[name], begun_s)
        moved = moved.set_column(moved.column_names.index(name), name, column)
    expected = scores.summarise_sessions(table, SCORE).to_pylist()
    for row, found in zip(expected, scores.summarise_sessions(moved, SCORE).to_pylist(), strict=True):
        for dimension in DIMENSIONS:
            row[f"{dimension}_min_at_s"] += begun_s
        for name, value in row.items():
            # Doubles hold such times to a quarter of a microsecond.
            assert found[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_an_empty_part_has_no_sessions():
    assert scores.summarise_sessions(make_utterances().slice(0, 0), SCORE).num_rows == 0


def test_parts_come_back_with_their_further_columns(tmp_path):
    table = make_utterances()
    table = table.append_column("queue", pa.array(["sales"] * table.num_rows)).replace_schema_metadata({"k": "v"})
    folder = str(tmp_path)
    scores.write_part(folder, "part-a.parquet", table.slice(0, 24), SCORE, travel=["queue"])
    scores.write_part(folder, "date=2026-01-01/part-b.parquet", table.slice(24), SCORE, travel=["queue"])
    back = scores.read_utterances(folder)
    assert back.num_rows == table.num_rows
    assert back.column_names == [*scores.UTTERANCE_SCHEMA.names, "queue"]
    assert files.read_parquet_schema(tmp_path / "utterances" / "part-a.parquet").metadata[b"k"] == b"v"
    sessions = scores.read_sessions(folder)
    assert sessions.num_rows == 14
    assert set(sessions["queue"].to_pylist()) == {"sales"}
    some = scores.read_utterances(folder, ["session_id", "valence"], sessions=["call-3"])
    assert some.column_names == ["session_id", "valence"]
    assert set(some["session_id"].to_pylist()) == {"call-3"}
    assert some.num_rows == 12
    parts = list(scores.scan_utterances(folder, ["utt_id"]))
    assert sorted(part.num_rows for part in parts) == [24, table.num_rows - 24]
    assert set(pa.concat_tables(parts)["utt_id"].to_pylist()) == set(table["utt_id"].to_pylist())


def test_scales_come_from_the_provenance(tmp_path):
    assert scores.read_provenance(str(tmp_path)) == {}
    assert scores.read_scales(str(tmp_path)) == (LabelScale(0, 1), None)
    files.write_json(tmp_path / scores.PROVENANCE, {"label_range": [-1, 1], "native_range": [1, 7]})
    assert scores.read_scales(str(tmp_path)) == (LabelScale(-1, 1), LabelScale(1, 7))


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(ReadScoresError, match=r"has no utterances/part-\*\.parquet; give a folder"):
        scores.read_utterances(str(tmp_path))
    with pytest.raises(ReadScoresError, match=r"has no sessions/part-\*\.parquet"):
        scores.read_sessions(str(tmp_path))


def test_a_part_that_is_no_parquet_is_refused(tmp_path):
    files.write_whole(tmp_path / "utterances" / "part-x.parquet", b"not parquet")
    with pytest.raises(ReadScoresError, match=r"part-x\.parquet' cannot be read"):
        scores.read_utterances(str(tmp_path))


def test_what_another_program_wrote_is_typed(tmp_path):
    columns = {"session_id": [1, 1, 2], "utt_id": [1, 2, 3], "valence": [0.5, np.nan, 0.25], "arousal": [0.5, 0.5, 0.5]}
    path = tmp_path / "utterances" / "part-x.parquet"
    files.write_parquet_whole(path, pa.table(columns))
    table = scores.read_utterances(str(tmp_path), sessions=["1"])
    assert table.select(["session_id", "utt_id", "valence"]).to_pydict() == {
        "session_id": ["1", "1"], "utt_id": ["1", "2"], "valence": [0.5, None],
    }  # fmt: skip
    files.write_parquet_whole(path, pa.table(columns | {"valence": ["0,5", "0,1", "0,2"]}))
    with pytest.raises(ReadScoresError, match=r"part-x.parquet': row 1: valence is '0,5'; it must be a number"):
        scores.read_utterances(str(tmp_path))


def test_a_part_that_lacks_a_column_is_refused(tmp_path):
    files.write_parquet_whole(tmp_path / "utterances" / "part-x.parquet", pa.table({"session_id": ["a"]}))
    with pytest.raises(ReadScoresError, match=r"has no column utt_id, valence, arousal; scores need"):
        scores.read_utterances(str(tmp_path))


def test_a_column_that_is_a_number_in_one_part_and_text_in_another_is_text(tmp_path):
    rows = make_utterances()
    for number, ref in enumerate((pa.scalar(123), pa.scalar("A7"), pa.scalar(5.5), pa.scalar(None))):
        part = rows.append_column("ref", pa.array([ref.as_py()] * len(rows), ref.type))
        scores.write_part(str(tmp_path), f"part-{number}.parquet", part, ScoreConfig(), ["ref"])
    assert scores.read_utterances(str(tmp_path))["ref"].unique().to_pylist() == ["123", "A7", "5.5", None]
    assert scores.read_sessions(str(tmp_path))["ref"].unique().to_pylist() == ["123", "A7", "5.5", None]
    dated = [pa.table({"at": pa.array([held])}) for held in (datetime.date(2026, 11, 2), "soon", [1])]
    assert scores.joined(dated)["at"].to_pylist() == ["2026-11-02", "soon", "[1]"]
    assert scores.joined([pa.table({"n": [1]}), pa.table({"n": [0.5]})])["n"].to_pylist() == [1.0, 0.5]
