"""RECOLA: French dyads in remote collaboration, five minutes each, traces from -1 to 1.

    ROOT/ratings_gold_standard/{arousal,valence}/{train,dev,test}_1.arff      (AVEC's layout: gold traces, splits)
    ROOT/RECOLA-Annotation/emotional_behaviour/{arousal,valence}/P19.csv      (public layout: six raters)

Audio is found by name anywhere below. One participant a recording; utterances by voice activity.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from vaemo.audio.recording import Decoder
from vaemo.corpora.base import Corpus, clip_labels, find_one
from vaemo.corpora.traces import Trace, find_audio, gold, label_utterances, speech_spans
from vaemo.errors import ReadCorpusError
from vaemo.units import DIMENSIONS, SPLITS

RANGE = (-1.0, 1.0)

_GOLD, _RATERS = "ratings_gold_standard", "RECOLA-Annotation/emotional_behaviour"


def read(root: Path, label_lag_s: float) -> Corpus:
    """The utterances of every recording that has both traces, or, in AVEC's test, none."""
    folder = find_one(root, _GOLD, _RATERS, "emotional_behaviour", what="folder of ratings")
    load = _read_arff if folder.name == _GOLD else _read_raters
    audio = find_audio(root)
    names = sorted({path.stem for name in DIMENSIONS for path in (folder / name).glob("*.*")})
    rows: list[dict[str, Any]] = []
    with Decoder() as decoder:
        for name in names:
            if name not in audio:
                raise ReadCorpusError(f"{root} has ratings of {name} and no {name}.wav; put the audio below it.")
            traces = {dimension: load(_file(folder / dimension, name)) for dimension in DIMENSIONS}
            split = name.partition("_")[0]
            for index, row in enumerate(label_utterances(speech_spans(audio[name], decoder), traces, label_lag_s)):
                rows.append(
                    {
                        "utt_id": f"{name}-{index:04d}",
                        "session_id": name,
                        "speaker_id": name,
                        "audio_path": str(audio[name]),
                        "split": split if split in SPLITS else None,
                        **row,
                    }
                )
    return Corpus(rows, RANGE, [f"labels are {label_lag_s:g} s behind speech", *clip_labels(rows, RANGE)])


def _file(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"{name}.*"))
    if not found:
        raise ReadCorpusError(f"{folder} has no ratings of {name}, the other dimension has; both are needed.")
    return found[0]


def _read_arff(path: Path) -> Trace:
    """Lines of name, time and value after `@data`."""
    _, _, data = path.read_text().partition("@data")
    values = [line.split(",")[-2:] for line in data.splitlines() if line.strip()]
    time_s, value = np.array(values, float).T
    return Trace(time_s, value)


def _read_raters(path: Path) -> Trace:
    """A column of time, then one of each rater; names have blanks behind them."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *lines = [row for row in csv.reader(file, delimiter=";") if row]
    names = [name.strip() for name in header]
    values = np.array([[cell.strip() or "nan" for cell in line[: len(names)]] for line in lines], float)
    time_s = values[:, names.index("time")]
    raters = [column for column, name in enumerate(names) if name and name != "time"]
    return gold([Trace(time_s, values[:, column]) for column in raters])
