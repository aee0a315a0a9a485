"""Cutting a channel's speech by voice: takes utterances as they are found, and returns pieces of one voice each at the
end.

Voices are given from outside (`vaemo.voices.turns`), or found by comparing windows of speech. Vectors
stay in memory, those of an hour take some megabytes; samples are not kept. Letters: N windows, K voices, F frames.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaemo.audio.vad import Utterance
from vaemo.config import VadConfig, VoicesConfig
from vaemo.data.speakers import unit
from vaemo.features import campplus
from vaemo.units import SAMPLING_RATE_HZ
from vaemo.voices.clustering import Beside, find_beside, find_voices, known_and_heard
from vaemo.voices.turns import Turn

_FRAME_S = 0.02
_HOPS = 3
"""Windows that begin within the length of one."""

_CHANGE = 0.05
"""Cost of a change of voice between windows, in similarity."""

_SNAP_S = 0.25
"""A change of voice is put at the quietest point within this distance of where two voices are equally similar."""

_SHORT_S = 0.5
"""Shorter speech, such as a backchannel, is too short to attribute with certainty."""

_PROBABLE = 0.07
"""Lead of a voice in its similarity to an enrolled one from which it is probably that one: enough to divide the call by
it, too little to give it a role."""

_PAUSE_S = 1.0
"""Speech that no given turn covers goes to its neighbours up to this length; longer, its speaker is not known."""

_PAST_END_S = 1.0
"""How far given turns may end after the recording."""


@dataclass(frozen=True)
class Piece:
    """Speech of one voice.

    Attributes:
        channel: Where.
        start_s: From.
        end_s: To.
        voice: Whose; None where it is not known.
        margin: How much more it is like that voice than like the next one (cosine), 0 where two speak at once;
            None where there is no other voice.
    """

    channel: int
    start_s: float
    end_s: float
    voice: int | None
    margin: float | None


@dataclass(frozen=True, eq=False)
class Voice:
    """A voice of a channel.

    Attributes:
        channel: Where it is heard.
        number: From 0, in order of first speech.
        speech_s: How long it speaks.
        vector: Mean embedding of what is certainly its speech, (D,), unit length; None where nothing was embedded.
        name: What those call it who brought it.
        role: What they say its role is.
    """

    channel: int
    number: int
    speech_s: float
    vector: np.ndarray | None = None
    name: str | None = None
    role: str | None = None


@dataclass(frozen=True, eq=False)
class _Heard:
    """An utterance that waits: its windows and how loud it is, samples forgotten."""

    start_s: float
    end_s: float
    starts_s: np.ndarray
    length_s: float
    vectors: np.ndarray
    power: np.ndarray


class VoiceCutter:
    """Tells voices apart in some channels of a recording.

    Args:
        n_channels: Of the recording.
        voices: How.
        vad: How short an utterance may be.
        turns: Turns given for this recording; None if there are none.
        embed: Speaker encoder, (N, n) to (N, D); None is the one that `voices.model` names.
        vectors: Whether vectors of given voices are needed, to verify them.
        expected: Enrolled vector of a person who should be in the call, (D,), unit length, such as the agent. It counts
            only where it is verified.
    """

    def __init__(
        self,
        n_channels: int,
        voices: VoicesConfig,
        vad: VadConfig,
        turns: Sequence[Turn] | None = None,
        *,
        embed: Callable[[np.ndarray], np.ndarray] | None = None,
        vectors: bool = False,
        expected: np.ndarray | None = None,
    ) -> None:
        self._expected = expected if n_channels == 1 else None
        self._config, self._vad = voices, vad
        self._embed = embed or campplus.embed
        self._brought: dict[int, list[Turn]] = {}
        for turn in turns or ():
            # Turns without channels belong to a recording with one channel.
            channel = turn.channel if turn.channel is not None else (0 if n_channels == 1 else None)
            if channel is not None:
                self._brought.setdefault(channel, []).append(turn)
        found = voices.mode == "diarize" or (voices.mode == "auto" and n_channels == 1)
        self.channels = frozenset(range(n_channels) if found else [c for c in self._brought if c < n_channels])
        self._vectors = vectors
        self._heard: dict[int, list[_Heard]] = {channel: [] for channel in sorted(self.channels)}

    def misfit(self, n_channels: int, end_s: float) -> str | None:
        """Why what was brought cannot be of this recording; None where it can."""
        last_s = max((turn.end_s for turns in self._brought.values() for turn in turns), default=0.0)
        if last_s > end_s + _PAST_END_S:
            return (
                f"what --voices-from brings reaches to {last_s:.1f} s, the recording to {end_s:.1f} s: it is of another"
            )
        strange = max(self._brought, default=0)
        if strange >= n_channels:
            return f"what --voices-from brings is of channel {strange}, counted from 0, and it has {n_channels}"
        return None

    def push(self, utterance: Utterance) -> None:
        """Take an utterance of one of the channels; NaN and infinities count as silence."""
        samples = np.nan_to_num(utterance.samples, posinf=0.0, neginf=0.0)
        window = round(self._config.window_s * SAMPLING_RATE_HZ)
        starts = np.zeros(0, int)
        vectors = np.zeros((0, campplus.CampPlus.dim), np.float32)
        length = min(len(samples), window)
        if utterance.channel not in self._brought or self._vectors:
            starts = np.arange(0, len(samples) - length + 1, window // _HOPS)
            if starts[-1] + length < len(samples):
                starts = np.append(starts, len(samples) - length)
            vectors = self._embed(np.stack([samples[start : start + length] for start in starts]))
        frame = round(_FRAME_S * SAMPLING_RATE_HZ)
        power = np.square(samples[: len(samples) // frame * frame].reshape(-1, frame)).mean(axis=1)
        seconds = starts / SAMPLING_RATE_HZ + utterance.start_s
        self._heard[utterance.channel].append(
            _Heard(utterance.start_s, utterance.end_s, seconds, length / SAMPLING_RATE_HZ, vectors, power)
        )

    def finish(self) -> tuple[list[Piece], list[Voice]]:
        """Everything that was taken, cut by voice, by channel and start; and the voices."""
        pieces, voices = [], []
        for channel, heard in self._heard.items():
            turns = self._brought.get(channel)
            found, named = self._by_turns(channel, heard, turns) if turns else self._by_vectors(channel, heard)
            pieces += found
            voices += named
        return pieces, voices

    def _by_vectors(self, channel: int, heard: Sequence[_Heard]) -> tuple[list[Piece], list[Voice]]:
        if not heard:
            return [], []
        vectors = np.concatenate([utterance.vectors for utterance in heard])
        lengths_s = np.concatenate([np.full(len(utterance.vectors), utterance.length_s) for utterance in heard])
        centres, anchors = self._centres(vectors, lengths_s)
        if len(centres) == 1:
            pieces = [Piece(channel, utterance.start_s, utterance.end_s, 0, None) for utterance in heard]
            return pieces, [Voice(channel, 0, sum(piece.end_s - piece.start_s for piece in pieces), centres[0])]
        pieces = [piece for utterance in heard for piece in self._cut(channel, utterance, anchors)]
        return _renumbered(channel, pieces, lambda number: {"vector": centres[number]})

    def _centres(self, vectors: np.ndarray, lengths_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each voice is like, and what windows are compared with: an enrolled voice is known better than heard."""
        hop_s, most, expected = self._config.window_s / _HOPS, self._config.voices, self._expected
        centres = find_voices(vectors, lengths_s, hop_s, most)
        if expected is not None and most > 1:
            found = find_beside(expected, vectors, lengths_s, hop_s, most - 1)
            if found and divides(found, expected, len(centres), self._config):
                anchors = [known_and_heard(expected, found.own), *found.others]
                return np.stack([found.own, *found.others]), np.stack(anchors)
        return centres, centres

    def _cut(self, channel: int, heard: _Heard, centres: np.ndarray) -> list[Piece]:
        """An utterance cut where its voice changes."""
        likeness = heard.vectors @ centres.T
        labels = _smooth(likeness)
        middles = heard.starts_s + heard.length_s / 2
        edges, voices = [heard.start_s], [int(labels[0])]
        for number in np.flatnonzero(np.diff(labels)) + 1:
            before, after = labels[number - 1], labels[number]
            first, second = likeness[number - 1 : number + 1, before] - likeness[number - 1 : number + 1, after]
            share = np.clip(first / (first - second), 0.0, 1.0) if first > second else 0.5
            at = middles[number - 1] + share * (middles[number] - middles[number - 1])
            edges.append(self._quietest(heard, float(at), edges[-1]))
            voices.append(int(after))
        edges.append(heard.end_s)
        spans = _long_enough(edges, voices, self._vad.min_utterance_s)
        return [piece for span in spans for piece in self._by_certainty(channel, span, middles, likeness)]

    def _by_certainty(
        self, channel: int, span: tuple[float, float, int], middles: np.ndarray, likeness: np.ndarray
    ) -> list[Piece]:
        """Speech of one voice: what is certain of it, and what is not at either end.

        Windows reach over a change of voice, and where two speak at once they are like both.
        """
        start_s, end_s, voice = span
        inside = np.flatnonzero((middles >= start_s) & (middles < end_s))
        if not len(inside):
            inside = np.abs(middles - (start_s + end_s) / 2).argmin().reshape(1)
        others = np.delete(likeness[inside], voice, axis=1).max(axis=1)
        leads, at = likeness[inside, voice] - others, middles[inside]
        certain = np.flatnonzero(leads >= self._config.min_margin)
        first, last = (int(certain[0]), int(certain[-1]) + 1) if len(certain) else (0, len(leads))
        bounds_s = [start_s, *((at[:-1] + at[1:]) / 2).tolist(), end_s]
        pieces = []
        for low, high in ((0, first), (first, last), (last, len(leads))):
            begin_s, stop_s = bounds_s[low], bounds_s[high]
            if stop_s - begin_s >= self._vad.min_utterance_s:
                margin = float(leads[low:high].mean()) if stop_s - begin_s >= _SHORT_S else 0.0
                pieces.append(Piece(channel, begin_s, stop_s, voice, max(margin, 0.0)))
        return pieces

    def _by_turns(
        self, channel: int, heard: Sequence[_Heard], turns: Sequence[Turn]
    ) -> tuple[list[Piece], list[Voice]]:
        names = list(dict.fromkeys(turn.speaker for turn in turns))
        number = {name: n for n, name in enumerate(names)}
        roles = {turn.speaker: turn.role for turn in turns}
        starts = np.array([turn.start_s for turn in turns])
        ends = np.array([turn.end_s for turn in turns])
        whose = np.array([number[turn.speaker] for turn in turns])
        edges = np.unique(np.concatenate([starts, ends]))
        pieces = []
        for utterance in heard:
            near = (ends > utterance.start_s) & (starts < utterance.end_s)
            pieces += self._by_near(channel, utterance, starts[near], ends[near], whose[near], edges)
        if len(names) == 1:
            pieces = [dataclasses.replace(piece, margin=None) for piece in pieces]
        vectors = self._vectors_of(heard, pieces, len(names))
        facts = [{"name": name, "role": roles[name], "vector": vectors.get(n)} for n, name in enumerate(names)]
        return _renumbered(channel, pieces, lambda n: facts[n])

    def _by_near(
        self, channel: int, heard: _Heard, starts: np.ndarray, ends: np.ndarray, whose: np.ndarray, edges: np.ndarray
    ) -> list[Piece]:
        """An utterance cut where turns begin and end; short pauses between them go to their neighbours."""
        if not len(starts):
            return [Piece(channel, heard.start_s, heard.end_s, None, None)]
        inner = edges[(edges > heard.start_s) & (edges < heard.end_s)]
        bounds = [heard.start_s, *inner.tolist(), heard.end_s]
        # -1 is no speaker, -2 several.
        labels = []
        for begin, end in itertools.pairwise(bounds):
            middle = (begin + end) / 2
            active = np.unique(whose[(starts <= middle) & (ends > middle)])
            labels.append(int(active[0]) if len(active) == 1 else -2 if len(active) else -1)
        bare = [span for span, label in zip(itertools.pairwise(bounds), labels, strict=True) if label == -1]
        runs = _without_pauses(bounds, labels)
        cut = _long_enough([start for start, _, _ in runs] + [heard.end_s], [label for *_, label in runs],
                           self._vad.min_utterance_s)  # fmt: skip
        pieces = []
        for start_s, end_s, label in cut:
            bare_s = sum(max(min(b, end_s) - max(a, start_s), 0.0) for a, b in bare)
            if label == -1 or 2.0 * bare_s > end_s - start_s:
                pieces.append(Piece(channel, start_s, end_s, None, None))
                continue
            shares = np.clip(np.minimum(ends, end_s) - np.maximum(starts, start_s), 0.0, None)
            spoken = np.bincount(whose, weights=shares, minlength=whose.max() + 1)
            voice = int(spoken.argmax()) if label == -2 else label
            # Of what was joined to it, others may have some.
            others = float(np.delete(spoken, voice).sum()) if label != -2 else spoken.sum()
            margin = max(1.0 - 2.0 * others / (end_s - start_s), 0.0)
            pieces.append(Piece(channel, start_s, end_s, voice, margin if label != -2 else 0.0))
        return pieces

    def _vectors_of(self, heard: Sequence[_Heard], pieces: Sequence[Piece], n: int) -> dict[int, np.ndarray]:
        """Mean vectors of brought voices, from windows that lie in their pieces."""
        sums = np.zeros((n, campplus.CampPlus.dim))
        certain = [
            p for p in pieces if p.voice is not None and (p.margin is None or p.margin >= self._config.min_margin)
        ]
        windows = [(s, s + u.length_s, v) for u in heard for s, v in zip(u.starts_s, u.vectors, strict=True)]
        if certain and windows:
            begins = np.array([piece.start_s for piece in certain])
            for start_s, end_s, vector in windows:
                piece = certain[max(int(np.searchsorted(begins, start_s, side="right")) - 1, 0)]
                if piece.start_s <= start_s and end_s <= piece.end_s + 1e-6 and piece.voice is not None:
                    sums[piece.voice] += vector
        return {voice: unit(total) for voice, total in enumerate(sums) if total.any()}

    def _quietest(self, heard: _Heard, at_s: float, after_s: float) -> float:
        """Where it is quietest around a time, but behind the change before."""
        low = max(at_s - _SNAP_S, after_s + _FRAME_S, heard.start_s + _FRAME_S)
        first, last = round((low - heard.start_s) / _FRAME_S), round((at_s + _SNAP_S - heard.start_s) / _FRAME_S)
        power = np.convolve(heard.power, np.ones(3), mode="same")[first : last + 1]
        if not len(power):
            return min(max(at_s, low), heard.end_s)
        return heard.start_s + (first + int(power.argmin()) + 0.5) * _FRAME_S


def verified(likeness: float, others: Iterable[float], config: VoicesConfig) -> bool:
    """Whether a voice is an enrolled one: like it, and more so than the others are (cosines)."""
    return likeness >= config.verification and likeness - max(others, default=0.0) >= config.verification_margin


def divides(found: Beside, expected: np.ndarray, n_without: int, config: VoicesConfig) -> bool:
    """Whether an enrolled voice divides a call: it is verified, or probable in a call of several voices.

    Args:
        found: The call divided by it.
        expected: What it is like, (D,), unit length.
        n_without: Voices that are found without it. One, if it is calm, is one person's.
        config: Thresholds.
    """
    likeness, others = float(found.own @ expected), found.others @ expected
    several = n_without > 1 or not found.calm
    probable = likeness >= config.verification and likeness - others.max() >= _PROBABLE
    return verified(likeness, others, config) or (several and probable)


def _smooth(likeness: np.ndarray) -> np.ndarray:
    """The voice of each window, (N,), so that likeness less the cost of changes is greatest (Viterbi)."""
    best, came = likeness[0].copy(), []
    for row in likeness[1:]:
        leap = int(best.argmax())
        stay = best >= best[leap] - _CHANGE
        came.append(np.where(stay, np.arange(len(best)), leap))
        best = np.where(stay, best, best[leap] - _CHANGE) + row
    labels = [int(best.argmax())]
    for back in reversed(came):
        labels.append(int(back[labels[-1]]))
    return np.array(labels[::-1])


def _long_enough(edges: Sequence[float], labels: Sequence[int], least_s: float) -> list[tuple[float, float, int]]:
    """Spans between edges, neighbours of one label joined, and those too short joined to the longer neighbour."""
    spans: list[list[Any]] = [list(span) for span in zip(edges[:-1], edges[1:], labels, strict=True)]
    while True:
        joined: list[list[Any]] = []
        for span in spans:
            if joined and joined[-1][2] == span[2]:
                joined[-1][1] = span[1]
            else:
                joined.append(list(span))
        spans = joined
        lengths = [end - start for start, end, _ in spans]
        short = int(np.argmin(lengths))
        if len(spans) == 1 or lengths[short] >= least_s:
            return [(start, end, label) for start, end, label in spans]
        sides = [side for side in (short - 1, short + 1) if 0 <= side < len(spans)]
        spans[short][2] = spans[max(sides, key=lengths.__getitem__)][2]


def _without_pauses(bounds: Sequence[float], labels: Sequence[int]) -> list[tuple[float, float, int]]:
    """Runs of labels; a short time without a speaker (-1) is divided between its neighbours."""
    runs: list[list[Any]] = []
    for begin, end, label in zip(bounds[:-1], bounds[1:], labels, strict=True):
        if runs and label == -1 and runs[-1][2] == -1:
            runs[-1][1] = end
        else:
            runs.append([begin, end, label])
    kept = [run for run in runs if run[2] != -1 or run[1] - run[0] > _PAUSE_S]
    if not kept:
        return [(bounds[0], bounds[-1], -1)]
    edges = [bounds[0], *((a[1] + b[0]) / 2 for a, b in itertools.pairwise(kept)), bounds[-1]]
    return [(a, b, run[2]) for a, b, run in zip(edges[:-1], edges[1:], kept, strict=True)]


def _renumbered(channel: int, pieces: Sequence[Piece], facts: Callable[[int], dict]) -> tuple[list[Piece], list[Voice]]:
    """Voices numbered from 0 by first speech; those without speech are removed."""
    order = list(dict.fromkeys(piece.voice for piece in pieces if piece.voice is not None))
    place = {voice: number for number, voice in enumerate(order)}
    speech_s = dict.fromkeys(order, 0.0)
    for piece in pieces:
        if piece.voice is not None:
            speech_s[piece.voice] += piece.end_s - piece.start_s
    numbered = [
        dataclasses.replace(piece, voice=None if piece.voice is None else place[piece.voice]) for piece in pieces
    ]
    return numbered, [Voice(channel, place[voice], speech_s[voice], **facts(voice)) for voice in order]
