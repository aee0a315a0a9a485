"""A training as a job: its inputs and its output folder.

Folds, seeds, cells of the ablation grid and points of a sweep are all jobs. `Jobs` lists what to train and handles the
results; `run_here` runs one job after the other in this process, `vaemo.cluster.jobs` many side by side on Ray Tune.
What is finished is known from the jobs' folders alone.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vaemo import files
from vaemo.config import Config
from vaemo.errors import StorageError, TrainingFailedError, UsageError, VaemoError, mistake_of, revive
from vaemo.progress import say
from vaemo.training.group import Group

FAILURE = "failure.txt"
"""In the folder of a job that has failed: its traceback."""

Line = dict[str, Any]
"""What a job yields after an epoch, as JSON; `finished` is true in the last one."""


@dataclass(frozen=True)
class Job:
    """One training, or those of one point of a sweep.

    Attributes:
        number: From 0, among those of a run.
        name: In messages; empty where there is only one.
        out: Its output folder.
        config: Resolved; `train.seed` is the job's own.
        part: The fold, by name; empty for the one split, None for all folds together.
        data: Digest of what it learns from.
        point: Of a sweep: the values of the fields that are searched.
    """

    number: int
    name: str
    out: str
    config: Config
    part: str | None = ""
    data: str = ""
    point: Mapping[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Job:
        """Returns itself: a job is immutable, and Ray Tune copies its arguments."""
        return self


@dataclass(frozen=True)
class Place:
    """Where a job computes.

    Attributes:
        group: The workers that compute it together.
        device: Of this one.
        say: Where its progress is shown.
        saved: What `save` received, from this job or the one it continues; None if that is in its folder.
        save: Called before each line with what the job needs to continue; None if its folder suffices.
    """

    group: Group = field(default_factory=Group)
    device: torch.device | str = "cpu"
    say: Callable[[str], None] = say
    saved: bytes | None = None
    save: Callable[[bytes], None] | None = None


class Work(Protocol):
    """The work of all jobs of a run; sent to the workers."""

    def __call__(self, job: Job, sessions: Any, place: Place) -> Iterator[Line]:
        """Train, continuing from the job's folder; every worker of a group yields the same number of lines."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why a job has failed.

    Attributes:
        text: The error in one line.
        trace: The traceback.
        kind: Class of a `VaemoError`; empty for an internal error.
        message: Of it.
    """

    text: str
    trace: str
    kind: str = ""
    message: str = ""

    @staticmethod
    def of(error: BaseException) -> Failure:
        """For what a job raised."""
        trace = "".join(traceback.format_exception(error))
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        mistake = mistake_of(error) if isinstance(error, (VaemoError, OSError)) else None
        if mistake is None:
            return Failure(text, trace)
        return Failure(text, trace, type(mistake).__name__, mistake.message)

    def error(self, job: Job) -> VaemoError:
        """To be raised."""
        if self.kind:
            return revive(self.kind, self.message)
        of = f"{job.name} failed" if job.name else "training failed"
        return TrainingFailedError(f"{of}: {self.text}. The traceback is in {files.join(job.out, FAILURE)}.")


@dataclass(frozen=True)
class Jobs:
    """The jobs for a runner.

    Attributes:
        work: The work of each job.
        jobs: In order; asked for one by one, so that the next may depend on what has `ended`.
        pack: What the jobs of a part learn from, which all of them share; of None, what all jobs learn from.
        ended: Called with every finished job and its last line, or its failure.
        count: The most jobs there can be.
        storage: A folder for the runner's own records.
        apart: Whether every part has sessions of its own.
        needs: Paths that every worker reads.
        deaths: How often the process of a job may die; the job then continues from its folder.
        heard: Called with every other line.
        again: Prepares a job to be started again from its folder.
    """

    work: Work
    jobs: Iterable[Job]
    pack: Callable[[str | None], Any]
    ended: Callable[[Job, Line, Failure | None], None]
    count: int
    storage: str
    apart: bool = False
    needs: Sequence[str] = ()
    deaths: int = 3
    heard: Callable[[Job, Line], None] = lambda job, line: None
    again: Callable[[Job], Job] = lambda job: job

    def part(self, job: Job) -> str | None:
        """The part whose sessions a job trains on; None if all jobs share them."""
        return job.part if self.apart else None

    def end(self, job: Job, line: Line, failure: Failure | None) -> None:
        """Save the traceback of a failed job in its folder, and call `ended`."""
        path = files.join(job.out, FAILURE)
        if failure:
            files.write_whole(path, failure.trace.encode())
        elif files.exists(path):
            files.delete(path)
        self.ended(job, line, failure)


def run_here(jobs: Jobs, *, workers: int = 1) -> None:
    """Run jobs in this process, one after the other; starts no Ray.

    Raises:
        UsageError: for more than one worker.
        StorageError: if a disk is full or refuses access; the job can be resumed.
    """
    if workers > 1:
        raise UsageError(f"{workers} workers train together on Ray; in this process (executor 'process') there is one.")
    part, sessions = None, None
    with one_thread():
        for job in jobs.jobs:
            line, failure = {}, None
            try:
                if sessions is None or jobs.part(job) != part:
                    part = jobs.part(job)
                    sessions = jobs.pack(part)
                for line in jobs.work(job, sessions, Place()):
                    jobs.heard(job, line)
            except Exception as error:
                failure = Failure.of(error)
                if failure.kind == StorageError.__name__:
                    raise failure.error(job) from error
            jobs.end(job, line, failure)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread in the block: small models gain nothing from more, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
