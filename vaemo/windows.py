"""Sessions as tensors, cut into the windows of a lane schedule.

Takes sessions and a schedule, gives what the model reads. The utterances of all sessions lie end to end in one
tensor per stream, and a window is gathered from it by index. Letters: U utterances of all sessions, L lanes, T steps,
D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaemo.lanes import LaneSchedule
from vaemo.model.streams import Streams
from vaemo.sessions import Session


@dataclass(frozen=True, eq=False)
class Window:
    """A chunk of some lanes.

    Attributes:
        features: (L, T, D) each; beyond `lengths` whatever.
        labels: (L, T, 2), NaN where there is no label or no step.
        lengths: Steps of each lane, (L,), int64.
        fresh: Lanes in which a session begins, (L,), bool.
        index: Row of each step in the packed tensors, (L, T); 0 beyond `lengths`.
    """

    features: Streams
    labels: Tensor
    lengths: Tensor
    fresh: Tensor
    index: Tensor

    @property
    def valid(self) -> Tensor:
        """True where there is an utterance, (L, T)."""
        return torch.arange(self.labels.shape[1], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True, eq=False)
class PackedSessions:
    """Sessions end to end.

    Attributes:
        features: (U, D) each.
        labels: (U, 2), NaN = unlabelled.
        observed: (U, 2), NaN = unknown.
        lengths: Utterances of each session, (sessions,).
        offsets: Row at which each session begins, (sessions,).
        session_ids: One per session.
        utt_ids: (U,), objects.
    """

    features: Streams
    labels: Tensor
    observed: Tensor
    lengths: np.ndarray
    offsets: np.ndarray
    session_ids: list[str]
    utt_ids: np.ndarray

    @staticmethod
    def of(
        sessions: Sequence[Session], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> PackedSessions:
        """Pack sessions that have the same streams; at least one."""
        lengths = np.array([len(session) for session in sessions], np.int64)

        def joined(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device, dtype)

        names = sessions[0].streams
        return PackedSessions(
            features=Streams(**{name: joined([session.streams[name] for session in sessions]) for name in names}),
            labels=joined([session.labels for session in sessions]),
            observed=joined([session.observed for session in sessions]),
            lengths=lengths,
            offsets=np.cumsum(lengths) - lengths,
            session_ids=[session.session_id for session in sessions],
            utt_ids=np.concatenate([session.utt_ids for session in sessions]),
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
                features=self.features.select(row),
                labels=torch.where(valid[..., None], self.labels[row], torch.nan),
                lengths=torch.from_numpy(lengths).to(device),
                fresh=torch.from_numpy(start == 0).to(device),
                index=row,
            )

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of every stream over all utterances, (D,) each, summed in float64."""
        found = {}
        for name, features in self.features.items():
            blocks = features.split(4096)
            mean = sum(block.double().sum(dim=0) for block in blocks) / len(features)
            variance = sum(((block.double() - mean) ** 2).sum(dim=0) for block in blocks) / len(features)
            found[name] = (mean, variance.sqrt())
        return found
