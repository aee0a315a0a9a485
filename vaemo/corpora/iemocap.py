"""IEMOCAP: five recording sessions of two actors each, dialogs of turns, labels from 1 to 5.

    ROOT/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
    ROOT/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

A session is a dialog. The speaker is the letter of the *last* field of a turn's name; that of the first field is who
wore the markers. The recording session is the fold; there is no official split. Labels are the mean of the raters
`A-E...`, with their deviation and number; actors' self-ratings (`A-F...`, `A-M...`) are left out. Dominance is 5 where
the speaker is strong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, clip_labels, find_one, number, numbered_lines, rater_facts
from vaemo.errors import ReadCorpusError

RANGE = (1.0, 5.0)

_TURN = re.compile(r"\[(\S+) - (\S+)\]\t(\S+)\t\w+\t\[(\S+), (\S+), (\S+)\]")
_RATER = re.compile(r"A-E\d+:\s*(.*)")
_RATED = {"val": "valence", "act": "arousal", "dom": "dominance"}


def read(root: Path, label_lag_s: float) -> Corpus:
    """The turns of all dialogs, each cut out in a file of its own; `dialog_start_s` says where it was."""
    root = find_one(root, "IEMOCAP_full_release", ".", what="release")
    rows: list[dict[str, Any]] = []
    for session in sorted(root.glob("Session[1-5]")):
        folder = find_one(session, "dialog/EmoEvaluation", what="evaluation folder")
        for path in sorted(folder.glob("Ses*.txt")):
            rows += _dialog(session, path)
    # Averages of raters who used half steps beyond the range.
    return Corpus(rows, RANGE, clip_labels(rows, RANGE))


def _dialog(session: Path, path: Path) -> list[dict[str, Any]]:
    turns: list[tuple[float, str, float, list[float], dict[str, list[float]]]] = []
    ratings: dict[str, list[float]] = {}
    for place, line in numbered_lines(path, "latin-1"):
        # Lines between those of turns are single ratings.
        if (rater := _RATER.match(line)) and turns:
            _rate(ratings, rater[1], place)
        if not line.startswith("[") and f"{path.stem}_" not in line:
            continue
        match = _TURN.match(line)
        if match is None:
            raise ReadCorpusError(f"{place}: '{line.strip()[:80]}' is no line of a turn. Give the file as distributed.")
        # Order in the files: valence, activation, dominance.
        start_s, end_s, name, *said = match.groups()
        numbers = [number(label, place, RANGE) for label in said]
        ratings = {target: [] for target in _RATED.values()}
        turns.append((number(start_s, place), name, number(end_s, place), numbers, ratings))
    if not turns:
        raise ReadCorpusError(f"{path} has no line of a turn. Give the file as it is distributed.")
    rows = []
    for position, (start_s, name, end_s, labels, ratings) in enumerate(sorted(turns, key=lambda turn: turn[:2])):
        dialog, _, last = name.rpartition("_")
        rows.append(
            {
                "utt_id": name,
                "session_id": dialog,
                "speaker_id": f"{name[:5]}_{last[0]}",
                "audio_path": str(session / "sentences" / "wav" / dialog / f"{name}.wav"),
                **dict(zip(_RATED.values(), labels, strict=True)),
                **rater_facts(ratings),
                "position": position,
                "fold": session.name.removeprefix("Session"),
                "dialog_start_s": start_s,
                "dialog_end_s": end_s,
            }
        )
    return rows


def _rate(ratings: dict[str, list[float]], text: str, place: str) -> None:
    """Add one rater's ratings of a turn: `val 3; act 2; dom  2;`, possibly with blanks."""
    for field in text.split(";"):
        name, *value = field.split() or [""]
        if name in _RATED and value:
            ratings[_RATED[name]].append(number(value[0], place, RANGE))
