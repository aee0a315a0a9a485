"""Label scales map linearly and back."""

import numpy as np
import pytest

from vaemo.units import LabelScale


def test_maps_there_and_back():
    native, model = LabelScale(1, 7), LabelScale(-1, 1)
    values = np.random.default_rng(0).uniform(1, 7, 100)
    mapped = native.to(model, values)
    np.testing.assert_allclose(model.to(native, mapped), values, atol=1e-12)
    assert native.to(model, 1.0) == -1
    assert native.to(model, 7.0) == 1
    assert (native.middle, native.width) == (4, 6)


@pytest.mark.parametrize(("value", "inside"), [(1, True), (7, True), (0.999, False), (7.1, False)])
def test_contains(value, inside):
    assert LabelScale(1, 7).contains(value) is inside
