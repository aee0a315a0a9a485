"""A trial: one config trained once for each fold and seed, all of them epoch by epoch, and their mean.

Trials are compared at equal optimiser steps. A window twice as long, or twice the lanes, makes half the steps of an
epoch; so the epochs of a trial follow from the steps that the config of trial 0 makes in its own. It makes as many as
that to within half an epoch, and sees more utterances the more a step of it holds.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from vaemo import files
from vaemo.config import Config
from vaemo.data.lanes import schedule_lanes
from vaemo.files import safetensors_metadata
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.data import SplitSessions
from vaemo.training.group import Group
from vaemo.training.jobs import Job, Line, Place
from vaemo.training.sampling import counts_from
from vaemo.training.trainer import Trainer
from vaemo.tuning.space import SCHEDULE, Space

_STATE = "state.safetensors"

METRIC = "dev_ccc_avg"
"""The objective: CCC on dev sessions, running free, mean over the targets, and over folds and seeds."""


def steps_after_epochs(data: SplitSessions, config: Config) -> Iterator[float]:
    """Optimiser steps made after 1, 2, ... epochs, mean over folds; has no end."""
    train = config.train
    lengths = [data.split(fold, "train").lengths for fold in range(len(data.splits))]

    def steps(epoch: int) -> float:
        schedules = (schedule_lanes(n, train.lanes, train.window, seed=train.seed, epoch=epoch) for n in lengths)
        return float(np.mean([len(schedule) for schedule in schedules]))

    return itertools.accumulate(map(steps, itertools.count()))


def total_steps(data: SplitSessions, config: Config) -> float:
    """Optimiser steps of a training, mean over folds."""
    return next(itertools.islice(steps_after_epochs(data, config), config.train.epochs - 1, None))


def equal_steps(config: Config, data: SplitSessions, steps: float) -> Config:
    """The config with the epochs that make nearest to `steps` optimiser steps, its patience in proportion."""
    made = [0.0]
    for after in steps_after_epochs(data, config):
        made.append(after)
        if after >= steps:
            break
    epochs = max(1, int(np.abs(np.array(made) - steps).argmin()))
    patience = max(1, round(config.train.patience * epochs / config.train.epochs))
    return config.replace({"train": {"epochs": epochs, "patience": patience}})


def schedule_end(space: Space, steps: float) -> int:
    """The optimiser step, of `steps` in all, from which every run of a space is fed as at inference."""
    ends = [
        [parameter.values[0], parameter.values[-1]] if parameter.kind != "choice" else list(parameter.values)
        for parameter in space.parameters
        if parameter.name in SCHEDULE
    ]
    names = [name for name in space.names if name in SCHEDULE]
    points = (dict(zip(names, values, strict=True)) for values in itertools.product(*ends))
    return max(counts_from(int(steps), space.apply(point)) for point in points)


SAVED_EVERY_S = 10.0
"""How often a trial saves its state, besides at its end."""


@dataclass(frozen=True)
class Searching:
    """The work of a job in a sweep: a trial.

    Attributes:
        store: The feature store, opened.
        origin: What the checkpoints of all trials say of their origin.
        seeds: Trainings for each fold.
    """

    store: FeatureStore
    origin: Mapping[str, Any]
    seeds: int

    def __call__(self, job: Job, sessions: SplitSessions, place: Place) -> Iterator[Line]:
        """See `vaemo.training.jobs.Work`."""
        trial = Trial(sessions, job.config, self.seeds, group=place.group, device=place.device)
        state = read_state(job.out) if place.saved is None else place.saved
        if state is not None:
            trial.restore(state)
        first, saved_at = trial.first, time.monotonic()
        for metrics in trial:
            if place.group.rank == 0:
                # With `select: last` every epoch would be kept, for the next to replace it.
                if first.improved and (job.config.train.select == "best" or first.finished):
                    run_folder.keep(job.out, first, self.store, self.origin)
                if trial.finished or time.monotonic() - saved_at > SAVED_EVERY_S:
                    write_state(job.out, trial.save(job.point))
                    saved_at = time.monotonic()
            if place.save:
                place.save(trial.save(job.point))
            yield {**metrics, "measured": [key for key in metrics if key not in ("curve", "finished")]}


class Trial:
    """The trainings of one trial: iterate for the mean metrics after every epoch.

    Args:
        data: What to train on, which all trainings share.
        config: Of the trial.
        seeds: How many, from `train.seed` on, for every fold.
        group: The workers.
        device: Where this worker computes.
    """

    def __init__(
        self,
        data: SplitSessions,
        config: Config,
        seeds: int,
        *,
        group: Group | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.trainers = [
            Trainer(
                data.split(fold, "train"),
                data.split(fold, "dev"),
                config.replace({"train": {"seed": config.train.seed + seed}}),
                group=group,
                device=device,
                say=lambda text: None,
            )
            for fold in range(len(data.splits))
            for seed in range(seeds)
        ]
        self._train_s = 0.0
        self._curve: list[tuple[int, float]] = []

    @property
    def first(self) -> Trainer:
        """The training of the first fold and seed: of it the checkpoint is kept."""
        return self.trainers[0]

    @property
    def finished(self) -> bool:
        """Whether every training has ended."""
        return all(trainer.finished for trainer in self.trainers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """`metrics`, and `curve`: the optimiser step and the dev CCC after every epoch so far."""
        if self.finished:
            yield {**self.metrics(), "curve": list(self._curve)}
        while not self.finished:
            started = time.perf_counter()
            for trainer in self.trainers:
                # One epoch, where there is one left.
                next(iter(trainer), None)
            self._train_s += time.perf_counter() - started
            now = self.metrics()
            self._curve.append((now["step"], now[METRIC]))
            yield {**now, "curve": list(self._curve)}

    def metrics(self) -> dict[str, Any]:
        """Means over the trainings, each at the epoch that it keeps; `train_s` counts training and judging alone."""
        lines = [trainer.summary() for trainer in self.trainers]
        found: dict[str, Any] = {"step": round(float(np.mean([trainer.step for trainer in self.trainers])))}
        for key in lines[0]:
            values = [line[key] for line in lines if line.get(key) is not None]
            found[key] = float(np.mean(values)) if values else None
        if len(lines) > 1:
            found[f"{METRIC}_sd"] = float(np.std([line[METRIC] for line in lines], ddof=1))
        return {**found, "runs": len(lines), "train_s": self._train_s, "finished": self.finished}

    def save(self, point: Mapping[str, Any]) -> bytes:
        """The state to continue the trial after this epoch, and its point."""
        tensors = {
            f"{number}.{name}": tensor.cpu()
            for number, trainer in enumerate(self.trainers)
            for name, tensor in trainer.tensors().items()
        }
        progress = [trainer.progress() for trainer in self.trainers]
        held = {"point": dict(point), "train_s": self._train_s, "curve": self._curve, "progress": progress}
        return save(tensors, metadata={"trial": json.dumps(held)})

    def restore(self, saved: bytes) -> None:
        """Continue from what `save` returned, from a trial of the same data, model and optimiser."""
        tensors, said = load(saved), _said(saved)
        self._train_s, self._curve = said["train_s"], [(step, value) for step, value in said["curve"]]
        for number, (trainer, progress) in enumerate(zip(self.trainers, said["progress"], strict=True)):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            trainer.restore({name: tensor.to(trainer.device) for name, tensor in own.items()}, progress)


def saved_point(saved: bytes) -> dict[str, Any]:
    """The point of a trial when it was saved."""
    return _said(saved)["point"]


def _said(saved: bytes) -> dict[str, Any]:
    return json.loads(safetensors_metadata(saved)["trial"])


def read_state(folder: str) -> bytes | None:
    """The state that `write_state` left in the folder of a trial; None if there is none yet."""
    path = files.join(folder, _STATE)
    return files.read_bytes(path) if files.exists(path) else None


def write_state(folder: str, state: bytes) -> None:
    """Write the state to continue a trial, replacing the previous one."""
    files.write_whole(files.join(folder, _STATE), state)
