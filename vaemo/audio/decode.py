"""The child process that decodes audio, so that a crash on a bad file does not reach the job.

`vaemo.audio.decoder.Decoder` starts this file as a program and talks with it over two pipes. A request is a JSON line:
`{"open": PATH, "headerless": [CODEC, RATE, CHANNELS] or null}` or `{"read": [START, STOP]}` (frames of the file that
is open). An answer is JSON behind its length (4 bytes, little end first); that of a read is followed by its samples,
float32, frame after frame. soundfile decodes what has no time stamps, or none that say more than the samples, PyAV
(FFmpeg) the rest. Nothing of vaemo but the files beside this one is loaded, and no torch, so that the child starts in a
moment.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from vaemo.audio import headers, timeline
else:

    def _beside(name: str) -> Any:
        """A module that lies beside this file, without the package that it belongs to."""
        spec = importlib.util.spec_from_file_location(f"vaemo_{name}", Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    headers, timeline = map(_beside, ("headers", "timeline"))

MEMORY_LIMIT_BYTES = 8 << 30
MAX_CHANNELS = 64

_HEAD_BYTES = 4096
_SKIP_FRAMES = 1 << 20
_UNKNOWN_FRAMES = (1 << 63) - 1
_LEAST_BYTES_S = 0.5
"""Silence takes more in every format: 10 bytes for the 65,536 samples of a frame of FLAC."""

_SOUNDFILE = (
    *(b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff", b".snd", b"caff", b"fLaC"),
    *(b"Creative Voice", b"NIST_1A"),
)
_FFMPEG = (b"OggS", b"\x1aE\xdf\xa3", b"#!AMR", b"#!iLBC", b"ID3", b"\x30\x26\xb2\x75", b"wvpk", b"TTA1", b".RMF")
"""Magic bytes of self-describing formats; libsndfile reads those of the first row."""

_RAW = {
    **{"mulaw": "ULAW", "alaw": "ALAW", "vox": "VOX_ADPCM", "s8": "PCM_S8", "u8": "PCM_U8"},
    **{f"s{bits}{end}": f"PCM_{bits}" for bits in (16, 24, 32) for end in ("le", "be")},
    **{f"f32{end}": "FLOAT" for end in ("le", "be")},
}
"""Headerless codecs as libsndfile names them; FFmpeg reads the others."""

DecodeError = timeline.DecodeError


@functools.cache
def _ffmpeg() -> Any:
    """The sources that FFmpeg reads: loading it takes longer than libsndfile needs for a recording."""
    if __package__:
        from vaemo.audio import frames

        return frames
    return _beside("frames")


@functools.cache
def _libsndfile() -> Any:
    """A file of soundfile's that is left where a read ends: soundfile asks for its place and seeks there each time."""
    import soundfile

    class File(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return File


class SoundFile:
    """What libsndfile reads, without time stamps: WAV (PCM, mu-law, A-law, GSM, ADPCM), FLAC, AIFF, AU, W64, plain Ogg.

    Where it fails in the middle, FFmpeg goes on.

    Args:
        file: A path or a window.
        raw: How a file without a header is to be read, in soundfile's words.
    """

    def __init__(self, file: Any, **raw: Any) -> None:
        import soundfile

        self._error = soundfile.LibsndfileError
        self._rest: Any = None
        self._reopen_rest = lambda: open_av(file)
        self._reopen = lambda: _libsndfile()(_for_soundfile(file), **raw)
        self._file = self._reopen()
        self._seekable = soundfile.SoundFile.seekable(self._file)
        self._position = 0
        self.sampling_rate = self._file.samplerate
        self.channels = self._file.channels
        self.frames: int | None = self._file.frames
        self.subtype = self._file.subtype
        self.floats = self.subtype in ("FLOAT", "DOUBLE")
        self.guess_s: float | None = None
        self.lost: list[Any] = []
        self.broken: str | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the file has them, (n, channels), float32."""
        if self._rest is not None:
            return self._read_rest(start, stop)
        try:
            if start != self._position and not self._go_to(start):
                return np.zeros((0, self.channels), np.float32)
            # No more than exists: memory for it is allocated beforehand.
            n = max(min(stop, self._file.frames) - start, 0) if self._seekable else stop - start
            samples = self._file.read(n, dtype="float32", always_2d=True)
        except self._error:
            try:
                self._rest = self._reopen_rest()
            except DecodeError:
                self._file, self._position = self._reopen(), 0
                self.broken = f"it breaks off at {start / self.sampling_rate:.1f} s: what follows is damaged"
                return np.zeros((0, self.channels), np.float32)
            return self._read_rest(start, stop)
        self._position = start + len(samples)
        return samples

    def _read_rest(self, start: int, stop: int) -> np.ndarray:
        samples = self._rest.read(start, stop)
        self.lost, self.broken = self._rest.lost, self._rest.broken
        return timeline.with_channels(samples, self.channels)

    def _go_to(self, start: int) -> bool:
        """Make `start` the next frame; false where the file ends before."""
        if self._seekable:
            if start >= self._file.frames:
                return False
            self._file.seek(start)
            return True
        if start < self._position:
            self._file, self._position = self._reopen(), 0
        while self._position < start:
            skipped = len(self._file.read(min(start - self._position, _SKIP_FRAMES), dtype="float32"))
            if not skipped:
                return False
            self._position += skipped
        return True


def _for_soundfile(file: Any) -> Any:
    # libsndfile refuses names that are not UTF-8.
    return os.fsencode(file) if isinstance(file, str) else _from_start(file)


def _from_start(file: Any) -> Any:
    if not isinstance(file, str):
        file.seek(0)
    return file


def open_file(path: str, headerless: tuple[str, int, int] | None = None) -> Any:
    """Open a file with the first decoder that knows it.

    Args:
        path: Of a local file.
        headerless: Codec, rate in Hz and channels of a file that does not say them itself.

    Raises:
        DecodeError: if no decoder knows it, or it claims what no recording has.
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    if not head:
        raise DecodeError("the file is empty")
    reason = headers.not_audio(head[:64])
    if reason is not None:
        raise DecodeError(reason)
    if headerless is not None and not head.startswith(_SOUNDFILE + _FFMPEG):
        audio = _open_headerless(path, *headerless)
    else:
        audio = _open_links(path, head, size)
    if not 1 <= audio.channels <= MAX_CHANNELS:
        raise DecodeError(f"it has {audio.channels} channels; up to {MAX_CHANNELS} are read")
    return audio


def _open_headerless(path: str, codec: str, rate: int, channels: int) -> Any:
    if codec in _RAW:
        endian = "BIG" if codec.endswith("be") else "LITTLE"
        return SoundFile(path, format="RAW", subtype=_RAW[codec], endian=endian, samplerate=rate, channels=channels)
    demuxer, _, bits = codec.partition("_") if codec.startswith("g726") else (codec, "", "")
    options = {"sample_rate": str(rate)} if demuxer == "gsm" else {}
    if bits:
        demuxer = "g726" if demuxer.endswith("be") else "g726le"
        options = {"sample_rate": str(rate), "code_size": bits}
    return open_av(path, demuxer=demuxer, options=options)


def _open_links(path: str, head: bytes, size: int) -> Any:
    """A file with what was joined to it."""
    if headers.is_whole_wav(head, size):
        return _open_link(path, head, None, sound=True)
    if head.startswith(b"OggS") and headers.is_plain_ogg(path):
        with contextlib.suppress(*_sf_errors()):
            audio = SoundFile(path)
            if audio.frames and audio.frames != _UNKNOWN_FRAMES:
                return audio
    first = headers.first_link(path)
    stop = headers.next_link(path, first)
    audio = _open_link(path, head, stop, first)
    if stop is None:
        return audio
    begin: int | None = stop

    def follow() -> Any:
        nonlocal begin
        if begin is None:
            return None
        start, begin = begin, headers.next_link(path, begin)
        try:
            return open_av(headers.link(path, start, begin), audio.sampling_rate)
        except DecodeError:
            return None

    return timeline.Chain(audio, follow)


def _sf_errors() -> tuple[type[Exception], ...]:
    """What opening a file with soundfile may raise."""
    import soundfile

    return soundfile.LibsndfileError, ValueError, OverflowError, TypeError


def _open_link(path: str, head: bytes, stop: int | None, start: int = 0, *, sound: bool = False) -> Any:
    """What lies before the place where another file begins; `sound` where its header is known to be right."""
    errors = _sf_errors()
    file: Any = path if stop is None and not start else headers.link(path, start, stop)
    if head.startswith(_SOUNDFILE):
        if file is path and not sound:
            whole = headers.repaired(path)
            if isinstance(whole, str):
                raise DecodeError(whole)
            file = whole or path
        try:
            audio = SoundFile(file)
            # A FLAC that was streamed does not say its length, and libsndfile cannot jump in it; nor well in an MP3.
            known = audio.frames and audio.frames != _UNKNOWN_FRAMES and not audio.subtype.startswith("MPEG")
            # libsndfile ends where the header says, FFmpeg where the file does.
            is_longer = stop is None and head.startswith(b"fLaC") and headers.flac_end(path) > (audio.frames or 0)
            if known and not is_longer:
                return audio
        except errors:
            pass
        return open_av(file)
    try:
        return open_av(file)
    except DecodeError:
        try:
            return SoundFile(file)
        except errors:
            pass
        raise


def open_av(
    file: Any, sampling_rate: int | None = None, demuxer: str | None = None, options: dict[str, str] | None = None
) -> Any:
    """Open a file with FFmpeg: its audio tracks, side by side, at the highest of their rates.

    Args:
        file: A path or a window.
        sampling_rate: What it is to be brought to; None is its own.
        demuxer: FFmpeg's name of it, where the file does not tell.
        options: Of the demuxer.

    Raises:
        DecodeError: if FFmpeg does not know it, or there is nothing to be heard.
    """
    import av

    def reopen() -> Any:
        return _ffmpeg().open_container(_from_start(file), demuxer, options)

    try:
        container = reopen()
        name, guess_s = container.format.name, container.duration and container.duration / 1e6
        codecs = [stream.codec_context and stream.codec_context.name for stream in container.streams.audio]
        if name == "ogg" and codecs[:1] == ["opus"] and sampling_rate is None:
            sampling_rate = _opus_rate(container.streams.audio[0].codec_context.extradata)
        heard = [index for index, codec in enumerate(codecs) if codec]
        if not heard:
            raise DecodeError("it holds no audio track" if not codecs else "no decoder here knows its audio")
        data = headers.data_of_wav(file) if isinstance(file, str) and name == "wav" else None
        framed = _ffmpeg().framed(file, name, codecs[0] or "", data) if isinstance(file, str) else None
        is_broken = functools.cache(functools.partial(_is_broken_ogg, file)) if name == "ogg" else None
        if framed:
            container.close()
            found = [framed]
        else:
            # Reuse the bytes that probing has read.
            opened = [container, *(None for _ in heard[1:])]
            found = [
                _ffmpeg().Container(reopen, index, is_broken, one) for index, one in zip(heard, opened, strict=True)
            ]
        tracks = [timeline.Track(source, sampling_rate) for source in found]
        rate = max(track.sampling_rate for track in tracks)
        tracks = [
            track if track.sampling_rate == rate else timeline.Track(source, rate)
            for track, source in zip(tracks, found, strict=True)
        ]
    except av.error.FFmpegError:
        raise DecodeError("not an audio file that soundfile or FFmpeg knows") from None
    audio = tracks[0] if len(tracks) == 1 else timeline.SideBySide(tracks)
    audio.guess_s = guess_s
    if len(heard) < len(codecs):
        audio.broken = "not all of its audio tracks can be decoded here"
    return audio


def _opus_rate(header: bytes | None) -> int | None:
    """The rate of what was encoded, where Opus knows it (RFC 7845, 5.1); it is decoded at 48 kHz in any case."""
    rate = int.from_bytes((header or b"")[12:16], "little")
    return rate if rate in (8000, 12000, 16000, 24000) else None


def _is_broken_ogg(file: Any) -> bool:
    part = (file,) if isinstance(file, str) else (file.path, file.start, file.stop)
    return headers.is_broken_ogg(*part)


def answer(request: dict[str, Any], audio: Any) -> tuple[dict[str, Any], bytes | memoryview, Any]:
    """The answer to one request: its line, the samples behind it, and the file that is open from now on."""
    try:
        if "open" in request:
            audio = None
            audio = open_file(request["open"], request.get("headerless"))
            frames = audio.frames
            # A length that so few bytes cannot hold is a mistake of the header: what is there is read.
            if frames and frames > os.path.getsize(request["open"]) * audio.sampling_rate / _LEAST_BYTES_S:
                frames = None
            info = {"sampling_rate": audio.sampling_rate, "channels": audio.channels, "frames": frames}
            guess_s = frames / audio.sampling_rate if frames else audio.guess_s
            return {**info, "duration_s": guess_s, "floats": audio.floats}, b"", audio
        if audio is None:
            raise DecodeError("no file is open")
        samples = np.ascontiguousarray(audio.read(*request["read"]), dtype="<f4")
        info = {"frames": len(samples)}
        if audio.lost or audio.broken:
            info |= {"lost": audio.lost, "broken": audio.broken}
        return info, memoryview(samples.data).cast("B") if samples.size else b"", audio
    except FileNotFoundError:
        return {"status": "missing", "reason": "there is no such file"}, b"", None
    except OSError as error:
        return {"status": "unreadable", "reason": error.strerror or "the storage does not give it"}, b"", None
    except MemoryError:
        return {"status": "undecodable", "reason": "decoding it needs more memory than is allowed"}, b"", None
    except DecodeError as error:
        return {"status": "undecodable", "reason": str(error)}, b"", audio


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, even in the middle of a decode."""
    while os.getppid() == parent:
        time.sleep(2.0)
    os._exit(1)


def limit_memory() -> None:
    """Let this process have `MEMORY_LIMIT_BYTES` and no more, where the system knows such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # `Decoder` has said so


def main() -> None:
    """Answer requests until the pipe is closed."""
    limit_memory()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    # Libraries may print; their output must not mix with the answers.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    audio: Any = None
    for line in sys.stdin.buffer:
        info, samples, audio = answer(json.loads(line), audio)
        head = json.dumps(info).encode()
        replies.write(len(head).to_bytes(4, "little") + head)
        replies.write(samples)
        replies.flush()


if __name__ == "__main__":
    main()
