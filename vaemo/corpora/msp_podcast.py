"""MSP-Podcast: emotional turns out of podcasts, labels from 1 to 7, official splits.

    ROOT/Labels/labels_consensus.csv      (`labels_concensus` in older releases; JSON in some)
    ROOT/Labels/labels.txt                (single ratings; some releases lack it)
    ROOT/Audios/MSP-PODCAST_0001_0008.wav

A session is the turns of one podcast in one split, in the order of the file, with gaps: turns were picked for emotion.
The labels of Test3 are not public; its turns are unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, clip_labels, find_one, number, numbered_lines, rater_facts, read_cells
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
_HIDDEN, _ABSENT = ("Test3",), ("", "nan", "na", "n/a", "none", "null")
_RATED = {"V": "valence", "A": "arousal", "D": "dominance"}
_COLUMNS = ("EmoVal", "EmoAct", "SpkrID", "Split_Set")


def read(root: Path, label_lag_s: float) -> Corpus:
    """All turns; `split_set` keeps the split's own name. Unknown speakers of a podcast count as one."""
    labels = find_one(root, "Labels", "labels", "label", what="folder of labels")
    names = [f"labels_{word}.{kind}" for kind in ("csv", "json") for word in ("consensus", "concensus")]
    audio = find_one(root, "Audios", "Audio", what="folder of audio")
    rows: list[dict[str, Any]] = []
    n_unknown = 0
    single = labels / "labels.txt"
    ratings = _ratings(single) if single.exists() else {}
    for place, file, entry in _entries(find_one(labels, *names, what="labels")):
        name = file.removesuffix(".wav")
        podcast, _, turn = name.rpartition("_")
        split_set = entry["Split_Set"]
        if split_set not in _SPLITS:
            raise ReadCorpusError(f"{place}: {file} is in the split '{split_set}'; known are {', '.join(_SPLITS)}.")
        speaker = str(entry["SpkrID"]).strip()
        known = speaker.lower() not in ("unknown", *_ABSENT)
        n_unknown += not known
        rows.append(
            {
                "utt_id": name,
                "session_id": f"{podcast}.{split_set}",
                "speaker_id": speaker if known else f"unknown-{podcast}",
                "audio_path": str(audio / file),
                "valence": _label(entry, "EmoVal", place),
                "arousal": _label(entry, "EmoAct", place),
                # By name, because releases, and models trained on them, differ in the order.
                "dominance": _label(entry, "EmoDom", place) if "EmoDom" in entry else None,
                **rater_facts(ratings.get(file, {})),
                "position": int(number(turn, place)),
                "split": _SPLITS[split_set],
                "split_set": split_set,
            }
        )
    rows.sort(key=lambda row: (row["session_id"], row["position"]))
    notes = [f"{n_unknown} turns have no known speaker; each podcast's count as one"] if n_unknown else []
    return Corpus(rows, RANGE, [*notes, *clip_labels(rows, RANGE)])


def _ratings(path: Path) -> dict[str, dict[str, list[float]]]:
    """Every rating, by file and target: a line for the file, then one for each rater, as `A:3.0; V:2.0;`."""
    found: dict[str, dict[str, list[float]]] = {}
    current: dict[str, list[float]] | None = None
    for place, line in numbered_lines(path):
        first, *fields = (field.strip() for field in line.split(";"))
        if first.endswith(".wav"):
            # The numbers of this line are the means.
            current = found.setdefault(first, {target: [] for target in _RATED.values()})
        elif first.startswith("WORKER") and current is not None:
            for field in fields:
                letter, colon, value = field.partition(":")
                if colon and letter in _RATED and value.strip().lower() not in _ABSENT:
                    current[_RATED[letter]].append(number(value, place, RANGE))
    return found


def _entries(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, name and content of every turn."""
    if path.suffix == ".json":
        text = "\n".join(line for _, line in numbered_lines(path))
        try:
            pairs = json.loads(text, object_pairs_hook=list)
            entries = [(f"{path}, {file}", file, dict(entry)) for file, entry in pairs]
        except (ValueError, TypeError) as error:
            raise ReadCorpusError(f"{path} is not JSON with an object for each file ({error}).") from None
    else:
        entries = [(place, row["FileName"], row) for place, row in read_cells(path, ",", ("FileName", *_COLUMNS))]
    seen = set()
    for place, file, entry in entries:
        missing = [column for column in _COLUMNS if column not in entry]
        if missing:
            raise ReadCorpusError(f"{place}: there is no {missing[0]}; {', '.join(_COLUMNS)} are needed.")
        if file in seen:
            raise ReadCorpusError(f"{place}: {file} occurs twice; give the file as it is distributed.")
        seen.add(file)
        yield place, file, entry


def _label(entry: Mapping[str, Any], column: str, place: str) -> float | None:
    """The number; null where the corpus does not publish it."""
    if entry["Split_Set"] in _HIDDEN and str(entry[column] or "").strip().lower() in _ABSENT:
        return None
    return number(entry[column], place, RANGE)
