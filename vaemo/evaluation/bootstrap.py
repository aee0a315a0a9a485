"""Confidence intervals from resampled sessions: utterances of one session are not independent, sessions are.

Every metric of `METRICS` is a function of a few additive sums. So each session is reduced to its sums once, a
draw of sessions is a weighted sum of those, and thousands of draws are one matrix product: the same numbers as
drawing the utterances themselves, at a cost that does not depend on how many there are.

Letters: S sessions, B draws, K targets.

Source:
    Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapters 8 (what to resample), 11 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from vaemo.config import EvaluateConfig
from vaemo.metrics import Moments, Variance, within_sums

METRICS = ("ccc", "within_ccc", "pearson", "rmse", "mae", "bias")
"""Each is given for every target and, last, for their mean."""

_BLOCK = 1 << 24
_ROUNDING = 1e-12
_ANGLES = 20_001


@dataclass(frozen=True)
class SessionSums:
    """What each session adds to the metrics.

    Attributes:
        values: (S, K, 11) for the targets: n, then the sums of x, y, x^2, y^2, xy and |x - y|, x the prediction
            and y the label, both less the middle of all labels so that no digits are lost; then, both less their
            means over the session, n and the sums of x^2, y^2 and xy, all 0 where the session has one pair.
        n_session: How many of the targets, the last ones, are of sessions: there is no agreement within one.
    """

    values: np.ndarray
    n_session: int = 0

    @staticmethod
    def of(prediction: np.ndarray, label: np.ndarray, session: np.ndarray, n_session: int = 0) -> SessionSums:
        """The sums of every session.

        Args:
            prediction: (n, K), NaN = missing.
            label: (n, K), NaN = missing.
            session: (n,) whole numbers from 0; every one of them is a session, also where it has no pair.
            n_session: As above.
        """
        known = ~(np.isnan(prediction) | np.isnan(label))
        n_targets = label.shape[1]
        middle = np.array([label[known[:, k], k].mean() if known[:, k].any() else 0.0 for k in range(n_targets)])
        x, y = np.where(known, prediction - middle, 0.0), np.where(known, label - middle, 0.0)
        parts = np.stack([known.astype(float), x, y, x * x, y * y, x * y, np.abs(x - y)], axis=-1)
        n_sessions = int(session.max(initial=-1)) + 1
        flat = parts.reshape(len(session), 7 * n_targets)
        summed = [np.bincount(session, weights=flat[:, i], minlength=n_sessions) for i in range(flat.shape[1])]
        plain = np.stack(summed, axis=-1).reshape(n_sessions, n_targets, 7)
        return SessionSums(np.concatenate([plain, within_sums(prediction, label, session)], axis=-1), n_session)

    def of_groups(self, group: np.ndarray) -> np.ndarray:
        """(G, K, 11): sums over groups of sessions.

        Args:
            group: (S,) whole numbers from 0, the group of each session.
        """
        summed = np.zeros((int(group.max(initial=-1)) + 1, *self.values.shape[1:]))
        np.add.at(summed, group, self.values)
        return summed

    def total(self) -> np.ndarray:
        """(K, 11): all sessions together."""
        return self.values.sum(axis=0)

    def leave_one_out(self) -> np.ndarray:
        """(S, K, 11): all sessions but one."""
        return self.total() - self.values

    def resample(self, draws: int, seed: int) -> np.ndarray:
        """(B, K, 11): as many sessions as there are, drawn with replacement; the same seed draws the same ones."""
        n_sessions = len(self.values)
        flat = self.values.reshape(n_sessions, -1)
        rng = np.random.default_rng(seed)
        block = max(1, _BLOCK // max(n_sessions, 1))
        resampled = [np.empty((0, flat.shape[1]))]
        for start in range(0, draws, block):
            rows = min(block, draws - start)
            drawn = rng.integers(n_sessions, size=(rows, n_sessions)) + n_sessions * np.arange(rows)[:, None]
            times = np.bincount(drawn.ravel(), minlength=rows * n_sessions).reshape(rows, n_sessions)
            resampled.append(times @ flat)
        return np.concatenate(resampled).reshape(draws, *self.values.shape[1:])


def defined(value: Any) -> float | None:
    """A float fit for JSON; None where it is not defined."""
    return float(value) if np.isfinite(value) else None


def metrics_of(sums: np.ndarray, variance: Variance = "biased", n_session: int = 0) -> dict[str, np.ndarray]:
    """Every metric from sums.

    Args:
        sums: (..., K, 11) as in `SessionSums`.
        variance: Variance in the CCC; see `Moments.ccc`.
        n_session: How many of the targets are of sessions; `within_ccc` has its mean over the others.

    Returns:
        Per metric (..., K + 1): the targets and their mean; NaN where it is not defined. `bias` is the mean
        of prediction less label; `within_ccc` is CCC of predictions and labels less their means over the session.
    """
    n, x, y, xx, yy, xy, absolute, *centred = np.moveaxis(sums, -1, 0)
    some = np.maximum(n, 1)
    moments = Moments(n, x / some, y / some, _squares(n, x, xx), _squares(n, y, yy), xy - x * y / some)
    n_within, *squares = centred
    within = Moments(n_within, np.zeros_like(n), np.zeros_like(n), *squares)
    absent = np.where(n > 0, 0.0, np.nan)
    named = {
        "ccc": moments.ccc(variance),
        "within_ccc": within.ccc(variance),
        "pearson": moments.pearson(),
        "rmse": moments.rmse(),
        "mae": absolute / some + absent,
        "bias": (x - y) / some + absent,
    }
    means = {name: value.mean(axis=-1, keepdims=True) for name, value in named.items()}
    if n_session:
        within_utterance = named["within_ccc"][..., :-n_session]
        absent = np.full_like(means["within_ccc"], np.nan)
        means["within_ccc"] = within_utterance.mean(axis=-1, keepdims=True) if within_utterance.shape[-1] else absent
    return {name: np.concatenate([value, means[name]], axis=-1) for name, value in named.items()}


@dataclass(frozen=True)
class Resampled:
    """Every metric of all sessions, of draws of sessions, and of all sessions but one.

    Of several runs over the same sessions (seeds of one model) it is the mean over the runs, for each draw: the
    interval then covers the variation between sessions, not between seeds.

    Attributes:
        estimate: Per metric (K + 1,): the targets and their mean.
        draws: Per metric (B, K + 1).
        left_out: Per metric (S, K + 1).
    """

    estimate: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    left_out: dict[str, np.ndarray]

    @staticmethod
    def of(runs: Sequence[SessionSums], config: EvaluateConfig) -> Resampled:
        """Resample runs, the sessions of all of them numbered alike; one seed draws the same sessions for every call.

        Args:
            runs: At least one.
            config: Number of draws, their seed, and the variance in the CCC.
        """
        return Resampled(
            *(
                _mean([metrics_of(sums, config.variance, runs[0].n_session) for sums in parts])
                for parts in (
                    [run.total() for run in runs],
                    [run.resample(config.bootstrap, config.seed) for run in runs],
                    [run.leave_one_out() for run in runs],
                )
            )
        )

    def interval(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Low and high, (K + 1,) each, of the 95 % interval; see `interval`."""
        return interval(metric, self.estimate[metric], self.draws[metric], self.left_out[metric])

    def less(self, other: Resampled, metric: str) -> Difference:
        """The difference to another set of runs over the same sessions, paired: the same sessions are drawn for both.

        `p` goes with the interval: it is below 0.05 where that leaves out 0.
        """
        estimate, draws, left_out = (
            mine[metric] - theirs[metric]
            for mine, theirs in (
                (self.estimate, other.estimate),
                (self.draws, other.draws),
                (self.left_out, other.left_out),
            )
        )
        error, freedom = _standard_error(draws, left_out)
        return Difference(
            estimate,
            *interval("difference", estimate, draws, left_out),
            p=np.array([two_sided_p(*each) for each in zip(estimate, error, freedom, strict=True)]),
        )


@dataclass(frozen=True)
class Difference:
    """A difference of a metric between two models, with interval and p: (K + 1,) each."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def holm(p: Sequence[float]) -> list[float]:
    """The p values of several comparisons, adjusted for the family-wise error rate.

    Source:
        Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def interval(
    metric: str, estimate: np.ndarray, draws: np.ndarray, left_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a metric, or of a difference of metrics.

    The interval is symmetric on a scale where the metric is about normal (Fisher's z for correlations, the logarithm
    for errors) and reaches as far as Student's t with S - 1 degrees of freedom says. Draws alone are too narrow where
    sessions are few, so the deviation is the larger of theirs and the jackknife's: with 40 sessions, 94 % of the
    intervals then cover, where the draws' own quantiles cover 91 %.

    Args:
        metric: One of `METRICS`, or `difference`.
        estimate: (...), of all sessions.
        draws: (B, ...), of resampled sessions.
        left_out: (S, ...), of all sessions but one.

    Returns:
        low, high: (...); NaN with fewer than two sessions that count.
    """
    to, back = _SCALES.get(metric, _IDENTITY)
    error, freedom = _standard_error(to(draws), to(left_out))
    middle, reach = to(estimate), student_t(freedom) * error
    return back(middle - reach), back(middle + reach)


def two_sided_p(difference: float, error: float, freedom: float) -> float:
    """How often Student's t is at least as far from 0 as a difference with this standard error; 1 for no difference.

    With t = sqrt(freedom) tan(angle), the density of t is that of the angle, cos(angle)^(freedom - 1), up to a factor.
    """
    if not np.isfinite(error):
        return np.nan
    angle = np.linspace(0, np.pi / 2, _ANGLES)
    density = np.cos(angle) ** (freedom - 1)
    beyond = np.r_[np.cumsum((density[1:] + density[:-1])[::-1])[::-1], 0.0]
    return float(np.interp(np.arctan2(abs(difference), error * np.sqrt(freedom)), angle, beyond / beyond[0]))


def student_t(freedom: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The quantile of Student's t that bounds the middle `level`; within 2 % of it from 2 degrees of freedom on.

    Source:
        Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    powers = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    freedom = np.asarray(freedom, np.float64)
    return z + sum((term / freedom**power for power, term in enumerate(powers, 1)), np.zeros_like(freedom))


_IDENTITY = (lambda value: value, lambda value: value)
_FISHER = (lambda value: np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), np.tanh)
_LOGARITHM = (lambda value: np.log(np.maximum(value, 1e-12)), np.exp)
_SCALES = {"ccc": _FISHER, "within_ccc": _FISHER, "pearson": _FISHER, "rmse": _LOGARITHM, "mae": _LOGARITHM}


def _standard_error(draws: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The larger of the draws' deviation and the jackknife's, NaN under two sessions; and the degrees of freedom."""
    n_sessions = np.isfinite(left_out).sum(axis=0)
    some = np.maximum(n_sessions, 2)
    jackknife = np.sqrt((some - 1) ** 2 / some) * _deviation(left_out)
    return np.where(n_sessions > 1, np.fmax(_deviation(draws), jackknife), np.nan), some - 1


def _deviation(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of the finite values, divided by their number less one; NaN where there is none."""
    finite = np.isfinite(values)
    n = np.maximum(finite.sum(axis=0), 1)
    mean = np.where(finite, values, 0.0).sum(axis=0) / n
    squares = np.where(finite, (np.where(finite, values, 0.0) - mean) ** 2, 0.0).sum(axis=0)
    return np.where(finite.any(axis=0), np.sqrt(squares / np.maximum(n - 1, 1)), np.nan)


def _squares(n: np.ndarray, x: np.ndarray, xx: np.ndarray) -> np.ndarray:
    """Sum of squares around the mean; 0 where it is no more than the rounding of what it is the difference of."""
    squares = xx - x * x / np.maximum(n, 1)
    return np.where(squares > _ROUNDING * xx, squares, 0.0)


def _mean(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
