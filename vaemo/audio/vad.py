"""Detection of utterances in recordings: speech probabilities by silero-vad per channel, then cutting, joining and
padding.

Everything runs forward over blocks of any size and remembers little, so that a recording of ten hours, or a live
stream, takes no more memory than a minute. Letters: C channels, F frames of 32 ms, n samples at 16 kHz.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from vaemo.audio.scale import LOUDEST
from vaemo.config import VadConfig
from vaemo.units import SAMPLING_RATE_HZ

FRAME = 512
"""Samples of one frame."""

_FRAME_S = FRAME / SAMPLING_RATE_HZ
_CONTEXT = 64
_FRAMES_AT_ONCE = 512
_HYSTERESIS = 0.15
"""Inside an utterance a frame is speech down to this much below the threshold; silero's own value."""

_BAND = slice(4, 55)
"""Bins of the speech band, 250 to 3400 Hz, in the detector's spectra of 256 samples."""

_MEAN_SQUARE = 4 * 256 / 2 * 96.0
"""The sum over a frame's four spectra for samples whose mean square is 1: half a window's size by sum(Hann^2)."""

_FAINTEST = 1e-10
"""Mean square below which levels are not compared: -100 dB of full scale."""

_LEVEL_FRAMES = 4.0
"""Time constant of the levels that channels are compared by, in frames."""

_FLOOR_RISE = 10.0 ** (2.0 * _FRAME_S)
"""The most that a channel's background, its lowest level, may rise per frame in pauses: 20 dB per second."""

_HANGOVER_FRAMES = 10
"""How much longer speech on a channel masks crosstalk on the others."""


@dataclass(frozen=True, eq=False)
class Utterance:
    """Speech that was found: where, and its samples (n,), float32, 16 kHz."""

    channel: int
    start_s: float
    end_s: float
    samples: np.ndarray


class SpeechDetector(nn.Module):
    """silero-vad (16 kHz), its layers before the LSTM applied to many frames at once.

    It gives the original's probabilities and is ten times faster than calling that frame by frame.
    """

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        weights = detector_weights()
        self.register_buffer("basis", weights["stft.forward_basis_buffer"])
        self.encoder = nn.ModuleList()
        for index, stride in enumerate((1, 2, 2, 1)):
            kernel = weights[f"encoder.{index}.reparam_conv.weight"]
            layer = nn.Conv1d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, padding=1)
            layer.load_state_dict({"weight": kernel, "bias": weights[f"encoder.{index}.reparam_conv.bias"]})
            self.encoder.append(layer)
        kernel = weights["decoder.decoder.2.weight"]
        self.lstm = nn.LSTM(kernel.shape[1], kernel.shape[1], batch_first=True)
        self.lstm.load_state_dict(
            {f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        )
        self.head = nn.Linear(kernel.shape[1], 1)
        self.head.load_state_dict({"weight": kernel[:, :, 0], "bias": weights["decoder.decoder.2.bias"]})
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, samples: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, tuple]:
        """Speech probabilities and levels of frames, each channel on its own.

        Args:
            samples: (C, 64 + F * 512): the 64 samples before the frames (zeros at the start), then the frames.
            state: What an earlier call returned; None at the start.

        Returns:
            probabilities: (C, F).
            levels: (C, F), mean squares of the speech band: hum, a constant offset, rumble and hiss are not in them.
            state: To go on from.
        """
        lanes = samples.shape[0]
        windows = samples.unfold(1, _CONTEXT + FRAME, FRAME)
        encoded, levels = [], []
        for part in windows.split(_FRAMES_AT_ONCE, dim=1):
            vectors, level = self._encode(part.reshape(-1, _CONTEXT + FRAME))
            encoded.append(vectors.reshape(lanes, part.shape[1], -1))
            levels.append(level.reshape(lanes, part.shape[1]))
        hidden, state = self.lstm(torch.cat(encoded, dim=1), state)
        return torch.sigmoid(self.head(functional.relu(hidden)))[..., 0], torch.cat(levels, dim=1), state

    def _encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        padded = functional.pad(windows[:, None], (0, 64), mode="reflect")
        spectrum = functional.conv1d(padded, self.basis, stride=128)
        half = spectrum.shape[1] // 2
        power = spectrum[:, :half] ** 2 + spectrum[:, half:] ** 2
        level = power[:, _BAND].sum(dim=(1, 2)) / _MEAN_SQUARE
        out = power.sqrt_()
        for layer in self.encoder:
            out = functional.relu(layer(out))
        return out[..., 0], level


@functools.cache
def speech_detector() -> SpeechDetector:
    """The detector, loaded once per process."""
    return SpeechDetector()


def detector_weights() -> dict[str, Tensor]:
    """The tensors of silero-vad's 16 kHz model; their origin is in a notice beside the file."""
    return load((resources.files("vaemo.audio") / "weights" / "silero_vad_16khz.safetensors").read_bytes())


class UtteranceFinder:
    """Finds utterances in a recording that arrives in blocks of any size, per channel.

    An utterance begins where the probability reaches the threshold, ends where it stays below for `join_gap_s`, and
    is cut at its quietest frame in the second half of `max_utterance_s` where it grows longer. Where a channel is
    `crosstalk_db` quieter than another that speaks, it is taken for that one's echo. Both levels are of the speech
    band. NaN and infinities are replaced by silence for detection; the samples of an utterance keep them.

    Args:
        channels: C.
        config: Thresholds and lengths.
    """

    def __init__(self, channels: int, config: VadConfig) -> None:
        self._config = config
        self._detector = speech_detector()
        self._state: tuple[Tensor, Tensor] | None = None
        self._cutters = [_Cutter(config) for _ in range(channels)]
        self._level = np.zeros(channels)
        self._floor = np.full(channels, np.inf)
        self._spoke = np.full(channels, -_HANGOVER_FRAMES - 1)
        self._held = np.zeros((channels, _CONTEXT), np.float32)
        self._first = -_CONTEXT
        self._done = 0
        self._waiting = np.zeros((channels, 0), np.float32)

    @property
    def heard_s(self) -> float:
        """How much was taken, to a frame."""
        return (self._done * FRAME + self._waiting.shape[1]) / SAMPLING_RATE_HZ

    def push(self, block: np.ndarray) -> list[Utterance]:
        """Take the next samples, (C, n), float32, 16 kHz; give the utterances that they end."""
        waiting = np.concatenate([self._waiting, block], axis=1)
        whole = waiting.shape[1] // FRAME * FRAME
        self._waiting = waiting[:, whole:]
        return self._frames(waiting[:, :whole]) if whole else []

    def finish(self) -> list[Utterance]:
        """The utterances that the end of the recording ends."""
        n_total = self._done * FRAME + self._waiting.shape[1]
        found = []
        if self._waiting.shape[1]:
            found += self._frames(np.pad(self._waiting, ((0, 0), (0, FRAME - self._waiting.shape[1]))))
        for channel, cutter in enumerate(self._cutters):
            found += [self._utterance(channel, span, n_total) for span in cutter.finish()]
        return found

    def _frames(self, samples: np.ndarray) -> list[Utterance]:
        self._held = np.concatenate([self._held, samples], axis=1)
        recent = _harmless(self._held[:, -samples.shape[1] - _CONTEXT :])
        probabilities, levels, self._state = self._detector(torch.from_numpy(recent), self._state)
        speech = probabilities.numpy()
        power = np.maximum(levels.numpy(), _FAINTEST)
        if len(speech) > 1 and self._config.crosstalk_db > 0:
            speech = self._without_crosstalk(speech, power)
        found = []
        for channel, cutter in enumerate(self._cutters):
            found += [self._utterance(channel, span) for span in cutter.push(speech[channel], power[channel])]
        self._done += speech.shape[1]
        self._forget()
        return found

    def _without_crosstalk(self, speech: np.ndarray, power: np.ndarray) -> np.ndarray:
        """`speech` without what is another channel's echo; `power` is of the speech band, both (C, F).

        What is steady on a channel, such as hum's overtones, is no speech: it drowns nothing on the others.
        """
        ratio = 10.0 ** (self._config.crosstalk_db / 10.0)
        fade = math.exp(-1.0 / _LEVEL_FRAMES)
        low = self._config.threshold - _HYSTERESIS
        kept = speech.copy()
        levels, floors, spoke = self._level.tolist(), self._floor.tolist(), self._spoke.tolist()
        for frame, (probabilities, powers) in enumerate(zip(speech.T.tolist(), power.T.tolist(), strict=True)):
            now, loudest = self._done + frame, 0.0
            for channel, probability in enumerate(probabilities):
                level = levels[channel] = fade * levels[channel] + (1.0 - fade) * powers[channel]
                if probability >= low:
                    spoke[channel] = now
                if spoke[channel] >= now - _HANGOVER_FRAMES:
                    floors[channel] = min(floors[channel], level)
                    loudest = max(loudest, level - floors[channel])
                else:
                    floors[channel] = min(floors[channel] * _FLOOR_RISE, level)
            for channel, level in enumerate(levels):
                if level * ratio < loudest:
                    kept[channel, frame] = 0.0
        self._level, self._floor, self._spoke = np.array(levels), np.array(floors), np.array(spoke)
        return kept

    def _utterance(self, channel: int, span: tuple[float, float], n_total: int | None = None) -> Utterance:
        start, end = (round(seconds * SAMPLING_RATE_HZ) for seconds in span)
        end = end if n_total is None else min(end, n_total)
        samples = self._held[channel, start - self._first : end - self._first].copy()
        return Utterance(channel, start / SAMPLING_RATE_HZ, end / SAMPLING_RATE_HZ, samples)

    def _forget(self) -> None:
        """Drop the samples that no utterance can want any more."""
        needed = min(cutter.needed_frame for cutter in self._cutters)
        drop = int(needed * FRAME - self._config.pad_s * SAMPLING_RATE_HZ) - FRAME - self._first
        drop = min(drop, self._held.shape[1] - _CONTEXT)
        if drop > self._held.shape[1] // 2:
            self._held = self._held[:, drop:].copy()
            self._first += drop


def _harmless(samples: np.ndarray) -> np.ndarray:
    """Samples that leave no NaN in the detector's memory: silence for NaN and infinities, the rest within LOUDEST."""
    if not (samples.max() <= LOUDEST and samples.min() >= -LOUDEST):
        samples = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0).clip(-LOUDEST, LOUDEST)
    return np.ascontiguousarray(samples)


class _Cutter:
    """Turns one channel's speech probabilities into spans (start_s, end_s), frame by frame."""

    def __init__(self, config: VadConfig) -> None:
        self._config = config
        self._join = round(config.join_gap_s / _FRAME_S)
        self._longest = max(int((config.max_utterance_s - 2 * config.pad_s) / _FRAME_S), 2)
        self._frame = 0
        self._begin: int | None = None
        self._last = 0
        self._power: list[float] = []
        self._previous_end_s = 0.0
        self._pad_start_s = config.pad_s

    @property
    def needed_frame(self) -> int:
        """The first frame that an utterance under way, or still to come, can begin with."""
        return self._frame if self._begin is None else self._begin

    def push(self, speech: np.ndarray, power: np.ndarray) -> Iterator[tuple[float, float]]:
        """Spans that end within these frames; `speech` and `power` are (F,)."""
        low = self._config.threshold - _HYSTERESIS
        for probability, level in zip(speech.tolist(), power.tolist(), strict=True):
            if self._begin is None:
                if probability >= self._config.threshold:
                    self._begin = self._last = self._frame
                    self._power = [level]
                    self._pad_start_s = self._config.pad_s
            else:
                self._power.append(level)
                if probability >= low:
                    self._last = self._frame
                if self._frame - self._last > self._join:
                    yield from self._close()
                elif len(self._power) >= self._longest:
                    yield from self._cut()
            self._frame += 1

    def finish(self) -> Iterator[tuple[float, float]]:
        """The span that is still open."""
        if self._begin is not None:
            yield from self._close()

    def _close(self) -> Iterator[tuple[float, float]]:
        assert self._begin is not None
        begin, self._begin = self._begin, None
        end_s = min((self._last + 1) * _FRAME_S + self._config.pad_s, (self._frame + 1) * _FRAME_S)
        yield from self._span(begin, self._last + 1, end_s)

    def _cut(self) -> Iterator[tuple[float, float]]:
        """Cut at the quietest tenth of a second in the second half; the rest becomes another utterance."""
        assert self._begin is not None
        half = len(self._power) // 2
        smooth = np.convolve(self._power, np.ones(3), mode="same")
        at = half + int(np.argmin(smooth[half:]))
        begin, self._begin = self._begin, self._begin + at
        self._power = self._power[at:]
        yield from self._span(begin, self._begin, self._begin * _FRAME_S)
        self._pad_start_s = 0.0
        if self._last < self._begin:
            self._begin = None

    def _span(self, begin: int, end: int, end_s: float) -> Iterator[tuple[float, float]]:
        start_s = max(begin * _FRAME_S - self._pad_start_s, self._previous_end_s, 0.0)
        if (end - begin) * _FRAME_S >= self._config.min_utterance_s:
            self._previous_end_s = end_s
            yield start_s, end_s
