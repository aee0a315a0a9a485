import dataclasses
import hashlib
import importlib.util
import itertools
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_cases import at_level, both_talk, call, noise, overlap, sentence, tone

from vaemo.audio.acoustics import simulate_telephone
from vaemo.audio.vad import FRAME, SpeechDetector, UtteranceFinder, detector_weights, speech_detector
from vaemo.config import VadConfig
from vaemo.units import SAMPLING_RATE_HZ

# Rounding grows along the LSTM; decisions stand at 0.5.
PROBABILITY = 1e-3


DISTURBANCES = {
    "offset": lambda n: np.full(n, 0.1, np.float32),
    "offset from the middle on": lambda n: np.where(np.arange(n) < n // 2, 0, 0.2).astype(np.float32),
    "drift": lambda n: np.linspace(-0.3, 0.3, n, dtype=np.float32),
    "hum": lambda n: tone(n, 50.0, level_db=-20.0),
    "hum of 60 Hz": lambda n: tone(n, 60.0, level_db=-10.0),
    "hum and overtones": lambda n: sum(tone(n, 50.0 * k, level_db=-20 - 6 * np.log2(k)) for k in range(1, 9)),
    "hum that swells": lambda n: at_level((1 + 0.9 * np.sin(np.arange(n) / 3000)) * tone(n, 120.0), -15.0),
    "rumble": lambda n: noise(n, 3, 120, -15.0),
    "whine": lambda n: tone(n, 4500.0, level_db=-15.0),
    "tone": lambda n: tone(n, 1000.0, level_db=-20.0),
    "hiss": lambda n: noise(n, 0, 8000, -30.0),
    "high hiss": lambda n: noise(n, 5000, 8000, -20.0),
    "clicks": lambda n: (np.arange(n) % 11_000 == 0).astype(np.float32),
}
"""What a channel may hold beside speech, (n,)."""


def find_utterances(samples, config):
    """The utterances of a whole recording, by start and channel."""
    finder = UtteranceFinder(len(samples), config)
    found = [*finder.push(samples), *finder.finish()]
    return sorted(found, key=lambda utterance: (utterance.start_s, utterance.channel))


def spans(utterances):
    return [(utterance.channel, utterance.start_s, utterance.end_s) for utterance in utterances]


@pytest.fixture(scope="module")
def original():
    """The model of the package silero-vad, and its file."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None:
        pytest.skip("silero-vad, where the weights come from, is not installed")
    file = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.load(file), file


def test_the_detector_gives_the_originals_probabilities(original):
    samples, _ = call(4, seed=1)
    n = samples.shape[1] // FRAME * FRAME
    signal = torch.from_numpy(samples[:, :n])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        frames = [original[0](frame.contiguous(), SAMPLING_RATE_HZ) for frame in signal.split(FRAME, dim=1)]
    found, _, _ = SpeechDetector()(torch.nn.functional.pad(signal, (64, 0)))
    torch.testing.assert_close(found, torch.cat(frames, 1), atol=PROBABILITY, rtol=0)
    assert found.max() > 0.9
    assert found.min() < 0.1


def test_the_weights_are_the_originals_and_their_notice_says_so(original):
    tensors = {name.removeprefix("_model."): value for name, value in original[0].state_dict().items()}
    weights = detector_weights()
    assert weights.keys() == {name for name in tensors if not name.startswith("_model_8k.")}
    assert all(torch.equal(weights[name], tensors[name]) for name in weights)
    notice = (resources.files("vaemo.audio") / "weights" / "NOTICE.silero-vad").read_text()
    assert hashlib.sha256(original[1].read_bytes()).hexdigest() in notice
    assert "MIT License" in notice


def level_db(samples):
    """Levels of the speech band that the detector gives, in dB, (F,), without the first and the last frame."""
    _, levels, _ = speech_detector()(torch.nn.functional.pad(torch.from_numpy(samples[None]), (64, 0)))
    return 10 * levels[0, 1:-1].log10().numpy()


def test_levels_are_those_of_the_speech_band():
    n = 20 * FRAME
    for hz in (300.0, 500.0, 1234.0, 3300.0):
        assert level_db(tone(n, hz, level_db=-30.0)) == pytest.approx(-30, abs=0.5)
    assert level_db(noise(n, 0, 8000, -20.0)).mean() == pytest.approx(-20 + 10 * np.log10(3200 / 8000), abs=0.5)
    assert level_db(np.full(n, 0.5, np.float32)).max() < -100
    for hz in (5.0, 50.0, 60.0, 7000.0):
        assert level_db(tone(n, hz, level_db=-20.0)).max() < -50


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
    samples, _ = both_talk(3, seed=4)
    samples[1] += DISTURBANCES["offset from the middle on"](samples.shape[1])
    samples[0, 50_000:50_300] = np.nan
    config = dataclasses.replace(VadConfig(), max_utterance_s=2.5)
    whole = find_utterances(samples, config)
    finder = UtteranceFinder(2, config)
    found = []
    for start in range(0, samples.shape[1], block):
        found += finder.push(samples[:, start : start + block])
    found = sorted([*found, *finder.finish()], key=lambda utterance: (utterance.start_s, utterance.channel))
    assert spans(found) == spans(whole)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


@pytest.mark.long
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


@pytest.mark.parametrize("disturbed", ["nothing", "offset", "hum"])
def test_long_speech_is_cut_where_it_is_quiet(disturbed):
    speech = np.concatenate([at_level(sentence(i, "en-us+f3"), -30.0) for i in range(6)] * 2)[None]
    n = speech.shape[1]
    config = dataclasses.replace(VadConfig(), max_utterance_s=6.0, join_gap_s=0.5)
    disturbance = DISTURBANCES[disturbed](n) if disturbed != "nothing" else np.zeros(n, np.float32)
    found = find_utterances(speech + disturbance, config)
    lengths = [utterance.end_s - utterance.start_s for utterance in found]
    assert len(found) > 5
    assert max(lengths) <= 6.0
    recall, _ = overlap(spans(found), [(0, 0.0, n / SAMPLING_RATE_HZ)], 1)
    assert recall > 0.9
    cuts = [b.start_s for a, b in itertools.pairwise(found) if a.end_s == b.start_s]
    levels = [np.abs(speech[0, int(s * 16000) - 800 : int(s * 16000) + 800]).mean() for s in cuts]
    assert cuts
    assert np.mean(levels) < 0.25 * np.abs(speech).mean()


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


def leaking(samples, db, delay_s=0.02, low_hz=0.0, high_hz=8000.0):
    """What each channel hears of the other: a band of it, so much quieter and a little later."""
    delay = int(delay_s * SAMPLING_RATE_HZ)
    n = samples.shape[1]
    hz = np.fft.rfftfreq(n, 1 / SAMPLING_RATE_HZ)
    band = np.fft.irfft(np.where((hz >= low_hz) & (hz <= high_hz), np.fft.rfft(samples[::-1]), 0), n)
    band *= np.sqrt((samples[::-1] ** 2).sum(axis=1) / (band**2).sum(axis=1))[:, None]
    echo = np.pad(band, ((0, 0), (delay, 0)))[:, :n]
    return (samples + 10 ** (-db / 20) * echo).astype(np.float32)


@pytest.mark.parametrize(
    ("db", "band"),
    [(18.0, {}), (25.0, {}), (35.0, {}), *((20.0, {"low_hz": a, "high_hz": b}) for a, b in ((300, 3400), (0, 1000)))],
)
def test_crosstalk_is_no_utterance(db, band):
    samples, spoken = call(6, seed=6)
    recall, precision = overlap(spans(find_utterances(leaking(samples, db, **band), VadConfig())), spoken)
    assert recall >= 0.95
    assert precision >= 0.9


@pytest.mark.parametrize("disturbed", ["offset", "hum", "rumble"])
def test_crosstalk_is_no_utterance_on_a_channel_with_hum_either(disturbed):
    samples, spoken = call(6, seed=6)
    heard = leaking(samples, 20.0)
    heard[1] += DISTURBANCES[disturbed](samples.shape[1])
    recall, precision = overlap(spans(find_utterances(heard, VadConfig())), spoken)
    assert recall >= 0.95
    assert precision >= 0.9


@pytest.mark.parametrize("disturbed", list(DISTURBANCES))
def test_what_disturbs_one_channel_costs_the_other_nothing(disturbed):
    samples, spoken = both_talk(5, seed=1)
    samples[1] += DISTURBANCES[disturbed](samples.shape[1])
    found = [span for span in spans(find_utterances(samples, VadConfig())) if span[0] == 0]
    assert overlap(found, [span for span in spoken if span[0] == 0], 1)[0] > 0.97


def test_nan_is_silence_to_the_detector_and_stays_in_its_utterance():
    samples, _ = call(4, seed=3)
    whole = find_utterances(samples, VadConfig())
    first, second, *rest = whole
    at = {u.channel: round((u.start_s + u.end_s) / 2 * SAMPLING_RATE_HZ) for u in (first, second)}
    heard = samples.copy()
    heard[first.channel, at[first.channel] : at[first.channel] + 300] = np.nan
    heard[second.channel, at[second.channel]] = np.inf
    heard[:, round((rest[0].end_s + 0.05) * SAMPLING_RATE_HZ) :][:, :2000] = [[3e38], [-np.inf]]
    found = find_utterances(heard, VadConfig())
    assert [span[0] for span in spans(found)] == [span[0] for span in spans(whole)]
    np.testing.assert_allclose(spans(found), spans(whole), atol=1.01 * FRAME / SAMPLING_RATE_HZ)
    assert [int((~np.isfinite(u.samples)).sum()) for u in found] == [300, 1, 0, 0]


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


def gated(on_s, off_s, *hz, level_db=-15.0):
    n = round(on_s * SAMPLING_RATE_HZ)
    ramp = np.clip(np.minimum(np.arange(n), np.arange(n)[::-1]) / 80, 0, 1)
    return np.concatenate([ramp * tone(n, *hz, level_db=level_db), np.zeros(round(off_s * SAMPLING_RATE_HZ))])


def fax():
    """Calling tone, answering tone, and the 300 bits per second that follow."""
    bits = np.repeat(np.random.default_rng(0).integers(0, 2, 900), SAMPLING_RATE_HZ // 300)
    shifted = 0.2 * np.sin(2 * np.pi * np.cumsum(np.where(bits, 1650, 1850)) / SAMPLING_RATE_HZ)
    return np.concatenate([gated(0.5, 3, 1100), gated(0.5, 3, 1100), gated(3, 0.1, 2100), shifted])


def hold_music(seconds=20, seed=0):
    """A tune over chords: plucked notes with overtones."""
    rng = np.random.default_rng(seed)
    music = np.zeros((seconds + 2) * SAMPLING_RATE_HZ)
    t = np.arange(2 * SAMPLING_RATE_HZ) / SAMPLING_RATE_HZ
    for beat in np.arange(0, seconds, 0.3):
        chord = (-12, -8, -5) if beat % 1.8 < 0.3 else ()
        for step in (rng.choice([0, 2, 4, 5, 7, 9, 11, 12]), *chord):
            hz = 261.6 * 2 ** (step / 12)
            note = np.exp(-2 * t) * (1 - np.exp(-80 * t)) * sum(np.sin(2 * np.pi * k * hz * t) / k for k in range(1, 7))
            music[round(beat * SAMPLING_RATE_HZ) :][: len(t)] += 0.1 * note
    return music


SIGNALS = {
    "ringback": lambda: np.tile(gated(1, 2, 425), 3),
    "ringback of two tones": lambda: np.tile(gated(2, 2, 440, 480), 3),
    "busy": lambda: np.tile(gated(0.5, 0.5, 480, 620), 10),
    "dial tone": lambda: gated(10, 0, 350, 440),
    "keys": lambda: np.concatenate([gated(0.1, 0.1, *f) for f in ((697, 1209), (770, 1336), (941, 1477)) * 10]),
    "intercept": lambda: np.tile(np.concatenate([gated(0.33, 0, f) for f in (985, 1428, 1776)]), 5),
    "fax": fax,
    "music": hold_music,
    "beeps": lambda: np.concatenate([gated(seconds, 1, 1000) for seconds in (0.2, 1, 3, 10)]),
    "faint beeps": lambda: np.tile(gated(2, 1, 1000, level_db=-35), 4),
    "loud beeps": lambda: np.tile(gated(2, 1, 1000, level_db=-4), 4),
}


@pytest.mark.parametrize("telephone", [False, True])
@pytest.mark.parametrize("signal", list(SIGNALS))
def test_signals_and_music_are_no_speech(signal, telephone):
    samples = np.pad(SIGNALS[signal](), 8000)
    samples = (samples + np.random.default_rng(0).normal(scale=2e-4, size=len(samples))).astype(np.float32)
    heard = simulate_telephone(samples) if telephone else samples
    assert find_utterances(heard[None], VadConfig()) == []


@pytest.mark.parametrize("telephone", [False, True])
@pytest.mark.parametrize("redaction", ["beep", "silence"])
def test_what_redaction_leaves_is_no_speech_and_the_rest_is_heard(redaction, telephone):
    samples, spoken = call(8, seed=3)
    first_s, last_s = np.arange(3.0, samples.shape[1] / SAMPLING_RATE_HZ - 3.0, 15.0), 3.0
    for start_s in first_s:
        n = int(last_s * SAMPLING_RATE_HZ)
        put = gated(last_s, 0, 1000) if redaction == "beep" else np.zeros(n)
        samples[:, int(start_s * SAMPLING_RATE_HZ) :][:, :n] = put
    if telephone:
        samples = np.stack([simulate_telephone(channel) for channel in samples])
    found = spans(find_utterances(samples, VadConfig()))
    left = []
    for channel, start_s, end_s in spoken:
        inside = [(max(s, start_s), min(s + last_s, end_s)) for s in first_s if s < end_s and s + last_s > start_s]
        edges = [start_s, *itertools.chain(*inside), end_s]
        left += [(channel, a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    recall, precision = overlap(found, left)
    assert recall >= 0.95
    assert precision >= 0.9
