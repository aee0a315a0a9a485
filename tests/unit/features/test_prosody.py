import numpy as np
import pytest
from speech_cases import sentence

from vaemo.features import Extractor
from vaemo.features.prosody import FEATURE_SETS, OpenSmile


@pytest.mark.parametrize("name", FEATURE_SETS)
def test_every_set_has_its_dimension(name):
    extractor = OpenSmile(name)
    assert isinstance(extractor, Extractor)
    vectors = extractor([sentence(0, "en-us+f3")])
    assert vectors.shape == (1, extractor.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


def test_it_is_what_opensmile_says_itself():
    import opensmile

    samples = sentence(1, "en-us+m3")
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    expected = smile.process_signal(samples, 16000).to_numpy(np.float32)
    np.testing.assert_array_equal(OpenSmile("egemaps")([samples]), expected)


def test_full_scale_does_not_wrap_round():
    samples = sentence(0, "en-us+f3")
    loud = samples / np.abs(samples).max()
    loud[np.argmax(np.abs(loud))] = 1.0
    beyond = loud.copy()
    beyond[loud == 1.0] = 1.7
    extractor = OpenSmile("egemaps")
    safe = loud.clip(-1, 1 - 2**-15)
    np.testing.assert_array_equal(extractor([loud, beyond]), extractor([safe, safe]))


def test_too_short_is_nan_and_does_not_touch_its_neighbours(recwarn):
    extractor = OpenSmile("egemaps")
    samples = sentence(0, "en-us+f3")
    vectors = extractor([samples, samples[:700], samples])
    assert np.isnan(vectors[1]).all()
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert not [warning for warning in recwarn if "too short" in str(warning.message)]


def test_pitch_is_heard():
    extractor = OpenSmile("egemaps")
    high, low = extractor([sentence(0, "en-us+f3"), sentence(0, "en-us+m3")])[:, 0]
    assert high > low + 3
