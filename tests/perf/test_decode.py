"""What one timeline costs: decoding with it against plain loops over soundfile and PyAV, which know of no time.

Every figure is a ratio of CPU seconds within one run on this machine, and is printed.
"""

import time

import av
import numpy as np
import pytest
import soundfile
from odd_files import write_av

from vaemo.audio.decode import open_file

pytestmark = [pytest.mark.perf, pytest.mark.timeout(900)]

SECONDS = 300
BLOCK = 4_000_000


def samples(rate):
    t = np.arange(SECONDS * rate) / rate
    noise = np.random.default_rng(0).normal(scale=0.02, size=len(t))
    return (0.2 * np.sin(2 * np.pi * 220 * t * (1 + 0.1 * np.sin(t))) + noise).astype(np.float32)[:, None]


def write_opus(path):
    # In parts: libsndfile runs out of stack on long ones.
    with soundfile.SoundFile(path, "w", 16000, 1, format="OGG", subtype="OPUS") as file:
        for part in np.split(samples(16000), SECONDS):
            file.write(part)


FILES = {
    "ulaw.wav": lambda path: soundfile.write(path, samples(8000), 8000, subtype="ULAW"),
    "a.flac": lambda path: soundfile.write(path, samples(16000), 16000),
    "a.mp3": lambda path: write_av(path, samples(16000), 16000, "libmp3lame"),
    "a.m4a": lambda path: write_av(path, samples(16000), 16000, "aac"),
    "a.opus": write_opus,
}


def ours(path):
    audio, at = open_file(str(path)), 0
    while len(block := audio.read(at, at + BLOCK)):
        at += len(block)


def plain(path):
    if path.suffix in (".wav", ".flac", ".opus"):
        soundfile.read(path, dtype="float32")
        return
    with av.open(str(path)) as container:
        np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


@pytest.mark.parametrize("name", FILES)
def test_one_timeline_is_as_fast_as_none(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    spent_s = {ours: [], plain: []}
    for _ in range(7):
        for read in spent_s:
            start = time.process_time()
            read(path)
            spent_s[read].append(time.process_time() - start)
    ratio = min(spent_s[plain]) / min(spent_s[ours])
    print(f"\n{name}: {SECONDS / min(spent_s[ours]):.0f} x real time, plain / ours {ratio:.2f}")
    assert ratio >= 0.8
