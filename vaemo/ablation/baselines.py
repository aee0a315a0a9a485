"""What a session model must beat: the mean, ridge regression, and ridge regression with a memory.

Each learns from training sessions, chooses on dev sessions, and predicts test sessions. They see what the model's z
is made of: the streams that it uses, standardised and clipped as the model does it. Letters: T utterances of a
session, U of all of them, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vaemo.metrics import Moments, ccc
from vaemo.model.standardize import CLIP
from vaemo.sessions import Session

PENALTIES = (1.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
"""Of the squared weights, on standardised features and the sum of squared errors."""

MEMORIES = ((0.5, 0.8), (0.7,), (0.8,), (0.9,), (0.95,))
"""Coefficients of the causal EMAs that stand beside the features."""

Baseline = Callable[[Sequence[Session], Sequence[Session], Sequence[Session], Sequence[str]], list[np.ndarray]]
"""From training, dev and test sessions and the streams to use: (T, 2) for every test session."""


def mean_of_labels(
    train: Sequence[Session], dev: Sequence[Session], test: Sequence[Session], streams: Sequence[str]
) -> list[np.ndarray]:
    """The mean of the training labels, always."""
    mean = np.nanmean(_labels(train), axis=0)
    return [np.tile(mean, (len(session), 1)) for session in test]


def ridge(
    train: Sequence[Session], dev: Sequence[Session], test: Sequence[Session], streams: Sequence[str]
) -> list[np.ndarray]:
    """Ridge regression on one utterance; the penalty is the one with the best dev CCC, for each dimension."""
    return _best_on_dev(_ridge_fits(train, dev, test, streams, ()), dev, test)


def ridge_with_memory(
    train: Sequence[Session],
    dev: Sequence[Session],
    test: Sequence[Session],
    streams: Sequence[str],
    *,
    match: bool = True,
) -> list[np.ndarray]:
    """Ridge regression on the utterance and causal EMAs of the features.

    Penalty and coefficients are those with the best dev CCC, for each dimension.

    Args:
        train: As for every baseline.
        dev: Likewise.
        test: Likewise.
        streams: Likewise.
        match: Stretch the predictions around the mean of the training labels so that on dev they vary as much as the
            labels: least squares shrinks what it predicts, and CCC punishes that.
    """
    fits = (fit for memory in MEMORIES for fit in _ridge_fits(train, dev, test, streams, memory))
    if match:
        centre = np.nanmean(_labels(train), axis=0)
        fits = (_stretch(fit, centre, _labels(dev)) for fit in fits)
    return _best_on_dev(fits, dev, test)


def _ridge_fits(
    train: Sequence[Session],
    dev: Sequence[Session],
    test: Sequence[Session],
    streams: Sequence[str],
    memory: Sequence[float],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions of all dev and all test utterances, (U, 2) each, one pair for each penalty."""
    statistics = _statistics(np.concatenate([_side_by_side(session, streams) for session in train]))
    x, x_dev, x_test = (
        np.concatenate([_with_emas(_standardised(_side_by_side(s, streams), statistics), memory) for s in part])
        for part in (train, dev, test)
    )
    # Once more: an EMA varies less than what it smooths, and one penalty is to mean the same for all.
    statistics = _statistics(x)
    x, x_dev, x_test = (_standardised(part, statistics) for part in (x, x_dev, x_test))
    labels = _labels(train)
    # Gram matrix and right-hand side of each dimension, over the utterances that are labelled in it.
    sums = []
    for column in labels.T:
        known = ~np.isnan(column)
        mean = column[known].mean()
        sums.append((mean, x[known].T @ x[known], x[known].T @ (column[known] - mean)))
    for penalty in PENALTIES:
        found = []
        for mean, gram, moment in sums:
            weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
            found.append((x_dev @ weights + mean, x_test @ weights + mean))
        yield np.stack([on_dev for on_dev, _ in found], 1), np.stack([on_test for _, on_test in found], 1)


def _side_by_side(session: Session, streams: Sequence[str]) -> np.ndarray:
    return np.concatenate([session.streams[name] for name in streams], axis=1, dtype=np.float64)


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every feature, (D,) each; 1 where a feature is constant."""
    deviation = x.std(axis=0)
    return x.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def _standardised(x: np.ndarray, statistics: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    mean, deviation = statistics
    return np.clip((x - mean) / deviation, -CLIP, CLIP)


def _with_emas(x: np.ndarray, memory: Sequence[float]) -> np.ndarray:
    """(T, D (1 + EMAs)): the features of a session, then each causal EMA of them, from 0."""
    parts = [x]
    for alpha in memory:
        smooth = np.empty_like(x)
        value = np.zeros(x.shape[1])
        for step, row in enumerate(x):
            value = smooth[step] = alpha * value + (1 - alpha) * row
        parts.append(smooth)
    return np.concatenate(parts, axis=1)


def _stretch(
    fit: tuple[np.ndarray, np.ndarray], centre: np.ndarray, dev_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    predicted_sd, label_sd = Moments.of(fit[0], dev_labels).sd()
    stretch = label_sd / np.maximum(predicted_sd, 1e-12)
    on_dev, on_test = (centre + (predicted - centre) * stretch for predicted in fit)
    return on_dev, on_test


def _best_on_dev(
    fits: Iterator[tuple[np.ndarray, np.ndarray]], dev: Sequence[Session], test: Sequence[Session]
) -> list[np.ndarray]:
    """The test predictions whose dev predictions agree best with the labels, for each dimension, by session."""
    every = list(fits)
    agreement = np.array([ccc(on_dev, _labels(dev)) for on_dev, _ in every])
    best = np.nan_to_num(agreement, nan=-1.0).argmax(axis=0)
    predicted = np.stack([every[number][1][:, k] for k, number in enumerate(best)], axis=1)
    return np.split(predicted, np.cumsum([len(session) for session in test])[:-1])


def _labels(sessions: Sequence[Session]) -> np.ndarray:
    return np.concatenate([session.labels for session in sessions]).astype(np.float64)
