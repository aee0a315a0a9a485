import os
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from odd_files import without_length, write_av

from vaemo.audio import decoder as decoder_module
from vaemo.audio import recording as audio
from vaemo.audio.recording import AudioProblem, Decoder, Recording, Resampler
from vaemo.config import AudioConfig
from vaemo.units import SAMPLING_RATE_HZ

# Lossless formats differ by their own quantisation alone, lossy ones are compared by correlation.
RESAMPLED = 1e-5


def tone(seconds, rate, hz=(220.0, 700.0), seed=0):
    """Two channels of chirping tones that differ everywhere, (n, 2)."""
    t = np.arange(int(seconds * rate)) / rate
    phase = np.random.default_rng(seed).uniform(0, 6, 2)
    wobble = 1 + 0.3 * np.sin(2 * np.pi * 0.7 * t)
    return np.stack([0.4 * np.sin(2 * np.pi * f * t * wobble + p) for f, p in zip(hz, phase, strict=True)], 1)


WRITERS = {
    "pcm16.wav": lambda path, x: soundfile.write(path, x, 8000, subtype="PCM_16"),
    "pcm24.wav": lambda path, x: soundfile.write(path, x, 8000, subtype="PCM_24"),
    "float.wav": lambda path, x: soundfile.write(path, x, 8000, subtype="FLOAT"),
    "ulaw.wav": lambda path, x: soundfile.write(path, x, 8000, subtype="ULAW"),
    "alaw.wav": lambda path, x: soundfile.write(path, x, 8000, subtype="ALAW"),
    "gsm.wav": lambda path, x: soundfile.write(path, x[:, :1], 8000, subtype="GSM610"),
    "pcm.flac": lambda path, x: soundfile.write(path, x, 8000),
    "vorbis.ogg": lambda path, x: soundfile.write(path, x, 8000),
    "opus.ogg": lambda path, x: soundfile.write(path, x, 8000, subtype="OPUS"),
    "layer3.mp3": lambda path, x: soundfile.write(path, x, 16000),
    "pcm.aiff": lambda path, x: soundfile.write(path, x, 8000),
    "aac.m4a": lambda path, x: write_av(path, x, 16000, "aac"),
    "opus.webm": lambda path, x: write_av(path, x, 48000, "libopus"),
    "narrow.amr": lambda path, x: write_av(path, x[:, :1], 8000, "libopencore_amrnb"),
    "mp3inside.wav": lambda path, x: write_av(path, x, 16000, "libmp3lame"),
}
RATES = {"layer3.mp3": 16000, "aac.m4a": 16000, "opus.webm": 48000, "mp3inside.wav": 16000}
CODEC_DELAY_S = 0.15
"""Encoders put silence in front; the place of a sample is compared after the delay is found."""


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_decoded_channel_by_channel(tmp_path, decoder, name):
    rate = RATES.get(name, 8000)
    seconds = 3.0
    original = tone(seconds, rate)
    WRITERS[name](tmp_path / name, original)
    recording = Recording(str(tmp_path / name), decoder)
    assert abs(recording.info.duration_s - seconds) < CODEC_DELAY_S
    for channel in range(recording.info.channels):
        samples = recording.utterance(channel=channel)
        assert samples.dtype == np.float32
        assert abs(len(samples) / SAMPLING_RATE_HZ - seconds) < CODEC_DELAY_S
        expected = Resampler(*(1, 2) if rate == 8000 else (3, 1) if rate == 48000 else (1, 1)).between(
            original[:, channel].astype(np.float32)
        )
        # Codecs made for voices bend a tone.
        assert _similarity(samples, expected) > (0.7 if name in ("gsm.wav", "narrow.amr") else 0.95)
        other = 1 - channel
        if recording.info.channels == 2:
            assert _similarity(samples, original[:, other].repeat(2)[: len(samples)]) < 0.5


def _similarity(found, expected):
    """Largest correlation over shifts of up to `CODEC_DELAY_S`."""
    n = 1 << (len(found) + len(expected)).bit_length()
    shifted = np.fft.irfft(np.fft.rfft(found, n) * np.conj(np.fft.rfft(expected, n)), n)
    best = shifted[: int(CODEC_DELAY_S * SAMPLING_RATE_HZ)].max()
    return float(best / np.linalg.norm(found) / np.linalg.norm(expected))


@pytest.mark.long
@pytest.mark.parametrize("name", ["ulaw.wav", "pcm.flac", "opus.ogg", "layer3.mp3", "aac.m4a", "opus.webm"])
def test_a_part_is_the_same_as_when_it_is_cut_from_the_whole(tmp_path, decoder, name):
    rate = RATES.get(name, 8000)
    WRITERS[name](tmp_path / name, tone(40.0, rate))
    recording = Recording(str(tmp_path / name), decoder)
    whole = recording.utterance(channel=1)
    # Forward, far ahead, back again, the very start, the very end.
    for start_s, end_s in [(3.0, 4.25), (31.337, 32.5), (5.01, 5.5), (0.0, 0.4), (39.0, 40.0)]:
        part = recording.utterance(start_s, end_s, 1)
        first = round(start_s * SAMPLING_RATE_HZ)
        cut = whole[first : first + len(part)]
        assert len(part) == round(end_s * SAMPLING_RATE_HZ) - first
        if "aac" in name or "layer3" in name or "opus" in name:
            # A decoder that starts in the middle has another history for a few frames.
            assert np.corrcoef(part[: len(cut)], cut)[0, 1] > 0.99
        else:
            np.testing.assert_allclose(part, cut, atol=RESAMPLED)


@pytest.mark.parametrize("rate", [8000, 11025, 12345, 16000, 22050, 44100, 48000, 192000])
def test_blocks_are_the_whole_whatever_the_rate(tmp_path, decoder, rate, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 7 * rate // 5)
    soundfile.write(tmp_path / "a.wav", tone(5.3, rate), rate, subtype="FLOAT")
    recording = Recording(str(tmp_path / "a.wav"), decoder)
    blocks = list(recording.blocks())
    joined = np.concatenate(blocks, axis=1)
    assert len(blocks) > 3
    for channel in (0, 1):
        whole = recording.utterance(channel=channel)
        assert abs(len(whole) / SAMPLING_RATE_HZ - 5.3) < 2e-4
        np.testing.assert_allclose(joined[channel], whole, atol=RESAMPLED)


def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold():
    t = np.arange(48000) / 48000
    low = Resampler(3, 1).between(np.sin(2 * np.pi * 1000 * t).astype(np.float32))
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    # The window of the filter ripples by less than a tenth of a percent.
    np.testing.assert_allclose(low[200:-200], expected[200:-200], atol=2e-3)
    high = Resampler(3, 1).between(np.sin(2 * np.pi * 12000 * t).astype(np.float32))
    assert np.abs(high[200:-200]).max() < 1e-3


def test_without_a_channel_all_are_averaged(tmp_path, decoder):
    samples = tone(1.0, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    np.testing.assert_allclose(Recording(str(tmp_path / "a.wav"), decoder).utterance(), samples.mean(axis=1), atol=1e-7)


def test_an_utterance_may_end_a_little_after_the_recording(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    recording = Recording(str(tmp_path / "a.wav"), decoder)
    assert len(recording.utterance(0.5, 1.05, 0)) == 8000
    assert len(recording.utterance(0.5, 1.95, 0)) == 8000
    with pytest.raises(AudioProblem, match=r"undecodable: its audio ends at 1.000 s, the utterance at 2.500 s"):
        recording.utterance(0.5, 2.5, 0)
    with pytest.raises(AudioProblem, match=r"undecodable: its audio ends before 2.000 s"):
        recording.utterance(2.0, None, 0)


def test_an_utterance_without_a_sample_is_too_short(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    recording = Recording(str(tmp_path / "a.wav"), decoder)
    for start_s, end_s in ((None, 1e-320), (0.5, 0.5 + 1e-9)):
        with pytest.raises(AudioProblem, match="too_short: it has no sample"):
            recording.utterance(start_s, end_s)


def test_uris_and_embedded_audio_are_read(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    direct = Recording(str(tmp_path / "a.wav"), decoder).utterance(channel=0)
    np.testing.assert_array_equal(Recording(f"file://{tmp_path}/a.wav", decoder).utterance(channel=0), direct)
    content = (tmp_path / "a.wav").read_bytes()
    table = pa.table({"utt_id": ["x", "y", "z"], "audio": [b"", b"junk", content]})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    np.testing.assert_array_equal(Recording(f"{tmp_path}/m.parquet#2", decoder).utterance(channel=0), direct)
    with pytest.raises(AudioProblem, match="undecodable: the file is empty"):
        Recording(f"{tmp_path}/m.parquet#0", decoder)
    with pytest.raises(AudioProblem, match="missing"):
        Recording(f"{tmp_path}/m.parquet#3", decoder)


def test_what_cannot_be_opened_has_a_status(tmp_path, decoder):
    with pytest.raises(AudioProblem, match="missing: there is no such file"):
        Recording(str(tmp_path / "none.wav"), decoder)
    with pytest.raises(AudioProblem, match="unreadable: Is a directory"):
        Recording(str(tmp_path), decoder)
    (tmp_path / "text.wav").write_text("this is no audio" * 100)
    with pytest.raises(AudioProblem, match="undecodable: not an audio file that soundfile or FFmpeg knows"):
        Recording(str(tmp_path / "text.wav"), decoder)
    (tmp_path / "text.raw").write_text("this is no audio" * 100)
    with pytest.raises(AudioProblem, match=r"knows; if it is raw samples, set audio\.headerless"):
        Recording(str(tmp_path / "text.raw"), decoder)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 100)
    with pytest.raises(AudioProblem, match="undecodable: its sampling rate is 100 Hz"):
        Recording(str(tmp_path / "slow.wav"), decoder)
    soundfile.write(tmp_path / "wide.wav", np.zeros((100, 65)), 8000)
    with pytest.raises(AudioProblem, match="undecodable: it has 65 channels"):
        Recording(str(tmp_path / "wide.wav"), decoder)
    with pytest.raises(AudioProblem, match="unreadable"):
        Recording("nofilesystem://x/a.wav", decoder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(AudioProblem, match="unreadable: Permission denied"):
        Recording(str(tmp_path / "a.wav"), decoder)


def test_a_playlist_opens_no_other_file(tmp_path, decoder):
    soundfile.write(tmp_path / "secret.wav", tone(1.0, 16000), 16000)
    (tmp_path / "list.mp3").write_text(f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n")
    with pytest.raises(AudioProblem, match="undecodable"):
        Recording(str(tmp_path / "list.mp3"), decoder)


def test_a_channel_that_is_not_there_has_a_status(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    with pytest.raises(AudioProblem, match="bad_channel: channel 2 is asked for, it has 2"):
        Recording(str(tmp_path / "a.wav"), decoder).utterance(channel=2)


def test_too_long_is_refused_from_the_header_and_from_what_comes(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(3.0, 16000), 16000)
    with pytest.raises(AudioProblem, match="too_long: it lasts 3 s or more; 2 s are allowed"):
        Recording(str(tmp_path / "a.wav"), decoder, AudioConfig(max_recording_s=2.0))
    # A FLAC that was streamed has no length in its header.
    soundfile.write(tmp_path / "a.flac", tone(3.0, 16000), 16000)
    (tmp_path / "a.flac").write_bytes(without_length((tmp_path / "a.flac").read_bytes()))
    recording = Recording(str(tmp_path / "a.flac"), decoder, AudioConfig(max_recording_s=2.0))
    assert recording.info.frames is None
    with pytest.raises(AudioProblem, match="too_long: it lasts 3 s or more; 2 s are allowed"):
        list(recording.blocks())


def test_a_too_long_utterance_is_refused(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(3.0, 8000), 8000)
    recording = Recording(str(tmp_path / "a.wav"), decoder, AudioConfig(max_utterance_s=2.0))
    assert len(recording.utterance(0.5, 2.5)) == 2 * SAMPLING_RATE_HZ
    for span in ((), (0.2,), (0.0, 2.5)):
        with pytest.raises(AudioProblem, match="too_long: it lasts 3 s or more; 2 s are allowed"):
            recording.utterance(*span)


def test_a_streamed_flac_is_read_like_any_other(tmp_path, decoder):
    soundfile.write(tmp_path / "a.flac", tone(15.0, 16000), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(without_length(whole))
    known = [Recording(str(tmp_path / "a.flac"), decoder).utterance(*span) for span in ((), (13.0, 14.0), (1.0, 2.0))]
    streamed = Recording(str(tmp_path / "b.flac"), decoder)
    for span, expected in zip(((), (13.0, 14.0), (1.0, 2.0)), known, strict=True):
        np.testing.assert_array_equal(streamed.utterance(*span), expected)


def test_a_ten_hour_header_over_nothing_costs_nothing(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = (8000 * 2 * 2 * 36000).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    recording = Recording(str(tmp_path / "a.wav"), decoder)
    assert len(recording.utterance(channel=0)) == SAMPLING_RATE_HZ


FAKE = """
    import json, os, signal, sys, time
    sys.path.insert(0, {folder!r})
    import decode
    real = decode.answer
    def answer(request, audio):
        what = json.dumps(request) + json.dumps(getattr(audio, "name", ""))
        if "/crash.wav" in what:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "/hang.wav" in what:
            time.sleep(3600)
        return real(request, audio)
    decode.answer = answer
    decode.main()
"""


@pytest.fixture
def wild(tmp_path, monkeypatch):
    """A decoder that dies at files named crash and never answers at files named hang."""
    program = tmp_path / "wild.py"
    program.write_text(textwrap.dedent(FAKE.format(folder=os.path.dirname(audio.__file__))))
    monkeypatch.setattr(decoder_module, "_PROGRAM", program)
    for name in ("crash.wav", "hang.wav", "good.wav"):
        soundfile.write(tmp_path / name, tone(1.0, 16000), 16000)
    with Decoder(1.5) as decoder:
        yield decoder


def test_a_decoder_that_dies_is_a_status_and_the_next_file_is_read(tmp_path, wild):
    with pytest.raises(AudioProblem, match=r"undecodable: decoding it ended the decoder \(SIGSEGV\)"):
        Recording(str(tmp_path / "crash.wav"), wild)
    assert not wild.alive
    assert len(Recording(str(tmp_path / "good.wav"), wild).utterance(channel=0)) == 16000


def test_a_decoder_that_hangs_is_ended_after_the_time_out(tmp_path, wild):
    wild.open(str(tmp_path / "good.wav"))
    child = wild._child.pid
    with pytest.raises(AudioProblem, match=r"timeout: decoding took longer than 1.5 s"):
        Recording(str(tmp_path / "hang.wav"), wild)
    assert not os.path.exists(f"/proc/{child}")
    assert len(Recording(str(tmp_path / "good.wav"), wild).utterance(channel=0)) == 16000


def test_a_decoder_lost_between_opening_and_reading_is_a_status(tmp_path, wild):
    recording = Recording(str(tmp_path / "good.wav"), wild)
    wild._child.kill()
    wild._child.wait()
    with pytest.raises(AudioProblem, match=r"undecodable: decoding it ended the decoder \(SIGKILL\)"):
        recording.utterance(channel=0)
    with pytest.raises(AudioProblem, match="undecodable: its decoder was lost"):
        recording.utterance(channel=0)


def test_one_child_serves_many_files(tmp_path, decoder):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    Recording(str(tmp_path / "a.wav"), decoder)
    child = decoder._child.pid
    for _ in range(20):
        Recording(str(tmp_path / "a.wav"), decoder).utterance(0.1, 0.2)
    assert decoder._child.pid == child
