import numpy as np
import pytest
from speech_cases import call, tone

from vaemo.audio.alike import AlikeChannels

SAMPLES, TURNS = call(4, seed=3)
MONO = SAMPLES.sum(axis=0)
HUM = np.stack([tone(len(MONO), 50.0, level_db=-30.0)] * 2)


@pytest.mark.parametrize(
    ("samples", "alike"),
    [
        ((MONO, MONO), {0, 1}),
        ((MONO, MONO / 3), {0, 1}),
        ((MONO, -MONO), {0, 1}),
        ((MONO, np.round(MONO * 127) / 127), {0, 1}),
        ((0 * MONO, MONO, SAMPLES[0], MONO), {1, 3}),
        (SAMPLES, set()),
        (SAMPLES + 0.1 * SAMPLES[::-1], set()),
        (SAMPLES + 0.3 * SAMPLES[::-1], set()),
        (SAMPLES + HUM, set()),
        ((SAMPLES[0], 0 * MONO), set()),
        ((MONO,), set()),
    ],
)
@pytest.mark.parametrize("block", [7000, 10**6])
def test_channels_are_alike_if_they_hold_the_same_voices_at_a_steady_ratio(samples, alike, block):
    samples = np.array(samples, np.float32)
    compared = AlikeChannels()
    for start in range(0, samples.shape[1], block):
        compared.look(samples[:, start : start + block])
    spoken = [(channel, start_s, end_s) for channel in range(len(samples)) for _, start_s, end_s in TURNS]
    assert compared.channels(spoken) == alike
    # Of a copy that is found on one channel alone nothing is said.
    assert compared.channels([place for place in spoken if place[0] == 0]) == set()
