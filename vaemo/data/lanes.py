"""The lane schedule: which part of which session is in which lane at which window.

Reads session lengths, returns indices; independent of features and ranks. A schedule is a function of (lengths, lanes,
T, seed, epoch) alone, so every rank computes the same one and takes its own lanes. Letters: W windows, L lanes,
T steps.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

LENGTH_JITTER = 0.05
"""Relative noise on the lengths by which sessions are grouped: groups vary between epochs, at little padding."""


@dataclass(frozen=True, eq=False)
class LaneSchedule:
    """One pass over a set of sessions.

    Every lane has the same number of windows. A session begins at a window's start, runs on in its lane without a
    gap, and ends before padding. The steps of a window are those of its longest lane.

    Attributes:
        session: Number of the session, (W, L), int64; -1 where the lane is idle.
        start: First step of the window in that session, (W, L), int64; 0 where it begins.
        lengths: Steps in the window, (W, L), int64, at most T; 0 where the lane is idle.
    """

    session: np.ndarray
    start: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.session)

    @property
    def steps(self) -> np.ndarray:
        """Steps of every window, (W,), int64: those of its longest lane."""
        return self.lengths.max(axis=1)

    @property
    def padded_share(self) -> float:
        """Share of the lanes' steps that hold no utterance."""
        cells = int(self.steps.sum()) * self.session.shape[1]
        return 1 - int(self.lengths.sum()) / max(cells, 1)


def schedule_lanes(
    lengths: np.ndarray,
    lanes: int,
    window: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    whole_at_end: bool = False,
) -> LaneSchedule:
    """Spread sessions over lanes so that little is padded; shuffled by (seed, epoch), by length where seed is None.

    Two orders are tried and the one that pads less is taken. Side by side: sessions of similar length begin and end
    together; best for many sessions of few windows. End to end: each lane gets its own row of sessions, all rows about
    equally long; best where sessions are long, or fewer than a few per lane.

    Args:
        lengths: Utterances of every session, (sessions,), at least 1 each.
        lanes: L; lanes beyond the number of sessions stay idle.
        window: Most steps of a window (T).
        seed: Seed of the shuffling; None does not shuffle.
        epoch: Every epoch is shuffled again.
        whole_at_end: Put the short window of a session at its beginning, not at its end.
    """
    lengths = np.asarray(lengths, np.int64)
    random = None if seed is None else np.random.default_rng([seed, epoch])
    keys = lengths.astype(np.float64)
    if random is not None:
        keys *= 1 + random.uniform(-LENGTH_JITTER, LENGTH_JITTER, len(lengths))
    longest_first = np.argsort(-keys, kind="stable")
    schedules = (order(lengths, longest_first, lanes, window, random) for order in (_side_by_side, _end_to_end))
    if whole_at_end:
        schedules = (_from_the_end(schedule, lengths, window) for schedule in schedules)
    return min(schedules, key=lambda schedule: schedule.padded_share)


def _from_the_end(schedule: LaneSchedule, lengths: np.ndarray, window: int) -> LaneSchedule:
    """The same sessions, cut into windows from their ends."""
    busy = schedule.session >= 0
    of_session = np.where(busy, lengths[schedule.session], 0)
    later = -(-of_session // window) - schedule.start // window - 1
    end = of_session - later * window
    start = np.where(busy, np.maximum(end - window, 0), 0)
    return LaneSchedule(schedule.session, start, np.where(busy, end - start, 0))


def _side_by_side(
    lengths: np.ndarray, longest_first: np.ndarray, lanes: int, window: int, random: np.random.Generator | None
) -> LaneSchedule:
    """Groups of L sessions of similar length; the incomplete group holds the shortest."""
    idle = np.full(-len(longest_first) % lanes, -1)
    groups = np.concatenate([longest_first, idle]).reshape(-1, lanes)
    if random is not None:
        groups = random.permuted(random.permutation(groups), axis=1)
    padded = np.append(lengths, 0)
    windows = -(-padded[groups].max(axis=1) // window)
    nth = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    session = np.repeat(groups, windows, axis=0)
    return _schedule(padded, session, np.broadcast_to(nth[:, None] * window, session.shape), window)


def _end_to_end(
    lengths: np.ndarray, longest_first: np.ndarray, lanes: int, window: int, random: np.random.Generator | None
) -> LaneSchedule:
    """Sessions, longest first, each to the lane that has the fewest windows so far; then shuffled inside lanes."""
    needed = -(-lengths // window)
    lane = np.zeros(len(lengths), np.int64)
    names = np.arange(lanes) if random is None else random.permutation(lanes)
    fewest = [(0, rank) for rank in range(lanes)]
    for number in longest_first:
        windows, rank = heapq.heappop(fewest)
        lane[number] = names[rank]
        heapq.heappush(fewest, (windows + int(needed[number]), rank))

    queue = longest_first if random is None else random.permutation(longest_first)
    queue = queue[np.argsort(lane[queue], kind="stable")]
    of_window = np.repeat(queue, needed[queue])
    nth = np.arange(len(of_window)) - np.repeat(np.cumsum(needed[queue]) - needed[queue], needed[queue])
    filled = np.bincount(lane, weights=needed, minlength=lanes).astype(np.int64)
    row = np.arange(len(of_window)) - np.repeat(np.cumsum(filled) - filled, filled)
    session = np.full((filled.max(), lanes), -1)
    start = np.zeros_like(session)
    session[row, lane[of_window]] = of_window
    start[row, lane[of_window]] = nth * window
    return _schedule(np.append(lengths, 0), session, start, window)


def _schedule(padded: np.ndarray, session: np.ndarray, start: np.ndarray, window: int) -> LaneSchedule:
    """`padded` ends in a 0, which is the length that an idle lane (-1) finds."""
    left = np.clip(padded[session] - start, 0, window)
    return LaneSchedule(np.where(left > 0, session, -1), np.where(left > 0, start, 0), left)
