"""Choice of the next point: Optuna's TPE, at random, or a grid; and the importance of each field.

A search gets the result of every finished trial, also of earlier runs, and is asked for the point of a trial by its
number. Its draws depend on (seed, number, results), so that a resumed sweep draws the same points. No point is drawn
twice.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
"""Schedulers that may end a trial early; see `vaemo.cluster.tune`."""


TRIES, COUNTED = 1_000, 100_000
"""How often a repeated point is drawn again; how many points of a space are listed instead."""

GOOD = 5
"""The least number of trials that count as good for `importance`."""


def default_method() -> Method:
    """How points are drawn by default: by `tpe`, or at random and with one line where Optuna lacks."""
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
        self._grid = _distinct(space.grid()) if method == "grid" else None
        if method == "tpe" and version_of("optuna") is None:
            raise UsageError(f"--search tpe needs optuna: {remedy('optuna')}, or take --search random or grid.")
        self._study = _study() if method == "tpe" else None
        self._asked: dict[int, optuna.Trial] = {}
        self._taken: set[str] = set()
        self.take(space.default())

    @property
    def trials(self) -> int | None:
        """Trials of a whole grid, trial 0 included; None where there is no end."""
        if self._grid is None:
            return None
        return len({*map(_key, self._grid), _key(self._space.default())})

    def take(self, point: Mapping[str, Any]) -> None:
        """Mark a point as used."""
        self._taken.add(_key(point))

    def point(self, number: int) -> Point | None:
        """The point of a trial; None where all points of the space are taken."""
        if number == 0:
            return self._space.default()
        point = self._draw(number)
        if point is None or _key(point) in self._taken:
            if (asked := self._asked.pop(number, None)) is not None and self._study is not None:
                self._study.tell(asked, state=_state("FAIL"))
            point = self._other(number)
        if point is not None:
            self.take(point)
        return point

    def _draw(self, number: int) -> Point | None:
        if self._grid is not None:
            return None
        if self._study is None:
            return self._space.draw(np.random.default_rng([self._seed, number]))
        self._study.sampler = _tpe(self._seed, number)
        trial = self._asked[number] = self._study.ask()
        return self._space.point(lambda parameter: _suggest(trial, parameter))

    def _other(self, number: int) -> Point | None:
        """A point that is not taken: the next one of a grid, any of a small space, else one that is drawn again."""
        if self._grid is not None:
            return next(self._left(self._grid), None)
        random = np.random.default_rng([self._seed, number, 1])
        if (drawn := next(self._left(self._space.draw(random) for _ in range(TRIES)), None)) is not None:
            return drawn
        if any(parameter.kind in ("uniform", "loguniform") for parameter in self._space.parameters):
            return None
        listed = list(self._left(itertools.islice(self._space.grid(), COUNTED)))
        return listed[random.integers(len(listed))] if listed else None

    def _left(self, points: Iterable[Point]) -> Iterator[Point]:
        return (point for point in points if _key(point) not in self._taken)

    def tell(self, number: int, point: Point, value: float | None, *, stopped_at: int | None = None) -> None:
        """Record the result of a trial.

        Args:
            number: Of the trial, whether it was asked for here or in an earlier run.
            point: Its point; one outside the space is ignored.
            value: The dev CCC; None where the trial has failed.
            stopped_at: The optimiser step at which the scheduler ended it; None where it ran to its end.
        """
        self.take(point)
        if self._study is None:
            return
        import optuna

        state = _state("FAIL" if value is None else "COMPLETE" if stopped_at is None else "PRUNED")
        if (trial := self._asked.pop(number, None)) is not None:
            if stopped_at is not None and value is not None:
                trial.report(value, stopped_at)
            complete = state == optuna.trial.TrialState.COMPLETE
            self._study.tell(trial, value if complete else None, state=state)
        elif self._space.holds(point):
            self._study.add_trial(_frozen(self._space, point, value, state, stopped_at))


def importance(space: Space, results: Iterable[tuple[Mapping[str, Any], float]]) -> dict[str, float | None]:
    """The importance of each field for good results, as shares that sum to 1.

    Optuna's PED-ANOVA: how differently a field is spread over the best trials (a tenth, but 5 at least) and over all.
    A field that was searched in some trials alone counts there. None where there are fewer than 10 trials, or the field
    was searched in none.

    Args:
        space: What was searched.
        results: Point and dev CCC of the trials that ran to their end.

    Source:
        Watanabe et al. (2023), PED-ANOVA, IJCAI; conditional fields as in optuna.importance.
    """
    found: dict[str, float | None] = dict.fromkeys(space.names)
    if version_of("optuna") is None:
        return found
    import optuna

    study = _study()
    for point, value in results:
        if space.holds(point):
            study.add_trial(_frozen(space, point, value, _state("COMPLETE"), None))
    if len(study.trials) < 2 * GOOD:
        return found
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, GOOD / len(study.trials)))
    with warnings.catch_warnings():
        # Of fields that were searched in a trial or two.
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {**found, **{name: float(share) for name, share in shares.items() if math.isfinite(share)}}


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def _distinct(points: Iterable[Point]) -> list[Point]:
    return list({_key(point): point for point in points}.values())


def _state(name: str) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[name]


def _frozen(
    space: Space, point: Mapping[str, Any], value: float | None, state: optuna.trial.TrialState, stopped_at: int | None
) -> optuna.trial.FrozenTrial:
    """A trial as Optuna holds it once it has ended."""
    import optuna

    active = [parameter for parameter in space.parameters if parameter.name in point]
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params={p.name: _encode(p, point[p.name]) for p in active},
        distributions={p.name: _distribution(p) for p in active},
        intermediate_values={stopped_at: value} if stopped_at is not None and value is not None else {},
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
    import optuna

    name, among = parameter.name, _distribution(parameter)
    if isinstance(among, optuna.distributions.CategoricalDistribution):
        drawn = trial.suggest_categorical(name, among.choices)
    elif isinstance(among, optuna.distributions.IntDistribution):
        drawn = trial.suggest_int(name, among.low, among.high)
    else:
        drawn = trial.suggest_float(name, among.low, among.high, log=among.log)
    return parameter.values[drawn] if parameter.kind == "choice" else drawn


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """What a field is drawn from: a choice by its number, as a number where choices ascend: near ones are near then."""
    import optuna

    low, high = parameter.values[0], parameter.values[-1]
    if parameter.kind == "choice":
        places = len(parameter.values)
        if parameter.ordered:
            return optuna.distributions.IntDistribution(0, places - 1)
        return optuna.distributions.CategoricalDistribution(tuple(range(places)))
    if parameter.kind == "int":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=parameter.kind == "loguniform")


def _encode(parameter: Parameter, value: Any) -> Any:
    return parameter.values.index(value) if parameter.kind == "choice" else value
