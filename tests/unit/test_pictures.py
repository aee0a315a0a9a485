"""Pictures are drawn: the right size, something on them, also from little data."""

import numpy as np
import pytest
from picture_cases import look, share_of

from vaemo.drawing import COLOURS
from vaemo.evaluation import pictures
from vaemo.model.settling import ErrorByPosition
from vaemo.units import LabelScale


@pytest.mark.long
@pytest.mark.parametrize("n", [3, 2000])
def test_calibration_and_error_show_both_dimensions(n):
    rng = np.random.default_rng(n)
    label = rng.random((n, 2))
    prediction = np.clip(label + rng.normal(0, 0.1, (n, 2)), 0, 1)
    label[0, 1] = np.nan
    drawn = [
        pictures.calibration(prediction, label, LabelScale(0, 1)),
        pictures.error_over_session(prediction, label, np.arange(n) % 30, "utterance"),
        pictures.label_fed(label, prediction, label, np.arange(n) % 30 / 7, "minutes"),
        pictures.error_by_position(ErrorByPosition.of(prediction, label, np.arange(n) // 30, np.arange(n) % 30)),
    ]
    for png in drawn:
        pixels = look(png)
        assert pixels.shape[1] > 900
        for colour in COLOURS.values():
            assert share_of(pixels, colour) > 1e-4
