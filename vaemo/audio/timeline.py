"""Samples on one timeline: reading from the start and seeking give the same samples.

Used by the process that decodes (`decode.py`), so nothing of vaemo is imported here. Positions are frames at the
file's rate (all channels are one frame), counted from the container's start behind the codec's declared priming. Gaps
between time stamps are silence, also at the start; overlapping parts are used once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

_GARBAGE, _GARBAGE_S = 4.0, 0.02
_AHEAD_S = 2.0
_END_S = 2.0
_NOWHERE = -(1 << 62)


class DecodeError(Exception):
    """The file cannot be decoded, or not from here on."""


class Lost(NamedTuple):
    """Silence in place of what the file does not hold: frames [start, stop) of channels [first, last).

    `damaged` where something is there that cannot be decoded, else nothing is there.
    """

    start: int
    stop: int
    damaged: bool
    first: int
    last: int


class AudioFile(Protocol):
    """An open audio file.

    Attributes:
        sampling_rate: In Hz.
        channels: How many.
        frames: Its length where a header states it.
        floats: Whether samples are coded as floats, on whatever scale.
        guess_s: Its length in seconds as its size suggests.
        lost: What the last read put in as silence.
        broken: Why nothing is read after the end, where there should be more.
    """

    sampling_rate: int
    channels: int
    frames: int | None
    floats: bool
    guess_s: float | None
    lost: list[Lost]
    broken: str | None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the file has them, (n, channels), float32."""
        ...


class Track:
    """One audio stream of a source, at one rate and with one number of channels.

    Where the stream changes its rate or its channels, they are brought to those of its first frame, or to those asked
    for. One channel becomes all; all become one by their mean; else channels are left out, or silent.

    Args:
        source: As `vaemo.audio.frames.Source`.
        sampling_rate: In Hz; None is that of the first frame. A header may name half of it (HE-AAC).

    Raises:
        DecodeError: if nothing can be decoded.
    """

    def __init__(self, source: Any, sampling_rate: int | None = None) -> None:
        self._source = source
        pieces = source.pieces(0.0)
        first = next(pieces, None)
        if first is None:
            raise DecodeError("it holds no audio that can be decoded")
        self.sampling_rate = sampling_rate or first.frame.sample_rate
        self.channels = len(first.frame.layout.channels)
        stated_s = source.stated_s
        self.frames = round(stated_s * self.sampling_rate) if stated_s else None
        self.floats = source.floats
        self.guess_s: float | None = None
        self.lost: list[Lost] = []
        self.broken: str | None = None
        # Behind the first frame, which may be shorter, frames of one size follow where time stamps are coarse.
        self._grid = self._at(first.time_s or 0.0) + first.step
        self._begin(0, itertools.chain([first], pieces))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the stream has them, (n, channels), float32."""
        self.lost = []
        if start < self._position or start - self._position > _AHEAD_S * self.sampling_rate:
            self._begin(start, self._source.pieces(start / self.sampling_rate))
        elif start > self._position:
            self.read(self._position, start)
            self.lost = []
        samples = np.zeros((stop - start, self.channels), np.float32)
        self._source.until_s = stop / self.sampling_rate
        while self._position < stop and self._fetch():
            run = self._run
            if run.at > self._position:
                silent = min(run.at, stop) - self._position
                self._note(self._position, silent, run.damaged)
                self._position += silent
                continue
            used = self._position - run.at
            taken = min(len(run.samples) - used, stop - self._position)
            place = self._position - start
            samples[place : place + taken] = run.samples[used : used + taken]
            if not self.floats:
                self._silence_garbage(samples[place : place + taken])
            self._position += taken
        return samples[: max(self._position - start, 0)]

    def end(self) -> int:
        """Where it ends."""
        start = max((self.frames or 0) - round(_END_S * self.sampling_rate), 0)
        while n := len(self.read(start, start + 60 * self.sampling_rate)):
            start += n
        return self._position

    def _begin(self, position: int, pieces: Iterator[Any]) -> None:
        self._position = position
        self._expected = _NOWHERE
        self._run = _Run(position, np.zeros((0, self.channels), np.float32), False)
        self._runs = self._in_runs(pieces)

    def _note(self, start: int, n: int, damaged: bool) -> None:
        stop = start + n
        if self.lost and self.lost[-1].stop == start and self.lost[-1].damaged == damaged:
            start = self.lost.pop().start
        self.lost.append(Lost(start, stop, damaged, 0, self.channels))

    def _silence_garbage(self, samples: np.ndarray) -> None:
        """Take out what a decoder makes of broken data: far beyond full scale, as no codec overshoots."""
        if samples.max() <= _GARBAGE and samples.min() >= -_GARBAGE:
            return
        block = round(_GARBAGE_S * self.sampling_rate)
        for at in range(0, len(samples), block):
            part = samples[at : at + block]
            if not np.abs(part).max() <= _GARBAGE:
                part[:] = 0.0
                self._note(self._position + at, len(part), True)

    def _fetch(self) -> bool:
        """Hold samples that reach beyond the position; false at the end."""
        while self._run.at + len(self._run.samples) <= self._position:
            run = next(self._runs, None)
            if run is None:
                return self._fetch_end()
            self._run = run
        return True

    def _fetch_end(self) -> bool:
        """Behind the last samples: silence where something is there that cannot be decoded; else the end."""
        until_s, stated = self._source.damaged_until_s, self.frames
        if until_s is not None and self._at(until_s) > self._position:
            self._run = _Run(self._at(until_s), self._run.samples[:0], True)
            return True
        if stated is not None and self._position < stated - self.sampling_rate and self._source.states_end:
            at, said = (n / self.sampling_rate for n in (self._position, stated))
            self.broken = f"it breaks off at {at:.1f} s; its header says {said:.1f} s"
        elif self._source.is_cut_off:
            self.broken = f"it breaks off at {self._position / self.sampling_rate:.1f} s: what follows is damaged"
        return False

    def _in_runs(self, pieces: Iterator[Any]) -> Iterator[_Run]:
        """Pieces at the track's rate and with its channels."""
        resampler, kind, last, at, begin, n = None, None, None, 0, 0, 0
        for piece in itertools.chain(pieces, [None]):
            now = piece and (piece.frame.sample_rate, piece.frame.layout.name, piece.frame.format.name, piece.end_s)
            placed = self._placed(piece) if piece else 0
            if resampler is not None and (now != kind or abs(placed - self._expected) > 1):
                for out in resampler.resample(None):
                    yield self._cut(at, self._mixed(out), last)
                    at += out.samples
                resampler = None
            if piece is None:
                return
            frame, rate = piece.frame, piece.frame.sample_rate
            if rate == self.sampling_rate:
                self._expected = placed + frame.samples
                yield self._cut(placed, self._mixed(frame), piece)
                continue
            if resampler is None:
                import av

                resampler = av.AudioResampler(format="fltp", layout=frame.layout.name, rate=self.sampling_rate)
                kind, at, begin, n = now, placed, placed, 0
            last, n = piece, n + frame.samples
            self._expected = begin + round(n * self.sampling_rate / rate)
            for out in resampler.resample(frame):
                yield self._cut(at, self._mixed(out), piece)
                at += out.samples

    def _cut(self, at: int, samples: np.ndarray, piece: Any) -> _Run:
        """Samples without a codec's priming and padding."""
        end, begin = piece.end_s * self.sampling_rate, self._at(piece.begin_s)
        if end < at + len(samples):
            samples = samples[: max(round(end) - at, 0)]
        if at < begin:
            samples, at = samples[begin - at :], begin
        return _Run(at if len(samples) else self._position, samples, piece.damaged)

    def _placed(self, piece: Any) -> int:
        """Where the first sample of a piece belongs."""
        expected = self._expected
        if piece.time_s is None:
            return self._position if expected == _NOWHERE else expected
        at = round(piece.time_s * self.sampling_rate)
        if expected != _NOWHERE and self._source.follows((at - expected) / self.sampling_rate):
            return expected
        coarse, n = 2 * self._source.tick_s * self.sampling_rate, piece.step
        if coarse > 2 and piece.frame.sample_rate == self.sampling_rate:
            snapped = self._grid + round((at - self._grid) / n) * n
            return snapped if abs(snapped - at) <= coarse else at
        return at

    def _at(self, time_s: float) -> int:
        return round(time_s * self.sampling_rate)

    def _mixed(self, frame: Any) -> np.ndarray:
        """A frame of FFmpeg as (n, channels), float32 in [-1, 1]."""
        samples = frame.to_ndarray()
        samples = samples.T if frame.format.is_planar else samples.reshape(-1, len(frame.layout.channels))
        if samples.dtype == np.uint8:
            samples = (samples.astype(np.float32) - 128.0) / 128.0
        elif samples.dtype.kind == "i":
            samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        return with_channels(samples, self.channels)


class _Run(NamedTuple):
    """Samples that follow on one another, the position of the first, and whether damage lies before them."""

    at: int
    samples: np.ndarray
    damaged: bool


def with_channels(samples: np.ndarray, channels: int) -> np.ndarray:
    """(n, C) as (n, channels)."""
    found = samples.shape[1]
    if found == channels:
        return samples
    if found == 1:
        return np.repeat(samples, channels, axis=1)
    if channels == 1:
        return samples.mean(axis=1, keepdims=True)
    return np.pad(samples[:, :channels], ((0, 0), (0, max(channels - found, 0))))


class SideBySide:
    """Several tracks as the channels of one file, in order; shorter ones are silent at their end.

    Args:
        tracks: Of one rate.
    """

    def __init__(self, tracks: list[Track]) -> None:
        self._tracks = tracks
        self.sampling_rate = tracks[0].sampling_rate
        self.channels = sum(track.channels for track in tracks)
        lengths = [track.frames for track in tracks]
        self.frames = None if None in lengths else max(n for n in lengths if n is not None)
        self.floats = any(track.floats for track in tracks)
        self.guess_s: float | None = None
        self.lost: list[Lost] = []
        self.broken: str | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as any track has them, (n, channels), float32."""
        parts = [track.read(start, stop) for track in self._tracks]
        n, first = max(map(len, parts)), 0
        samples = np.zeros((n, self.channels), np.float32)
        self.lost = []
        for track, part in zip(self._tracks, parts, strict=True):
            last = first + track.channels
            samples[: len(part), first:last] = part
            self.lost += [lost._replace(first=first, last=last) for lost in track.lost]
            first = last
            self.broken = self.broken or track.broken
        return samples


class Chain:
    """Files that were joined byte by byte, one behind the other, at the rate and with the channels of the first.

    Args:
        first: The first of them.
        follow: Opens the one that begins behind the one before: gives None where there is none, else the file.
    """

    def __init__(self, first: AudioFile, follow: Callable[[], AudioFile | None]) -> None:
        self._links, self._begins = [first], [0]
        self._follow: Callable[[], AudioFile | None] | None = follow
        self.sampling_rate, self.channels, self.frames = first.sampling_rate, first.channels, first.frames
        self.floats, self.guess_s = first.floats, first.guess_s
        self.lost: list[Lost] = []

    @property
    def broken(self) -> str | None:
        """Why nothing is read after the end of the last."""
        return self._links[-1].broken

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the links have them, (n, channels), float32."""
        parts, lost, at, index = [], [], start, 0
        while at < stop:
            while index + 1 < len(self._begins) and self._begins[index + 1] <= at:
                index += 1
            begin = self._begins[index]
            until = self._begins[index + 1] if index + 1 < len(self._begins) else stop
            link = self._links[index]
            part = with_channels(link.read(at - begin, min(until, stop) - begin), self.channels)
            lost += [
                gap._replace(start=gap.start + begin, stop=gap.stop + begin, first=0, last=self.channels)
                for gap in link.lost
            ]
            parts.append(part)
            at += len(part)
            short = min(until, stop) - at
            if short and index + 1 < len(self._begins):
                parts.append(np.zeros((short, self.channels), np.float32))
                at += short
            elif short and not self._find_next():
                break
        self.lost = lost
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros((0, self.channels), np.float32)])

    def _find_next(self) -> bool:
        """Open the link behind the last; false where there is none."""
        if self._follow is None:
            return False
        link = self._follow()
        if link is None:
            self._follow = None
            return False
        last = self._links[-1]
        end = last.end() if isinstance(last, Track) else last.frames or 0
        self._links.append(link)
        self._begins.append(self._begins[-1] + end)
        return True
