"""Checks of file headers: files that are no audio, wrong headers, and several files joined into one.

Used by the process that decodes (`decode.py`), so nothing of vaemo is imported here. Nothing is decoded either.
"""

from __future__ import annotations

import functools
import io
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

JUNK_BYTES = 4096
"""What lies behind the data of a WAV and is no chunk is junk up to this size; more of it is audio that the header
does not count, since the recorder died before it could."""

_CHUNKS = 10_000
_EMPTY = "it holds no audio, only a header"
_UNPACK, _DECRYPT = "unpack it, and give what comes out", "decrypt it, and give what comes out"
_AGAIN = "saved in place of the audio; fetch it again"

_SIGNATURES = (
    (b"-----BEGIN PGP", f"it is encrypted (OpenPGP); {_DECRYPT}"),
    (b"age-encryption.org/", f"it is encrypted (age); {_DECRYPT}"),
    (b"Salted__", f"it is encrypted (OpenSSL); {_DECRYPT}"),
    (b"AES\x01", f"it is encrypted (AES Crypt); {_DECRYPT}"),
    (b"AES\x02", f"it is encrypted (AES Crypt); {_DECRYPT}"),
    (b"PK\x03\x04", f"it is a ZIP archive; {_UNPACK}"),
    (b"\x1f\x8b\x08", f"it is packed (gzip); {_UNPACK}"),
    (b"BZh", f"it is packed (bzip2); {_UNPACK}"),
    (b"\xfd7zXZ\0", f"it is packed (xz); {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"it is packed (zstd); {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"it is a 7z archive; {_UNPACK}"),
    (b"Rar!\x1a\x07", f"it is a RAR archive; {_UNPACK}"),
    (b"version https://git-lfs", "it is a pointer of Git LFS; fetch the file itself (git lfs pull)"),
    (b"%PDF-", "it is a PDF document"),
    (b"\x89PNG\r\n", "it is a picture (PNG)"),
    (b"\xff\xd8\xff\xe0", "it is a picture (JPEG)"),
    (b"\xff\xd8\xff\xe1", "it is a picture (JPEG)"),
    (b"#EXTM3U", "it is a playlist, which holds no audio itself"),
    (b"[playlist]", "it is a playlist, which holds no audio itself"),
    (b"ffconcat", "it is a playlist, which holds no audio itself"),
)
_TEXTS = (
    (b"<!doctype html", f"it is a web page, {_AGAIN}"),
    (b"<html", f"it is a web page, {_AGAIN}"),
    (b"<?xml", f"it is an XML document, such as an error message, {_AGAIN}"),
    (b"<error>", f"it is an error message of an object store, {_AGAIN}"),
    (b'{"', f"it is a JSON document, such as an error message, {_AGAIN}"),
)
_ENVELOPED = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03"
"""The object id of enveloped data of S/MIME (RFC 5652)."""


def not_audio(head: bytes) -> str | None:
    """What a file is, and what to do, where its first 64 bytes say that it is no audio."""
    for start, what in _SIGNATURES:
        if head.startswith(start):
            return what
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in _TEXTS:
        if text.startswith(start):
            return what
    if _is_openpgp(head):
        return f"it is encrypted (OpenPGP); {_DECRYPT}"
    if head[:1] == b"\x30" and _ENVELOPED in head:
        return f"it is encrypted (S/MIME); {_DECRYPT}"
    return None


def _is_openpgp(head: bytes) -> bool:
    """Whether a file begins with a session key, as messages of OpenPGP do (RFC 9580, sections 4.2, 5.1, 5.3)."""
    if len(head) < 16 or not head[0] & 0x80:
        return False
    if head[0] & 0x40:
        tag = head[0] & 0x3F
        body = 2 if head[1] < 192 or 224 <= head[1] < 255 else 3 if head[1] < 224 else 6
    else:
        tag, body = head[0] >> 2 & 15, 1 + (1, 2, 4, 0)[head[0] & 3]
    version = head[body]
    if tag == 1:
        return version == 3 and head[body + 9] in (1, 2, 16, 18, 25, 26)
    return tag == 3 and version in (4, 5) and 1 <= head[body + 1] <= 13 and head[body + 2] in (0, 1, 3)


class Window(io.RawIOBase):
    """A part of a file, some of its bytes replaced, read like a file of its own.

    Args:
        path: The file.
        start: Its first byte.
        stop: The byte behind its last; None is the end of the file.
        patches: Other bytes, by where they begin, counted from `start`.
    """

    def __init__(
        self, path: str, start: int = 0, stop: int | None = None, patches: Mapping[int, bytes] | None = None
    ) -> None:
        self.path, self.start = path, start
        self.stop = os.path.getsize(path) if stop is None else stop
        self.patches = dict(patches or {})
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - it stays open as long as this does
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The next byte, counted from the start of the part."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte; as in any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.stop - self.start}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as the part reaches."""
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self.stop - self.start - self._at), 0)
        self._file.seek(self.start + self._at)
        n = self._file.readinto(view[:wanted]) or 0
        for at, other in self.patches.items():
            first, last = max(at, self._at), min(at + len(other), self._at + n)
            if first < last:
                view[first - self._at : last - self._at] = other[first - at : last - at]
        self._at += n
        return n

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _Layout(NamedTuple):
    """How a container lays out its chunks: byte order, lengths of id and size, where the first begins."""

    order: str
    id_bytes: int
    size_bytes: int
    first: int
    data: bytes
    counts_itself: bool = False
    align: int = 2


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_RIFF = _Layout("little", 4, 4, 12, b"data")
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"RIFX": _Layout("big", 4, 4, 12, b"data"),
    b"FORM": _Layout("big", 4, 4, 12, b"SSND"),
    b"riff": _Layout("little", 16, 8, 40, _W64_DATA, counts_itself=True, align=8),
    b"caff": _Layout("big", 4, 8, 8, b"data", align=1),
}
_KNOWN_TAILS = (b"ID3", b"TAG", b"APETAGEX", b"<", b"{")


class _Data(NamedTuple):
    """Where the samples lie and what the header says of that; positions in the file."""

    layout: _Layout
    size_at: int
    begin: int
    stated: int
    available: int
    ds64_at: int | None

    @property
    def behind(self) -> int:
        """Where the next chunk begins, if the header is right."""
        return self.begin + self.stated + -self.stated % self.layout.align


def is_whole_wav(head: bytes, size: int) -> bool:
    """Whether a WAV ends where its samples do, as far as its first bytes tell: nothing to repair, nothing joined.

    Args:
        head: Its first bytes.
        size: Of the file.
    """
    at = 12 if head[:4] == b"RIFF" else len(head)
    while at + 8 <= len(head):
        name, stated = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + stated
        if name == b"data":
            return stated > 0 and at <= size <= at + at % 2
        if name == b"ds64":
            return False
        at += at % 2
    return False


def _find_data(file: io.BufferedReader, size: int, start: int) -> _Data | None:
    """The chunk with the samples of a WAV, AIFF, W64 or CAF that begins at `start`."""
    file.seek(start)
    layout = _LAYOUTS.get(file.read(4))
    if layout is None:
        return None
    at, ds64_at, ds64_size = start + layout.first, None, None
    for _ in range(_CHUNKS):
        if at >= size:
            return None
        file.seek(at)
        head = file.read(layout.id_bytes + layout.size_bytes)
        if len(head) < layout.id_bytes + layout.size_bytes:
            return None
        name, begin = head[: layout.id_bytes], at + len(head)
        stated = int.from_bytes(head[layout.id_bytes :], layout.order)  # type: ignore[arg-type]
        if layout.counts_itself:
            stated = max(stated - len(head), 0)
        if name == b"ds64":
            ds64_at, ds64_size = begin, int.from_bytes(file.read(16)[8:], "little")
        if name == layout.data:
            if ds64_size is not None and stated == 0xFFFFFFFF:
                stated = ds64_size
            return _Data(layout, begin - layout.size_bytes, begin, stated, size - begin, ds64_at)
        at = begin + stated + -stated % layout.align
    return None


def _chunks(file: io.BufferedReader, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Names, first bytes and sizes of the chunks of a WAV from a place on, as far as they have names."""
    for _ in range(_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if at + 8 > size or not all(32 <= byte < 127 for byte in head[:4]):
            return
        stated = int.from_bytes(head[4:], "little")
        yield head[:4], at + 8, stated
        at += 8 + stated + stated % 2


def _next_data(file: io.BufferedReader, at: int, size: int) -> int | None:
    """Where a further chunk of samples begins among the chunks of a WAV from a place on; empty ones do not count."""
    for name, begin, stated in _chunks(file, at, size):
        file.seek(begin)
        if name == b"data" and begin < size and (stated or file.read(4) != b"data"):
            return begin - 8
    return None


def _are_chunks(file: io.BufferedReader, at: int, size: int, layout: _Layout) -> bool:
    """Whether chunks follow on one another from a place to the end of the file."""
    while at < size:
        file.seek(at)
        head = file.read(layout.id_bytes + layout.size_bytes)
        if not any(head):
            # Room that was left over, or silence.
            return not any(map(any, iter(lambda: file.read(1 << 16), b"")))
        if len(head) < layout.id_bytes + layout.size_bytes or not all(32 <= byte < 127 for byte in head[:4]):
            return False
        stated = int.from_bytes(head[layout.id_bytes :], layout.order)  # type: ignore[arg-type]
        at += (0 if layout.counts_itself else len(head)) + max(stated, 1)
        # A last chunk may lack the byte that makes its length even.
        at = at if at >= size else at + -stated % layout.align
    return at <= size + layout.align


def repaired(path: str) -> Window | str | None:
    """A file with the size of its data as it is, where its header has it too small or of no use.

    A recorder that dies leaves a size of 0, or that of some seconds ago. What lies behind the data counts as audio
    unless it is chunks, a tag, another file (`next_link`), or less than `JUNK_BYTES`.

    Returns:
        What is to be read in its place; None where the header is right, or no decoder minds; a reason where the file
        holds no samples.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) == b".snd":
            head = file.read(8)
            begin, stated = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
            if size <= begin:
                return _EMPTY
            wrong = not stated or (stated + JUNK_BYTES <= size - begin and not _joined(file, begin + stated, size))
            return Window(path, patches={8: b"\xff\xff\xff\xff"}) if wrong else None
        data = _find_data(file, size, 0)
        if data is None:
            return _padded(path, file, size)
        rf64 = data.ds64_at is not None
        if data.stated >= data.available:
            return _with_size(path, data) if rf64 and data.available else None
        if data.available <= 0:
            return _EMPTY
        if not data.stated:
            file.seek(data.begin)
            if file.read(1) != b"\0" and _are_chunks(file, data.begin, size, data.layout):
                return _EMPTY
        if data.stated:
            file.seek(data.behind)
            tail = file.read(8)
            few = size - data.behind < JUNK_BYTES
            if few or tail.startswith(_KNOWN_TAILS) or _joined(file, data.behind, size):
                return None
            if _are_chunks(file, data.behind, size, data.layout):
                return None
        return _with_size(path, data)


_CHUNK_NAMES = (b"data", b"fmt ", b"fact", b"LIST", b"bext", b"JUNK")


def _padded(path: str, file: io.BufferedReader, size: int) -> Window | None:
    """A WAV whose writer left out the byte behind a chunk of odd length; None where that is not what is wrong.

    Of what lies before the samples the format is kept, and the rest is a chunk of junk.
    """
    file.seek(0)
    if file.read(12)[::8] != b"RW":
        return None
    at, stated, format_ = 12, 0, b""
    for _ in range(_CHUNKS):
        file.seek(at - stated % 2)
        head = file.read(8 + stated % 2)
        if stated % 2 and (head[:1] == b"\0" or head[1:5] in _CHUNK_NAMES):
            head = head[1:]
        elif stated % 2:
            at, head = at - 1, head[:8]
        if len(head) < 8:
            return None
        stated = int.from_bytes(head[4:], "little")
        if head[:4] == b"fmt ":
            format_ = head + file.read(min(stated, 64))
        if head[:4] == b"data":
            break
        at += 8 + stated + stated % 2
    # The samples are to begin at an even place: the first byte is left out where they do not.
    start = at % 2
    n_junk = at - start - 12 - len(format_) - 8
    if head[:4] != b"data" or len(format_) < 24 or len(format_) % 2 or n_junk < 0:
        return None
    front = b"RIFF" + (size - start - 8).to_bytes(4, "little") + b"WAVE" + format_
    return Window(path, start, patches={0: front + b"JUNK" + n_junk.to_bytes(4, "little")})


def data_of_wav(path: str) -> tuple[int, int] | None:
    """Where the data of a WAV begins, and where it ends; None for another file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        data = _find_data(file, size, 0) if file.read(4) in (b"RIFF", b"RF64", b"BW64") else None
    return None if data is None else (data.begin, data.begin + min(data.stated or data.available, data.available))


def _with_size(path: str, data: _Data) -> Window:
    """The file with all bytes from the first sample on as its data."""
    layout, n = data.layout, data.available
    stated = n + (layout.id_bytes + layout.size_bytes if layout.counts_itself else 0)
    patches = {data.size_at: min(stated, 256**layout.size_bytes - 1).to_bytes(layout.size_bytes, layout.order)}
    if data.ds64_at is not None:
        patches[data.ds64_at] = (data.begin + n - 8).to_bytes(8, "little") + n.to_bytes(8, "little") + bytes(8)
        patches[data.size_at] = b"\xff\xff\xff\xff"
    return Window(path, patches=patches)


def _joined(file: io.BufferedReader, at: int, size: int) -> bool:
    """Whether another file of such a kind begins there."""
    if at >= size:
        return False
    file.seek(at)
    head = file.read(12)
    return head[:4] == b".snd" or (head[:4] in _LAYOUTS and head[8:12] in (b"WAVE", b"AIFF", b"AIFC"))


def first_link(path: str) -> int:
    """Where the recording begins in a file: 0, or its first chunk of samples where an empty one lies before that."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        data = _find_data(file, size, 0)
        is_empty = data is not None and data.layout is _RIFF and not data.stated
        return (data is not None and is_empty and _next_data(file, data.begin, size)) or 0


def link(path: str, start: int, stop: int | None) -> Window:
    """What begins where `next_link` says, as a file: a further chunk of samples gets the header of the WAV."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(start)
        if file.read(4) != b"data":
            data = _find_data(file, size, start) if stop else None
            file.seek(stop or 0)
            # Empty chunks may lie between: libsndfile takes the last.
            return Window(path, start, data.behind if data and file.read(4) == b"data" else stop)
        stated = int.from_bytes(file.read(4), "little")
        formats = (begin for name, begin, _ in _chunks(file, _RIFF.first, start) if name == b"fmt ")
        file.seek(next(formats, 12) - 4)
        n_format = int.from_bytes(file.read(4), "little")
        front = b"RIFF\xff\xff\xff\xffWAVEfmt " + n_format.to_bytes(4, "little") + file.read(n_format)
    n = min(stated or size, size - start - 8)
    # It lies over the samples before, which are not read here.
    front += b"data" + n.to_bytes(4, "little")
    return Window(path, start + 8 - len(front), start + 8 + n, {0: front})


def next_link(path: str, start: int = 0) -> int | None:
    """Where another file begins in this one: recordings that were joined byte by byte, or an Ogg of several links.

    A further chunk of samples in a WAV is one too (`link`): some decoders read the first chunk alone, some the last.

    Args:
        path: The file.
        start: Where the link before begins.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(start)
        head = file.read(12)
        found: int | None = None
        if head[:4] == b"OggS":
            found = _next_ogg(file, start, size)
        elif head[:4] == b"\x1aE\xdf\xa3":
            found = _next_matroska(file, start, size)
        elif head[4:8] == b"ftyp":
            found = _next_mp4(file, start, size)
        elif head[:4] == b"fLaC":
            found = None if is_one_flac(file, start, size) else _find(file, _FLAC, start + 4)
        elif head[:4] == b".snd":
            begin, stated = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
            found = start + begin + stated if _joined(file, start + begin + stated, size) else None
        elif head[:4] in _LAYOUTS:
            data = _find_data(file, size, start)
            if data is not None and data.stated:
                found = _behind_samples(file, data.behind, size, data.layout)
        elif start and head[:4] == b"data":
            stated = int.from_bytes(head[4:8], "little")
            found = _behind_samples(file, start + 8 + stated + stated % 2, size, _RIFF) if stated else None
    return found


def _behind_samples(file: io.BufferedReader, at: int, size: int, layout: _Layout) -> int | None:
    """Where another file, or a further chunk of samples, begins behind the samples; None if none does."""
    if _joined(file, at, size):
        return at
    return _next_data(file, at, size) if layout is _RIFF else None


_FLAC = b"fLaC\0\0\0\x22"
_PROBE_BYTES = 1 << 15


def is_one_flac(file: io.BufferedReader, start: int, size: int) -> bool:
    """Whether a FLAC ends where its header says, and its frames count up at some places on the way.

    So it need not be searched from end to end. False where that is not clear.
    """
    file.seek(start)
    facts = file.read(42)
    if not facts.startswith(_FLAC):
        return False
    block, total = int.from_bytes(facts[8:10], "big"), int.from_bytes(facts[18:26], "big") & (1 << 36) - 1
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    audio, probe = _behind_facts(content, start), _flac_probe(facts)
    last, end = (-1, 0), 0
    for share in _FLAC_SHARES:
        begin = max(audio + round(share * (size - audio)) - probe, audio)
        frames = _flac_frames(content, begin, begin + probe, block)
        first = next(frames, None)
        # Where one place does not overlap the one before, another frame is its first.
        if first is None or first[0] < last[0] + (begin >= end):
            return False
        last, end = first, begin + probe
    return sum([last, *frames][-1]) == total


def flac_end(path: str) -> int:
    """Behind the last sample of a FLAC, by the frames in its last bytes; 0 where none is found there."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        block, end = int.from_bytes(data[8:10], "big"), 0
        # A tag may lie behind the last frame.
        for probe in (_flac_probe(data[:42]), _PROBE_BYTES):
            end = end or max(map(sum, _flac_frames(data, max(size - probe, 42), size, block)), default=0)
    return end


def _flac_probe(facts: bytes) -> int:
    """In so many bytes of a FLAC a frame begins, by the largest frame that its first block names, if any."""
    largest = int.from_bytes(facts[15:18], "big")
    return min(largest + 16 if largest else _PROBE_BYTES, _PROBE_BYTES)


def _behind_facts(data: mmap.mmap, start: int) -> int:
    """Where the first frame of a FLAC begins: behind its blocks of metadata."""
    at, is_last = start + 4, False
    while not is_last and at + 4 <= len(data):
        is_last = bool(data[at] & 0x80)
        at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    return at


_FLAC_SHARES = (1 / 64, 1 / 32, *(sixteenths / 16 for sixteenths in (1, 2, 4, 6, 8, 10, 12, 14, 16)))
_FLAC_SYNC = re.compile(rb"\xff[\xf8\xf9]")


def _flac_frames(data: mmap.mmap, begin: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """First sample and length of the frames that begin between two bytes of a FLAC (RFC 9639, 9.1)."""
    for found in _FLAC_SYNC.finditer(data, begin, end):
        head = data[found.start() : found.start() + 16]
        if len(head) < 16 or head[3] & 1:
            continue
        # The number is written as in UTF-8: of the frame where all have one size, else of its first sample.
        more = max(8 - (head[4] ^ 0xFF).bit_length() - 1, 0)
        number = head[4] & (0x7F >> (more + 1 if more else 0))
        for byte in head[5 : 5 + more]:
            number = number << 6 | byte & 0x3F
        code, behind = head[2] >> 4, 5 + more
        length = 192 if code == 1 else 144 << code if code < 6 else 1 << code
        if code in (6, 7):
            length = int.from_bytes(head[behind : behind + code - 5], "big") + 1
            behind += code - 5
        behind += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
        if code and _crc8(head[:behind]) == head[behind]:
            yield number if head[1] & 1 else number * block, length


def _crc8(data: bytes) -> int:
    checksum = 0
    for byte in data:
        checksum = _CRC8[checksum ^ byte]
    return checksum


def _crc8_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte << 1 ^ 7 * (byte >> 7)) & 0xFF
    return byte


_CRC8 = bytes(map(_crc8_of, range(256)))


def _find(file: io.BufferedReader, wanted: bytes, start: int) -> int | None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(wanted, start)
    return None if at < 0 else at


def _next_ogg(file: io.BufferedReader, start: int, size: int) -> int | None:
    """The first page behind others that begins a stream."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at, first = start, set()
        while content[at : at + 4] == b"OggS" and content[at + 5] & 2:
            first.add(content[at + 14 : at + 18])
            at = _behind_page(content, at)
        last = content.rfind(b"OggS", max(at, size - (1 << 17)))
        if last < 0 or content[last + 14 : last + 18] in first:
            return None
        while 0 <= at < size:
            if content[at : at + 4] != b"OggS":
                at = content.find(b"OggS", at + 1)
            elif len(content[at : at + 27]) == 27 and content[at + 5] & 2 and content[at + 4] == 0:
                return at
            else:
                at = _behind_page(content, at)
    return None


def is_broken_ogg(path: str, start: int = 0, stop: int | None = None) -> bool:
    """Whether a page of an Ogg is missing or damaged, by their numbers and checksums (RFC 3533, section 6)."""
    numbers: dict[bytes, int] = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at, stop = start, len(content) if stop is None else stop
        while at < stop:
            page = content[at : _behind_page(content, at)]
            serial, number = page[14:18], int.from_bytes(page[18:22], "little")
            if numbers.get(serial, number - 1) != number - 1 or not _is_intact(page):
                return True
            numbers[serial] = number
            at += len(page)
    return False


def is_plain_ogg(path: str) -> bool:
    """Whether an Ogg is one stream of Vorbis or Opus, every page intact, whose times count its samples without a gap.

    Then libsndfile, which looks at no time stamp but the last, reads what FFmpeg would, and faster. A page's time
    stamp is compared with the lengths of its packets, which their first bytes tell (Vorbis I, 4.3.1; RFC 6716, 3.1).
    More than two channels, which FFmpeg orders otherwise, Opus with a gain, and what is odd are not plain.
    """
    with open(path, "rb", buffering=0) as file:
        content = file.readall()
    size, start = len(content), content[14:18]
    tables, offsets, granules = list[bytes](), list[int](), list[bytes]()
    at = total = 0
    while at < size:
        head = content[at : at + 27]
        begin = at + 27 + head[26] if len(head) == 27 else at
        table = content[at + 27 : begin]
        held = sum(table)
        stop = begin + held
        if not table or stop > size or head[14:22] != start + len(tables).to_bytes(4, "little"):
            return False
        if head[5] & 6 != 2 * (at == 0) + 4 * (stop == size) or not _is_intact(content[at:stop]):
            return False
        tables.append(table)
        offsets.append(begin - total)
        granules.append(head[6:14])
        at, total = stop, total + held
    # Of every segment its size, its page and its place; a packet ends with the first that is not full.
    sizes = np.frombuffer(b"".join(tables), np.uint8)
    ends = (sizes < 255).nonzero()[0]
    if len(ends) < 3:
        return False
    pages = np.arange(len(tables)).repeat(list(map(len, tables)))
    starts = np.empty_like(ends)
    starts[0], starts[1:] = 0, ends[:-1] + 1
    places = sizes.cumsum(dtype=np.int64) - sizes + np.array(offsets)[pages]
    headers = [
        b"".join(content[places[i] : places[i] + sizes[i]] for i in range(first, last + 1))
        for first, last in zip(starts[:3].tolist(), ends[:3].tolist(), strict=True)
    ]
    n_headers, lengths_of = _packets_of(headers)
    starts, ends = starts[n_headers:], ends[n_headers:]
    if lengths_of is None or not len(ends) or not sizes[starts].all():
        return False
    lengths = lengths_of(np.frombuffer(content, np.uint8), places[starts])
    # The time stamp of a page is that of the end of the last packet that ends there; the last page may cut some off.
    pages = pages[ends]
    expected = np.bincount(pages, lengths, len(tables)).astype(np.int64).cumsum()
    ended = np.bincount(pages).nonzero()[0]
    stated = np.frombuffer(b"".join(granules), "<i8")[ended]
    expected = expected[ended]
    if not lengths[1:].all() or ended[-1] != len(tables) - 1 or (stated[:-1] != expected[:-1]).any():
        return False
    return bool(expected[-1] - lengths[-1] < stated[-1] <= expected[-1])


_Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _packets_of(headers: list[bytes]) -> tuple[int, _Lengths | None]:
    """How many packets of an Ogg are headers; from octets and where the others begin, how long they last in samples."""
    first = headers[0] if headers else b""
    if first[:8] == b"OpusHead" and len(first) >= 19 and first[9] in (1, 2) and not any(first[16:19]):
        return 2, _lengths_of_opus
    if first[:7] == b"\x01vorbis" and len(first) == 30 and first[11] in (1, 2) and len(headers) == 3:
        blocks = _vorbis_blocks(1 << (first[28] & 15), 1 << (first[28] >> 4), headers[2][-400:])
        return 3, None if blocks is None else functools.partial(_lengths_of_vorbis, blocks)
    return 0, None


_OPUS_FRAMES = np.array([480, 960, 1920, 2880] * 3 + [480, 960] * 2 + [120, 240, 480, 960] * 4)


def _lengths_of_opus(octets: np.ndarray, places: np.ndarray) -> np.ndarray:
    heads = octets[places]
    counts = np.array([1, 2, 2, 0])[heads & 3]
    several = np.flatnonzero(heads & 3 == 3)
    counts[several] = octets[np.minimum(places[several] + 1, len(octets) - 1)] & 63
    return _OPUS_FRAMES[heads >> 3] * counts


def _lengths_of_vorbis(blocks: np.ndarray, octets: np.ndarray, places: np.ndarray) -> np.ndarray:
    sizes = blocks[octets[places]]
    # Half of each block overlaps the one before; the first gives nothing yet. What is no audio has no length.
    return np.concatenate([[0], (sizes[:-1] + sizes[1:]) // 4 * (sizes[1:] > 0) * (sizes[:-1] > 0)])


@functools.lru_cache(maxsize=16)
def _vorbis_blocks(short: int, long: int, setup: bytes) -> np.ndarray | None:
    """The block size of a packet by its first byte, (256,), 0 for what is no audio.

    By the table of modes at the end of the setup header, read backwards.
    """
    tail = int.from_bytes(setup, "little")
    top, flags, found = tail.bit_length() - 1, list[int](), 0
    while top >= 41 + 6 and len(flags) < 64:
        mode = tail >> (top - 41) & (1 << 41) - 1
        if mode >> 33 > 63 or mode >> 1 & 0xFFFFFFFF:
            break
        flags.append(mode & 1)
        top -= 41
        if tail >> (top - 6) & 63 == len(flags) - 1:
            found = len(flags)
    if not found:
        return None
    blocks = [long if flag else short for flag in reversed(flags[:found])]
    mask = (1 << (found - 1).bit_length()) - 1
    table = np.zeros(256, np.int64)
    for head in range(0, 256, 2):
        mode = head >> 1 & mask
        table[head] = blocks[mode] if mode < found else 0
    return table


def _is_intact(page: bytes) -> bool:
    """Whether a page has its checksum, which zlib reckons with the bits of every byte the other way round."""
    if page[:5] != b"OggS\0" or len(page) < 27:
        return False
    mirrored = memoryview(page.translate(_MIRRORED))
    # It inverts what comes in and goes out. The checksum counts as zeros.
    found = zlib.crc32(mirrored[26:], zlib.crc32(bytes(4), zlib.crc32(mirrored[:22], 0xFFFFFFFF))) ^ 0xFFFFFFFF
    return found == int.from_bytes(mirrored[22:26])


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _behind_page(content: mmap.mmap, at: int) -> int:
    n = content[at + 26] if at + 26 < len(content) else 0
    return at + 27 + n + sum(content[at + 27 : at + 27 + n])


def _next_matroska(file: io.BufferedReader, start: int, size: int) -> int | None:
    """Behind the segment where that says its length, else the next header of such a file."""
    file.seek(start + 4)
    header = _vint(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    segment = _vint(file)
    if segment is None:
        return _find(file, b"\x1aE\xdf\xa3", start + 4)
    behind = file.tell() + segment
    file.seek(behind)
    return behind if behind < size and file.read(4) == b"\x1aE\xdf\xa3" else None


def _vint(file: io.BufferedReader) -> int | None:
    """A length as Matroska writes it; None where it is unknown."""
    first = file.read(1)[0:1]
    if not first or not first[0]:
        return None
    n = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> n)]) + file.read(n), "big")
    return None if value == (1 << 7 * (n + 1)) - 1 else value


def _next_mp4(file: io.BufferedReader, start: int, size: int) -> int | None:
    at = start
    for _ in range(1_000_000):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return None
        if head[4:8] == b"ftyp" and at > start:
            return at
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or at + length >= size:
            return None
        at += length
    return None
