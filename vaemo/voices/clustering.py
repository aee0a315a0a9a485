"""The number of voices in a channel and their mean vectors, from clustering of windows of speech.

Letters: N windows, D numbers of a speaker embedding, K voices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vaemo.data.speakers import unit

_ALIKE = 0.81
"""Two groups whose mean vectors have this cosine similarity are one voice. Halves of one calm voice over the telephone
are 0.82 alike and more, two calm voices of one language 0.73 and less, through MP3 more; acted moods of one person,
0.76 to 0.86, are no more alike than two persons who act them."""

_EXPLAINS = 0.07
"""The reduction of the windows' spread that a further voice must bring."""

_SHORT_S = 1.0
"""Shorter windows are too uncertain to start a voice from."""

_LEAST_S = 3.0
"""Least speech of a voice; less is a cough, or two speaking at once."""

_MOST_WINDOWS = 2000
"""Windows that are compared, spread evenly over the recording: memory does not grow with its length."""

_STARTS = 10

_HALVES = 12
"""Windows that are enough to tell two halves of a voice."""

_KNOWN = 0.5
"""Weight of an enrolment beside what is heard of that voice in the call."""

_CALM = 0.2
"""Mean distance of windows from their voice, up to which it is calm; acted moods give 0.2 to 0.28."""

_MOODS = 0.1
"""Where the known voice is not calm, how much less alike than its moods two groups must be to count as two voices."""

_STRANGE = 0.13
"""Two halves of what is taken for the enrolled voice whose similarity to it differs by this are not both that voice;
moods of one person differ by up to 0.12."""

_ROUNDS = 20


@dataclass(frozen=True, eq=False)
class Beside:
    """An enrolled voice in a call, and the voices beside it.

    Attributes:
        own: What the enrolled voice is like in the call, (D,), unit length.
        others: What each other voice is like, (K, D), unit length.
        calm: Whether the windows of the enrolled voice are much alike: it has no moods that look like voices.
    """

    own: np.ndarray
    others: np.ndarray
    calm: bool


def find_beside(
    expected: np.ndarray, vectors: np.ndarray, lengths_s: np.ndarray, hop_s: float, most: int
) -> Beside | None:
    """What an enrolled voice is like in a call, and each voice beside it, supposing that it is in the call.

    Windows are divided along the line from what the others have in common to the enrolled voice: k-means alone splits
    a call by moods first. How far moods are apart is then known of one person in this very call, so that the other's
    are not taken for voices.

    Args:
        expected: What the voice is like, (D,), unit length.
        vectors: As `find_voices`, also the next three.
        lengths_s: Of the windows, (N,).
        hop_s: From one window to the next inside an utterance.
        most: Voices that are looked for beside it.

    Returns:
        The voices; None where all windows are alike.
    """
    others = _unlike(expected, vectors)
    if not others.any():
        return None
    alike = 1.0
    for _ in range(_ROUNDS):
        if (~others).sum() < _HALVES:
            break
        halves, _, _ = _groups(_some(vectors[~others]), 2)
        likeness = halves @ expected
        if np.ptp(likeness) < _STRANGE:
            alike = float(halves[0] @ halves[1])
            break
        # One of the halves is another person's, whose voice is more like the expected one than the others' are.
        others |= (vectors @ halves.T).argmax(axis=1) == likeness.argmin()
    if others.all():
        return None
    known = vectors[~others]
    own = unit(known.mean(axis=0))
    calm = 1.0 - float((known @ own).mean()) <= _CALM
    limit = _ALIKE if calm else min(_ALIKE, alike - _MOODS)
    found = find_voices(vectors[others], lengths_s[others], hop_s, most, alike=limit, besides=_spread(known))
    return Beside(own, found, calm)


def known_and_heard(expected: np.ndarray, heard: np.ndarray) -> np.ndarray:
    """What a voice is like that is enrolled, (D,), and is heard in a call, (D,): what its windows are compared with."""
    return unit(_KNOWN * expected + (1.0 - _KNOWN) * heard)


def find_voices(
    vectors: np.ndarray,
    lengths_s: np.ndarray,
    hop_s: float,
    most: int,
    *,
    alike: float = _ALIKE,
    besides: float = 0.0,
) -> np.ndarray:
    """What each voice is like.

    Voices are the groups of the largest k-means that holds no two groups alike, none of them too small.

    Args:
        vectors: Speaker embeddings of windows in order, (N, D), of unit length.
        lengths_s: Of the windows, (N,).
        hop_s: From one window to the next inside an utterance.
        most: Voices that are looked for.
        alike: Cosine similarity from which on two groups are one voice.
        besides: Spread of the windows of a voice that is known already, of which the call's spread consists too.

    Returns:
        (K, D), unit length, K from 1 on; none where N is 0.
    """
    if not len(vectors):
        return vectors
    long = np.flatnonzero(lengths_s >= _SHORT_S)
    rows = long if len(long) > 1 else np.arange(len(vectors))
    points = _some(vectors[rows])
    # The number of windows in speech of that length, where not all are used.
    least = max(round(_LEAST_S / hop_s * len(points) / max(len(long), 1)), 2)
    best = unit(points.mean(axis=0, keepdims=True))
    spread, besides = _spread(points), besides * len(points) / len(vectors)
    for k in range(2, min(most, len(points) // least) + 1):
        centres, sizes, left = _groups(points, k)
        if left + besides > (spread + besides) * (1.0 - _EXPLAINS):
            break
        spread, likeness = left, centres @ centres.T - 2.0 * np.eye(k)
        if likeness.max() < alike and sizes.min() >= least:
            best = centres
    return best


def _unlike(expected: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Which windows are less like an enrolled voice than the rest, (N,); none where all are alike."""
    others = np.ones(len(vectors), bool)
    for _ in range(_ROUNDS):
        along = vectors @ (expected - unit(vectors[others].mean(axis=0)))
        now = along < _valley(along)
        if (now == others).all() or not now.any():
            return now
        others = now
    return others


def _valley(values: np.ndarray) -> float:
    """The value that divides two groups of values best (Otsu's threshold)."""
    ordered = np.sort(values)
    below, n = np.arange(1, len(ordered)), len(ordered)
    sums = np.cumsum(ordered)
    gaps = (sums[-1] - sums[:-1]) / (n - below) - sums[:-1] / below
    at = int((below * (n - below) * gaps**2).argmax()) if n > 1 else 0
    return float(ordered[at : at + 2].mean())


def _spread(points: np.ndarray) -> float:
    """Squared distances of windows from their mean, summed."""
    return float(np.square(points - points.mean(axis=0)).sum())


def _some(points: np.ndarray) -> np.ndarray:
    """Not more of them than are compared, spread evenly."""
    if len(points) <= _MOST_WINDOWS:
        return points
    return points[np.linspace(0, len(points) - 1, _MOST_WINDOWS).round().astype(int)]


def _groups(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean vectors of k groups, their sizes, and the squared distances that are left."""
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=_STARTS, random_state=0).fit(points)
    return unit(found.cluster_centers_), np.bincount(found.labels_, minlength=k), float(found.inertia_)
