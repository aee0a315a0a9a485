"""How a sweep speaks with Ray Tune: which trial comes next, which is ended early, what each of them gave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from vaemo.cluster.tune_trial import MAX_FAILURES, NO_PLACE, NO_STORAGE, Job
from vaemo.errors import ClusterError, StorageError, UsageError
from vaemo.progress import duration, say
from vaemo.training.data import SplitSessions
from vaemo.tuning.search import Scheduler, Search
from vaemo.tuning.space import Point, Space
from vaemo.tuning.sweep import DONE, FAILED, STOPPED, Record, Sweep
from vaemo.tuning.trial import METRIC, equal_steps, schedule_end

SHOWN_EVERY_S = 10.0

GRACE, REDUCTION = 0.25, 2
"""ASHA ends no trial before this share of its steps, or before the sampling schedule's end where that is later; from
there on, at every doubling, those that are not in the better half."""

PERTURBATIONS = 10
"""How often population-based training compares, over the steps of a trial."""


def make_scheduler(name: Scheduler, space: Space, sweep: Sweep, steps: int) -> TrialScheduler:
    """What decides, at the end of each epoch, whether a trial goes on.

    Args:
        name: See `vaemo.cluster.tune.tune`; not `auto`, which is decided there.
        space: What is searched.
        sweep: What has been found so far.
        steps: Optimiser steps of a trial.
    """
    if name == "pbt":
        random = np.random.default_rng([space.config.train.seed, len(sweep.records)])
        return PopulationBasedTraining(
            time_attr="step",
            metric=METRIC,
            mode="max",
            perturbation_interval=max(steps / PERTURBATIONS, 1),
            custom_explore_fn=lambda given: {**given, "point": space.perturb(given["point"], random)},
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
    # What earlier trials reached decides over those to come, also after a restart.
    for record in sweep.records.values():
        # Neither method looks at the controller, or at more of a trial than this.
        earlier: Any = SimpleNamespace(trial_id=record.trial_id, config={"number": record.number})
        asha.on_trial_add(None, earlier)  # type: ignore[arg-type]
        for step, value in record.curve:
            asha.on_trial_result(None, earlier, {"step": step, METRIC: value})
    return asha


class _Asha(AsyncHyperBandScheduler):
    """Lets trial 0 run to its end, however poor: it is what the others are compared with."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else action


class Suggestions(Searcher):
    """Hands Ray Tune the points of the trials that are left, those under way first."""

    def __init__(self, points: Search, sweep: Sweep, left: Sequence[int], begun: Mapping[int, Point]) -> None:
        super().__init__()
        self._points, self._sweep, self._begun = points, sweep, begun
        self._left = sorted(left, key=lambda number: (number not in begun, number))

    def suggest(self, trial_id: str) -> Any:
        """The number and the point of the next trial."""
        if not self._left:
            return Searcher.FINISHED
        number = self._left.pop(0)
        point = self._begun.get(number)
        if point is None:
            point = self._points.point(number)
            self._sweep.begin(number, point)
        return {"number": number, "point": point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the recorder tells the search."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder holds what is needed to go on."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Recorder(Callback):
    """Keeps what each trial gave, tells the search, and shows how far the sweep is.

    Args:
        job: What the trials share.
        sessions: What they learn from.
        sweep: What has been found so far.
        points: The search.
        trials: How many there will be in all.
        deaths: How often the process of each trial has died, by its number; added to.
    """

    def __init__(
        self, job: Job, sessions: SplitSessions, sweep: Sweep, points: Search, trials: int, deaths: Counter[int]
    ) -> None:
        self._job, self._sessions, self._sweep, self._points = job, sessions, sweep, points
        self._trials, self._deaths = trials, deaths
        self._before = len(sweep.records)
        self._started = self._shown = self._running = time.monotonic()
        self._no_place = False
        self._no_storage: str | None = None

    @property
    def _ends(self) -> bool:
        """Whether the sweep is about to end before its trials do."""
        return self._no_place or self._no_storage is not None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch of a trial has ended, or its workers found no place, or it could not read or write."""
        # Raised from here, Ray Tune would wrap it.
        self._no_place |= NO_PLACE in result
        self._no_storage = self._no_storage or result.get(NO_STORAGE)
        if METRIC in result and time.monotonic() - self._shown > SHOWN_EVERY_S:
            number = self._job.number(trial.config, trial.trial_id)
            self._say(
                f"trial {number:04d}: step {result['step']:,} of {self._job.steps:,.0f}, dev CCC {result[METRIC]:.3f}"
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ray Tune has looked around, as it does ten times a second; it would wait for a place for ever."""
        patience_s = self._job.patience_s
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._running = time.monotonic()
        if self._no_storage:
            raise StorageError(self._no_storage)
        if self._no_place or time.monotonic() - self._running > patience_s:
            raise ClusterError(
                f"no trial found a place on the cluster for {patience_s:g} s: a node was lost and none came in its "
                "place, or other jobs hold the CPUs. Run the same command again, with fewer --workers if the cluster "
                "stays smaller: finished trials are kept, the others go on."
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or by the scheduler."""
        if not self._ends:
            self._end(trial, trial.last_result.get("error"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a trial has died once too often, or Ray Tune has given it up before.

        It does that where two calls to one process fail with it, as they do when a node is lost: the first failure has
        the trial started again, the second finds it not yet running. Such a trial goes on in the next round.
        """
        number = self._job.number(trial.config, trial.trial_id)
        self._deaths[number] += max(1, trial.num_failures)
        if self._deaths[number] <= MAX_FAILURES or self._ends:
            return
        raised = trial.get_pickled_error()
        told = f"{type(raised).__name__}: {raised}".splitlines()[0] if raised else "unknown"
        self._end(trial, f"its process died {MAX_FAILURES + 1} times ({told})")

    def _end(self, trial: Any, error: str | None) -> None:
        record = self._record(trial, error)
        try:
            self._sweep.end(record)
        except StorageError as failed:
            self._no_storage = str(failed)
            return
        self._points.tell(record.number, record.point, record.value, stopped_at=record.stopped_at)
        values = ", ".join(f"{name} {_short(value)}" for name, value in record.point.items())
        gave = f"failed, {error}" if error else f"dev CCC {record.value:.3f}"
        self._say(f"trial {record.trial_id}: {gave}{', ended early' if record.status == STOPPED else ''} ({values})")

    def _record(self, trial: Any, error: str | None) -> Record:
        result, point, space = trial.last_result, trial.config["point"], self._job.space
        try:
            config = equal_steps(space.apply(point), self._sessions, self._job.steps)
        except UsageError:
            # It is why the trial failed.
            config = space.config
        return Record(
            number=self._job.number(trial.config, trial.trial_id),
            status=FAILED if error else DONE if result["finished"] else STOPPED,
            point=point,
            config=config.to_dict(),
            metrics={key: result[key] for key in result.get("measured", ())},
            curve=[(step, value) for step, value in result.get("curve", ())],
            error=error,
        )

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
