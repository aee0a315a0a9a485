"""Utterances cut by voice, with an encoder that hears which of some numbers a window holds."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from vaemo.audio.vad import Utterance
from vaemo.config import VadConfig, VoicesConfig
from vaemo.data.speakers import unit
from vaemo.voices.channels import VoiceCutter
from vaemo.voices.clustering import without
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


@pytest.mark.parametrize(("varied", "expected"), [(0.3, 0.4), (0.8, 0.2)])
def test_what_brings_calm_voices_closer_makes_nobody_less_certain(varied, expected):
    """Two voices with a cosine of 0.8: calm ones count as 0.4 apart, for those who vary as much it stays 0.2."""
    draw = np.random.default_rng(0)

    def close(windows):
        vectors = np.zeros((len(windows), DIM), np.float32)
        vectors[:, 0] = np.sqrt(0.8)
        vectors[np.arange(len(windows)), 1 + (windows[:, 0] > 0.15)] = np.sqrt(0.2)
        noise = draw.normal(size=(len(windows), DIM)) * (np.arange(DIM) > 10)
        return unit(vectors + (varied * unit(noise)).astype(np.float32))

    cutter = VoiceCutter(1, VoicesConfig(mode="diarize"), VadConfig(), embed=close)
    for one in [utterance(20.0 * n, (n % 2, 15.0)) for n in range(6)]:
        cutter.push(one)
    pieces, voices = cutter.finish()
    assert len(voices) == 2
    assert np.mean([piece.margin for piece in pieces]) == pytest.approx(expected, rel=0.25)


def test_an_enrolled_voice_is_told_from_another_where_moods_differ_more_than_voices_do():
    draw = np.random.default_rng(0)
    own, mood = draw.random(60) < 0.5, draw.integers(3, size=60)
    vectors = draw.normal(scale=0.02, size=(60, DIM)).astype(np.float32)
    vectors[np.arange(60), np.where(own, 0, 1)] += 1.0
    vectors[np.arange(60), 10 + mood] += 1.1
    enrolled = unit(vectors[own].mean(axis=0))
    labels = KMeans(2, n_init=10, random_state=0).fit(vectors).labels_ == 1
    assert 0.1 < (labels == own).mean() < 0.9
    np.testing.assert_array_equal(without(unit(vectors), enrolled), ~own)


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
