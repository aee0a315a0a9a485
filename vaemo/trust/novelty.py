"""How unusual an utterance's features are, compared with those that a model was trained on.

`novelty.safetensors` of a checkpoint describes the training features of each stream by a mean and a covariance, of low
rank where the stream is wide, and what utterances say of their sound (bandwidth, level, noise) by middle and spread. A
*view* is one number of an utterance that such a description gives: how far it lies along the directions that training
has, how far outside of them, how far its bandwidth is from the usual one. Each view is judged on both sides against the
training data, the most unusual one counts, and `novelty` is the share of calibration utterances that are less unusual,
every group of linked sessions counting the same. For a call it is that of the mean over its utterances, among
calibration calls. What is more unusual than all of them lies between 0.999 and 1, in its order.

Letters: U utterances, D features, R directions.

Sources:
    Lee et al. (2018), A simple unified framework for detecting out-of-distribution samples (Mahalanobis distance).
    Tipping and Bishop (1999), Probabilistic principal component analysis. Vovk et al. (2005), conformal p-values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vaemo import files
from vaemo.errors import ReadCheckpointError
from vaemo.parts.shards import digest
from vaemo.tables import joined
from vaemo.trust.rows import calls_of, floats, groups_of, mean_of
from vaemo.units import STREAMS

NOVELTY = "novelty.safetensors"

BEYOND = 0.95
"""A call or an utterance with more novelty is called unusual: of what fits, 1 in 20 is."""

SOUNDS = ("bandwidth_hz", "level_db", "snr_db")
"""Columns of a store with acoustic measures of an utterance."""

_MOST_ROWS = 50_000
_FULL = 128
"""Widest stream whose covariance is kept whole, a tenth of it replaced by that of features without correlations."""
_MOST_DIRECTIONS, _EXPLAINED, _SHRINKAGE = 32, 0.9, 0.1
_BLOCK = 256
"""Utterances whose features are compared at once: what a processor's cache holds."""

_TAIL = 0.001
_LEVELS = np.linspace(0, 1, 1001)


@dataclass(frozen=True, eq=False)
class Stream:
    """The training features of one stream, every feature divided by its deviation.

    Attributes:
        mean: (D,) of the features as they are.
        deviation: (D,) likewise.
        directions: (D, R), orthonormal; R is D where the covariance is whole.
        variance: (R,) along each, and last the mean along all others.
    """

    mean: np.ndarray
    deviation: np.ndarray
    directions: np.ndarray
    variance: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Stream:
        """Describe features, (U, D)."""
        features = features.astype(np.float64)
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        # A feature that is constant in training is informative only where it varies later.
        deviation = np.maximum(deviation, max(1e-3 * float(deviation.mean()), 1e-9))
        covariance = np.cov((features - mean) / deviation, rowvar=False).reshape(len(mean), len(mean))
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = np.maximum(values[::-1], 1e-6), vectors[:, ::-1]
        if len(mean) <= _FULL:
            return Stream(mean, deviation, vectors, np.append((1 - _SHRINKAGE) * values + _SHRINKAGE, 1.0))
        enough = int(np.searchsorted(np.cumsum(values), _EXPLAINED * values.sum())) + 1
        rank = max(1, min(enough, _MOST_DIRECTIONS, len(mean) - 1))
        rest = values[rank:].mean() if rank < len(mean) else 1.0
        return Stream(mean, deviation, np.ascontiguousarray(vectors[:, :rank]), np.append(values[:rank], rest))

    @functools.cached_property
    def _single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """In single precision: mean, 1 / deviation, directions, and what squares along these are weighed and summed by.

        An archive has hundreds of numbers in each of many millions of utterances.
        """
        rank = self.directions.shape[1]
        weights = np.stack([1 / (self.variance[:-1] * rank), np.ones(rank)], axis=1)
        found = (self.mean, 1 / self.deviation, self.directions, weights)
        single, scale, directions, precision = (np.ascontiguousarray(each, np.float32) for each in found)
        return single, scale, directions, precision

    @property
    def n_views(self) -> int:
        """How many `views` gives."""
        return 1 if self.directions.shape[0] == self.directions.shape[1] else 2

    def views(self, features: np.ndarray) -> list[np.ndarray]:
        """Logarithms of the mean squared distance along the directions, and along all others if any, (U,) each."""
        middle, scale, directions, precision = self._single
        found = np.empty((len(features), 2))
        total = np.empty(len(features))
        for first in range(0, len(features), _BLOCK):
            block = slice(first, first + _BLOCK)
            centred = features[block] - middle
            centred *= scale
            squares = centred @ directions
            squares *= squares
            found[block] = squares @ precision
            if self.n_views == 2:
                total[block] = np.einsum("ud,ud->u", centred, centred)
        along = np.log(found[:, 0] + 1e-6)
        if self.n_views == 1:
            return [along]
        n_others = len(self.mean) - directions.shape[1]
        left = np.maximum(total - found[:, 1], 0)
        return [along, np.log(left / (n_others * self.variance[-1]) + 1e-6)]


@dataclass(frozen=True, eq=False)
class Novelty:
    """What `novelty.safetensors` holds.

    Attributes:
        streams: By name.
        sounds: Columns that the training data had, of `SOUNDS`.
        middles: Of each view, in the order of streams, then sounds: median over the training data.
        spreads: Of each view: distance from the median to the 16th and to the 84th percentile, (views, 2).
        utterances: (1001,) how unusual calibration utterances are, at the shares 0, 0.001, ..., 1; empty before
            `referred`.
        calls: (1001,) likewise, of the means of calls.
        n_groups: Groups among the calibration sessions.
        from_dev: Whether they are those of dev, since there is no split calib.
    """

    streams: Mapping[str, Stream]
    sounds: tuple[str, ...]
    middles: np.ndarray
    spreads: np.ndarray
    utterances: np.ndarray
    calls: np.ndarray
    n_groups: int = 0
    from_dev: bool = False

    @staticmethod
    def of(features: Mapping[str, np.ndarray], sounds: Mapping[str, np.ndarray]) -> Novelty:
        """Describe training data, (U, D) by stream, and acoustic measures, (U,), NaN = unknown."""
        n = len(next(iter(features.values())))
        picked = np.linspace(0, n - 1, min(n, _MOST_ROWS)).astype(int)
        streams = {name: Stream.of(features[name][picked]) for name in STREAMS if name in features}
        known = tuple(name for name in SOUNDS if name in sounds and np.isfinite(sounds[name]).any())
        nothing = np.zeros(0)
        fit = Novelty(streams, known, nothing, nothing, nothing, nothing)
        views = fit._views({name: features[name][picked] for name in streams}, {k: sounds[k][picked] for k in known})
        low, middles, high = np.nanpercentile(views, [16, 50, 84], axis=1)
        # A band that all training data have: another one is unusual, a rounding of it is not.
        least = np.r_[
            np.full(len(views) - len(known), 1e-3),
            [0.02 * abs(middles[len(views) - len(known) + k]) + 1e-3 for k in range(len(known))],
        ]
        spreads = np.maximum(np.stack([middles - low, high - middles], axis=1), least[:, None])
        return dataclasses.replace(fit, middles=middles, spreads=spreads)

    def referred(self, unusual: np.ndarray, table: pa.Table, from_dev: bool) -> Novelty:
        """With what is unusual among calibration utterances as the measure.

        Args:
            unusual: (U,) of the utterances, as `unusual` gives it.
            table: Of them: `session_id`, `speaker_id`, `role`.
            from_dev: As in the class.
        """
        group = groups_of(table)
        fit = dataclasses.replace(self, utterances=_shares(unusual, group))
        call = calls_of(table)
        means = mean_of(call, fit._share(fit.utterances, unusual), np.full(len(call), np.nan))
        of_call = group[np.unique(call, return_index=True)[1]]
        n_groups = len(np.unique(group[np.isfinite(unusual)]))
        return dataclasses.replace(fit, calls=_shares(means, of_call), n_groups=n_groups, from_dev=from_dev)

    def unusual(
        self, features: Mapping[str, np.ndarray], sounds: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many deviations the most unusual view of each utterance is off, (U,), and the view's number, (U,)."""
        views = self._views(features, sounds) - self.middles[:, None]
        off = np.maximum(views / self.spreads[:, 1:], views / -self.spreads[:, :1])
        off[np.isnan(off)] = -1.0
        which = off.argmax(axis=0)
        return off[which, np.arange(len(which))], which

    def novelty(self, unusual: np.ndarray) -> np.ndarray:
        """The share of calibration utterances that are less unusual, (U,); NaN stays."""
        return self._share(self.utterances, unusual)

    def of_calls(self, means: np.ndarray) -> np.ndarray:
        """The share of calibration calls whose mean novelty is less, (C,); NaN stays."""
        return self._share(self.calls, means)

    @property
    def names(self) -> list[str]:
        """Of the views: the stream, or the column of the store."""
        return [*(name for name, stream in self.streams.items() for _ in range(stream.n_views)), *self.sounds]

    @property
    def expected(self) -> float:
        """Share of calls beyond `BEYOND` where the data fit."""
        return max(1 - BEYOND, 1 / (self.n_groups + 1))

    def _views(self, features: Mapping[str, np.ndarray], sounds: Mapping[str, np.ndarray]) -> np.ndarray:
        """(views, U), NaN where a sound is not known."""
        found = [view for name, stream in self.streams.items() for view in stream.views(features[name])]
        n = len(found[0])
        return np.stack([*found, *(sounds.get(name, np.full(n, np.nan)) for name in self.sounds)])

    @staticmethod
    def _share(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
        if not len(reference):
            return np.full(len(values), np.nan)
        below = np.minimum(np.searchsorted(reference, values, side="left") / (len(reference) - 1), 1.0)
        most = reference[-1]
        beyond = np.maximum(values - most, 0) / max(most - reference[len(reference) // 2], 1e-12)
        share = np.where(values > most, 1 - _TAIL * np.exp(-beyond), (1 - _TAIL) * below)
        return np.where(np.isfinite(values), share, np.nan)

    @property
    def digest(self) -> str:
        """Of everything that it says."""
        return digest(self.to_bytes().hex())

    def to_bytes(self) -> bytes:
        """As the file holds it."""
        tensors = {
            f"stream.{name}.{field}": np.ascontiguousarray(getattr(stream, field), np.float32)
            for name, stream in self.streams.items()
            for field in ("mean", "deviation", "directions", "variance")
        }
        offset = len(self.names) - len(self.sounds)
        tensors |= {
            f"sound.{name}": np.r_[self.middles[offset + k], self.spreads[offset + k]]
            for k, name in enumerate(self.sounds)
        }
        tensors |= {"middles": self.middles[:offset].copy(), "spreads": self.spreads[:offset].copy()}
        tensors |= {"utterances": self.utterances, "calls": self.calls}
        return save({**tensors, "reference": np.array([self.n_groups, self.from_dev], np.int64)})

    def write(self, checkpoint: str) -> None:
        """Put it into a checkpoint's folder, in place of another."""
        files.write_whole(files.join(checkpoint, NOVELTY), self.to_bytes())

    @staticmethod
    def read(checkpoint: str) -> Novelty | None:
        """That of a checkpoint; None where it has none.

        Raises:
            ReadCheckpointError: if the file is damaged.
        """
        path = files.join(checkpoint, NOVELTY)
        if not files.exists(path):
            return None
        try:
            return Novelty.of_bytes(files.read_bytes(path))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ReadCheckpointError(
                f"'{path}' is damaged ({error.__class__.__name__}: {error}). Remove it: scores then have no novelty."
            ) from None

    @staticmethod
    def of_bytes(content: bytes) -> Novelty:
        """What `to_bytes` gave."""
        held = load(content)
        named = [name for name in STREAMS if f"stream.{name}.mean" in held]
        streams = {
            name: Stream(*(held[f"stream.{name}.{field}"] for field in ("mean", "deviation", "directions", "variance")))
            for name in named
        }
        sounds = tuple(name for name in SOUNDS if f"sound.{name}" in held)
        ends = [held[f"sound.{name}"] for name in sounds]
        middles = np.r_[held["middles"], [end[0] for end in ends]]
        spreads = np.concatenate([held["spreads"], *(end[None, 1:] for end in ends)])
        n_groups, from_dev = held["reference"].tolist()
        return Novelty(streams, sounds, middles, spreads, held["utterances"], held["calls"], n_groups, bool(from_dev))


def _shares(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(1001,) the values below which shares 0, 0.001, ..., 1 lie, each group counting the same."""
    known = np.isfinite(values)
    values, group = values[known], group[known]
    if not len(values):
        return np.zeros(0)
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum((1.0 / (len(counts) * counts[number]))[order])
    return values[order][np.minimum(np.searchsorted(reached, _LEVELS - 1e-9), len(values) - 1)]


def features_of(table: pa.Table, streams: Sequence[str]) -> dict[str, np.ndarray]:
    """Streams of the rows of a store, (U, D) float32 each; every row must have them."""
    found = {}
    for name in streams:
        column = joined(table[name])
        values = column.flatten().to_numpy(zero_copy_only=False)
        found[name] = values.reshape(len(column), -1).astype(np.float32, copy=False)
    return found


def sounds_of(table: pa.Table) -> dict[str, np.ndarray]:
    """What the rows of a store say of their sound, (U,) each."""
    return {name: floats(table, name) for name in SOUNDS if name in table.column_names}
