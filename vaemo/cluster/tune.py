"""A sweep on Ray Tune: trials side by side, what each gave kept by its number.

The distributed form of `vaemo.tuning`. Ray Tune places the trials and ends poor ones early; what is finished, what is
under way and what comes next is read from the sweep's folder, so that a sweep that was killed anywhere goes on when it
is run again. A trial goes on from the epoch at which it was last saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.tune import (
    FailureConfig,
    RunConfig,
    TuneConfig,
    Tuner,
    grid_search,
    with_parameters,
    with_resources,
)
from ray.tune.schedulers import TrialScheduler

from vaemo import files
from vaemo.cluster.nodes import check_visible, total
from vaemo.cluster.runtime import NO_PROGRESS_S, connect
from vaemo.cluster.tune_search import Recorder, Suggestions, make_scheduler
from vaemo.cluster.tune_trial import MAX_FAILURES, Job, run_trial
from vaemo.config import Config
from vaemo.errors import ClusterError, UsageError
from vaemo.model.checks import used_streams
from vaemo.parts.shards import claim_folder, digest
from vaemo.progress import say
from vaemo.training import run_folder
from vaemo.training.data import SECTIONS, TrainingData
from vaemo.training.end_to_end import check_encoder_settings
from vaemo.tuning.search import Method, Scheduler, Search, default_method
from vaemo.tuning.space import WHILE_TRAINING, Point, Space, read_space
from vaemo.tuning.sweep import MARKER, Sweep, read_state
from vaemo.tuning.trial import METRIC, saved_point, total_steps
from vaemo.tuning.write import write_summary

TRIALS = 20
"""Trials of a sweep, where nobody says how many."""


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
    """Search over config fields, or go on with a sweep that was interrupted, and return its summary.

    Args:
        store: Path or URI of a feature store, on storage that every node sees.
        space: YAML file; see `vaemo.tuning.space`.
        out: The sweep's folder, on such storage too; see `vaemo.tuning.sweep`. More trials than before are added.
        config: What the space lies around, and trial 0. Its epochs say how many optimiser steps every trial makes.
        trials: How many in all; None is 20, or the whole grid.
        search: How points are drawn; None is `tpe`, or `random` without Optuna.
        scheduler: `asha` ends poor trials early, `none` none. `auto` is `asha`, but `none` where the sampling schedule
            is searched, since a run that is still fed labels looks poor when it runs free, and with several workers,
            whose CPUs Ray Tune would not free. `pbt` (population-based training) lets poor trials go on from good
            ones, with other values.
        workers: Processes that train one trial together; divides `train.lanes`.
        gpus: Share of a GPU for each process; None is a whole one where the cluster has any.
        folds: As for `vaemo.cluster.train`; the mean over folds is searched for.
        seeds: Trainings of each trial and fold, likewise.

    Raises:
        UsageError: for options that do not fit each other, or the space; see `read_space`.
        OtherRunError: if `out` holds a sweep with other settings or data.
        ClusterError: if the cluster has too few CPUs or GPUs, or nodes are lost and trials find no place again.
        SweepFailedError: if no trial ran to its end.
        VaemoError: what `vaemo.splits`, `vaemo.sessions` and `vaemo.training.trainer` raise of the data.
    """
    around = read_space(space, config)
    _check_options(around, search, scheduler, workers)
    method: Method = search or ("random" if scheduler == "pbt" else default_method())
    points = Search(around, method, config.train.seed)
    data = _read(store, config, folds)
    sessions = data.pack()
    dims = {stream: values.shape[-1] for stream, values in sessions.split(0, "train").features.items()}
    around.check_together(("model.prosody", "model.film"), lambda config: used_streams(config.model, dims))
    settings = {
        "space": around.to_plain(),
        "search": method,
        "scheduler": scheduler,
        "folds": folds,
        "seeds": seeds,
        **config.decisive(*SECTIONS),
    }
    fingerprint = digest(json.dumps(settings), config.features.speaker_aggregation, data.digest)
    claim_folder(out, MARKER, fingerprint, {"data": data.digest, "settings": settings}, inputs=data.store.parts)
    sweep = Sweep(out)
    wanted = trials or points.trials or TRIALS
    if points.trials is not None:
        wanted = min(wanted, points.trials)
    left = [number for number in range(wanted) if number not in sweep.records]
    if left:
        connect()
        check_visible([store, files.join(out, MARKER)])
        share = _gpu_share(gpus)
        slots = min(_slots(workers, share), len(left))
        finished = f", {wanted - len(left)} of them finished" if len(left) < wanted else ""
        say(f"{wanted} trials{finished}, {slots} at a time, {len(data.parts) * seeds} training(s) each")
        steps = total_steps(sessions, config)
        shared = ray.put(sessions)
        # What the driver looks at lies there too: it holds no features of its own from here on.
        sessions = ray.get(shared)
        job = Job(
            store=data.store,
            out=out,
            space=around,
            data=shared,
            steps=steps,
            origin=run_folder.origin_of(data.store, config, data.digest),
            seeds=seeds,
            workers=workers,
            gpus=share,
            patience_s=NO_PROGRESS_S,
        )
        for record in sweep.records.values():
            points.tell(record.number, record.point, record.value, stopped_at=record.stopped_at)
        deaths: Counter[int] = Counter()
        while left:
            job = dataclasses.replace(job, population=tuple(left) if scheduler == "pbt" else None)
            decider = make_scheduler(_decided(scheduler, around, workers), around, sweep, round(steps))
            _run(job, Recorder(job, sessions, sweep, points, wanted, deaths), decider, sweep, points, left, slots)
            # Ray Tune may end trials for the loss of a node, which have not failed: see `Recorder.on_trial_error`.
            left = [number for number in left if number not in sweep.records]
    summary = write_summary(sweep, around)
    best = summary["best"]
    say(f"done: dev CCC-avg {best[METRIC]:.3f}, trial {best['trial_id']} of {len(sweep.records)}; {out}/index.html")
    return summary


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
    if workers > 1 and scheduler in ("asha", "pbt"):
        raise UsageError(
            f"--scheduler {scheduler} ends or changes trials that train in one process; leave out --workers {workers}, "
            "or take --scheduler none."
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


def _decided(scheduler: Scheduler, space: Space, workers: int) -> Scheduler:
    """What `auto` stands for; others as they are."""
    if scheduler != "auto":
        return scheduler
    return "none" if space.searches_schedule or workers > 1 else "asha"


def _read(store: str, config: Config, folds: str | None) -> TrainingData:
    """What trials are to learn from, looked at."""
    data = TrainingData.open(store, config, folds)
    check_encoder_settings(config, None, data.store.info)
    data.check_labels()
    return data


def _gpu_share(gpus: float | None) -> float:
    there = total("GPU")
    if gpus is not None and gpus < 0:
        raise UsageError(f"--gpus {gpus:g}: give a share of a GPU, 0 or more.")
    share = float(there >= 1) if gpus is None else gpus
    if share > there:
        raise ClusterError(f"--gpus {share:g} for each process, and the Ray cluster has {there:g} GPUs.")
    return share


def _slots(workers: int, gpus: float) -> int:
    """Trials that run side by side."""
    cpus = int(total("CPU"))
    if cpus < workers:
        raise ClusterError(f"--workers {workers} need {workers} CPUs; the Ray cluster has {cpus}.")
    slots = cpus // workers
    return max(1, min(slots, int(total("GPU") / (gpus * workers)))) if gpus else slots


def _run(
    job: Job,
    recorder: Recorder,
    scheduler: TrialScheduler,
    sweep: Sweep,
    points: Search,
    left: Sequence[int],
    slots: int,
) -> None:
    """The trials that are left, on Ray Tune."""
    # The files of the trials are the record; Ray's own files and tables would only repeat them.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # What a failed trial reports has no metric.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Ctrl-C ends the job, as it ends every other.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    alone = job.workers == 1
    population = [_population_point(sweep, points, number) for number in job.population or ()]
    begun = {number: sweep.unfinished[number] for number in left if number in sweep.unfinished}
    # Workers reserve their own CPUs. A trial that waits for them needs none, but Ray Tune wants it to need something.
    resources = {"cpu": 1.0, "gpu": job.gpus} if alone else {"memory": 1.0}
    name = f"sweep-{uuid.uuid4().hex[:12]}"
    Tuner(
        with_resources(with_parameters(run_trial, job=job), resources),
        param_space={"point": grid_search(population)} if population else None,
        tune_config=TuneConfig(
            num_samples=1 if population else len(left),
            search_alg=None if population else Suggestions(points, sweep, left, begun),
            scheduler=scheduler,
            max_concurrent_trials=slots,
            # A process that has loaded torch is worth keeping; one that waits for workers cannot be ended in between.
            reuse_actors=alone,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=files.join(sweep.out, "_ray"),
            verbose=0,
            callbacks=[recorder],
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    ).fit()
    # Bookkeeping that nothing reads again, and of a population a checkpoint for every epoch.
    filesystem, inner = files.filesystem_of(files.join(sweep.out, "_ray", name))
    filesystem.delete_dir(inner)


def _population_point(sweep: Sweep, points: Search, number: int) -> Point:
    """Where a member of a population stands: at its own point, or where it was saved last."""
    if number not in sweep.unfinished:
        point = points.point(number)
        sweep.begin(number, point)
        return point
    state = read_state(sweep.folder(number))
    return sweep.unfinished[number] if state is None else saved_point(state)
