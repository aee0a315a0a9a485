"""MSP-Podcast: emotional turns out of podcasts, labels from 1 to 7, official splits.

    ROOT/Labels/labels_consensus.csv      (`labels_concensus` in older releases; JSON in some)
    ROOT/Audios/MSP-PODCAST_0001_0008.wav

A session is what one podcast has in one split, in the order of the file, with gaps: turns were picked for emotion. The
labels of Test3 are not public; its turns are unlabelled.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, clip_labels, find_one
from vaemo.errors import ReadCorpusError

RANGE = (1.0, 7.0)

_SPLITS = {
    "Train": "train",
    "Development": "dev",
    "Validation": "dev",
    "Test1": "test",
    "Test2": "test",
    "Test3": "test",
}
_COLUMNS = ("EmoVal", "EmoAct", "SpkrID", "Split_Set")


def read(root: Path, label_lag_s: float) -> Corpus:
    """All turns; `split_set` keeps the split's own name. A speaker that is not known is one of their podcast's own."""
    labels = find_one(root, "Labels", "labels", "label", what="folder of labels")
    names = [f"labels_{word}.{kind}" for kind in ("csv", "json") for word in ("consensus", "concensus")]
    audio = find_one(root, "Audios", "Audio", what="folder of audio")
    rows: list[dict[str, Any]] = []
    n_unknown = 0
    for file, entry in _entries(find_one(labels, *names, what="labels")):
        name = file.removesuffix(".wav")
        podcast, _, number = name.rpartition("_")
        split_set = entry["Split_Set"]
        if split_set not in _SPLITS:
            raise ReadCorpusError(f"{file} is in the split '{split_set}'; known are {', '.join(_SPLITS)}.")
        known = entry["SpkrID"] not in ("Unknown", "", None)
        n_unknown += not known
        rows.append(
            {
                "utt_id": name,
                "session_id": f"{podcast}.{split_set}",
                "speaker_id": str(entry["SpkrID"]) if known else f"unknown-{podcast}",
                "audio_path": str(audio / file),
                "valence": _label(entry["EmoVal"]),
                "arousal": _label(entry["EmoAct"]),
                "position": int(number),
                "split": _SPLITS[split_set],
                "split_set": split_set,
            }
        )
    rows.sort(key=lambda row: (row["session_id"], row["position"]))
    notes = [f"{n_unknown} turns have no known speaker; each podcast's count as one"] if n_unknown else []
    return Corpus(rows, RANGE, [*notes, *clip_labels(rows, RANGE)])


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".json":
        entries = json.loads(path.read_text())
    else:
        with open(path, newline="", encoding="utf-8-sig") as file:
            entries = {entry["FileName"]: entry for entry in csv.DictReader(file)}
    for file, entry in entries.items():
        missing = [column for column in _COLUMNS if column not in entry]
        if missing:
            raise ReadCorpusError(f"{path} says no {missing[0]} of {file}; it needs {', '.join(_COLUMNS)}.")
        yield file, entry


def _label(text: Any) -> float | None:
    """The number, null where there is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
