"""Evaluation: joining, scales, groups, comparison and what is refused, on made-up scores."""

import json
import warnings

import numpy as np
import pyarrow as pa
import pytest

from vaemo import files, metrics, scores
from vaemo.config import Config, ScoreConfig
from vaemo.errors import LabelError, ReadManifestError, ReadScoresError, ReadVoicesError, UsageError
from vaemo.evaluation.diarisation import evaluate_voices
from vaemo.evaluation.evaluate import evaluate, table_of
from vaemo.store import store_info

# Scores are stored in float32.
FLOAT32 = 1e-6


def make_rows(seed=0, n_sessions=24, n=15, noise=0.1):
    """Rows with labels on [0, 1] and predictions beside them; ids repeat from session to session."""
    rng = np.random.default_rng(seed)
    rows = []
    for session in range(n_sessions):
        latent = rng.uniform(0.3, 0.7, 2)
        for i in range(n):
            label = np.clip(latent + rng.normal(0, 0.15, 2), 0, 1)
            predicted = np.clip(0.8 * label + 0.1 + rng.normal(0, noise, 2), 0, 1)
            rows.append(
                {
                    "session_id": f"s{session}",
                    "utt_id": f"s{session}-{i}",
                    "speaker_id": f"p{session % 8}",
                    "split": ("train", "dev", "test")[session % 8 // 3],
                    "fold": str(session % 4),
                    "role": ("customer", "agent")[i % 2],
                    "position": i,
                    "label": label,
                    "prediction": predicted,
                }
            )
    return rows


PLACE = ("session_id", "utt_id", "speaker_id", "split", "fold", "role", "position")


def write_scores(folder, rows, **provenance):
    table = pa.Table.from_pylist(
        [
            {name: row[name] for name in PLACE}
            | {"valence": row["prediction"][0], "arousal": row["prediction"][1], "status": row.get("status", "ok")}
            for row in rows
        ]
    )
    missing = [row.get("status", "ok") != "ok" for row in rows]
    for name in ("valence", "arousal"):
        masked = pa.compute.if_else(pa.array(missing), pa.scalar(None, pa.float64()), table[name])
        table = table.set_column(table.column_names.index(name), name, masked)
    # Scores come in parts and in another order than the labels.
    half = len(rows) // 2
    scores.write_part(str(folder), "part-b.parquet", table.slice(0, half), ScoreConfig())
    scores.write_part(str(folder), "part-a.parquet", table.slice(half), ScoreConfig())
    if provenance:
        files.write_json(folder / scores.PROVENANCE, provenance)
    return str(folder)


def write_manifest(path, rows, scale=lambda value: value, drop=()):
    lines = []
    for row in rows:
        line = {name: row[name] for name in PLACE if name not in drop} | {"audio_path": "a.wav"}
        line |= {"valence": scale(row["label"][0]), "arousal": scale(row["label"][1])}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return str(path)


def matrix(rows, name):
    return np.array([row[name] for row in rows])


@pytest.fixture
def rows():
    return make_rows()


@pytest.fixture
def scored(tmp_path, rows):
    return write_scores(tmp_path / "scores", rows)


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Drawing takes most of the time and has its own tests."""
    for name in ("calibration", "error_over_session", "error_by_position", "label_fed"):
        monkeypatch.setattr(f"vaemo.evaluation.evaluate.pictures.{name}", lambda *_, name=name: f"{name}.png".encode())


QUICK = Config().replace({"evaluate": {"bootstrap": 200}})


def test_pooled_metrics_are_the_plain_ones_on_the_test_split(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK)
    tested = [row for row in rows if row["split"] == "test"]
    x, y = matrix(tested, "prediction"), matrix(tested, "label")
    assert result["split"] == "test"
    assert result["pooled"]["n"] == len(tested)
    for name in ("ccc", "pearson", "rmse", "mae"):
        expected = getattr(metrics, name)(x, y)
        assert result["pooled"][f"{name}_valence"] == pytest.approx(expected[0], abs=FLOAT32)
        assert result["pooled"][f"{name}_arousal"] == pytest.approx(expected[1], abs=FLOAT32)
        assert result["pooled"][f"{name}_avg"] == pytest.approx(expected.mean(), abs=FLOAT32)
        low, high = result["pooled"]["ci95"][f"{name}_avg"]
        assert low < expected.mean() < high
    assert "rmse_native_avg" not in result["pooled"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    for picture in ("calibration.png", "error_over_session.png", "error_by_position.png"):
        assert (tmp_path / "out" / picture).read_bytes() == picture.encode()


def test_groups_are_evaluations_of_their_rows(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK)
    tested = [row for row in rows if row["split"] == "test"]

    def ccc_of(wanted):
        return float(metrics.ccc(matrix(wanted, "prediction"), matrix(wanted, "label")).mean())

    assert set(result["per_split"]) == {"train", "dev", "test"}
    for name, each in result["per_split"].items():
        expected = ccc_of([row for row in rows if row["split"] == name])
        assert each["ccc_avg"] == pytest.approx(expected, abs=FLOAT32)
    for name, each in result["per_fold"].items():
        expected = ccc_of([row for row in tested if row["fold"] == name])
        assert each["ccc_avg"] == pytest.approx(expected, abs=FLOAT32)
    folds = [each["ccc_avg"] for each in result["per_fold"].values()]
    assert result["fold_mean"]["ccc_avg"] == pytest.approx(np.mean(folds))
    assert result["per_role"]["agent"]["n"] == sum(row["role"] == "agent" for row in tested)
    early = ccc_of([row for row in tested if row["position"] < 5])
    assert result["per_position"]["1-5"]["ccc_avg"] == pytest.approx(early, abs=FLOAT32)
    assert set(result["per_position"]) == {"1-5", "6-10", "11-20"}

    def within_of(wanted):
        session = np.unique([row["session_id"] for row in wanted], return_inverse=True)[1]
        moments = metrics.Moments.within(matrix(wanted, "prediction"), matrix(wanted, "label"), session)
        return float(moments.ccc().mean())

    assert result["pooled"]["within_ccc_avg"] == pytest.approx(within_of(tested), abs=FLOAT32)
    assert result["pooled"]["within_ccc_avg"] < result["pooled"]["ccc_avg"]
    low, high = result["pooled"]["ci95"]["within_ccc_avg"]
    assert low < result["pooled"]["within_ccc_avg"] < high
    early_within = within_of([row for row in tested if row["position"] < 5])
    assert result["per_position"]["1-5"]["within_ccc_avg"] == pytest.approx(early_within, abs=FLOAT32)
    (line,) = [line for line in table_of(result).splitlines() if line.startswith("CCC within sessions")]
    assert f"{result['pooled']['within_ccc_avg']:.3f} [{low:.3f}, {high:.3f}]" in line

    groups = files.read_parquet(tmp_path / "out" / "groups.parquet").to_pylist()
    by_name = {(row["by"], row["group"]): row for row in groups}
    for by in ("session_id", "speaker_id", "role", "split", "fold"):
        for name in {row[by] for row in tested}:
            expected = ccc_of([row for row in tested if row[by] == name])
            assert by_name[by, name]["ccc_avg"] == pytest.approx(expected, abs=2 * FLOAT32)
            expected = within_of([row for row in tested if row[by] == name])
            assert by_name[by, name]["within_ccc_avg"] == pytest.approx(expected, abs=2 * FLOAT32)
    sessions = [row["ccc_avg"] for row in groups if row["by"] == "session_id"]
    assert result["per_session"]["mean"]["ccc_avg"] == pytest.approx(np.mean(sessions))
    assert by_name["speaker_id", tested[0]["speaker_id"]]["n_sessions"] == 3


def test_native_labels_are_mapped_and_errors_given_on_both_scales(tmp_path, rows, scored):
    plain = evaluate(scored, write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "a"), QUICK)
    native = write_manifest(tmp_path / "n.jsonl", rows, scale=lambda value: 1 + 6 * value)
    config = QUICK.replace({"labels": {"range": [1, 7]}})
    result = evaluate(scored, native, str(tmp_path / "b"), config)
    assert result["native_range"] == [1, 7]
    assert result["pooled"]["ccc_avg"] == pytest.approx(plain["pooled"]["ccc_avg"], abs=FLOAT32)
    assert result["pooled"]["rmse_valence"] == pytest.approx(plain["pooled"]["rmse_valence"], abs=FLOAT32)
    assert result["pooled"]["rmse_native_valence"] == pytest.approx(6 * result["pooled"]["rmse_valence"])
    assert result["pooled"]["ci95"]["rmse_native_avg"][0] == pytest.approx(6 * result["pooled"]["ci95"]["rmse_avg"][0])
    assert "RMSE on [1, 7]" in table_of(result)


def test_scores_and_store_on_other_ranges_meet(tmp_path, rows):
    """Scores on [-1, 1] against a store on [0, 1] whose corpus was on [1, 5]: CCC is that of equal scales."""
    wide = [row | {"prediction": 2 * row["prediction"] - 1} for row in rows]
    scored = write_scores(tmp_path / "wide", wide, label_range=[-1, 1], native_range=[1, 5])
    store = tmp_path / "store"
    table = pa.Table.from_pylist(
        [
            {name: row[name] for name in PLACE}
            | {"valence": row["label"][0], "arousal": row["label"][1], "speech": [0.5]}
            for row in rows
        ]
    )
    files.write_parquet_whole(store / "part-0.parquet", table)
    files.write_json(store / "_vaemo.json", store_info({}, [0, 1], [1, 5], {}))
    result = evaluate(scored, str(store), str(tmp_path / "out"), QUICK)
    tested = [row for row in rows if row["split"] == "test"]
    x, y = matrix(tested, "prediction"), matrix(tested, "label")
    assert result["label_range"] == [-1, 1]
    assert result["pooled"]["ccc_avg"] == pytest.approx(metrics.ccc(x, y).mean(), abs=FLOAT32)
    assert result["pooled"]["rmse_valence"] == pytest.approx(2 * metrics.rmse(x, y)[0], abs=FLOAT32)
    assert result["pooled"]["rmse_native_valence"] == pytest.approx(4 * metrics.rmse(x, y)[0], abs=4 * FLOAT32)


def write_store(path, rows, scale=lambda value: value, **columns):
    held = [
        {name: row[name] for name in PLACE}
        | {"valence": scale(row["label"][0]), "arousal": scale(row["label"][1]), "speech": [0.5]}
        for row in rows
    ]
    files.write_parquet_whole(path, pa.Table.from_pylist(held))
    return str(path)


def native(value):
    return 1 + 6 * value


def test_a_store_that_says_no_range_is_on_labels_range(tmp_path, rows, scored):
    plain = evaluate(scored, write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "a"), QUICK)
    write_store(tmp_path / "store" / "part-0.parquet", rows, native)
    config = QUICK.replace({"labels": {"range": [1, 7]}})
    for labels in (tmp_path / "store", tmp_path / "store" / "part-0.parquet"):
        result = evaluate(scored, str(labels), str(tmp_path / "b"), config)
        assert result["native_range"] == [1, 7]
        for name in ("ccc_avg", "rmse_valence"):
            assert result["pooled"][name] == pytest.approx(plain["pooled"][name], abs=FLOAT32)
    with pytest.raises(LabelError, match=r"outside \[0, 1\]\. Give the corpus's own range, such as --set labels"):
        evaluate(scored, str(tmp_path / "store"), str(tmp_path / "c"), QUICK)


@pytest.mark.parametrize("kind", ["manifest", "store"])
def test_nobody_is_told_to_set_what_is_set(tmp_path, rows, scored, kind):
    rows[7]["label"] = np.array([0.5, 1.2])
    path = tmp_path / "store" / "part-0.parquet"
    labels = write_store(path, rows, native) if kind == "store" else write_manifest(tmp_path / "m.jsonl", rows, native)
    with pytest.raises(LabelError) as caught:
        evaluate(scored, labels, str(tmp_path / "out"), QUICK.replace({"labels": {"range": [1, 7]}}))
    assert "arousal of utterance 's0-7' in" in str(caught.value)
    assert str(caught.value).endswith("8.2, outside [1, 7], which is labels.range. Correct the label, or labels.range.")


@pytest.mark.parametrize("said", [[-1, 1], {"valence": [-1, 1], "arousal": [0, 1]}])
def test_a_range_that_is_assumed_and_not_that_of_training_is_a_warning(tmp_path, rows, capsys, said):
    scored = write_scores(tmp_path / "scores", rows, label_range=[0, 1], native_range=said)
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    evaluate(scored, labels, str(tmp_path / "out"), QUICK, compare=scored)
    text = capsys.readouterr().out
    names = "valence" if isinstance(said, dict) else "valence, arousal"
    assert text.count(f"warning: labels of {names} in {labels} are read on [0, 1], the range of the scores; in") == 1
    assert "in training they were on [-1, 1]. If these are too, set labels.range" in text
    evaluate(scored, labels, str(tmp_path / "out"), QUICK.replace({"labels": {"range": [0, 1]}}))
    assert "warning" not in capsys.readouterr().out


def test_a_store_that_says_its_range_is_believed(tmp_path, rows, scored):
    write_store(tmp_path / "store" / "part-0.parquet", rows, native)
    files.write_json(tmp_path / "store" / "_vaemo.json", store_info({}, [0, 1], [1, 7], {}))
    with pytest.raises(LabelError, match=r"outside \[0, 1\], as the store says in its _vaemo.json"):
        evaluate(scored, str(tmp_path / "store"), str(tmp_path / "out"), QUICK.replace({"labels": {"range": [1, 7]}}))


def test_unbiased_variances_lower_the_ccc_a_little(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    biased = evaluate(scored, labels, str(tmp_path / "a"), QUICK)
    unbiased = evaluate(scored, labels, str(tmp_path / "b"), QUICK.replace({"evaluate": {"variance": "unbiased"}}))
    assert 0 < biased["pooled"]["ccc_avg"] - unbiased["pooled"]["ccc_avg"] < 0.02
    assert "CCC on unbiased variances" in table_of(unbiased)


def test_failed_utterances_are_counted_not_evaluated(tmp_path, rows):
    for row in rows[:40]:
        row["status"] = "silent"
    scored = write_scores(tmp_path / "scores", rows[:-5])
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, split="train")
    assert result["not_scored"] == {"silent": 40}
    assert result["pooled"]["n"] == sum(row["split"] == "train" for row in rows[40:])
    assert "labelled but without a score: 40 silent" in table_of(result)
    # Those of another split are not counted beside its numbers, nor what is left out on purpose.
    assert evaluate(scored, labels, str(tmp_path / "out"), QUICK)["not_scored"] == {"absent": 5}
    files.write_parquet_whole(tmp_path / "used.parquet", pa.table({"utt_id": [rows[-1]["utt_id"], "s7-0"]}))
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, exclude=str(tmp_path / "used.parquet"))
    assert result["not_scored"] == {"absent": 4}
    # A label without a split may be of any.
    labels = write_manifest(tmp_path / "m.jsonl", rows, drop=("split",))
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, split="train")
    assert result["not_scored"] == {"silent": 40, "absent": 5}


def test_positions_count_utterances_without_a_label(tmp_path, rows):
    rows[-15]["status"] = "silent"
    scored = write_scores(tmp_path / "scores", rows[::-1])
    labels = write_manifest(tmp_path / "m.jsonl", [row for row in rows if row["position"] >= 6])
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK)
    sessions = len({row["session_id"] for row in rows if row["split"] == "test"})
    # A silent utterance moves no memory: what follows it stands one place earlier.
    assert {name: group["n"] for name, group in result["per_position"].items()} == {
        "6-10": 4 * sessions + 1,
        "11-20": 5 * sessions - 1,
    }
    assert result["error_by_position"]["n"]["valence"][0] == 0
    assert result["extremes_at_start"]["n_sessions"] == 0


def test_without_a_test_split_all_is_evaluated_with_a_warning(tmp_path, rows, capsys):
    for row in rows:
        row["split"] = None
    scored = write_scores(tmp_path / "scores", rows)
    labels = write_manifest(tmp_path / "m.jsonl", rows, drop=("split",))
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK)
    assert "warning: no utterance is in a split 'test': all are evaluated" in capsys.readouterr().out
    assert result["split"] == "all"
    assert result["pooled"]["n"] == len(rows)
    assert result["per_split"] == {}


def test_split_may_come_from_the_labels(tmp_path, rows):
    scored = write_scores(tmp_path / "scores", [row | {"split": None} for row in rows])
    result = evaluate(scored, write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), QUICK, split="dev")
    assert result["pooled"]["n"] == sum(row["split"] == "dev" for row in rows)


@pytest.mark.parametrize("columns", [("utt_id",), ("session_id", "utt_id")])
def test_excluded_utterances_are_left_out(tmp_path, rows, scored, columns, capsys):
    tested = [row for row in rows if row["split"] == "test"]
    used = pa.Table.from_pylist([{name: row[name] for name in columns} for row in tested[:17]])
    used = used.set_column(0, columns[0], used[columns[0]].cast(pa.large_string()).dictionary_encode())
    files.write_parquet_whole(tmp_path / "used.parquet", used)
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, exclude=str(tmp_path / "used.parquet"))
    x, y = matrix(tested[17:], "prediction"), matrix(tested[17:], "label")
    assert result["pooled"]["n"] == len(tested) - 17
    assert result["pooled"]["ccc_avg"] == pytest.approx(metrics.ccc(x, y).mean(), abs=FLOAT32)
    assert result["excluded"] == {"list": str(tmp_path / "used.parquet"), "n": 17}
    assert "left out: 17 of 360 utterances with score and label" in capsys.readouterr().out


def test_an_exclusion_of_nothing_is_a_warning(tmp_path, rows, scored, capsys):
    files.write_parquet_whole(tmp_path / "other.parquet", pa.table({"utt_id": ["x1"]}))
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, exclude=str(tmp_path / "other.parquet"))
    assert result["excluded"]["n"] == 0
    assert (
        "lists none of the 360 utterances with score and label: ids there are such as 'x1'" in capsys.readouterr().out
    )


def test_with_an_exclusion_nobody_is_told_to_exclude(tmp_path, rows, capsys):
    scored = write_scores(tmp_path / "scores", [row | {"split": None} for row in rows])
    files.write_parquet_whole(tmp_path / "used.parquet", pa.table({"utt_id": [rows[0]["utt_id"]]}))
    labels = write_manifest(tmp_path / "m.jsonl", rows, drop=("split",))
    evaluate(scored, labels, str(tmp_path / "out"), QUICK, exclude=str(tmp_path / "used.parquet"))
    said = capsys.readouterr().out
    assert "all that --exclude leaves are evaluated" in said
    assert "trained on" not in said


def test_scores_of_a_model_that_knows_the_utterances_are_a_warning(tmp_path, rows, capsys):
    """As after a training over folds, which does not use the splits of the store."""
    known = [row for row in rows if row["split"] == "dev"][:9]
    table = pa.table({name: [row[name] for row in known] for name in ("session_id", "utt_id")})
    used = table.append_column("split", pa.array(["train"] * 4 + ["dev"] * 3 + ["calib"] * 2))
    files.write_parquet_whole(tmp_path / "run" / "used.parquet", used)
    made_by = [{"fingerprint": "a", "path": str(tmp_path / "run" / "best")}, {"fingerprint": "b"}]
    scored = write_scores(tmp_path / "scores", rows, checkpoints=made_by)
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    evaluate(scored, labels, str(tmp_path / "out"), QUICK)
    assert "warning" not in capsys.readouterr().out
    evaluate(scored, labels, str(tmp_path / "out"), QUICK, split="dev")
    assert "warning: 7 of the 135 utterances that are evaluated are known to the model of" in capsys.readouterr().out
    other = write_scores(tmp_path / "other", rows)
    evaluate(other, labels, str(tmp_path / "out"), QUICK, split="dev", compare=scored)
    assert capsys.readouterr().out.count("are known to the model of") == 1


def test_two_sets_of_scores_are_compared_on_what_both_have(tmp_path, rows, scored):
    rng = np.random.default_rng(9)
    worse = [row | {"prediction": np.clip(row["prediction"] + rng.normal(0, 0.2, 2), 0, 1)} for row in rows]
    other = write_scores(tmp_path / "other", worse[::-1][7:])
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(scored, labels, str(tmp_path / "out"), QUICK, compare=other)
    compared = result["compare"]
    both = {row["utt_id"] for row in rows[:-7] if row["split"] == "test"}
    assert compared["n"] == len(both)
    for name, rows_ in (("first", rows), ("second", worse)):
        some = [row for row in rows_ if row["utt_id"] in both]
        expected = metrics.ccc(matrix(some, "prediction"), matrix(some, "label")).mean()
        assert compared["ccc_avg"][name] == pytest.approx(expected, abs=FLOAT32)
    low, high = compared["ccc_avg"]["ci95"]
    assert 0 < low < compared["ccc_avg"]["difference"] < high
    assert compared["ccc_avg"]["p"] < 0.05
    assert "difference of CCC" in table_of(result)


def test_a_set_of_scores_does_not_differ_from_itself(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    compared = evaluate(scored, labels, str(tmp_path / "out"), QUICK, compare=scored)["compare"]
    assert compared["ccc_avg"]["difference"] == 0
    assert compared["ccc_avg"]["ci95"] == [0, 0]
    assert compared["ccc_avg"]["p"] == 1


def test_a_label_may_miss_one_dimension(tmp_path, rows, scored):
    for row in rows[::3]:
        row["label"] = np.array([row["label"][0], np.nan])
    path = tmp_path / "m.jsonl"
    write_manifest(path, rows)
    path.write_text(path.read_text().replace("NaN", "null"))
    result = evaluate(scored, str(path), str(tmp_path / "out"), QUICK)
    tested = [row for row in rows if row["split"] == "test"]
    x, y = matrix(tested, "prediction"), matrix(tested, "label")
    assert result["pooled"]["n"] == len(tested)
    assert result["pooled"]["ccc_arousal"] == pytest.approx(metrics.ccc(x, y)[1], abs=FLOAT32)


def test_labels_outside_their_range_are_refused(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows, scale=lambda value: 1 + 6 * value)
    with pytest.raises(LabelError, match=r"valence of utterance 's0-0' in .* outside \[0, 1\]\. Give the corpus's own"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK)


def test_the_metrics_of_a_checkpoint_are_not_replaced(tmp_path, rows, scored):
    checkpoint = tmp_path / "best"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UsageError, match=r"best is a checkpoint, whose metrics.json would be lost"):
        evaluate(scored, write_manifest(tmp_path / "m.jsonl", rows), str(checkpoint), QUICK)


def test_labels_of_another_corpus_are_refused(tmp_path, rows, scored):
    others = [row | {"session_id": f"x{row['session_id']}"} for row in rows]
    labels = write_manifest(tmp_path / "m.jsonl", others)
    with pytest.raises(LabelError, match=r"none of the 360 labelled utterances .* such as 'xs0', 's0-0', here 's"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK)


def test_a_manifest_without_labels_is_refused(tmp_path, rows, scored):
    path = tmp_path / "m.jsonl"
    path.write_text(
        "\n".join(json.dumps({name: row[name] for name in PLACE} | {"audio_path": "a.wav"}) for row in rows)
    )
    with pytest.raises(LabelError, match="has no labels: valence and arousal are null throughout"):
        evaluate(scored, str(path), str(tmp_path / "out"), QUICK)


def test_labels_that_are_not_there_are_refused(tmp_path, scored):
    with pytest.raises(ReadManifestError, match="there is nothing at"):
        evaluate(scored, str(tmp_path / "no.jsonl"), str(tmp_path / "out"), QUICK)


def test_a_split_that_is_not_there_is_refused(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(LabelError, match="is in the split 'tset'; there are: dev, test, train"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK, split="tset")


def test_an_utterance_scored_twice_is_refused(tmp_path, rows):
    scored = write_scores(tmp_path / "scores", [*rows, rows[3]])
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(ReadScoresError, match=r"utterance 's0', 's0-3' occurs more than once"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "used.parquet cannot be read"),
        (pa.table({"session_id": ["s0"]}), "has no column utt_id"),
        ("all", "lists all 360 utterances"),
    ],
)
def test_a_list_to_exclude_that_cannot_be_used_is_refused(tmp_path, rows, scored, content, message):
    path = tmp_path / "used.parquet"
    if content == "all":
        content = pa.table({"utt_id": [row["utt_id"] for row in rows]})
    if content is not None:
        files.write_parquet_whole(path, content)
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(LabelError, match=message):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK, exclude=str(path))


def test_scores_with_nothing_in_common_are_not_compared(tmp_path, rows, scored):
    other = write_scores(tmp_path / "other", [row for row in rows if row["split"] == "train"])
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(LabelError, match="no labelled utterance in common"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK, compare=other)


def test_scores_of_other_ranges_are_not_compared(tmp_path, rows, scored):
    other = write_scores(tmp_path / "other", rows, label_range=[-1, 1])
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(ReadScoresError, match=r"are on \[0, 1\], those compared with on \[-1, 1\]"):
        evaluate(scored, labels, str(tmp_path / "out"), QUICK, compare=other)


def test_a_message_about_a_reference_of_voices_names_the_option_of_evaluate(tmp_path, scored):
    with pytest.raises(ReadVoicesError, match=r"^--rttm .*no\.rttm does not exist; give a file or a folder"):
        evaluate_voices(scored, str(tmp_path / "no.rttm"), str(tmp_path / "out"))


def test_nothing_warns_on_good_input(tmp_path, rows, scored):
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(scored, labels, str(tmp_path / "out"), QUICK)


def test_errors_and_extremes_are_given_by_position(tmp_path, rows):
    random = np.random.default_rng(5)
    for row in rows:
        row["weight"] = random.uniform(0.1, 1, 2)
        # Labels that several utterances share, as ratings are.
        row["label"] = row["label"].round(1)
    folder = write_scores(tmp_path / "weighed", rows)
    for part in files.list_files(f"{folder}/utterances", ".parquet"):
        table, of = files.read_parquet(part), {row["utt_id"]: row["weight"] for row in rows}
        for k, name in enumerate(scores.WEIGHT_SCHEMA.names):
            column = pa.array([of[utt_id][k] for utt_id in table["utt_id"].to_pylist()], pa.float32())
            table = table.append_column(name, column)
        files.write_parquet_whole(part, table)
    labels = write_manifest(tmp_path / "m.jsonl", rows)
    result = evaluate(folder, labels, str(tmp_path / "out"), QUICK)
    tested = [row for row in rows if row["split"] == "test"]
    sessions = [[row for row in tested if row["session_id"] == each] for each in {row["session_id"] for row in tested}]
    first = [row for row in tested if row["position"] == 0]
    error = (matrix(first, "prediction") - matrix(first, "label")) ** 2
    found = result["error_by_position"]
    assert (found["from"][0], found["n"]["valence"][0]) == (1, len(sessions))
    assert found["rmse"]["arousal"][0] == pytest.approx(np.sqrt(error[:, 1].mean()), abs=FLOAT32)

    def share(values):
        """Of lists by session of 15 values, how often the first two hold an extreme, ties in part."""
        hits = []
        for own in values:
            for extreme in (min(own), max(own)):
                at = [place for place, value in enumerate(own) if value == extreme]
                hits.append(np.mean([place < 2 for place in at]))
        return np.mean(hits)

    assert (result["extremes_at_start"]["utterances"], result["extremes_at_start"]["n_sessions"]) == (2, len(sessions))
    for k, name in enumerate(("valence", "arousal")):
        extremes = result["extremes_at_start"][name]
        assert extremes["scores"] == pytest.approx(share([[row["prediction"][k] for row in own] for own in sessions]))
        assert extremes["labels"] == pytest.approx(share([[row["label"][k] for row in own] for own in sessions]))
        drawn = []
        for own in sessions:
            value, weight = (np.array([row[key][k] for row in own]) for key in ("prediction", "weight"))
            mean = (weight * value).sum() / weight.sum()
            drawn.append((mean + weight * (value - mean)).tolist())
        assert extremes["weighed"] == pytest.approx(share(drawn))
    text = table_of(result)
    assert "on its first 2 utterances" in text


def test_sessions_that_are_too_short_have_no_extremes(tmp_path):
    rows = make_rows(n=3)
    result = evaluate(
        write_scores(tmp_path / "s", rows), write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path), QUICK
    )
    assert result["extremes_at_start"]["n_sessions"] == 0
    assert result["extremes_at_start"]["valence"] == {"scores": None, "weighed": None, "labels": None}
    assert "on its first" not in table_of(result)
