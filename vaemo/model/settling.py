"""How far the first predictions of a session can be trusted: the error by position, and the weights that follow.

A memory that starts empty has to find out how this session sounds, and its first predictions drift from the mean of
the training split to where the session is. So the lowest and the highest score of a session, and its slope, would often
say where it began and not what happened. What counts there is the error *within* sessions: of a prediction less its
session's mean error, for a mean that is off moves no extreme. Letters: U utterances, R ranges of positions,
F targets of utterances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaemo.units import DIMENSIONS

STARTS = (0, 1, 2, 3, 4, 6, 9, 14, 20, 40)
"""Where a range of positions begins, counted from 0; the last has no end."""

FEW = 12
"""A range with fewer labelled utterances is judged together with its neighbour."""

LEAST_WEIGHT = 0.01
"""No utterance counts for less: a session that ends early has nothing better."""


@dataclass(frozen=True, eq=False)
class ErrorByPosition:
    """Errors by the position of an utterance in its session.

    Attributes:
        starts: Positions, from 0, at which the ranges begin, (R,).
        n: Labelled utterances of sessions with two or more, (R, F).
        mse: Mean squared error, (R, F); NaN where n is 0.
        within_mse: The same of errors less their mean over the session.
        names: The targets, F.
    """

    starts: np.ndarray
    n: np.ndarray
    mse: np.ndarray
    within_mse: np.ndarray
    names: tuple[str, ...] = DIMENSIONS

    @staticmethod
    def of(
        prediction: np.ndarray,
        label: np.ndarray,
        session: np.ndarray,
        position: np.ndarray,
        names: tuple[str, ...] = DIMENSIONS,
    ) -> ErrorByPosition:
        """What predictions show.

        Args:
            prediction: (U, F).
            label: (U, F), NaN = unlabelled.
            session: (U,) whole numbers from 0.
            position: (U,) whole numbers from 0, of all utterances that move the memory.
            names: The targets, F.
        """
        error = np.asarray(prediction, np.float64) - label
        place = np.searchsorted(STARTS, position, side="right") - 1
        n, mse, within_mse = (np.zeros((len(STARTS), len(names))) for _ in range(3))
        for k in range(len(names)):
            known = ~np.isnan(error[:, k])
            known &= (np.bincount(session[known], minlength=session.max(initial=-1) + 1) > 1)[session]
            own, where, of = error[known, k], place[known], session[known]
            centred = own - (np.bincount(of, own) / np.maximum(np.bincount(of), 1))[of]
            n[:, k] = np.bincount(where, minlength=len(STARTS))
            for found, values in ((mse, own), (within_mse, centred)):
                sums = np.bincount(where, values**2, minlength=len(STARTS))
                found[:, k] = np.divide(sums, n[:, k], out=np.full(len(STARTS), np.nan), where=n[:, k] > 0)
        return ErrorByPosition(np.array(STARTS), n, mse, within_mse, names)

    def weights(self, position: np.ndarray) -> np.ndarray:
        """How much utterances count, (U, F), in (0, 1]: the squared error within sessions, once settled, over theirs.

        The error is taken to fall with the position and never to rise (isotonic regression), so that few labels do
        not make a weight of chance; all count alike where there is too little to say.

        Args:
            position: As for `of`.
        """
        place = np.searchsorted(self.starts, position, side="right") - 1
        shares = [_settled_share(mse, n)[place] for mse, n in zip(self.within_mse.T, self.n.T, strict=True)]
        return np.stack(shares, axis=1) if shares else np.ones((len(place), 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `from` (positions from 1), and by target `n`, `rmse` and `within_rmse`, None where none."""

        def plain(values: np.ndarray) -> dict[str, list[float | None]]:
            roots = np.sqrt(values).T.tolist()
            return {
                name: [None if root != root else root for root in column]
                for name, column in zip(self.names, roots, strict=True)
            }

        return {
            "from": (self.starts + 1).tolist(),
            "n": dict(zip(self.names, self.n.astype(int).T.tolist(), strict=True)),
            "rmse": plain(self.mse),
            "within_rmse": plain(self.within_mse),
        }

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> ErrorByPosition:
        """What `to_dict` gave; ValueError for anything else."""
        try:
            starts = np.array(plain["from"], np.int64) - 1
            names = tuple(plain["n"])
            n, rmse, within = (
                np.array([plain[key][name] for name in names], np.float64).reshape(len(names), len(starts)).T
                for key in ("n", "rmse", "within_rmse")
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"no errors by position ({type(error).__name__}: {error})") from None
        alike = all(tuple(plain[key]) == names for key in ("rmse", "within_rmse"))
        fits = alike and len(starts) and starts[0] == 0 and (np.diff(starts) > 0).all() and (n >= 0).all()
        if not fits or not n.shape == rmse.shape == within.shape == (len(starts), len(names)):
            raise ValueError("errors by position that do not fit together")
        return ErrorByPosition(starts, n, rmse**2, within**2, names)


def mean_weights(errors: Sequence[ErrorByPosition | None], position: np.ndarray) -> np.ndarray | None:
    """The weights of utterances by the errors of several models, their mean; 1 for a model that knows none.

    None where no model knows any.
    """
    known = [error for error in errors if error]
    if not known:
        return None
    summed = np.sum([error.weights(position) for error in known], axis=0)
    return (summed + len(errors) - len(known)) / len(errors)


def _settled_share(mse: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Of every range, (R,), the error of the last one over its own, errors made to fall with the position."""
    # Blocks of [sum of squares, n, ranges]: pooled while one holds too little, or is above the one before.
    blocks: list[list[float]] = []
    for total, count in zip(np.where(n > 0, mse * n, 0.0), n, strict=True):
        blocks.append([total, count, 1])
        while len(blocks) > 1 and _joins(*blocks[-2:]):
            last = blocks.pop()
            blocks[-1] = [mine + other for mine, other in zip(blocks[-1], last, strict=True)]
    level = [total / max(count, 1) for total, count, _ in blocks]
    share = [max(level[-1] / each, LEAST_WEIGHT) if each > 0 else 1.0 for each in level]
    return np.repeat(share, [int(ranges) for *_, ranges in blocks])


def _joins(before: list[float], after: list[float]) -> bool:
    return min(before[1], after[1]) < FEW or after[0] * before[1] >= before[0] * after[1]


def drawn_to_mean(values: np.ndarray, weights: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Values moved towards their session's mean, all (U,), as far as they are not to be trusted."""
    return mean + weights * (values - mean)
