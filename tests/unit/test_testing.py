"""The dialogue world: what it promises of speakers, dialogs, labels and features."""

import numpy as np
import pytest

from vaemo.ablation.baselines import Given, ridge_with_memory
from vaemo.metrics import Moments
from vaemo.testing import dialogue_world

SEEDS = (1, 2, 3)
SHARE = 0.05
"""How far the mean of three worlds may be from a share of the variance: each has 380 dialogs in all."""
LEVEL = 0.03
"""How far the mean of ten worlds may be from the CCC that they were calibrated to."""


@pytest.fixture(scope="module")
def worlds():
    return [dialogue_world(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def world(worlds):
    return worlds[0]


def sessions(world):
    return [session for name in ("train", "dev", "test") for session in world.sessions(name)]


def share_between(groups):
    """The share of variance between groups of rows, (K,): one-way analysis of variance, groups of any size."""
    n = np.array([len(group) for group in groups])
    means = np.array([group.mean(axis=0) for group in groups])
    within = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in groups) / (n.sum() - len(n))
    grand = np.average(means, axis=0, weights=n)
    size = (n.sum() - (n**2).sum() / n.sum()) / (len(n) - 1)
    between = ((n[:, None] * (means - grand) ** 2).sum(axis=0) / (len(n) - 1) - within) / size
    return between / (between + within)


def test_the_seed_decides_everything(world):
    assert dialogue_world(SEEDS[0]).table == world.table
    assert dialogue_world(SEEDS[1]).table["valence"] != world.table["valence"]
    as_speech = dialogue_world(SEEDS[0], stream="speech").table
    assert as_speech["speech"] == world.table["prosody"]


def test_no_speaker_is_in_two_splits(world):
    heard = {
        name: {speaker for session in world.sessions(name) for speaker in session.speaker_ids}
        for name in ("train", "dev", "test")
    }
    assert {name: len(speakers) for name, speakers in heard.items()} == {"train": 8, "dev": 2, "test": 24}
    assert len(set.union(*heard.values())) == 34
    assert {name: len(world.sessions(name)) for name in heard} == {"train": 120, "dev": 20, "test": 144}


def test_two_speakers_of_a_pair_take_irregular_turns(world):
    lengths = [len(session) for session in sessions(world)]
    assert min(lengths) >= 24
    assert max(lengths) <= 167
    assert np.std(lengths) > 20
    changes = []
    for session in sessions(world):
        assert len(set(session.speaker_ids)) == 2
        assert len({speaker[:-1] for speaker in session.speaker_ids}) == 1
        changes.append((session.speaker_ids[1:] != session.speaker_ids[:-1]).mean())
    assert np.mean(changes) == pytest.approx(0.7, abs=0.02)


def test_labels_are_means_of_two_or_three_ratings(world):
    labels = np.concatenate([session.labels for session in sessions(world)]).astype(np.float64)
    assert labels.min() == 0
    assert labels.max() == 1
    ratings = 1 + 4 * labels
    by_two, by_three = (np.abs(k * ratings - (k * ratings).round()).max(axis=1) < 1e-5 for k in (2, 3))
    assert (by_two | by_three).all()
    assert 0.2 < (by_two & ~by_three).mean() < 0.8
    assert 0.2 < (by_three & ~by_two).mean() < 0.8


def test_half_of_valence_and_a_fifth_of_arousal_is_between_dialogs(worlds):
    shares = np.mean([share_between([session.labels for session in sessions(world)]) for world in worlds], axis=0)
    assert shares == pytest.approx([0.5, 0.2], abs=SHARE)


def test_a_speaker_goes_on_from_their_own_last_turn(worlds):
    own, other = [], []
    for session in (session for world in worlds for session in sessions(world)):
        rest = session.labels - session.labels.mean(axis=0)
        last = {}
        for turn, speaker in enumerate(session.speaker_ids):
            for whose, at in last.items():
                (own if whose == speaker else other).append((rest[turn], rest[at]))
            last[speaker] = turn
    own, other = (np.array(found) for found in (own, other))
    for k in range(2):
        assert np.corrcoef(own[:, 0, k], own[:, 1, k])[0, 1] > np.corrcoef(other[:, 0, k], other[:, 1, k])[0, 1] + 0.2


def test_offsets_of_speakers_are_as_large_as_the_spread_within_a_voice(worlds):
    ratios = []
    for world in worlds:
        voices = {}
        for session in sessions(world):
            for speaker, features in zip(session.speaker_ids, session.streams["prosody"], strict=True):
                voices.setdefault(speaker, []).append(features)
        voices = [np.array(voice, np.float64) for voice in voices.values()]
        share = share_between(voices)
        assert share.shape == (47,)
        ratios.append(np.sqrt(share / (1 - share)))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.2)


def test_features_are_correlated_and_heavy_tailed(world):
    noise = []
    for session in sessions(world):
        for speaker in set(session.speaker_ids):
            features = session.streams["prosody"][session.speaker_ids == speaker].astype(np.float64)
            noise.append(features - features.mean(axis=0))
    noise = np.concatenate(noise) / np.concatenate(noise).std(axis=0)
    assert (noise**4).mean(axis=0).min() > 3.3
    strengths = np.linalg.eigvalsh(np.corrcoef(noise.T))[::-1]
    assert strengths[:8].sum() > 0.6 * 47
    assert strengths[:8].sum() < 0.9 * 47


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ridge_is_where_it_is_on_people():
    found = []
    for seed in range(10):
        given = Given(*(dialogue_world(seed).sessions(name) for name in ("train", "dev", "test")), ["prosody"])
        labels = np.concatenate([session.labels for session in given.test])
        fits = ridge_with_memory(given, memories=((),)), ridge_with_memory(given)
        found.append([Moments.of(np.concatenate(fit), labels).ccc() for fit in fits])
    assert np.mean(found, axis=0) == pytest.approx(np.array([[0.33, 0.64], [0.41, 0.64]]), abs=LEVEL)
