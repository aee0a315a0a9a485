"""MSP-Conversation: long conversations out of podcasts, annotated in parts, traces from -100 to 100.

    ROOT/Audio/MSP-Conversation_0001.wav
    ROOT/Annotations/{Valence,Arousal}/MSP-Conversation_0047_2_001.csv        conversation, part, annotator
    ROOT/Time_Labels/{conversations,conversation_parts}.txt                    name;start;end in the original podcast
    ROOT/partitions.txt                                                        name;Train|Validation|Test

A trace's time counts from the start of its part. Times of parts count from the start of the podcast: that of the
conversation is taken off. Utterances by voice activity, inside the parts that are annotated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vaemo.audio.recording import Decoder
from vaemo.corpora.base import Corpus, clip_labels, find_one
from vaemo.corpora.traces import Trace, find_audio, gold, label_utterances, speech_spans
from vaemo.errors import ReadCorpusError
from vaemo.units import DIMENSIONS

RANGE = (-100.0, 100.0)

_SPLITS = {"Train": "train", "Validation": "dev", "Development": "dev", "Test": "test"}
_AHEAD_S = 0.05


def read(root: Path, label_lag_s: float) -> Corpus:
    """The utterances of all annotated parts; several annotators are averaged."""
    times = find_one(root, "Time_Labels", "Time Labels", what="folder of times")
    starts = {name: start_s for name, start_s, _ in _lines(times / "conversations.txt")}
    splits = dict(line.split(";")[:2] for line in (root / "partitions.txt").read_text().split() if ";" in line)
    audio = find_audio(find_one(root, "Audio", "Audios", what="folder of audio"))
    rows: list[dict[str, Any]] = []
    spans: dict[str, list[tuple[float, float]]] = {}
    n_unannotated = 0
    with Decoder() as decoder:
        for part, podcast_start_s, podcast_end_s in sorted(_lines(times / "conversation_parts.txt"), key=_part_order):
            conversation = part.rpartition("_")[0]
            traces = _traces(root / "Annotations", part)
            if not traces:
                n_unannotated += 1
                continue
            if conversation not in audio:
                raise ReadCorpusError(f"{root} has annotations of {part} and no {conversation}.wav below Audio.")
            if conversation not in spans:
                spans[conversation] = speech_spans(audio[conversation], decoder)
            start_s, end_s = (time - starts[conversation] for time in (podcast_start_s, podcast_end_s))
            inside = [
                span for span in spans[conversation] if span[0] >= start_s - _AHEAD_S and span[1] <= end_s + _AHEAD_S
            ]
            for index, row in enumerate(label_utterances(inside, traces, label_lag_s, offset_s=start_s)):
                rows.append(
                    {
                        "utt_id": f"{part}-{index:04d}",
                        "session_id": conversation,
                        "speaker_id": conversation,
                        "audio_path": str(audio[conversation]),
                        "split": _SPLITS[splits[conversation]],
                        **row,
                    }
                )
    notes = [
        f"labels are {label_lag_s:g} s behind speech",
        f"{n_unannotated} parts have no annotation and are left out",
        "who speaks when is not taken from the corpus: a conversation counts as one speaker",
    ]
    return Corpus(rows, RANGE, [*notes, *clip_labels(rows, RANGE)])


def _lines(path: Path) -> list[tuple[str, float, float]]:
    split = [line.split(";") for line in path.read_text().splitlines() if line.strip()]
    return [(name.strip(), float(start_s), float(end_s)) for name, start_s, end_s, *_ in split]


def _part_order(line: tuple[str, float, float]) -> tuple[str, float]:
    return line[0].rpartition("_")[0], line[1]


def _traces(folder: Path, part: str) -> dict[str, Trace]:
    """Gold traces of a part; empty where a dimension has no annotator."""
    found = {
        name: [_read(path) for path in sorted((folder / name.capitalize()).glob(f"{part}_*.csv"))]
        for name in DIMENSIONS
    }
    return {name: gold(traces) for name, traces in found.items()} if all(found.values()) else {}


def _read(path: Path) -> Trace:
    """Time and value of every line that has both: how many lines stand above them differs."""
    values = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        try:
            time_s, value = (float(cell) for cell in line.split(",")[:2])
        except ValueError:
            continue
        values.append((time_s, value))
    if not values:
        raise ReadCorpusError(f"{path} has no line of time and value.")
    time, value = np.array(sorted(values)).T
    return Trace(time, value)
