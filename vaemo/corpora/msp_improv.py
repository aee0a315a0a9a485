"""MSP-IMPROV: six pairs of actors who improvise scenarios, labels from 1 to 5.

    ROOT/Evalution.txt            (so spelled; `Evaluation.txt` in some copies)
    ROOT/Audio/session1/S01A/S/MSP-IMPROV-S01A-F01-S-FM01.wav     (or without `Audio`)

A name is scenario, speaker, kind of recording, turn. A session is one scenario played by one pair in one kind of
recording; the pair is the fold. Arousal was asked from 1 = *very active* to 5 and is reversed here; valence and
dominance were not: 5 is positive, and strong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, clip_labels, find_one, number, numbered_lines
from vaemo.errors import ReadCorpusError

RANGE = (1.0, 5.0)

_PREFIX = "UTD-IMPROV-"
_LINE = re.compile(
    r"UTD-IMPROV-(?P<scenario>\w+)-(?P<speaker>[FM]0\d)-(?P<kind>\w)-(?P<turn>[A-Z]+(?P<number>\d+))\.avi;[^;]*;"
    r"\s*A:(?P<arousal>[^;]+);\s*V:(?P<valence>[^;]+);(?:\s*D:(?P<dominance>[^;]+);)?"
)


def read(root: Path, label_lag_s: float) -> Corpus:
    """All turns, in the order of their numbers."""
    path = find_one(root, "Evalution.txt", "Evaluation.txt", what="file of evaluations")
    audio = find_one(root, "Audio", ".", what="audio")
    rows: list[dict[str, Any]] = []
    for place, line in numbered_lines(path):
        # Lines between those of turns are single ratings.
        if _PREFIX not in line:
            continue
        match = _LINE.match(line)
        if match is None:
            raise ReadCorpusError(f"{place}: '{line.strip()[:80]}' is no line of a turn. Give the file as distributed.")
        pair = match["speaker"][-1]
        parts = (match["scenario"], match["speaker"], match["kind"], match["turn"])
        # Labels are named after the videos, audio after the corpus.
        name = "MSP-IMPROV-" + "-".join(parts)
        rows.append(
            {
                "utt_id": name,
                "session_id": f"session{pair}-{match['scenario']}-{match['kind']}",
                "speaker_id": match["speaker"],
                "audio_path": str(audio / f"session{pair}" / match["scenario"] / match["kind"] / f"{name}.wav"),
                "valence": number(match["valence"], place, RANGE),
                "arousal": sum(RANGE) - number(match["arousal"], place, RANGE),
                "dominance": number(match["dominance"], place, RANGE) if match["dominance"] else None,
                "position": int(match["number"]),
                "fold": pair,
            }
        )
    rows.sort(key=lambda row: (row["session_id"], row["position"], row["utt_id"]))
    return Corpus(rows, RANGE, ["arousal was reversed: 5 is very active", *clip_labels(rows, RANGE)])
