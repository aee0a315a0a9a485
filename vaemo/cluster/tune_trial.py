"""A trial of a sweep where it runs: a plain function of Ray Tune, or a run of Ray Train on several workers."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray import tune
from ray.train import ControllerError
from ray.tune.integration.ray_train import TuneReportCallback

from vaemo import files
from vaemo.cluster.group import run_group
from vaemo.errors import StorageError, VaemoError, mistake_of
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.group import Group, ProcessGroup
from vaemo.tuning.space import Point, Space
from vaemo.tuning.sweep import read_state, trial_folder, write_state
from vaemo.tuning.trial import Trial, equal_steps

SAVED_EVERY_S = 10.0
"""How often a trial saves what it needs to go on, besides its end."""

MAX_FAILURES = 3
"""How often the process of a trial may die before the trial has failed; it goes on from where it was saved."""

NO_PLACE, NO_STORAGE = "no_place", "no_storage"
"""Reported by a trial whose workers found no place on the cluster, or whose disk was full or refused, with what that
said: it has not failed, it goes on another time."""

_CHECKPOINT = "state.safetensors"


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep share.

    Attributes:
        store: The feature store, opened.
        out: The sweep's folder.
        space: What is searched.
        data: Reference to the `SplitSessions`, which every node holds once.
        steps: Optimiser steps that every training makes, as nearly as whole epochs allow.
        origin: What the checkpoints of all trials say of their origin.
        seeds: Trainings for each fold.
        workers: Processes that train one trial.
        gpus: Share of a GPU for each of them.
        patience_s: How long a trial, or its workers, may find no place on the cluster.
        population: With population-based training, the numbers of its members; None otherwise.
    """

    store: FeatureStore
    out: str
    space: Space
    data: Any
    steps: float
    origin: Mapping[str, Any]
    seeds: int
    workers: int
    gpus: float
    patience_s: float
    population: tuple[int, ...] | None = None

    def number(self, given: Mapping[str, Any], trial_id: str) -> int:
        """The number of a trial.

        Args:
            given: Its config, as Ray Tune holds it. A member of a population takes over that of another.
            trial_id: As Ray Tune names it; for a member of a population it ends in its place.
        """
        return given["number"] if self.population is None else self.population[int(trial_id.rpartition("_")[2])]


def run_trial(given: dict[str, Any], job: Job) -> None:
    """A trial, in a process of its own; what it raises is its result, and does not end the sweep."""
    number = job.number(given, tune.get_context().get_trial_id())
    try:
        if job.workers > 1:
            _fit_workers(number, given["point"], job)
            return
        state = read_state(trial_folder(job.out, number))
        if (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                state = Path(folder, _CHECKPOINT).read_bytes()
        device = "cuda" if job.gpus else "cpu"
        for metrics, trial in _epochs(number, given["point"], state, job, Group(), device):
            if job.population is None:
                tune.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                files.write_whole(files.join(folder, _CHECKPOINT), trial.save(given["point"]))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
    except Exception as error:
        mistake = mistake_of(error) if isinstance(error, (VaemoError, OSError)) else None
        if isinstance(mistake, StorageError):
            tune.report({NO_STORAGE: str(mistake), "finished": False})
        else:
            tune.report({"error": _told(error), "finished": False})


def _epochs(
    number: int,
    point: Point,
    state: bytes | None,
    job: Job,
    group: Group,
    device: torch.device | str,
) -> Iterator[tuple[dict[str, Any], Trial]]:
    """Metrics after every epoch of a trial, whose files are kept up to date."""
    torch.set_num_threads(1)
    space = job.space
    data = ray.get(job.data)
    config = equal_steps(space.apply(point), data, job.steps)
    trial = Trial(data, config, job.seeds, group=group, device=device)
    if state is not None:
        trial.restore(state)
    folder = trial_folder(job.out, number)
    first = trial.first
    provenance = run_folder.provenance_of(job.origin, config, first.model, torch.device(device).type)
    saved_at = time.monotonic()
    for metrics in trial:
        if group.rank == 0:
            # With `select: last` every epoch would be kept, for the next to replace it.
            if first.improved and (config.train.select == "best" or first.finished):
                errors = first.errors
                run_folder.keep(folder, first.kept, config, job.store, first.history[-1], provenance, errors=errors)
            if trial.finished or time.monotonic() - saved_at > SAVED_EVERY_S:
                write_state(folder, trial.save(point))
                saved_at = time.monotonic()
        yield {**metrics, "measured": [key for key in metrics if key not in ("curve", "finished")]}, trial


def _fit_workers(number: int, point: Point, job: Job) -> None:
    """A trial on several workers: a run of Ray Train that reports to Tune."""
    try:
        run_group(
            _epochs_together,
            (number, point, job),
            workers=job.workers,
            gpus=job.gpus,
            name=f"trial-{number:04d}-{uuid.uuid4().hex[:12]}",
            storage=files.join(job.out, "_ray"),
            max_failures=MAX_FAILURES,
            patience_s=job.patience_s,
            callbacks=[TuneReportCallback()],
        )
    except ControllerError:
        tune.report({NO_PLACE: True, "finished": False})


def _epochs_together(given: tuple[int, Point, Job]) -> dict[str, Any]:
    """What every worker of a trial does."""
    number, point, job = given
    state = read_state(trial_folder(job.out, number))
    device = ray.train.torch.get_device()
    for metrics, _ in _epochs(number, point, state, job, ProcessGroup(), device):
        # Every worker waits here, so that the state that was saved is one that all of them have reached.
        ray.train.report(metrics)
    return {}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
