"""The number of voices in a channel and their mean vectors, from clustering of windows of speech.

Letters: N windows, D numbers of a speaker embedding, K voices.
"""

from __future__ import annotations

import numpy as np

from vaemo.data.speakers import unit

_ALIKE = 0.81
"""Two groups whose mean vectors have this cosine similarity are one voice. Halves of one calm voice over the telephone
are 0.82 alike and more, two calm voices of one language 0.73 and less, through MP3 more; acted moods of one person,
0.76 to 0.86, are no more alike than two persons who act them."""

_EXPLAINS = 0.07
"""The reduction of the windows' spread that a further voice must bring."""

_SHORT_S = 1.0
"""Shorter windows are too uncertain to start a voice from, or to tell how alike a voice's windows are."""

_APART = 0.4
"""Distance (1 - cosine) of two voices over the telephone. Codecs bring voices closer to each other, and every window's
lead with them: it is measured in parts of the distance, where the voices are closer than this."""

_CALM = 0.21
"""Mean distance of windows from their voice, up to which that is done. It is 0.17 to 0.20 for calm voices through any
codec, 0.23 to 0.28 for acted emotions, whose moods are as far apart as voices are."""

_LEAST_S = 3.0
"""Least speech of a voice; less is a cough, or two speaking at once."""

_MOST_WINDOWS = 2000
"""Windows that are compared, spread evenly over the recording: memory does not grow with its length."""

_STARTS = 10

_OTHERS = 0.45
"""This share of the windows, those least like the voice that is expected, is taken for others' to begin with."""

_KNOWN = 0.7
"""Weight of an enrolment beside what is heard of that voice in the call."""

_ROUNDS = 20


def without(vectors: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Which windows are not of the voice that is expected, supposing that it is one of two in the call.

    Two means, of which one is held near the expected voice: what a person's moods have in common then weighs more than
    the moods themselves, by which k-means alone splits a call first.

    Args:
        vectors: Of windows, (N, D), unit length.
        expected: What the voice is like, (D,), unit length.

    Returns:
        (N,), bool.
    """
    likeness = vectors @ expected
    others = likeness <= np.quantile(likeness, _OTHERS)
    for _ in range(_ROUNDS):
        if others.all() or not others.any():
            break
        own = known_and_heard(expected, unit(vectors[~others].mean(axis=0)))
        now = vectors @ unit(vectors[others].mean(axis=0)) > vectors @ own
        if (now == others).all():
            break
        others = now
    return others


def known_and_heard(expected: np.ndarray, heard: np.ndarray) -> np.ndarray:
    """What a voice is like that is enrolled, (D,), and is heard in a call, (D,): what its windows are compared with."""
    return unit(_KNOWN * expected + (1.0 - _KNOWN) * heard)


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


def scale_of_leads(vectors: np.ndarray, lengths_s: np.ndarray, centres: np.ndarray) -> float:
    """What a window's lead in similarity is multiplied with, so that two calm voices count as `_APART` at least.

    Args:
        vectors: Of windows, (N, D), unit length.
        lengths_s: Of the windows, (N,).
        centres: What they are compared with, (K, D), unit length; other numbers than two are not scaled.
    """
    points = vectors[lengths_s >= _SHORT_S]
    if len(centres) != 2 or not len(points):
        return 1.0
    _, whose = np.unique((points @ centres.T).argmax(axis=1), return_inverse=True)
    means = np.stack([unit(points[whose == voice].mean(axis=0)) for voice in range(whose.max() + 1)])
    spread = 1.0 - float((points * means[whose]).sum(axis=1).mean())
    return max(_APART / (1.0 - float(centres[0] @ centres[1])), 1.0) if spread <= _CALM else 1.0


def _groups(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean vectors of k groups, their sizes, and the squared distances that are left."""
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=_STARTS, random_state=0).fit(points)
    return unit(found.cluster_centers_), np.bincount(found.labels_, minlength=k), float(found.inertia_)
