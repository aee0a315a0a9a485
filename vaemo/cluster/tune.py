"""A sweep on Ray Tune: trials side by side, each result kept under its number.

The distributed form of `vaemo.tuning`, whose `Course` says what comes next. `vaemo.cluster.jobs` runs the trials; this
module decides which to end early. What is finished and what is under way is read from the sweep's folder, so that a
sweep that was killed anywhere goes on when it is run again: Ray Tune's own way to resume unpickles files. Its searchers
are not used for the same reason: they know of earlier trials only what they have pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from vaemo import files
from vaemo.cluster.jobs import run_jobs
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.model.checks import used_streams
from vaemo.parts.shards import claim_folder, digest
from vaemo.progress import say
from vaemo.training import run_folder
from vaemo.training.data import TRAINING_SECTIONS, TrainingData
from vaemo.training.end_to_end import check_encoder_settings
from vaemo.training.jobs import Jobs
from vaemo.tuning.course import Course
from vaemo.tuning.held_out import HeldOut, told
from vaemo.tuning.search import Method, Scheduler, Search, default_method
from vaemo.tuning.space import WHILE_TRAINING, Space, read_space
from vaemo.tuning.sweep import MARKER, Sweep
from vaemo.tuning.trial import METRIC, Searching, schedule_end
from vaemo.tuning.write import write_summary

TRIALS = 20
"""Trials of a sweep by default."""

GRACE, REDUCTION = 0.25, 2
"""ASHA ends no trial before this share of its steps, or before the sampling schedule's end where that is later; from
there on, at every doubling, those that are not in the better half."""

PERTURBATIONS = 10
"""How often population-based training compares, over the steps of a trial."""


def tune(
    store: str,
    space: str,
    out: str,
    config: Config,
    *,
    trials: int | None = None,
    search: Method | None = None,
    scheduler: Scheduler = "auto",
    workers: int = 1,
    gpus: float | None = None,
    folds: str | None = None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Search over config fields, or resume an interrupted sweep, and return its summary.

    Args:
        store: Path or URI of a feature store, on storage that every node sees.
        space: YAML file; see `vaemo.tuning.space`.
        out: The sweep's folder, on such storage too; see `vaemo.tuning.sweep`. More trials than before are added.
        config: What the space lies around, and trial 0. Its epochs say how many optimiser steps every trial makes.
        trials: How many in all; None is 20, or the whole grid.
        search: How points are drawn; None is `tpe`, or `random` without Optuna.
        scheduler: `asha` ends poor trials early, `none` none. `auto` is `asha`, but `none` where the sampling schedule
            is searched, since a run that is still fed labels looks poor when it runs free. `pbt` (population-based
            training) lets poor trials go on from good ones, with other values.
        workers: Processes that train one trial together; divides `train.lanes`.
        gpus: Share of a GPU for each process; None is a quarter where the cluster has any, with several workers a
            whole one.
        folds: As for `vaemo.pipeline.training`; the mean over folds is searched for.
        seeds: Trainings of each trial and fold, likewise.

    Raises:
        UsageError: for options that do not fit each other, or the space; see `read_space`.
        OtherRunError: if `out` holds a sweep with other settings or data.
        ClusterError: if the cluster has too few CPUs or GPUs, or nodes are lost and trials find no place again.
        StorageError: if a disk is full or refuses.
        SweepFailedError: if no trial ran to its end.
        VaemoError: what `vaemo.data.splits`, `vaemo.data.sessions` and `vaemo.training.trainer` raise of the data.
    """
    around = read_space(space, config)
    _check_options(around, search, scheduler, workers)
    method: Method = search or ("random" if scheduler == "pbt" else default_method())
    points = Search(around, method, config.train.seed)
    data = _read(store, config, folds)
    around.check_together(("model.prosody", "model.film"), lambda config: used_streams(config.model, data.store.dims))
    sweep = _claim(out, around, data, {"search": method, "scheduler": scheduler, "folds": folds, "seeds": seeds})
    held_out = HeldOut.open(sweep, data)
    wanted = min(trials or points.trials or TRIALS, points.trials or trials or TRIALS)
    left = [number for number in range(wanted) if number not in sweep.records]
    if left:
        finished = f", {wanted - len(left)} of them finished" if len(left) < wanted else ""
        say(f"{wanted} trials{finished}, {len(data.parts) * seeds} training(s) each")
        course = Course(sweep, points, around, data.pack(features=False), data.digest, wanted)
        decide = partial(make_scheduler, decided(scheduler, around), around, sweep, round(course.steps), course.moved)
        jobs = _jobs(course, left, data, out, seeds)
        run_jobs(jobs, workers=workers, gpus=gpus, decide=decide, population=scheduler == "pbt")
    summary = write_summary(sweep, around, held_out)
    best = summary["best"]
    say(f"done: dev CCC-avg {best[METRIC]:.3f}, trial {best['trial_id']} of {len(sweep.records)}; {out}/index.html")
    if summary["held_out"]:
        say(told(summary["held_out"]))
    return summary


def _claim(out: str, space: Space, data: TrainingData, how: Mapping[str, Any]) -> Sweep:
    """The sweep of a folder, claimed for these settings and data."""
    config = space.config
    settings = {"space": space.to_plain(), **how, **config.decisive(*TRAINING_SECTIONS)}
    if data.voices_differ:
        data.pack()  # raises the error that explains it
    fingerprint = digest(json.dumps(settings), config.features.speaker_aggregation, data.digest)
    claim_folder(out, MARKER, fingerprint, {"data": data.digest, "settings": settings}, inputs=data.store.parts)
    return Sweep(out)


def _jobs(course: Course, left: list[int], data: TrainingData, out: str, seeds: int) -> Jobs:
    """The jobs of the trials that are left."""
    return Jobs(
        work=Searching(data.store, run_folder.origin_of(data.store, data.config, data.digest), seeds),
        jobs=course.jobs(left),
        pack=lambda part: data.pack(),
        ended=course.ended,
        count=len(left),
        storage=files.join(out, "_ray"),
        needs=[data.store.path, files.join(out, MARKER)],
        heard=course.heard,
        again=course.again,
    )


def make_scheduler(name: Scheduler, space: Space, sweep: Sweep, steps: int, moved: Any = None) -> TrialScheduler:
    """The scheduler, which decides after each epoch whether a trial continues.

    Args:
        name: See `tune`; not `auto`, which `decided` resolves.
        space: What is searched.
        sweep: What has been found so far.
        steps: Optimiser steps of a trial.
        moved: Gives a job at another point.
    """
    if name == "pbt":
        random = np.random.default_rng([space.config.train.seed, len(sweep.records)])

        def explore(given: dict[str, Any]) -> dict[str, Any]:
            return {**given, "job": moved(given["job"], space.perturb(given["job"].point, random))}

        return PopulationBasedTraining(
            time_attr="step",
            metric=METRIC,
            mode="max",
            perturbation_interval=max(steps / PERTURBATIONS, 1),
            custom_explore_fn=explore,
            log_config=False,
            require_attrs=False,
        )
    if name == "none":
        return FIFOScheduler()
    asha = _Asha(
        time_attr="step",
        metric=METRIC,
        mode="max",
        max_t=steps,
        grace_period=min(max(schedule_end(space, steps), int(GRACE * steps), 1), steps),
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )
    # Results of earlier trials decide over later ones, also after a restart.
    for record in sweep.records.values():
        # Neither method uses the controller, or more of a trial than this.
        job = SimpleNamespace(number=record.number)
        earlier: Any = SimpleNamespace(trial_id=record.trial_id, config={"job": job})
        asha.on_trial_add(None, earlier)  # type: ignore[arg-type]
        for step, value in record.curve:
            asha.on_trial_result(None, earlier, {"step": step, METRIC: value})
    return asha


class _Asha(AsyncHyperBandScheduler):
    """Always lets trial 0 finish: it is the reference for the others."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["job"].number == 0 else action


def decided(scheduler: Scheduler, space: Space) -> Scheduler:
    """Resolve `auto`; other names are returned unchanged."""
    if scheduler != "auto":
        return scheduler
    return "none" if space.searches_schedule else "asha"


def _check_options(space: Space, search: Method | None, scheduler: Scheduler, workers: int) -> None:
    lanes = {space.config.train.lanes}
    for parameter in space.parameters:
        if parameter.name == "train.lanes":
            low, high = parameter.values[0], parameter.values[-1]
            lanes |= set(parameter.values if parameter.kind == "choice" else range(low, high + 1))
    if odd := sorted(n for n in lanes if n % workers):
        raise UsageError(
            f"train.lanes may be {odd[0]}, which {workers} workers cannot share evenly; give --workers that divide it."
        )
    if workers > 1 and scheduler == "pbt":
        raise UsageError(
            f"--scheduler pbt changes trials that train in one process; leave out --workers {workers}, or take "
            "--scheduler asha or none."
        )
    if scheduler == "pbt":
        if search not in (None, "random"):
            raise UsageError(
                f"--scheduler pbt draws its first points at random; --search {search} does not go with it."
            )
        if fixed := [name for name in space.names if name not in WHILE_TRAINING]:
            raise UsageError(
                f"--scheduler pbt changes values while a model trains, and {fixed[0]} cannot change then. It may "
                f"search {', '.join(sorted(WHILE_TRAINING))}."
            )


def _read(store: str, config: Config, folds: str | None) -> TrainingData:
    """The validated training data of the trials."""
    data = TrainingData.open(store, config, folds)
    check_encoder_settings(config, None, data.store.info)
    data.check_labels()
    return data
