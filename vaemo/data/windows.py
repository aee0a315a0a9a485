"""Sessions as tensors, cut into the windows of a lane schedule.

Takes sessions and a schedule, yields the model's input. The utterances of all sessions lie end to end in one
tensor per stream, and a window is gathered from it by index. Letters: U utterances of all sessions, L lanes, T steps,
K targets, D features, F utterances with features, of these sessions and possibly of others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vaemo.data.lanes import LaneSchedule
from vaemo.data.sessions import Session
from vaemo.data.speakers import past_of
from vaemo.model.streams import Streams
from vaemo.tables import codes


@dataclass(frozen=True, eq=False)
class Window:
    """A chunk of some lanes.

    Attributes:
        features: (L, T, D) each; undefined beyond `lengths`.
        labels: (L, T, K), NaN where there is no label or no step.
        lengths: Steps of each lane, (L,), int64.
        fresh: Lanes in which a session begins, (L,), bool.
        index: Row of each step in the packed tensors, (L, T); 0 beyond `lengths`.
        weights: Weights of the labels in the loss, (L, T, K); None if all are equal.
    """

    features: Streams
    labels: Tensor
    lengths: Tensor
    fresh: Tensor
    index: Tensor
    weights: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """True where there is an utterance, (L, T)."""
        return torch.arange(self.labels.shape[1], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True, eq=False)
class PackedSessions:
    """Sessions end to end. A selection (`select`) shares the features of all.

    Pickled as arrays, so that processes read the same features through shared memory.

    Attributes:
        features: (F, D) each, and the requested pasts; read-only.
        places: Row of each utterance in `features`, (U,), int64.
        labels: (U, K), NaN = unlabelled.
        observed: (U, observed targets), NaN = unknown.
        speakers: Speaker of each utterance, numbered from 0, (U,), int64.
        lengths: Utterances of each session, (sessions,).
        offsets: Row at which each session begins, (sessions,).
        session_ids: One per session.
        utt_ids: (U,), objects.
        label_error: Standard errors of the labels, (U, K), NaN = unknown; None if none is known.
        weights: Weights of the labels in the loss, (U, K); None if all are equal.
    """

    features: Streams
    places: Tensor
    labels: Tensor
    observed: Tensor
    speakers: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    session_ids: list[str]
    utt_ids: np.ndarray
    label_error: Tensor | None = None
    weights: Tensor | None = None

    @staticmethod
    def of(
        sessions: Sequence[Session], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> PackedSessions:
        """Pack sessions that have the same streams."""
        lengths = np.array([len(session) for session in sessions], np.int64)
        none = np.zeros(0, object)
        blank = [np.zeros((0, 0), np.float32)] if not sessions else []

        def joined(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device, dtype)

        names = sessions[0].streams if sessions else ()
        errors = [session.label_error for session in sessions if session.label_error is not None]
        return PackedSessions(
            features=Streams.of({name: joined([session.streams[name] for session in sessions]) for name in names}),
            places=torch.arange(int(lengths.sum()), device=device),
            labels=joined(blank + [session.labels for session in sessions]),
            observed=joined(blank + [session.observed for session in sessions]),
            speakers=codes(pa.array(np.concatenate([none, *(s.speaker_ids for s in sessions)]), pa.string())),
            lengths=lengths,
            offsets=np.cumsum(lengths) - lengths,
            session_ids=[session.session_id for session in sessions],
            utt_ids=np.concatenate([none, *(session.utt_ids for session in sessions)]),
            label_error=joined(errors) if len(errors) == len(sessions) > 0 else None,
        )

    def select(self, numbers: Sequence[int] | np.ndarray) -> PackedSessions:
        """Some of the sessions, in this order; their features are shared, not copied."""
        numbers = np.asarray(numbers, np.int64)
        lengths = self.lengths[numbers]
        offsets = np.cumsum(lengths) - lengths
        index = np.repeat(self.offsets[numbers] - offsets, lengths) + np.arange(lengths.sum())
        picked = torch.from_numpy(index).to(self.places.device)
        return PackedSessions(
            features=self.features,
            places=self.places[picked],
            labels=self.labels[picked],
            observed=self.observed[picked],
            speakers=self.speakers[index],
            lengths=lengths,
            offsets=offsets,
            session_ids=[self.session_ids[number] for number in numbers],
            utt_ids=self.utt_ids[index],
            label_error=None if self.label_error is None else self.label_error[picked],
            weights=None if self.weights is None else self.weights[picked],
        )

    def with_past(self, names: Sequence[str], apart: np.ndarray | None = None) -> PackedSessions:
        """These sessions with the past of each utterance; `self` if it is already there.

        The past is computed once and kept beside the features, at their width.

        Args:
            names: Names of pasts, as in `SessionRegressor.pasts`. Absent streams are skipped.
            apart: Utterances that only update the state, (U,), bool: they have a past of their own, and neither part
                sees the other.
        """
        past = dict(self.features.past)
        for name in names:
            x = getattr(self.features, name.partition(".")[2])
            if x is None or name in past:
                continue
            vectors, places = x.cpu().numpy(), self.places.cpu().numpy()
            # Zero pages take no memory until they are written.
            found = np.zeros((len(x), x.shape[1] + 1), vectors.dtype)
            for first, length in zip(self.offsets, self.lengths, strict=True):
                own = slice(first, first + length)
                rows = places[own]
                found[rows] = past_of(name, vectors[rows], self.speakers[own], None if apart is None else apart[own])
            past[name] = torch.from_numpy(found).to(x.device)
        if len(past) == len(self.features.past):
            return self
        return replace(self, features=replace(self.features, past=past))

    @property
    def session_numbers(self) -> np.ndarray:
        """The number of each utterance's session, (U,), from 0; sequences of one session (its speakers) share it."""
        numbers = np.unique(self.session_ids, return_inverse=True)[1].astype(np.int64)
        return np.repeat(numbers, self.lengths)

    def at(self, index: Tensor) -> Streams:
        """Features at the utterances `index`, (..., D)."""
        return self.features.select(self.places[index])

    def gathered(self) -> PackedSessions:
        """A copy of these sessions with features of their own: row u is utterance u."""
        places = torch.arange(len(self.places), device=self.places.device)
        return replace(self, features=self.at(places), places=places)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PackedSessions:
        """A copy on a device and in a dtype, of only what these sessions need; `self` if it is there already."""
        if self.labels.device == torch.device(device) and self.labels.dtype == dtype:
            return self
        own = self.gathered()
        return replace(
            own,
            features=own.features.to(device, dtype),
            places=own.places.to(device),
            labels=own.labels.to(device, dtype),
            observed=own.observed.to(device, dtype),
            label_error=None if own.label_error is None else own.label_error.to(device, dtype),
            weights=None if own.weights is None else own.weights.to(device, dtype),
        )

    def windows(self, schedule: LaneSchedule, lanes: Sequence[int] | np.ndarray | None = None) -> Iterator[Window]:
        """The schedule's windows in order.

        Args:
            schedule: Of these sessions.
            lanes: Only these lanes; their windows are still as long as the schedule's longest lane needs.
        """
        picked = slice(None) if lanes is None else np.asarray(lanes)
        device = self.labels.device
        steps = schedule.steps
        for number in range(len(schedule)):
            lengths = schedule.lengths[number, picked]
            start = schedule.start[number, picked]
            first = self.offsets[schedule.session[number, picked]] + start
            step = np.arange(steps[number])
            index = np.where(step < lengths[:, None], first[:, None] + step, 0)
            row = torch.from_numpy(index).to(device)
            valid = torch.from_numpy(step < lengths[:, None]).to(device)
            yield Window(
                features=self.at(row),
                labels=torch.where(valid[..., None], self.labels[row], torch.nan),
                lengths=torch.from_numpy(lengths).to(device),
                fresh=torch.from_numpy(start == 0).to(device),
                index=row,
                weights=None if self.weights is None else self.weights[row],
            )

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of every stream over all utterances, (D,) each, summed in float64."""
        found, n = {}, len(self.places)
        blocks, zero = self.places.split(4096), torch.zeros((), dtype=torch.float64)
        for name, features in self.features.items():
            mean = sum((features[rows].double().sum(dim=0) for rows in blocks), zero) / n
            variance = sum((((features[rows].double() - mean) ** 2).sum(dim=0) for rows in blocks), zero) / n
            found[name] = (mean, variance.sqrt())
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.features.tensors().items()}
        tensors = (self.places, self.labels, self.observed)
        rest = (self.speakers, self.lengths, self.offsets, self.session_ids, self.utt_ids)
        optional = (None if tensor is None else tensor.cpu().numpy() for tensor in (self.label_error, self.weights))
        return _from_arrays, (arrays, *(tensor.cpu().numpy() for tensor in tensors), *rest, *optional)


def _from_arrays(
    features: dict[str, np.ndarray], places: np.ndarray, labels: np.ndarray, observed: np.ndarray, *rest: Any
) -> PackedSessions:
    with warnings.catch_warnings():
        # Shared memory is read-only; nothing writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        streams = Streams.of({name: torch.from_numpy(array) for name, array in features.items()})
        tensors: list[Any] = [torch.from_numpy(array) for array in (places, labels, observed)]
        *others, error, weights = rest
        optional = (None if array is None else torch.from_numpy(array) for array in (error, weights))
        return PackedSessions(streams, *tensors, *others, *optional)
