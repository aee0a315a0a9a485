"""Speaker embeddings of whole sessions: what was heard of a speaker so far, or an enrolment made elsewhere.

`features.speaker_aggregation`. Nothing here looks ahead in a session, or into another split. Letters: T utterances of
a session, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.errors import FeatureMismatchError, ReadStoreError
from vaemo.sessions import Session


def running_means(vectors: np.ndarray, speaker_ids: np.ndarray) -> np.ndarray:
    """Per utterance, the mean over its speaker's utterances up to and with it, of length 1.

    Args:
        vectors: Of one session, in order, (T, D).
        speaker_ids: (T,).

    Returns:
        (T, D), float32.
    """
    means = np.empty(vectors.shape, np.float32)
    for speaker in np.unique(speaker_ids.astype(str)):
        own = np.flatnonzero(speaker_ids.astype(str) == speaker)
        means[own] = unit(np.cumsum(vectors[own], axis=0, dtype=np.float64))
    return means


def with_running_means(session: Session) -> Session:
    """The session with `running_means` in the place of its stream `speaker`."""
    means = running_means(session.streams["speaker"], session.speaker_ids)
    return dataclasses.replace(session, streams={**session.streams, "speaker": means})


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) divided by their length, float32; a zero vector stays one."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)


def aggregate_speakers(
    sessions: Sequence[Session],
    how: Literal["utterance", "enrolled", "running_mean"],
    enrolments: Mapping[str, np.ndarray] | None = None,
) -> list[Session]:
    """Sessions whose stream `speaker` is what `features.speaker_aggregation` asks for.

    Args:
        sessions: Of all splits that are used together.
        how: `utterance` changes nothing; `running_mean` averages over the past of the session; `enrolled` takes a
            vector that was made elsewhere.
        enrolments: By speaker, (D,). Without them a speaker is enrolled, session by session, by the mean over the
            other sessions of the same split.

    Raises:
        FeatureMismatchError: if a speaker has no enrolment, or one of another dimension.
    """
    if how == "utterance" or not any("speaker" in session.streams for session in sessions):
        return list(sessions)
    if how == "running_mean":
        return [with_running_means(session) for session in sessions]
    if enrolments is None:
        return _enrolled_by_others(sessions)
    return [_enrolled(session, enrolments) for session in sessions]


def read_enrolments(path: str) -> dict[str, np.ndarray]:
    """The vectors of `speakers.parquet`, unit length, by speaker.

    Args:
        path: A Parquet file with the columns `speaker_id` and `speaker` (a list of numbers).

    Raises:
        ReadStoreError: if a column is missing or a speaker stands twice.
    """
    table = files.read_parquet(path)
    missing = [name for name in ("speaker_id", "speaker") if name not in table.column_names]
    if missing:
        raise ReadStoreError(f"{path} lacks the column {missing[0]}; enrolments have speaker_id and speaker.")
    ids = table["speaker_id"].cast(pa.string()).to_pylist()
    if len(set(ids)) < len(ids):
        repeated = next(speaker for speaker in ids if ids.count(speaker) > 1)
        raise ReadStoreError(f"{path}: speaker '{repeated}' stands there more than once; one enrolment each.")
    return dict(zip(ids, (unit(np.array(vector)) for vector in table["speaker"].to_pylist()), strict=True))


def write_enrolments(path: str, sessions: Sequence[Session]) -> None:
    """Write `speakers.parquet`: per speaker the mean over all of these sessions, of unit length.

    The sessions must not be those that are scored with it later, nor of another split than they.
    """
    totals: dict[str, np.ndarray] = {}
    for session in sessions:
        for speaker, total in _sums(session).items():
            totals[speaker] = totals.get(speaker, 0.0) + total
    vectors = [unit(total) for total in totals.values()]
    dim = len(vectors[0]) if vectors else 0
    column = pa.array(vectors, pa.list_(pa.float32(), dim))
    files.write_parquet_whole(path, pa.table({"speaker_id": list(totals), "speaker": column}))


def _sums(session: Session) -> dict[str, np.ndarray]:
    """Per speaker of a session the sum of their vectors."""
    vectors = session.streams["speaker"].astype(np.float64)
    return {speaker: vectors[session.speaker_ids == speaker].sum(axis=0) for speaker in set(session.speaker_ids)}


def _enrolled(session: Session, enrolments: Mapping[str, np.ndarray]) -> Session:
    dim = session.streams["speaker"].shape[1]
    for speaker in dict.fromkeys(session.speaker_ids):
        if speaker not in enrolments:
            raise FeatureMismatchError(
                f"speaker '{speaker}' of session '{session.session_id}' has no enrolment; give one for every speaker, "
                "or set features.speaker_aggregation to running_mean."
            )
        if len(enrolments[speaker]) != dim:
            raise FeatureMismatchError(
                f"the enrolment of speaker '{speaker}' has {len(enrolments[speaker])} numbers, the store's speaker "
                f"embeddings have {dim}; enrol with the same extractor."
            )
    vectors = np.stack([enrolments[speaker] for speaker in session.speaker_ids]).astype(np.float32)
    return dataclasses.replace(session, streams={**session.streams, "speaker": vectors})


def _enrolled_by_others(sessions: Sequence[Session]) -> list[Session]:
    """Every session with enrolments from the others of its split: never from itself."""
    own = [_sums(session) for session in sessions]
    # Sequences of one session (one for each speaker) leave it out together.
    totals: dict[tuple[str | None, str], np.ndarray] = {}
    inside: dict[tuple[str, str], np.ndarray] = {}
    held_in: dict[tuple[str | None, str], set[str]] = {}
    for session, sums in zip(sessions, own, strict=True):
        for speaker, total in sums.items():
            totals[session.split, speaker] = totals.get((session.split, speaker), 0.0) + total
            inside[session.session_id, speaker] = inside.get((session.session_id, speaker), 0.0) + total
            held_in.setdefault((session.split, speaker), set()).add(session.session_id)
    enrolled = []
    for session, sums in zip(sessions, own, strict=True):
        for speaker in sums:
            if len(held_in[session.split, speaker]) == 1:
                raise FeatureMismatchError(
                    f"speaker '{speaker}' speaks in session '{session.session_id}' alone"
                    + (f" of split {session.split}" if session.split else "")
                    + ": there is nothing to enrol them from. Give enrolments, or set features.speaker_aggregation to "
                    "running_mean."
                )
        others = {
            speaker: unit(totals[session.split, speaker] - inside[session.session_id, speaker]) for speaker in sums
        }
        enrolled.append(_enrolled(session, others))
    return enrolled
