"""IEMOCAP: five recording sessions of two actors each, dialogs of turns, labels from 1 to 5.

    ROOT/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
    ROOT/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

A session is a dialog. The speaker is the letter of the *last* field of a turn's name; that of the first field says
who wore the markers. The recording session is the fold; there is no official split.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, clip_labels, find_one

RANGE = (1.0, 5.0)

_NUMBER = r"(-?[\d.]+)"
_TURN = re.compile(rf"^\[{_NUMBER} - {_NUMBER}\]\t(\S+)\t\w+\t\[{_NUMBER}, {_NUMBER}, {_NUMBER}\]", re.MULTILINE)


def read(root: Path, label_lag_s: float) -> Corpus:
    """The turns of all dialogs, each cut out in a file of its own; `dialog_start_s` says where it was."""
    root = find_one(root, "IEMOCAP_full_release", ".", what="release")
    rows: list[dict[str, Any]] = []
    for session in sorted(root.glob("Session[1-5]")):
        folder = find_one(session, "dialog/EmoEvaluation", what="evaluation folder")
        for path in sorted(folder.glob("Ses*.txt")):
            rows += _dialog(session, path)
    # Averages of raters who used half steps beyond the ends.
    return Corpus(rows, RANGE, clip_labels(rows, RANGE))


def _dialog(session: Path, path: Path) -> list[dict[str, Any]]:
    # Order in the files: valence, activation, dominance.
    turns = _TURN.findall(path.read_text(encoding="latin-1"))
    turns.sort(key=lambda turn: (float(turn[0]), turn[2]))
    rows = []
    for position, (start_s, end_s, name, valence, arousal, _) in enumerate(turns):
        dialog, _, last = name.rpartition("_")
        rows.append(
            {
                "utt_id": name,
                "session_id": dialog,
                "speaker_id": f"{name[:5]}_{last[0]}",
                "audio_path": str(session / "sentences" / "wav" / dialog / f"{name}.wav"),
                "valence": float(valence),
                "arousal": float(arousal),
                "position": position,
                "fold": session.name.removeprefix("Session"),
                "dialog_start_s": float(start_s),
                "dialog_end_s": float(end_s),
            }
        )
    return rows
