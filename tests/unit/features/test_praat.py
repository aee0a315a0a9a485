import numpy as np
import pytest
from speech_cases import sentence

from vaemo.features.praat import MEASURES, Praat


def measured(*utterances):
    pytest.importorskip("parselmouth")
    return [dict(zip(MEASURES, row, strict=True)) for row in Praat()(list(utterances))]


def test_a_tone_is_measured_as_it_was_made():
    t = np.arange(24000) / 16000
    hz = 150.0
    pulse = sum(np.sin(2 * np.pi * k * hz * t) / k for k in range(1, 20)).astype(np.float32)
    (found,) = measured(0.1 * pulse)
    assert found["f0_mean"] == pytest.approx(12 * np.log2(hz / 27.5), abs=0.05)
    assert found["f0_range"] < 0.1
    assert found["voiced_share"] > 0.95
    assert found["jitter_local"] < 0.01
    assert found["hnr_mean"] > 20


def test_voices_differ_and_a_rising_pitch_rises():
    high, low = measured(sentence(0, "en-us+f3"), sentence(0, "en-us+m3"))
    assert high["f0_mean"] > low["f0_mean"] + 3
    t = np.arange(24000) / 16000
    phase = 2 * np.pi * np.cumsum(120 * 2 ** (t / 1.5 / 2)) / 16000
    (rising,) = measured(0.1 * sum(np.sin(k * phase) / k for k in range(1, 10)).astype(np.float32))
    assert rising["f0_slope"] == pytest.approx(4.0, abs=0.4)


def test_noise_has_no_pitch_and_nothing_is_infinite():
    (found,) = measured(np.random.default_rng(0).normal(scale=0.1, size=16000).astype(np.float32))
    assert found["voiced_share"] < 0.1
    assert np.isfinite(list(found.values())).all()


def test_too_short_is_nan():
    (found,) = measured(np.random.default_rng(0).normal(scale=0.1, size=300).astype(np.float32))
    assert np.isnan(list(found.values())).all()
