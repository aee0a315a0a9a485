"""Sources of coded frames with their times: containers that FFmpeg demuxes, and self-framing streams.

Used by the process that decodes (`decode.py`), so nothing of vaemo is imported here. A source gives `Piece`s; what
cannot be decoded is left out, and the next piece is marked. Times are seconds from 0: the container's start behind the
codec's declared priming.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import mmap
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import av

# Demuxers that FFmpeg may use: audio files, none that opens further files or addresses (playlists, concat scripts).
FORMATS = (
    "aac,ac3,act,aiff,amr,amrnb,amrwb,ape,asf,au,avi,avr,bit,caf,dhav,dsf,dss,dts,dtshd,dv,eac3,flac,flv,g722,g723_1,"
    "g726,g726le,g729,gsm,hcom,ilbc,ircam,loas,matroska,webm,mlp,mov,mp4,3gp,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,"
    "nut,ogg,paf,pvf,qcp,rm,sbc,sds,shn,sox,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)

GAP_S = 0.015
"""Time stamps that run ahead of the samples by less are inexact, and no gap."""

OVERLAP_S = 0.04
"""Time stamps that lag behind the samples by less are inexact, and no audio is repeated."""

PREROLL_S = 0.5
"""Decoded before a place that was jumped to: a codec's memory fills."""

LATE_S = 60.0
"""A file whose clock starts at 0 may begin with silence of this length; one that begins later has another clock."""

LINK_GAP_S = 3600.0
"""A longer gap, or more than `LINK_BACK_S` back, is another clock and no gap: the audio follows on."""

LINK_BACK_S = 1.0

_NEVER_S = float("inf")
_UNKNOWN_S = -1e9
_PIECE_FRAMES = 1 << 15
_UNSEEN_SHARE = 0.3
_UNSEEN_BYTES = 64
"""Share of a gap's expected bytes that must be present, more than headers, for the gap to count as damage."""

_FAILURES = 100
_BROKEN: Any = object()
_LEFT_SHARE, _LEFT_BYTES = 0.2, 1 << 15
"""Share and bytes of a file behind its last packet from which they count as lost packets."""

_AHEAD_S = 10.0
_EXACT_S = 1e-4
_MISGUESSED = 8
_COUNTED_S = 6.0
"""More than a piece, and a frame, may last: so far ahead of the end that an encoder stated, frames are looked for."""

_TAIL_S = 0.5
"""Less damage than this behind the last frame is a truncated frame and is ignored."""

# Containers whose clock starts at 0 by definition, whose times can be trusted in a jump, and that state their length.
_FROM_ZERO = ("mov", "matroska", "ogg")
_SEEKABLE = ("mov", "matroska", "ogg", "flac")
_CONSTANT = ("wav", "w64", "caf", "aiff", "au")
_ENDING = ("mov", "flac", "wv", "tta", "ape", "tak")
_STATING = ("mov", "matroska", "ogg", "flac", "caf", "aiff", "au", "w64", "wv", "tta", "ape", "tak", "asf", "avi")


class Piece(NamedTuple):
    """Decoded frames that follow on one another, as one frame of FFmpeg, and where it belongs.

    Attributes:
        time_s: Of its first sample; None where it follows on.
        frame: The frame.
        step: Samples of the first of them.
        damaged: Whether something that could not be decoded lies between the piece before and this one.
        begin_s: What it has before this time is no audio but a codec's priming.
        end_s: What it has from this time on is no audio but a codec's padding.
    """

    time_s: float | None
    frame: Any
    step: int
    damaged: bool
    begin_s: float
    end_s: float


class _Gathering:
    """Frames that follow on one another become a piece: Python's work for each is little."""

    __slots__ = ("_about", "_channels", "_frames", "_gap_s", "_next_s", "_rate", "n")

    def __init__(
        self, time_s: float | None, frame: Any, damaged: bool, gap_s: float, begin_s: float, end_s: float
    ) -> None:
        self.n, self._rate = frame.samples, frame.sample_rate
        self._channels = frame.layout.nb_channels
        self._about, self._gap_s = (time_s, self.n, damaged, begin_s, end_s), gap_s
        self._next_s = float("nan") if time_s is None else time_s + self.n / self._rate
        self._frames = av.AudioFifo()
        frame.pts = None
        self._frames.write(frame)

    def takes(self, time_s: float | None, frame: Any) -> bool:
        """Take one more frame if it follows."""
        if time_s is not None and not -OVERLAP_S < time_s - self._next_s < self._gap_s:
            return False
        # What PyAV does not ask: it would read channels that are not there.
        if frame.layout.nb_channels != self._channels:
            return False
        frame.pts = None
        try:
            self._frames.write(frame)
        except ValueError:
            # Another rate, or another format.
            return False
        self.n += frame.samples
        self._next_s += frame.samples / self._rate
        return True

    def is_enough(self, until_s: float) -> bool:
        """Whether no more is needed."""
        return self.n >= _PIECE_FRAMES or self._next_s >= until_s

    def piece(self) -> Piece:
        """All that was gathered."""
        time_s, step, damaged, begin_s, end_s = self._about
        return Piece(time_s, self._frames.read(), step, damaged, begin_s, end_s)


class Source(Protocol):
    """One audio stream.

    Attributes:
        tick_s: How exact its times are.
        until_s: Up to which time it is needed.
        floats: Whether the samples are coded as floats, on whatever scale.
        stated_s: Its length, where a header states it.
        states_end: Whether a file that ends before that length was cut off.
        damaged_until_s: Behind the last piece: up to where there is more that cannot be decoded; else None.
        is_cut_off: Behind the last piece: whether a good part of the file was not understood.
    """

    tick_s: float
    until_s: float
    floats: bool
    stated_s: float | None
    states_end: bool
    damaged_until_s: float | None
    is_cut_off: bool

    def pieces(self, start_s: float) -> Iterator[Piece]:
        """Pieces from `PREROLL_S` before a time, or earlier; one iteration at a time."""
        ...

    def follows(self, drift_s: float) -> bool:
        """Whether a piece follows the one before, given the gap between that one's end and its start."""
        ...


def open_container(file: Any, demuxer: str | None = None, options: dict[str, str] | None = None) -> Any:
    """Open a path or a file with FFmpeg; network, playlists and the like are out of its reach."""
    known = {"protocol_whitelist": "file"} | ({} if demuxer else {"format_whitelist": FORMATS})
    # Without the protocol, a colon in a name would be taken for one.
    place = f"file:{file}" if isinstance(file, str) else file
    return av.open(place, format=demuxer, options={**known, **(options or {})}, metadata_errors="ignore")


class Container:
    """An audio stream of a container that FFmpeg demuxes.

    Args:
        reopen: Opens the container.
        index: Which of its audio streams.
        is_broken: Says whether a gap is due to damage; None judges by the bytes that FFmpeg passes over.
        container: What `reopen` has given already, nothing of it demuxed; None opens it.
    """

    def __init__(
        self,
        reopen: Callable[[], Any],
        index: int = 0,
        is_broken: Callable[[], bool] | None = None,
        container: Any = None,
    ) -> None:
        self._reopen, self._index, self._is_broken, self._origin_s = reopen, index, is_broken, 0.0
        self._open(container)
        stream, container = self._stream, self._container
        self.tick_s = float(stream.time_base)
        name, codec = container.format.name.split(",")[0], stream.codec_context.name
        constant = name in _CONSTANT and codec.startswith(("pcm", "adpcm"))
        self.floats = codec.startswith("pcm_f") or (codec == "wavpack" and "flt" in stream.codec_context.format.name)
        # FFmpeg does not know how long other packets of an Ogg last.
        self._seekable = constant or (name in _SEEKABLE and (name != "ogg" or codec in ("opus", "vorbis")))
        # The length of a Matroska is that of its longest track.
        self.states_end = name in _ENDING or (name == "matroska" and self._alone)
        start_s = (container.start_time or 0) / 1e6
        if name not in _FROM_ZERO or not 0.0 <= start_s <= LATE_S:
            self._origin_s = start_s
        self._shift_s = -self._origin_s
        self.stated_s: float | None = None
        if name in _STATING or constant:
            if stream.duration is not None:
                self.stated_s = float(stream.duration * stream.time_base)
            elif container.duration:
                self.stated_s = container.duration / 1e6
        self.damaged_until_s: float | None = None
        self.until_s, self.is_cut_off = 0.0, False

    def _open(self, container: Any = None) -> None:
        self._container = self._reopen() if container is None else container
        self._stream = self._container.streams.audio[self._index]
        if self._stream.codec_context.name == "flac":
            # FFmpeg would give what it makes of a damaged frame, which is noise at full scale.
            self._stream.codec_context.options = {"err_detect": "crccheck+explode"}
        for other in self._container.streams:
            if other.index != self._stream.index:
                # Older versions of PyAV cannot make FFmpeg skip unused streams.
                with contextlib.suppress(AttributeError):
                    other.discard = av.stream.Discard.all
        self._alone = len(self._container.streams) == 1
        # The first byte behind the packet before.
        self._byte: int | None = None
        self._pts: int | None = None
        # The end of the packet before, on the timeline, and what is added to time stamps.
        self._time_s = _UNKNOWN_S
        self._shift_s = -self._origin_s
        self._fresh = True

    def pieces(self, start_s: float) -> Iterator[Piece]:
        """Pieces from `PREROLL_S` before a time, or earlier."""
        self.damaged_until_s = None
        first_s, tick_s = start_s - PREROLL_S, self.tick_s
        packets, damaged, heard, held = self._packets(self._go_to(first_s)), False, False, None
        while (packet := next(packets, None)) is not None:
            if packet is _BROKEN:
                damaged = True
                continue
            pts = packet.pts
            if pts is not None and not -LINK_BACK_S <= pts * tick_s + self._shift_s - self._time_s <= LINK_BACK_S:
                packets = self._doubt(packet, packets)
            begin_s: float | None = self._place(packet)
            damaged = damaged or self._passed_over
            if self._time_s < first_s and packet.size:
                continue
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, ValueError):
                damaged = damaged or packet.size > 0
                continue
            damaged = damaged or (not frames and heard and packet.size > 0)
            for frame in frames:
                if not frame.samples:
                    continue
                pts = None if self._standing else frame.pts
                time_s = begin_s if pts is None else pts * tick_s + self._shift_s
                begin_s = None
                if held is None or not held.takes(time_s, frame):
                    if held is not None:
                        yield held.piece()
                    held, heard, damaged = _Gathering(time_s, frame, damaged, GAP_S, 0.0, _NEVER_S), True, False
                elif held.is_enough(self.until_s):
                    yield held.piece()
                    held = None
        if held is not None:
            yield held.piece()
        if damaged:
            self.damaged_until_s = self._time_s
        left = (self._container.size or 0) - (self._byte or 0)
        enough = max(_LEFT_SHARE * (self._container.size or 0), _LEFT_BYTES)
        self.is_cut_off = self._alone and self._byte is not None and left > enough

    def _packets(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Packets, `_BROKEN` in the place of broken ones; goes on behind them for as long as something comes."""
        failures = 0
        while failures < _FAILURES:
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, ValueError):
                failures += 1
                packets, packet = self._container.demux(self._stream), _BROKEN
            except IndexError:
                # Of a stream that was not there at the start, which PyAV does not expect.
                packets = self._container.demux(self._stream)
                continue
            else:
                failures = 0
            if packet is None:
                return
            yield packet

    def _doubt(self, packet: Any, packets: Iterator[Any]) -> Iterator[Any]:
        """A packet whose time is far off is believed if the next one bears it out; gives the packets behind it."""
        following = next(packets, None)
        if following is not None and following is not _BROKEN and following.pts is not None:
            next_s, length_s = following.pts * self.tick_s + self._shift_s, (packet.duration or 0) * self.tick_s
            time_s = packet.pts * self.tick_s + self._shift_s
            if abs(next_s - self._time_s - length_s) < abs(next_s - time_s - length_s):
                packet.pts = None
        return packets if following is None else itertools.chain([following], packets)

    def follows(self, drift_s: float) -> bool:
        """Whether a piece follows the one before, given the gap between that one's end and its start."""
        return -OVERLAP_S < drift_s < GAP_S

    def _go_to(self, first_s: float) -> Iterator[Any]:
        """Packets from one at or before a time; where a jump cannot be trusted, those before are read too."""
        if self._fresh and (first_s <= _AHEAD_S or not self._seekable):
            self._fresh = False
            return self._container.demux(self._stream)
        if self._seekable and first_s > 1.0:
            with contextlib.suppress(av.error.FFmpegError, StopIteration):
                place = int((first_s + self._origin_s) / self._stream.time_base)
                self._container.seek(place, stream=self._stream)
                self._fresh, self._time_s, self._pts, self._shift_s = False, _UNKNOWN_S, None, -self._origin_s
                packets = self._container.demux(self._stream)
                packet = next(packets)
                if packet.pts is not None and packet.pts * self.tick_s + self._shift_s <= first_s + PREROLL_S:
                    return itertools.chain([packet], packets)
        elif _UNKNOWN_S < self._time_s <= first_s:
            self._stream.codec_context.flush_buffers()
            return self._container.demux(self._stream)
        self._container.close()
        self._open()
        self._fresh = False
        return self._container.demux(self._stream)

    def _place(self, packet: Any) -> float:
        """Where a packet begins; a clock that was set again goes on from where the old one was."""
        before_s, pts = self._time_s, packet.pts
        self._passed_over = False
        # Some files give all their packets one time.
        self._standing, self._pts = pts == self._pts, pts
        if pts is None or self._standing:
            time_s = max(before_s, 0.0)
        else:
            time_s = pts * self.tick_s + self._shift_s
            if before_s > _UNKNOWN_S:
                jump_s = time_s - before_s
                if jump_s < -LINK_BACK_S or (jump_s > LINK_GAP_S and not self._seekable):
                    self._shift_s -= jump_s
                    time_s = before_s
                elif jump_s > GAP_S:
                    self._passed_over = self._is_damage(packet, jump_s, before_s)
        self._byte = None if packet.pos is None else packet.pos + packet.size
        self._time_s = time_s + (packet.duration or 0) * self.tick_s
        return time_s

    def _is_damage(self, packet: Any, gap_s: float, before_s: float) -> bool:
        """Whether FFmpeg has skipped something that is broken, rather than that nothing is there."""
        if self._is_broken is not None:
            return self._is_broken()
        if not self._alone or self._byte is None or packet.pos is None or before_s <= 0:
            return False
        return packet.pos - self._byte > max(_UNSEEN_SHARE * gap_s * self._byte / before_s, _UNSEEN_BYTES)


class Header(NamedTuple):
    """What a frame's header says.

    Attributes:
        size: Bytes of the frame, the header among them.
        samples: At `rate`.
        rate: In Hz.
        decoder: FFmpeg's name of the decoder; empty for a frame that is silent.
        kind: What stays the same in one stream.
    """

    size: int
    samples: int
    rate: int
    decoder: str
    kind: object


class Framing(Protocol):
    """A format whose frames follow on one another, each with a header that says its length."""

    chain: int

    def header(self, data: mmap.mmap, at: int) -> Header | None:
        """The frame that begins there; None if none does."""
        ...

    def tag(self, data: mmap.mmap, at: int, header: Header) -> tuple[int, int, int | None] | None:
        """Priming and padding in samples and the number of frames, where this frame holds that and no audio."""
        ...


class MpegAudio:
    """MPEG audio, layers 1 to 3 (ISO/IEC 11172-3, 13818-3, and MPEG-2.5); the tags of Xing, LAME and Fraunhofer."""

    chain = 3
    _KBITS = (
        (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
        (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
        (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    )
    _RATES = (44100, 48000, 32000)
    _DECODER_DELAY = 529

    def __init__(self) -> None:
        self._known: dict[bytes, Header | None] = {}

    def header(self, data: mmap.mmap, at: int) -> Header | None:
        """The frame that begins there; None if none does."""
        four = data[at : at + 4]
        if four not in self._known:
            self._known[four] = self._parse(four)
        return self._known[four]

    def _parse(self, four: bytes) -> Header | None:
        if len(four) < 4 or four[0] != 0xFF or four[1] & 0xE0 != 0xE0:
            return None
        version, layer = four[1] >> 3 & 3, 4 - (four[1] >> 1 & 3)
        bits, rates, padding = four[2] >> 4, four[2] >> 2 & 3, four[2] >> 1 & 1
        if version == 1 or layer == 4 or not 0 < bits < 15 or rates == 3 or four[3] & 3 == 2:
            return None
        rate = self._RATES[rates] >> {3: 0, 2: 1, 0: 2}[version]
        row = layer - 1 if version == 3 else 3 if layer == 1 else 4
        kbits = self._KBITS[row][bits]
        if layer == 1:
            samples, size = 384, (12_000 * kbits // rate + padding) * 4
        else:
            samples = 576 if layer == 3 and version != 3 else 1152
            size = samples * 125 * kbits // rate + padding
        mono = four[3] >> 6 == 3
        return Header(size, samples, rate, f"mp{layer}float", (version, layer, rates, mono))

    def tag(self, data: mmap.mmap, at: int, header: Header) -> tuple[int, int, int | None] | None:
        """Priming and padding in samples and the number of frames, where this frame holds that and no audio."""
        version, layer, _, mono = cast(tuple[int, int, int, bool], header.kind)
        if layer != 3:
            return None
        if data[at + 36 : at + 40] == b"VBRI":
            return 0, 0, int.from_bytes(data[at + 50 : at + 54], "big")
        place = at + 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
        if data[place : place + 4] not in (b"Xing", b"Info"):
            return None
        flags, place = data[place + 7], place + 8
        frames = int.from_bytes(data[place : place + 4], "big") if flags & 1 else None
        place += 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        if data[place : place + 4] not in (b"LAME", b"Lavf", b"Lavc"):
            return 0, 0, frames
        delays = int.from_bytes(data[place + 21 : place + 24], "big")
        return (delays >> 12) + self._DECODER_DELAY, (delays & 0xFFF) - self._DECODER_DELAY, frames


class Adts:
    """AAC in ADTS (ISO/IEC 13818-7, 6.2)."""

    chain = 3
    _RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)

    def header(self, data: mmap.mmap, at: int) -> Header | None:
        """The frame that begins there; None if none does."""
        head = data[at : at + 7]
        if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
            return None
        rates, size = head[2] >> 2 & 15, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if rates >= len(self._RATES) or size < 7:
            return None
        kind = (head[1] & 8, rates, (head[2] & 1) << 2 | head[3] >> 6)
        return Header(size, 1024 * ((head[6] & 3) + 1), self._RATES[rates], "aac", kind)

    def tag(self, data: mmap.mmap, at: int, header: Header) -> tuple[int, int, int | None] | None:
        """None: no frame says such things."""


class Amr:
    """AMR storage format (RFC 4867, section 5), narrow or wide band, one channel."""

    chain = 8
    _NARROW = (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1)
    _WIDE = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1)

    def __init__(self, wide: bool) -> None:
        rate, decoder = (16000, "amrwb") if wide else (8000, "amrnb")
        self._known: list[Header | None] = [None] * 256
        for first in range(0, 128, 4):
            size = (self._WIDE if wide else self._NARROW)[first >> 3 & 15]
            speech = size > 6
            # Speech that is marked as bad is none. FFmpeg's decoder makes no comfort noise of frames without speech.
            if size and (first & 4 or not speech):
                self._known[first] = Header(size, rate // 50, rate, decoder if speech else "", wide)

    def header(self, data: mmap.mmap, at: int) -> Header | None:
        """The frame that begins there; None if none does."""
        return self._known[data[at]] if at < len(data) else None

    def tag(self, data: mmap.mmap, at: int, header: Header) -> tuple[int, int, int | None] | None:
        """None: no frame says such things."""


class _Link(NamedTuple):
    """Frames of one encoder: the first of them, its first sample, its end and count where known, and their kind."""

    first: int
    begin_s: float
    end_s: float
    header: Header
    n_frames: int | None = None


class Framed:
    """A stream of frames that follow on one another, found by their headers.

    What lies between two frames and is no tag was one or more frames: how many is estimated from its bytes. Where the
    kind of the frames changes, or an encoder's tag stands, another recording was joined.

    Args:
        path: The file.
        framing: Its format.
        start: Where the first frame is looked for.
        stop: Behind the last; None is the end of the file.
    """

    tick_s = 0.0
    floats = False
    states_end = True
    is_cut_off = False

    def __init__(self, path: str, framing: Framing, start: int = 0, stop: int | None = None) -> None:
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._framing = framing
        self._stop = os.path.getsize(path) if stop is None else stop
        self._at, self._time_s = start, 0.0
        self._offsets: list[int] = []
        self._times_s: list[float] = []
        self._after_damage: set[int] = set()
        # By the frame behind a gap, how many are taken to be lost there; how many an encoder counted; whether the last
        # one is cut off.
        self._guesses: dict[int, int] = {}
        self._n_frames: int | None = None
        self._is_ragged = False
        self._links: list[_Link] = []
        self._new_link = True
        self.stated_s: float | None = None
        self.damaged_until_s: float | None = None
        self.until_s = 0.0
        self._find(0.0)
        if not self._offsets:
            raise ValueError("no frame")

    def pieces(self, start_s: float) -> Iterator[Piece]:
        """Pieces from `PREROLL_S` before a time, or earlier."""
        self.damaged_until_s = None
        first_s = start_s - PREROLL_S
        self._find(start_s)
        index = max(bisect.bisect_right(self._times_s, first_s) - 1, 0)
        decoder: Any = None
        link, damaged, held = None, False, None
        while True:
            if index >= len(self._offsets):
                self._find(self._time_s + _AHEAD_S)
                if index >= len(self._offsets):
                    if held is not None:
                        yield held.piece()
                    if index in self._after_damage:
                        self.damaged_until_s = self._time_s
                    return
            damaged = damaged or index in self._after_damage
            found = self._links[bisect.bisect_right(self._links, index, key=lambda link: link.first) - 1]
            if link is None or found.first != link.first:
                if held is not None:
                    yield held.piece()
                    held = None
                decoder = av.CodecContext.create(found.header.decoder, "r")
            link = found
            assert decoder is not None
            offset, time_s = self._offsets[index], self._times_s[index]
            header = self._framing.header(self._data, offset)
            assert header is not None
            index += 1
            try:
                packet = av.Packet(self._data[offset : offset + header.size])
                frames = decoder.decode(packet) if header.decoder else [_silence(header)]
            except (av.error.FFmpegError, ValueError):
                damaged, self.damaged_until_s = True, time_s + header.samples / header.rate
                continue
            for frame in frames:
                if held is None or not held.takes(time_s, frame):
                    if held is not None:
                        yield held.piece()
                    held = _Gathering(time_s, frame, damaged, _EXACT_S, link.begin_s, link.end_s)
                elif held.is_enough(self.until_s):
                    yield held.piece()
                    held = None
                time_s += frame.samples / frame.sample_rate
                damaged, self.damaged_until_s = False, None

    def follows(self, drift_s: float) -> bool:
        """Whether a piece follows the one before, given the gap between that one's end and its start."""
        return abs(drift_s) < _EXACT_S

    def _find(self, until_s: float) -> None:
        """Find frames up to a time, and some more."""
        self._scan(until_s + 1.0)
        if self._guesses and self._n_frames is not None:
            self._settle(self._n_frames)

    def _settle(self, n_frames: int) -> None:
        """Share out among the gaps what is missing of the frames that an encoder has counted."""
        self._scan(_NEVER_S)
        gaps, self._guesses, self._n_frames = dict(sorted(self._guesses.items())), {}, None
        guessed, missing = sum(gaps.values()), n_frames - len(self._offsets)
        if self._is_ragged or len(self._links) > 1 or not len(gaps) <= missing <= _MISGUESSED * guessed:
            return
        frame_s = self._links[0].header.samples / self._links[0].header.rate
        before, moved = 0, 0
        for index, end in zip(gaps, [*list(gaps)[1:], len(self._offsets)], strict=True):
            before += gaps[index]
            moved = round(missing * before / guessed) - before
            for later in range(index, end):
                self._times_s[later] += moved * frame_s
        self._time_s += moved * frame_s

    def _scan(self, until_s: float) -> None:
        data, header_at = self._data, self._framing.header
        while self._at < self._stop and (self._time_s < until_s or self._is_near_end()):
            header = header_at(data, self._at)
            known = self._links[-1].header if self._links else None
            if header is None or self._at + header.size > self._stop:
                self._go_on()
                continue
            if known is None or header.kind != known.kind or self._new_link:
                if not self._is_chain(self._at, header.kind):
                    self._go_on()
                    continue
                self._begin_link(header)
                continue
            if self._framing.tag(data, self._at, header) is not None:
                self._new_link = True
                continue
            self._offsets.append(self._at)
            self._times_s.append(self._time_s)
            self._at += header.size
            self._time_s += header.samples / header.rate
            link = self._links[-1]
            if link.n_frames is not None and len(self._offsets) - link.first > link.n_frames:
                # More are there than the encoder counted: its tag is of another file, or was never finished.
                self._links[-1] = link._replace(end_s=_NEVER_S, n_frames=None)
                self._n_frames = None

    def _is_near_end(self) -> bool:
        """Whether the last frames that an encoder counted are next: only those behind them tell whether that is so."""
        return bool(self._links) and abs(self._time_s - self._links[-1].end_s) < _COUNTED_S

    def _begin_link(self, header: Header) -> None:
        """The frame here is the first of an encoder's."""
        tag = self._framing.tag(self._data, self._at, header)
        priming, padding, frames = tag or (0, 0, None)
        begin_s = min(self._time_s, self._links[-1].end_s) if self._links else 0.0
        end_s = _NEVER_S
        if frames:
            end_s = begin_s + (frames * header.samples - priming - padding) / header.rate
            if not self._links:
                self.stated_s, self._n_frames = end_s, frames
        self._links.append(_Link(len(self._offsets), begin_s, end_s, header, frames or None))
        self._time_s = begin_s - priming / header.rate
        self._new_link = False
        if tag is not None:
            self._at += header.size

    def _is_chain(self, at: int, kind: object) -> bool:
        """Whether frames of a kind follow on one another from here."""
        for _ in range(self._framing.chain):
            if at >= self._stop:
                return True
            header = self._framing.header(self._data, at)
            if header is None or header.kind != kind:
                return False
            at += header.size
        return True

    def _go_on(self) -> None:
        """Here is no frame: go to where the next one is, behind tags or behind damage."""
        size = _tag_size(self._data, self._at)
        if size:
            self._at += size
            self._new_link = True
            return
        begin = self._offsets[-1] if self._offsets else self._at
        found = next((at for at in self._places(begin + 1) if self._begins(at)), self._stop)
        gap = self._at
        if self._offsets and found < self._at:
            # The previous frame is the damaged one: its header has a wrong length.
            gap = self._offsets.pop()
            self._time_s = self._times_s.pop()
        # Zeros behind all frames are room that a recorder kept free.
        end = found if found < self._stop else _behind_last_byte(self._data, gap, found)
        if self._offsets and self._links[-1].first <= len(self._offsets):
            header = self._links[-1].header
            lost = _likely_frames(end - gap, self._sizes_around(found))
            length_s = lost * header.samples / header.rate
            if lost and (found < self._stop or length_s >= _TAIL_S):
                self._after_damage.add(len(self._offsets))
                self._guesses[len(self._offsets)] = self._guesses.get(len(self._offsets), 0) + lost
                self._time_s += length_s
        self._is_ragged = self._is_ragged or (found >= self._stop and end > gap)
        self._at = found

    def _places(self, start: int) -> Iterator[int]:
        """Where a frame might begin."""
        if self._framing.chain > 3:
            yield from range(start, self._stop)
            return
        at = start - 1
        while (at := self._data.find(b"\xff", at + 1, self._stop)) >= 0:
            yield at

    def _begins(self, at: int) -> bool:
        if at == self._at:
            return False
        header = self._framing.header(self._data, at)
        return header is not None and at + header.size <= self._stop and self._is_chain(at, header.kind)

    def _sizes_around(self, behind: int) -> list[int]:
        """Of some frames before, and of some from a place on."""
        sizes = [
            header.size for at in self._offsets[-8:] if (header := self._framing.header(self._data, at)) is not None
        ]
        for _ in range(8):
            header = self._framing.header(self._data, behind) if behind < self._stop else None
            if header is None:
                break
            sizes.append(header.size)
            behind += header.size
        return sizes


def _behind_last_byte(data: mmap.mmap, begin: int, stop: int) -> int:
    """Behind the last byte of a span that is not 0; its begin where there is none."""
    while stop > begin:
        part = data[max(stop - (1 << 16), begin) : stop]
        if kept := part.rstrip(b"\0"):
            return stop - len(part) + len(kept)
        stop -= len(part)
    return begin


def _likely_frames(gap: int, sizes: list[int]) -> int:
    """How many frames were in a gap, in bytes, between frames of these sizes: few are likelier than many.

    The sum of n sizes is taken to be log-normal, and n to be there with a probability that falls with its square.
    """
    if gap < min(sizes) / 2:
        return 0
    mean = statistics.fmean(sizes)
    if gap > 64 * mean:
        return round(gap / mean)
    variance = max(statistics.pvariance(sizes), (0.1 * mean) ** 2)

    def likelihood(n: int) -> float:
        spread = math.log1p(variance / (n * mean**2))
        return -((math.log(gap / (n * mean)) + spread / 2) ** 2) / (2 * spread) - math.log(spread) / 2 - 2 * math.log(n)

    return max(range(1, round(3 * gap / mean) + 2), key=likelihood)


def _silence(header: Header) -> Any:
    frame = av.AudioFrame(format="fltp", layout="mono", samples=header.samples)
    frame.sample_rate = header.rate
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    return frame


def _tag_size(data: mmap.mmap, at: int) -> int:
    """Bytes of a tag or a file header that begins here; 0 if none does."""
    head = data[at : at + 32]
    if head[:3] == b"ID3" and len(head) > 9:
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte & 0x7F
        return size + 10 + 10 * (head[5] >> 4 & 1)
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":
        return int.from_bytes(head[12:16], "little") + 32 * (head[23] >> 7 & 1)
    return next((len(magic) for magic in (b"#!AMR-WB\n", b"#!AMR\n") if head.startswith(magic)), 0)


def framed(path: str, container: str, codec: str, data: tuple[int, int] | None = None) -> Framed | None:
    """A file's frames, where they follow on one another; None where a container says where they lie.

    Args:
        path: The file.
        container: FFmpeg's name of what it is.
        codec: FFmpeg's name of how it is coded.
        data: The first byte of its data, and that behind the last, where there is a header.
    """
    framing: Framing
    if container == "mp3" or (data is not None and codec.startswith(("mp1", "mp2", "mp3"))):
        framing = MpegAudio()
    elif container == "aac":
        framing = Adts()
    elif container in ("amr", "amrnb", "amrwb") and codec in ("amrnb", "amrwb"):
        framing = Amr(codec == "amrwb")
    else:
        return None
    with contextlib.suppress(ValueError):
        return Framed(path, framing, *(data or (_first_frame(path), None)))
    return None


def _first_frame(path: str) -> int:
    """Where frames may begin in a file: behind the tags at its start."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < len(data) and (size := _tag_size(data, at)):
            at += size
    return at
