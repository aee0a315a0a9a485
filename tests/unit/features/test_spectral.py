import numpy as np
import pytest
from speech_cases import sentence

from vaemo.features import Extractor
from vaemo.features.spectral import LogMel, LongTermSpectrum

EXTRACTORS = [LogMel, LongTermSpectrum]


@pytest.fixture(scope="module")
def utterances():
    rng = np.random.default_rng(0)
    voices = [sentence(i, voice) for i in range(3) for voice in ("en-us+f3", "en-us+m3")]
    return [samples[: int(rng.uniform(0.3, 1.0) * len(samples))] for samples in voices]


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_the_contract(kind, utterances):
    extractor = kind()
    assert isinstance(extractor, Extractor)
    vectors = extractor(utterances)
    assert vectors.shape == (len(utterances), extractor.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(np.concatenate([extractor([samples]) for samples in utterances]), vectors)
    assert extractor([]).shape == (0, extractor.dim)
    assert kind().fingerprint == extractor.fingerprint


@pytest.mark.parametrize("kind", EXTRACTORS)
@pytest.mark.parametrize("n", [1, 399, 400, 560, 961])
def test_any_length_gives_finite_numbers(kind, n):
    samples = np.random.default_rng(n).normal(scale=0.1, size=n).astype(np.float32)
    assert np.isfinite(kind()([samples])).all()


def test_logmel_tells_loudness_and_ltas_does_not(utterances):
    louder = [samples * np.float32(4.0) for samples in utterances]
    mel = LogMel()
    rise = mel(louder)[:, : mel.bands] - mel(utterances)[:, : mel.bands]
    # Four times as loud is 12.04 dB; the floor takes a little of it from the quietest bands.
    assert np.median(rise) == pytest.approx(20 * np.log10(4), abs=0.2)
    spectrum = LongTermSpectrum()
    np.testing.assert_allclose(spectrum(louder), spectrum(utterances), atol=1e-4)


def test_logmel_hears_where_the_energy_is():
    t = np.arange(16000) / 16000
    mel = LogMel()
    low, high = mel([(0.1 * np.sin(2 * np.pi * hz * t)).astype(np.float32) for hz in (200, 4000)])[:, : mel.bands]
    assert low.argmax() < 8 < 25 < high.argmax()


def test_ltas_has_unit_length_and_tells_voices_apart():
    spectrum = LongTermSpectrum()
    first, second = (spectrum([sentence(i, voice) for i in range(5)]) for voice in ("en-us+f3", "en-us+m3"))
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0, atol=1e-6)
    within = min((first @ first.T).min(), (second @ second.T).min())
    across = (first @ second.T).mean()
    assert within > across


def test_silence_around_speech_changes_little(utterances):
    for kind in EXTRACTORS:
        padded = [np.pad(samples, 8000) for samples in utterances]
        # A frame or two at the edges of the speech counts more or less.
        assert np.abs(kind()(padded) - kind()(utterances)).mean() < 0.05 * np.abs(kind()(utterances)).mean()
