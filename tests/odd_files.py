"""Sixty kinds of broken or odd audio files, and what should become of each."""

from __future__ import annotations

import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 8000


def noise(seconds: float = 1.0, rate: int = RATE, channels: int = 1, scale: float = 0.1) -> np.ndarray:
    """(n, channels), float32."""
    return np.random.default_rng(0).normal(scale=scale, size=(int(seconds * rate), channels)).astype(np.float32)


def write_av(path: Path, samples: np.ndarray, rate: int, codec: str, **options) -> None:
    """Write (n, channels) with FFmpeg."""
    with av.open(str(path), "w", **options) as container:
        layout = "mono" if samples.shape[1] == 1 else "stereo"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T.astype(np.float32)), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        fifo = av.AudioFifo()
        for converted in resampler.resample(frame):
            fifo.write(converted)
        size = stream.codec_context.frame_size or 1024
        while (block := fifo.read(size, partial=True)) is not None:
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))


def _sf(subtype: str | None = None, *, samples: np.ndarray | None = None, rate: int = RATE) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, noise() if samples is None else samples, rate, subtype=subtype)


def _av(codec: str, rate: int = 16000, channels: int = 1, seconds: float = 1.0, **options) -> Callable[[Path], None]:
    return lambda path: write_av(path, noise(seconds, rate, channels), rate, codec, **options)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def _changed(make: Callable[[Path], None], change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def _data_size(size: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = content.index(b"data") + 4
        return content[:at] + size.to_bytes(4, "little") + content[at + 4 :]

    return change


def without_length(content: bytes) -> bytes:
    """A FLAC as it is streamed: its header does not say how long it is (the low 36 of the 64 bits from byte 18)."""
    facts = int.from_bytes(content[18:26], "big") >> 36 << 36
    return content[:18] + facts.to_bytes(8, "big") + content[26:]


def _with(samples: np.ndarray, value: float, at: int = 4000) -> np.ndarray:
    changed = samples.copy()
    changed[at] = value
    return changed


def _bits8(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(RATE)
        file.writeframes((noise() * 127 + 128).clip(0, 255).astype(np.uint8).tobytes())


def _sparse_hours(path: Path) -> None:
    """Eleven hours of silence that take no room on the disk."""
    _sf("PCM_16")(path)
    n_bytes = 11 * 3600 * RATE * 2
    path.write_bytes(_data_size(n_bytes)(path.read_bytes()))
    with open(path, "r+b") as file:
        file.truncate(44 + n_bytes)


TONE = (0.3 * np.sin(np.arange(RATE) / 5)[:, None]).astype(np.float32)

ODD: dict[str, tuple[Callable[[Path], None] | None, str]] = {
    # Good, if unusual.
    "pcm16.wav": (_sf("PCM_16"), "ok"),
    "pcm24.wav": (_sf("PCM_24", rate=48000, samples=noise(1, 48000)), "ok"),
    "pcm32.wav": (_sf("PCM_32"), "ok"),
    "pcm8.wav": (_bits8, "ok"),
    "float.wav": (_sf("FLOAT"), "ok"),
    "double.wav": (_sf("DOUBLE"), "ok"),
    "ulaw.wav": (_sf("ULAW"), "ok"),
    "alaw.wav": (_sf("ALAW"), "ok"),
    "gsm.wav": (_sf("GSM610"), "ok"),
    "ima.wav": (_sf("IMA_ADPCM"), "ok"),
    "ms_adpcm.wav": (_sf("MS_ADPCM"), "ok"),
    "mp3_in.wav": (_av("libmp3lame"), "ok"),
    "a.flac": (_sf(), "ok"),
    "streamed.flac": (_changed(_sf(), without_length), "ok"),
    "vorbis.ogg": (_sf("VORBIS"), "ok"),
    "opus.opus": (lambda path: soundfile.write(path, noise(), RATE, format="OGG", subtype="OPUS"), "ok"),
    "layer3.mp3": (_sf(samples=noise(1, 16000), rate=16000), "ok"),
    "aac.m4a": (_av("aac"), "ok"),
    "adts.aac": (_av("aac", format="adts"), "ok"),
    "stereo.m4a": (_av("aac", channels=2), "ok"),
    "opus.webm": (_av("libopus", 48000), "ok"),
    "narrow.amr": (_av("libopencore_amrnb", 8000), "ok"),
    "flac.mka": (_av("flac"), "ok"),
    "a.aiff": (_sf("PCM_16"), "ok"),
    "a.au": (_sf("ULAW"), "ok"),
    "a.caf": (_sf("PCM_16"), "ok"),
    "a.w64": (_sf("PCM_16"), "ok"),
    "rate192k.wav": (_sf(rate=192000, samples=noise(1, 192000)), "ok"),
    "rate11025.wav": (_sf(rate=11025, samples=noise(1, 11025)), "ok"),
    "rate12347.wav": (_sf(rate=12347, samples=noise(1, 12347)), "ok"),
    "eight_channels.wav": (_sf(samples=noise(channels=8)), "ok"),
    "stereo.wav": (_sf(samples=noise(channels=2)), "ok"),
    "loud.wav": (_sf("FLOAT", samples=noise(scale=30.0)), "undecodable"),
    "clipped.wav": (_sf("PCM_16", samples=np.sign(noise())), "ok"),
    "with offset.wav": (_sf("FLOAT", samples=noise() + np.float32(0.4)), "ok"),
    "tone.wav": (_sf(samples=TONE), "ok"),
    "wrong_name.mp3": (lambda path: soundfile.write(path, noise(), RATE, format="WAV"), "ok"),
    "truncated.wav": (_changed(_sf("PCM_16"), lambda content: content[:12000]), "ok"),
    "header_10h.wav": (_changed(_sf("PCM_16"), _data_size(36000 * RATE * 2)), "ok"),
    "header_zero.wav": (_changed(_sf("PCM_16"), _data_size(0xFFFFFFFF)), "ok"),
    "trailing_junk.wav": (_changed(_sf("PCM_16"), lambda content: content + b"junk" * 999), "ok"),
    "名前 ü #1.wav": (_sf(), "ok"),
    # Silent, short, long, not finite.
    "zeros.wav": (_sf(samples=noise() * 0), "silent"),
    "dc.wav": (_sf(samples=noise() * 0 + 0.5), "silent"),
    "faint.wav": (_sf("FLOAT", samples=noise(scale=1e-6)), "silent"),
    "one_sample.wav": (_sf(samples=noise()[:1]), "too_short"),
    "fifty_ms.wav": (_sf(samples=noise(0.05)), "too_short"),
    "no_samples.wav": (_sf(samples=noise()[:0]), "undecodable"),
    "eleven_hours.wav": (_sparse_hours, "too_long"),
    "nan.wav": (_sf("FLOAT", samples=_with(noise(), np.nan)), "nan_audio"),
    "infinite.wav": (_sf("FLOAT", samples=_with(noise(), np.inf)), "nan_audio"),
    # Not audio, or no longer.
    "empty.wav": (_bytes(b""), "undecodable"),
    "one_byte.wav": (_bytes(b"R"), "undecodable"),
    "only_header.wav": (_bytes(b"RIFF\x24\0\0\0WAVEfmt "), "undecodable"),
    "text.wav": (_bytes(b"To whom it may concern\n" * 50), "undecodable"),
    "html.mp3": (_bytes(b"<html><body>404 Not Found</body></html>" * 20), "undecodable"),
    "zeros.mp3": (_bytes(bytes(5000)), "undecodable"),
    "random.wav": (_bytes(np.random.default_rng(1).bytes(20000)), "undecodable"),
    "picture.m4a": (_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000)), "undecodable"),
    "half.m4a": (_changed(_av("aac"), lambda content: content[: len(content) // 2]), "undecodable"),
    "playlist.mp3": (_bytes(b"#EXTM3U\n#EXTINF:1,\npcm16.wav\n"), "undecodable"),
    "concat.wav": (_bytes(b"ffconcat version 1.0\nfile pcm16.wav\n"), "undecodable"),
    "rate_1hz.wav": (_sf(rate=1), "undecodable"),
    "hundred_channels.wav": (_sf(samples=noise(0.2, channels=100)), "undecodable"),
    "folder.wav": (lambda path: path.mkdir(), "unreadable"),
    "gone.wav": (None, "missing"),
    "dangling.wav": (lambda path: path.symlink_to("nowhere.wav"), "missing"),
}
"""By name: what writes it (None does not), and its status as one utterance of a manifest."""


def write_odd_files(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (write, _) in ODD.items():
        if write is not None:
            write(folder / name)
