"""MSP-Conversation: long conversations out of podcasts, annotated in parts, traces from -100 to 100.

    ROOT/Audio/MSP-Conversation_0001.wav
    ROOT/Annotations/{Valence,Arousal,Dominance}/MSP-Conversation_0047_2_001.csv        conversation, part, annotator
    ROOT/Time_Labels/{conversations,conversation_parts}.txt                    name;start;end in the original podcast
    ROOT/partitions.txt                                                        name;Train|Validation|Test

A trace's time counts from the start of its part. Times of parts count from the start of the podcast: that of the
conversation is taken off. Utterances by voice activity, inside the parts that are annotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vaemo.audio.recording import Decoder
from vaemo.corpora.base import Corpus, clip_labels, find_one, number, numbered_lines
from vaemo.corpora.traces import Trace, find_audio, gold, label_utterances, speech_spans
from vaemo.errors import ReadCorpusError
from vaemo.units import DIMENSIONS

RANGE = (-100.0, 100.0)

_SPLITS = {"Train": "train", "Validation": "dev", "Development": "dev", "Test": "test"}
_AHEAD_S = 0.05
_DATA = re.compile(r"\s*[+-]?[\d.]+\s*[,;\t]\s*[+-]?\d")


def read(root: Path, label_lag_s: float) -> Corpus:
    """The utterances of all annotated parts; several annotators are averaged."""
    times = find_one(root, "Time_Labels", "Time Labels", what="folder of times")
    starts = {name: start_s for name, start_s, _ in _lines(times / "conversations.txt")}
    partitions = root / "partitions.txt"
    splits = {name.strip(): (place, split.strip()) for place, (name, split, *_) in _fields(partitions, 2)}
    parts = sorted(_lines(times / "conversation_parts.txt"), key=_part_order)
    named = {_conversation(part) for part, *_ in parts}
    audio = find_audio(find_one(root, "Audio", "Audios", what="folder of audio"), named.__contains__)
    rows: list[dict[str, Any]] = []
    spans: dict[str, list[tuple[float, float]]] = {}
    n_unannotated = n_half = 0
    cut: set[tuple[str, float]] = set()
    with Decoder() as decoder:
        for part, podcast_start_s, podcast_end_s in parts:
            conversation = _conversation(part)
            traces = _traces(root / "Annotations", part)
            if not traces:
                n_unannotated += 1
                continue
            n_half += any(name not in traces for name in DIMENSIONS)
            if conversation not in audio:
                raise ReadCorpusError(f"{root} has annotations of {part} and no {conversation}.wav below Audio.")
            if conversation not in spans:
                spans[conversation] = speech_spans(audio[conversation], decoder)
            place, split = _of(splits, conversation, partitions)
            if split not in _SPLITS:
                raise ReadCorpusError(f"{place}: the split is '{split}'; known are {', '.join(_SPLITS)}.")
            offset_s = _of(starts, conversation, times / "conversations.txt")
            start_s, end_s = podcast_start_s - offset_s, podcast_end_s - offset_s
            inside, across = _within(spans[conversation], start_s, end_s)
            cut |= {(conversation, span[0]) for span in across}
            for index, row in enumerate(label_utterances(inside, traces, label_lag_s, offset_s=start_s)):
                rows.append(
                    {
                        "utt_id": f"{part}-{index:04d}",
                        "session_id": conversation,
                        "speaker_id": conversation,
                        "audio_path": str(audio[conversation]),
                        "split": _SPLITS[split],
                        **row,
                    }
                )
    notes = [
        f"labels are {label_lag_s:g} s behind speech",
        f"{n_unannotated} parts have no annotation and are left out",
        *([f"{n_half} parts are annotated in one dimension alone"] if n_half else []),
        *([f"{len(cut)} utterances across the border of a part are left out"] if cut else []),
        "who speaks when is not taken from the corpus: a conversation counts as one speaker",
    ]
    return Corpus(rows, RANGE, [*notes, *clip_labels(rows, RANGE)])


def _within(
    spans: Sequence[tuple[float, float]], start_s: float, end_s: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The spans of a part of a conversation, which may begin and end a little outside it, and those across a border."""
    inside = [span for span in spans if span[0] >= start_s - _AHEAD_S and span[1] <= end_s + _AHEAD_S]
    near = [span for span in spans if span[0] < end_s - _AHEAD_S and span[1] > start_s + _AHEAD_S]
    return inside, [span for span in near if span not in inside]


def _lines(path: Path) -> list[tuple[str, float, float]]:
    return [
        (name.strip(), number(start_s, place), number(end_s, place))
        for place, (name, start_s, end_s, *_) in _fields(path, 3)
    ]


def _fields(path: Path, n: int) -> Iterator[tuple[str, list[str]]]:
    """The fields of every line, of which it needs `n`, behind its place."""
    for place, line in numbered_lines(path):
        fields = line.split(";")
        if len(fields) < n:
            raise ReadCorpusError(f"{place}: '{line.strip()[:80]}' has not {n} fields between semicolons.")
        yield place, fields


def _of(known: Mapping[str, Any], conversation: str, path: Path) -> Any:
    if conversation not in known:
        raise ReadCorpusError(f"{path} does not name {conversation}, which is annotated.")
    return known[conversation]


def _part_order(line: tuple[str, float, float]) -> tuple[str, float]:
    return _conversation(line[0]), line[1]


def _conversation(part: str) -> str:
    return part.rpartition("_")[0]


def _traces(folder: Path, part: str) -> dict[str, Trace]:
    """Gold traces of a part; without a dimension that has no annotator."""
    found = {
        name: [_read(path) for path in sorted((folder / name.capitalize()).glob(f"{part}_*.csv"))]
        for name in (*DIMENSIONS, "dominance")
    }
    return {name: gold(traces) for name, traces in found.items() if traces}


def _read(path: Path) -> Trace:
    """Time and value of every line below that of their names; how many lines of other things stand above differs."""
    lines = numbered_lines(path)
    cells = [[cell.strip() for cell in line.split(",")] for _, line in lines]
    first = next((row for row, (_, line) in enumerate(lines) if _DATA.match(line)), len(lines))
    names = max((row for row in range(first) if cells[row][0].lower() == "time"), default=first - 1)
    values = []
    for (place, line), (time_s, *rest) in list(zip(lines, cells, strict=True))[names + 1 :]:
        if len(list(filter(None, rest))) != 1:
            raise ReadCorpusError(f"{place}: '{line.strip()[:80]}' is no time and value. Give the file as distributed.")
        values.append((number(time_s, place), number(rest[0], place, RANGE)))
    return Trace.of(sorted(values), path)
