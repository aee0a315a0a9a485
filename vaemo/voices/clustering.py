"""The number of voices in a channel and their mean vectors, from clustering of windows of speech.

Letters: N windows, D numbers of a speaker embedding, K voices.
"""

from __future__ import annotations

import numpy as np

from vaemo.data.speakers import unit

_ALIKE = 0.81
"""Two groups whose mean vectors have this cosine similarity are one voice. Halves of one calm voice over the telephone
are 0.85 alike and more, two voices of one language and sex 0.77 and less."""

_EXPLAINS = 0.09
"""The reduction of the windows' spread that a further voice must bring."""

_SHORT_S = 1.0
"""Shorter windows are too uncertain to start a voice from."""

_LEAST_S = 3.0
"""Least speech of a voice; less is a cough, or two speaking at once."""

_MOST_WINDOWS = 2000
"""Windows that are compared, spread evenly over the recording: memory does not grow with its length."""

_STARTS = 10


def find_voices(vectors: np.ndarray, lengths_s: np.ndarray, hop_s: float, most: int) -> np.ndarray:
    """What each voice is like.

    Voices are the groups of the largest k-means that holds no two groups alike, none of them too small.

    Args:
        vectors: Speaker embeddings of windows in order, (N, D), of unit length.
        lengths_s: Of the windows, (N,).
        hop_s: From one window to the next inside an utterance.
        most: Voices that are looked for.

    Returns:
        (K, D), unit length, K from 1 on; none where N is 0.
    """
    if not len(vectors):
        return vectors
    long = np.flatnonzero(lengths_s >= _SHORT_S)
    rows = long if len(long) > 1 else np.arange(len(vectors))
    if len(rows) > _MOST_WINDOWS:
        rows = rows[np.linspace(0, len(rows) - 1, _MOST_WINDOWS).round().astype(int)]
    points = vectors[rows]
    # The number of windows in speech of that length, where not all are used.
    least = max(round(_LEAST_S / hop_s * len(points) / max(len(long), 1)), 2)
    best = unit(points.mean(axis=0, keepdims=True))
    spread = float(np.square(points - points.mean(axis=0)).sum())
    for k in range(2, min(most, len(points) // least) + 1):
        centres, sizes, left = _groups(points, k)
        if left > spread * (1.0 - _EXPLAINS):
            break
        spread, alike = left, centres @ centres.T - 2.0 * np.eye(k)
        if alike.max() < _ALIKE and sizes.min() >= least:
            best = centres
    return best


def _groups(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean vectors of k groups, their sizes, and the squared distances that are left."""
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=_STARTS, random_state=0).fit(points)
    return unit(found.cluster_centers_), np.bincount(found.labels_, minlength=k), float(found.inertia_)
