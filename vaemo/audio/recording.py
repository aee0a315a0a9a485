"""Audio as every stage wants it: mono float32 at 16 kHz, decoded where a bad file can do no harm.

Reads recordings (local, remote, or embedded in a Parquet manifest) whole or in part. What is wrong with a file is
data, not an error: `AudioProblem` carries the status and the reason of its row. Letters: C channels, n samples.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Generator, Iterator
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchaudio

from vaemo import files
from vaemo.audio.decode import SAMPLING_RATES_HZ
from vaemo.audio.decoder import AudioInfo, AudioProblem, Decoder
from vaemo.config import AudioConfig
from vaemo.errors import UsageError
from vaemo.manifest import EMBEDDED, embedded_bytes
from vaemo.units import SAMPLING_RATE_HZ

__all__ = ["AudioInfo", "AudioProblem", "Decoder", "Recording", "Resampler"]

_BLOCK_VALUES = 4_000_000
"""Samples, all channels counted, that are decoded at a time: 16 MB."""

_PAST_END_S = 0.1
"""An utterance may end this much after its recording: times are rounded, and codecs add or drop a frame."""

_FILTER_ZEROS = 16
"""Zero crossings of the resampling filter on either side."""

_RATIO_LIMIT = 1000
"""Largest term of a resampling ratio; an odd rate is off by less than a millionth, 4 ms in an hour."""


class Recording:
    """An open recording, read in parts.

    Args:
        path: Local path, URI, or `EMBEDDED` reference.
        decoder: The process that decodes; another recording opened on it closes this one.
        limits: How long it, and an utterance of it, may be; what is decoded counts, whatever the header says;
            None takes the defaults.

    Raises:
        AudioProblem: missing, unreadable, undecodable, too_long or timeout.
    """

    def __init__(self, path: str, decoder: Decoder, limits: AudioConfig | None = None) -> None:
        self._decoder, self._limits = decoder, limits or AudioConfig()
        with _local(path) as local:
            # The child holds the file open: a temporary copy may lose its name at once.
            self.info = decoder.open(local)
        self._refuse_longer(self.info.frames or 0, self._limits.max_recording_s)
        self._resampler = Resampler.to_16_khz(self.info.sampling_rate)

    def utterance(
        self, start_s: float | None = None, end_s: float | None = None, channel: int | None = None
    ) -> np.ndarray:
        """The samples of [start_s, end_s), (n,), float32, 16 kHz; the same as when they are cut from the whole.

        Args:
            start_s: Start in seconds; None is the start of the recording.
            end_s: End in seconds; None is its end.
            channel: Counted from 0; None is the mean of all channels.

        Raises:
            AudioProblem: bad_channel, too_short (it holds no sample), undecodable (also where the recording ends
                before the utterance), too_long or timeout.
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
        parts, at = [], max(begin, 0)
        block = max(_BLOCK_VALUES // self.info.channels, 1)
        while stop is None or at < stop:
            wanted = at + block if stop is None else min(at + block, stop)
            samples = self._decoder.read(at, wanted, self.info.channels)
            parts.append(samples.mean(axis=1) if channel is None else samples[:, channel])
            at += len(samples)
            self._refuse_longer(at - begin, longest_s)
            if at < wanted:
                break
        native = np.concatenate(parts)
        end = max(begin, 0) + len(native)
        available = -(-end * resampler.new // resampler.old)
        if available <= first:
            raise AudioProblem("undecodable", f"its audio ends before {start_s or 0.0:.3f} s, where it starts")
        if last is not None and available + _PAST_END_S * SAMPLING_RATE_HZ < last:
            raise AudioProblem("undecodable", f"its audio ends at {end / rate:.3f} s, the utterance at {end_s:.3f} s")
        resampled = resampler.between(native, pad_left=max(-begin, 0))
        offset = begin // resampler.old * resampler.new
        return resampled[first - offset : None if last is None else last - offset]

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole recording, block by block, (C, n), float32, 16 kHz; the last blocks may be empty.

        Raises:
            AudioProblem: undecodable, too_long or timeout, after the blocks before it.
        """
        at, block = 0, max(_BLOCK_VALUES // self.info.channels, 1)
        stream = self._resampler.stream(self.info.channels)
        next(stream)
        while True:
            try:
                samples = self._decoder.read(at, at + block, self.info.channels)
            except AudioProblem:
                if block == self.info.sampling_rate or not self._decoder.alive:
                    raise
                # It is broken somewhere in this block: second by second up to there.
                block = self.info.sampling_rate
                continue
            at += len(samples)
            self._refuse_longer(at, self._limits.max_recording_s)
            yield stream.send(samples.T)
            if len(samples) < block:
                yield stream.send(None)
                return

    def _refuse_longer(self, frames: int, limit_s: float) -> None:
        if frames > limit_s * self.info.sampling_rate:
            length = frames / self.info.sampling_rate
            raise AudioProblem("too_long", f"it lasts {length:.0f} s or more; {limit_s:.0f} s are allowed")


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """A local file with the content of `path`."""
    if not files.is_uri(path) and EMBEDDED not in path:
        yield path
        return
    try:
        if EMBEDDED in path:
            content = _read_embedded(path)
        elif path.startswith("file://"):
            yield files.filesystem_of(path)[1]
            return
        else:
            content = files.read_bytes(path)
    except FileNotFoundError:
        raise AudioProblem("missing", "there is no such file") from None
    except (OSError, ValueError, UsageError, pa.ArrowException) as error:
        raise AudioProblem("unreadable", " ".join(str(error).split())) from None
    with tempfile.NamedTemporaryFile(prefix="vaemo-") as copy:
        copy.write(content)
        copy.flush()
        yield copy.name


def _read_embedded(path: str) -> bytes:
    manifest, _, row = path.rpartition("#")
    group, first = _row_group(manifest, int(row))
    return _audio_column(manifest, group)[int(row) - first].as_py() or b""


@functools.lru_cache(maxsize=64)
def _row_group(manifest: str, row: int) -> tuple[int, int]:
    filesystem, inner = files.filesystem_of(manifest)
    metadata = pq.read_metadata(inner, filesystem=filesystem)
    first = 0
    for group in range(metadata.num_row_groups):
        n = metadata.row_group(group).num_rows
        if row < first + n:
            return group, first
        first += n
    raise FileNotFoundError(f"{manifest} has no row {row}")


@functools.lru_cache(maxsize=1)
def _audio_column(manifest: str, group: int) -> pa.ChunkedArray:
    filesystem, inner = files.filesystem_of(manifest)
    with filesystem.open_input_file(inner) as source:
        return embedded_bytes(pq.ParquetFile(source).read_row_group(group, columns=["audio"])["audio"])


class Resampler:
    """Resampling by `new / old` whose result does not depend on where the input is cut.

    Args:
        old: Samples before, in lowest terms.
        new: Samples after.
    """

    def __init__(self, old: int, new: int) -> None:
        self.old, self.new = old, new
        self._resample = _resample_module(old, new)
        # The filter's reach, in whole periods, so that the phase stays.
        self.context = 0 if old == new else -(-(self._resample.width + old) // old) * old

    @staticmethod
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
        padded = np.pad(samples, (pad_left, self.context))
        return self._run(padded)[: -(-(pad_left + len(samples)) * self.new // self.old)]

    def stream(self, channels: int) -> Generator[np.ndarray, np.ndarray | None, None]:
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
        return self._resample(torch.from_numpy(np.ascontiguousarray(samples, np.float32))).numpy()


@functools.lru_cache(maxsize=32)
def _resample_module(old: int, new: int) -> torchaudio.transforms.Resample:
    # Steeper than the default, whose images of a telephone band reach up to 5 kHz.
    return torchaudio.transforms.Resample(old, new, lowpass_filter_width=_FILTER_ZEROS)
