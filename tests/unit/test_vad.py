import dataclasses
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_cases import call, overlap, sentence

from vaemo.audio.acoustics import simulate_telephone
from vaemo.audio.vad import FRAME, SpeechDetector, UtteranceFinder
from vaemo.config import VadConfig
from vaemo.units import SAMPLING_RATE_HZ

# Rounding grows along the LSTM; decisions stand at 0.5.
PROBABILITY = 1e-3


def find_utterances(samples, config):
    """The utterances of a whole recording, by start and channel."""
    finder = UtteranceFinder(len(samples), config)
    found = [*finder.push(samples), *finder.finish()]
    return sorted(found, key=lambda utterance: (utterance.start_s, utterance.channel))


def spans(utterances):
    return [(utterance.channel, utterance.start_s, utterance.end_s) for utterance in utterances]


def test_the_detector_gives_the_packaged_models_probabilities():
    samples, _ = call(4, seed=1)
    n = samples.shape[1] // FRAME * FRAME
    folder = Path(importlib.util.find_spec("silero_vad").submodule_search_locations[0])
    packaged = torch.jit.load(folder / "data" / "silero_vad.jit")
    signal = torch.from_numpy(samples[:, :n])
    with torch.no_grad():
        expected = torch.cat(
            [packaged(frame.contiguous(), SAMPLING_RATE_HZ) for frame in signal.split(FRAME, dim=1)], 1
        )
    found, _ = SpeechDetector()(torch.nn.functional.pad(signal, (64, 0)))
    torch.testing.assert_close(found, expected, atol=PROBABILITY, rtol=0)
    assert found.max() > 0.9
    assert found.min() < 0.1


@pytest.mark.parametrize("telephone", [False, True])
def test_speech_is_found_and_little_else(telephone):
    samples, spoken = call(8, seed=2)
    if telephone:
        samples = np.stack([simulate_telephone(channel) for channel in samples])
    found = find_utterances(samples, VadConfig())
    recall, precision = overlap(spans(found), spoken)
    assert recall >= 0.95
    assert precision >= 0.9


def test_utterances_carry_their_own_samples_and_do_not_overlap():
    samples, _ = call(6, seed=3)
    found = find_utterances(samples, VadConfig())
    for utterance in found:
        first = round(utterance.start_s * SAMPLING_RATE_HZ)
        np.testing.assert_array_equal(
            utterance.samples, samples[utterance.channel, first : first + len(utterance.samples)]
        )
        assert len(utterance.samples) == round((utterance.end_s - utterance.start_s) * SAMPLING_RATE_HZ)
    for channel in (0, 1):
        mine = [utterance for utterance in found if utterance.channel == channel]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(mine))


@pytest.mark.parametrize("block", [320, 4001, 100_000])
def test_blocks_of_any_size_give_the_same_utterances(block):
    samples, _ = call(5, seed=4)
    whole = find_utterances(samples, VadConfig())
    finder = UtteranceFinder(2, VadConfig())
    found = []
    for start in range(0, samples.shape[1], block):
        found += finder.push(samples[:, start : start + block])
    found = sorted([*found, *finder.finish()], key=lambda utterance: (utterance.start_s, utterance.channel))
    assert spans(found) == spans(whole)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


def test_memory_does_not_grow_with_the_recording():
    samples, _ = call(3, seed=5)
    finder = UtteranceFinder(2, VadConfig())
    held = []
    for _ in range(20):
        for start in range(0, samples.shape[1], 8000):
            finder.push(samples[:, start : start + 8000])
        held.append(finder._held.shape[1])
    assert max(held[10:]) <= max(held[:10])
    assert max(held) < 40 * SAMPLING_RATE_HZ


def test_long_speech_is_cut_where_it_is_quiet():
    speech = np.concatenate([sentence(i, "en-us+f3") for i in range(6)] * 2)[None]
    config = dataclasses.replace(VadConfig(), max_utterance_s=6.0, join_gap_s=0.5)
    found = find_utterances(speech, config)
    lengths = [utterance.end_s - utterance.start_s for utterance in found]
    assert len(found) > 5
    assert max(lengths) <= 6.0
    recall, _ = overlap(spans(found), [(0, 0.0, speech.shape[1] / SAMPLING_RATE_HZ)], 1)
    assert recall > 0.9
    cuts = [b.start_s for a, b in itertools.pairwise(found) if a.end_s == b.start_s]
    levels = [np.abs(speech[0, int(s * 16000) - 800 : int(s * 16000) + 800]).mean() for s in cuts]
    assert cuts
    assert np.mean(levels) < 0.5 * np.abs(speech).mean()


def test_pauses_are_joined_and_scraps_dropped():
    parts = [sentence(0, "en-us+m3"), np.zeros(3200, np.float32), sentence(1, "en-us+m3")]
    joined = np.concatenate([np.zeros(8000, np.float32), *parts, np.zeros(16000, np.float32)])[None]
    assert len(find_utterances(joined, dataclasses.replace(VadConfig(), join_gap_s=0.6))) == 1
    apart = find_utterances(joined, dataclasses.replace(VadConfig(), join_gap_s=0.06))
    assert len(apart) >= 2
    shortest = max(u.end_s - u.start_s for u in apart)
    dropped = find_utterances(joined, dataclasses.replace(VadConfig(), join_gap_s=0.06, min_utterance_s=shortest + 0.1))
    assert dropped == []


def test_padding_stays_inside_the_recording():
    speech = sentence(2, "en-us+f3")[None]
    found = find_utterances(speech, dataclasses.replace(VadConfig(), pad_s=2.0, join_gap_s=2.0))
    assert found[0].start_s == 0.0
    assert found[-1].end_s == pytest.approx(speech.shape[1] / SAMPLING_RATE_HZ)


def leaking(samples, db, delay_s=0.02):
    """What each channel hears of the other, so much quieter and a little later."""
    delay = int(delay_s * SAMPLING_RATE_HZ)
    echo = np.pad(samples[::-1], ((0, 0), (delay, 0)))[:, : samples.shape[1]]
    return samples + 10 ** (-db / 20) * echo


@pytest.mark.parametrize("db", [18.0, 25.0, 35.0])
def test_crosstalk_is_no_utterance(db):
    samples, spoken = call(8, seed=6)
    recall, precision = overlap(spans(find_utterances(leaking(samples, db), VadConfig())), spoken)
    assert recall >= 0.95
    assert precision >= 0.9


def test_crosstalk_is_kept_where_it_is_asked_for():
    samples, spoken = call(6, seed=7)
    found = find_utterances(leaking(samples, 18.0), dataclasses.replace(VadConfig(), crosstalk_db=0.0))
    assert overlap(spans(found), spoken)[1] < 0.7


def test_two_who_speak_at_once_are_both_heard():
    one, other = sentence(0, "en-us+f3"), sentence(1, "en-us+m3")
    n = max(len(one), len(other)) + 16000
    samples = np.random.default_rng(0).normal(scale=2e-4, size=(2, n)).astype(np.float32)
    samples[0, 8000 : 8000 + len(one)] += one
    samples[1, 8000 : 8000 + len(other)] += 0.5 * other
    spoken = [(0, 0.5, 0.5 + len(one) / 16000), (1, 0.5, 0.5 + len(other) / 16000)]
    assert overlap(spans(find_utterances(samples, VadConfig())), spoken)[0] > 0.9


def test_silence_and_noise_hold_no_utterance():
    rng = np.random.default_rng(8)
    assert find_utterances(np.zeros((1, 64000), np.float32), VadConfig()) == []
    assert find_utterances(rng.normal(scale=0.05, size=(1, 160000)).astype(np.float32), VadConfig()) == []
    assert find_utterances(np.zeros((1, 0), np.float32), VadConfig()) == []
