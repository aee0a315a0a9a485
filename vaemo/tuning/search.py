"""Which point is tried next: Optuna's TPE, at random, or a grid.

A search is told of every trial that has ended, also of those of an earlier run, and asked for the point of a trial by
its number. What it draws follows from (seed, number, what it was told), so that a sweep that goes on never draws again
what it drew before.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vaemo.errors import UsageError
from vaemo.extras import offers, remedy, version_of
from vaemo.tuning.space import Parameter, Point, Space

if TYPE_CHECKING:
    import optuna

Method = Literal["tpe", "random", "grid"]
METHODS: tuple[Method, ...] = ("tpe", "random", "grid")

Scheduler = Literal["auto", "asha", "none", "pbt"]
SCHEDULERS: tuple[Scheduler, ...] = ("auto", "asha", "none", "pbt")
"""What may end a trial before its end; see `vaemo.cluster.tune`."""


def default_method() -> Method:
    """How points are drawn where nobody says: by `tpe`, or at random and with one line where Optuna lacks."""
    return "tpe" if offers("optuna", "search by TPE, points are drawn at random") else "random"


class Search:
    """Points for trials 1, 2, ...; trial 0 is the config itself.

    Args:
        space: What is searched.
        method: One of `METHODS`.
        seed: Of everything that is drawn.

    Raises:
        UsageError: if a grid is asked for and the space has none, or `tpe` without Optuna.
    """

    def __init__(self, space: Space, method: Method, seed: int) -> None:
        self._space, self._seed = space, seed
        self._grid = [point for point in space.grid() if point != space.default()] if method == "grid" else None
        if method == "tpe" and version_of("optuna") is None:
            raise UsageError(f"--search tpe needs optuna: {remedy('optuna')}, or take --search random or grid.")
        self._study = _study() if method == "tpe" else None
        self._asked: dict[int, optuna.Trial] = {}

    @property
    def trials(self) -> int | None:
        """Trials of a whole grid, trial 0 included; None where there is no end."""
        return None if self._grid is None else len(self._grid) + 1

    def point(self, number: int) -> Point:
        """The point of a trial."""
        if number == 0:
            return self._space.default()
        if self._grid is not None:
            return self._grid[number - 1]
        if self._study is None:
            return self._space.draw(np.random.default_rng([self._seed, number]))
        self._study.sampler = _tpe(self._seed, number)
        trial = self._asked[number] = self._study.ask()
        point: Point = {}
        for parameter in self._space.parameters:
            if parameter.active(point):
                point[parameter.name] = _suggest(trial, parameter)
        return point

    def tell(self, number: int, point: Point, value: float | None, *, stopped_at: int | None = None) -> None:
        """What became of a trial.

        Args:
            number: Of the trial, whether it was asked for here or in an earlier run.
            point: Its point; one outside the space teaches nothing.
            value: The dev CCC; None where the trial has failed.
            stopped_at: The optimiser step at which the scheduler ended it; None where it ran to its end.
        """
        if self._study is None:
            return
        import optuna

        state = optuna.trial.TrialState.COMPLETE
        if value is None:
            state = optuna.trial.TrialState.FAIL
        elif stopped_at is not None:
            state = optuna.trial.TrialState.PRUNED
        if (trial := self._asked.pop(number, None)) is not None:
            if stopped_at is not None and value is not None:
                trial.report(value, stopped_at)
            complete = state == optuna.trial.TrialState.COMPLETE
            self._study.tell(trial, value if complete else None, state=state)
        elif self._space.holds(point):
            active = [parameter for parameter in self._space.parameters if parameter.name in point]
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params={p.name: _encode(p, point[p.name]) for p in active},
                    distributions={p.name: _distribution(p) for p in active},
                    intermediate_values={stopped_at: value} if stopped_at is not None and value is not None else {},
                )
            )


def _study() -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize")


def _tpe(seed: int, number: int) -> optuna.samplers.TPESampler:
    """Fields are drawn together, each combination of conditions by itself; trials under way count as poor ones."""
    import optuna

    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=drawn)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    name, last = parameter.name, len(parameter.values) - 1
    if parameter.kind == "choice":
        # By its number, and as a number where the choices ascend, so that near ones are near.
        if parameter.ordered:
            return parameter.values[trial.suggest_int(name, 0, last)]
        place = trial.suggest_categorical(name, tuple(range(last + 1)))
        return parameter.values[place]
    low, high = parameter.values
    if parameter.kind == "int":
        return trial.suggest_int(name, low, high)
    return trial.suggest_float(name, low, high, log=parameter.kind == "loguniform")


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """What `_suggest` draws from."""
    import optuna

    places = len(parameter.values)
    if parameter.kind == "choice" and parameter.ordered:
        return optuna.distributions.IntDistribution(0, places - 1)
    if parameter.kind == "choice":
        return optuna.distributions.CategoricalDistribution(tuple(range(places)))
    low, high = parameter.values
    if parameter.kind == "int":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=parameter.kind == "loguniform")


def _encode(parameter: Parameter, value: Any) -> Any:
    return parameter.values.index(value) if parameter.kind == "choice" else value
