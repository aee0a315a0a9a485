import io

import av
import numpy as np
import pytest
from speech_cases import call, tone

from vaemo.audio.alike import AlikeChannels
from vaemo.units import SAMPLING_RATE_HZ

SAMPLES, TURNS = call(4, seed=3)
MONO = SAMPLES.sum(axis=0)
HUM = np.stack([tone(len(MONO), 50.0, level_db=-30.0)] * 2)


NOISE = np.random.default_rng(1).normal(size=SAMPLES.shape).astype(np.float32)


def later(samples, delay_s):
    """The same with silence before it, as long as it was."""
    return np.pad(samples, (round(delay_s * SAMPLING_RATE_HZ), 0))[: len(samples)]


def echoed(level_db, delay_s):
    """A call in which each channel has the echo of the other."""
    return [own + 10 ** (level_db / 20) * later(other, delay_s) for own, other in (SAMPLES, SAMPLES[::-1])]


def coded(samples, bit_rate):
    """What Opus at so many bits per second leaves."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as target:
        stream = target.add_stream("libopus", rate=16000, layout="mono")
        stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate = 16000
        fifo = av.AudioFifo()
        fifo.write(frame)
        while (block := fifo.read(stream.codec_context.frame_size or 320, partial=True)) is not None:
            target.mux(stream.encode(block))
        target.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as source:
        resampler = av.AudioResampler("flt", "mono", 16000)
        found = np.concatenate(
            [part.to_ndarray()[0] for frame in source.decode(audio=0) for part in resampler.resample(frame)]
        )
    return np.pad(found, (0, len(samples)))[: len(samples)]


@pytest.mark.parametrize(
    ("samples", "alike"),
    [
        ((MONO, MONO), [[0, 1]]),
        ((MONO, MONO / 3), [[0, 1]]),
        ((MONO, -MONO), [[0, 1]]),
        ((MONO, np.round(MONO * 127) / 127), [[0, 1]]),
        *(((MONO, later(MONO, delay_s)), [[0, 1]]) for delay_s in (1 / 16000, 0.001, 0.02, 0.2)),
        ((later(MONO, 0.03), -0.6 * MONO), [[0, 1]]),
        ((MONO, MONO + NOISE[0] * MONO.std() / 10), [[0, 1]]),
        ((MONO, coded(MONO, 12_000)), [[0, 1]]),
        ((later(coded(MONO, 16_000), 0.05), coded(MONO, 12_000)), [[0, 1]]),
        ((0 * MONO, MONO, SAMPLES[0], MONO), [[1, 3]]),
        ((*SAMPLES, *SAMPLES), [[0, 2], [1, 3]]),
        ((MONO, MONO, -MONO), [[0, 1, 2]]),
        (SAMPLES, []),
        (SAMPLES + 0.1 * SAMPLES[::-1], []),
        (SAMPLES + 0.3 * SAMPLES[::-1], []),
        *((echoed(level_db, delay_s), []) for level_db in (-6, -10, -20) for delay_s in (0.0, 0.001, 0.04, 0.2)),
        # One person speaks, and comes back as an echo.
        *(((SAMPLES[0], NOISE[1] / 1000 + 0.3 * later(SAMPLES[0], delay_s)), []) for delay_s in (1 / 8000, 0.04)),
        (SAMPLES + HUM, []),
        ((SAMPLES[0], 0 * MONO), []),
        ((MONO,), []),
    ],
)
@pytest.mark.parametrize("block", [7000, 10**6])
def test_channels_are_alike_if_they_hold_the_same_voices_at_a_steady_ratio(samples, alike, block):
    samples = np.array(samples, np.float32)
    compared = AlikeChannels()
    for start in range(0, samples.shape[1], block):
        compared.look(samples[:, start : start + block])
    spoken = [(channel, start_s, end_s) for channel in range(len(samples)) for _, start_s, end_s in TURNS]
    assert compared.groups(spoken) == alike
    # Of a copy that is found on one channel alone nothing is said.
    assert compared.groups([place for place in spoken if place[0] == 0]) == []


def test_the_copy_with_the_most_speech_comes_first():
    compared = AlikeChannels()
    compared.look(np.array([MONO, MONO], np.float32))
    assert compared.groups([(0, *TURNS[0][1:]), *((1, *turn[1:]) for turn in TURNS[:2])]) == [[1, 0]]
