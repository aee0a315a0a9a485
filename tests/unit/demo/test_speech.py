"""espeak-ng through ctypes: what it says follows what it is asked, and what it refuses."""

import numpy as np
import pytest

from vaemo.demo.speech import SpeechError, resample, speak, tilt, trim

TEXT = "The parcel weighs four pounds."


def period_hz(samples, sampling_rate):
    """The strongest periodicity between 60 and 400 Hz, by autocorrelation."""
    spectrum = np.fft.rfft(samples, 2 * len(samples))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(samples)]
    low, high = sampling_rate // 400, sampling_rate // 60
    return sampling_rate / (low + int(correlation[low:high].argmax()))


def level_db(samples):
    return 10 * np.log10(np.mean(samples**2))


def test_samples_are_speech_in_range():
    samples, sampling_rate = speak(TEXT, "en-us+f1")
    assert sampling_rate == 22_050
    assert samples.dtype == np.float32
    assert 0.1 < np.abs(samples).max() <= 1
    assert 1 < len(samples) / sampling_rate < 4


def test_rate_pitch_and_volume_do_what_they_say():
    slow, sampling_rate = speak(TEXT, "en-us+m1", rate=120)
    fast, _ = speak(TEXT, "en-us+m1", rate=260)
    assert len(fast) < 0.7 * len(slow)
    low, _ = speak(TEXT, "en-us+m1", pitch=20, pitch_range=0)
    high, _ = speak(TEXT, "en-us+m1", pitch=80, pitch_range=0)
    assert period_hz(high, sampling_rate) > 1.2 * period_hz(low, sampling_rate)
    loud, _ = speak(TEXT, "en-us+m1", volume=100)
    soft, _ = speak(TEXT, "en-us+m1", volume=30)
    assert level_db(loud) - level_db(soft) > 6


def test_a_voice_that_is_not_there_is_refused():
    with pytest.raises(SpeechError, match="espeak-ng has no voice 'xx-nobody'"):
        speak(TEXT, "xx-nobody")


def test_a_text_without_words_is_refused():
    with pytest.raises(SpeechError, match="makes no sound for the text ''"):
        speak("", "en-us+f1")


def test_without_the_extra_it_says_which_to_install(monkeypatch):
    from vaemo.demo import speech

    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(SpeechError, match=r"install the extra: pip install 'vaemo\[demo\]'"):
        speech._Engine()


def test_trim_leaves_what_is_loud():
    silence = np.zeros(1000, np.float32)
    tone = np.sin(np.arange(4000) / 5).astype(np.float32)
    trimmed = trim(np.concatenate([silence, tone, silence]), 16_000)
    # 10 ms on either side stay.
    assert abs(len(trimmed) - 4000 - 320) < 5
    assert len(trim(silence, 16_000)) == 0


@pytest.mark.parametrize("db_per_octave", [-4.0, 3.0])
def test_tilt_raises_each_octave_and_keeps_loudness(db_per_octave):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 1 << 15).astype(np.float32)
    tilted = tilt(noise, 16_000, db_per_octave)
    assert level_db(tilted) == pytest.approx(level_db(noise), abs=0.01)
    hz = np.fft.rfftfreq(len(noise), 1 / 16_000)
    gain = np.abs(np.fft.rfft(tilted)) / np.abs(np.fft.rfft(noise))

    def octave_db(low):
        return 20 * np.log10(np.median(gain[(hz > low) & (hz < 1.02 * low)]))

    for low in (200, 400, 800, 1600, 3200):
        assert octave_db(2 * low) - octave_db(low) == pytest.approx(db_per_octave, abs=0.05)


def test_silence_has_no_tilt():
    silence = np.zeros(500, np.float32)
    np.testing.assert_array_equal(tilt(silence, 16_000, 3.0), silence)


def test_resampling_keeps_a_tone_and_drops_what_does_not_fit():
    at = np.arange(22_050) / 22_050
    tone = np.sin(2 * np.pi * 440 * at).astype(np.float32)
    whistle = np.sin(2 * np.pi * 6_000 * at).astype(np.float32)
    resampled = resample(tone + whistle, 22_050, 8_000)
    assert resampled.shape == (8_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(8_000) / 8_000)
    # float32 samples.
    np.testing.assert_allclose(resampled, expected, atol=1e-5)
