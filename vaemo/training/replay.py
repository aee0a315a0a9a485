"""Sessions replayed through a model, as at inference: predictions, and how the model behaves while it runs.

Letters: U utterances of all sessions, L lanes, T steps, K targets, F of them fed back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaemo.lanes import schedule_lanes
from vaemo.metrics import Moments
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams
from vaemo.training.group import Group
from vaemo.units import LabelScale
from vaemo.windows import PackedSessions, Window

LANES = 32
"""Sessions replayed side by side by one worker."""

NUDGE = 0.01
"""Share of the label range by which what is fed back is moved to measure the feedback gain: far above the rounding of
float32, far below what would bend the sigmoid."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What came out.

    Attributes:
        prediction: (U, K), float64, in the order of the packed sessions.
        state_sd: Deviation of the session state c over sessions and time, mean over its numbers; None without one.
        feedback_gain: How far each target moves per unit of its value fed back one step before,
            on average over the windows' first steps inside sessions; None where nothing is fed back, or no session
            is longer than a window.
    """

    prediction: np.ndarray
    state_sd: float | None
    feedback_gain: tuple[float | None, ...]

    def moments(self, labels: Tensor) -> Moments:
        """Moments of predictions and labels (U, K), by target."""
        return Moments.of(self.prediction, labels.double().cpu().numpy())


@torch.no_grad()
def replay(
    model: SessionRegressor,
    sessions: PackedSessions,
    *,
    window: int,
    observed: Tensor | None = None,
    group: Group | None = None,
) -> Replay:
    """Predict every utterance from a fresh state, feeding back predictions, or what is observed.

    The sessions are spread over the workers; every worker gets the whole result.

    Args:
        model: Predicts without dropout.
        sessions: At least one.
        window: Steps of one chunk; decides only the cost, and where the gain is measured.
        observed: Values that are known, (U, F), NaN = unknown; None knows nothing.
        group: The workers.
    """
    group = group or Group()
    sessions = sessions.with_past(model.pasts)
    mine = np.arange(group.rank, len(sessions.lengths), group.size)
    prediction = torch.zeros(
        len(sessions.labels), len(model.targets), dtype=torch.float64, device=sessions.labels.device
    )
    spread = torch.zeros(3, max(model.fresh_state(1).c.shape[1], 1), dtype=torch.float64, device=prediction.device)
    gain = torch.zeros(2, model.n_fed, dtype=torch.float64, device=prediction.device)
    if len(mine):
        picked = dataclasses.replace(
            sessions,
            lengths=sessions.lengths[mine],
            offsets=sessions.offsets[mine],
            session_ids=[sessions.session_ids[number] for number in mine],
        )
        schedule = schedule_lanes(picked.lengths, min(LANES, len(mine)), window)
        state = model.fresh_state(schedule.session.shape[1])
        for part in picked.windows(schedule):
            before = state.reset(part.fresh)
            known = None if observed is None else torch.where(part.valid[..., None], observed[part.index], torch.nan)
            out, state = model(part.features, before, part.lengths, observed=known)
            prediction[part.index[part.valid]] = out[part.valid].double()
            c = state.c[part.lengths > 0].double()
            spread[:, : c.shape[1]] += torch.stack([torch.full_like(c[0], len(c)), c.sum(dim=0), (c * c).sum(dim=0)])
            if model.feeds_predictions and observed is None:
                gain += _gain(model, part, before, out[:, 0])
    group.add(prediction)
    n, total, squares = group.add(spread).cpu().numpy()
    moved, count = group.add(gain).tolist()
    return Replay(
        prediction=prediction.cpu().numpy(),
        state_sd=float(np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0)).mean()) if n[0] else None,
        feedback_gain=tuple(m / k if k else None for m, k in zip(moved, count, strict=True)),
    )


def _gain(model: SessionRegressor, part: Window, before: SessionState, first: Tensor) -> Tensor:
    """Summed movement of the window's first predictions per unit of feedback, and how many were summed, (2, F)."""
    inside = ~part.fresh & (part.lengths > 0)
    nudge = NUDGE * LabelScale(*model.config.label_range).width
    found = torch.zeros(2, model.n_fed, dtype=torch.float64, device=first.device)
    if inside.any():
        features: Streams = part.features.select(inside).step(0)
        for dimension in range(model.n_fed):
            state = before.select(inside)
            feedback = state.last_feedback.clone()
            feedback[:, dimension] += nudge
            moved, _ = model.step(features, dataclasses.replace(state, last_feedback=feedback))
            change = (moved - first[inside])[:, dimension].double() / nudge
            found[:, dimension] = torch.stack([change.sum(), change.new_tensor(len(change))])
    return found
