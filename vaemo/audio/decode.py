"""The child process that decodes audio: what a foreign file can do to it is not done to the job.

`vaemo.audio.decoder.Decoder` starts this file as a program and talks with it over two pipes. A request is a JSON line:
`{"open": PATH}` or `{"read": [START, STOP]}` (frames of the file that is open). An answer is JSON behind its length (4
bytes, little end first); that of a read is followed by its samples, float32, frame after frame. soundfile decodes
what it can, PyAV (FFmpeg) the rest. Nothing of vaemo and no torch is imported, so that the child starts in a moment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from typing import Any, Protocol

import numpy as np

MEMORY_LIMIT_BYTES = 8 << 30
MAX_CHANNELS = 64
SAMPLING_RATES_HZ = (2_000, 768_000)

# Demuxers that FFmpeg may use: audio files, none that opens further files or addresses (playlists, concat scripts).
FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,eac3,flac,flv,g722,g723_1,g726,g726le,g729,gsm,ilbc,loas,"
    "matroska,webm,mov,mp4,3gp,mp3,mpeg,mpegts,ogg,qcp,tta,voc,w64,wav,wv,xwma"
)
_SEEK_AHEAD_S = 10.0
_PREROLL_S = 0.5
_SKIP_FRAMES = 1 << 20
_UNKNOWN_FRAMES = (1 << 63) - 1


class DecodeError(Exception):
    """The file cannot be decoded, or not from here on."""


class AudioFile(Protocol):
    """An open audio file."""

    sampling_rate: int
    channels: int
    frames: int | None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the file has them, (n, channels), float32."""
        ...


class SoundFile:
    """What libsndfile reads: WAV (PCM, mu-law, A-law, GSM), FLAC, OGG and Opus, AIFF, AU, CAF."""

    def __init__(self, path: str) -> None:
        import soundfile

        self._error = soundfile.LibsndfileError
        self._open = lambda: soundfile.SoundFile(path)
        self._file = self._open()
        self._seekable = self._file.seekable()
        self._position = 0
        self.sampling_rate = self._file.samplerate
        self.channels = self._file.channels
        self.frames: int | None = self._file.frames
        self.format = self._file.format

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the file has them, (n, channels), float32."""
        try:
            if start != self._position and not self._go_to(start):
                return np.zeros((0, self.channels), np.float32)
            samples = self._file.read(stop - start, dtype="float32", always_2d=True)
        except self._error as error:
            # What it has read of the broken part stays broken.
            self._file, self._position = self._open(), 0
            raise DecodeError(str(error)) from None
        self._position = start + len(samples)
        return samples

    def _go_to(self, start: int) -> bool:
        """Make `start` the next frame; false where the file ends before."""
        if self._seekable:
            if start >= self._file.frames:
                return False
            self._file.seek(start)
            return True
        if start < self._position:
            self._file, self._position = self._open(), 0
        while self._position < start:
            skipped = len(self._file.read(min(start - self._position, _SKIP_FRAMES), dtype="float32"))
            if not skipped:
                return False
            self._position += skipped
        return True


class AvFile:
    """What FFmpeg reads beyond that: MP3, M4A, WebM, AMR, G.729; forward, with jumps where it can seek."""

    def __init__(self, path: str) -> None:
        import av

        self._error = av.error.FFmpegError
        self._path = path
        self._open()
        stream = self._stream
        if stream.duration is not None and stream.time_base is not None:
            seconds: float | None = float(stream.duration * stream.time_base)
        else:
            seconds = self._container.duration / 1e6 if self._container.duration else None
        # The first frame tells: a header may name half the rate (HE-AAC).
        self._fetch()
        if not len(self._held):
            raise DecodeError("it holds no audio")
        self.channels = self._held.shape[1]
        self.frames = round(seconds * self.sampling_rate) if seconds else None

    def _open(self) -> None:
        import av

        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        self._container = av.open(self._path, options=options, metadata_errors="ignore")
        if not self._container.streams.audio:
            raise DecodeError("it holds no audio stream")
        self._stream = self._container.streams.audio[0]
        self._frames = self._container.decode(self._stream)
        self._origin: int | None = None
        self.sampling_rate = 0
        self._position = 0
        self._held = np.zeros((0, 0), np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the file has them, (n, channels), float32."""
        try:
            if start < self._position:
                self._open()
                self._fetch()
            if start - self._position > _SEEK_AHEAD_S * self.sampling_rate:
                self._jump(start)
            parts = [np.zeros((0, self.channels), np.float32)]
            while self._position < stop and len(self._held):
                first = min(max(start - self._position, 0), len(self._held))
                parts.append(self._held[first : stop - self._position])
                used = min(stop - self._position, len(self._held))
                self._position += used
                self._held = self._held[used:]
                if not len(self._held):
                    self._fetch()
            return np.concatenate(parts)
        except (self._error, ValueError) as error:
            raise DecodeError(str(error)) from None

    def _jump(self, start: int) -> None:
        """Seek close before `start`; where the file's time stamps do not allow it, it is decoded up to there."""
        tick_s, origin = self._stream.time_base, self._origin
        if origin is None or tick_s is None:
            return
        try:
            self._container.seek(origin + int((start / self.sampling_rate - _PREROLL_S) / tick_s), stream=self._stream)
            self._frames = self._container.decode(self._stream)
            frame = next(self._frames)
            position = round((frame.pts - origin) * tick_s * self.sampling_rate)  # type: ignore[operator]
            if tick_s * self.sampling_rate > 1:
                # WebM counts milliseconds; frames of one size follow on the first, which may be shorter.
                lead = self._first_samples % frame.samples
                position = lead + round((position - lead) / frame.samples) * frame.samples
            if not 0 <= position <= start:
                raise DecodeError("seeking led behind the place")
        except (self._error, StopIteration, TypeError, DecodeError):
            self._open()
            self._fetch()
            return
        self._position, self._held = position, _as_float(frame)

    def _fetch(self) -> None:
        """The next frame's samples; none at the end."""
        frame = next(self._frames, None)
        if frame is None:
            self._held = self._held[:0]
            return
        if not self.sampling_rate:
            self.sampling_rate, self._origin, self._first_samples = frame.sample_rate, frame.pts, frame.samples
        if frame.sample_rate != self.sampling_rate:
            raise DecodeError(f"the sampling rate changes from {self.sampling_rate} to {frame.sample_rate} Hz")
        self._held = _as_float(frame)


def _as_float(frame: Any) -> np.ndarray:
    """A frame of FFmpeg as (n, channels), float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, len(frame.layout.channels))
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32)


def open_file(path: str) -> AudioFile:
    """Open a file with the first decoder that knows it.

    Raises:
        DecodeError: if none does, or it claims what no recording has.
    """
    import soundfile

    with open(path, "rb") as file:
        if not file.read(1):
            raise DecodeError("the file is empty")
    audio: AudioFile
    try:
        audio = SoundFile(path)
        if audio.format == "MP3" or audio.frames == _UNKNOWN_FRAMES:
            # soundfile seeks after every read: libsndfile garbles the 80 ms of MP3 behind a seek, and fails where a
            # FLAC that was streamed does not say its length.
            audio = _open_av(path)
    except (soundfile.LibsndfileError, ValueError, OverflowError):
        audio = _open_av(path)
    low, high = SAMPLING_RATES_HZ
    if not low <= audio.sampling_rate <= high:
        raise DecodeError(f"its sampling rate is {audio.sampling_rate} Hz; from {low} to {high} Hz is read")
    if not 1 <= audio.channels <= MAX_CHANNELS:
        raise DecodeError(f"it has {audio.channels} channels; up to {MAX_CHANNELS} are read")
    return audio


def _open_av(path: str) -> AvFile:
    import av

    try:
        return AvFile(path)
    except (av.error.FFmpegError, ValueError, StopIteration) as error:
        raise DecodeError(f"not an audio file that soundfile or FFmpeg knows ({error})") from None


def answer(request: dict[str, Any], audio: AudioFile | None) -> tuple[dict[str, Any], bytes | memoryview, Any]:
    """The answer to one request: its line, the samples behind it, and the file that is open from now on."""
    try:
        if "open" in request:
            audio = None
            audio = open_file(request["open"])
            info = {"sampling_rate": audio.sampling_rate, "channels": audio.channels, "frames": audio.frames}
            return info, b"", audio
        if audio is None:
            raise DecodeError("no file is open")
        samples = np.ascontiguousarray(audio.read(*request["read"]), dtype="<f4")
        return {"frames": len(samples)}, memoryview(samples.data).cast("B") if samples.size else b"", audio
    except FileNotFoundError:
        return {"status": "missing", "reason": "there is no such file"}, b"", None
    except OSError as error:
        return {"status": "unreadable", "reason": error.strerror or str(error)}, b"", None
    except MemoryError:
        return {"status": "undecodable", "reason": "decoding it needs more memory than is allowed"}, b"", None
    except DecodeError as error:
        return {"status": "undecodable", "reason": str(error)}, b"", audio


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, even in the middle of a decode."""
    while os.getppid() == parent:
        time.sleep(2.0)
    os._exit(1)


def main() -> None:
    """Answer requests until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    # Libraries may print; what they print must not get between the answers.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    audio: AudioFile | None = None
    for line in sys.stdin.buffer:
        info, samples, audio = answer(json.loads(line), audio)
        head = json.dumps(info).encode()
        replies.write(len(head).to_bytes(4, "little") + head)
        replies.write(samples)
        replies.flush()


if __name__ == "__main__":
    main()
