"""Recordings as mono float32 at 16 kHz, decoded in a separate process.

Reads recordings (local, remote, or embedded in a Parquet manifest) whole or in part. What is wrong with a file is
data, not an error: `AudioProblem` carries the status and the reason of its row. Letters: C channels, n samples.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vaemo import files
from vaemo.audio.decoder import AudioInfo, AudioProblem, Block, Decoder, Lost
from vaemo.audio.formats import headerless, is_unsaid, suffix_of
from vaemo.audio.sinc import resample, sinc_kernel
from vaemo.config import AudioConfig
from vaemo.data.manifest import embedded
from vaemo.errors import UsageError
from vaemo.units import SAMPLING_RATE_HZ, SAMPLING_RATES_HZ

__all__ = ["AudioInfo", "AudioProblem", "Decoder", "Recording", "Resampler"]

_BLOCK_VALUES = 4_000_000
"""Samples, all channels counted, that are decoded at a time: 16 MB."""

_PAST_END_S = 1.0
"""An utterance may end this much after its recording, and is cut there: times are rounded, codecs drop frames."""

_LOUD = 4.0
"""No float on the scale of [-1, 1] exceeds this, even where codecs overshoot and mixes clip."""

_LOUD_SHARE = 1e-3
"""Where more samples do, the scale is another."""

_DAMAGE_JOINED_S = 1.0
_DAMAGES_SHOWN = 3

FILTER_ZEROS = 16
"""Zero crossings of the resampling filter on either side: with six, the usual number, the images of a telephone band
reach up to 5 kHz."""

_RATIO_LIMIT = 1000
"""Largest term of a resampling ratio; an odd rate is off by less than a millionth, 4 ms in an hour."""


class Recording:
    """An open recording, read in parts.

    Times count from the start of its container, behind what its codec declares as priming; where packets are missing
    or damaged there is silence, so that what follows keeps its place.

    Args:
        path: Local path, URI, or a reference to what a manifest embeds (`vaemo.data.manifest.EMBEDDED`).
        decoder: The process that decodes; another recording opened on it closes this one.
        limits: How long it, and an utterance of it, may be; what is decoded counts, whatever the header says. How
            files without a header are read. None takes the defaults.

    Raises:
        AudioProblem: missing, unreadable, undecodable, too_long or timeout.
    """

    def __init__(self, path: str, decoder: Decoder, limits: AudioConfig | None = None) -> None:
        self._decoder, self._limits = decoder, limits or AudioConfig()
        with _local(path) as (local, name):
            # The child holds the file open: a temporary copy may lose its name at once.
            try:
                self.info = decoder.open(local, headerless(name, self._limits))
            except AudioProblem as problem:
                if problem.status != "undecodable" or not is_unsaid(name, self._limits):
                    raise
                unsaid = "if it is raw samples, set audio.headerless, for example to s16le:8000:1"
                raise AudioProblem(problem.status, f"{problem.reason}; {unsaid}") from None
        self._refuse_longer(self.info.frames or 0, self._limits.max_recording_s)
        self._resampler = Resampler.to_16_khz(self.info.sampling_rate)
        self._lost: list[Lost] = []
        self._end: int | None = None
        self._broken: str | None = None

    def utterance(
        self, start_s: float | None = None, end_s: float | None = None, channel: int | None = None
    ) -> np.ndarray:
        """The samples of [start_s, end_s), (n,), float32, 16 kHz; the same as when they are cut from the whole.

        Args:
            start_s: Start in seconds; None is the start of the recording.
            end_s: End in seconds, cut where the recording ends up to a second before; None is its end.
            channel: Counted from 0; None is the mean of all channels.

        Raises:
            AudioProblem: bad_channel, too_short (it holds no sample), undecodable (also where the recording ends
                before the utterance, or its samples are on another scale), too_long or timeout.
        """
        if channel is not None and channel >= self.info.channels:
            raise AudioProblem("bad_channel", f"channel {channel} is asked for, it has {self.info.channels}")
        resampler, rate = self._resampler, self.info.sampling_rate
        first = round((start_s or 0.0) * SAMPLING_RATE_HZ)
        last = None if end_s is None else round(end_s * SAMPLING_RATE_HZ)
        if last is not None and last <= first:
            raise AudioProblem("too_short", "it has no sample")
        begin = first // resampler.new * resampler.old - resampler.context
        stop = None if last is None else -(-last // resampler.new) * resampler.old + resampler.context
        # The resampling filter reaches beyond the utterance on either side.
        longest_s = self._limits.max_utterance_s + 2 * resampler.context / rate
        self._refuse_longer((stop or 0) - begin, longest_s)
        parts, at, loudness = [], max(begin, 0), _Loudness()
        heard = 0 if channel is None and self.info.channels == 1 else channel
        block = max(_BLOCK_VALUES // self.info.channels, 1)
        while stop is None or at < stop:
            wanted = at + block if stop is None else min(at + block, stop)
            samples = self._read(at, wanted, loudness)
            parts.append(samples.mean(axis=1) if heard is None else samples[:, heard])
            at += len(samples)
            self._refuse_longer(at - begin, longest_s)
            if at < wanted:
                break
        loudness.check()
        native = parts[0] if len(parts) == 1 else np.concatenate(parts)
        end = max(begin, 0) + len(native)
        available = -(-end * resampler.new // resampler.old)
        if available <= first:
            raise AudioProblem(
                "undecodable", self._broken or f"its audio ends before {start_s or 0.0:.3f} s, where it starts"
            )
        if last is not None and available + _PAST_END_S * SAMPLING_RATE_HZ < last:
            raise AudioProblem(
                "undecodable", self._broken or f"its audio ends at {end / rate:.3f} s, the utterance at {end_s:.3f} s"
            )
        resampled = resampler.between(native, pad_left=max(-begin, 0))
        offset = begin // resampler.old * resampler.new
        return resampled[first - offset : None if last is None else last - offset]

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole recording, block by block, (C, n), float32, 16 kHz; the last blocks may be empty.

        Raises:
            AudioProblem: undecodable, too_long or timeout, after the blocks before it.
        """
        at, block, loudness = 0, max(_BLOCK_VALUES // self.info.channels, 1), _Loudness()
        stream = self._resampler.generator(self.info.channels)
        next(stream)
        while True:
            samples = self._read(at, at + block, loudness)
            at += len(samples)
            self._refuse_longer(at, self._limits.max_recording_s)
            yield stream.send(samples.T)
            if len(samples) < block:
                yield stream.send(None)
                loudness.check()
                return

    def lost_s(self, start_s: float | None = None, end_s: float | None = None, channel: int | None = None) -> float:
        """How many seconds of what was read the file does not hold, so that there is silence in their place.

        Args:
            start_s: From here on; None is the start.
            end_s: Up to here; None is the end.
            channel: Counted from 0; None is any of them.
        """
        rate = self.info.sampling_rate
        start, stop = (start_s or 0.0) * rate, np.inf if end_s is None else end_s * rate
        heard = [lost for lost in self._lost if channel is None or lost.first <= channel < lost.last]
        return sum(max(min(b, stop) - max(a, start), 0.0) for a, b in _merged(heard)) / rate

    def damage(self) -> AudioProblem | None:
        """What is wrong with the recording as far as it was read, though its other parts are not: a row of its own.

        Returns:
            `damaged` where parts of it cannot be decoded, with their places; `undecodable` where that is more than
            half of it, or where it breaks off; None where nothing is wrong.
        """
        rate = self.info.sampling_rate
        spans = _merged([lost for lost in self._lost if lost.damaged])
        said = ""
        if spans:
            total = sum(stop - start for start, stop in spans)
            places = [f"{start / rate:.1f} s" for start, _ in _merged_spans(spans, _DAMAGE_JOINED_S * rate)]
            shown = ", ".join(places[:_DAMAGES_SHOWN])
            more = f" and {len(places) - _DAMAGES_SHOWN} more places" if len(places) > _DAMAGES_SHOWN else ""
            said = f"{total / rate:.2f} s of it are damaged and taken as silence, at {shown}{more}"
        if self._broken is not None:
            return AudioProblem("undecodable", f"{self._broken}; {said}" if said else self._broken)
        if not spans:
            return None
        mostly = self._end is not None and 2 * total > self._end
        return AudioProblem("undecodable" if mostly else "damaged", said)

    def _read(self, start: int, stop: int, loudness: _Loudness) -> np.ndarray:
        """Frames [start, stop), (n, C); what is lost of them is noted."""
        read: Block = self._decoder.read(start, stop, self.info.channels)
        self._lost.extend(read.lost)
        self._broken = read.broken
        if len(read.samples) < stop - start:
            self._end = start + len(read.samples)
        return loudness.held(read.samples) if self.info.floats else read.samples

    def _refuse_longer(self, frames: int, limit_s: float) -> None:
        if frames > limit_s * self.info.sampling_rate:
            length = frames / self.info.sampling_rate
            raise AudioProblem("too_long", f"it lasts {length:.0f} s or more; {limit_s:.0f} s are allowed")


class _Loudness:
    """How much of what is read is louder than floats can be; a little of it is held at full scale."""

    def __init__(self) -> None:
        self._loud = self._heard = 0
        self._peak = 0.0

    def held(self, samples: np.ndarray) -> np.ndarray:
        """The samples, those beyond `_LOUD` at full scale."""
        self._heard += samples.size
        if not samples.size or (samples.max() <= _LOUD and samples.min() >= -_LOUD):
            return samples
        loud = (np.abs(samples) > _LOUD) & np.isfinite(samples)
        self._loud += int(loud.sum())
        self._peak = max(self._peak, float(np.abs(samples, where=loud, out=np.zeros_like(samples)).max()))
        return np.where(loud, np.sign(samples), samples)

    def check(self) -> None:
        """Refuse samples on another scale.

        Raises:
            AudioProblem: undecodable, for the whole recording.
        """
        if self._loud > _LOUD_SHARE * self._heard:
            bits = next((bits for bits in (16, 24, 32) if self._peak <= 1 << bits - 1), None)
            scale = f"the scale of {bits}-bit integers" if bits else "an unknown scale"
            reason = f"its samples reach {self._peak:.6g}, on {scale}; floats must lie in [-1, 1]"
            raise AudioProblem("undecodable", reason, whole=True)


def _merged(lost: list[Lost]) -> list[tuple[int, int]]:
    return _merged_spans([(span.start, span.stop) for span in lost], 0)


def _merged_spans(spans: list[tuple[int, int]], gap: float) -> list[tuple[int, int]]:
    """Spans in order, those joined that overlap or are no more than a gap apart."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


@contextlib.contextmanager
def _local(path: str) -> Iterator[tuple[str, str]]:
    """A local file with the content of `path`, and the name that tells its format."""
    reference = embedded(path)
    if reference is None and not files.is_uri(path):
        with _writable(path) as local:
            yield local, path
        return
    name = path
    try:
        if path.startswith("file://"):
            local = files.filesystem_of(path)[1]
            if reference is None or os.path.lexists(local):
                yield local, local
                return
        content, name = _read_embedded(path, *reference) if reference else (files.read_bytes(path), path)
    except FileNotFoundError:
        raise AudioProblem("missing", "there is no such file") from None
    except (OSError, ValueError, UsageError, pa.ArrowException) as error:
        if tier := files.archive_tier(path):
            raise AudioProblem("archived", tier) from None
        raise AudioProblem("unreadable", _said(error)) from None
    suffix = suffix_of(name)
    with tempfile.NamedTemporaryFile(prefix="vaemo-", suffix=suffix if suffix[1:].isalnum() else "") as copy:
        copy.write(content)
        copy.flush()
        yield copy.name, name


@contextlib.contextmanager
def _writable(path: str) -> Iterator[str]:
    """A name of a local file that every library takes: one that is no UTF-8 gets a second name for the time."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="vaemo-") as folder:
            link = os.path.join(folder, f"recording{suffix_of(path)}")
            os.symlink(os.path.abspath(path), link)
            yield link
        return
    yield path


def _said(error: Exception) -> str:
    """What an error says, without the system's numbers."""
    return re.sub(r"\[errno -?\d+\]:? *", "", " ".join(str(error).split()), flags=re.IGNORECASE)


def _read_embedded(path: str, manifest: str, row: int) -> tuple[bytes, str]:
    """The bytes in a row of a manifest, and the name beside them."""
    try:
        group, first = _row_group(manifest, row)
    except FileNotFoundError:
        if not files.is_uri(path):
            raise
        # Not a reference after all.
        return files.read_bytes(path), path
    if group is None:
        raise FileNotFoundError(f"{manifest} has no row {row}")
    held: dict[str, Any] = _audio_columns(manifest, group).slice(row - first, 1).to_pylist()[0] or {}
    audio, name = held.get("audio"), held.get("audio_path")
    if isinstance(audio, dict):
        # The form in Hugging Face data sets.
        name = name or audio.get("path")
        audio = audio.get("bytes")
    return audio or b"", name or ""


@functools.lru_cache(maxsize=64)
def _row_group(manifest: str, row: int) -> tuple[int | None, int]:
    filesystem, inner = files.filesystem_of(manifest)
    metadata = pq.read_metadata(inner, filesystem=filesystem)
    first = 0
    for group in range(metadata.num_row_groups):
        n = metadata.row_group(group).num_rows
        if row < first + n:
            return group, first
        first += n
    return None, first


@functools.lru_cache(maxsize=1)
def _audio_columns(manifest: str, group: int) -> pa.Table:
    filesystem, inner = files.filesystem_of(manifest)
    with filesystem.open_input_file(inner) as source:
        parquet = pq.ParquetFile(source)
        names = [name for name in ("audio", "audio_path") if name in parquet.schema_arrow.names]
        return parquet.read_row_group(group, columns=names)


class Resampler:
    """Resampling by `new / old` whose result does not depend on where the input is cut.

    Args:
        old: Samples before, in lowest terms.
        new: Samples after.
    """

    def __init__(self, old: int, new: int) -> None:
        self.old, self.new = old, new
        # The filter's reach, in whole periods, so that the phase stays.
        self.context = 0 if old == new else -(-(sinc_kernel(old, new, FILTER_ZEROS)[1] + old) // old) * old

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def to_16_khz(sampling_rate: float) -> Resampler:
        """What brings samples at a rate in Hz to 16 kHz.

        Raises:
            UsageError: for a rate that no recording has.
        """
        low, high = SAMPLING_RATES_HZ
        if not low <= sampling_rate <= high:
            raise UsageError(f"the sampling rate is {sampling_rate:g} Hz; from {low} to {high} Hz is heard.")
        ratio = Fraction(SAMPLING_RATE_HZ, round(sampling_rate)).limit_denominator(_RATIO_LIMIT)
        return Resampler(ratio.denominator, ratio.numerator)

    def between(self, samples: np.ndarray, *, pad_left: int = 0) -> np.ndarray:
        """The whole of (n,) as (m,), behind `pad_left` more zeros, m rounded up; there is silence around it."""
        if self.old == self.new and not pad_left:
            return np.ascontiguousarray(samples)
        padded = np.pad(samples, (pad_left, self.context))
        return self._run(padded)[: -(-(pad_left + len(samples)) * self.new // self.old)]

    def generator(self, channels: int) -> Generator[np.ndarray, np.ndarray | None, None]:
        """A generator that takes blocks (C, n), at the end None, and gives what of the result is certain, (C, m)."""
        held = np.zeros((channels, self.context), np.float32)
        total = given = 0
        out = np.zeros((channels, 0), np.float32)
        while True:
            block = yield out
            if block is None:
                n_last = -(-total * self.new // self.old) - given
                padded = np.pad(held, ((0, 0), (0, self.context + self.old)))
                yield self._run(padded)[:, self.context // self.old * self.new :][:, :n_last]
                return
            if self.old == self.new:
                out = np.ascontiguousarray(block)
                continue
            total += block.shape[1]
            held = np.concatenate([held, block], axis=1)
            ready = (held.shape[1] - 2 * self.context) // self.old * self.old
            if ready <= 0:
                out = held[:, :0]
                continue
            shift = self.context // self.old * self.new
            out = self._run(held[:, : ready + 2 * self.context])[:, shift : shift + ready // self.old * self.new]
            held = held[:, ready:]
            given += out.shape[1]

    def _run(self, samples: np.ndarray) -> np.ndarray:
        if self.old == self.new:
            return samples
        contiguous = np.ascontiguousarray(samples, np.float32)
        return resample(torch.from_numpy(contiguous), self.old, self.new, FILTER_ZEROS).numpy()
