"""Trainings leave calibrated checkpoints: folds together, seeds together, and the run's own model alone."""

import json

import pyarrow.compute as pc
import pytest
from scoring_cases import SMALL, run
from trust_cases import SPLIT, make_store

import vaemo
from vaemo import files, scores
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.pipeline import training
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, Calibration
from vaemo.trust.novelty import Novelty
from vaemo.trust.own_calls import calibrate_calls

QUICK = Config().replace(SMALL).replace({"train": {"epochs": 1, "lanes": 4, "window": 10, "trackers": []}})


def train(store, out, **options):
    return vaemo.train(store=store, out=out, config=QUICK, executor="process", **options).checkpoints


def test_models_of_folds_are_calibrated_together_on_what_they_did_not_see(tmp_path, capsys):
    store = make_store(tmp_path / "store", lengths=(4, 8))
    checkpoints = [str(path) for path in train(store, tmp_path / "run", folds="k=2")]
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        found = Calibration.read(checkpoint)
        assert found.made_on == HELD_OUT
        assert found.n_groups == len(SPLIT)
        assert not Novelty.read(checkpoint).from_dev
    rows = run(store, ",".join(checkpoints), str(tmp_path / "scores"))
    assert rows["valence_low"].null_count == 0
    said = capsys.readouterr().out
    assert f"the splits of {store} are not used, as folds make their own: evaluate {tmp_path / 'run' / 'oof'}" in said
    tested = pc.sum(pc.equal(rows["split"], "test")).as_py()
    for scored, warned in ((tmp_path / "scores", True), (tmp_path / "run" / "oof", False)):
        vaemo.evaluate(scores=scored, labels=store, out=tmp_path / "out", set=["evaluate.bootstrap=0"])
        warning = f"warning: {tested:,} of the {tested:,} utterances that are evaluated are known to the model"
        assert (warning in capsys.readouterr().out) == warned
    held, mine = str(tmp_path / "run" / "oof"), str(tmp_path / "mine")
    assert calibrate_calls(held, store, checkpoints, mine, QUICK)[0].made_on == HELD_OUT
    with pytest.raises(UsageError, match="Give the checkpoints that made the scores"):
        calibrate_calls(held, store, checkpoints[:1], mine, QUICK)
    provenance = scores.read_provenance(held)
    del provenance["checkpoints"]
    files.write_json(files.join(held, scores.PROVENANCE), provenance)
    with pytest.raises(UsageError, match="does not say which models made them"):
        calibrate_calls(held, store, checkpoints, mine, QUICK)


def test_a_training_killed_before_its_end_is_described_and_calibrated_when_it_goes_on(tmp_path, monkeypatch):
    store, run_out = make_store(tmp_path / "store", lengths=(4, 8)), tmp_path / "run"

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "attach", killed)
    with pytest.raises(KeyboardInterrupt):
        train(store, run_out)
    monkeypatch.undo()
    assert json.loads((run_out / "summary.json").read_text())["concluded"] is False
    (best,) = train(store, run_out)
    assert Calibration.read(str(best)).made_on == CALIB_SPLIT
    assert Novelty.read(str(best))
    written = (run_out / "best" / "calibration.json").stat().st_mtime_ns
    train(store, run_out)
    assert (run_out / "best" / "calibration.json").stat().st_mtime_ns == written


def test_seeds_are_calibrated_together_and_the_first_one_alone(tmp_path):
    store = make_store(tmp_path / "store", lengths=(4, 8))
    checkpoints = [str(path) for path in train(store, tmp_path / "run", seeds=2)]
    together, alone = Calibration.read(checkpoints[0]), Calibration.read(str(tmp_path / "run" / "best"))
    assert together.made_on == alone.made_on == CALIB_SPLIT
    assert len(together.checkpoints) == 2
    assert len(alone.checkpoints) == 1
    for number, several in enumerate((",".join(checkpoints), str(tmp_path / "run" / "best"))):
        assert "valence_low" in run(store, several, str(tmp_path / f"scores-{number}")).column_names
