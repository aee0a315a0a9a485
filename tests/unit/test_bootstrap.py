"""Intervals over sessions: sums against the plain metrics, draws against drawing utterances, and coverage."""

import numpy as np
import pytest
from scipy.stats import t

from vaemo import metrics
from vaemo.config import EvaluateConfig
from vaemo.evaluation.bootstrap import METRICS, Resampled, SessionSums, holm, metrics_of, student_t, two_sided_p

QUICK = EvaluateConfig(bootstrap=200)

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
    expected = metrics.Moments.within(x, y, session).ccc()
    np.testing.assert_allclose(found["within_ccc"], [*expected, expected.mean()], rtol=FLOAT64)
    np.testing.assert_allclose(found["bias"][:2], np.nanmean(x - y, axis=0), rtol=FLOAT64)


def test_either_ccc_follows_from_the_sums():
    x, y, session = make(np.random.default_rng(1), 3, n=4)
    found = metrics_of(SessionSums.of(x, y, session).total(), "unbiased")["ccc"]
    np.testing.assert_allclose(found[:2], metrics.ccc(x, y, "unbiased"), rtol=FLOAT64)


@pytest.mark.parametrize("constant", [0.3, 0.5123, 7.0])
def test_constant_predictions_agree_with_nothing(constant):
    _, y, session = make(np.random.default_rng(1), 11)
    resampled = Resampled.of([SessionSums.of(np.full_like(y, constant), y, session)], QUICK)
    np.testing.assert_allclose(resampled.draws["ccc"], 0, atol=FLOAT64)
    assert np.isnan(resampled.draws["pearson"]).all()


def test_a_draw_of_sums_is_a_draw_of_utterances():
    x, y, session = make(np.random.default_rng(2), 12)
    drawn = metrics_of(SessionSums.of(x, y, session).resample(5, seed=3))
    rng = np.random.default_rng(3)
    for index, sessions in enumerate(rng.integers(12, size=(5, 12))):
        rows = np.concatenate([np.flatnonzero(session == s) for s in sessions])
        np.testing.assert_allclose(drawn["ccc"][index, :2], metrics.ccc(x[rows], y[rows]), rtol=FLOAT64)
        np.testing.assert_allclose(drawn["mae"][index, :2], metrics.mae(x[rows], y[rows]), rtol=FLOAT64)
        # A session that is drawn twice is two sessions.
        again = np.concatenate([np.full((session == s).sum(), place) for place, s in enumerate(sessions)])
        expected = metrics.Moments.within(x[rows], y[rows], again).ccc()
        np.testing.assert_allclose(drawn["within_ccc"][index, :2], expected, rtol=FLOAT64)


def test_leaving_one_out_is_leaving_one_out():
    x, y, session = make(np.random.default_rng(4), 6)
    left_out = metrics_of(SessionSums.of(x, y, session).leave_one_out())
    for s in range(6):
        expected = metrics.rmse(x[session != s], y[session != s])
        np.testing.assert_allclose(left_out["rmse"][s, :2], expected, rtol=FLOAT64)


@pytest.mark.parametrize("freedom", [2, 5, 39, 1000])
def test_student_t(freedom):
    assert student_t(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.02)


@pytest.mark.parametrize("freedom", [1, 2, 20, 1000])
def test_p_is_that_of_student_t(freedom):
    for value in (0.0, 0.1, 1.0, 2.0, 4.0, 8.0):
        assert two_sided_p(-0.3 * value, 0.3, freedom) == pytest.approx(2 * t.sf(value, freedom), rel=1e-3, abs=1e-12)
    assert two_sided_p(0.0, 0.0, freedom) == 1
    assert two_sided_p(0.1, 0.0, freedom) == 0
    assert np.isnan(two_sided_p(0.1, np.nan, freedom))


def test_p_goes_with_the_interval():
    rng = np.random.default_rng(10)
    sides = []
    for _ in range(40):
        x, y, session = make(rng, 15)
        other = x + rng.normal(0, 0.3, x.shape)
        one, two = (Resampled.of([SessionSums.of(each, y, session)], QUICK) for each in (x, other))
        difference = one.less(two, "ccc")
        clear = (difference.low > 0) | (difference.high < 0)
        # The interval's quantile is within 2 % of Student's.
        near = np.abs(difference.p - 0.05) < 0.005
        assert ((difference.p < 0.05) == clear)[~near].all()
        sides.append(clear)
    assert 0 < np.mean(sides) < 1


def test_one_session_has_no_interval():
    low, high = Resampled.of([SessionSums.of(*make(np.random.default_rng(5), 1))], QUICK).interval("ccc")
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_perfect_scores_have_a_tight_interval():
    _, y, session = make(np.random.default_rng(6), 20)
    resampled = Resampled.of([SessionSums.of(y, y, session)], QUICK)
    for metric, value in (("ccc", 1.0), ("rmse", 0.0)):
        np.testing.assert_allclose(resampled.interval(metric), value, atol=1e-6)


def test_without_draws_the_jackknife_gives_the_interval():
    sums = SessionSums.of(*make(np.random.default_rng(11), 30))
    drawn, plain = (Resampled.of([sums], EvaluateConfig(bootstrap=n)).interval("rmse") for n in (2000, 0))
    np.testing.assert_allclose(plain, drawn, rtol=0.05)


def test_several_runs_are_averaged_draw_by_draw():
    rng = np.random.default_rng(8)
    x, y, session = make(rng, 10)
    runs = [SessionSums.of(x + rng.normal(0, 0.3, x.shape), y, session) for _ in range(3)]
    together, alone = Resampled.of(runs, QUICK), [Resampled.of([run], QUICK) for run in runs]
    for name in ("estimate", "draws", "left_out"):
        expected = np.mean([getattr(each, name)["ccc"] for each in alone], axis=0)
        np.testing.assert_allclose(getattr(together, name)["ccc"], expected, rtol=FLOAT64)


def test_differences_are_paired():
    """What sessions have in common cancels: the interval of the difference is far narrower than either one's."""
    rng = np.random.default_rng(9)
    x, y, session = make(rng, 40)
    other = x + rng.normal(0, 0.5, x.shape)
    one, two = (Resampled.of([SessionSums.of(each, y, session)], QUICK) for each in (x, other))
    difference = one.less(two, "ccc")
    np.testing.assert_allclose(difference.estimate, one.estimate["ccc"] - two.estimate["ccc"], rtol=FLOAT64)
    low, high = one.interval("ccc")
    assert (difference.high - difference.low < 0.5 * (high - low)).all()
    assert (difference.low > 0).all()
    assert (difference.p < 0.05).all()
    assert two.less(one, "ccc").p == pytest.approx(difference.p)
    assert one.less(one, "ccc").p == pytest.approx(1)


def test_holm():
    # Holm's own order: the smallest of m times m, the next times m - 1, never falling, never above 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.long
def test_nominal_95_percent_covers_92_to_98():
    """400 corpora of 40 sessions; the truth is the metric of 40,000 sessions."""
    rng = np.random.default_rng(7)
    truth = metrics_of(SessionSums.of(*make(rng, 40_000)).total())
    covered = {name: np.zeros(3) for name in METRICS}
    for repeat in range(400):
        resampled = Resampled.of([SessionSums.of(*make(rng, 40))], EvaluateConfig(bootstrap=400, seed=repeat))
        for name in METRICS:
            low, high = resampled.interval(name)
            covered[name] += (low <= truth[name]) & (truth[name] <= high)
    for name in ("ccc", "pearson", "rmse", "mae", "bias"):
        assert (covered[name] / 400).mean() == pytest.approx(0.95, abs=0.03), name
