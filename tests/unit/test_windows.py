"""Sessions as tensors: what a window holds, what is shared, and what is copied."""

import pickle
import warnings

import numpy as np
import pytest
import torch

from vaemo.data.lanes import schedule_lanes
from vaemo.data.windows import PackedSessions
from vaemo.testing import linear_world


@pytest.fixture(scope="module")
def sessions():
    return linear_world(1, sessions=(14, 0, 0), lengths=(3, 20), features=5, noise=1.0).sessions("train")


def test_windows_hold_what_the_schedule_says(sessions):
    packed = PackedSessions.of(sessions)
    schedule = schedule_lanes(packed.lengths, 4, 6, seed=2)
    seen = np.zeros(len(packed.labels), int)
    for number, window in enumerate(packed.windows(schedule, lanes=[3, 1])):
        for lane, source in enumerate([3, 1]):
            session, start, length = (
                getattr(schedule, name)[number, source] for name in ("session", "start", "lengths")
            )
            rows = slice(start, start + length)
            if length:
                speech = sessions[session].streams["speech"][rows]
                np.testing.assert_array_equal(window.features.speech[lane, :length], speech)
                np.testing.assert_array_equal(window.labels[lane, :length], sessions[session].labels[rows])
            assert window.labels[lane, length:].isnan().all()
            assert bool(window.fresh[lane]) == (start == 0)
            seen[window.index[lane, :length]] += 1
        assert window.valid.sum(dim=1).tolist() == window.lengths.tolist()
    assert seen.max() == 1


def test_some_of_packed_sessions_are_those_sessions(sessions):
    numbers = [5, 0, 3]
    packed = PackedSessions.of(sessions)
    picked, alone = packed.select(numbers), PackedSessions.of([sessions[number] for number in numbers])
    assert picked.features.speech.data_ptr() == packed.features.speech.data_ptr(), "copied"
    assert picked.session_ids == alone.session_ids
    assert picked.utt_ids.tolist() == alone.utt_ids.tolist()
    for one, other in zip(picked.statistics()["speech"], alone.statistics()["speech"], strict=True):
        assert torch.equal(one, other)
    schedule = schedule_lanes(alone.lengths, 2, 6)
    for some in (picked, picked.select(range(3)), picked.gathered()):
        for found, expected in zip(some.windows(schedule), alone.windows(schedule), strict=True):
            assert torch.equal(found.features.speech, expected.features.speech)
            torch.testing.assert_close(found.labels, expected.labels, equal_nan=True, atol=0, rtol=0)
    assert not len(packed.select([]).labels)


def test_the_past_is_made_once_lies_beside_the_features_and_follows_them(sessions):
    names = ("speaker.speech", "session.speech", "speaker.prosody")
    packed = PackedSessions.of(sessions)
    heard = packed.with_past(names)
    # There is no prosody here: who needs it says so.
    assert list(heard.features.past) == ["speaker.speech", "session.speech"]
    assert packed.features.past == {}
    assert heard.with_past(names) is heard
    assert heard.features.speech is packed.features.speech
    picked = heard.select([5, 0])
    assert picked.features.past["session.speech"] is heard.features.past["session.speech"]
    again = pickle.loads(pickle.dumps(picked))
    alone = PackedSessions.of([sessions[5], sessions[0]]).with_past(names)
    double = picked.to("cpu", torch.float64)
    rows = torch.arange(len(alone.labels))
    for name, expected in alone.at(rows).past.items():
        for some in (picked, again, picked.gathered(), packed.select([5, 0]).with_past(names)):
            assert torch.equal(some.at(rows).past[name], expected)
        assert torch.equal(double.features.past[name], expected.double())
    assert heard.statistics().keys() == {"speech"}


def test_packed_sessions_are_moved_where_they_are_not_yet(sessions):
    packed = PackedSessions.of(sessions)
    assert packed.to("cpu", torch.float32) is packed
    double = packed.select([2, 1]).to("cpu", torch.float64)
    assert len(double.features.speech) == len(double.labels)
    for tensor in (double.features.speech, double.labels, double.observed):
        assert tensor.dtype == torch.float64
    expected = np.concatenate([sessions[number].streams["speech"] for number in (2, 1)])
    np.testing.assert_array_equal(double.features.speech, expected)


def test_packed_sessions_are_read_where_shared_memory_holds_them(sessions):
    packed, buffers = PackedSessions.of(sessions), []
    held = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    memory = [bytes(buffer) for buffer in buffers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(held, buffers=memory)
    assert torch.equal(again.features.speech, packed.features.speech)
    assert again.features.speech.data_ptr() in [np.frombuffer(part, np.uint8).ctypes.data for part in memory]


def test_statistics_are_those_of_the_rows(sessions):
    packed = PackedSessions.of(sessions)
    mean, deviation = packed.statistics()["speech"]
    np.testing.assert_allclose(mean, packed.features.speech.double().mean(0), atol=1e-12)
    np.testing.assert_allclose(deviation, packed.features.speech.double().std(0, correction=0), atol=1e-12)
