"""Intervals over sessions: sums against the plain metrics, draws against drawing utterances, and coverage."""

import numpy as np
import pytest
from scipy.stats import t

from vaemo import metrics
from vaemo.evaluation.bootstrap import METRICS, SessionSums, interval, metrics_of, student_t

# Sums around a middle and the two-pass formulas differ in the order of additions only.
FLOAT64 = 1e-10


def make(rng, n_sessions, n=30):
    """Labels that drift per session, predictions that are off by as much per session as per utterance."""
    session = np.repeat(np.arange(n_sessions), n)
    label = rng.normal(0, 1, (n_sessions, 2))[session] + rng.normal(0, 0.7, (len(session), 2))
    offset = rng.normal(0, 0.5, (n_sessions, 2))[session]
    return 0.6 * label + offset + rng.normal(0, 0.7, label.shape) + 0.1, label, session


def test_metrics_of_sums_are_the_plain_ones():
    rng = np.random.default_rng(0)
    x, y, session = make(rng, 9)
    x, y = x + 100, y + 100
    y[rng.random(y.shape) < 0.2] = np.nan
    found = metrics_of(SessionSums.of(x, y, session).total())
    for name in ("ccc", "pearson", "rmse", "mae"):
        expected = getattr(metrics, name)(x, y)
        np.testing.assert_allclose(found[name][:2], expected, rtol=FLOAT64)
        np.testing.assert_allclose(found[name][2], expected.mean(), rtol=FLOAT64)
    np.testing.assert_allclose(found["bias"][:2], np.nanmean(x - y, axis=0), rtol=FLOAT64)


def test_unbiased_variances_are_those_of_avec():
    x, y, session = make(np.random.default_rng(1), 3, n=4)
    found = metrics_of(SessionSums.of(x, y, session).total(), "unbiased")["ccc"]
    for k in range(2):
        a, b = x[:, k], y[:, k]
        covariance = np.mean((a - a.mean()) * (b - b.mean()))
        expected = 2 * covariance / (a.var(ddof=1) + b.var(ddof=1) + (a.mean() - b.mean()) ** 2)
        assert found[k] == pytest.approx(expected, rel=FLOAT64)


def test_a_draw_of_sums_is_a_draw_of_utterances():
    x, y, session = make(np.random.default_rng(2), 12)
    drawn = metrics_of(SessionSums.of(x, y, session).resample(5, seed=3))
    rng = np.random.default_rng(3)
    for index, sessions in enumerate(rng.integers(12, size=(5, 12))):
        rows = np.concatenate([np.flatnonzero(session == s) for s in sessions])
        np.testing.assert_allclose(drawn["ccc"][index, :2], metrics.ccc(x[rows], y[rows]), rtol=FLOAT64)
        np.testing.assert_allclose(drawn["mae"][index, :2], metrics.mae(x[rows], y[rows]), rtol=FLOAT64)


def test_leaving_one_out_is_leaving_one_out():
    x, y, session = make(np.random.default_rng(4), 6)
    left_out = metrics_of(SessionSums.of(x, y, session).leave_one_out())
    for s in range(6):
        expected = metrics.rmse(x[session != s], y[session != s])
        np.testing.assert_allclose(left_out["rmse"][s, :2], expected, rtol=FLOAT64)


@pytest.mark.parametrize("freedom", [2, 5, 39, 1000])
def test_student_t(freedom):
    assert student_t(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.02)


def test_one_session_has_no_interval():
    sums = SessionSums.of(*make(np.random.default_rng(5), 1))
    found = metrics_of(sums.total())
    low, high = interval(
        "ccc", found["ccc"], metrics_of(sums.resample(50, 0))["ccc"], metrics_of(sums.leave_one_out())["ccc"]
    )
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_perfect_scores_have_a_tight_interval():
    _, y, session = make(np.random.default_rng(6), 20)
    sums = SessionSums.of(y, y, session)
    for metric, value in (("ccc", 1.0), ("rmse", 0.0)):
        estimate = metrics_of(sums.total())[metric]
        draws, left_out = metrics_of(sums.resample(50, 0))[metric], metrics_of(sums.leave_one_out())[metric]
        low, high = interval(metric, estimate, draws, left_out)
        np.testing.assert_allclose([low, high], value, atol=1e-6)


def test_nominal_95_percent_covers_92_to_98():
    """400 corpora of 40 sessions; the truth is the metric of 40,000 sessions."""
    rng = np.random.default_rng(7)
    truth = metrics_of(SessionSums.of(*make(rng, 40_000)).total())
    covered = {name: np.zeros(3) for name in METRICS}
    for repeat in range(400):
        sums = SessionSums.of(*make(rng, 40))
        found, left_out = metrics_of(sums.total()), metrics_of(sums.leave_one_out())
        draws = metrics_of(sums.resample(400, repeat))
        for name in METRICS:
            low, high = interval(name, found[name], draws[name], left_out[name])
            covered[name] += (low <= truth[name]) & (truth[name] <= high)
    for name in ("ccc", "pearson", "rmse", "mae", "bias"):
        assert (covered[name] / 400).mean() == pytest.approx(0.95, abs=0.03), name
