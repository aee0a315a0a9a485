"""Emo-DB, the Berlin database of emotional speech: ten actors who speak ten sentences in seven emotions.

    ROOT/wav/03a01Fa.wav          (or without `wav`; .flac in some copies)

A name is speaker, sentence, emotion, take. The corpus has emotions and no ratings: valence, arousal and dominance are
where a circumplex puts the emotion, one of many that could be taken. A session is all of an actor, in the order of the
names.

Source:
    Burkhardt, Paeschke, Rolfes, Sendlmeier and Weiss (2005), A database of German emotional speech, Interspeech.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaemo.corpora.base import Corpus, find_one, visible
from vaemo.errors import ReadCorpusError

RANGE = (0.0, 1.0)

EMOTIONS = {
    "W": ("anger", 0.15, 0.85, 0.80),
    "L": ("boredom", 0.35, 0.20, 0.35),
    "E": ("disgust", 0.15, 0.55, 0.55),
    "A": ("fear", 0.20, 0.80, 0.20),
    "F": ("joy", 0.90, 0.80, 0.70),
    "T": ("sadness", 0.15, 0.15, 0.20),
    "N": ("neutral", 0.50, 0.40, 0.50),
}
"""Emotion, valence, arousal and dominance by the letter in a name, which is that of the German word."""

SPEAKERS = {
    "03": ("male", 31),
    "08": ("female", 34),
    "09": ("female", 21),
    "10": ("male", 32),
    "11": ("male", 26),
    "12": ("male", 30),
    "13": ("female", 32),
    "14": ("female", 35),
    "15": ("male", 25),
    "16": ("female", 31),
}
"""Gender and age in years."""

_NAME = re.compile(r"(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<emotion>[A-Z])(?P<take>[a-z])")


def read(root: Path, label_lag_s: float) -> Corpus:
    """All clips; `emotion`, `sentence`, `take`, `gender` and `age` are kept."""
    folder = find_one(root, "wav", ".", what="audio")
    found = (path for path in visible(folder.iterdir()) if path.suffix.lower() in {".wav", ".flac"})
    clips = sorted(found, key=lambda path: (path.stem, path.name))
    rows: list[dict[str, Any]] = []
    position: dict[str, int] = {}
    for path in clips:
        speaker, sentence, letter, take = _parts(path)
        if rows and rows[-1]["utt_id"] == path.stem:
            raise ReadCorpusError(f"{folder} holds {path.stem} twice, {rows[-1]['audio_path']} and {path}; keep one.")
        emotion, valence, arousal, dominance = EMOTIONS[letter]
        gender, age = SPEAKERS[speaker]
        position[speaker] = position.get(speaker, -1) + 1
        rows.append(
            {
                "utt_id": path.stem,
                "session_id": speaker,
                "speaker_id": speaker,
                "audio_path": str(path),
                "valence": valence,
                "arousal": arousal,
                "dominance": dominance,
                "position": position[speaker],
                "emotion": emotion,
                "sentence": sentence,
                "take": take,
                "gender": gender,
                "age": age,
            }
        )
    notes = [
        "labels are where a circumplex puts the acted emotion (vaemo.corpora.emodb.EMOTIONS), not ratings",
        "clips of an actor are in the order of their names: no conversation",
    ]
    return Corpus(rows, RANGE, notes)


def _parts(path: Path) -> tuple[str, str, str, str]:
    """Speaker, sentence, letter of the emotion, and take."""
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise ReadCorpusError(
            f"{path} is not named as clips of emodb are, such as 03a01Fa.wav: speaker, sentence, emotion, take. Give "
            "the folder as it is distributed, without other audio in it."
        )
    speaker, letter = match["speaker"], match["emotion"]
    if speaker not in SPEAKERS:
        raise ReadCorpusError(f"{path} is of the speaker '{speaker}'; those of emodb are {', '.join(SPEAKERS)}.")
    if letter not in EMOTIONS:
        known = ", ".join(f"{key} ({name})" for key, (name, *_) in EMOTIONS.items())
        raise ReadCorpusError(f"{path} has the emotion '{letter}'; those of emodb are {known}.")
    return speaker, match["sentence"], letter, match["take"]
