"""A user's own calls: intervals for another archive, a bias that is found, calls that are worth labelling."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scoring_cases import make_checkpoint, run
from trust_cases import SPLIT, make_store, trained

from vaemo import files
from vaemo.commands import COMMANDS
from vaemo.config import Config
from vaemo.errors import LabelError, UsageError
from vaemo.scores import read_provenance, read_sessions, read_utterances
from vaemo.tables import with_column
from vaemo.trust.calibration import CALIB_SPLIT, OWN_CALLS
from vaemo.trust.own_calls import calibrate_calls, suggest_calls

QUICK = Config().replace({"evaluate": {"bootstrap": 0}})


def relabelled(store, scored, path, *, bias, noise=0.02, seed=0):
    """The store with labels that lie off the scores by a bias."""
    random = np.random.default_rng(seed)
    scores = {row["utt_id"]: row["valence"] for row in read_utterances(scored).to_pylist()}
    for part in files.list_files(store, ".parquet"):
        table = files.read_parquet(part)
        values = [
            min(max(scores[name] - bias + noise * random.standard_normal(), 0), 1)
            for name in table["utt_id"].to_pylist()
        ]
        table = with_column(table, "valence", pa.array(values, pa.float32()))
        files.write_parquet_whole(files.join(path, part.rsplit("/", 1)[1]), table)
    return str(path)


def test_own_calls_give_intervals_and_take_a_bias_away(tmp_path):
    store = make_store(tmp_path / "store", split=["test"] * 40)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    run(store, checkpoint, str(tmp_path / "scores"))
    labels = relabelled(store, str(tmp_path / "scores"), tmp_path / "labels", bias=0.1)
    found, folders = calibrate_calls(str(tmp_path / "scores"), labels, [checkpoint], str(tmp_path / "mine"), QUICK)
    assert found.made_on == OWN_CALLS
    assert folders == (str(tmp_path / "mine"),)
    worth = found.worth["valence"]
    assert worth["bias"][0] == pytest.approx(0.1, abs=0.01)
    assert abs(worth["bias"][1]) < 0.01
    assert worth["rmse"][1] < 0.3 * worth["rmse"][0]
    assert worth["covered"] == pytest.approx(0.9, abs=0.05)
    rows = run(store, str(tmp_path / "mine"), str(tmp_path / "again"))
    before = {row["utt_id"]: row["valence"] for row in read_utterances(str(tmp_path / "scores")).to_pylist()}
    moved = [before[row["utt_id"]] - row["valence"] for row in rows.to_pylist()]
    assert np.mean(moved) == pytest.approx(0.1, abs=0.02)
    assert rows["valence_low"].null_count == 0
    assert read_provenance(str(tmp_path / "again"))["trust"]["corrected"] is True
    # Its own scores are not calibrated a second time.
    with pytest.raises(UsageError, match="corrected already"):
        calibrate_calls(str(tmp_path / "again"), labels, list(folders), str(tmp_path / "twice"), QUICK)


def test_what_does_not_help_is_not_corrected(tmp_path):
    store = make_store(tmp_path / "store", split=["test"] * 30)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    run(store, checkpoint, str(tmp_path / "scores"))
    labels = relabelled(store, str(tmp_path / "scores"), tmp_path / "labels", bias=0.0)
    found, _ = calibrate_calls(str(tmp_path / "scores"), labels, [checkpoint], str(tmp_path / "mine"), QUICK)
    worth = found.worth["valence"]
    assert worth["rmse"][1] <= worth["rmse"][0] * 1.001
    if "valence" in found.correction:
        assert abs(found.correction["valence"].offset) < 0.05


def test_an_ensemble_is_calibrated_as_one(tmp_path):
    store, checkpoint = trained(tmp_path)
    both = [checkpoint, make_checkpoint(tmp_path / "other", 1)]
    run(store, ",".join(both), str(tmp_path / "scores"))
    found, folders = calibrate_calls(str(tmp_path / "scores"), store, both, str(tmp_path / "mine"), QUICK)
    assert found.made_on == CALIB_SPLIT
    assert found.n_groups == 12
    rows = run(store, ",".join(folders), str(tmp_path / "again"))
    assert rows["valence_low"].null_count == 0
    # One of them alone has no intervals of its own.
    assert "valence_low" not in run(store, folders[0], str(tmp_path / "one")).column_names


def test_sessions_that_the_model_knows_are_refused(tmp_path):
    store = make_store(tmp_path / "store", split=["train"] * 8 + ["dev"] * 4)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    run(store, checkpoint, str(tmp_path / "scores"))
    with pytest.raises(LabelError, match="in train or dev"):
        calibrate_calls(str(tmp_path / "scores"), store, [checkpoint], str(tmp_path / "mine"), QUICK)
    other = make_checkpoint(tmp_path / "other", 1)
    with pytest.raises(UsageError, match="Give the checkpoints that made"):
        calibrate_calls(str(tmp_path / "scores"), store, [other], str(tmp_path / "mine"), QUICK)


@pytest.mark.parametrize("place", ["run/best", "run/seed-1/best"])
def test_what_training_used_is_not_calibrated_on(tmp_path, capsys, place):
    """Splits that training made are in its list alone."""
    store = make_store(tmp_path / "store", split=[None] * 30)
    checkpoint = make_checkpoint(tmp_path / place)
    rows = run(store, checkpoint, str(tmp_path / "scores")).select(["session_id", "utt_id"])
    split = [{0: "train", 1: "dev", 2: "calib"}.get(int(name[1:]) % 4) for name in rows["session_id"].to_pylist()]
    used = rows.append_column("split", pa.array(split)).drop_null()
    files.write_parquet_whole(str(tmp_path / "run" / "used.parquet"), used)
    found, _ = calibrate_calls(str(tmp_path / "scores"), store, [checkpoint], str(tmp_path / "mine"), QUICK)
    assert (found.made_on, found.n_groups) == (OWN_CALLS, 14)
    n = sum(name in ("train", "dev") for name in split)
    assert f"left out: {n} utterances that used.parquet beside the checkpoint lists" in capsys.readouterr().out
    files.write_parquet_whole(
        str(tmp_path / "run" / "used.parquet"), rows.append_column("split", pa.array(["train"] * len(rows)))
    )
    with pytest.raises(LabelError, match=r"in train or dev, by the split of the scores or by used\.parquet"):
        calibrate_calls(str(tmp_path / "scores"), store, [checkpoint], str(tmp_path / "none"), QUICK)


def test_a_warning_says_where_nothing_tells_what_was_trained_on(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for name, split in (("said", "test"), ("unsaid", None)):
        store = make_store(tmp_path / name, split=[split] * 12)
        run(store, checkpoint, str(tmp_path / f"{name}-scores"))
        capsys.readouterr()
        calibrate_calls(str(tmp_path / f"{name}-scores"), store, [checkpoint], str(tmp_path / f"{name}-mine"), QUICK)
        assert ("nothing tells which calls" in capsys.readouterr().out) == (split is None)


def test_labels_of_other_utterances_are_refused(tmp_path):
    store = make_store(tmp_path / "store", split=["test"] * 12)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    run(store, checkpoint, str(tmp_path / "scores"))
    rows = [{"utt_id": f"x{n}", "session_id": f"s{n:04d}", "speaker_id": "p", "audio_path": "a.wav"} for n in range(3)]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(json.dumps({**row, "valence": 0.5}) for row in rows))
    with pytest.raises(LabelError, match=r"none of the 3 labelled utterances is among those of .* such as 'x0', here"):
        calibrate_calls(str(tmp_path / "scores"), str(labels), [checkpoint], str(tmp_path / "mine"), QUICK)
    assert not (tmp_path / "mine").exists()


def test_suggested_calls_are_spread_and_distinct(tmp_path, capsys):
    store, checkpoint = trained(tmp_path)
    run(store, checkpoint, str(tmp_path / "scores"))
    capsys.readouterr()
    COMMANDS["calibrate"](["--scores", str(tmp_path / "scores"), "--suggest", "12"])
    suggested = capsys.readouterr().out.split()
    assert len(set(suggested)) == 12
    sessions = {row["session_id"]: row for row in read_sessions(str(tmp_path / "scores")).to_pylist()}
    novelty = np.array([sessions[name]["novelty"] for name in suggested])
    middle = np.median([row["novelty"] for row in sessions.values()])
    assert 4 <= (novelty > middle).sum() <= 8
    assert len(suggest_calls(str(tmp_path / "scores"), 1000)) == len(SPLIT)
    # Every call has the same chance.
    times = sum(name in suggest_calls(str(tmp_path / "scores"), 17, seed) for seed in range(40) for name in ["s0000"])
    assert 8 <= times <= 32
