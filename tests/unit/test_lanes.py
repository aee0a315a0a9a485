"""The lane schedule: whole, in order, equal for every lane, little padded, the same for everyone."""

import numpy as np
import pytest

from vaemo.data.lanes import schedule_lanes

MOST_PADDED = 0.12
"""Share of padded steps that the design allows."""


def played(schedule, n_sessions):
    """Steps of every session in the order in which they are played, and the lanes they are played in."""
    steps = [[] for _ in range(n_sessions)]
    lanes = [set() for _ in range(n_sessions)]
    for window in range(len(schedule)):
        for lane, session in enumerate(schedule.session[window]):
            if session >= 0:
                start, length = schedule.start[window, lane], schedule.lengths[window, lane]
                steps[session] += range(start, start + length)
                lanes[session].add(lane)
    return steps, lanes


@pytest.mark.parametrize("number", range(60))
def test_every_step_is_played_once_in_order_in_one_lane(number):
    random = np.random.default_rng(number)
    lengths = random.integers(1, 91, size=random.integers(1, 61)).tolist()
    lanes, window = int(random.integers(1, 21)), int(random.integers(1, 41))
    seed = None if number % 4 == 0 else number
    schedule = schedule_lanes(np.array(lengths), lanes, window, seed=seed, epoch=3)
    steps, used = played(schedule, len(lengths))
    assert steps == [list(range(length)) for length in lengths]
    assert all(len(lane) == 1 for lane in used)
    assert schedule.session.shape == (len(schedule), lanes)
    assert (schedule.steps >= 1).all()
    assert (schedule.lengths <= window).all()


def test_sessions_run_on_without_a_gap():
    schedule = schedule_lanes(np.array([100, 90, 31, 30, 5]), 2, 30, seed=1)
    for lane in range(2):
        column = schedule.session[:, lane]
        for window in range(1, len(schedule)):
            if column[window] >= 0 and schedule.start[window, lane]:
                assert column[window] == column[window - 1]
                assert schedule.lengths[window - 1, lane] == 30


@pytest.mark.parametrize(("low", "high"), [(20, 110), (2, 15)])
def test_little_is_padded(low, high):
    random = np.random.default_rng(7)
    for epoch in range(20):
        lengths = random.integers(low, high + 1, 150)
        schedule = schedule_lanes(lengths, 16, 30, seed=0, epoch=epoch)
        assert schedule.padded_share <= MOST_PADDED
        assert schedule.padded_share == pytest.approx(1 - lengths.sum() / (16 * schedule.steps.sum()))


def test_long_sessions_go_end_to_end():
    lengths = np.random.default_rng(3).integers(200, 2000, 40)
    assert schedule_lanes(lengths, 16, 30, seed=0).padded_share < 0.2


def test_same_seed_same_schedule_and_every_epoch_its_own():
    lengths = np.random.default_rng(1).integers(5, 60, 80)
    first, again = (schedule_lanes(lengths, 8, 20, seed=4, epoch=2) for _ in range(2))
    other = schedule_lanes(lengths, 8, 20, seed=4, epoch=3)
    assert np.array_equal(first.session, again.session)
    assert np.array_equal(first.start, again.start)
    assert first.session.shape != other.session.shape or not np.array_equal(first.session, other.session)


def test_fewer_sessions_than_lanes():
    schedule = schedule_lanes(np.array([12, 3]), 16, 10, seed=0)
    assert (schedule.session >= 0).sum() == 3
    assert schedule.steps.tolist() in ([10, 2], [2, 10])


def test_company_changes_between_epochs():
    lengths = np.random.default_rng(2).integers(20, 110, 150)
    company = set()
    for epoch in range(10):
        schedule = schedule_lanes(lengths, 16, 30, seed=0, epoch=epoch)
        company |= {frozenset(window) for window in schedule.session[schedule.start.max(axis=1) == 0]}
    # Ten groups an epoch; grouping by length alone would give the same ten every time.
    assert len(company) > 50
