"""Speakers of a session: their past in it, or an enrolment from other sessions.

Computes speaker embeddings (`features.speaker_aggregation`) and the past that features are compared with
(`model.speaker_norm`, `model.session_norm`). Nothing here uses the future of a session or another split. Letters: T
utterances of a session, D features.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.data.sessions import Session
from vaemo.errors import ColumnError, FeatureMismatchError, ReadStoreError, named
from vaemo.progress import say
from vaemo.store import FeatureStore
from vaemo.tables import length_of_vectors, typed, vectors


def running_means(vectors: np.ndarray, speaker_ids: np.ndarray) -> np.ndarray:
    """The mean over each utterance's speaker's utterances up to and including it, normalised to length 1.

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
    """The session with its stream `speaker` replaced by `running_means`."""
    means = running_means(session.streams["speaker"], session.speaker_ids)
    return dataclasses.replace(session, streams={**session.streams, "speaker": means})


def sums_before(vectors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each utterance, the sum over the earlier utterances of its group, then their number.

    Every group is summed by itself, one utterance after another, exactly as in a live conversation.

    Args:
        vectors: Of one sequence, in order, (T, D).
        groups: Number of the speaker, or of any other group, (T,).

    Returns:
        (T, D + 1), float64.
    """
    found = np.zeros((len(vectors), vectors.shape[1] + 1))
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        found[own[1:], :-1] = np.cumsum(vectors[own[:-1]], axis=0, dtype=np.float64)
        found[own, -1] = np.arange(len(own))
    return found


def past_of(name: str, vectors: np.ndarray, speakers: np.ndarray, apart: np.ndarray | None = None) -> np.ndarray:
    """What `Streams.past` holds for the utterances of one sequence.

    Args:
        name: `speaker.` or `session.` and a stream, as in `SessionRegressor.pasts`.
        vectors: Of that stream, in order, (T, D).
        speakers: Who speaks, as numbers from 0, (T,).
        apart: Utterances with a past of their own, (T,), bool: neither part sees the other.

    Returns:
        (T, D + 1), float64.
    """
    groups = speakers if name.startswith("speaker.") else np.zeros_like(speakers)
    return sums_before(vectors, groups if apart is None else 2 * groups + apart)


def note_unnamed_speakers(store: FeatureStore, pasts: Sequence[str]) -> None:
    """Print a note if a model compares with a speaker's past and speakers of the store's first part are its sessions.

    Args:
        store: Opened.
        pasts: What the model compares with: `SessionRegressor.pasts`.
    """
    if not any(name.startswith("speaker.") for name in pasts):
        return
    table = store.read(["session_id", "speaker_id"], store.parts[:1])
    if pc.all(pc.equal(table["speaker_id"], table["session_id"])).as_py():
        say(f"{store.path} has no speaker_id but the session's: model.speaker_norm takes each session for one speaker.")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) divided by their length, float32; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Enrolments:
    """Vectors to enrol speakers from: N, of one or several utterances each.

    Attributes:
        speaker_ids: The speaker of each, (N,), objects.
        session_ids: The session of each, (N,), objects; None where it is not given.
        splits: The split of each, (N,), objects; None where it is not given.
        vectors: Sums of speaker embeddings, (N, D), float32.
    """

    speaker_ids: np.ndarray
    session_ids: np.ndarray
    splits: np.ndarray
    vectors: np.ndarray

    @staticmethod
    def of_sessions(sessions: Sequence[Session]) -> Enrolments:
        """One vector per speaker and session that has the stream `speaker`: the sum over the utterances."""
        found = [
            (speaker, session.session_id, session.split, session.streams["speaker"][session.speaker_ids == speaker])
            for session in sessions
            if "speaker" in session.streams
            for speaker in dict.fromkeys(session.speaker_ids)
        ]
        dim = found[0][-1].shape[1] if found else 0
        sums = [vectors.sum(axis=0, dtype=np.float64) for *_, vectors in found]
        speaker_ids, session_ids, splits = (np.array([row[column] for row in found], object) for column in range(3))
        return Enrolments(speaker_ids, session_ids, splits, np.array(sums, np.float32).reshape(len(found), dim))

    @staticmethod
    def read(path: str) -> Enrolments:
        """The voices in `speakers.parquet`.

        Args:
            path: A Parquet file with the columns `speaker_id` and `speaker` (lists of numbers of one length). With
                `session_id`, and optionally `split`, a speaker may have several rows, one for each session or
                utterance.

        Raises:
            ReadStoreError: if the file cannot be read, a column is missing, a vector is missing, not finite or of
                another length, or a speaker without a session is repeated.
        """
        try:
            table = files.read_parquet(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ReadStoreError(
                f"the enrolments {path} cannot be read ({' '.join(str(error).split())}); give a Parquet file with "
                "speaker_id and speaker."
            ) from None
        missing = [name for name in ("speaker_id", "speaker") if name not in table.column_names]
        if missing:
            raise ReadStoreError(f"{path} lacks the column {missing[0]}; enrolments have speaker_id and speaker.")

        def ids(name: str) -> np.ndarray:
            if name not in table.column_names:
                return np.full(len(table), None, object)
            return np.array(typed(table[name], name, pa.string()).to_pylist(), object)

        try:
            speaker_ids, session_ids, splits = ids("speaker_id"), ids("session_id"), ids("split")
            dim = length_of_vectors(table["speaker"], "speaker") or 0
            voices = vectors(table["speaker"], "speaker", dim)
        except ColumnError as error:
            raise ReadStoreError(f"{path}: {error}.") from None
        elsewhere = speaker_ids[session_ids == None].tolist()  # noqa: E711 - element by element
        if len(set(elsewhere)) < len(elsewhere):
            repeated = next(speaker for speaker in elsewhere if elsewhere.count(speaker) > 1)
            raise ReadStoreError(
                f"{path}: speaker {named(repeated)} has several rows without a session_id; give one enrolment each."
            )
        return Enrolments(speaker_ids, session_ids, splits, _matrix(voices, dim, speaker_ids, path))

    def write(self, path: str) -> None:
        """Write `speakers.parquet`, whole."""
        columns = {"speaker_id": self.speaker_ids, "session_id": self.session_ids, "split": self.splits}
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), self.dim)
        texts = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        files.write_parquet_whole(path, pa.table({**texts, "speaker": vectors}))

    @property
    def dim(self) -> int:
        """Length of a vector, D."""
        return self.vectors.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that affects an enrolment."""
        ids = [self.speaker_ids.tolist(), self.session_ids.tolist(), self.splits.tolist()]
        return hashlib.sha256(repr(ids).encode() + np.ascontiguousarray(self.vectors).tobytes()).hexdigest()

    def enrol(self, session: Session) -> Session:
        """The session with its stream `speaker` replaced by its speakers' enrolments.

        Only vectors from other sessions of the same split are used.

        Raises:
            FeatureMismatchError: if a speaker has no such vector, or the dimension differs.
        """
        dim = session.streams["speaker"].shape[1]
        if dim != self.dim:
            raise FeatureMismatchError(
                f"the enrolments have {self.dim} numbers, the speaker embeddings of session "
                f"{named(session.session_id)} {dim}; enrol with the same extractor."
            )
        voices = {speaker: self._voice(speaker, session) for speaker in dict.fromkeys(session.speaker_ids)}
        vectors = np.stack([voices[speaker] for speaker in session.speaker_ids])
        return dataclasses.replace(session, streams={**session.streams, "speaker": vectors})

    def _voice(self, speaker: str, session: Session) -> np.ndarray:
        heard = self._rows.get(speaker, [])
        allowed = [
            row
            for row in heard
            if self.session_ids[row] != session.session_id
            and (self.splits[row] == session.split or None in (self.splits[row], session.split))
        ]
        if not allowed:
            where = "" if session.split is None else f" of split {session.split}"
            found = f"is enrolled from no other session{where}" if heard else "has no enrolment"
            raise FeatureMismatchError(
                f"speaker {named(speaker)} of session {named(session.session_id)} {found}. Enrol every speaker, or "
                "train with features.speaker_aggregation=running_mean."
            )
        return unit(self.vectors[allowed].sum(axis=0, dtype=np.float64))

    @functools.cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, speaker in enumerate(self.speaker_ids):
            rows.setdefault(speaker, []).append(row)
        return rows


def aggregate_speakers(
    sessions: Sequence[Session],
    how: Literal["utterance", "enrolled", "running_mean"],
    enrolments: Enrolments | None = None,
) -> list[Session]:
    """Sessions whose stream `speaker` is what `features.speaker_aggregation` asks for.

    Args:
        sessions: All sessions that are used together; any subset if `enrolments` is given.
        how: `utterance` changes nothing; `running_mean` averages over the past of the session; `enrolled` takes a
            vector from elsewhere.
        enrolments: Vectors; None enrols the speakers of each session from the other sessions of its split.

    Raises:
        FeatureMismatchError: as `Enrolments.enrol`.
    """
    if how == "utterance" or not any("speaker" in session.streams for session in sessions):
        return list(sessions)
    if how == "running_mean":
        return [with_running_means(session) for session in sessions]
    voices = enrolments or Enrolments.of_sessions(sessions)
    return [voices.enrol(session) for session in sessions]


def _matrix(voices: pa.ChunkedArray, dim: int, speaker_ids: np.ndarray, path: str) -> np.ndarray:
    """Vectors of one length as (N, D), float32."""
    matrix = np.full((len(voices), dim), np.nan, np.float32)
    there = voices.is_valid().to_numpy()
    matrix[there] = pc.list_flatten(voices).to_numpy().reshape(-1, dim)
    wrong = ~np.isfinite(matrix).all(axis=1) | ~there
    if wrong.any():
        raise ReadStoreError(
            f"{path}: the enrolment of speaker {named(speaker_ids[np.argmax(wrong)])} is missing, or holds a number "
            "that is not finite. Correct or remove it."
        )
    return matrix
