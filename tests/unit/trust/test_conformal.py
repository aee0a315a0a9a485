"""Quantiles of residuals of groups: they cover, at the rate and in the spread that theory gives."""

import numpy as np
import pytest

from vaemo.data.splits import linked_sessions
from vaemo.trust.conformal import LEVELS, groups_needed, quantiles, spread, weights


def test_few_groups_give_no_finite_quantile():
    for coverage, needed in ((0.9, 9), (0.8, 4), (0.95, 19), (0.5, 1)):
        assert groups_needed(coverage) == needed
        for n_groups in (needed - 1, needed):
            found = quantiles(np.arange(n_groups, dtype=float), np.arange(n_groups), np.array([coverage]))
            assert np.isfinite(found[0]) == (n_groups == needed)


def test_with_the_fewest_groups_the_largest_residual_counts():
    residuals = np.array([3.0, 1.0, 9.0, 2.0, 8.0, 7.0, 5.0, 4.0, 6.0])
    assert quantiles(residuals, np.arange(9), np.array([0.9, 0.5]))[0] == 9.0
    assert quantiles(residuals, np.arange(9), np.array([0.9, 0.5]))[1] == 5.0


def test_a_group_weighs_the_same_however_many_residuals_it_has():
    group = np.repeat(np.arange(10), [1000, *[1] * 9])
    assert np.allclose(np.bincount(group, weights(group)), 1 / 11)
    # A large group of large residuals does not push the median of the others up.
    residuals = np.where(group == 0, 100.0, group.astype(float))
    assert quantiles(residuals, group, np.array([0.5]))[0] <= 7
    assert np.array_equal(quantiles(residuals, group), quantiles(np.r_[residuals, residuals], np.r_[group, group]))


def test_ties_and_unknown_residuals():
    group = np.arange(20)
    assert (quantiles(np.ones(20), group)[LEVELS <= 20 / 21] == 1).all()
    residuals = np.r_[np.arange(20.0), np.full(30, np.nan)]
    assert np.array_equal(quantiles(residuals, np.r_[group, 20 + np.arange(30)]), quantiles(np.arange(20.0), group))
    assert np.isinf(quantiles(np.full(5, np.nan), np.arange(5))).all()


@pytest.mark.parametrize("n_groups", [9, 12, 50, 200])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 40)])
def test_coverage_of_a_random_utterance_of_a_new_group(n_groups, sizes):
    """Groups differ in how far their predictions are off, and large groups are the worse ones."""
    random, coverages = np.random.default_rng(n_groups), []
    for _ in range(300):
        group_spread = np.exp(random.normal(0, 0.7, n_groups + 200))
        n = random.integers(sizes[0], sizes[1] + 1, len(group_spread))
        group = np.repeat(np.arange(len(group_spread)), n)
        residuals = np.abs(random.standard_normal(len(group))) * (group_spread * n**0.2)[group]
        mine = group < n_groups
        reach = quantiles(residuals[mine], group[mine], np.array([0.9]))[0]
        inside = np.bincount(group[~mine], residuals[~mine] <= reach)[n_groups:] / n[n_groups:]
        coverages.append(inside.mean())
    low, high = spread(n_groups, 0.9, level=0.99)
    error = np.std(coverages) / np.sqrt(len(coverages))
    assert np.mean(coverages) >= 0.9 - 2 * error
    # The 200 new groups have a spread of their own, 0.02.
    assert np.mean((np.array(coverages) < low - 0.05) | (np.array(coverages) > high + 0.05)) < 0.03
    assert np.mean(coverages) < 0.9 + 1.2 / (n_groups + 1) + 3 * error


def test_spread_is_that_of_the_beta_law():
    random = np.random.default_rng(0)
    for n_groups, inside, beyond in ((9, 9, 1), (50, 46, 5), (200, 181, 20)):
        drawn = np.quantile(random.beta(inside, beyond, 200_000), [0.025, 0.975])
        assert spread(n_groups, 0.9) == pytest.approx(tuple(drawn), abs=0.003)
    assert spread(8, 0.9) == (1.0, 1.0)


def test_sessions_that_share_speakers_are_linked_through_others():
    session = np.array([0, 0, 1, 1, 2, 2, 3])
    speaker = np.array([0, 1, 1, 2, 3, 4, 2])
    assert linked_sessions(session, speaker).tolist() == [0, 0, 0, 0, 1, 1, 0]
