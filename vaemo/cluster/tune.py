"""A sweep on Ray Tune: trials side by side, each result kept under its number.

The distributed form of `vaemo.tuning`. `vaemo.cluster.jobs` runs the trials; this module decides which to end early,
and what comes next. What is finished and what is under way is read from the sweep's folder, so that a sweep that was
killed
anywhere goes on when it is run again: Ray Tune's own way to resume unpickles files. Its searchers are not used
for the same reason: they know of earlier trials only what they have pickled.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
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
from vaemo.progress import duration, say
from vaemo.training import run_folder
from vaemo.training.data import TRAINING_SECTIONS, SplitSessions, TrainingData
from vaemo.training.end_to_end import check_encoder_settings
from vaemo.training.jobs import Failure, Job, Jobs, Line
from vaemo.tuning.held_out import HeldOut, told
from vaemo.tuning.search import Method, Scheduler, Search, default_method
from vaemo.tuning.space import WHILE_TRAINING, Point, Space, read_space
from vaemo.tuning.sweep import DONE, FAILED, MARKER, STOPPED, Record, Sweep
from vaemo.tuning.trial import METRIC, Searching, equal_steps, read_state, saved_point, schedule_end, total_steps
from vaemo.tuning.write import write_summary

TRIALS = 20
"""Trials of a sweep by default."""

SHOWN_EVERY_S = 10.0

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
    settings = {
        "space": around.to_plain(),
        "search": method,
        "scheduler": scheduler,
        "folds": folds,
        "seeds": seeds,
        **config.decisive(*TRAINING_SECTIONS),
    }
    if data.voices_differ:
        data.pack()  # raises the error that explains it
    fingerprint = digest(json.dumps(settings), config.features.speaker_aggregation, data.digest)
    claim_folder(out, MARKER, fingerprint, {"data": data.digest, "settings": settings}, inputs=data.store.parts)
    sweep = Sweep(out)
    held_out = HeldOut.open(sweep, data)
    wanted = min(trials or points.trials or TRIALS, points.trials or trials or TRIALS)
    left = [number for number in range(wanted) if number not in sweep.records]
    if left:
        finished = f", {wanted - len(left)} of them finished" if len(left) < wanted else ""
        say(f"{wanted} trials{finished}, {len(data.parts) * seeds} training(s) each")
        lengths = data.pack(features=False)
        course = _Course(sweep, points, around, lengths, total_steps(lengths, config), data.digest, wanted)
        decide = partial(make_scheduler, decided(scheduler, around), around, sweep, round(course.steps), course.moved)
        work = Searching(data.store, run_folder.origin_of(data.store, config, data.digest), seeds)
        jobs = _jobs(course, left, work, data, out)
        run_jobs(jobs, workers=workers, gpus=gpus, decide=decide, population=scheduler == "pbt")
    summary = write_summary(sweep, around, held_out)
    best = summary["best"]
    say(f"done: dev CCC-avg {best[METRIC]:.3f}, trial {best['trial_id']} of {len(sweep.records)}; {out}/index.html")
    if summary["held_out"]:
        say(told(summary["held_out"]))
    return summary


def _jobs(course: _Course, left: list[int], work: Searching, data: TrainingData, out: str) -> Jobs:
    """The jobs of the trials that are left."""
    return Jobs(
        work=work,
        jobs=course.jobs(left),
        pack=lambda part: data.pack(),
        ended=course.ended,
        count=len(left),
        storage=files.join(out, "_ray"),
        needs=[data.store.path, files.join(out, MARKER)],
        heard=course.heard,
        again=course.again,
    )


class _Course:
    """The jobs of a sweep in turn, and the handling of their results.

    Args:
        sweep: What has been found so far; added to.
        points: The search; told of it.
        space: What is searched.
        sessions: What the trials learn from, without features.
        steps: Optimiser steps that every training makes, as nearly as whole epochs allow.
        data: Digest of what they learn from.
        trials: How many there will be in all.
    """

    def __init__(
        self, sweep: Sweep, points: Search, space: Space, sessions: SplitSessions, steps: float, data: str, trials: int
    ) -> None:
        self.steps = steps
        self._sweep, self._points, self._space, self._sessions = sweep, points, space, sessions
        self._data, self._trials, self._before = data, trials, len(sweep.records)
        self._started = self._shown = time.monotonic()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickles as nothing: Ray Tune pickles its scheduler into a file that is never read."""
        return object, ()

    def jobs(self, left: list[int]) -> Iterator[Job]:
        """The trials that are left, those under way first."""
        for record in self._sweep.records.values():
            self._points.tell(record.number, record.point, record.value, stopped_at=record.stopped_at)
        begun = self._sweep.unfinished
        for taken in begun.values():
            self._points.take(taken)
        for number in sorted(left, key=lambda number: (number not in begun, number)):
            point = begun.get(number) or self._points.point(number)
            if point is None:
                self._trials = number
                say(f"all points of the space are trained: the sweep ends after {number} trials")
                return
            if number not in begun:
                self._sweep.begin(number, point)
            job = Job(number, f"trial {number:04d}", self._sweep.folder(number), self._space.config, None, self._data)
            try:
                yield self.again(self.moved(job, point))
            except UsageError as error:
                self.ended(dataclasses.replace(job, point=point), {}, Failure.of(error))

    def moved(self, job: Job, point: Point) -> Job:
        """A job at another point."""
        config = equal_steps(self._space.apply(point), self._sessions, self.steps)
        return dataclasses.replace(job, config=config, point=point)

    def again(self, job: Job) -> Job:
        """A job where it was saved last: a member of a population may stand at another point than it began at."""
        state = read_state(job.out)
        return job if state is None else self.moved(job, saved_point(state))

    def heard(self, job: Job, line: Line) -> None:
        """An epoch of a trial has ended."""
        if time.monotonic() - self._shown > SHOWN_EVERY_S:
            self._say(f"{job.name}: step {line['step']:,} of {self.steps:,.0f}, dev CCC {line[METRIC]:.3f}")

    def ended(self, job: Job, line: Line, failure: Failure | None) -> None:
        """A trial has ended, by itself or by the scheduler."""
        record = Record(
            number=job.number,
            status=FAILED if failure else DONE if line["finished"] else STOPPED,
            point=dict(job.point),
            config=job.config.to_dict(),
            metrics={key: line[key] for key in line.get("measured", ())},
            curve=[(step, value) for step, value in line.get("curve", ())],
            error=failure.text if failure else None,
        )
        self._sweep.end(record)
        self._points.tell(record.number, record.point, record.value, stopped_at=record.stopped_at)
        values = ", ".join(f"{name} {_short(value)}" for name, value in record.point.items())
        gave = f"failed, {record.error}" if failure else f"dev CCC {record.value:.3f}"
        self._say(f"{job.name}: {gave}{', ended early' if record.status == STOPPED else ''} ({values})")

    def _say(self, text: str) -> None:
        self._shown = time.monotonic()
        best, ended = self._sweep.best, len(self._sweep.records)
        left = ""
        if self._before < ended < self._trials:
            each_s = (self._shown - self._started) / (ended - self._before)
            left = f", about {duration(each_s * (self._trials - ended))} left"
        so_far = f"best {best.value:.3f} (trial {best.trial_id}), " if best else ""
        say(f"{text}; {so_far}{ended} of {self._trials} ended{left}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
