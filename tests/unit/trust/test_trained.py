"""Trainings leave calibrated checkpoints: folds together, seeds together, and the run's own model alone."""

from scoring_cases import SMALL, run
from trust_cases import SPLIT, make_store

import vaemo
from vaemo.config import Config
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, Calibration
from vaemo.trust.novelty import Novelty

QUICK = Config().replace(SMALL).replace({"train": {"epochs": 1, "lanes": 4, "window": 10, "trackers": []}})


def train(store, out, **options):
    return vaemo.train(store=store, out=out, config=QUICK, executor="process", **options).checkpoints


def test_models_of_folds_are_calibrated_together_on_what_they_did_not_see(tmp_path):
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


def test_seeds_are_calibrated_together_and_the_first_one_alone(tmp_path):
    store = make_store(tmp_path / "store", lengths=(4, 8))
    checkpoints = [str(path) for path in train(store, tmp_path / "run", seeds=2)]
    together, alone = Calibration.read(checkpoints[0]), Calibration.read(str(tmp_path / "run" / "best"))
    assert together.made_on == alone.made_on == CALIB_SPLIT
    assert len(together.checkpoints) == 2
    assert len(alone.checkpoints) == 1
    for number, several in enumerate((",".join(checkpoints), str(tmp_path / "run" / "best"))):
        assert "valence_low" in run(store, several, str(tmp_path / f"scores-{number}")).column_names
