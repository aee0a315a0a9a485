"""Pictures are drawn: the right size, something on them, also from little data."""

import io

import matplotlib.image
import numpy as np
import pytest

from vaemo.evaluation import pictures
from vaemo.units import LabelScale


def look(png):
    """The picture's pixels, (height, width, 3); all pictures have a white ground."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert pixels[0, 0] == pytest.approx(1.0)
    return pixels


def share_of(pixels, colour):
    """The share of pixels near a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(pixels - wanted).max(axis=-1) < 0.05).mean()


@pytest.mark.parametrize("n", [3, 2000])
def test_calibration_and_error_show_both_dimensions(n):
    rng = np.random.default_rng(n)
    label = rng.random((n, 2))
    prediction = np.clip(label + rng.normal(0, 0.1, (n, 2)), 0, 1)
    label[0, 1] = np.nan
    drawn = [
        pictures.calibration(prediction, label, LabelScale(0, 1)),
        pictures.error_over_session(prediction, label, np.arange(n) % 30),
    ]
    for png in drawn:
        pixels = look(png)
        assert pixels.shape[1] > 900
        for colour in pictures.COLOURS.values():
            assert share_of(pixels, colour) > 1e-4
