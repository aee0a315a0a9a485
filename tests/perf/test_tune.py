"""What a sweep costs beside the training in it.

Definition: wall time of a sweep of trials of equal cost on 2 CPUs, from the call on, Ray's start included, against the
time that those trials spend in training and judging, divided by 2. Both are taken in the same run. What is left, times
2, divided by the trials, is what each costs beside its training.
"""

import math
import time

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from vaemo.cluster.tune import tune
from vaemo.config import Config
from vaemo.testing import linear_world, write_store
from vaemo.training.trainer import Trainer

pytestmark = [pytest.mark.perf, pytest.mark.ray, pytest.mark.timeout(3600)]

CPUS = 2


@pytest.mark.parametrize(
    ("trials", "trial_s", "most", "most_beside_s"), [(8, 60.0, 1.10, math.inf), (40, 5.0, math.inf, 2.0)]
)
def test_sweep_against_its_training(tmp_path, trials, trial_s, most, most_beside_s):
    import ray

    world = linear_world(5, sessions=(60, 15, 0), lengths=(20, 60), features=12, noise=3.0)
    store = write_store(world, str(tmp_path / "store"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a trial has it
    trainer = Trainer(world.sessions("train"), world.sessions("dev"), Config.load("default", ["train.epochs=2"]))
    _, started, _ = next(iter(trainer)), time.perf_counter(), next(iter(trainer))
    torch.set_num_threads(before)
    epochs = math.ceil(trial_s / (time.perf_counter() - started))
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"train.lr": {"loguniform": [5e-4, 2e-3]}}))
    ray.shutdown()
    started = time.perf_counter()
    ray.init(num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    out = str(tmp_path / "sweep")
    config = Config.load("default", [f"train.epochs={epochs}"])
    tune(store, str(space), out, config, trials=trials, search="random", scheduler="none")
    wall_s = time.perf_counter() - started
    train_s = pq.read_table(f"{out}/trials.parquet")["metric.train_s"].to_pylist()
    ratio = wall_s / (sum(train_s) / CPUS)
    beside_s = (wall_s * CPUS - sum(train_s)) / trials
    print(f"\n{trials} trials of {min(train_s):.0f}-{max(train_s):.0f} s on {CPUS} CPUs: {wall_s:.0f} s")
    print(f"{ratio:.2f} times their training / {CPUS}; {beside_s:.1f} CPU s beside each")
    assert ratio <= most
    assert beside_s <= most_beside_s
