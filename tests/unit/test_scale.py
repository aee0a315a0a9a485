import numpy as np
import pytest

from vaemo.audio.scale import LOUDEST, Scale

SPEECH = np.random.default_rng(0).normal(scale=0.05, size=20_000).astype(np.float32)


@pytest.mark.parametrize(
    ("full", "remedy"),
    [
        (2**15, "on the int16 scale, it seems: divide by 32768"),
        (2**23, "on the 24-bit scale, it seems: divide by 8388608"),
        (2**31, "on the int32 scale, it seems: divide by 2147483648"),
        (2**50, "on no scale that is known"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_another_scale_is_named_with_the_remedy(full, remedy, dtype):
    scale = Scale()
    scale.take(SPEECH.astype(dtype) * full)
    assert f"{scale.n_beyond} of 20000 samples exceed 4 in magnitude" in scale.mistake
    assert scale.mistake.endswith(remedy)


def test_one_in_a_thousand_is_clipped_and_more_are_a_mistake():
    samples = SPEECH.copy()
    samples[:20] = [1e30, -1e30] * 10
    scale = Scale()
    taken = scale.take(samples)
    assert scale.mistake is None
    assert np.array_equal(taken[:2], [LOUDEST, -LOUDEST])
    assert np.array_equal(taken[20:], SPEECH[20:])
    assert samples[0] == np.float32(1e30), "the caller's array stays as it is"
    samples[20] = 5.0
    scale = Scale()
    scale.take(samples)
    assert scale.mistake.startswith("21 of 20000 samples exceed 4 in magnitude, the largest is 1e+30")


def test_blocks_count_together():
    whole, parts = Scale(), Scale()
    samples = SPEECH.copy()
    samples[15_000:15_030] = 7.0
    whole.take(samples)
    for start in range(0, len(samples), 160):
        parts.take(samples[None, start : start + 160])
        if start < 14_800:
            assert parts.mistake is None
    assert parts.mistake == whole.mistake
    assert parts.mistake.startswith("30 of 20000")


def test_few_samples_may_hold_one_that_strays_or_as_many_as_more_would():
    for n_least, allowed in ((1000, 1), (16_000, 16)):
        for n_beyond in (allowed, allowed + 1):
            scale = Scale(n_least)
            scale.take(np.r_[np.full(n_beyond, 1e6), np.zeros(160)])
            assert (scale.mistake is None) == (n_beyond == allowed)


def test_what_is_loud_but_sound_stays_and_so_does_what_is_no_number():
    hot = (40 * SPEECH).clip(-LOUDEST, LOUDEST)
    broken = SPEECH.copy()
    broken[:5000], broken[5000:9000] = np.nan, -np.inf
    for samples in (hot, broken, SPEECH[:0], np.float32([[9.0]])):
        scale = Scale()
        taken = scale.take(samples)
        assert scale.mistake is None
        assert taken.dtype == samples.dtype
        np.testing.assert_array_equal(taken, samples.clip(-LOUDEST, LOUDEST) if samples.size == 1 else samples)
