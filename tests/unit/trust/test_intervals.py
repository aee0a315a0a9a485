"""Intervals and novelty of scores: made beside a training, applied while scoring, left out where they cannot be."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scoring_cases import SMALL, make_checkpoint, rows_of, run
from stream_cases import EXTRACTORS, RATE, utterances
from trust_cases import make_store, trained

from vaemo import files
from vaemo.config import Config
from vaemo.errors import OtherRunError, ReadCheckpointError, UsageError
from vaemo.model.checkpoint import load_checkpoint
from vaemo.scores import read_provenance, read_sessions
from vaemo.stream import Stream
from vaemo.tables import with_column
from vaemo.training.data import TrainingData
from vaemo.trust.attach import attach
from vaemo.trust.calibration import CALIB_SPLIT, Calibration, Scale, calibrate
from vaemo.trust.novelty import Novelty
from vaemo.trust.rows import call_rows, groups_of, order_in_session
from vaemo.units import DIMENSIONS, LabelScale


def test_scores_have_intervals_that_cover_what_they_were_calibrated_on(tmp_path):
    store, checkpoint = trained(tmp_path, shift=30.0)
    rows = run(store, checkpoint, str(tmp_path / "scores"))
    labels = {
        row["utt_id"]: row
        for part in files.list_files(store, ".parquet")
        for row in files.read_parquet(part).to_pylist()
    }
    scored = rows.to_pylist()
    assert {row["split"] for row in scored} == {"train", "dev", "calib", "test"}
    for name in DIMENSIONS:
        inside = [
            row[f"{name}_low"] - 1e-6 <= labels[row["utt_id"]][name] <= row[f"{name}_high"] + 1e-6
            for row in scored
            if row["split"] == "calib"
        ]
        assert np.mean(inside) > 0.88
        assert all(0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1 for row in scored)
    sessions = read_sessions(str(tmp_path / "scores"))
    assert {"valence_mean_low", "arousal_mean_high", "novelty", "novelty_of"} <= set(sessions.column_names)
    for row in sessions.to_pylist():
        assert row["valence_mean_low"] <= row["valence_mean"] <= row["valence_mean_high"]
        assert row["novelty_of"] == "speech"
    # The last session's features were moved far away.
    novelty = {row["session_id"]: row["novelty"] for row in sessions.to_pylist()}
    assert novelty["s0033"] == max(novelty.values()) > 0.999
    assert np.mean([value for name, value in novelty.items() if name != "s0033"]) < 0.8
    fit = files.read_json(str(tmp_path / "scores" / "_fit.json"))
    assert fit["n_calls"] == 34
    assert "s0033" in fit["most"]
    assert fit["differs_in"]["speech"] >= 1
    trust = read_provenance(str(tmp_path / "scores"))["trust"]
    assert trust["coverage"] == 0.9
    assert trust["n_groups"] == 12
    assert trust["novelty"] == "calib"


def test_one_group_less_than_needed_gives_no_intervals_and_one_line(tmp_path, capsys):
    split = ["train"] * 10 + ["dev"] * 6 + ["calib"] * 8
    store, checkpoint = trained(tmp_path, split=split)
    rows = run(store, checkpoint, str(tmp_path / "scores"))
    assert "valence_low" not in rows.column_names
    assert "novelty" in rows.column_names
    assert "valence_mean_low" not in read_sessions(str(tmp_path / "scores")).column_names
    assert capsys.readouterr().out.count("no 90 % intervals: calibrated on 8 groups") == 2
    run(store, checkpoint, str(tmp_path / "less"), score={"coverage": 0.8})
    assert "valence_low" in rows_of(tmp_path / "less").column_names
    assert "8 groups" in capsys.readouterr().out


def test_sessions_that_share_speakers_are_one_group(tmp_path):
    _, checkpoint = trained(tmp_path, speakers=lambda n: f"p{n if n < 16 else 16 + (n - 16) // 2}")
    assert Calibration.read(checkpoint).n_groups == 6


def test_a_checkpoint_without_calibration_scores_as_before(tmp_path):
    store = make_store(tmp_path / "store")
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    before = run(store, checkpoint, str(tmp_path / "before"))
    assert not [name for name in before.column_names if name.endswith(("_low", "_high")) or "novelty" in name]
    attach(TrainingData.open(store, Config().replace(SMALL)), [load_checkpoint(checkpoint)], [checkpoint])
    after = run(store, checkpoint, str(tmp_path / "after"))
    kept = [name for name in before.column_names if name != "run_id"]
    assert after.select(kept).equals(before.select(kept))
    # Other columns are another run.
    with pytest.raises(OtherRunError):
        run(store, checkpoint, str(tmp_path / "before"))


def test_an_ensemble_needs_a_calibration_of_its_own(tmp_path, capsys):
    store, checkpoint = trained(tmp_path)
    other = make_checkpoint(tmp_path / "other", 1)
    rows = run(store, f"{checkpoint},{other}", str(tmp_path / "scores"))
    assert "valence_sd" in rows.column_names
    assert "valence_low" not in rows.column_names
    assert "not these together" in capsys.readouterr().out


def test_what_is_too_unusual_has_no_score(tmp_path):
    store, checkpoint = trained(tmp_path, shift=30.0)
    rows = run(store, checkpoint, str(tmp_path / "scores"), score={"max_novelty": 0.999}).to_pylist()
    unfit = [row for row in rows if row["status"] == "unfit"]
    # Of what fits, one utterance in a thousand goes too.
    assert sum(row["session_id"] != "s0033" for row in unfit) <= 3
    assert all(row["status"] == "unfit" for row in rows if row["session_id"] == "s0033")
    assert all(row["valence"] is None and row["arousal_low"] is None and "unusual" in row["reason"] for row in unfit)
    with pytest.raises(UsageError, match="max_novelty"):
        run(store, make_checkpoint(tmp_path / "plain"), str(tmp_path / "no"), score={"max_novelty": 0.9})


def test_damaged_files_are_one_line(tmp_path):
    store, checkpoint = trained(tmp_path)
    for name, content in (("calibration.json", b'{"version": 1}'), ("novelty.safetensors", b"nothing")):
        good = files.read_bytes(files.join(checkpoint, name))
        files.write_whole(files.join(checkpoint, name), content)
        with pytest.raises(ReadCheckpointError, match=name):
            run(store, checkpoint, str(tmp_path / "scores"))
        files.write_whole(files.join(checkpoint, name), good)


def test_what_is_written_is_what_is_read(tmp_path):
    _, checkpoint = trained(tmp_path)
    calibration, novelty = Calibration.read(checkpoint), Novelty.read(checkpoint)
    again = Calibration.of_plain(json.loads(json.dumps(calibration.to_plain())))
    assert again.digest == calibration.digest
    assert Novelty.of_bytes(novelty.to_bytes()).digest == novelty.digest


def scored_table(n_sessions=30, n=20, noise=0.1, seed=0, unlabelled=0.0):
    random = np.random.default_rng(seed)
    session = np.repeat(np.arange(n_sessions), n)
    label = random.uniform(0.2, 0.8, (len(session), 2))
    # What comes late in a session is predicted better.
    size = noise / (1 + np.tile(np.arange(n), n_sessions) / 4)
    found = label + size[:, None] * random.standard_normal(label.shape)
    label[random.random(label.shape) < unlabelled] = np.nan
    columns = {
        "session_id": [f"s{k}" for k in session],
        "speaker_id": [f"p{k}" for k in session],
        "role": ["customer"] * len(session),
    }
    columns |= {"start_s": 5.0 * np.arange(len(session)), "end_s": 5.0 * np.arange(len(session)) + 2}
    for k, name in enumerate(DIMENSIONS):
        columns |= {name: found[:, k], f"label_{name}": pa.array(label[:, k], from_pandas=True)}
    return pa.table(columns)


def test_intervals_are_wide_where_errors_are_large_and_cover_there_too():
    one, other, new = (scored_table(seed=seed, n_sessions=n) for seed, n in ((0, 60), (1, 60), (2, 200)))
    calibration = calibrate(one, other, ["f"], CALIB_SPLIT, LabelScale(0, 1))
    plain = calibrate(one, None, ["f"], CALIB_SPLIT, LabelScale(0, 1))
    found, constant = (each.with_intervals(new, 0.9) for each in (calibration, plain))
    order = order_in_session(new, "valence")
    width = found["valence_high"].to_numpy() - found["valence_low"].to_numpy()
    assert width[order == 0].mean() > 2 * width[order == 19].mean()
    assert width.mean() < 0.95 * (constant["valence_high"].to_numpy() - constant["valence_low"].to_numpy()).mean()
    label = new["label_valence"].to_numpy()
    inside = (label >= found["valence_low"].to_numpy()) & (label <= found["valence_high"].to_numpy())
    assert inside.mean() == pytest.approx(0.9, abs=0.04)
    assert inside[order == 0].mean() == pytest.approx(0.9, abs=0.08)


def test_labels_that_lack_change_nothing_but_their_own_weight():
    table = scored_table(unlabelled=0.3)
    calibration = calibrate(table, None, ["f"], CALIB_SPLIT, LabelScale(0, 1))
    assert calibration.utterances["valence"].n == np.isfinite(table["label_valence"].to_numpy()).sum()
    rows = call_rows(table, DIMENSIONS)
    known = np.isfinite(rows.label["arousal"])
    assert known.all()
    assert len(known) == 30
    nobody = with_column(table, "label_arousal", pa.nulls(len(table), pa.float64()))
    without = calibrate(nobody, None, ["f"], CALIB_SPLIT, LabelScale(0, 1))
    assert without.n_groups == 0
    assert without.with_intervals(nobody, 0.9).column_names == [*nobody.column_names, "valence_low", "valence_high"]


def test_nobody_named_stands_alone():
    table = scored_table(4, 2)
    assert groups_of(with_column(table, "speaker_id", pa.nulls(8, pa.string()))).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert groups_of(with_column(table, "speaker_id", pa.array(["a"] * 8))).tolist() == [0] * 8


def test_a_scale_ignores_signs_that_say_nothing():
    random = np.random.default_rng(0)
    signs = {"position": np.tile(np.arange(10.0), 100), "novelty": np.full(1000, np.nan)}
    scale = Scale.fit(np.abs(random.standard_normal(1000)), signs, 200)
    assert scale.names == ("position",)
    assert scale(signs, 1000) == pytest.approx(np.ones(1000), abs=0.15)
    assert Scale.fit(np.ones(100), signs, 200) is None


def test_a_stream_gives_the_intervals_and_the_novelty_of_the_batch(tmp_path):
    samples = {f"s{k:02d}": utterances(6, seed=k) for k in range(22)}
    splits = ["train"] * 6 + ["dev"] * 4 + ["calib"] * 11 + ["test"]
    random, rows = np.random.default_rng(0), []
    for (session, heard), split in zip(samples.items(), splits, strict=True):
        vectors = {name: extractor(heard) for name, extractor in EXTRACTORS.items()}
        for k in range(len(heard)):
            labels = dict(zip(DIMENSIONS, random.uniform(0, 1, 2), strict=True))
            features = {name: list(map(float, x[k])) for name, x in vectors.items()}
            rows.append({"session_id": session, "utt_id": f"{session}-{k}", "split": split, **labels, **features})
    store = tmp_path / "store"
    files.write_parquet_whole(str(store / "part-0.parquet"), pa.Table.from_pylist(rows))
    checkpoint = make_checkpoint(tmp_path / "c", dims={"speech": 6, "speaker": 4})
    attach(TrainingData.open(str(store), Config().replace(SMALL)), [load_checkpoint(checkpoint)], [checkpoint])
    expected = [
        row for row in run(str(store), checkpoint, str(tmp_path / "scores")).to_pylist() if row["split"] == "test"
    ]
    stream = Stream(checkpoint, EXTRACTORS)
    found = []
    for number, heard in enumerate(samples["s21"]):
        if number == 3:
            stream.save(tmp_path / "memory.safetensors")
            stream = Stream(checkpoint, EXTRACTORS)
            stream.load(tmp_path / "memory.safetensors")
        found.append(stream.push(heard, RATE))
    for prediction, row in zip(found, expected, strict=True):
        assert prediction.novelty == pytest.approx(row["novelty"], abs=0.002)
        for name in DIMENSIONS:
            assert prediction.intervals[name] == pytest.approx((row[f"{name}_low"], row[f"{name}_high"]), abs=1e-4)
    assert Stream(load_checkpoint(checkpoint), EXTRACTORS).push(samples["s21"][0], RATE).intervals == {}


def test_a_target_of_any_name_has_intervals(tmp_path):
    store = make_store(tmp_path / "store")
    for part in files.list_files(store, ".parquet"):
        table = files.read_parquet(part)
        names = ["dominance" if name == "valence" else name for name in table.column_names]
        files.write_parquet_whole(part, table.rename_columns(names).drop_columns(["arousal"]))
    small = {**SMALL, "model": {**SMALL["model"], "targets": ["dominance"]}}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config=small)
    attach(TrainingData.open(store, Config().replace(small)), [load_checkpoint(checkpoint)], [checkpoint])
    rows = run(store, checkpoint, str(tmp_path / "scores"), score={"max_novelty": 0.9})
    assert "valence_low" not in rows.column_names
    kept = rows.filter(pc.equal(rows["status"], "ok"))
    assert kept["dominance_low"].null_count == 0
    unfit = rows.filter(pc.equal(rows["status"], "unfit"))
    assert unfit.num_rows > 0
    assert unfit["dominance"].null_count == unfit["dominance_high"].null_count == unfit.num_rows
    assert "dominance_mean_low" in read_sessions(str(tmp_path / "scores")).column_names
