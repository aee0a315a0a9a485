"""What personalisation is worth with the default recipe, in ten worlds of 20 speakers, each labelled with a bias.

The model is trained on other speakers. A speaker's first ten utterances are learned from; the CCC of the rest (mean of
valence and arousal) is compared with that of the model as it was. Seeds below 100 were looked at in development.
"""

import numpy as np
import pytest
import torch
from speaker_world import biased_world

from vaemo.config import Config
from vaemo.metrics import ccc
from vaemo.model.streams import Streams
from vaemo.personalize import personalize
from vaemo.training.trainer import Trainer

pytestmark = [pytest.mark.perf, pytest.mark.timeout(900)]

WORLDS, SPEAKERS = range(100, 110), 20


def scores(model, sessions, personal, first):
    """CCC of every session from an utterance on."""
    streams = {name: np.stack([session.streams[name] for session in sessions]) for name in sessions[0].streams}
    features = Streams(**{name: torch.from_numpy(values) for name, values in streams.items()})
    delta = personal and personal.delta(np.stack([session.speaker_ids for session in sessions]))
    lengths = torch.full((len(sessions),), len(sessions[0]))
    with torch.no_grad():
        found = model(features, model.fresh_state(len(sessions)), lengths, film_delta=delta)[0].numpy()
    return [ccc(p[first:], s.labels[first:]).mean() for p, s in zip(found, sessions, strict=True)]


def test_speakers_gain_and_few_lose():
    config = Config.load("default")
    trainer = Trainer(biased_world(120, seed=90), biased_world(20, seed=91), config, say=lambda text: None)
    for _ in trainer:
        pass
    model, first, before, after = trainer.kept, config.personalize.utterances, [], []
    for seed in WORLDS:
        sessions = biased_world(SPEAKERS, seed=seed)
        personal, _, _ = personalize(model, sessions, config.personalize)
        before.append(scores(model, sessions, None, first))
        after.append(scores(model, sessions, personal, first))
    gain = np.array(after) - np.array(before)
    bounds = gain.mean(axis=1) - 1.96 * gain.std(axis=1, ddof=1) / SPEAKERS**0.5
    print(
        f"\nCCC {np.mean(before):.3f}, gain {gain.mean():+.3f}; by world {gain.mean(axis=1).min():+.3f} to "
        f"{gain.mean(axis=1).max():+.3f}, lower bound above 0 in {(bounds > 0).sum()} of {len(WORLDS)}; worst speaker "
        f"{gain.min():+.3f}"
    )
    assert gain.mean() > 0
