"""SEWA (AVEC 2019): pairs of strangers talking over video chat, three cultures, traces from -1 to 1.

    ROOT/labels/Train_DE_01.csv     name;timestamp;arousal;valence;liking, ten a second

Audio is found by name anywhere below. The labels of the test recordings are not public; their utterances are
unlabelled. The culture is the fold. Utterances by voice activity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vaemo.audio.recording import Decoder
from vaemo.corpora.base import Corpus, clip_labels, find_one, number, read_cells, visible
from vaemo.corpora.traces import Trace, find_audio, label_utterances, speech_spans
from vaemo.errors import ReadCorpusError
from vaemo.units import DIMENSIONS

RANGE = (-1.0, 1.0)

_SPLITS = {"Train": "train", "Devel": "dev", "Test": "test"}


def read(root: Path, label_lag_s: float) -> Corpus:
    """The utterances of every recording whose name is that of a split, a culture and a number."""
    labels = find_one(root, "labels", what="folder of labels")
    audio = find_audio(root, lambda name: name.partition("_")[0] in _SPLITS)
    without = [path.stem for path in visible(labels.glob("*.csv")) if path.stem not in audio]
    if without:
        raise ReadCorpusError(f"{root} has labels of {without[0]} and no {without[0]}.wav; put the audio below it.")
    rows: list[dict[str, Any]] = []
    with Decoder() as decoder:
        for name, path in audio.items():
            split, culture, _ = name.split("_")
            traces = _traces(labels / f"{name}.csv")
            for index, row in enumerate(label_utterances(speech_spans(path, decoder), traces, label_lag_s)):
                rows.append(
                    {
                        "utt_id": f"{name}-{index:04d}",
                        "session_id": name,
                        "speaker_id": name,
                        "audio_path": str(path),
                        "split": _SPLITS[split],
                        "fold": culture,
                        **row,
                    }
                )
    return Corpus(rows, RANGE, [f"labels are {label_lag_s:g} s behind speech", *clip_labels(rows, RANGE)])


def _traces(path: Path) -> dict[str, Trace]:
    """Both traces of a recording; none of a test recording whose labels are kept back."""
    if not path.exists():
        if path.name.startswith("Test"):
            return {}
        raise ReadCorpusError(f"there is no {path}; every recording of train and devel has its labels.")
    lines = list(read_cells(path, ";", ("timestamp", *DIMENSIONS)))
    return {
        name: Trace.of([(number(row["timestamp"], at), number(row[name], at, RANGE)) for at, row in lines], path)
        for name in DIMENSIONS
    }
