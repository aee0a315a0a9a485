"""What is missing of a damaged stream is silence of the right length, and no damage ends the decoder."""

import contextlib
from itertools import product

import numpy as np
import pytest
import soundfile
from odd_files import write_av

from vaemo.audio.recording import AudioProblem, Recording

RATE = 16_000
NEAR_S = 0.05


def bursts(seconds):
    """Tones of 30 to 120 ms with pauses, at places that do not repeat, (n, 1)."""
    draw, samples, at_s = np.random.default_rng(7), np.zeros((int(seconds * RATE), 1), np.float32), 0.05
    while at_s < seconds - 0.2:
        length_s = draw.uniform(0.03, 0.12)
        begin, end = int(at_s * RATE), int((at_s + length_s) * RATE)
        wave = np.sin(2 * np.pi * draw.uniform(300, 1500) / RATE * np.arange(end - begin))
        samples[begin:end, 0] = 0.4 * wave * np.hanning(end - begin) ** 0.3
        at_s += length_s + draw.uniform(0.04, 0.2)
    return samples


def late_s(found, expected, begin_s, end_s):
    """How much later than expected a stretch is found, in steps of 5 ms, by the course of its level."""
    step = RATE // 200
    levels = [np.abs(x[: len(x) // step * step]).reshape(-1, step).mean(axis=1) for x in (found, expected)]
    begin, end = round(begin_s * 200), round(end_s * 200)
    shifts = range(-100, min(100, len(levels[0]) - end))
    alike = [np.corrcoef(levels[0][begin + shift : end + shift], levels[1][begin:end])[0, 1] for shift in shifts]
    assert max(alike) > 0.9
    return shifts[int(np.argmax(alike))] / 200


@pytest.mark.parametrize(("n_bytes", "seed"), [*product([40, 400, 1500], [0, 1])])
def test_an_mp3_of_variable_bit_rate_keeps_its_times_behind_damage(tmp_path, decoder, n_bytes, seed):
    original = bursts(20.0)
    soundfile.write(tmp_path / "a.mp3", original, RATE)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    places = (np.random.default_rng(seed).uniform([0.3, 0.5], [0.4, 0.6]) * len(content)).astype(int)
    # Two places: what lies between them shows that the first gap alone has its length.
    for at in places[: 1 + seed]:
        content[at : at + n_bytes] = bytes(n_bytes)
    (tmp_path / "a.mp3").write_bytes(content)
    recording = Recording(str(tmp_path / "a.mp3"), decoder)
    (found,) = np.concatenate(list(recording.blocks()), axis=1)
    assert abs(late_s(found, original[:, 0], 1.0, 5.0)) <= NEAR_S
    assert abs(late_s(found, original[:, 0], 14.0, 19.0)) <= NEAR_S
    assert recording.damage().status == "damaged"
    assert 0 < recording.lost_s() < 2.0


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp3", "libmp3lame", {}),
        ("a.mp3", "libmp3lame", {"options": {"write_xing": "0"}}),
        ("a.aac", "aac", {}),
    ],
)
@pytest.mark.parametrize("cut", [0, 30])
def test_zeros_behind_the_last_frame_are_no_damage(tmp_path, decoder, name, codec, options, cut):
    write_av(tmp_path / name, bursts(6.0), RATE, codec, **options)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) - cut])
    before = sum(block.shape[1] for block in Recording(str(tmp_path / name), decoder).blocks())
    (tmp_path / name).write_bytes(content[: len(content) - cut] + bytes(100_000))
    recording = Recording(str(tmp_path / name), decoder)
    assert abs(sum(block.shape[1] for block in recording.blocks()) - before) <= 2048
    assert recording.damage() is None
    assert recording.lost_s() == 0
    # What lies behind them is another matter: frames are missing there.
    (tmp_path / name).write_bytes(content + bytes(20_000) + content[len(content) // 2 :])
    recording = Recording(str(tmp_path / name), decoder)
    assert sum(block.shape[1] for block in recording.blocks()) > before + RATE
    assert recording.lost_s() > 1


def test_zeros_in_the_place_of_frames_that_were_counted_are_damage(tmp_path, decoder):
    write_av(tmp_path / "a.mp3", bursts(6.0), RATE, "libmp3lame")
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    recording = Recording(str(tmp_path / "a.mp3"), decoder)
    assert sum(block.shape[1] for block in recording.blocks()) < 4 * RATE
    assert "breaks off" in recording.damage().reason


@pytest.mark.parametrize("channels", [(1, 2), (2, 1)])
def test_the_number_of_channels_may_change_in_a_stream(tmp_path, decoder, channels):
    original = bursts(8.0)
    for name, n in zip("ab", channels, strict=True):
        write_av(tmp_path / f"{name}.ts", original.repeat(n, axis=1), RATE, "aac")
    (tmp_path / "c.ts").write_bytes(b"".join((tmp_path / f"{name}.ts").read_bytes() for name in "ab"))
    recording = Recording(str(tmp_path / "c.ts"), decoder)
    found = np.concatenate(list(recording.blocks()), axis=1)
    assert len(found) == channels[0]
    # A transport stream declares no priming: 64 ms a part, and what fills its last frame.
    for heard in found:
        assert abs(late_s(heard, original[:, 0], 1.0, 7.0) - 0.064) < NEAR_S
        assert abs(late_s(heard[8 * RATE :], original[:, 0], 1.0, 7.0) - 0.176) < NEAR_S


FORMATS = {"a.ts": ("aac", 16000), "a.flv": ("aac", 44100), "a.mkv": ("aac", 16000), "a.mp3": ("libmp3lame", 16000)}


@pytest.mark.parametrize("name", FORMATS)
def test_no_damage_ends_the_decoder(tmp_path, decoder, name):
    codec, rate = FORMATS[name]
    write_av(tmp_path / name, bursts(6.0), rate, codec)
    whole = (tmp_path / name).read_bytes()
    for seed in range(12):
        draw, content = np.random.default_rng(seed), bytearray(whole)
        for at in (draw.uniform(0.1, 0.9, 60) * len(content)).astype(int):
            content[at] ^= 1 << int(draw.integers(8))
        (tmp_path / name).write_bytes(content)
        # Whether it is heard or refused: the process that decodes lives.
        with contextlib.suppress(AudioProblem):
            list(Recording(str(tmp_path / name), decoder).blocks())
        assert decoder.alive, seed


def test_what_is_not_understood_behind_the_end_is_said(tmp_path, decoder):
    write_av(tmp_path / "a.wv", bursts(20.0), RATE, "wavpack")
    content = bytearray((tmp_path / "a.wv").read_bytes())
    # The second half of the blocks is no longer there, but its bytes are.
    at = content.index(b"wvpk", len(content) // 2)
    content[at:] = bytes(len(content) - at)
    (tmp_path / "a.wv").write_bytes(content)
    recording = Recording(str(tmp_path / "a.wv"), decoder)
    heard = sum(block.shape[1] for block in recording.blocks())
    assert 0 < heard < 19 * RATE
    problem = recording.damage()
    assert problem.status == "undecodable"
    assert "breaks off at" in problem.reason
