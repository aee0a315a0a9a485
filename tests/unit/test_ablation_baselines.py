"""The baselines against scikit-learn and plain formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from vaemo.ablation import baselines
from vaemo.ablation.baselines import Given, mean_of_labels, ridge, ridge_with_memory, rivals
from vaemo.data.windows import PackedSessions
from vaemo.metrics import ccc
from vaemo.testing import linear_world

EXACT = 1e-8
"""float64: two solvers of the same equations."""
PENALTY = 100.0


@pytest.fixture(scope="module")
def parts():
    """Train, dev and test, a fifth without labels, with a second stream beside the first."""
    world = linear_world(4, sessions=(30, 10, 10), lengths=(10, 30), features=8, noise=3.0, unlabelled=0.2)
    random = np.random.default_rng(0)
    splits = [world.sessions(name) for name in ("train", "dev", "test")]
    return [
        [
            dataclasses.replace(
                session, streams={**session.streams, "prosody": random.standard_normal((len(session), 3)) * 50 + 7}
            )
            for session in split
        ]
        for split in splits
    ]


def stacked(sessions, statistics, alphas=()):
    mean, deviation = statistics
    found = []
    for session in sessions:
        x = (raw(session) - mean) / deviation
        emas = []
        for alpha in alphas:
            # The definition: weights (1 - alpha) alpha^k on the utterance k before.
            steps = np.arange(len(x))
            back = steps[:, None] - steps
            weights = np.where(back >= 0, (1 - alpha) * alpha ** np.maximum(back, 0), 0.0)
            emas.append(weights @ x)
        found.append(np.concatenate([x, *emas], axis=1))
    return np.concatenate(found)


def raw(session):
    return np.concatenate([session.streams["speech"], session.streams["prosody"]], axis=1).astype(np.float64)


def labels(sessions):
    return np.concatenate([session.labels for session in sessions]).astype(np.float64)


def by_sklearn(parts, alphas=()):
    """Predictions of dev and test."""
    heard = np.concatenate([raw(session) for session in parts[0]])
    statistics = heard.mean(axis=0), heard.std(axis=0)
    x, x_dev, x_test = (stacked(part, statistics, alphas) for part in parts)
    centre, scale = x.mean(axis=0), x.std(axis=0)
    y = labels(parts[0])
    predicted = []
    for k in range(2):
        known = ~np.isnan(y[:, k])
        # Its own centring of x would be that of the labelled rows; ours is that of all rows.
        fitted = Ridge(alpha=PENALTY, fit_intercept=False)
        fitted.fit(((x - centre) / scale)[known], y[known, k] - y[known, k].mean())
        predicted.append([fitted.predict((each - centre) / scale) + y[known, k].mean() for each in (x_dev, x_test)])
    return [np.stack([predicted[0][i], predicted[1][i]], axis=1) for i in range(2)]


def test_mean(parts):
    found = np.concatenate(mean_of_labels(Given(*parts, ["speech"])))
    assert found.shape == labels(parts[2]).shape
    np.testing.assert_allclose(found, np.broadcast_to(np.nanmean(labels(parts[0]), axis=0), found.shape))


def test_ridge_is_that_of_scikit_learn(parts, monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (PENALTY,))
    found = ridge(Given(*parts, ["speech", "prosody"]))
    assert [len(each) for each in found] == [len(session) for session in parts[2]]
    np.testing.assert_allclose(np.concatenate(found), by_sklearn(parts)[1], atol=EXACT)


def test_memory_is_a_causal_ema(parts, monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (PENALTY,))
    monkeypatch.setattr(baselines, "MEMORIES", ((0.5, 0.9),))
    found = np.concatenate(ridge_with_memory(Given(*parts, ["speech", "prosody"]), match=False))
    np.testing.assert_allclose(found, by_sklearn(parts, (0.5, 0.9))[1], atol=EXACT)


def test_what_lies_far_out_is_clipped(parts, monkeypatch):
    """As the model clips it: a feature that is far out is no worse than one further out."""
    monkeypatch.setattr(baselines, "PENALTIES", (PENALTY,))

    def predict(value):
        test = parts[2][0]
        far = test.streams["speech"].copy()
        far[3, 2] = value
        return ridge(Given(*parts[:2], [dataclasses.replace(test, streams={"speech": far})], ["speech"]))[0]

    np.testing.assert_array_equal(predict(1e4), predict(1e6))
    assert (np.delete(predict(1e4), 3, axis=0) == np.delete(predict(0.0), 3, axis=0)).all()
    assert (predict(1e4)[3] != predict(0.0)[3]).all()


def test_matched_predictions_vary_on_dev_as_its_labels_do(parts, monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (PENALTY,))
    monkeypatch.setattr(baselines, "MEMORIES", ((0.8,),))
    train, dev, _ = parts
    found = np.concatenate(ridge_with_memory(Given(train, dev, dev, ["speech", "prosody"])))
    y = labels(dev)
    for k in range(2):
        known = ~np.isnan(y[:, k])
        assert found[known, k].std() == pytest.approx(y[known, k].std())
    plain = by_sklearn([train, dev, dev], (0.8,))[1]
    centre = np.nanmean(labels(train), axis=0)
    ratio = (found - centre) / (plain - centre)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-4)
    assert (ratio[0] > 1).all()


def test_the_best_on_dev_is_taken_for_each_dimension(parts):
    """Whatever is chosen, no single penalty agrees better with the dev labels."""
    train, dev, _ = parts
    chosen = ccc(np.concatenate(ridge(Given(train, dev, dev, ["speech", "prosody"]))), labels(dev))
    single = []
    for penalty in baselines.PENALTIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baselines, "PENALTIES", (penalty,))
            single.append(ccc(np.concatenate(ridge(Given(train, dev, dev, ["speech", "prosody"]))), labels(dev)))
    np.testing.assert_allclose(chosen, np.max(single, axis=0))
    assert np.ptp(single, axis=0).min() > 0.01


def match(predicted, train, dev):
    centre = np.nanmean(labels(train), axis=0)
    known = ~np.isnan(labels(dev))
    spread = [np.std(labels(dev)[known[:, k], k]) / np.std(np.concatenate(predicted)[known[:, k], k]) for k in range(2)]
    return centre + (np.concatenate(predicted) - centre) * spread


def test_rivals_are_these_ridges_on_dev_with_matched_spread(parts, monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (PENALTY,))
    monkeypatch.setattr(baselines, "RIVAL_MEMORIES", ((0.9,),))
    train, dev, _ = parts
    packed = [PackedSessions.of(part) for part in (train, dev)]
    torch.manual_seed(3)
    found = rivals(*packed, ["speech", "prosody"])
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3)), "nobody's draws were used"
    # Packed sessions are in float32.
    for name, alphas in (("ridge", ()), ("ridge_ema", (0.9,))):
        predicted = match([by_sklearn([train, dev, dev], alphas)[1]], train, dev)
        expected = ccc(predicted, labels(dev))
        keys = [f"dev_ccc_{key}" for key in ("valence", "arousal", "avg")]
        assert list(found[name]) == keys
        assert list(found[name].values()) == pytest.approx([*expected, expected.mean()], abs=1e-5)


def test_rivals_look_at_a_part_of_what_is_large(parts, monkeypatch):
    train, dev, _ = (PackedSessions.of(part) for part in parts)
    every = rivals(train, dev, ["speech"])
    monkeypatch.setattr(baselines, "RIVAL_UTTERANCES", len(train.labels) // 2)
    fewer = rivals(train, dev, ["speech"])
    assert fewer != every
    assert fewer == rivals(train, dev, ["speech"])
    seen = baselines.some_sessions(train, ["speech"])
    assert 0 < sum(map(len, seen)) <= len(train.labels) // 2
    own = {session.labels.tobytes() for session in parts[0]}
    assert all(session.labels.tobytes() in own for session in seen), "sessions are whole"
    monkeypatch.setattr(baselines, "RIVAL_NUMBERS", 8 * 70)
    assert 30 < sum(map(len, baselines.some_sessions(train, ["speech"]))) <= 70
    monkeypatch.setattr(baselines, "RIVAL_NUMBERS", 1)
    assert len(baselines.some_sessions(train, ["speech"])) == 1


@pytest.mark.parametrize("split", [0, 1])
def test_rivals_need_labels(parts, split):
    def without(part, rows):
        kept = [dataclasses.replace(session, labels=session.labels.copy()) for session in part]
        for session in kept:
            session.labels[rows, 1] = np.nan
        return kept

    found = list(parts[:2])
    found[split] = without(found[split], slice(1, None))
    assert rivals(*map(PackedSessions.of, found), ["speech"]) is None
    packed = [PackedSessions.of(part) for part in parts[:2]]
    packed[split] = packed[split].select([])
    assert rivals(*packed, ["speech"]) is None


def test_dimensions_may_be_labelled_in_different_utterances(parts):
    """Each is fitted on its own: as if the other's labels were not there."""
    train, dev, test = parts

    def labelled(k):
        found = [dataclasses.replace(session, labels=session.labels.copy()) for session in train]
        for session in found:
            session.labels[::3, k] = np.nan
        return found

    found = np.concatenate(ridge(Given(labelled(0), dev, test, ["speech"])))
    whole = np.concatenate(ridge(Given(train, dev, test, ["speech"])))
    assert np.abs(found[:, 0] - whole[:, 0]).max() > 1e-3
    np.testing.assert_allclose(found[:, 1], whole[:, 1], atol=EXACT)


def test_memory_helps_where_there_is_something_to_remember(parts):
    test = labels(parts[2])
    with_memory, without = (
        ccc(np.concatenate(predict(Given(*parts, ["speech"]))), test).mean() for predict in (ridge_with_memory, ridge)
    )
    assert with_memory > without + 0.05
