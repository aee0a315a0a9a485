"""What is on a picture, told from its pixels."""

import io

import matplotlib.image
import numpy as np
import pytest


def look(png):
    """The picture's pixels, (height, width, 3); all pictures have a white ground."""
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert pixels[0, 0] == pytest.approx(1.0)
    return pixels


def share_of(pixels, colour):
    """The share of pixels near a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(pixels - wanted).max(axis=-1) < 0.05).mean()
