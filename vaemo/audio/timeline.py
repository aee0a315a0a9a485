"""Samples on one timeline: what is read from the start and what is jumped to are the same.

Used by the process that decodes (`decode.py`), so nothing of vaemo is imported here. Positions are frames at the
file's rate (all channels are one frame), counted from the container's start behind the codec's declared priming. Gaps
between time stamps are silence, also at the start; what overlaps is heard once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

GAP_S = 0.015
"""Time stamps that run ahead of the samples by less are inexact, and no gap."""

OVERLAP_S = 0.04
"""Time stamps that lag behind the samples by less are inexact, and nothing is heard twice."""

_AHEAD_S = 5.0
_END_S = 2.0


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
        guess_s: Its length in seconds as its size suggests.
        lost: What the last read put in as silence.
        broken: Why nothing is read behind the end, where there should be more.
    """

    sampling_rate: int
    channels: int
    frames: int | None
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
        source: As `vaemo.audio.sources.Source`.
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
        self.guess_s: float | None = None
        self.lost: list[Lost] = []
        self.broken: str | None = None
        # Behind the first frame, which may be shorter, frames of one size follow where time stamps are coarse.
        self._grid = self._at(first.time_s or 0.0) + round(
            first.frame.samples * self.sampling_rate / first.frame.sample_rate
        )
        self._begin(0, self._arrays(first, pieces))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the stream has them, (n, channels), float32."""
        self.lost = []
        if start < self._position or start - self._position > _AHEAD_S * self.sampling_rate:
            self._begin(start, self._arrays(None, self._source.pieces(start / self.sampling_rate)))
        elif start > self._position:
            self.read(self._position, start)
            self.lost = []
        samples = np.zeros((stop - start, self.channels), np.float32)
        while self._position < stop and self._fetch():
            if self._held_at > self._position:
                silent = min(self._held_at, stop) - self._position
                self._note(silent)
                self._position += silent
                continue
            used = self._position - self._held_at
            taken = min(len(self._held) - used, stop - self._position)
            place = self._position - start
            samples[place : place + taken] = self._held[used : used + taken]
            self._position += taken
        return samples[: max(self._position - start, 0)]

    def end(self) -> int:
        """Where it ends."""
        start = max((self.frames or 0) - round(_END_S * self.sampling_rate), 0)
        while n := len(self.read(start, start + 60 * self.sampling_rate)):
            start += n
        return self._position

    def _begin(self, position: int, arrays: Iterator[_Array]) -> None:
        self._position, self._pending = position, arrays
        self._expected: int | None = None
        self._held, self._held_at, self._damaged = np.zeros((0, self.channels), np.float32), position, False

    def _note(self, n: int) -> None:
        start = self._position
        if self.lost and self.lost[-1].stop == start and self.lost[-1].damaged == self._damaged:
            start = self.lost.pop().start
        self.lost.append(Lost(start, self._position + n, self._damaged, 0, self.channels))

    def _fetch(self) -> bool:
        """Hold samples that reach beyond the position; false at the end."""
        while self._held_at + len(self._held) <= self._position:
            array = next(self._pending, None)
            if array is None:
                return self._hold_end()
            at = self._expected if array.time_s is None else self._at(array.time_s)
            if array.time_s is not None:
                at = self._placed(at, len(array.samples))
            if at is None:
                at = self._position
            samples = array.samples
            self._expected = at + len(samples)
            begin, end = self._at(array.begin_s), array.end_s * self.sampling_rate
            if end < at + len(samples):
                samples = samples[: max(round(end) - at, 0)]
            if at < begin:
                samples, at = samples[begin - at :], begin
            self._held, self._held_at, self._damaged = samples, at, array.damaged
        return True

    def _hold_end(self) -> bool:
        """Behind the last samples: silence where something is there that cannot be decoded; else the end."""
        until_s, stated = self._source.damaged_until_s, self.frames
        end = self._at(until_s) if until_s is not None else self._position
        if end > self._position:
            self._held, self._held_at, self._damaged = np.zeros((0, self.channels), np.float32), end, True
            self._source.damaged_until_s = None
            return True
        if stated is not None and self._position < stated - self.sampling_rate and self._source.states_end:
            at, said = (n / self.sampling_rate for n in (self._position, stated))
            self.broken = f"it breaks off at {at:.1f} s; its header says {said:.1f} s"
        return False

    def _placed(self, at: int | None, n: int) -> int | None:
        """Where samples begin whose time stamp says `at`."""
        if at is None or not self._source.tick_s:
            return at
        if self._expected is not None and -OVERLAP_S < (at - self._expected) / self.sampling_rate < GAP_S:
            return self._expected
        coarse = 2 * self._source.tick_s * self.sampling_rate
        if coarse > 2 and n:
            snapped = self._grid + round((at - self._grid) / n) * n
            return snapped if abs(snapped - at) <= coarse else at
        return at

    def _at(self, time_s: float) -> int:
        return round(time_s * self.sampling_rate)

    def _arrays(self, first: Any, pieces: Iterator[Any]) -> Iterator[_Array]:
        """Pieces as samples at the track's rate and with its channels."""
        resampler, kind, next_s = None, None, None
        while (piece := first or next(pieces, None)) is not None:
            first = None
            frame = piece.frame
            now = (frame.sample_rate, frame.layout.name, frame.format.name)
            if resampler is not None and (now != kind or _apart(piece.time_s, next_s)):
                yield from (_Array(None, self._mixed(out), False) for out in resampler.resample(None))
                resampler = None
            if frame.sample_rate == self.sampling_rate:
                yield _Array(piece.time_s, self._mixed(frame), piece.damaged, piece.begin_s, piece.end_s)
                continue
            time_s = None if resampler is not None else piece.time_s
            if resampler is None:
                resampler = av.AudioResampler(format="fltp", layout=frame.layout.name, rate=self.sampling_rate)
                kind = now
            if piece.time_s is not None:
                next_s = piece.time_s + frame.samples / frame.sample_rate
            frame.pts = None
            for out in resampler.resample(frame):
                yield _Array(time_s, self._mixed(out), piece.damaged, piece.begin_s, piece.end_s)
                time_s = None
        if resampler is not None:
            yield from (_Array(None, self._mixed(out), False) for out in resampler.resample(None))

    def _mixed(self, frame: Any) -> np.ndarray:
        """A frame of FFmpeg as (n, channels), float32 in [-1, 1]."""
        samples = frame.to_ndarray()
        samples = samples.T if frame.format.is_planar else samples.reshape(-1, len(frame.layout.channels))
        if samples.dtype == np.uint8:
            samples = (samples.astype(np.float32) - 128.0) / 128.0
        elif samples.dtype.kind == "i":
            samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        return with_channels(samples, self.channels)


class _Array(NamedTuple):
    """Samples and where they belong; as `Piece`."""

    time_s: float | None
    samples: np.ndarray
    damaged: bool
    begin_s: float = 0.0
    end_s: float = float("inf")


def _apart(time_s: float | None, expected_s: float | None) -> bool:
    return time_s is not None and expected_s is not None and not -OVERLAP_S < time_s - expected_s < GAP_S


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
        self.guess_s = first.guess_s
        self.lost: list[Lost] = []

    @property
    def broken(self) -> str | None:
        """Why nothing is read behind the end of the last."""
        return self._links[-1].broken

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) as far as the links have them, (n, channels), float32."""
        parts, lost, at, index = [np.zeros((0, self.channels), np.float32)], [], start, 0
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
        return np.concatenate(parts)

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
