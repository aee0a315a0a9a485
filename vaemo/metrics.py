"""Agreement of predictions with labels: CCC, Pearson's r, Spearman's rho, RMSE, MAE; one definition for every stage.

The concordance correlation coefficient of n pairs (x, y) is 2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y))^2),
variances and covariance divided by n (biased). Everything here is float64; pairs with a NaN are left out. The
differentiable form for training is in `vaemo.training.loss`.

Pooled over sessions, CCC rewards knowing which session it is as well as following what happens in it. CCC *within*
sessions (`Moments.within`) is that of predictions and labels, each centred on its mean over the session.

Two other forms are in use. The scorer of the AVEC challenges divides the variances by n - 1 and the covariance by n:
`unbiased` here. torchmetrics divides all three by n - 1; it differs from both in the term of the means alone, and not
at all where the means agree.

Source:
    Lin (1989), A concordance correlation coefficient to evaluate reproducibility, Biometrics 45.
    AVEC 2018 and 2019, `calc_scores` of the baseline's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vaemo.errors import ShapeError

Variance = Literal["biased", "unbiased"]


@dataclass(frozen=True)
class Moments:
    """First and second moments of n pairs, centred, so that parts of any size merge without loss of digits.

    The fields are arrays of one shape: one entry per group (dimension, session, bootstrap draw, ...).
    `parts[0] + parts[1]` are the moments of both.

    Source:
        Chan, Golub and LeVeque (1979), Updating formulae and a pairwise algorithm for sample variances, eq. 2.1.
    """

    n: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    sum_xx: np.ndarray
    sum_yy: np.ndarray
    sum_xy: np.ndarray

    @staticmethod
    def of(prediction: np.ndarray, label: np.ndarray) -> Moments:
        """Moments over the first axis, for each entry of the others.

        Args:
            prediction: (n, ...), NaN = missing.
            label: The same shape, NaN = missing.

        Raises:
            ShapeError: if the shapes differ.
        """
        x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
        if x.shape != y.shape:
            raise ShapeError(f"predictions have the shape {x.shape}, labels {y.shape}; they must be equal.")
        known = ~(np.isnan(x) | np.isnan(y))
        n = known.sum(axis=0).astype(np.float64)
        some = np.maximum(n, 1)
        mean_x = np.where(known, x, 0).sum(axis=0) / some
        mean_y = np.where(known, y, 0).sum(axis=0) / some
        dx, dy = np.where(known, x - mean_x, 0), np.where(known, y - mean_y, 0)
        return Moments(n, mean_x, mean_y, (dx * dx).sum(axis=0), (dy * dy).sum(axis=0), (dx * dy).sum(axis=0))

    @staticmethod
    def within(prediction: np.ndarray, label: np.ndarray, session: np.ndarray) -> Moments:
        """Moments of pairs, each side centred on its mean over the session; both means are 0.

        A session with one pair carries no information and does not count in n. Parts that hold whole sessions add up.

        Args:
            prediction: (n, K), NaN = missing.
            label: (n, K), NaN = missing.
            session: (n,) whole numbers from 0.

        Raises:
            ShapeError: if the shapes differ.
        """
        n, xx, yy, xy = np.moveaxis(within_sums(prediction, label, session).sum(axis=0), -1, 0)
        return Moments(n, np.zeros_like(n), np.zeros_like(n), xx, yy, xy)

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        share = other.n / np.maximum(n, 1)
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.n * share
        return Moments(
            n,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.sum_xx + other.sum_xx + dx * dx * between,
            self.sum_yy + other.sum_yy + dy * dy * between,
            self.sum_xy + other.sum_xy + dx * dy * between,
        )

    def ccc(self, variance: Variance = "biased") -> np.ndarray:
        """CCC; 0 where one side is constant, NaN where both are constant and equal, or where n is 0.

        Args:
            variance: `biased`: divided by n, as the covariance is. `unbiased`: divided by n - 1, as in AVEC; perfect
                predictions then have (n - 1) / n.
        """
        scale = self.n / np.maximum(self.n - 1, 1) if variance == "unbiased" else 1.0
        offset = self.n * (self.mean_x - self.mean_y) ** 2
        return _ratio(2 * self.sum_xy, scale * (self.sum_xx + self.sum_yy) + offset)

    def pearson(self) -> np.ndarray:
        """Pearson's r; NaN where one side is constant."""
        return _ratio(self.sum_xy, np.sqrt(self.sum_xx * self.sum_yy))

    def rmse(self) -> np.ndarray:
        """Root of the mean squared error, in units of the labels; NaN where n is 0."""
        squares = self.sum_xx + self.sum_yy - 2 * self.sum_xy + self.n * (self.mean_x - self.mean_y) ** 2
        return np.sqrt(np.maximum(_ratio(squares, self.n), 0))

    def sd(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations of predictions and of labels (divided by n)."""
        return np.sqrt(_ratio(self.sum_xx, self.n)), np.sqrt(_ratio(self.sum_yy, self.n))


def within_sums(prediction: np.ndarray, label: np.ndarray, session: np.ndarray) -> np.ndarray:
    """The sums that each session adds to `Moments.within`: n and the sums of x^2, y^2 and xy, x and y centred, (S, K,
    4).

    Arguments as there; S is the highest session number plus 1.
    """
    x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if x.shape != y.shape or x.shape[:1] != session.shape:
        raise ShapeError(
            f"predictions have the shape {x.shape}, labels {y.shape} and sessions {session.shape}; "
            "(n, K), (n, K) and (n,) are needed."
        )
    known = ~(np.isnan(x) | np.isnan(y))
    n_sessions = int(session.max(initial=-1)) + 1

    def summed(values: np.ndarray) -> np.ndarray:
        sums = [np.bincount(session, weights=column, minlength=n_sessions) for column in values.T]
        return np.stack(sums, axis=-1) if sums else np.zeros((n_sessions, 0))

    n = summed(known.astype(np.float64))
    x, y = np.where(known, x, 0.0), np.where(known, y, 0.0)
    # Centred twice: the mean of equal numbers may be off by rounding, and a constant would seem to vary.
    for _ in range(2):
        x = np.where(known, x - (summed(x) / np.maximum(n, 1))[session], 0.0)
        y = np.where(known, y - (summed(y) / np.maximum(n, 1))[session], 0.0)
    parts = np.stack([n, summed(x * x), summed(y * y), summed(x * y)], axis=-1)
    return np.where(n[..., None] > 1, parts, 0.0)


def ccc(prediction: np.ndarray, label: np.ndarray, variance: Variance = "biased") -> np.ndarray:
    """CCC over the first axis; see `Moments.ccc`."""
    return Moments.of(prediction, label).ccc(variance)


def pearson(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Pearson's r over the first axis; see `Moments.pearson`."""
    return Moments.of(prediction, label).pearson()


def rmse(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Root of the mean squared error over the first axis; NaN where no pair is whole."""
    return Moments.of(prediction, label).rmse()


def mae(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Mean absolute error over the first axis; NaN where no pair is whole."""
    error = np.abs(np.asarray(prediction, np.float64) - np.asarray(label, np.float64))
    known = ~np.isnan(error)
    return _ratio(np.where(known, error, 0).sum(axis=0), known.sum(axis=0))


def spearman(prediction: np.ndarray, label: np.ndarray) -> float:
    """Spearman's rank correlation of (n,) and (n,) without NaN, equal values sharing their mean rank."""
    return float(pearson(_ranks(prediction), _ranks(label)))


def spearman_interval(rho: float, n: int) -> tuple[float, float]:
    """The 95 % interval of Spearman's rho of n independent pairs, on Fisher's scale; NaN under four.

    Source:
        Bonett and Wright (2000), Sample size requirements for estimating Pearson, Kendall and Spearman correlations,
        Psychometrika 65.
    """
    if n < 4 or not np.isfinite(rho):
        return np.nan, np.nan
    middle, reach = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12)), 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return float(np.tanh(middle - reach)), float(np.tanh(middle + reach))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)[()]
