"""Sessions as tensors, cut into the windows of a lane schedule.

Takes sessions and a schedule, gives what the model reads. The utterances of all sessions lie end to end in one
tensor per stream, and a window is gathered from it by index. Letters: U utterances of all sessions, L lanes, T steps,
K targets, D features, F utterances whose features lie there, of these sessions and perhaps of others.
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
        features: (L, T, D) each; beyond `lengths` whatever.
        labels: (L, T, K), NaN where there is no label or no step.
        lengths: Steps of each lane, (L,), int64.
        fresh: Lanes in which a session begins, (L,), bool.
        index: Row of each step in the packed tensors, (L, T); 0 beyond `lengths`.
        weights: Of the labels in the loss, (L, T, K); None where all are alike.
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
    """Sessions end to end. Some of them (`select`) share the features of all.

    Pickled as arrays, so that processes which are handed them through shared memory read the same features there.

    Attributes:
        features: (F, D) each, and the pasts that were asked for; never written to.
        places: Row of `features` in which each utterance's stand, (U,), int64.
        labels: (U, K), NaN = unlabelled.
        observed: (U, targets that are observed), NaN = unknown.
        speakers: Who speaks, as numbers from 0, (U,), int64.
        lengths: Utterances of each session, (sessions,).
        offsets: Row at which each session begins, (sessions,).
        session_ids: One per session.
        utt_ids: (U,), objects.
        label_error: Standard errors of the labels, (U, K), NaN = unknown; None where nothing is known of any.
        weights: Of the labels in the loss, (U, K); None where all are alike.
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
        """Some of the sessions, in this order, on the features of all; nothing of those is copied."""
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
        """These sessions with what was heard before each utterance; themselves where all of it is there.

        It is made once and kept beside the features, as wide as they are: what lies there already is not made again.

        Args:
            names: Whose past of which stream, as `SessionRegressor.pasts` has it. Streams that are not there are
                left out.
            apart: Utterances that only move the state, (U,), bool: the past of the others does not know them, and
                theirs knows only them.
        """
        past = dict(self.features.past)
        for name in names:
            x = getattr(self.features, name.partition(".")[2])
            if x is None or name in past:
                continue
            vectors, places = x.cpu().numpy(), self.places.cpu().numpy()
            # Zeros take no memory where nothing is written.
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
        """Features of utterances, by their numbers among these sessions': those of `index`, and D."""
        return self.features.select(self.places[index])

    def gathered(self) -> PackedSessions:
        """These sessions on features of their own, copied: row u is that of utterance u."""
        places = torch.arange(len(self.places), device=self.places.device)
        return replace(self, features=self.at(places), places=places)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PackedSessions:
        """On a device and in a dtype: a copy of what these sessions need, or themselves where they are so already."""
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
        """The schedule's windows, one after the other.

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
        # Shared memory is read-only, and nothing is written to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        streams = Streams.of({name: torch.from_numpy(array) for name, array in features.items()})
        tensors: list[Any] = [torch.from_numpy(array) for array in (places, labels, observed)]
        *others, error, weights = rest
        optional = (None if array is None else torch.from_numpy(array) for array in (error, weights))
        return PackedSessions(streams, *tensors, *others, *optional)
