"""Worlds in which the truth is known, as feature stores: for tests, benchmarks and documentation.

A world is a table in the contract of the feature store. Each is made from its own seed and nothing else. Beside the
worlds stand the predictors that a session model is measured against. Letters: T utterances of a session, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.metrics import Moments
from vaemo.sessions import Session, assemble_sessions
from vaemo.store import part_schema

AR = np.array([0.95, 0.85])
"""How much of valence and of arousal stays from one utterance to the next."""

LABEL_SPREAD = 0.16
"""Deviation of the labels on [0, 1] before clipping, around 0.5."""


@dataclass(frozen=True, eq=False)
class World:
    """A synthetic corpus.

    Attributes:
        table: Rows of a feature store, sessions contiguous.
        mixing: W, what the features show of the latent, (D, 2).
        noise: Deviation of the features' noise.
    """

    table: pa.Table
    mixing: np.ndarray
    noise: float

    def sessions(self, split: str) -> list[Session]:
        """The sessions of one split."""
        return [session for session in assemble_sessions(self.table) if session.split == split]


def linear_world(
    seed: int,
    *,
    sessions: Sequence[int] = (400, 60, 120),
    lengths: tuple[int, int] = (20, 119),
    features: int = 40,
    noise: float = 7.0,
    unlabelled: float = 0.0,
) -> World:
    """A world whose best causal predictor is the Kalman filter.

    Valence and arousal are independent AR(1) processes x with unit variance; labels are 0.5 + 0.16 x, clipped to
    [0, 1]; features are W x + noise with W standard normal.

    Args:
        seed: Of everything.
        sessions: How many in train, dev and test.
        lengths: Least and most utterances of a session.
        features: D, all in the stream `speech`.
        noise: Deviation of the features' noise.
        unlabelled: Share of utterances without a label.
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(lengths[0], lengths[1] + 1, sum(sessions))
    mixing = random.standard_normal((features, 2))
    latent = _latent(random, sizes)
    shown = latent @ mixing.T + noise * random.standard_normal((len(latent), features))
    return World(_table(random, sizes, sessions, latent, shown, unlabelled), mixing, noise)


def regime_world(
    seed: int,
    *,
    sessions: Sequence[int] = (400, 60, 120),
    lengths: tuple[int, int] = (20, 119),
    features: int = 40,
    noise: float = 4.0,
    cue_noise: float = 2.0,
    stay: float = 0.97,
) -> World:
    """A world that no linear filter can follow.

    As `linear_world`, but a hidden regime, +1 or -1, multiplies what the second half of the features shows. The
    regime mostly stays as it is, and one further feature shows it, too noisily to be read from one utterance: it has
    to be gathered over the past, and then decides how half of the present is to be read.

    Args:
        seed: Of everything.
        sessions: How many in train, dev and test.
        lengths: Least and most utterances of a session.
        features: D, less the one that shows the regime.
        noise: Deviation of the features' noise.
        cue_noise: Deviation of the noise on the regime.
        stay: Probability that the regime stays from one utterance to the next.
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(lengths[0], lengths[1] + 1, sum(sessions))
    mixing = random.standard_normal((features, 2))
    latent = _latent(random, sizes)
    switches = random.random(len(latent)) > stay
    starts = np.cumsum(sizes) - sizes
    switches[starts] = random.random(len(sizes)) < 0.5
    parity = np.cumsum(switches)
    before = np.repeat(parity[starts] - switches[starts], sizes)
    regime = np.where((parity - before) % 2, -1.0, 1.0)
    shown = latent @ mixing.T
    shown[:, features // 2 :] *= regime[:, None]
    shown += noise * random.standard_normal(shown.shape)
    cue = regime + cue_noise * random.standard_normal(len(regime))
    table = _table(random, sizes, sessions, latent, np.column_stack([shown, cue]), 0.0)
    return World(table, mixing, noise)


def write_store(world: World, path: str, *, parts: int = 2) -> str:
    """Write a world as a feature store without `_vaemo.json`, sessions whole; returns the path."""
    session = world.table["session_id"].to_numpy()
    edges = np.flatnonzero(np.r_[True, session[1:] != session[:-1]])
    cuts = [0, *edges[np.linspace(0, len(edges), parts + 1).astype(int)[1:-1]], len(session)]
    for number in range(parts):
        name = f"part-{number:05d}.parquet"
        files.write_parquet_whole(
            files.join(path, name), world.table.slice(cuts[number], cuts[number + 1] - cuts[number])
        )
    return path


def kalman_predictions(world: World, sessions: Sequence[Session]) -> list[np.ndarray]:
    """The mean of the latent given past and present, as labels, (T, 2) per session; for `linear_world` only."""
    predictions = []
    for session in sessions:
        mean, covariance = np.zeros(2), np.eye(2)
        found = np.empty((len(session), 2))
        for step, shown in enumerate(session.streams["speech"].astype(np.float64)):
            if step:
                mean = AR * mean
                covariance = AR[:, None] * covariance * AR + np.diag(1 - AR**2)
            precision = np.linalg.inv(covariance) + world.mixing.T @ world.mixing / world.noise**2
            covariance = np.linalg.inv(precision)
            mean = mean + covariance @ world.mixing.T @ (shown - world.mixing @ mean) / world.noise**2
            found[step] = mean
        predictions.append(np.clip(0.5 + LABEL_SPREAD * found, 0, 1))
    return predictions


def ccc_avg(predictions: Sequence[np.ndarray], sessions: Sequence[Session]) -> float:
    """Pooled CCC of predictions (T, 2) per session with the labels, mean over valence and arousal."""
    labels = np.concatenate([session.labels for session in sessions])
    return float(Moments.of(np.concatenate(predictions), labels).ccc().mean())


def match_spread(predictions: Sequence[np.ndarray], sessions: Sequence[Session]) -> list[np.ndarray]:
    """The predictions stretched around their mean to the spread and mean of the labels of `sessions`.

    The mean of the latent given the features varies less than the latent; CCC punishes that, and this mends it.
    """
    labels = np.concatenate([session.labels for session in sessions])
    every = np.concatenate(predictions)
    scale = labels.std(axis=0) / every.std(axis=0)
    return [(prediction - every.mean(axis=0)) * scale + labels.mean(axis=0) for prediction in predictions]


def _latent(random: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """AR(1) processes with unit variance, one pair per session, end to end."""
    parts = []
    for size in sizes:
        shocks = random.standard_normal((size, 2)) * np.sqrt(1 - AR**2)
        shocks[0] /= np.sqrt(1 - AR**2)
        part = np.empty_like(shocks)
        value = np.zeros(2)
        for step, shock in enumerate(shocks):
            value = part[step] = AR * value + shock
        parts.append(part)
    return np.concatenate(parts)


def _table(
    random: np.random.Generator,
    sizes: np.ndarray,
    sessions: Sequence[int],
    latent: np.ndarray,
    shown: np.ndarray,
    unlabelled: float,
) -> pa.Table:
    number = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    split = np.repeat(np.array(["train", "dev", "test"], object), sessions)
    labels = np.clip(0.5 + LABEL_SPREAD * latent, 0, 1).astype(np.float32)
    missing = random.random(len(labels)) < unlabelled
    schema = part_schema({"speech": shown.shape[1]})
    columns = {
        "session_id": [f"s{n:04d}" for n in number],
        "utt_id": [f"s{n:04d}-{p:04d}" for n, p in zip(number, position, strict=True)],
        "speaker_id": [f"p{n:04d}" for n in number],
        "position": position,
        "split": split[number],
        "start_s": 5.0 * position,
        "end_s": 5.0 * position + 4.0,
        "duration_s": np.full(len(number), 4.0),
        "status": ["ok"] * len(number),
        "valence": pa.array(labels[:, 0], mask=missing),
        "arousal": pa.array(labels[:, 1], mask=missing),
        "speech": pa.FixedSizeListArray.from_arrays(pa.array(shown.astype(np.float32).ravel()), shown.shape[1]),
    }
    return pa.table(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(number), field.type)
            for field in schema
        ],
        schema=schema,
    )
