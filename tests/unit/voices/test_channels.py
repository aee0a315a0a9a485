"""Utterances cut by voice, with an encoder that hears which of some numbers a window holds."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from vaemo.audio.vad import Utterance
from vaemo.config import VadConfig, VoicesConfig
from vaemo.data.speakers import unit
from vaemo.voices.channels import VoiceCutter, divides
from vaemo.voices.clustering import Beside, find_beside
from vaemo.voices.turns import Turn

RATE = 16_000
DIM = 192


def embed(windows):
    """A window's share of each voice, as directions of a space; a little of it depends on the window."""
    vectors = np.zeros((len(windows), DIM), np.float32)
    for row, window in enumerate(windows):
        for voice in range(5):
            vectors[row, voice] = (np.abs(window) == (voice + 1) / 10).mean()
        vectors[row, 5 + row % 7] = 0.2
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def utterance(start_s, *parts, channel=0):
    """Speech of voices one after the other: (voice, seconds)."""
    samples = np.concatenate([np.full(round(s * RATE), (voice + 1) / 10, np.float32) for voice, s in parts])
    return Utterance(channel, start_s, start_s + len(samples) / RATE, samples)


def cut(*utterances, n_channels=1, turns=None, expected=None, **settings):
    settings = {"mode": "diarize", **settings}
    cutter = VoiceCutter(n_channels, VoicesConfig(**settings), VadConfig(), turns, embed=embed, expected=expected)
    for one in utterances:
        cutter.push(one)
    return cutter.finish()


def places(pieces):
    return [(round(p.start_s, 1), round(p.end_s, 1), p.voice) for p in pieces]


TALK = [utterance(10.0 * n, (n % 2, 5.0)) for n in range(4)]


def test_voices_are_numbered_by_first_speech():
    talk = [utterance(0, (3, 5.0)), utterance(6, (1, 5.0)), utterance(12, (3, 5.0))]
    pieces, voices = cut(*talk)
    assert places(pieces) == [(0, 5, 0), (6, 11, 1), (12, 17, 0)]
    assert [(voice.number, round(voice.speech_s)) for voice in voices] == [(0, 10), (1, 5)]
    assert all(piece.margin > 0.5 for piece in pieces)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_as_many_voices_as_there_are(n):
    _, voices = cut(*[utterance(8.0 * k, (k % n, 6.0)) for k in range(2 * n)])
    assert len(voices) == n


def test_no_more_voices_than_are_asked_for():
    _, voices = cut(*[utterance(8.0 * k, (k % 4, 6.0)) for k in range(8)], voices=2)
    assert len(voices) <= 2


def test_one_voice_has_no_margin():
    pieces, voices = cut(utterance(0, (2, 6.0)), utterance(8, (2, 3.0)))
    assert [(piece.voice, piece.margin) for piece in pieces] == [(0, None)] * 2
    assert len(voices) == 1


def test_an_utterance_is_cut_where_its_voice_changes():
    pieces, _ = cut(*TALK, utterance(50.0, (0, 3.0), (1, 4.0)))
    (first, second) = pieces[-2:]
    assert (first.voice, second.voice) == (0, 1)
    assert first.end_s == second.start_s == pytest.approx(53.0, abs=0.3)
    assert (first.start_s, second.end_s) == (50.0, 57.0)


def test_a_backchannel_is_never_certain():
    pieces, _ = cut(*TALK, utterance(50.0, (1, 0.4)))
    assert pieces[-1].voice == 1
    assert pieces[-1].margin == 0.0


def test_two_at_once_are_less_certain_than_one():
    both = utterance(50.0, (0, 3.0))
    both.samples[::2] = 0.2
    pieces, _ = cut(*TALK, both)
    assert max(piece.margin for piece in pieces[4:]) < 0.1 < min(piece.margin for piece in pieces[:4])


def test_an_end_over_which_the_other_speaks_is_a_piece_of_its_own():
    talk = utterance(50.0, (0, 8.0))
    talk.samples[5 * RATE :: 2] = 0.2
    sure, unsure = cut(*TALK, talk)[0][-2:]
    assert sure.end_s == unsure.start_s == pytest.approx(55.0, abs=0.5)
    assert (sure.start_s, unsure.end_s) == (50.0, 58.0)
    assert max(unsure.margin, 0.1) < VoicesConfig().min_margin < sure.margin


LENGTH_S, HOP_S = 1.5, 0.5


def beside(expected, vectors, most=3):
    """`find_beside`, and which windows are more like the enrolled voice than like the others."""
    vectors = unit(vectors)
    found = find_beside(unit(expected), vectors, np.full(len(vectors), LENGTH_S), HOP_S, most)
    return found.others, vectors @ found.own > (vectors @ found.others.T).max(axis=1)


def windows(numbers, size=1.0, noise=0.02):
    """A window of each of these numbers of a person or mood, as directions of a space, with some noise."""
    vectors = np.random.default_rng(0).normal(scale=noise, size=(len(numbers), DIM)).astype(np.float32)
    vectors[np.arange(len(numbers)), numbers] += size
    return vectors


def test_an_enrolled_voice_is_told_from_another_where_moods_differ_more_than_voices_do():
    draw = np.random.default_rng(0)
    own, mood = draw.random(60) < 0.5, draw.integers(2, size=60)
    vectors = windows(np.where(own, 0, 1)) + windows(10 + mood, 1.2)
    labels = KMeans(2, n_init=10, random_state=0).fit(vectors).labels_ == 1
    assert 0.1 < (labels == own).mean() < 0.9
    others, found = beside(vectors[own].mean(axis=0), vectors)
    np.testing.assert_array_equal(found, own)
    assert len(others) == 1


def test_a_third_voice_that_is_more_like_the_enrolled_one_than_the_other_is_not_taken_for_it():
    person = np.repeat([0, 1, 2], [20, 10, 30])
    vectors = windows(person) + np.where(person == 2, 0.0, 1.0)[:, None] * windows(np.full(60, 5), 1.1)
    others, found = beside(vectors[:20].mean(axis=0), vectors)
    np.testing.assert_array_equal(found, person == 0)
    assert len(others) == 2


def test_two_persons_beside_an_enrolled_voice_of_many_moods_are_two():
    draw = np.random.default_rng(0)
    person, mood = np.repeat([0, 1, 2], [40, 20, 20]), draw.integers(2, size=80)
    vectors = windows(person, 1.2, noise=0.07) + windows(10 + mood, 0.7)
    others, found = beside(vectors[:40].mean(axis=0), vectors)
    np.testing.assert_array_equal(found, person == 0)
    assert len(others) == 2


@pytest.mark.parametrize(
    ("likeness", "other", "calm", "n_without", "expected"),
    [
        (0.95, 0.80, True, 1, True),
        (0.95, 0.86, False, 1, True),
        (0.95, 0.86, True, 2, True),
        # One calm person, whose halves are alike.
        (0.95, 0.86, True, 1, False),
        (0.95, 0.90, False, 2, False),
        (0.85, 0.70, False, 2, False),
    ],
)
def test_a_probable_voice_divides_a_call_of_several(likeness, other, calm, n_without, expected):
    """Its role still takes the full margin of a verification."""
    axes = np.eye(DIM)
    own, others = (value * axes[0] + np.sqrt(1 - value**2) * axes[1] for value in (likeness, np.array([[other]])))
    config = VoicesConfig(verification=0.89, verification_margin=0.13)
    assert divides(Beside(own, others, calm), axes[0], n_without, config) == expected


def test_windows_that_are_all_alike_are_of_one_voice():
    vectors = np.tile(np.eye(1, DIM, dtype=np.float32), (9, 1))
    assert find_beside(vectors[0], vectors, np.full(9, LENGTH_S), HOP_S, 3) is None


def test_a_voice_that_is_expected_and_not_there_changes_nothing():
    stranger = np.eye(DIM, dtype=np.float32)[4]
    assert places(cut(*TALK, expected=stranger)[0]) == places(cut(*TALK)[0])


def test_who_is_expected_alone_is_one_voice():
    pieces, voices = cut(utterance(0, (2, 6.0)), utterance(8, (2, 3.0)), expected=np.eye(DIM, dtype=np.float32)[2])
    assert ([piece.voice for piece in pieces], len(voices)) == ([0, 0], 1)


def test_who_is_expected_is_one_of_three():
    talk = [utterance(8.0 * k, (k % 3, 6.0)) for k in range(6)]
    _, voices = cut(*talk, expected=np.eye(DIM, dtype=np.float32)[1])
    assert len(voices) == 3


def test_nothing_said_is_nobody():
    assert cut() == ([], [])


def test_modes_say_which_channels_are_told_apart():
    def channels(mode, n, turns=None):
        return VoiceCutter(n, VoicesConfig(mode=mode), VadConfig(), turns, embed=embed).channels

    assert [channels("channel", n) for n in (1, 2)] == [set(), set()]
    assert [channels("diarize", n) for n in (1, 2)] == [{0}, {0, 1}]
    assert [channels("auto", n) for n in (1, 2)] == [{0}, set()]
    turns = [Turn(0, 1, "A")]
    assert [channels("channel", n, turns) for n in (1, 2)] == [{0}, set()]
    assert channels("channel", 2, [Turn(0, 1, "A", None, 1)]) == {1}


def test_brought_turns_cut_utterances():
    turns = [Turn(0.0, 2.0, "B"), Turn(2.2, 5.0, "A"), Turn(6.0, 7.0, "B", "customer")]
    pieces, voices = cut(utterance(0.0, (0, 5.0)), utterance(6.0, (0, 1.0)), utterance(9.0, (0, 1.0)), turns=turns)
    assert places(pieces) == [(0, 2.1, 0), (2.1, 5, 1), (6, 7, 0), (9, 10, None)]
    assert [(voice.number, voice.name, voice.role) for voice in voices] == [(0, "B", "customer"), (1, "A", None)]
    assert [piece.margin for piece in pieces] == [1.0, 1.0, 1.0, None]


def test_where_brought_turns_overlap_nobody_is_certain():
    turns = [Turn(0.0, 4.0, "A"), Turn(3.0, 6.0, "B")]
    pieces, _ = cut(utterance(0.0, (0, 6.0)), turns=turns)
    assert [(round(p.start_s), round(p.end_s), p.margin) for p in pieces] == [(0, 3, 1.0), (3, 4, 0.0), (4, 6, 1.0)]


def test_brought_backchannels_leave_the_utterance_whole_and_less_certain():
    turns = [Turn(0.0, 4.0, "A"), Turn(2.0, 2.2, "B")]
    pieces, _ = cut(utterance(0.0, (0, 4.0)), turns=turns)
    assert places(pieces) == [(0, 4, 0)]
    assert 0.5 < (pieces[0].margin or 0.0) < 1.0


@pytest.mark.parametrize(
    ("turns", "n", "message"),
    [
        ([Turn(0, 12, "A")], 1, "reaches to 12.0 s, the recording to 10.0 s"),
        ([Turn(0, 1, "A", None, 2)], 2, "is of channel 2"),
        ([Turn(0, 10.5, "A")], 1, None),
    ],
)
def test_turns_of_another_recording_do_not_fit(turns, n, message):
    misfit = VoiceCutter(n, VoicesConfig(), VadConfig(), turns, embed=embed).misfit(n, 10.0)
    assert misfit is None if message is None else message in misfit


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # A pause between two turns is theirs; what is long is of somebody whom nobody named.
        ([("ann", 0.0, 2.0), ("ben", 2.6, 6.0)], [(0, 2.3, 0), (2.3, 6, 1)]),
        ([("ann", 0.2, 2.0)], [(0, 2, 0), (2, 6, None)]),
        ([("ann", 2.0, 4.0)], [(0, 2, None), (2, 4, 0), (4, 6, None)]),
        ([("ann", 0.0, 1.0), ("ben", 4.0, 6.0)], [(0, 1, 0), (1, 4, None), (4, 6, 1)]),
        ([("ann", 0.0, 1.0), ("ben", 4.9, 5.1)], [(0, 1, 0), (1, 4.9, None), (4.9, 6, None)]),
        ([("ann", 9.0, 10.0)], [(0, 6, None)]),
    ],
)
def test_speech_that_no_turn_covers_is_nobodys(turns, expected):
    given = [Turn(start_s, end_s, name) for name, start_s, end_s in turns]
    pieces, _ = cut(utterance(0, (0, 6.0)), turns=given)
    assert places(pieces) == expected
