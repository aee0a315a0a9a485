"""Hierarchical conformal prediction: intervals that cover at a chosen rate.

Utterances of one conversation are not exchangeable, and neither are conversations that share a speaker. The unit is
therefore a *group*: the sessions that are linked by speakers. Of K groups, each residual of group k has the weight
1 / ((K + 1) n_k), and 1 / (K + 1) lies at infinity for the group that is to come. Where groups are exchangeable, an
interval as wide as the weighted quantile of the residuals covers a random utterance of a new group at least at its
level, whatever model made the predictions. There is no guarantee for one given group, or for groups of another kind.

Letters: N residuals, K groups.

Sources:
    Lee, Barber and Willett (2023), Distribution-free inference with hierarchical data.
    Dunn, Wasserman and Ramdas (2018), Distribution-free prediction sets with random effects.
    Vovk (2012), Conditional validity of inductive conformal predictors: the Beta law.
"""

from __future__ import annotations

import math

import numpy as np

LEVELS = np.arange(500, 1000) / 1000
"""Levels at which a calibration keeps the quantiles of its residuals."""

_ROUNDING = 1e-9
_GRID = 20_001


def weights(group: np.ndarray) -> np.ndarray:
    """The weight of every residual, (N,): 1 / ((K + 1) n_k).

    Args:
        group: (N,) whole numbers.
    """
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    return 1.0 / ((len(counts) + 1) * counts[number])


def quantiles(residuals: np.ndarray, group: np.ndarray, levels: np.ndarray = LEVELS) -> np.ndarray:
    """The weighted quantiles of residuals, one per level; infinite where there are too few groups for a level.

    Args:
        residuals: (N,), at least 0; NaN = not known, and its row has no weight.
        group: (N,) the group of each residual, whole numbers.
        levels: Between 0 and 1.
    """
    known = ~np.isnan(residuals)
    residuals, group = residuals[known], group[known]
    order = np.argsort(residuals, kind="stable")
    reached = np.cumsum(weights(group)[order])
    place = np.searchsorted(reached, np.asarray(levels) - _ROUNDING)
    return np.append(residuals[order], np.inf)[place]


def groups_needed(coverage: float) -> int:
    """The fewest groups with which an interval of this coverage is finite: 9 for 0.9."""
    return math.ceil(coverage / (1 - coverage) - _ROUNDING)


def spread(n_groups: int, coverage: float, level: float = 0.95) -> tuple[float, float]:
    """Where the coverage of one calibration lies, in the middle `level` of calibrations.

    The mean over calibrations is at least the nominal coverage; that of a single one follows Beta(K + 1 - l, l), with
    l = floor((K + 1) (1 - coverage)), where a group counts as one residual. Several different residuals in each group
    make the spread smaller.
    """
    beyond = math.floor((n_groups + 1) * (1 - coverage) + _ROUNDING)
    if beyond < 1:
        return 1.0, 1.0
    inside = n_groups + 1 - beyond
    at = np.linspace(0, 1, _GRID)[1:-1]
    log_density = (inside - 1) * np.log(at) + (beyond - 1) * np.log1p(-at)
    reached = np.cumsum(np.exp(log_density - log_density.max()))
    low, high = np.interp(np.array([1 - level, 1 + level]) / 2 * reached[-1], reached, at)
    return float(low), float(high)
