"""Targets by name where the truth is known: one that needs memory, one of the whole call. Tables of docs/targets.md.

pytest -m slow tests/perf/test_targets.py -s
"""

import numpy as np
import pytest

from vaemo.config import Config
from vaemo.data.sessions import assemble_sessions
from vaemo.data.windows import PackedSessions
from vaemo.metrics import spearman
from vaemo.pipeline.ablation import ablate
from vaemo.pipeline.executors import InProcess
from vaemo.testing import best_of_calls, call_world, write_store
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer

pytestmark = pytest.mark.slow

CSAT = "{name: csat, level: session}"


def test_a_third_target_that_needs_memory_is_seen_to_need_it(tmp_path):
    """Without an updater dominance falls by more than its interval, and by more than valence and arousal do."""
    store = write_store(call_world(0), str(tmp_path / "store"))
    config = Config.load("default", ["model.targets=[valence, arousal, dominance]", "train.epochs=12"])
    full, without = ablate(store, str(tmp_path / "out"), config, InProcess(), seeds=2, only=["no-state"])
    for name in ("valence", "arousal", "dominance"):
        ends = (without[f"difference_{name}_{end}"] for end in ("low", "high"))
        print(
            f"{name}: CCC {full[f'ccc_{name}']:.3f}, without memory {without[f'ccc_{name}']:.3f}, difference "
            f"{without[f'difference_{name}']:+.3f} [{', '.join(f'{end:+.3f}' for end in ends)}]"
        )
    assert without["difference_dominance_high"] < 0
    assert without["difference_dominance"] < min(without["difference_valence"], without["difference_arousal"])


@pytest.mark.parametrize("targets", [f"[valence, arousal, {CSAT}]", f"[{CSAT}]"], ids=["beside others", "alone"])
def test_a_target_of_the_call_is_learned_from_200_calls(targets):
    """Spearman's rho of test calls, as a share of the best predictor's, over seeds on which nothing was tuned."""
    shares = []
    for seed in range(10, 15):
        world = call_world(seed)
        config = Config.load("default", [f"model.targets={targets}", f"train.seed={seed}"])
        sessions = assemble_sessions(world.table, targets=config.model.targets)
        train, dev, test = ([each for each in sessions if each.split == name] for name in ("train", "dev", "test"))
        trainer = Trainer(train, dev, config, say=lambda text: None)
        for _ in trainer:
            pass
        prediction = replay(trainer.kept, PackedSessions.of(test), window=config.train.window).prediction
        last = np.cumsum([len(each) for each in test]) - 1
        label = np.array([each.labels[-1, -1] for each in test])
        rho, best = spearman(prediction[last, -1], label), spearman(best_of_calls(world, test), label)
        shares.append(rho / best)
        print(f"seed {seed}: rho {rho:.3f}, of the best predictor {best:.3f}: {rho / best:.2f} of it")
    print(f"mean {np.mean(shares):.3f}")
    assert np.mean(shares) >= 0.8
