"""The default recipe beside the former one, and each change between them alone: the table of docs/evidence.md.

CCC average of test sessions, running free, in worlds with seeds 100, 101, ... (`vaemo.testing`), each with a seed of
weights of its own; nothing was chosen on those. Where VAEMO_BENCH_EMODB names a feature store of Emo-DB, also the mean
over its speakers, each left out in turn. Differences are of the same world and seed. About 3 minutes a seed and recipe.
"""

import os
import statistics

import numpy as np
import pytest

from vaemo import testing
from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.metrics import ccc
from vaemo.testing import ccc_avg
from vaemo.training.data import TrainingData
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer

pytestmark = pytest.mark.perf

SEEDS = range(int(os.environ.get("VAEMO_BENCH_SEEDS", "3")))
EMODB = os.environ.get("VAEMO_BENCH_EMODB")
FORMER = ("train.feature_noise=0.5", "model.speaker_norm=[]")
RECIPES = {
    "former": FORMER,
    "feature_noise alone": FORMER[1:],
    "speaker_norm alone": FORMER[:1],
    "default": (),
    "default, with a network on speech": ("model.speech_mlp=after_film",),
    "default, speech compared too": ("model.speaker_norm=[speech, prosody]",),
    "default, the session's past too": ("model.session_norm=[prosody]",),
    "default, GRU without EMA": ("model.updater=gru", "model.ema=none"),
}


def predict(train, dev, test, config):
    trainer = Trainer(train, dev, config, say=lambda text: None)
    for _ in trainer:
        pass
    return replay(trainer.kept, PackedSessions.of(test), window=config.train.window).prediction


def in_world(name, seed, overrides):
    world = getattr(testing, f"{name}_world")(100 + seed)
    train, dev, test = (world.sessions(split) for split in ("train", "dev", "test"))
    found = predict(train, dev, test, Config.load("default", [*overrides, f"train.seed={seed}"]))
    return ccc_avg(np.split(found, np.cumsum([len(session) for session in test])[:-1]), test)


def on_emodb(seed, overrides):
    config = Config.load("default", [*overrides, f"train.seed={seed}"])
    data = TrainingData.open(EMODB, config, folds="by=speaker")
    packed, sessions, found = data.pack(), data.sessions(data.parts[0]), []
    for number, fold in enumerate(data.parts):
        test = [session for session in sessions if fold.held_out[session.rows].any()]
        train, dev = (packed.split(number, name) for name in ("train", "dev"))
        labels = np.concatenate([session.labels for session in test])
        found.append(ccc(predict(train, dev, test, config), labels))
    return float(np.mean(found))


def test_the_default_is_ahead_where_people_are_and_no_worse_elsewhere():
    places = {name: lambda *how, name=name: in_world(name, *how) for name in ("linear", "regime", "dialogue")}
    if EMODB:
        places["emodb"] = on_emodb
    found = {
        (recipe, place): [measure(seed, overrides) for seed in SEEDS]
        for recipe, overrides in RECIPES.items()
        for place, measure in places.items()
    }
    gain = {}
    for (recipe, place), values in found.items():
        less = [value - former for value, former in zip(values, found["former", place], strict=True)]
        gain[recipe, place] = statistics.mean(less)
        print(
            f"{recipe:<36} {place:<9} {statistics.mean(values):.4f} ± {np.std(values, ddof=len(values) > 1):.4f}, less "
            f"former {gain[recipe, place]:+.4f} ± {np.std(less, ddof=len(less) > 1):.4f}"
        )
    assert min(gain["default", place] for place in ("linear", "regime")) > -0.005
    assert gain["default", "dialogue"] > 0.03
    if EMODB:
        assert statistics.mean(found["default", "emodb"]) > 0.70
