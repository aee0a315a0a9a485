"""The course of a sweep: which trial comes next and at which point, and what becomes of its result. Knows no Ray."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from vaemo.errors import UsageError
from vaemo.progress import duration, say
from vaemo.training.data import SplitSessions
from vaemo.training.jobs import Failure, Job, Line
from vaemo.tuning.search import Search
from vaemo.tuning.space import Point, Space
from vaemo.tuning.sweep import DONE, FAILED, STOPPED, Record, Sweep
from vaemo.tuning.trial import METRIC, equal_steps, read_state, saved_point, total_steps

SHOWN_EVERY_S = 10.0


class Course:
    """The jobs of a sweep in turn, and the handling of their results.

    Args:
        sweep: What has been found so far; added to.
        points: The search; told of it.
        space: What is searched.
        sessions: What the trials learn from, without features.
        data: Digest of what they learn from.
        trials: How many there will be in all.

    Attributes:
        steps: Optimiser steps that every training makes, as nearly as whole epochs allow.
    """

    def __init__(
        self, sweep: Sweep, points: Search, space: Space, sessions: SplitSessions, data: str, trials: int
    ) -> None:
        self.steps = total_steps(sessions, space.config)
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
