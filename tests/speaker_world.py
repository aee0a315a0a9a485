"""Speakers who are labelled with a bias of their own, for the tests of personalisation."""

import numpy as np

from vaemo.data.sessions import Session

DIM, SPEAKER_DIM = 24, 8
AR, BIAS = 0.8, 0.1


def biased_world(
    n_speakers: int, seed: int, utterances: int = 60, *, dim: int = DIM, speaker_dim: int = SPEAKER_DIM
) -> list[Session]:
    """A session per speaker: AR(1) valence and arousal, labels shifted by a bias of the speaker's own."""
    draw, mixing = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(dim, 2))
    sessions = []
    for k in range(n_speakers):
        x = np.zeros((utterances, 2))
        for t in range(utterances):
            x[t] = AR * x[t - 1] + (1 - AR**2) ** 0.5 * draw.normal(size=2)
        labels = np.clip(0.5 + 0.16 * x + draw.normal(0, BIAS, 2), 0.01, 0.99)
        speech = x @ mixing.T + 3 * draw.normal(size=(utterances, dim))
        speaker = draw.normal(size=speaker_dim) + 0.1 * draw.normal(size=(utterances, speaker_dim))
        sessions.append(make_session(f"s{k}", [f"p{k}"] * utterances, speech, speaker, labels))
    return sessions


def make_session(session_id, speaker_ids, speech, speaker, labels) -> Session:
    n = len(labels)
    return Session(
        session_id=session_id,
        rows=np.arange(n),
        utt_ids=np.array([f"{session_id}/{t}" for t in range(n)], object),
        speaker_ids=np.array(speaker_ids, object),
        split="test",
        fold=None,
        streams={"speech": speech.astype(np.float32), "speaker": speaker.astype(np.float32)},
        labels=labels.astype(np.float32),
        observed=np.full((n, 2), np.nan, np.float32),
        start_s=np.arange(n, dtype=float),
    )
