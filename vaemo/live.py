"""A live conversation: raw packets in, the valence and arousal of each utterance out.

Letters: C channels, n samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaemo import files
from vaemo.audio.decode import MAX_CHANNELS
from vaemo.audio.vad import FRAME, Utterance, UtteranceFinder
from vaemo.config import VadConfig
from vaemo.errors import ShapeError, StateMismatchError, UsageError
from vaemo.stream import Prediction, Stream, as_float32, read_memory, require_type, resampler_of
from vaemo.units import SAMPLING_RATE_HZ


class LiveSession:
    """A conversation as raw packets: finds the utterances of every channel and predicts them as they end.

    The packets may have any length. Utterances and their order are those of the batch job on a recording of the
    packets: an utterance waits for those that began before it.

    Args:
        stream: Where the utterances go; its memory is this session's.
        sampling_rate: Of the packets, in Hz.
        channels: C.
        listen: Channels to predict; None is all. The others are used to detect crosstalk only.
        speakers: Name of the speaker on each channel, no two alike; None is `c0`, `c1`, ...
        vad: How utterances are found; None is the default.
        speaker: Returns the speaker of an utterance in a session of one channel, given its start and end in seconds;
            None leaves the utterance out, such as an agent's. Voices are not separated here.

    Raises:
        UsageError: for an unsupported rate, invalid channels or speakers, or an argument of another type.

    Example:
        >>> session = LiveSession(Stream("run/best"), 16000)
        >>> packets = soundfile.blocks("call.wav", blocksize=320)
        >>> found = [prediction for packet in packets for prediction in session.push(packet)]
        >>> found += session.finish()
        >>> len(found), found[0].status, found[0].start_s < found[0].end_s
        (2, 'ok', True)
    """

    def __init__(
        self,
        stream: Stream,
        sampling_rate: float,
        *,
        channels: int = 1,
        listen: Sequence[int] | None = None,
        speakers: Sequence[str] | None = None,
        vad: VadConfig | None = None,
        speaker: Callable[[float, float], str | None] | None = None,
    ) -> None:
        require_type("stream", stream, Stream, "a vaemo.Stream, such as Stream('run/best')")
        require_type("vad", vad, (VadConfig, NoneType), "the section vad of a vaemo.Config, or None")
        self._resampler = _LiveResampler(sampling_rate, _checked_channels(channels))
        self.stream, self._rate, self._channels = stream, float(sampling_rate), channels
        self._listen = _checked_listen(range(channels) if listen is None else listen, channels)
        names = [f"c{channel}" for channel in range(channels)]
        self._speakers = _checked_speakers(names if speakers is None else speakers, channels)
        self._finder = _Finder(channels, vad or VadConfig())
        self._waiting: list[Utterance] = []
        self._finished = False
        self._ask = speaker
        if speaker is not None:
            self._require_one_channel()
        self._said: list[list[Any]] = []
        self._taken_s = 0.0

    def push(self, packet: np.ndarray, *, speaker: str | None = None) -> list[Prediction]:
        """Take the next packet; return the predictions of the utterances that end with it.

        NaN and infinities in a packet are replaced by silence for the detector. An utterance that reaches
        into them, padding included, has the status `nan_audio`; all others are unaffected.

        Args:
            packet: (C, n), or with one channel (n,) or (n, 1), of a kind that `vaemo.stream.as_float32` takes.
            speaker: Who speaks in this packet, of a stream of one channel. An utterance belongs to the speaker of most
                of it; it is not cut where the speaker changes. None leaves it unknown.

        Raises:
            ShapeError: for another number of channels, and for samples of another kind, or on another scale. The packet
                is then ignored; the session continues with the next.
            UsageError: after `finish`, and for a speaker in a session of several channels.
        """
        self._refuse_finished()
        block = self._block(packet)
        if speaker is not None:
            self._require_one_channel()
        start_s, self._taken_s = self._taken_s, self._taken_s + block.shape[1] / self._rate
        if speaker is not None and self._said and self._said[-1][1:] == [start_s, speaker]:
            self._said[-1][1] = self._taken_s
        elif speaker is not None:
            self._said.append([start_s, self._taken_s, speaker])
        return self._hear(self._finder.push(self._resampler.push(block)), self._finder.earliest_s(self._listen))

    def finish(self) -> list[Prediction]:
        """End the conversation; return the predictions of the remaining utterances.

        Raises:
            UsageError: where it was finished before.
        """
        self._refuse_finished()
        self._finished = True
        last = self._finder.push(self._resampler.finish())
        return self._hear([*last, *self._finder.finish()], np.inf)

    def save(self, path: str | Path) -> None:
        """Write everything needed to continue, as safetensors: the stream's memory, and the last seconds of audio."""
        tensors, metadata = self.stream.memory()
        live = _Memory(
            finder=self._finder.memory(),
            tail=self._resampler.tail,
            waiting=self._waiting,
            sampling_rate=self._rate,
            finished=self._finished,
            said=self._said,
            taken_s=self._taken_s,
        )
        tree = _flatten(live.to_tree(), "live", tensors)
        files.write_safetensors(path, tensors, {**metadata, "live": json.dumps(tree)})

    def load(self, path: str | Path) -> None:
        """Continue from what `save` wrote, in a session opened with the same arguments.

        Raises:
            StateMismatchError: if the file is no such memory, or belongs to another checkpoint, or to a session with
                other channels or at another sampling rate.
        """
        tensors, metadata = read_memory(path)
        if "live" not in metadata:
            raise StateMismatchError(
                f"'{path}' is the memory of a Stream, not of a LiveSession; load it with Stream.load."
            )
        live = _Memory.of_tree(_unflatten(json.loads(metadata["live"]), tensors), str(path), self._rate)
        for what, saved, mine in (
            ("channels", len(live.tail), self._channels),
            ("Hz", live.sampling_rate, self._rate),
        ):
            if saved != mine:
                raise StateMismatchError(
                    f"'{path}' is the memory of a session with {saved:g} {what}; this one was opened with {mine:g}."
                )
        self.stream.restore(tensors, metadata)
        self._finder.restore(live.finder)
        self._resampler.restore(live.tail)
        self._waiting, self._finished = live.waiting, live.finished
        self._said, self._taken_s = live.said, live.taken_s

    def _require_one_channel(self) -> None:
        if self._channels > 1:
            raise UsageError(
                f"speaker is given, and the session has {self._channels} channels, which tell speakers apart: name "
                "them by speakers, or open a session for each channel."
            )

    def _refuse_finished(self) -> None:
        if self._finished:
            raise UsageError("the session is finished: its conversation has ended. Open another LiveSession.")

    def _block(self, packet: np.ndarray) -> np.ndarray:
        """A packet as (C, n), float32."""
        block = as_float32(packet, n_least=round(self._rate) * self._channels)
        if block.ndim == 1:
            block = block[None]
        if self._channels == 1 and block.ndim == 2 and block.shape[1] == 1:
            block = block.T
        if block.ndim != 2:
            raise ShapeError(f"a packet has the shape {block.shape}; here it is ({self._channels}, n).")
        if len(block) != self._channels:
            raise ShapeError(
                f"a packet has {len(block)} channels; the session was opened with {self._channels}. "
                f"A packet is (channels, samples), here ({self._channels}, n)."
            )
        return block

    def _hear(self, found: list[Utterance], earliest_s: float) -> list[Prediction]:
        """Predict, in order of their start, the utterances that no other can precede any more."""
        waiting = self._waiting + [utterance for utterance in found if utterance.channel in self._listen]
        waiting.sort(key=lambda utterance: (utterance.start_s, utterance.channel))
        ready = [utterance for utterance in waiting if utterance.start_s < earliest_s]
        self._waiting = waiting[len(ready) :]
        heard = [(utterance, self._who(utterance)) for utterance in ready]
        kept_s = min([earliest_s, *(utterance.start_s for utterance in self._waiting)])
        self._said = [said for said in self._said if said[1] > kept_s]
        return [self._predict(utterance, speaker) for utterance, speaker in heard if speaker is not None]

    def _who(self, utterance: Utterance) -> str | None:
        """Who speaks; None where the utterance is left out."""
        if self._ask is not None:
            return self._ask(utterance.start_s, utterance.end_s)
        spoken: dict[str, float] = {}
        for start_s, end_s, name in self._said:
            shared = min(end_s, utterance.end_s) - max(start_s, utterance.start_s)
            if shared > 0:
                spoken[name] = spoken.get(name, 0.0) + shared
        return max(spoken, key=lambda name: spoken[name]) if spoken else self._speakers[utterance.channel]

    def _predict(self, utterance: Utterance, speaker: str) -> Prediction:
        prediction = self.stream.push(utterance.samples, SAMPLING_RATE_HZ, speaker=speaker)
        return replace(prediction, channel=utterance.channel, start_s=utterance.start_s, end_s=utterance.end_s)


class _Finder(UtteranceFinder):
    """An `UtteranceFinder` whose memory can be saved and restored."""

    def earliest_s(self, channels: Collection[int]) -> float:
        """The time before which no further utterance of these channels can begin."""
        frame = min(cutter.needed_frame for number, cutter in enumerate(self._cutters) if number in channels)
        return frame * FRAME / SAMPLING_RATE_HZ - self._config.pad_s

    def memory(self) -> dict[str, Any]:
        return {**_without(vars(self), "_config", "_detector"), "_cutters": [
            _without(vars(cutter), "_config") for cutter in self._cutters
        ]}  # fmt: skip

    def restore(self, memory: dict[str, Any]) -> None:
        # Older versions let NaN into the memory, where it stayed.
        if memory["_state"] is not None:
            memory["_state"] = tuple(part.nan_to_num() for part in memory["_state"])
        memory["_level"] = np.nan_to_num(memory["_level"])
        for cutter, held in zip(self._cutters, memory.pop("_cutters"), strict=True):
            vars(cutter).update(held)
        vars(self).update(memory)


class _LiveResampler:
    """`Resampler.generator` that can continue in another process, by feeding it the samples within its filter's reach
    again.

    Attributes:
        tail: The last native samples, from a whole period of the ratio on, (C, n).
    """

    tail: np.ndarray

    def __init__(self, sampling_rate: float, channels: int) -> None:
        self._resampler = resampler_of(sampling_rate)
        self._reach = 3 * self._resampler.context + 2 * self._resampler.old
        self.restore(np.zeros((channels, 0), np.float32))

    def push(self, block: np.ndarray) -> np.ndarray:
        """The output that is final after this block, (C, m), 16 kHz."""
        self.tail = np.concatenate([self.tail, block], axis=1)
        old = self._resampler.old
        self.tail = self.tail[:, max(self.tail.shape[1] - self._reach, 0) // old * old :]
        return self._generator.send(block)

    def finish(self) -> np.ndarray:
        """The rest."""
        return self._generator.send(None)

    def restore(self, tail: np.ndarray) -> None:
        """Continue after these last native samples, whose output was already returned."""
        self.tail = tail
        self._generator: Generator[np.ndarray, np.ndarray | None, None] = self._resampler.generator(len(tail))
        next(self._generator)
        self._generator.send(tail)


def _checked_channels(channels: Any) -> int:
    if not _is_whole(channels) or not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"channels is {channels!r}; give how many a packet has, from 1 to {MAX_CHANNELS}.")
    return int(channels)


def _checked_listen(listen: Any, channels: int) -> frozenset[int]:
    heard: list[Any] = list(listen) if isinstance(listen, Iterable) else []
    if not heard or not all(_is_whole(c) and 0 <= c < channels for c in heard) or len(set(heard)) < len(heard):
        raise UsageError(f"listen is {listen!r}; give one or more of the channels 0 to {channels - 1}, each once.")
    return frozenset(map(int, heard))


def _checked_speakers(speakers: Any, channels: int) -> list[str]:
    names = list(speakers) if isinstance(speakers, Iterable) and not isinstance(speakers, str) else []
    if len(names) != channels or not all(isinstance(name, str) for name in names) or len(set(names)) < channels:
        raise UsageError(f"speakers is {speakers!r}; give {channels} names, one for each channel, no two alike.")
    return names


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


_VERSION = 2
"""Version of `_Memory`; memories of vaemo 0.1.0 have none."""


@dataclass(frozen=True, eq=False)
class _Memory:
    """What a live session continues from, beside the memory of its stream.

    Attributes:
        finder: Of the detector of utterances.
        tail: Samples that the resampler has not used up, (C, n).
        waiting: Utterances whose end is not certain yet.
        sampling_rate: Of the packets, in Hz.
        finished: Whether the conversation has ended.
        said: Start, end and speaker of packets, as given to `push`.
        taken_s: Seconds of packets so far.
    """

    finder: Any
    tail: Any
    waiting: list[Utterance]
    sampling_rate: float
    finished: bool
    said: list[Any]
    taken_s: float

    def to_tree(self) -> dict[str, Any]:
        """As `_flatten` takes it."""
        return {"version": _VERSION, **vars(self), "waiting": list(map(vars, self.waiting))}

    @staticmethod
    def of_tree(tree: Mapping[str, Any], path: str, sampling_rate: float) -> _Memory:
        """The inverse of `to_tree`, for this version and earlier ones, which lack some fields.

        Raises:
            StateMismatchError: if a later version wrote it.
        """
        if tree.get("version", 1) > _VERSION:
            raise StateMismatchError(
                f"'{path}' was written by a later version of vaemo (memory version {tree['version']}; this one reads "
                f"up to {_VERSION}). Go on with that version."
            )
        before = {"sampling_rate": sampling_rate, "finished": False, "said": [], "taken_s": 0.0}
        held = {**before, **{name: value for name, value in tree.items() if name != "version"}}
        return _Memory(**{**held, "waiting": [Utterance(**facts) for facts in held["waiting"]]})


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of plain values for JSON; arrays are moved to `tensors`, named by their path."""
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
        return {"array": name}
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flatten`; tuples become lists."""
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, held),) = tree.items()
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in held.items()}
    return tensors[held].numpy() if kind == "array" else tensors[held]


def _without(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}
