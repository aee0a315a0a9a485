"""Search spaces: YAML files that name config fields and the values to be tried.

    model.updater: {choice: [mamba, gru]}
    train.lr: {loguniform: [1.0e-4, 1.0e-2]}
    updater.d_state: {choice: [8, 16, 32], when: {model.updater: mamba}}

A field under `when` is searched only where the named choice took that value (or one of a list); elsewhere it stays as
the config has it. A *point* is a dict from the fields that are searched in it to their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vaemo.config import TOGETHER, Config, decides, fitting, nearest, strict_yaml, suggest
from vaemo.config.fields import number, shown
from vaemo.errors import ConfigValueError, UnknownConfigKeyError, UsageError, VaemoError

KINDS = ("choice", "uniform", "loguniform", "int")

SEARCHABLE = ("model", "updater", "train")
"""Sections that a trial may change; the others decide the data, which all trials share."""

FIXED = {
    "train.epochs": "it follows from the optimiser steps, of which all trials make equally many",
    "train.seed": "--seeds trains each point with several",
    "train.encoder": "the encoder is trained by jobs/train.py --manifest",
    "model.label_range": "trials would be judged on other scales",
    "model.targets": "trials would be judged on other targets",
}
"""Fields that a space may not name, and why."""

SCHEDULE = frozenset(
    {
        "model.feedback",
        "train.sampling_hold_fraction",
        "train.sampling_end_fraction",
        "train.no_feedback_fraction",
    }
)
"""Fields of the sampling schedule, which decides until when labels are fed."""

WHILE_TRAINING = SCHEDULE | {
    "model.feedback_noise",
    "train.lr",
    "train.weight_decay",
    "train.clip",
    "train.mse_weight",
    "train.observed_fraction",
    "train.feature_noise",
}
"""Fields that may change between two epochs of one model: those that population-based training may search."""

_RESAMPLED, _FACTORS = 0.25, (0.8, 1.2)
"""How population-based training explores: this share of the values is drawn again, the others move by a factor or to
the neighbouring choice (Jaderberg et al. 2017)."""

Point = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One field that is searched.

    Attributes:
        name: `section.key`.
        kind: One of `KINDS`.
        values: The choices, or the least and the greatest value.
        when: Fields before it, and the values that each may have for this one to be searched.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]

    @property
    def ordered(self) -> bool:
        """Whether it is a number, also one of ascending choices: near values then mean near results."""
        if self.kind != "choice":
            return True
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)
        return numbers and list(self.values) == sorted(self.values)

    def active(self, point: Mapping[str, Any]) -> bool:
        """Whether it is searched, given the fields before it."""
        return all(name in point and point[name] in allowed for name, allowed in self.when.items())

    def holds(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        if self.kind == "choice":
            return value in self.values
        return self.values[0] <= value <= self.values[1]

    def draw(self, random: np.random.Generator) -> Any:
        """A value at random."""
        if self.kind == "choice":
            return self.values[random.integers(len(self.values))]
        low, high = self.values
        if self.kind == "int":
            return int(random.integers(low, high + 1))
        if self.kind == "loguniform":
            return float(math.exp(random.uniform(math.log(low), math.log(high))))
        return float(random.uniform(low, high))

    def nudge(self, value: Any, random: np.random.Generator) -> Any:
        """A value nearby."""
        if self.kind == "choice":
            place = self.values.index(value) + random.choice((-1, 1))
            return self.values[min(max(place, 0), len(self.values) - 1)]
        low, high = self.values
        moved = min(max(value * random.choice(_FACTORS), low), high)
        return round(moved) if self.kind == "int" else float(moved)


@dataclass(frozen=True)
class Space:
    """The fields that are searched, in the file's order, around a config.

    Attributes:
        config: Gives every other field, and trial 0.
        parameters: At least one.
    """

    config: Config
    parameters: tuple[Parameter, ...]

    @property
    def names(self) -> list[str]:
        """The fields that are searched."""
        return [parameter.name for parameter in self.parameters]

    @property
    def searches_schedule(self) -> bool:
        """Whether the sampling schedule itself is searched."""
        return not SCHEDULE.isdisjoint(self.names)

    def point(self, value: Callable[[Parameter], Any]) -> Point:
        """The point with these values, asked for in the order of the fields that are searched in it."""
        point: Point = {}
        for parameter in self.parameters:
            if parameter.active(point):
                point[parameter.name] = value(parameter)
        return point

    def default(self) -> Point:
        """The point of the config; it may be outside the space."""
        return self.point(lambda parameter: field_of(self.config, parameter.name))

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether a point can be drawn."""
        active = [parameter for parameter in self.parameters if parameter.active(point)]
        return len(active) == len(point) and all(p.name in point and p.holds(point[p.name]) for p in active)

    def draw(self, random: np.random.Generator) -> Point:
        """A point at random."""
        return self.point(lambda parameter: parameter.draw(random))

    def perturb(self, point: Mapping[str, Any], random: np.random.Generator) -> Point:
        """A point nearby, as population-based training explores."""

        def near(parameter: Parameter) -> Any:
            known = parameter.name in point and parameter.holds(point[parameter.name])
            keep = known and random.random() >= _RESAMPLED
            return parameter.nudge(point[parameter.name], random) if keep else parameter.draw(random)

        return self.point(near)

    def grid(self) -> Iterator[Point]:
        """Every point, the last field changing fastest.

        Raises:
            UsageError: for a field that is not a choice or a range of whole numbers.
        """
        for parameter in self.parameters:
            if parameter.kind in ("uniform", "loguniform"):
                raise UsageError(
                    f"a grid cannot go through {parameter.name}, which is {parameter.kind}; give it as a choice, or "
                    "search with --search tpe or random."
                )
        yield from _grid(self.parameters, {})

    def check_together(self, names: Collection[str], check: Callable[[Config], Any] | None = None) -> None:
        """Refuse a space in which some values of these fields, each valid alone, are invalid together.

        Args:
            names: Every combination of their values is tried; of a range of numbers its two ends.
            check: Raises an error for an invalid config; None validates the config alone.

        Raises:
            ConfigValueError: naming the first such combination.
        """
        wanted = set(names) & set(self.names)
        for parameter in reversed(self.parameters):
            if parameter.name in wanted:
                wanted |= parameter.when.keys()
        for point in _grid([parameter for parameter in self.parameters if parameter.name in wanted], {}):
            try:
                config = self.apply(point)
                if check:
                    check(config)
            except VaemoError as error:
                values = ", ".join(f"{name}={value}" for name, value in point.items())
                together = f"{values} do not go together: " if values else ""
                raise ConfigValueError(f"{together}{error}") from None

    def apply(self, point: Mapping[str, Any]) -> Config:
        """The config at a point.

        Raises:
            ConfigValueError: if the values contradict each other.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, value in point.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        return self.config.replace(sections)

    def to_plain(self) -> dict[str, Any]:
        """As in the file, fit for JSON."""
        return {
            parameter.name: {
                parameter.kind: list(parameter.values),
                **({"when": {name: list(values) for name, values in parameter.when.items()}} if parameter.when else {}),
            }
            for parameter in self.parameters
        }


def shipped_spaces() -> dict[str, Path]:
    """The files of `tune_spaces` by name: those of the checkout, else those that were installed with vaemo."""
    folder = Path(__file__).parents[2] / "tune_spaces"
    if folder.is_dir():
        found = list(folder.glob("*.yaml"))
    else:
        installed = metadata.files("vaemo") or ()
        found = [Path(str(file.locate())) for file in installed if file.match("vaemo/tune_spaces/*.yaml")]
    return {path.stem: path for path in sorted(found)}


def read_space(path: str | Path, config: Config) -> Space:
    """The space in a YAML file, every value checked as the config checks it.

    Args:
        path: The file, or the name of one of `shipped_spaces`.
        config: The config around which the space is.

    Raises:
        UnknownConfigKeyError: for a field that does not exist, with the nearest one.
        ConfigValueError: if the file cannot be read, an entry is not understood, a field may not be searched, or a
            value is invalid.
    """
    shipped = shipped_spaces()
    file = shipped[str(path)] if str(path) in shipped and not Path(path).exists() else Path(path)
    try:
        loaded = strict_yaml.load(file.read_bytes(), f"space '{path}'")
    except OSError as error:
        raise ConfigValueError(
            f"space '{path}' cannot be read ({type(error).__name__}); give a YAML file, or one of {', '.join(shipped)}."
        ) from None
    except strict_yaml.NotPlainYaml as error:
        raise ConfigValueError(f"space '{path}' is not YAML that can be read: {error}.") from None
    if not isinstance(loaded, strict_yaml.Section) or not loaded:
        raise ConfigValueError(
            f"space '{path}' names no field; give lines such as model.alpha: {{uniform: [0.5, 0.95]}}."
        )
    parameters: dict[str, Parameter] = {}
    for name, entry in loaded.items():
        try:
            parameters[name] = _parameter(str(name), entry, config, parameters)
        except UsageError as error:
            raise type(error)(f"{loaded.places[name]}{error}") from None
    space = Space(config, tuple(parameters.values()))
    try:
        for names in TOGETHER:
            space.check_together(names)
    except UsageError as error:
        raise type(error)(f"space '{path}': {error}") from None
    return space


def field_of(config: Config, name: str) -> Any:
    """The value of `section.key`, a list where it is several, as JSON gives it back."""
    section, _, key = name.partition(".")
    return _as_saved(getattr(getattr(config, section), key))


def _as_saved(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _grid(parameters: Sequence[Parameter], point: Point) -> Iterator[Point]:
    """Every combination of the values from which a point continues; of a range of numbers its ends."""
    if not parameters:
        yield point
        return
    parameter, *rest = parameters
    if not parameter.active(point):
        yield from _grid(rest, point)
        return
    whole = range(parameter.values[0], parameter.values[-1] + 1) if parameter.kind == "int" else None
    for value in whole or parameter.values:
        yield from _grid(rest, {**point, parameter.name: value})


def _parameter(name: str, entry: Any, config: Config, before: Mapping[str, Parameter]) -> Parameter:
    _check_name(name, config)
    if not isinstance(entry, Mapping):
        raise ConfigValueError(f"{name} holds {shown(entry)}; give one of {_examples()}.")
    kinds = [key for key in entry if key in KINDS]
    strangers = [str(key) for key in entry if key not in (*KINDS, "when")]
    if strangers or len(kinds) != 1:
        found = strangers[0] if strangers else (" and ".join(kinds) or "none")
        raise ConfigValueError(f"{name} has {found}; give exactly one of {', '.join(KINDS)}, and `when` if needed.")
    kind, values = kinds[0], entry[kinds[0]]
    if not isinstance(values, list) or not values:
        raise ConfigValueError(f"{name}: {kind} holds {shown(values)}; it takes a list, as in {_examples()}.")
    if kind == "choice":
        # As the config converts them, so that a point and its config agree.
        values = [_as_saved(fitting(name, value)) for value in values]
    else:
        values = _range(name, kind, values)
        for value in values:
            fitting(name, value)
    return Parameter(name, kind, tuple(values), _conditions(name, entry.get("when") or {}, before))


def _check_name(name: str, config: Config) -> None:
    known = [f"{section}.{key}" for section, fields in config.to_dict().items() for key in fields]
    if name not in known:
        hint = suggest.question(nearest(name))
        raise UnknownConfigKeyError(f"unknown config key '{name}'.{hint} A space names fields as section.key.")
    section = name.partition(".")[0]
    if section not in SEARCHABLE:
        raise ConfigValueError(f"{name} decides the data, which all trials share; allowed are {', '.join(SEARCHABLE)}.")
    if name in FIXED:
        raise ConfigValueError(f"{name} cannot be searched: {FIXED[name]}.")
    if not decides(*name.split(".")):
        raise ConfigValueError(f"{name} changes no result; there is nothing to search.")


def _range(name: str, kind: str, values: list[Any]) -> list[Any]:
    try:
        low, high = (number(value) for value in values)
        if kind == "int" and not (low.is_integer() and high.is_integer()):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigValueError(
            f"{name}: {kind} holds {shown(values)}; it takes the least and the greatest value, as in {_examples()}."
        ) from None
    if not low < high:
        raise ConfigValueError(f"{name}: {kind} goes from {low:g} to {high:g}; the first must be the smaller.")
    if kind == "loguniform" and low <= 0:
        raise ConfigValueError(f"{name}: loguniform starts at {low:g}; it must start above 0.")
    return [int(low), int(high)] if kind == "int" else [low, high]


def _conditions(name: str, when: Any, before: Mapping[str, Parameter]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping):
        raise ConfigValueError(
            f"{name}: when holds {shown(when)}; give fields and values, as in {{model.updater: mamba}}."
        )
    found: dict[str, tuple[Any, ...]] = {}
    for other, values in when.items():
        if other not in before or before[other].kind != "choice":
            choices = [parameter.name for parameter in before.values() if parameter.kind == "choice"]
            raise ConfigValueError(
                f"{name}: when names '{other}'; it may name a choice listed before it: "
                f"{', '.join(choices) or 'there is none'}."
            )
        wanted = values if isinstance(values, list) else [values]
        allowed = tuple(_as_saved(fitting(other, value)) for value in wanted)
        for value in allowed:
            if value not in before[other].values:
                listed = ", ".join(map(str, before[other].values))
                raise ConfigValueError(f"{name}: when wants {other} to be {value!r}; its choices are {listed}.")
        found[other] = allowed
    return found


def _examples() -> str:
    return "choice: [a, b], uniform: [low, high], loguniform: [low, high], int: [low, high]"
