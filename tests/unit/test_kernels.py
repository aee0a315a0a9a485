"""Resampling and mel filters against their definitions, and to the bit against torchaudio where that is installed."""

import numpy as np
import pytest
import torch

from vaemo.audio.recording import Resampler
from vaemo.audio.sinc import resample
from vaemo.features.spectral import mel_filters
from vaemo.units import SAMPLING_RATE_HZ

RATES = [(8000, 16000), (44100, 16000), (48000, 16000), (16000, 8000), (11025, 16000), (192000, 16000), (997, 1000)]
DEFINITION = 1e-4  # of samples within [-1, 1]: phases are rounded to float32


def torchaudio():
    try:
        import torchaudio
    except (ImportError, OSError) as error:  # its wheel cannot be loaded beside a torch of another build
        pytest.skip(f"torchaudio, what this is compared with, cannot be imported: {error}")
    return torchaudio


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))


@pytest.mark.parametrize("zeros", [6, 16])
@pytest.mark.parametrize(("old", "new"), RATES)
def test_samples_are_sums_over_a_windowed_sinc(old, new, zeros):
    samples = noise(700)
    cutoff = 0.99 * min(1.0, new / old)  # of the old Nyquist frequency
    at = np.arange(-(-700 * new // old)) * old / new
    t = (at[:, None] - np.arange(700)) * cutoff
    weights = cutoff * np.sinc(t) * np.where(np.abs(t) < zeros, np.cos(np.pi * t / (2 * zeros)) ** 2, 0)
    np.testing.assert_allclose(resample(samples, old, new, zeros), weights @ samples.numpy(), atol=DEFINITION)


@pytest.mark.parametrize(("old", "new"), RATES)
@pytest.mark.parametrize("shape", [(2, 3001), (1,), (3, 2, 160)])
def test_samples_are_those_of_torchaudio(old, new, shape):
    samples = noise(*shape)
    for zeros in (6, 16):
        expected = torchaudio().transforms.Resample(old, new, lowpass_filter_width=zeros)(samples)
        assert torch.equal(resample(samples, old, new, zeros), expected)


def test_equal_rates_change_nothing_and_no_sample_is_none():
    samples = noise(2, 100)
    assert torch.equal(resample(samples, 16000, 16000), samples)
    assert resample(samples[:, :0], 8000, 16000).shape == (2, 0)
    assert Resampler(1, 1).between(samples[0].numpy()).tolist() == samples[0].tolist()


@pytest.mark.parametrize("bands", [40, 64])
def test_mel_filters_are_triangles_between_points_of_the_htk_scale(bands):
    mel = np.linspace(*(2595 * np.log10(1 + np.array([20.0, 8000.0]) / 700)), bands + 2)
    points = 700 * (10 ** (mel / 2595) - 1)
    hz = np.linspace(0, SAMPLING_RATE_HZ / 2, 257)
    expected = np.stack([np.interp(hz, points[i : i + 3], [0, 1, 0]) for i in range(bands)], 1)
    np.testing.assert_allclose(mel_filters(bands), expected, atol=5e-5)  # the points are float32


@pytest.mark.parametrize("bands", [40, 64])
def test_mel_filters_are_those_of_torchaudio(bands):
    expected = torchaudio().functional.melscale_fbanks(257, 20.0, 8000.0, bands, 16000, norm=None, mel_scale="htk")
    assert torch.equal(mel_filters(bands), expected)
