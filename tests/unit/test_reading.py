"""One timeline: whatever the format, times count from the container's start, in reading through and in seeking.

The signal is noise, so that a cut of it correlates with its own place alone. It is written in the formats that are met,
with packets left out, damaged, late, or joined, and compared with what was written.
"""

import functools
import io
import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from odd_files import write_av

from vaemo.audio import headers
from vaemo.audio.decoder import AudioProblem
from vaemo.audio.recording import Recording
from vaemo.config import AudioConfig
from vaemo.units import SAMPLING_RATE_HZ

SECONDS = 24
NEAR_S = 0.05


@functools.cache
def signal(seconds=SECONDS, seed=0):
    """Noise of the telephone band that swells and fades, (n,), 16 kHz."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=seconds * SAMPLING_RATE_HZ)
    spectrum = np.fft.rfft(white)
    hz = np.fft.rfftfreq(len(white), 1 / SAMPLING_RATE_HZ)
    band = np.fft.irfft(spectrum * ((hz > 300) & (hz < 3000)), len(white))
    loud = 1 + 0.9 * np.sin(2 * np.pi * np.arange(len(white)) / SAMPLING_RATE_HZ / 1.7)
    return (0.15 * band / band.std() * loud).astype(np.float32)


def at_rate(samples, rate):
    """(n,) at 16 kHz as (m, 1) at another rate that divides or is a multiple."""
    frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
    frame.sample_rate = SAMPLING_RATE_HZ
    resampler = av.AudioResampler("flt", "mono", rate)
    out = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in out])[:, None].astype(np.float32)


def place_s(found, reference, around_s, reach_s=1.0):
    """Where a cut lies in the reference, in seconds, and how well it correlates there."""
    first = max(int((around_s - reach_s) * SAMPLING_RATE_HZ), 0)
    near = reference[first : first + len(found) + int(2 * reach_s * SAMPLING_RATE_HZ)]
    size = 1 << (len(near) + len(found)).bit_length()
    product = np.fft.irfft(np.fft.rfft(near, size) * np.conj(np.fft.rfft(found, size)), size)[: len(near)]
    best = int(np.argmax(product))
    matched = near[best : best + len(found)]
    scale = np.linalg.norm(matched) * np.linalg.norm(found[: len(matched)]) + 1e-9
    return (first + best) / SAMPLING_RATE_HZ, float(matched @ found[: len(matched)] / scale)


def read_through(recording):
    return np.concatenate([block[0] for block in recording.blocks()])


def write_sf(rate, subtype, format=None):
    return lambda path: soundfile.write(path, at_rate(signal(), rate), rate, subtype=subtype, format=format)


def write_with_av(codec, rate, **options):
    return lambda path: write_av(path, at_rate(signal(), rate), rate, codec, **options)


def packets_dropped(codec, rate, first_s, last_s, **options):
    """Written with FFmpeg, the packets of a span left out, time stamps kept."""

    def write(path):
        content = io.BytesIO()
        name = options.get("format", path.suffix[1:])
        full = path.with_name(f"full-{path.name}")
        write = write_sf(rate, "VORBIS", "OGG") if codec == "vorbis" else write_with_av(codec, rate, **options)
        write(full)
        with av.open(str(full)) as source, av.open(content, "w", format=name.replace("mka", "matroska")) as target:
            track = target.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(source.streams.audio[0]):
                if packet.dts is None:
                    continue
                if not first_s <= float(packet.pts * packet.time_base) < last_s:
                    packet.stream = track
                    target.mux(packet)
        full.unlink()
        path.write_bytes(content.getvalue())

    return write


def damaged(write, start, stop):
    """Written, and a share of its bytes overwritten."""

    def change(path):
        write(path)
        content = bytearray(path.read_bytes())
        first, last = int(start * len(content)), int(stop * len(content))
        content[first:last] = np.random.default_rng(5).bytes(last - first)
        path.write_bytes(content)

    return change


FORMATS = {
    "pcm.wav": write_sf(8000, "PCM_16"),
    "ulaw.wav": write_sf(8000, "ULAW"),
    "gsm.wav": write_sf(8000, "GSM610"),
    "a.flac": write_sf(16000, "PCM_16"),
    "a.ogg": write_sf(16000, "VORBIS"),
    "a.opus": write_sf(16000, "OPUS", "OGG"),
    "a.aiff": write_sf(16000, "PCM_16"),
    "a.w64": write_sf(16000, "PCM_16"),
    "av.ogg": packets_dropped("vorbis", 16000, 0.0, 0.0),
    "av.opus": write_with_av("libopus", 48000, format="ogg"),
    "a.mp3": write_with_av("libmp3lame", 16000),
    "a.m4a": write_with_av("aac", 16000),
    "a.aac": write_with_av("aac", 16000, format="adts"),
    "a.webm": write_with_av("libopus", 48000),
    "a.mka": write_with_av("flac", 16000),
    "a.ts": write_with_av("aac", 16000, format="mpegts"),
    "a.amr": write_with_av("libopencore_amrnb", 8000),
}
GAPS = {
    "gap.webm": packets_dropped("libopus", 48000, 8.0, 13.0),
    "gap.m4a": packets_dropped("aac", 16000, 8.0, 13.0, format="mp4"),
    "gap.mka": packets_dropped("flac", 16000, 8.0, 13.0),
    "gap.ts": packets_dropped("aac", 16000, 8.0, 13.0, format="mpegts"),
    "gap.opus": packets_dropped("libopus", 48000, 8.0, 13.0, format="ogg"),
    "late.mka": packets_dropped("flac", 16000, 0.0, 2.0),
}
DAMAGED = {
    "hit.mp3": damaged(FORMATS["a.mp3"], 0.50, 0.51),
    "hit.aac": damaged(FORMATS["a.aac"], 0.50, 0.51),
    "hit.flac": damaged(FORMATS["a.flac"], 0.50, 0.505),
    "hit.ogg": damaged(FORMATS["a.ogg"], 0.50, 0.505),
}


UNDECLARED_S = dict.fromkeys(("a.aac", "hit.aac", "a.ts", "gap.ts"), 1024 / 16000)
"""The encoder's priming where the container has no place to declare it: no player knows of it."""

GRID_S = {"hit.aac": 1024 / 16000}
"""Frames of a stream without time stamps: how many of them damage has swallowed follows from its bytes."""

LOSSY = {"gsm.wav": 0.5, "a.amr": 0.3}
"""Correlation that a speech codec leaves of noise."""


@pytest.mark.long
@pytest.mark.parametrize("name", [*FORMATS, *GAPS, *DAMAGED])
def test_reading_through_and_seeking_give_the_samples_that_were_written_there(name, decoder, tmp_path):
    path = tmp_path / name
    (FORMATS | GAPS | DAMAGED)[name](path)
    reference, rng = signal(), np.random.default_rng(1)
    whole = read_through(Recording(str(path), decoder))
    assert abs(len(whole) / SAMPLING_RATE_HZ - SECONDS) < 0.2
    lost = Recording(str(path), decoder)
    for _ in range(25):
        start_s = rng.uniform(0, SECONDS - 3.0)
        end_s = start_s + rng.uniform(0.5, 2.5)
        cut = lost.utterance(start_s, end_s)
        through = whole[round(start_s * SAMPLING_RATE_HZ) : round(end_s * SAMPLING_RATE_HZ)]
        assert len(cut) == round(end_s * SAMPLING_RATE_HZ) - round(start_s * SAMPLING_RATE_HZ)
        if through.std() < 0.01 or lost.lost_s(start_s, end_s) > 0:
            # Nothing, or less than all of it, is there to be compared.
            continue
        for found in (cut, through):
            at_s, correlation = place_s(found, reference, start_s)
            assert abs(at_s + UNDECLARED_S.get(name, 0.0) - start_s) < NEAR_S + GRID_S.get(name, 0.0), name
            assert correlation > LOSSY.get(name, 0.7), name


@pytest.mark.parametrize("name", GAPS)
def test_what_is_missing_is_silence_and_is_counted(name, decoder, tmp_path):
    path = tmp_path / name
    GAPS[name](path)
    first_s, last_s = (0.0, 2.0) if name.startswith("late") else (8.0, 13.0)
    recording = Recording(str(path), decoder)
    inside = recording.utterance(first_s + 0.3, last_s - 0.3)
    assert np.abs(inside).max() < 1e-3
    assert recording.lost_s(first_s + 0.3, last_s - 0.3) == pytest.approx(last_s - first_s - 0.6, abs=0.05)
    assert recording.lost_s(14.0, 15.0) == 0


def without_page(content, number):
    """An Ogg without one of its pages."""
    begins = [0]
    while begins[-1] < len(content):
        at = begins[-1]
        table = content[at + 27 : at + 27 + content[at + 26]]
        begins.append(at + 27 + len(table) + sum(table))
    return content[: begins[number]] + content[begins[number + 1] :]


def claiming_more(content):
    """The last page with one byte more in its table than there is, and the checksum of what is there."""
    at = content.rindex(b"OggS")
    page = bytearray(content[at:])
    page[26 + page[26]] += 1
    page[22:26], checksum = bytes(4), 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ 0x04C11DB7 * (checksum >> 31)) & 0xFFFFFFFF
    page[22:26] = checksum.to_bytes(4, "little")
    return content[:at] + bytes(page)


NOT_PLAIN = {
    "a page claims more than there is": claiming_more,
    "a byte is another": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "a page is missing": lambda content: without_page(content, 5),
    "the last page is missing": lambda content: without_page(content, content.count(b"OggS") - 1),
    "it is cut": lambda content: content[:-10],
    "something follows": lambda content: content + bytes(10),
    "another follows": lambda content: content + content,
}


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "av.ogg", "av.opus"])
def test_an_ogg_is_plain_if_all_its_pages_are_whole_and_count_its_samples(name, tmp_path):
    path = tmp_path / name
    FORMATS[name](path)
    whole = path.read_bytes()
    assert headers.is_plain_ogg(str(path))
    for change in NOT_PLAIN.values():
        path.write_bytes(change(whole))
        assert not headers.is_plain_ogg(str(path))


@pytest.mark.parametrize(("codec", "rate"), [("vorbis", 16000), ("libopus", 48000)])
def test_an_ogg_whose_time_stamps_jump_is_not_plain(codec, rate, tmp_path):
    path = tmp_path / "gap.ogg"
    packets_dropped(codec, rate, 8.0, 13.0)(path)
    assert not headers.is_plain_ogg(str(path))


@pytest.mark.parametrize("name", DAMAGED)
def test_decoding_goes_on_behind_damage(name, decoder, tmp_path):
    path = tmp_path / name
    DAMAGED[name](path)
    recording = Recording(str(path), decoder)
    whole = read_through(recording)
    at_s, correlation = place_s(whole[16 * SAMPLING_RATE_HZ : 18 * SAMPLING_RATE_HZ], signal(), 16.0)
    assert abs(at_s + UNDECLARED_S.get(name, 0.0) - 16.0) < NEAR_S + GRID_S.get(name, 0.0)
    assert correlation > 0.7
    problem = recording.damage()
    assert problem is not None
    assert problem.status == "damaged"
    assert 0 < recording.lost_s() < 3.0


def test_tracks_are_channels_in_their_order(decoder, tmp_path):
    path, parts = tmp_path / "two.mka", [signal(6, 1), signal(4, 2)]
    with av.open(str(path), "w", format="matroska") as target:
        tracks = [target.add_stream("flac", rate=rate, layout="mono") for rate in (16000, 8000)]
        for track, samples in zip(tracks, parts, strict=True):
            native = at_rate(samples, track.rate)[:, 0]
            frame = av.AudioFrame.from_ndarray((native * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = track.rate, 0, Fraction(1, track.rate)
            fifo = av.AudioFifo()
            fifo.write(frame)
            while (block := fifo.read(track.codec_context.frame_size or 1024, partial=True)) is not None:
                target.mux(track.encode(block))
            target.mux(track.encode(None))
    recording = Recording(str(path), decoder)
    assert recording.info.channels == 2
    for channel, samples in enumerate(parts):
        cut = recording.utterance(1.0, 3.0, channel)
        at_s, correlation = place_s(cut, samples, 1.0)
        assert abs(at_s - 1.0) < NEAR_S
        assert correlation > 0.9
    assert np.abs(recording.utterance(4.5, 5.5, 1)).max() < 1e-3


def wav(size, junk=False):
    """A PCM file whose header claims so many bytes of data."""
    content = (at_rate(signal(4), 8000)[:, 0] * 32767).astype("<i2").tobytes()
    head = b"RIFF" + struct.pack("<I", size) + b"WAVE"
    head += b"JUNK" + struct.pack("<I", 28) + bytes(28) if junk else b""
    head += b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    return head + b"data" + struct.pack("<I", size) + content


@pytest.mark.parametrize("extra", [b"", b"\0", b"tail", b"LIST\4\0\0\0abcd", b"\1" * 8192])
@pytest.mark.parametrize("before", [b"", b"JUNK\5\0\0\0abcde\0", b"LIST" + struct.pack("<I", 6000) + bytes(6000)])
@pytest.mark.parametrize("size", [-1, 0, 1, None, 4])
def test_a_wav_that_is_taken_for_whole_needs_no_repair(size, before, extra, tmp_path):
    samples = (signal()[:1001] * 32767).astype("<i2").tobytes()[:2001]
    stated = len(samples) if size is None else max(len(samples) + size, 0) if size else 0
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + before
    body += b"data" + struct.pack("<I", stated) + samples + extra
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    whole = headers.is_whole_wav(path.read_bytes()[:4096], path.stat().st_size)
    assert whole == (len(before) < 4000 and len(samples) + len(extra) in (stated, stated + stated % 2) and size != 0)
    if whole:
        assert headers.repaired(str(path)) is None
        assert headers.next_link(str(path)) is None


@pytest.mark.parametrize("junk", [False, True])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_what_a_recorder_that_died_left_is_read(size, junk, decoder, tmp_path):
    path = tmp_path / "died.wav"
    path.write_bytes(wav(size, junk))
    whole = read_through(Recording(str(path), decoder))
    assert len(whole) == pytest.approx(4 * SAMPLING_RATE_HZ, abs=400)
    at_s, correlation = place_s(whole[SAMPLING_RATE_HZ : 3 * SAMPLING_RATE_HZ], signal(4), 1.0)
    assert abs(at_s - 1.0) < NEAR_S
    assert correlation > 0.9


@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW", "IMA_ADPCM"])
@pytest.mark.parametrize(
    ("cuts", "between"),
    [
        ((0.5,), b""),
        ((0.25, 0.75), b"LIST\6\0\0\0INFO\0\0"),
        ((0.0,), b""),
        ((0.0,), b"JUNK\3\0\0\0abc\0"),
        ((0.0, 0.0, 0.4), b""),
        ((0.4, 0.4), b""),
    ],
)
@pytest.mark.parametrize("last", ["right", "zero", "too large"])
def test_all_chunks_of_samples_of_a_wav_are_read_in_their_order(subtype, cuts, between, last, decoder, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, at_rate(signal(), 8000).repeat(2, axis=1), 8000, subtype=subtype)
    content = path.read_bytes()
    at = content.index(b"data")
    samples = content[at + 8 : at + 8 + int.from_bytes(content[at + 4 : at + 8], "little")]
    places = [0, *(int(cut * len(samples)) // 4096 * 4096 for cut in cuts), len(samples)]
    parts = [samples[first:second] for first, second in itertools.pairwise(places)]
    sizes = [*map(len, parts[:-1]), {"right": len(parts[-1]), "zero": 0, "too large": len(parts[-1]) + 9999}[last]]
    chunks = [b"data" + struct.pack("<I", size) + part for size, part in zip(sizes, parts, strict=True)]
    path.write_bytes(content[:at] + between.join(chunks))
    recording = Recording(str(path), decoder)
    found = read_through(recording)
    assert len(found) == pytest.approx(SECONDS * SAMPLING_RATE_HZ, abs=4000)
    for start_s in (1.0, 9.0, 12.0, 21.0):
        for cut in (
            found[int(start_s * SAMPLING_RATE_HZ) :][: 2 * SAMPLING_RATE_HZ],
            recording.utterance(start_s, start_s + 2, 1),
        ):
            at_s, correlation = place_s(cut, signal(), start_s)
            assert abs(at_s - start_s) < NEAR_S
            assert correlation > 0.9
    assert recording.damage() is None


@pytest.mark.parametrize("n_odd", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_of_odd_length_may_lack_their_last_byte(n_odd, padded, decoder, tmp_path):
    # A size whose first byte is a letter makes "atad" of the next chunk, where its own begin is missed.
    path, content = tmp_path / "odd.wav", wav(4 * 16000 // 256 * 256 + ord("d"))
    odd = (b"note" + struct.pack("<I", 5) + b"abcde" + b"\0" * padded) * n_odd
    path.write_bytes(content[:36] + odd + content[36:])
    whole = read_through(Recording(str(path), decoder))
    assert len(whole) == pytest.approx(4 * SAMPLING_RATE_HZ, abs=400)
    cut = Recording(str(path), decoder).utterance(1.0, 3.0, 0)
    for found in (cut, whole[SAMPLING_RATE_HZ : 3 * SAMPLING_RATE_HZ]):
        at_s, correlation = place_s(found, signal(4), 1.0)
        assert abs(at_s - 1.0) < NEAR_S
        assert correlation > 0.9


@pytest.mark.parametrize("seconds", [(6, 4, 1), (4, 1, 1, 1), (2,) * 8])
def test_short_flacs_that_were_joined_are_all_found(seconds, decoder, tmp_path):
    path, parts = tmp_path / "joined.flac", []
    for seed, length in enumerate(seconds):
        soundfile.write(path, at_rate(signal(length, seed), 8000), 8000)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    begins = np.cumsum([len(part) for part in parts]).tolist()
    for begin, following in zip([0, *begins], [*begins[:-1], None], strict=False):
        assert headers.next_link(str(path), begin) == following
    assert len(read_through(Recording(str(path), decoder))) == sum(seconds) * SAMPLING_RATE_HZ


def test_joined_files_of_other_rates_are_read_to_the_end(decoder, tmp_path):
    one, other, path = tmp_path / "one.mp3", tmp_path / "other.mp3", tmp_path / "joined.mp3"
    write_av(one, at_rate(signal(6, 1), 16000), 16000, "libmp3lame")
    write_av(other, np.repeat(at_rate(signal(6, 2), 32000), 2, axis=1), 32000, "libmp3lame")
    path.write_bytes(one.read_bytes() + other.read_bytes())
    whole = read_through(Recording(str(path), decoder))
    assert len(whole) / SAMPLING_RATE_HZ == pytest.approx(12.0, abs=0.4)
    _, correlation = place_s(whole[8 * SAMPLING_RATE_HZ : 10 * SAMPLING_RATE_HZ], signal(6, 2), 2.0)
    assert correlation > 0.7


def test_an_estimate_of_the_length_refuses_nothing(decoder, tmp_path):
    path = tmp_path / "vbr.mp3"
    write_av(path, at_rate(signal(), 16000), 16000, "libmp3lame")
    content = path.read_bytes()
    at = content.index(b"Info") if b"Info" in content else content.index(b"Xing")
    path.write_bytes(content[:at] + b"none" + content[at + 4 :])
    limits = AudioConfig(max_recording_s=SECONDS + 2)
    assert len(read_through(Recording(str(path), decoder, limits))) > 20 * SAMPLING_RATE_HZ
    with pytest.raises(AudioProblem) as caught:
        read_through(Recording(str(path), decoder, AudioConfig(max_recording_s=10)))
    assert caught.value.status == "too_long"


@pytest.mark.parametrize("times", [0.25, 0.5, 2, 1e6])
@pytest.mark.parametrize("kind", ["mp3", "flac"])
def test_a_count_in_the_header_that_is_wrong_loses_nothing(kind, times, decoder, tmp_path):
    path = tmp_path / f"a.{kind}"
    write_av(path, at_rate(signal(), 16000), 16000, "libmp3lame" if kind == "mp3" else "flac")
    content = bytearray(path.read_bytes())
    if kind == "mp3":
        at = content.index(b"Info") if b"Info" in content else content.index(b"Xing")
        frames = min(int(int.from_bytes(content[at + 8 : at + 12]) * times), 0xFFFFFFFF)
        content[at + 8 : at + 12] = frames.to_bytes(4)
    else:
        total = min(int(SECONDS * 16000 * times), (1 << 36) - 1)
        content[18:26] = (int.from_bytes(content[18:26]) >> 36 << 36 | total).to_bytes(8)
    path.write_bytes(content)
    whole = read_through(Recording(str(path), decoder))
    assert len(whole) == pytest.approx(SECONDS * SAMPLING_RATE_HZ, abs=0.1 * SAMPLING_RATE_HZ)
    for start in (2, 11, 20):
        cut = Recording(str(path), decoder).utterance(float(start), start + 2.0, 0)
        for found in (cut, whole[start * SAMPLING_RATE_HZ : (start + 2) * SAMPLING_RATE_HZ]):
            at_s, correlation = place_s(found, signal(), float(start))
            assert abs(at_s - start) < NEAR_S
            assert correlation > 0.9


@pytest.mark.parametrize(("late", "start_s"), [(False, 0.0), (True, 20.0)])
def test_floats_on_the_scale_of_integers_are_told(late, start_s, decoder, tmp_path):
    path, samples = tmp_path / "float.wav", at_rate(signal(), 8000)
    samples[int(start_s * 8000) :] *= 20000
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    with pytest.raises(AudioProblem, match="16-bit integers") as caught:
        read_through(Recording(str(path), decoder))
    assert (caught.value.status, caught.value.whole) == ("undecodable", True)


def test_a_few_loud_samples_are_clipped(decoder, tmp_path):
    path, samples = tmp_path / "spike.wav", at_rate(signal(4), 16000)
    samples[1000] = 30.0
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    whole = read_through(Recording(str(path), decoder))
    assert whole.max() <= 4.0
    np.testing.assert_allclose(whole[2000:], samples[2000:, 0], atol=1e-6)


def test_an_utterance_that_ends_a_little_behind_its_file_is_cut(decoder, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, at_rate(signal(4), 16000), 16000)
    recording = Recording(str(path), decoder)
    assert len(recording.utterance(2.0, 4.8)) == 2 * SAMPLING_RATE_HZ
    with pytest.raises(AudioProblem, match=r"its audio ends at 4\.000 s, the utterance at 5\.200 s"):
        recording.utterance(2.0, 5.2)


@pytest.mark.parametrize("n", [10_000, 30_000, 200_000])
def test_a_flac_whose_last_frame_stands_alone_is_told_to_be_whole(n, decoder, tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(n).normal(scale=0.1, size=(n, 2)), 8000)
    with open(path, "rb") as file:
        assert headers.is_one_flac(file, 0, path.stat().st_size)
    assert len(read_through(Recording(str(path), decoder))) == 2 * n
