"""Speaker embeddings averaged over the past of a session: what was heard of a speaker so far, never what comes.

`features.speaker_aggregation: running_mean`. Letters: T utterances of a session, D features.
"""

from __future__ import annotations

import dataclasses

import numpy as np

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
