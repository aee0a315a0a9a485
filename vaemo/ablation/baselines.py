"""Baselines of a session model: the mean, ridge regression, and ridge regression with a memory.

Each learns from training sessions, chooses on dev sessions, and predicts test sessions. Their input is that of the
model's z: the streams that it uses, standardised and clipped in the same way. A training prints the results of both
kinds of ridge regression at its start (`rivals`). Letters: T utterances of a session, U of all of them, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vaemo.data.windows import PackedSessions
from vaemo.metrics import Moments, ccc
from vaemo.model.standardize import CLIP
from vaemo.units import DIMENSIONS

PENALTIES = (1.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
"""Penalties of the squared weights, for standardised features and the sum of squared errors."""

MEMORIES = ((0.5, 0.8), (0.7,), (0.8,), (0.9,), (0.95,))
"""Coefficients of the causal EMAs that are appended to the features."""

RIVAL_MEMORIES = ((0.8,), (0.9,), (0.95,))
"""As `MEMORIES`, for `rivals`."""

RIVAL_UTTERANCES, RIVAL_NUMBERS = 20_000, 6_000_000
"""The most utterances of a split, and the most features, that `rivals` uses: some seconds of computing."""

_BLOCK = 1024
"""Utterances whose deviations are squared at a time."""

RIVAL_LABELS = 30
"""With fewer labels in a dimension, in train or dev, `rivals` returns nothing."""


class Heard(Protocol):
    """A baseline's view of a session; `vaemo.data.sessions.Session` satisfies it."""

    @property
    def streams(self) -> Mapping[str, np.ndarray]:
        """Features by stream, (T, D)."""

    @property
    def labels(self) -> np.ndarray:
        """(T, K), NaN = unlabelled."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Given:
    """What a baseline is given.

    Attributes:
        train: Sessions to learn from.
        dev: Sessions to choose on.
        test: Sessions to predict.
        streams: Features to take.
    """

    train: Sequence[Heard]
    dev: Sequence[Heard]
    test: Sequence[Heard]
    streams: Sequence[str]


Baseline = Callable[[Given], list[np.ndarray]]
"""Predictions (T, K) for every test session."""


def mean_of_labels(given: Given) -> list[np.ndarray]:
    """The mean of the training labels, always."""
    mean = np.nanmean(_labels(given.train), axis=0)
    return [np.tile(mean, (len(session), 1)) for session in given.test]


def ridge(given: Given) -> list[np.ndarray]:
    """Ridge regression on one utterance; the penalty is the one with the best dev CCC, for each dimension."""
    return ridge_with_memory(given, match=False, memories=((),))


def ridge_with_memory(
    given: Given, *, match: bool = True, memories: Sequence[Sequence[float]] | None = None
) -> list[np.ndarray]:
    """Ridge regression on the utterance and causal EMAs of the features.

    Penalty and coefficients are those with the best dev CCC, for each dimension.

    Args:
        given: As for every baseline.
        match: Stretch the predictions around the mean of the training labels so that on dev they vary as much as the
            labels: least squares shrinks what it predicts, and CCC punishes that.
        memories: Sets of coefficients to choose from; None is `MEMORIES`.
    """
    memories = MEMORIES if memories is None else memories
    fits = (fit for memory in memories for fit in _ridge_fits(given, memory))
    dev_labels = _labels(given.dev)
    if match:
        centre = np.nanmean(_labels(given.train), axis=0)
        fits = (_stretch(fit, centre, dev_labels) for fit in fits)
    predicted = _best_on_dev(list(fits), dev_labels)
    return np.split(predicted, np.cumsum([len(session) for session in given.test])[:-1])


def rivals(
    train: PackedSessions, dev: PackedSessions, streams: Sequence[str], targets: Sequence[str] = DIMENSIONS
) -> dict[str, dict[str, float]] | None:
    """Dev results of the two cheapest predictors, which a trained model should exceed.

    Both are ridge regression, spread matched, by its closed form: `ridge` on the features of the utterance, and
    `ridge_ema` on these and a causal EMA of them. Penalty, coefficient and spread are those that do best on dev,
    which favours both a little. Large splits are represented by whole sessions, drawn evenly.

    Args:
        train: Sessions to learn from.
        dev: Sessions to predict.
        streams: The streams that the model uses.
        targets: Their names.

    Returns:
        For each of the two `dev_ccc_NAME` of every target and `dev_ccc_avg`; None where train or dev has fewer than
        `RIVAL_LABELS` labels in a dimension.
    """
    learnt, judged = some_sessions(train, streams), some_sessions(dev, streams)
    if any((~np.isnan(_labels(part))).sum(axis=0).min() < RIVAL_LABELS for part in (learnt, judged) if part):
        return None
    if not learnt or not judged:
        return None
    found = {}
    for name, memories in (("ridge", ((),)), ("ridge_ema", RIVAL_MEMORIES)):
        predicted = ridge_with_memory(Given(learnt, judged, judged, streams), memories=memories)
        agreement = ccc(np.concatenate(predicted), _labels(judged))
        values = np.nan_to_num([*agreement, agreement.mean()])
        found[name] = {f"dev_ccc_{key}": float(value) for key, value in zip((*targets, "avg"), values, strict=True)}
    return found


@dataclass(frozen=True, eq=False)
class _Sequence:
    streams: Mapping[str, np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def some_sessions(packed: PackedSessions, streams: Sequence[str]) -> list[_Sequence]:
    """Sessions of a split, as many as `rivals` may look at, always the same ones; one at least."""
    width = sum(features.shape[-1] for name, features in packed.features.items() if name in streams)
    most = min(RIVAL_UTTERANCES, RIVAL_NUMBERS // max(width, 1))
    order = np.random.default_rng(0).permutation(len(packed.lengths))
    fit = np.cumsum(packed.lengths[order]) <= most
    numbers = np.sort(order[fit]) if fit.any() else order[:1]
    chosen = packed.select(numbers).gathered()
    ends = np.cumsum(chosen.lengths)[:-1]
    labels = np.split(chosen.labels.cpu().numpy(), ends)
    features = {name: np.split(x.cpu().numpy(), ends) for name, x in chosen.features.items() if name in streams}
    return [
        _Sequence({name: parts[number] for name, parts in features.items()}, each)
        for number, each in enumerate(labels)
        if len(each)
    ]


def _ridge_fits(given: Given, memory: Sequence[float]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions of all dev and all test utterances, (U, K) each, one pair for each penalty."""
    x = _in_rows(given.train, given.streams, 1 + len(memory))
    first = _statistics(x[:, : x.shape[1] // (1 + len(memory))])
    _add_emas(x, given.train, first, memory)
    # Standardised again: an EMA varies less than its input, and one penalty must mean the same for all.
    again = _statistics(x)
    _standardise(x, again)
    sums = _sums(x, _labels(given.train))
    del x

    def seen(sessions: Sequence[Heard]) -> np.ndarray:
        rows = _in_rows(sessions, given.streams, 1 + len(memory))
        _add_emas(rows, sessions, first, memory)
        _standardise(rows, again)
        return rows

    x_dev = seen(given.dev)
    x_test = x_dev if given.test is given.dev else seen(given.test)
    for penalty in PENALTIES:
        found = []
        for mean, gram, moment in sums:
            penalised = gram.copy()
            penalised.flat[:: len(gram) + 1] += penalty
            weights = np.linalg.solve(penalised, moment)
            found.append((x_dev @ weights + mean, x_test @ weights + mean))
        yield np.stack([on_dev for on_dev, _ in found], 1), np.stack([on_test for _, on_test in found], 1)


def _sums(x: np.ndarray, labels: np.ndarray) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Mean, Gram matrix and right-hand side of each dimension, over the utterances that are labelled in it."""
    sums: list[tuple[float, np.ndarray, np.ndarray]] = []
    before = None
    for column in labels.T:
        known = ~np.isnan(column)
        mean = column[known].mean()
        is_same = before is not None and (known == before).all()
        gram, moment = sums[-1][1] if is_same else np.zeros((x.shape[1], x.shape[1])), np.zeros(x.shape[1])
        for first in range(0, len(x), _BLOCK):
            block = slice(first, first + _BLOCK)
            heard = x[block][known[block]].astype(np.float64)
            moment += heard.T @ (column[block][known[block]] - mean)
            if not is_same:
                gram += heard.T @ heard
        sums.append((mean, gram, moment))
        before = known
    return sums


def _in_rows(sessions: Sequence[Heard], streams: Sequence[str], times: int) -> np.ndarray:
    """Features of all utterances in the first D columns of (U, D times), float32; the others are still to be filled."""
    width = sum(sessions[0].streams[name].shape[1] for name in streams)
    x, row = np.empty((sum(map(len, sessions)), width * times), np.float32), 0
    for session in sessions:
        column = 0
        for name in streams:
            found = session.streams[name]
            x[row : row + len(found), column : column + found.shape[1]] = found
            column += found.shape[1]
        row += len(session)
    return x


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every feature, (D,) each; 1 where a feature is constant."""
    mean, squares = x.mean(axis=0, dtype=np.float64), np.zeros(x.shape[1])
    for first in range(0, len(x), _BLOCK):
        squares += np.square(x[first : first + _BLOCK] - mean).sum(axis=0)
    deviation = np.sqrt(squares / len(x))
    return mean, np.where(deviation > 0, deviation, 1.0)


def _standardise(x: np.ndarray, statistics: tuple[np.ndarray, np.ndarray]) -> None:
    """In place: this is done in a worker, beside what it learns from."""
    mean, deviation = statistics
    x -= mean
    x /= deviation
    np.clip(x, -CLIP, CLIP, out=x)


def _add_emas(
    x: np.ndarray, sessions: Sequence[Heard], statistics: tuple[np.ndarray, np.ndarray], memory: Sequence[float]
) -> None:
    """Standardise the features of (U, D (1 + EMAs)), and put each causal EMA of a session, from 0, behind them."""
    width, row = len(statistics[0]), 0
    _standardise(x[:, :width], statistics)
    for session in sessions:
        for number, alpha in enumerate(memory, start=1):
            value = np.zeros(width)
            for step in range(row, row + len(session)):
                value = alpha * value + (1 - alpha) * x[step, :width]
                x[step, number * width : (number + 1) * width] = value
        row += len(session)


def _stretch(
    fit: tuple[np.ndarray, np.ndarray], centre: np.ndarray, dev_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    predicted_sd, label_sd = Moments.of(fit[0], dev_labels).sd()
    stretch = label_sd / np.maximum(predicted_sd, 1e-12)
    on_dev, on_test = (centre + (predicted - centre) * stretch for predicted in fit)
    return on_dev, on_test


def _best_on_dev(fits: Sequence[tuple[np.ndarray, np.ndarray]], dev_labels: np.ndarray) -> np.ndarray:
    """The test predictions whose dev predictions agree best with the labels, for each dimension, (U, K)."""
    agreement = np.array([ccc(on_dev, dev_labels) for on_dev, _ in fits])
    best = np.nan_to_num(agreement, nan=-1.0).argmax(axis=0)
    return np.stack([fits[number][1][:, k] for k, number in enumerate(best)], axis=1)


def _labels(sessions: Sequence[Heard]) -> np.ndarray:
    return np.concatenate([session.labels for session in sessions]).astype(np.float64)
