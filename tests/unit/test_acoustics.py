import numpy as np
import pytest
from speech_cases import sentence

from vaemo.audio.acoustics import require_usable, simulate_telephone, sound_of
from vaemo.audio.recording import AudioProblem

NOISE = np.random.default_rng(0).normal(scale=0.1, size=16000).astype(np.float32)


def test_what_cannot_be_used_has_a_status():
    require_usable(NOISE, 0.1)
    with pytest.raises(AudioProblem, match="nan_audio: 2 of 16000 samples are NaN or infinite"):
        require_usable(np.r_[NOISE[:-2], np.float32([np.nan, np.inf])], 0.1)
    with pytest.raises(AudioProblem, match=r"too_short: it lasts 0.050 s; 0.1 s are needed"):
        require_usable(NOISE[:800], 0.1)
    with pytest.raises(AudioProblem, match=r"too_short: it lasts 0.000 s"):
        require_usable(NOISE[:0], 0.1)
    with pytest.raises(AudioProblem, match="silent: its level is -200 dB of full scale"):
        require_usable(np.zeros(16000, np.float32), 0.1)
    with pytest.raises(AudioProblem, match="silent"):
        require_usable(np.full(16000, 0.5, np.float32), 0.1)


def test_bandwidth_is_where_speech_ends():
    for voice in ("en-us+f3", "en-us+m3"):
        samples = sentence(0, voice)
        assert sound_of(samples).bandwidth_hz > 6000
        assert 3400 <= sound_of(simulate_telephone(samples)).bandwidth_hz <= 4500


@pytest.mark.parametrize("cutoff_hz", [1000.0, 2500.0, 5500.0])
def test_bandwidth_of_filtered_noise(cutoff_hz):
    spectrum = np.fft.rfft(NOISE)
    spectrum[np.fft.rfftfreq(16000, 1 / 16000) > cutoff_hz] = 0
    assert sound_of(np.fft.irfft(spectrum, 16000)).bandwidth_hz == pytest.approx(cutoff_hz, abs=300)
    assert sound_of(NOISE[:100]).bandwidth_hz > 7000


def test_level_and_noise_are_heard_and_do_not_hang_together():
    samples = np.concatenate([sentence(0, "en-us+f3"), np.zeros(4000, np.float32)])
    power = np.mean(samples**2)
    noise = np.random.default_rng(1).normal(size=len(samples)).astype(np.float32) * np.sqrt(power)
    found = [sound_of(samples + 10 ** (-snr_db / 20) * noise) for snr_db in (30, 20, 10)]
    for wanted, sound in zip((30, 20, 10), found, strict=True):
        assert sound.snr_db == pytest.approx(wanted, abs=3)
    assert sound_of(samples).snr_db > 40
    louder, heard = sound_of(2 * samples), sound_of(samples)
    assert louder.level_db - heard.level_db == pytest.approx(20 * np.log10(2))
    assert heard.level_db == pytest.approx(10 * np.log10(power))
    assert louder.snr_db == pytest.approx(heard.snr_db, abs=1e-3)


def test_a_telephone_keeps_the_band_below_4_khz_and_adds_the_noise_of_8_bits():
    samples = sentence(1, "en-us+m3")
    heard = simulate_telephone(samples)
    assert heard.shape == samples.shape
    assert heard.dtype == np.float32
    hz = np.fft.rfftfreq(len(samples), 1 / 16000)
    error = np.abs(np.fft.rfft(heard - samples)) ** 2
    power = np.abs(np.fft.rfft(samples)) ** 2
    band = (hz > 200) & (hz < 3400)
    snr_db = 10 * np.log10(power[band].sum() / error[band].sum())
    # G.711 has about 38 dB on speech.
    assert 30 < snr_db < 45
    assert (np.abs(np.fft.rfft(heard)) ** 2)[hz > 4400].sum() < 1e-4 * power.sum()
