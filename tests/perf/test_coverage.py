"""Coverage and width of intervals on worlds whose best predictor is known, over seeds and numbers of groups.

    pytest -m slow tests/perf/test_coverage.py -s

prints a line for each number of groups: mean coverage, its standard error, seeds outside of the Beta law, and the
width as a share of what 2,000 residuals of the best predictor itself give.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vaemo.data.sessions import assemble_sessions
from vaemo.testing import kalman_predictions, linear_world
from vaemo.trust.calibration import CALIB_SPLIT, calibrate
from vaemo.trust.conformal import quantiles, spread
from vaemo.trust.rows import call_rows, utterance_rows
from vaemo.units import DIMENSIONS, LabelScale

SEEDS, NEW = 20, 200

pytestmark = pytest.mark.slow


def scored(world):
    """The world's utterances with the scores of its best predictor, and labels as `label_NAME`."""
    sessions = assemble_sessions(world.table)
    found = np.concatenate(kalman_predictions(world, sessions))
    table = world.table.select(["session_id", "speaker_id", "role", "start_s", "end_s", "split", "status"])
    for k, name in enumerate(DIMENSIONS):
        table = table.append_column(name, pa.array(found[:, k]))
        table = table.append_column(f"label_{name}", world.table[name].cast(pa.float64()))
    return table


def inside(rows, margin, name):
    reach = margin.reach(0.9, rows.signs, len(rows.group))
    error = np.abs(rows.prediction[name] - rows.label[name])
    covered = np.bincount(rows.group, error <= reach) / np.bincount(rows.group)
    return covered.mean(), 2 * reach.mean(), 2 * quantiles(error, rows.group, np.array([0.9]))[0]


@pytest.mark.parametrize("n_groups", [12, 50, 200])
def test_intervals_of_the_best_predictor_cover(n_groups):
    coverage, width, best = [], [], []
    for seed in range(SEEDS):
        table = scored(linear_world(seed, sessions=(40, n_groups, NEW), lengths=(5, 30)))
        dev, calib, new = (table.filter(pc.equal(table["split"], name)) for name in ("train", "dev", "test"))
        calibration = calibrate(calib, dev, ["f"], CALIB_SPLIT, LabelScale(0, 1))
        kinds = (
            (utterance_rows(new, DIMENSIONS), calibration.utterances),
            (call_rows(new, DIMENSIONS), calibration.calls),
        )
        found = np.array([[inside(rows, margins[name], name) for name in DIMENSIONS] for rows, margins in kinds])
        coverage.append(found[..., 0])
        width.append(found[..., 1])
        best.append(found[..., 2])
    coverage, width, best = map(np.array, (coverage, width, best))
    error = coverage.std(axis=0, ddof=1) / np.sqrt(SEEDS)
    low, high = spread(n_groups, 0.9)
    # The new sessions have a spread of their own.
    slack = 2 * np.sqrt(0.09 / NEW)
    outside = ((coverage < low - slack) | (coverage > high + slack)).mean(axis=0)
    share = width.mean(axis=0) / best.mean(axis=0)
    for k, kind in enumerate(("utterances", "calls")):
        for d, name in enumerate(DIMENSIONS):
            print(
                f"{n_groups} groups, {kind}, {name}: {coverage.mean(axis=0)[k, d]:.4f} ± {error[k, d]:.4f}, "
                f"{100 * outside[k, d]:.0f} % of seeds outside, width {share[k, d]:.3f} of the best"
            )
    assert (coverage.mean(axis=0) >= 0.9 - 2 * error).all()
    assert (outside <= 0.1).all()
    assert n_groups < 200 or (share <= 1.1).all()
