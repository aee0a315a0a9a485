"""Trainings side by side on Ray Tune: folds, seeds, cells of a grid, points of a sweep.

Ray Tune places the jobs, reuses their processes, restarts jobs whose process has died, and ends poor ones early where a
scheduler decides so. What is finished is known from the jobs' own folders: Tune's record of an experiment, which it
reads back by unpickling, is never read, and is deleted at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner, grid_search, with_parameters, with_resources
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from vaemo import files
from vaemo.cluster.desk import Desk, ask_to_stop, asked_to_stop, fetch, tell
from vaemo.cluster.group import run_group
from vaemo.cluster.nodes import Share, check_visible
from vaemo.cluster.runtime import NO_PROGRESS_S, connect
from vaemo.errors import ClusterError, StorageError
from vaemo.progress import say
from vaemo.training.group import Group, ProcessGroup
from vaemo.training.jobs import Failure, Job, Jobs, Line, Place, Work, one_thread

_STATE = "state.safetensors"
_NO_PLACE, _FAILED = "no_place", "failed"
"""Reported by a job whose workers found no place on the cluster, or that failed."""


def run_jobs(
    jobs: Jobs,
    *,
    workers: int = 1,
    gpus: float | None = None,
    decide: Callable[[], TrialScheduler] = FIFOScheduler,
    population: bool = False,
) -> None:
    """Run jobs on the cluster, as many side by side as fit.

    Args:
        jobs: The jobs to run.
        workers: Processes that compute one job together.
        gpus: Share of a GPU for each of them; None is a whole one for a job alone or one of several workers, a quarter
            for others, where the cluster has any.
        decide: Makes the scheduler, which sees the lines of the jobs.
        population: Whether it restarts poor jobs from good ones, with their `config` and `point`.

    Raises:
        ClusterError: if the cluster has too few CPUs or GPUs, a node does not see what is needed, or nodes are lost
            and jobs find no place again.
        StorageError: if a disk is full or refuses.
    """
    connect()
    share = Share.of(workers, gpus, jobs.count)
    check_visible(jobs.needs)
    if jobs.count > 1:
        say(f"{share.at_once} at a time")
    with Desk(jobs.pack) as desk:
        run = _Run(jobs, desk)
        for _ in run.rounds():
            _run_round(run, share, decide(), population)
    run.raise_held()


@dataclass(frozen=True)
class _Shared:
    """The data sent to the processes of all jobs."""

    work: Work
    desk: Any
    share: Share
    storage: str
    apart: bool
    deaths: int
    patience_s: float
    population: tuple[Job, ...]

    def job(self, given: dict[str, Any], trial_id: str) -> Job:
        """The job of a trial: a member of a population keeps its folder, and takes over the values of another."""
        job: Job = given["job"]
        if not self.population:
            return job
        # Tune's ids of a grid end in the place of the trial.
        own = self.population[int(trial_id.rpartition("_")[2])]
        return dataclasses.replace(own, config=job.config, point=job.point)


class _Run:
    """The state of the jobs over all rounds."""

    def __init__(self, jobs: Jobs, desk: Desk) -> None:
        self.jobs, self.desk = jobs, desk
        self.begun: dict[int, Job] = {}
        self._coming = iter(jobs.jobs)
        self._again: list[Job] = []
        self._deaths: Counter[int] = Counter()
        self._held: BaseException | None = None
        self._left = Counter(jobs.part(job) for job in jobs.jobs) if isinstance(jobs.jobs, list) else Counter()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickles as nothing: Ray Tune pickles its arguments into a file that is never read."""
        return object, ()

    def rounds(self) -> Iterator[int]:
        """One round, and more while Ray Tune has given up jobs that did not fail: see `_Told.on_trial_error`."""
        number = 0
        while number == 0 or (self.begun and self._held is None):
            self._again = [self.jobs.again(job) for job in self.begun.values()]
            yield number
            number += 1

    def next(self) -> Job | None:
        """The next job to be run; None where there is none left."""
        try:
            job = self._again.pop(0) if self._again else next(self._coming, None)
            if job is not None:
                self.desk.hold(self.jobs.part(job))
                self.begun[job.number] = job
        except Exception as error:
            # If raised here, Ray Tune would continue with the others.
            self._held = error
            return None
        return job

    def end(self, job: Job, line: Line, failure: Failure | None) -> None:
        """A job has ended."""
        if self._held is not None or job.number not in self.begun:
            return
        try:
            self.jobs.end(job, line, failure)
        except Exception as error:
            self._held = error
            return
        del self.begun[job.number]
        part = self.jobs.part(job)
        self._left[part] -= 1
        if not self._left[part]:
            self.desk.drop(part)

    def died(self, job: Job, times: int, raised: Any) -> None:
        """Its process has died, and Ray Tune does not restart it."""
        self._deaths[job.number] += max(1, times)
        if self._deaths[job.number] > self.jobs.deaths:
            told = f"{type(raised).__name__}: {raised}".splitlines()[0] if raised else "unknown"
            self.end(job, {}, _died(self.jobs.deaths, told))

    def hold(self, error: BaseException) -> None:
        """Keep the error that ends the run; the first counts."""
        self._held = self._held or error

    def raise_held(self) -> None:
        """Raise the error that ends the run, if there is one."""
        if self._held is not None:
            raise self._held


def _died(deaths: int, told: str) -> Failure:
    text = f"its process died {deaths + 1} times ({told})"
    return Failure(
        text,
        text,
        ClusterError.__name__,
        f"{text}: out of memory, or nodes that come and go. Run the same command again.",
    )


class _Next(Searcher):
    """Hands Ray Tune one job after the other."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def suggest(self, trial_id: str) -> Any:
        """The next job."""
        job = self._run.next()
        return Searcher.FINISHED if job is None else {"job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: `_Told` handles it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the jobs' folders are the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Gently(FIFOScheduler):
    """Ends jobs of several workers early by asking them, as another scheduler decides.

    Ray Tune would kill the process that waits for them, and with it Ray Train's controller: in Ray 2.60 the CPUs of its
    workers stay reserved then, until a cleaner notices that asks the dashboard, which need not be there.
    """

    def __init__(self, decider: TrialScheduler, desk: Any) -> None:
        super().__init__()
        self._decider, self._desk = decider, desk
        self._asked: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Forward to the scheduler."""
        self._decider.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue, and let the workers stop by themselves."""
        asked = trial.trial_id in self._asked
        if not asked and self._decider.on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            ask_to_stop(self._desk, trial.config["job"].number)
            self._asked.add(trial.trial_id)
        return TrialScheduler.CONTINUE


class _Told(Callback):
    """Callbacks of Ray Tune on the jobs."""

    def __init__(self, run: _Run, shared: _Shared) -> None:
        self._run, self._shared = run, shared
        self._running = time.monotonic()

    def _job(self, trial: Any) -> Job:
        return self._shared.job(trial.config, trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A job has reported a line, a lack of resources, or a failure of storage."""
        if _NO_PLACE in result:
            self._run.hold(_no_place(self._shared.patience_s))
        elif _FAILED not in result:
            self._run.jobs.heard(self._job(trial), result)
        elif (failure := Failure(**result[_FAILED])).kind == StorageError.__name__:
            self._run.hold(failure.error(self._job(trial)))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Ray Tune ten times a second; checks for jobs that would wait for resources for ever."""
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._running = time.monotonic()
        if time.monotonic() - self._running > self._shared.patience_s:
            self._run.hold(_no_place(self._shared.patience_s))
        # From another method, Ray Tune would wrap the error.
        self._run.raise_held()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job has ended, by itself or by the scheduler."""
        line = dict(trial.last_result)
        failed = line.get(_FAILED)
        self._run.end(self._job(trial), line, Failure(**failed) if failed else None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a job has died too often, or Ray Tune has given up the job before that.

        It does that where two calls to one process fail with it, as they do when a node is lost: the first failure
        restarts the job, the second finds it not yet running. Such a job continues in the next round.
        """
        self._run.died(self._job(trial), trial.num_failures, trial.get_pickled_error())


def _no_place(patience_s: float) -> ClusterError:
    return ClusterError(
        f"no training found a place on the cluster for {patience_s:g} s: a node was lost and none came in its place, "
        "or other jobs hold the CPUs. Run the same command again, with fewer --workers if the cluster stays smaller: "
        "what is finished is kept, the others go on."
    )


def _run_round(run: _Run, share: Share, scheduler: TrialScheduler, population: bool) -> None:
    """Jobs until none is left, on one `Tuner`."""
    os.environ |= {
        # The jobs' own files are the record; Ray's would only repeat them.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        # A failed job reports no metric.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        # Ctrl-C ends the job, as it ends every other.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    # Ray Tune accepts no searcher with a population: its members are passed all at once.
    members = tuple(iter(run.next, None)) if population else ()
    alone = share.workers == 1
    name, jobs = f"jobs-{uuid.uuid4().hex[:12]}", run.jobs
    shared = _Shared(jobs.work, run.desk.actor, share, jobs.storage, jobs.apart, jobs.deaths, NO_PROGRESS_S, members)
    # Workers reserve their own CPUs. The job that waits for them needs none, but Ray Tune requires some resource.
    resources = {"cpu": 1.0, "gpu": share.gpus} if alone else {"memory": 1.0}
    try:
        Tuner(
            with_resources(with_parameters(_run_job, shared=shared), resources),
            param_space={"job": grid_search(list(members))} if members else None,
            tune_config=TuneConfig(
                num_samples=1 if members else -1,
                search_alg=None if members else _Next(run),
                scheduler=scheduler if alone else _Gently(scheduler, run.desk.actor),
                max_concurrent_trials=share.at_once,
                # Reuse processes, which have loaded torch.
                reuse_actors=alone,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=jobs.storage,
                verbose=0,
                callbacks=[_Told(run, shared)],
                failure_config=FailureConfig(max_failures=jobs.deaths),
            ),
        ).fit()
    finally:
        # Records that are never read again, and a checkpoint per epoch of a population.
        filesystem, inner = files.filesystem_of(jobs.storage)
        with contextlib.suppress(OSError):
            filesystem.delete_dir(inner)


def _run_job(given: dict[str, Any], shared: _Shared) -> None:
    """A job, in its own process; an error is its result, and does not end the others."""
    job = shared.job(given, tune.get_context().get_trial_id())
    try:
        if shared.share.workers > 1:
            _fit_together(job, shared)
            return
        saved = None
        if (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                saved = Path(folder, _STATE).read_bytes()
        held: list[bytes] = []
        device = "cuda" if shared.share.gpus and torch.cuda.is_available() else "cpu"
        place = Place(Group(), device, _say(shared, job), saved, held.append if shared.population else None)
        with one_thread():
            for line in shared.work(job, fetch(shared.desk, job.part if shared.apart else None), place):
                if not held:
                    tune.report(line)
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    files.write_whole(files.join(folder, _STATE), held.pop())
                    tune.report(line, checkpoint=tune.Checkpoint.from_directory(folder))
    except Exception as error:
        _report(Failure.of(error))


def _report(failure: Failure) -> None:
    tune.report({_FAILED: dataclasses.asdict(failure), "finished": False})


def _say(shared: _Shared, job: Job) -> Callable[[str], None]:
    """Prints lines of a job on the driver."""
    prefix = f"{job.name}, " if job.name else ""
    return lambda text: tell(shared.desk, prefix + text)


def _fit_together(job: Job, shared: _Shared) -> None:
    """A job on several workers: a run of Ray Train that reports to Tune."""
    try:
        run_group(
            _work_together,
            (job, shared),
            workers=shared.share.workers,
            gpus=shared.share.gpus,
            name=f"job-{job.number:04d}-{uuid.uuid4().hex[:12]}",
            storage=shared.storage,
            max_failures=shared.deaths,
            patience_s=shared.patience_s,
            callbacks=[TuneReportCallback()],
        )
    except ControllerError:
        tune.report({_NO_PLACE: True, "finished": False})
    except WorkerGroupError as error:
        failures = error.worker_failures.values()
        if not all(isinstance(failure, RayActorError) for failure in failures):
            raise
        _report(_died(shared.deaths, type(next(iter(failures))).__name__))


def _work_together(given: tuple[Job, _Shared]) -> dict[str, Any]:
    """The work of every worker of a job."""
    job, shared = given
    group, device = ProcessGroup(), ray.train.torch.get_device()
    place = Place(group, device, _say(shared, job))
    with one_thread():
        for line in shared.work(job, fetch(shared.desk, job.part if shared.apart else None), place):
            # Every worker waits here, so that all have reached the saved state.
            ray.train.report(line)
            asked = group.rank == 0 and not line["finished"] and asked_to_stop(shared.desk, job.number)
            if int(group.add(torch.tensor(int(asked), device=device))):
                break
    return {}
