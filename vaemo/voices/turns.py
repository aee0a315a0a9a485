"""Turns in text formats: reads and writes RTTM, reads JSON of WhisperX and Amazon Transcribe.

Diarisation that others made is given per recording (`--voices-from`): by the name of a file, or by the ids in an RTTM.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vaemo import files
from vaemo.audio.formats import AUDIO_SUFFIXES
from vaemo.errors import ReadVoicesError, cause, named

ROLES = ("customer", "agent")
"""Speaker names that are roles."""

_SUFFIXES = (".rttm", ".json")
_READERS = 16
_PAUSE_S = 1.0
"""Words of one speaker that are no further apart are one turn."""

_NO_NAME = re.compile(r"<.*>|n/?a|none|null|nan|[-+.\de]+", re.IGNORECASE)
"""What stands behind the name in an RTTM: a confidence, or that there is none."""

_SAY_FORMATS = (
    "RTTM, WhisperX JSON with speakers, and Amazon Transcribe JSON (Call Analytics, or speaker labels) are read"
)


@dataclass(frozen=True)
class Turn:
    """Speech of one speaker.

    Attributes:
        start_s: In the recording.
        end_s: Likewise, greater.
        speaker: Any name.
        role: Role, if given.
        channel: Counted from 0; None where it is not given, for a recording with one channel.
    """

    start_s: float
    end_s: float
    speaker: str
    role: str | None = None
    channel: int | None = None


def read_voices(path: str, session_ids: Sequence[str], option: str = "--voices-from") -> dict[int, tuple[Turn, ...]]:
    """The turns of sessions, by their index; an empty tuple for a session whose file has none.

    Args:
        path: A file, or a folder of files such as `CALL.rttm` and `CALL.json`, at any depth. A recording is meant by
            its path below the archive, with or without its suffix, or by its bare name where that is unambiguous.
        session_ids: Of the recordings.
        option: That gave the path, for messages.

    Raises:
        ReadVoicesError: if a file cannot be read as any of the formats, has times that cannot be, is of two recordings
            alike or one of two for the same recording, or if nothing is of any of these recordings, or no file has
            turns.
    """
    if not files.exists(path):
        raise ReadVoicesError(f"{option} {path} does not exist; give a file or a folder: {_SAY_FORMATS}.")
    found = {path: posixpath.basename(path)} if files.is_file(path) else _below(path)
    if not found:
        raise ReadVoicesError(f"{option} {path} holds no file named *.rttm or *.json; {_SAY_FORMATS}.")
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(_read_file, found, found.values())
        by_name = [(name, file, turns) for file, held in zip(found, read, strict=True) for name, turns in held.items()]
    number_of = _Names(session_ids)
    voices: dict[int, tuple[Turn, ...]] = {}
    for name, file, turns in by_name:
        number = number_of(name, file)
        if number is None:
            continue
        if number in voices:
            raise ReadVoicesError(
                f"{option} {path}: {named(session_ids[number])} has turns in two places, one of them "
                f"{named(file)}. Keep one."
            )
        voices[number] = tuple(sorted(turns, key=lambda turn: (turn.start_s, turn.end_s)))
    if not voices and session_ids:
        known = f"such as {named(by_name[0][0].rpartition(chr(0))[2])}" if by_name else "none at all"
        raise ReadVoicesError(
            f"{option} {path} is of none of the {len(session_ids):,} recordings: they are called such as "
            f"{named(session_ids[0])}, those in it {known}. Name them alike."
        )
    if voices and not any(turns for _, _, turns in by_name):
        raise ReadVoicesError(f"{option} {path} has no turn in any of its {len(found):,} files; {_SAY_FORMATS}.")
    return voices


def digest_of(turns: Sequence[Turn]) -> str:
    """12 hex digits that follow from turns."""
    return hashlib.sha256(json.dumps(turns_to_json(turns)).encode()).hexdigest()[:12]


def turns_to_json(turns: Sequence[Turn]) -> list[list[Any]]:
    """Plain values that `turns_of_json` reads."""
    return [[turn.start_s, turn.end_s, turn.speaker, turn.role, turn.channel] for turn in turns]


def turns_of_json(held: Iterable[Sequence[Any]]) -> list[Turn]:
    """What `turns_to_json` gave."""
    return [Turn(*facts) for facts in held]


def read_rttm(text: str, where: str) -> dict[str, list[Turn]]:
    """The turns of an RTTM, by the ids of recordings in it.

    Args:
        text: Lines `SPEAKER id channel start duration <NA> <NA> name <NA> <NA>`; lines of other types and comments
            (`;;`) are skipped. Channels count from 1; where all are 1, none is given.
        where: The file, for messages.

    Raises:
        ReadVoicesError: for a line that is cut short, blanks in names, and times that cannot be.
    """
    turns: dict[str, list[Turn]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        place = f"{where}, line {number}"
        if len(fields) < 8:
            raise ReadVoicesError(
                f"{place} has {len(fields)} fields of 10: SPEAKER id channel start duration <NA> <NA> name <NA> <NA>."
            )
        # A blank in a name moves the fields behind it. Older writers leave out the last field, or two.
        if len(fields) > 10 or fields[5][0].isdigit() or not all(map(_NO_NAME.fullmatch, fields[8:])):
            raise ReadVoicesError(
                f"{place} has a blank in a name: '{' '.join(fields)}'. Its fields are SPEAKER id channel start "
                "duration <NA> <NA> name <NA> <NA>; write a blank in the id or the name as _."
            )
        name, channel, start, duration, speaker = fields[1], fields[2], fields[3], fields[4], fields[7]
        start_s = _seconds(start, place)
        turn = _turn(start_s, start_s + _seconds(duration, place), speaker, None, place)
        if turn:
            said = int(channel) - 1 if channel.isdecimal() and int(channel) > 0 else None
            turns.setdefault(name, []).append(Turn(turn.start_s, turn.end_s, turn.speaker, turn.role, said))
    for name, held in turns.items():
        if all(turn.channel in (0, None) for turn in held):
            turns[name] = [Turn(turn.start_s, turn.end_s, turn.speaker, turn.role) for turn in held]
    return turns


def rttm(name: str, turns: Iterable[Turn]) -> str:
    """Lines of an RTTM; white space in names becomes `_`."""
    return "".join(
        f"SPEAKER {_word(name)} {(turn.channel or 0) + 1} {turn.start_s:.3f} {turn.end_s - turn.start_s:.3f} "
        f"<NA> <NA> {_word(turn.speaker)} <NA> <NA>\n"
        for turn in turns
    )


def read_json(text: str, where: str) -> list[Turn]:
    """The turns in a JSON of WhisperX, of Amazon Transcribe's speaker labels, or of its Call Analytics.

    Raises:
        ReadVoicesError: if it is none of them, has segments and names no speaker, or has times that cannot be.
    """
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReadVoicesError(f"{where} is no JSON that can be read ({cause(error)}); {_SAY_FORMATS}.") from None
    readers = (("Transcript", _call_analytics), ("segments", _whisperx), ("results", _speaker_labels))
    for key, read in readers:
        if isinstance(held, Mapping) and key in held:
            try:
                turns = [turn for turn in read(held, where) if turn]
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else "is not as it should be"
                raise ReadVoicesError(f"{where}: a part of '{key}' {what}; {_SAY_FORMATS}.") from None
            parts = held[key] if key != "results" else held[key]["speaker_labels"]["segments"]
            if not turns and parts != []:
                raise ReadVoicesError(f"{where} names no speaker; it must say who speaks: {_SAY_FORMATS}.")
            return turns
    raise ReadVoicesError(f"{where} has none of 'Transcript', 'segments', 'results'; {_SAY_FORMATS}.")


def _call_analytics(held: Mapping[str, Any], where: str) -> Iterator[Turn | None]:
    """Amazon Transcribe Call Analytics, and Contact Lens, whose participants have ids besides."""
    said = {p["ParticipantId"]: p.get("ParticipantRole") for p in held.get("Participants", ()) if "ParticipantId" in p}
    for number, part in enumerate(held["Transcript"], 1):
        if "LoudnessScores" not in part and "BeginOffsetMillis" not in part:
            continue
        speaker = part.get("ParticipantId") or part["ParticipantRole"]
        role = part.get("ParticipantRole") or said.get(speaker) or speaker
        place = f"{where}, part {number} of 'Transcript'"
        start_s, end_s = (_seconds(part[name], place) / 1000 for name in ("BeginOffsetMillis", "EndOffsetMillis"))
        yield _turn(start_s, end_s, str(speaker), str(role), place)


def _whisperx(held: Mapping[str, Any], where: str) -> Iterator[Turn | None]:
    """WhisperX: words say who speaks where they were aligned, else segments do."""
    for number, segment in enumerate(held["segments"], 1):
        place = f"{where}, part {number} of 'segments'"
        words = [word for word in segment.get("words") or () if {"start", "end", "speaker"} <= word.keys()]
        spoken = words or ([segment] if segment.get("speaker") is not None else [])
        run: list[Mapping[str, Any]] = []
        for word in spoken:
            if run and (word["speaker"] != run[-1]["speaker"] or word["start"] - run[-1]["end"] > _PAUSE_S):
                yield _of_words(run, place)
                run = []
            run.append(word)
        if run:
            yield _of_words(run, place)


def _of_words(words: Sequence[Mapping[str, Any]], place: str) -> Turn | None:
    ends = max(_seconds(word["end"], place) for word in words)
    return _turn(_seconds(words[0]["start"], place), ends, str(words[0]["speaker"]), None, place)


def _speaker_labels(held: Mapping[str, Any], where: str) -> Iterator[Turn | None]:
    for number, part in enumerate(held["results"]["speaker_labels"]["segments"], 1):
        place = f"{where}, part {number} of 'speaker_labels'"
        start_s, end_s = (_seconds(part[name], place) for name in ("start_time", "end_time"))
        yield _turn(start_s, end_s, str(part["speaker_label"]), None, place)


def _turn(start_s: float, end_s: float, speaker: str, role: str | None, place: str) -> Turn | None:
    """A turn; None where it has no length. A speaker who is named by a role has that."""
    if start_s < 0 or end_s < start_s:
        raise ReadVoicesError(f"{place} reaches from {start_s:.3f} to {end_s:.3f} s; a turn ends after it begins.")
    plain = (role or speaker).strip().lower()
    known = plain if role or plain in ROLES else None
    return Turn(start_s, end_s, speaker, known) if end_s > start_s else None


def _seconds(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ReadVoicesError(f"{place} has {value!r} where a time must stand.")
    return number


def _word(text: str) -> str:
    return re.sub(r"\s+", "_", text.strip()) or "_"


def _below(folder: str) -> dict[str, str]:
    """Paths of the files, with their names below the folder."""
    found = {item.path: item.name for item in files.walk(folder) if item.name.lower().endswith(_SUFFIXES)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _read_file(path: str, name: str) -> dict[str, list[Turn]]:
    """Turns by what names a recording: ids in an RTTM, or the file's own name."""
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ReadVoicesError(f"{named(path)} cannot be read as UTF-8 text: {cause(error)}") from None
    stem, suffix = posixpath.splitext(name)
    if suffix.lower() == ".json" or text.lstrip()[:1] == "{":
        return {stem: read_json(text, named(path))}
    turns = read_rttm(text, named(path))
    if not turns:
        kinds = {line.split()[0] for line in text.splitlines() if line.strip() and not line.lstrip().startswith(";;")}
        if not kinds or "SPEAKER" in kinds:
            return {stem: []}
        raise ReadVoicesError(f"{named(path)} has no line SPEAKER, as an RTTM has; {_SAY_FORMATS}.")
    if len(turns) == 1:
        # A file of a single recording is beside it, under any name.
        ((inner, held),) = turns.items()
        return {f"{stem}\0{inner}": held}
    return turns


class _Names:
    """Finds the session that a name means: by its whole path, without the suffix, then by its bare name."""

    def __init__(self, session_ids: Sequence[str]) -> None:
        self._session_ids = session_ids
        self._levels: tuple[dict[str, list[int]], ...] = ({}, {}, {}, {})
        for number, session_id in enumerate(session_ids):
            for level, spelling in zip(self._levels, _spellings(session_id), strict=True):
                level.setdefault(spelling, []).append(number)

    def __call__(self, name: str, file: str) -> int | None:
        """Its index; None where there is none.

        Raises:
            ReadVoicesError: if it may mean two.
        """
        meant = [number for part in name.split("\0") if (number := self._one(part, file)) is not None]
        if len(set(meant)) > 1:
            raise ReadVoicesError(
                f"{named(file)} lies beside {named(self._session_ids[meant[0]])} and speaks of "
                f"{named(self._session_ids[meant[1]])}: it is of another recording. Rename it, or its ids."
            )
        return meant[0] if meant else None

    def _one(self, name: str, file: str) -> int | None:
        found = next((level[plain] for level in self._levels if (plain := _plain(name)) in level), [])
        if len(found) > 1:
            raise ReadVoicesError(
                f"{named(file)}: {named(name)} may be {len(found)} recordings; name it with its folder and suffix."
            )
        return found[0] if found else None


def _spellings(session_id: str) -> Iterator[str]:
    full = _plain(session_id)
    stem, suffix = posixpath.splitext(full)
    bare = stem if suffix in AUDIO_SUFFIXES else full
    yield from (full, bare, posixpath.basename(full), posixpath.basename(bare))


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    """How names are compared: as paths, in any case, white space as an RTTM has it."""
    text = unicodedata.normalize("NFC", name.strip()).replace("\\", "/").lower()
    return _word("/".join(part for part in text.split("/") if part not in ("", ".")))
