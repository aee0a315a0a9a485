"""The default recipe in worlds in which the best is known: near the Kalman filter, above ridge, better with labels."""

import numpy as np
import pytest
import torch

from vaemo.ablation.baselines import Given, ridge, ridge_with_memory
from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.testing import ccc_avg, kalman_predictions, linear_world, match_spread, regime_world
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer

OF_KALMAN = 0.98
"""Share of the Kalman filter's CCC-avg that the full world must give."""
BELOW_RIDGE = 0.005
"""How far below ridge on features and their causal EMA the default may end in a linear world."""
SEED = 12


def trained(world, *overrides):
    torch.set_num_threads(1)
    trainer = Trainer(world.sessions("train"), world.sessions("dev"), Config.load("default", overrides))
    for _ in trainer:
        pass
    return trainer


def on_test(trainer, world, observed_share=0.0):
    """CCC-avg on the test sessions, running free, or with a share of the labels observed."""
    packed = PackedSessions.of(world.sessions("test"))
    shown = torch.from_numpy(np.random.default_rng(0).random((len(packed.labels), 1))) < observed_share
    observed = torch.where(shown, packed.labels, torch.nan) if observed_share else None
    found = replay(trainer.kept, packed, window=30, observed=observed)
    return float(found.moments(packed.labels).ccc().mean())


def given(world):
    return Given(*(world.sessions(name) for name in ("train", "dev", "test")), ["speech"])


def baselines(world):
    parts = given(world)
    return parts.test, ridge_with_memory(parts, match=False)


def test_small_linear_world():
    """A tenth of the data, better features: the recipe as a whole works, within a minute."""
    world = linear_world(SEED, sessions=(60, 15, 40), lengths=(20, 60), features=12, noise=3.0)
    trainer = trained(world, "train.epochs=25")
    test, remembering = baselines(world)
    free, some, all_ = (on_test(trainer, world, share) for share in (0.0, 0.3, 1.0))
    memoryless = ccc_avg(ridge(given(world)), test)
    print(
        f"\nfree {free:.4f}, observed {some:.4f} {all_:.4f}, ridge {ccc_avg(remembering, test):.4f}, "
        f"Kalman {ccc_avg(kalman_predictions(world, test), test):.4f}, memoryless {memoryless:.4f}"
    )
    assert free > 0.95 * ccc_avg(kalman_predictions(world, test), test)
    assert free > memoryless + 0.05
    assert free < some < all_


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_linear_world(seed):
    world = linear_world(seed)
    trainer = trained(world)
    test, remembering = baselines(world)
    free = on_test(trainer, world)
    assert free >= OF_KALMAN * ccc_avg(kalman_predictions(world, test), test)
    assert free >= ccc_avg(remembering, test) - BELOW_RIDGE
    assert on_test(trainer, world, 0.1) > free
    assert trainer.history[-1]["gap_ccc_avg"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [11, 12])
def test_world_that_no_linear_filter_can_follow(seed):
    world = regime_world(seed)
    trainer = trained(world)
    test, remembering = baselines(world)
    best_ridge = max(ccc_avg(remembering, test), ccc_avg(match_spread(remembering, test), test))
    assert on_test(trainer, world) > best_ridge + 0.015
