"""Continuous annotations: labels of utterances from traces, utterances from voice activity.

An utterance's label is the mean of the gold trace over [start + lag, end + lag]: annotators react late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaemo.audio.recording import AudioProblem, Decoder, Recording
from vaemo.audio.vad import UtteranceFinder
from vaemo.config import VadConfig
from vaemo.corpora.base import visible
from vaemo.errors import ReadCorpusError

_STEP_S = 0.04
"""Traces of several annotators are brought to one grid: 25 values a second."""


@dataclass(frozen=True)
class Trace:
    """Values over time: (n,) each, seconds rising."""

    time_s: np.ndarray
    value: np.ndarray

    @staticmethod
    def of(values: Sequence[tuple[float, float]], path: Path) -> Trace:
        """The trace of pairs of time and value, in their order.

        Raises:
            ReadCorpusError: if there are none, or a time lies before the one above it.
        """
        if not values:
            raise ReadCorpusError(f"{path} has no line of time and value.")
        time_s, value = np.array(values).T
        back = np.flatnonzero(np.diff(time_s) < 0)
        if len(back):
            raise ReadCorpusError(
                f"{path}: time goes back from {time_s[back[0]]:g} to {time_s[back[0] + 1]:g}. Give the file as it is "
                "distributed."
            )
        return Trace(time_s, value)

    def mean(self, start_s: float, end_s: float) -> float | None:
        """Mean over [start_s, end_s); null where the trace has nothing there."""
        inside = (self.time_s >= start_s) & (self.time_s < end_s) & np.isfinite(self.value)
        return float(self.value[inside].mean()) if inside.any() else None


def gold(traces: Sequence[Trace]) -> Trace:
    """The mean of annotators' traces where at least one of them was annotating."""
    end_s = max(float(trace.time_s[-1]) for trace in traces)
    grid = np.arange(0.0, end_s + _STEP_S, _STEP_S)
    values = np.stack([np.interp(grid, trace.time_s, trace.value, left=np.nan, right=np.nan) for trace in traces])
    annotated = np.isfinite(values).any(axis=0)
    return Trace(grid[annotated], np.nanmean(values[:, annotated], axis=0))


def label_utterances(
    spans: Sequence[tuple[float, float]], traces: Mapping[str, Trace], label_lag_s: float, *, offset_s: float = 0.0
) -> Iterator[dict[str, Any]]:
    """`start_s`, `end_s` and the labels of every span.

    Args:
        spans: (start_s, end_s) in the recording.
        traces: By dimension; their time counts from `offset_s` of the recording.
        label_lag_s: How late annotators are.
        offset_s: Where the traces begin.
    """
    for start_s, end_s in spans:
        shift = label_lag_s - offset_s
        labels = {name: trace.mean(start_s + shift, end_s + shift) for name, trace in traces.items()}
        yield {"start_s": start_s, "end_s": end_s, **labels}


def speech_spans(path: Path, decoder: Decoder, config: VadConfig | None = None) -> list[tuple[float, float]]:
    """Where there is speech in a recording, all channels together.

    Raises:
        ReadCorpusError: if it cannot be decoded.
    """
    try:
        recording = Recording(str(path), decoder)
        finder = UtteranceFinder(1, config or VadConfig())
        found = []
        for block in recording.blocks():
            found += finder.push(block.mean(axis=0, keepdims=True))
    except AudioProblem as problem:
        raise ReadCorpusError(f"{path}: {problem.reason}; the corpus needs this recording.") from None
    return [(utterance.start_s, utterance.end_s) for utterance in [*found, *finder.finish()]]


def find_audio(root: Path, is_recording: Callable[[str], bool]) -> dict[str, Path]:
    """The WAV files of a corpus below a folder, by their names without suffix.

    Args:
        root: Where.
        is_recording: Whether the corpus has a recording of that name; other files are left out.

    Raises:
        ReadCorpusError: if two files have the name of one recording.
    """
    found: dict[str, Path] = {}
    for path in visible(root.rglob("*.wav")):
        if is_recording(path.stem) and found.setdefault(path.stem, path) != path:
            raise ReadCorpusError(f"{root} holds {path.name} twice, {found[path.stem]} and {path}; keep one.")
    return found
