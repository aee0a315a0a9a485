"""RECOLA: French dyads in remote collaboration, five minutes each, traces from -1 to 1.

    ROOT/ratings_gold_standard/{arousal,valence}/{train,dev,test}_1.arff      (AVEC's layout: gold traces, splits)
    ROOT/RECOLA-Annotation/emotional_behaviour/{arousal,valence}/P19.csv      (public layout: six raters)

Audio is found by name anywhere below. One participant a recording; utterances by voice activity. Recordings of AVEC's
test are unlabelled where their ratings are not there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaemo.audio.recording import Decoder
from vaemo.corpora.base import Corpus, clip_labels, find_one, number, numbered_lines, read_cells, visible
from vaemo.corpora.traces import Trace, find_audio, gold, label_utterances, speech_spans
from vaemo.errors import ReadCorpusError
from vaemo.units import DIMENSIONS, SPLITS

RANGE = (-1.0, 1.0)

_NAME = re.compile(r"(P|train_|dev_|test_)\d+")
_GOLD, _RATERS = "ratings_gold_standard", "RECOLA-Annotation/emotional_behaviour"


def read(root: Path, label_lag_s: float) -> Corpus:
    """The utterances of every recording that has both traces, or, in AVEC's test, none."""
    folder = find_one(root, _GOLD, _RATERS, "emotional_behaviour", what="folder of ratings")
    load, suffix = (_read_arff, ".arff") if folder.name == _GOLD else (_read_raters, ".csv")
    rated = {path.stem for name in DIMENSIONS for path in visible((folder / name).glob(f"*{suffix}"))}
    audio = find_audio(root, lambda name: name in rated or _NAME.fullmatch(name) is not None)
    hidden = {name for name in audio if name.startswith("test_")} - rated
    n_without = len(audio.keys() - rated - hidden)
    rows: list[dict[str, Any]] = []
    with Decoder() as decoder:
        for name in sorted(rated | hidden):
            if name not in audio:
                raise ReadCorpusError(f"{root} has ratings of {name} and no {name}.wav; put the audio below it.")
            dimensions = DIMENSIONS if name in rated else ()
            traces = {dimension: load(_file(folder / dimension, name, suffix)) for dimension in dimensions}
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
    notes = [
        f"labels are {label_lag_s:g} s behind speech",
        *([f"{n_without} recordings have no ratings and are left out"] if n_without else []),
    ]
    return Corpus(rows, RANGE, [*notes, *clip_labels(rows, RANGE)])


def _file(folder: Path, name: str, suffix: str) -> Path:
    path = folder / f"{name}{suffix}"
    if not path.exists():
        raise ReadCorpusError(f"{folder} has no ratings of {name}, the other dimension has; both are needed.")
    return path


def _read_arff(path: Path) -> Trace:
    """Lines after `@data`, a cell for each `@attribute`; the last two are time and value."""
    lines = numbered_lines(path)
    heads = [line.split()[0].lower() for _, line in lines]
    if "@data" not in heads:
        raise ReadCorpusError(f"{path} has no @data. Give the file as it is distributed.")
    width, values = heads.count("@attribute"), []
    for place, line in lines[heads.index("@data") + 1 :]:
        if line.startswith("%"):
            continue
        cells = line.split(",")
        if len(cells) != width:
            raise ReadCorpusError(
                f"{place}: '{line.strip()[:80]}' has {len(cells)} cells for {width} attributes. Give the file as it is "
                "distributed."
            )
        values.append((number(cells[-2], place), number(cells[-1], place, RANGE)))
    return Trace.of(values, path)


def _read_raters(path: Path) -> Trace:
    """A column of time, then one of each rater; names have blanks behind them."""
    rows = list(read_cells(path, ";", ("time",)))
    raters = [name for name in (rows[0][1] if rows else ()) if name and name != "time"]
    return gold(
        [
            Trace.of([(number(row["time"], place), number(row[rater], place, RANGE)) for place, row in rows], path)
            for rater in raters
        ]
    )
