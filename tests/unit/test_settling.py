"""Errors by position: what is counted, the weights that follow, and what a checkpoint keeps of them."""

import json

import numpy as np
import pytest

from vaemo.model.settling import FEW, LEAST_WEIGHT, STARTS, ErrorByPosition


def sequences(lengths):
    session = np.repeat(np.arange(len(lengths)), lengths)
    return session, np.concatenate([np.arange(length) for length in lengths])


def made(spread, n_sessions=40, length=12, seed=0, level=0.0):
    """Errors of a given deviation by position, (length,), and a level of each session's own."""
    random = np.random.default_rng(seed)
    session, position = sequences([length] * n_sessions)
    label = random.random((len(session), 2))
    error = random.standard_normal((len(session), 2)) * np.asarray(spread)[position, None]
    error += level * random.standard_normal((n_sessions, 2))[session]
    return label + error, label, session, position


def test_errors_are_those_of_a_plain_loop():
    prediction, label, session, position = made(np.linspace(0.3, 0.1, 12))
    random = np.random.default_rng(1)
    label[random.random(label.shape) < 0.2] = np.nan
    label[session == 3, 0] = np.nan
    label[np.flatnonzero(session == 4)[1:], 1] = np.nan
    found = ErrorByPosition.of(prediction, label, session, position)
    for k in range(2):
        own, centred = {}, {}
        for number in range(40):
            rows = [row for row in np.flatnonzero(session == number) if not np.isnan(label[row, k])]
            if len(rows) < 2:
                continue
            errors = prediction[rows, k] - label[rows, k]
            for row, error, rest in zip(rows, errors, errors - errors.mean(), strict=True):
                place = max(n for n, start in enumerate(STARTS) if start <= position[row])
                own.setdefault(place, []).append(error**2)
                centred.setdefault(place, []).append(rest**2)
        for place in range(len(STARTS)):
            assert found.n[place, k] == len(own.get(place, []))
            if place in own:
                assert found.mse[place, k] == pytest.approx(np.mean(own[place]))
                assert found.within_mse[place, k] == pytest.approx(np.mean(centred[place]))


def test_an_error_that_a_whole_session_shares_changes_no_weight():
    spread = np.where(np.arange(12) < 2, 0.3, 0.1)
    level, flat = (ErrorByPosition.of(*made(spread, level=level)) for level in (1.0, 0.0))
    np.testing.assert_allclose(level.within_mse, flat.within_mse)
    assert (level.mse > 5 * flat.mse).all(where=level.n > 0)
    np.testing.assert_allclose(level.weights(np.arange(12)), flat.weights(np.arange(12)))


def test_weights_are_the_settled_error_over_the_error_at_the_position():
    spread = np.where(np.arange(30) < 2, 0.3, 0.1)
    weight = ErrorByPosition.of(*made(spread, n_sessions=2000, length=30)).weights(np.array([0, 1, 2, 5, 29, 500]))
    assert weight[:2] == pytest.approx(1 / 9, rel=0.15)
    assert weight[2:] == pytest.approx(1, abs=0.1)
    assert (weight[-1] == 1).all()


def test_weights_never_fall_with_the_position():
    # By chance, or because the end of a session is harder, later errors are larger: nothing is drawn for that.
    rising = ErrorByPosition.of(*made(np.linspace(0.1, 0.5, 12)))
    np.testing.assert_array_equal(rising.weights(np.arange(12)), 1)
    odd = ErrorByPosition.of(*made(np.where(np.arange(30) % 3, 0.1, 0.3), length=30)).weights(np.arange(30))
    assert (np.diff(odd, axis=0) >= 0).all()
    assert (odd > 0).all()


def test_too_few_labels_say_nothing():
    few = made(np.where(np.arange(3) < 1, 1.0, 0.01), n_sessions=2, length=3)
    np.testing.assert_array_equal(ErrorByPosition.of(*few).weights(np.arange(9)), 1)
    nothing = ErrorByPosition.of(np.zeros((0, 2)), np.zeros((0, 2)), *(np.zeros(0, np.int64),) * 2)
    np.testing.assert_array_equal(nothing.weights(np.arange(9)), 1)
    assert FEW > 2


def test_predictions_without_error_once_settled_leave_a_weight():
    spread = np.where(np.arange(30) < 2, 0.3, 0.0)
    prediction, label, session, position = made(spread, length=30)
    # Of errors that all lie in the first two, the others keep what the session's mean takes of them.
    weight = ErrorByPosition.of(prediction, label, session, position).weights(position)
    assert (weight >= LEAST_WEIGHT).all()
    assert (weight <= 1).all()


def test_a_checkpoint_keeps_them():
    errors = ErrorByPosition.of(*made(np.linspace(0.3, 0.1, 12)))
    plain = json.loads(json.dumps(errors.to_dict(), allow_nan=False))
    assert plain["from"][:3] == [1, 2, 3]
    assert plain["rmse"]["valence"][-1] is None
    back = ErrorByPosition.from_dict(plain)
    np.testing.assert_allclose(back.weights(np.arange(50)), errors.weights(np.arange(50)))
    # Ranges of another version are its own.
    coarse = {"from": [1, 3], "n": {"valence": [50, 50], "arousal": [50, 50]}}
    for key in ("rmse", "within_rmse"):
        coarse[key] = {"valence": [0.2, 0.1], "arousal": [0.1, 0.1]}
    np.testing.assert_allclose(ErrorByPosition.from_dict(coarse).weights(np.arange(3))[:, 0], [0.25, 0.25, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"from": None},
        {"from": [2, 3]},
        {"from": [1, 1]},
        {"from": [1, 2, 3]},
        {"n": {"valence": [5, 5]}},
        {"n": {"valence": [-5, 5], "arousal": [5, 5]}},
        {"within_rmse": {"valence": ["x", 0.1], "arousal": [0.1, 0.1]}},
    ],
)
def test_what_is_no_error_by_position_is_refused(change):
    pair = {"valence": [0.2, 0.1], "arousal": [0.1, 0.1]}
    whole = {"from": [1, 3], "n": {"valence": [9, 9], "arousal": [9, 9]}, "rmse": pair, "within_rmse": pair}
    ErrorByPosition.from_dict(whole)
    with pytest.raises(ValueError, match="errors by position"):
        ErrorByPosition.from_dict({**whole, **change})


def test_a_model_of_the_call_alone_has_none():
    starts = np.array([0, 5])
    none = np.zeros((2, 0))
    back = ErrorByPosition.from_dict(ErrorByPosition(starts, none, none, none, ()).to_dict())
    assert back.names == ()
    assert back.weights(np.arange(8)).shape == (8, 0)
