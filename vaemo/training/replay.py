"""Replay of sessions through a model, as at inference: predictions, and statistics of the model's behaviour.

Scores, results on the dev split, held-out rows and label-fed evaluations are all made by `predict_sessions`.
Letters: U utterances of all sessions, L lanes, T steps, K targets, F of them fed back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaemo.data.windows import PackedSessions
from vaemo.metrics import Moments
from vaemo.model.film import FilmDelta
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams
from vaemo.training.group import Group
from vaemo.units import LabelScale

BLOCK_SESSIONS = 1024
"""Sessions whose states are held at once; bounds memory, not results."""

LANES = 32
"""Sessions replayed side by side by one worker."""

NUDGE = 0.01
"""Share of the label range by which what is fed back is moved to measure the feedback gain: far above the rounding of
float32, far below the curvature of the sigmoid."""


@dataclass(frozen=True, eq=False)
class ReplayedChunk:
    """Steps of some sessions that a model has taken at once.

    Attributes:
        features: (L, T, D) each; only lanes in use.
        start: Steps of the session before these, (L,), int64.
        before: State before the steps.
        after: State after them.
        prediction: (L, T, 2).
    """

    features: Streams
    start: Tensor
    before: SessionState
    after: SessionState
    prediction: Tensor


@dataclass(frozen=True, eq=False)
class Replayed:
    """The result of a replay.

    Attributes:
        prediction: (U, K), float64, in the order of the packed sessions.
        state_sd: Deviation of the session state c over sessions and time, mean over its numbers; None without one.
        feedback_gain: How far each target moves per unit of its value fed back one step before, on average over every
            `window`-th step of the sessions; None where nothing is fed back, or no session is longer than a window.
    """

    prediction: np.ndarray
    state_sd: float | None
    feedback_gain: tuple[float | None, ...]

    def moments(self, labels: Tensor) -> Moments:
        """Moments of predictions and labels (U, K), by target."""
        return Moments.of(self.prediction, labels.double().cpu().numpy())


@torch.inference_mode()
def predict_sessions(
    model: SessionRegressor,
    sessions: PackedSessions,
    *,
    lanes: int,
    chunk: int,
    film_delta: FilmDelta | None = None,
    observed: Tensor | None = None,
    padded: bool = False,
    watch: Callable[[ReplayedChunk], None] | None = None,
) -> Tensor:
    """Predict every utterance of every session from a fresh state, feeding back predictions or what is observed.

    A session runs in chunks of `chunk` steps while that many are left, then in one of half the size, and so on down to
    1. So no step is padding, and the shape of every call depends on the session alone: with a fixed number of lanes,
    the other lanes do not change its predictions by a single bit.

    Args:
        model: As loaded; predicts without dropout.
        sessions: On the model's device and in its dtype.
        lanes: Sessions side by side, L; lanes without a session are idle (`lengths` 0).
        chunk: Most steps of one call.
        film_delta: What speakers add to FiLM's parameters, by utterance (U,).
        observed: Values that are known, (U, K), NaN = unknown; None takes those of the sessions.
        padded: Pad a session's last chunk instead of cutting it: fewer calls, for predictions whose last bits may
            depend on the other lanes.
        watch: Called with every chunk.

    Returns:
        Predictions on the model's label range, (U, K), float64, on the model's device, in the order of the packed
        utterances; 0 for utterances of no session among them.
    """
    observed = sessions.observed if observed is None else observed
    device = sessions.observed.device
    sessions = sessions.with_past(model.pasts)
    predictions = torch.zeros(len(sessions.labels), len(model.targets), dtype=torch.float64, device=device)
    for first in range(0, len(sessions.lengths), BLOCK_SESSIONS):
        block = slice(first, first + BLOCK_SESSIONS)
        left, row = sessions.lengths[block].copy(), sessions.offsets[block].copy()
        memory = model.fresh_state(len(left))
        steps = chunk
        while steps:
            for picked in calls_of(-(-left // steps) if padded else left // steps, lanes):
                n, taken = len(picked), np.minimum(left[picked], steps)
                lane, lengths, rows = _lanes_of(picked, taken, left, row, 0 if padded else lanes - n)
                index = torch.from_numpy(rows).to(device)
                features, before = sessions.at(index), memory.select(torch.from_numpy(lane))
                prediction, state = model(
                    features,
                    before,
                    torch.from_numpy(lengths),
                    observed=observed[index],
                    film_delta=film_delta and FilmDelta(film_delta.parameters, film_delta.speaker[index]),
                )
                valid = torch.from_numpy(np.arange(taken.max()) < taken[:, None])
                predictions[index[:n][valid]] = prediction[:n][valid].double()
                if watch:
                    used = slice(n)
                    start = torch.from_numpy(row[picked] - sessions.offsets[block][picked]).to(device)
                    states = before.select(used), state.select(used)
                    watch(ReplayedChunk(features.select(used), start, *states, prediction[:n]))
                left[picked] -= taken
                row[picked] += taken
                _remember(memory, picked, state, left)
            steps = 0 if padded else steps // 2
    return predictions


def calls_of(n_chunks: np.ndarray, lanes: int) -> Iterator[np.ndarray]:
    """Which sessions each call takes, so that session i is taken `n_chunks[i]` times, never twice by one call.

    McNaughton's wrap-around rule: the fewest calls that there can be.
    """
    items = np.repeat(np.arange(len(n_chunks)), n_chunks)
    n_calls = max(int(n_chunks.max(initial=0)), -(-len(items) // lanes))
    for call in range(n_calls):
        yield items[call::n_calls]


def _lanes_of(
    picked: np.ndarray, taken: np.ndarray, left: np.ndarray, row: np.ndarray, n_idle: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sessions of a call laid into lanes.

    Args:
        picked: The sessions, (n,).
        taken: How many steps each of them takes, (n,).
        left: How many steps every session has left.
        row: The next utterance of every session.
        n_idle: Lanes without a session.

    Returns:
        lane: The session of each lane, (L,).
        lengths: Its valid steps, (L,); 0 in an idle lane.
        rows: Its utterances, (L, T). An idle lane, and a step of padding, repeat those of others.
    """
    idle = np.zeros(n_idle, np.int64)
    lane, lengths = np.concatenate([picked, idle]), np.concatenate([taken, idle])
    step = np.minimum(np.arange(taken.max()), left[lane, None] - 1)
    return lane, lengths, row[lane, None] + step


def _remember(memory: SessionState, picked: np.ndarray, state: SessionState, left: np.ndarray) -> None:
    """Write the first lanes of a call's state back to the sessions it served, from which they continue."""
    goes_on = np.flatnonzero(left[picked])
    if not len(goes_on):
        return
    source, target = torch.from_numpy(goes_on), torch.from_numpy(picked[goes_on])
    for name, tensor in memory.tensors().items():
        tensor[target] = getattr(state, name)[source]


def replay(
    model: SessionRegressor,
    sessions: PackedSessions,
    *,
    window: int,
    observed: Tensor | None = None,
    group: Group | None = None,
) -> Replayed:
    """Predict every utterance from a fresh state, feeding back predictions, or what is observed.

    The sessions are spread over the workers; every worker gets the whole result.

    Args:
        model: Predicts without dropout.
        sessions: At least one.
        window: Most steps of one chunk; decides only the cost, and where the gain is measured.
        observed: Values that are known, (U, F), NaN = unknown; None if unknown.
        group: The workers.
    """
    group = group or Group()
    mine = np.arange(group.rank, len(sessions.lengths), group.size)
    device = sessions.labels.device
    spread = torch.zeros(3, max(model.fresh_state(1).c.shape[1], 1), dtype=torch.float64, device=device)
    gain = torch.zeros(2, model.n_fed, dtype=torch.float64, device=device)
    known = torch.full_like(sessions.observed, torch.nan) if observed is None else observed

    def watch(chunk: ReplayedChunk) -> None:
        c = chunk.after.c.double()
        spread[:, : c.shape[1]] += torch.stack([torch.full_like(c[0], len(c)), c.sum(dim=0), (c * c).sum(dim=0)])
        if model.feeds_predictions and observed is None:
            gain.add_(_gain(model, chunk, (chunk.start > 0) & (chunk.start % window == 0)))

    if len(mine):
        picked = dataclasses.replace(
            sessions,
            lengths=sessions.lengths[mine],
            offsets=sessions.offsets[mine],
            session_ids=[sessions.session_ids[number] for number in mine],
        )
        lanes = min(LANES, len(mine))
        prediction = predict_sessions(
            model, picked, lanes=lanes, chunk=window, observed=known, padded=True, watch=watch
        ).clone()
    else:
        prediction = torch.zeros(len(sessions.labels), len(model.targets), dtype=torch.float64, device=device)
    group.add(prediction)
    n, total, squares = group.add(spread).cpu().numpy()
    moved, count = group.add(gain).tolist()
    return Replayed(
        prediction=prediction.cpu().numpy(),
        state_sd=float(np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0)).mean()) if n[0] else None,
        feedback_gain=tuple(m / k if k else None for m, k in zip(moved, count, strict=True)),
    )


def _gain(model: SessionRegressor, chunk: ReplayedChunk, lanes: Tensor) -> Tensor:
    """Summed movement of some lanes' first predictions per unit of feedback, and how many were summed, (2, F)."""
    nudge = NUDGE * LabelScale(*model.config.label_range).width
    found = torch.zeros(2, model.n_fed, dtype=torch.float64, device=chunk.prediction.device)
    if lanes.any():
        features = chunk.features.select(lanes).step(0)
        for dimension in range(model.n_fed):
            state = chunk.before.select(lanes)
            feedback = state.last_feedback.clone()
            feedback[:, dimension] += nudge
            moved, _ = model.step(features, dataclasses.replace(state, last_feedback=feedback))
            change = (moved - chunk.prediction[lanes, 0])[:, dimension].double() / nudge
            found[:, dimension] = torch.stack([change.sum(), change.new_tensor(len(change))])
    return found
