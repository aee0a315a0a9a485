"""Coverage and results by group, as an evaluation reports them."""

import numpy as np
import pyarrow as pa
import pytest

from vaemo import files, scores
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.evaluation.evaluate import evaluate, table_of
from vaemo.tables import with_column
from vaemo.trust.fit import _unfit
from vaemo.units import DIMENSIONS

QUICK = Config().replace({"evaluate": {"bootstrap": 200}})


def make_scores(tmp_path, *, n_sessions=40, n=10, seed=0, biased=0.0, further=None):
    """Scores with intervals of one width, and labels with a column `gender` that knows of a bias."""
    random = np.random.default_rng(seed)
    session = np.repeat(np.arange(n_sessions), n)
    label = random.uniform(0.2, 0.8, (len(session), 2))
    second = session % 2 == 1
    found = np.clip(label + 0.05 * random.standard_normal(label.shape) + biased * second[:, None], 0, 1)
    ids = {
        "session_id": [f"s{k}" for k in session],
        "utt_id": [f"u{k}" for k in range(len(session))],
        "speaker_id": [f"p{k}" for k in session],
        "split": ["test"] * len(session),
        "role": ["customer"] * len(session),
    }
    table = pa.table({**ids, **{name: found[:, k] for k, name in enumerate(DIMENSIONS)}})
    for k, name in enumerate(DIMENSIONS):
        for end, sign in (("low", -1), ("high", 1)):
            table = table.append_column(f"{name}_{end}", pa.array((found[:, k] + sign * 0.05).astype(np.float32)))
    for name, values in (further or {}).items():
        table = table.append_column(name, pa.array(values(session)))

    def bounds(utterances, sessions):
        for name in DIMENSIONS:
            for end, sign in (("low", -1), ("high", 1)):
                middle = sessions[f"{name}_mean"].to_numpy()
                sessions = sessions.append_column(f"{name}_mean_{end}", pa.array(middle + np.float32(sign * 0.02)))
        return sessions

    out = str(tmp_path / "scores")
    scores.write_part(out, "part-0.parquet", table, Config().score, further=bounds)
    files.write_json(files.join(out, scores.PROVENANCE), {"label_range": [0, 1], "trust": {"coverage": 0.7}})
    labels = pa.table({**ids, "gender": np.where(second, "woman", "man"), "age": 20.0 + session})
    labels = labels.append_column("speech", pa.array([[0.0]] * len(session), pa.list_(pa.float32(), 1)))
    for k, name in enumerate(DIMENSIONS):
        labels = labels.append_column(name, pa.array(label[:, k]))
    files.write_parquet_whole(str(tmp_path / "labels" / "part-0.parquet"), labels)
    return out, str(tmp_path / "labels")


def test_coverage_and_width_in_all_and_by_position_and_of_calls(tmp_path):
    out, labels = make_scores(tmp_path)
    result = evaluate(out, labels, str(tmp_path / "eval"), QUICK)
    coverage = result["coverage"]
    assert coverage["nominal"] == 0.7
    for name in DIMENSIONS:
        # Half a width of one deviation holds 68 %, and of two standard errors of a mean of ten, 79 %.
        assert coverage["utterances"][name]["covered"] == pytest.approx(0.683, abs=0.06)
        assert coverage["utterances"][name]["width"] == pytest.approx(0.1, abs=1e-4)
        assert coverage["calls"][name]["n"] == 40
        assert coverage["calls"][name]["covered"] == pytest.approx(0.79, abs=0.15)
    by_position = coverage["by"]["position"]
    assert sum(found["valence"]["n"] for found in by_position.values()) == 400
    assert "intervals of 70 %" in table_of(result)


def test_scores_without_intervals_have_no_coverage(tmp_path):
    out, labels = make_scores(tmp_path)
    part = files.join(out, "utterances", "part-0.parquet")
    table = files.read_parquet(part)
    files.write_parquet_whole(part, table.select([name for name in table.column_names if "_low" not in name]))
    assert "coverage" not in evaluate(out, labels, str(tmp_path / "eval"), QUICK)


@pytest.mark.parametrize(("biased", "found"), [(0.0, False), (0.06, True)])
def test_a_gap_between_groups_is_told_from_none(tmp_path, biased, found):
    out, labels = make_scores(tmp_path, biased=biased, seed=1)
    result = evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["gender", "age"])
    gender = result["by"]["gender"]
    assert {name: group["n_speakers"] for name, group in gender["groups"].items()} == {"man": 20, "woman": 20}
    gap = gender["largest_gap"]["bias"]
    assert (gap["p"] < 0.02) == found
    assert gap["compared"] == 2
    assert len(result["by"]["age"]["groups"]) == 4
    assert "gender" in table_of(result)


def test_groups_of_few_speakers_are_said_to_be_small(tmp_path):
    out, labels = make_scores(tmp_path, n_sessions=12, biased=0.3)
    result = evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["gender"])
    assert result["by"]["gender"]["largest_gap"] is None
    assert "(only 6 speakers)" in table_of(result)
    assert "no gap is judged" in table_of(result)


def test_employees_are_no_groups_of_an_archive(tmp_path):
    names = {
        "handled_by": lambda session: np.where(session % 2, "anna", "bob"),
        "codec": lambda session: np.where(session % 2, "a", "u"),
    }
    out, labels = make_scores(tmp_path, further=names)

    def by(name, config=QUICK):
        return evaluate(out, labels, str(tmp_path / "eval"), config, by=[name])["by"][name]["groups"]

    with pytest.raises(UsageError, match="may name employees"):
        by("handled_by")
    with pytest.raises(UsageError, match="may name employees"):
        by("speaker_id")
    assert set(by("codec")) == {"a", "u"}
    assert set(by("gender")) == {"man", "woman"}
    declared = QUICK.replace({"evaluate": {"no_employees": ["handled_by", "codec"]}})
    assert set(by("handled_by", declared)) == {"anna", "bob"}
    with pytest.raises(UsageError, match="never grouped by employee"):
        by("agent_name", declared)


def test_columns_that_are_not_there_or_tell_too_much_apart(tmp_path):
    out, labels = make_scores(tmp_path)
    with pytest.raises(UsageError, match="did you mean gender"):
        evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["gendre"])
    with pytest.raises(UsageError, match="400 values"):
        evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["utt_id"])
    path = files.join(labels, "part-0.parquet")
    table = files.read_parquet(path)
    files.write_parquet_whole(path, table.append_column("raters", pa.array([["a"]] * len(table))))
    with pytest.raises(UsageError, match=r"--by raters: the column is list<.*>; text or numbers make groups"):
        evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["raters"])


def test_a_column_without_values_is_not_said_to_be_missing(tmp_path):
    out, labels = make_scores(tmp_path)
    declared = QUICK.replace({"evaluate": {"no_employees": ["start_s", "offset_ss"]}})
    with pytest.raises(UsageError, match=r"--by start_s: the column is null throughout in .*labels and .*scores; name"):
        evaluate(out, labels, str(tmp_path / "eval"), declared, by=["start_s"])
    # Nor is a column proposed that has none.
    with pytest.raises(UsageError, match=r"--by offset_ss: .* has such a column\.$"):
        evaluate(out, labels, str(tmp_path / "eval"), declared, by=["offset_ss"])


def test_folders_of_a_store_are_a_column(tmp_path):
    out, labels = make_scores(tmp_path)
    table = files.read_parquet(files.join(labels, "part-0.parquet"))
    for number, place in enumerate(("gender=a%20b", "gender=man", "gender=__HIVE_DEFAULT_PARTITION__")):
        part = table.drop_columns("gender").filter(pa.array(np.repeat(np.arange(40), 10) % 3 == number))
        files.write_parquet_whole(str(tmp_path / "divided" / place / "part-0.parquet"), part)
    groups = evaluate(out, str(tmp_path / "divided"), str(tmp_path / "eval"), QUICK, by=["gender"])["by"]["gender"]
    assert {name: group["n"] for name, group in groups["groups"].items()} == {"a b": 140, "man": 130}


def test_numbers_that_lack_are_in_no_group(tmp_path):
    out, labels = make_scores(tmp_path)
    path = files.join(labels, "part-0.parquet")
    table = files.read_parquet(path)
    age = np.where(np.arange(400) < 200, np.nan, table["age"].to_numpy())
    files.write_parquet_whole(path, with_column(table, "age", pa.array(age, from_pandas=True)))
    groups = evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["age"])["by"]["age"]["groups"]
    assert sum(group["n"] for group in groups.values()) == 200


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int16])
def test_a_few_numbers_are_codes_of_groups_in_any_type(tmp_path, kind):
    """A null makes pandas write integers as floats; a group must not vanish in another for that."""
    out, labels = make_scores(tmp_path)
    path = files.join(labels, "part-0.parquet")
    table, session = files.read_parquet(path), np.repeat(np.arange(40), 10)
    code = np.where(session < 10, 0, 1 if kind is np.int16 else 0.1).astype(kind)
    code[session >= 38] = 2
    files.write_parquet_whole(path, with_column(table, "gender", pa.array(code, mask=session == 20)))
    groups = evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["gender"])["by"]["gender"]["groups"]
    counts = {name: group["n"] for name, group in groups.items()}
    assert counts == {"0": 100, "1" if kind is np.int16 else "0.1": 270, "2": 20}


def test_a_gate_that_drops_a_group_shows_also_where_nobody_of_it_is_left(tmp_path):
    out, labels = make_scores(tmp_path)
    part = files.join(out, "utterances", "part-0.parquet")
    table = files.read_parquet(part)
    session = np.array([int(name[1:]) for name in table["session_id"].to_pylist()])
    unfit = (session % 2 == 1) | (session < 10)
    table = with_column(table, "status", pa.array(np.where(unfit, "unfit", "ok")))
    for name in DIMENSIONS:
        table = with_column(table, name, pa.array(table[name].to_numpy(), mask=unfit))
    files.write_parquet_whole(part, table)
    result = evaluate(out, labels, str(tmp_path / "eval"), QUICK, by=["gender", "age"])
    assert result["by"]["gender"]["unfit"] == {"man": pytest.approx(0.25), "woman": 1.0}
    assert list(result["by"]["gender"]["groups"]) == ["man"]
    assert "unfit, and so not scored: woman 100.0 %, man 25.0 %" in table_of(result)
    youngest, *others = result["by"]["age"]["unfit"].values()
    assert youngest > 0.9
    assert all(share == pytest.approx(0.5, abs=0.1) for share in others)


def test_the_fit_of_an_archive_says_who_is_dropped(tmp_path):
    out, _ = make_scores(tmp_path, further={"language": lambda session: np.where(session % 4 == 0, "fr", "en")})
    part = files.join(out, "utterances", "part-0.parquet")
    table = files.read_parquet(part)
    french = np.array(table["language"].to_pylist()) == "fr"
    table = with_column(table, "status", pa.array(np.where(french, "unfit", "ok")))
    files.write_parquet_whole(part, table)
    found = _unfit(out, True)
    assert found == {"unfit": {"customer": pytest.approx(0.25)}, "unfit_by": {"language": {"en": 0.0, "fr": 1.0}}}
