"""Config fields: the default, meaning and allowed values of each; conversion and validation of values.

Used by `vaemo.config`. Names no section and reads no file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vaemo.errors import ConfigValueError

_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
_SHOWN = 200

ALWAYS = object()
"""`before` of a field that has been there since the first version."""


class Named(dict):
    """An immutable mapping as the value of a field, so that a section can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    runtime: bool = False,
    before: Any = ALWAYS,
) -> Any:
    """A config field.

    Args:
        default: Its value where it is not set.
        doc: What it means.
        low: Smallest value, included.
        high: Largest value, included.
        runtime: Whether results do not depend on it.
        before: The value that means what vaemo did before the field existed. A config that was saved without the
            field has this value, and at this value the field stays out of fingerprints: what an older version wrote
            is still read and resumed. Every field added after version 0.1 names it.
    """
    metadata = {"doc": doc, "low": low, "high": high, "runtime": runtime, "before": before}
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(section: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(section)}


def younger(section: type) -> dict[str, Any]:
    """The fields that saved configs may lack, each with its `before` value."""
    return {
        name: field.metadata["before"]
        for name, field in fields_of(section).items()
        if field.metadata["before"] is not ALWAYS
    }


def fit(section: type, name: str, value: Any) -> Any:
    """A value converted to the type of a field.

    Args:
        section: The dataclass.
        name: `section.key`.
        value: As YAML gives it.

    Raises:
        ConfigValueError: if it is of another type, or out of range.
    """
    key = name.partition(".")[2]
    hint, field = _type_hints(section)[key], fields_of(section)[key]
    try:
        converted = _convert(hint, value)
    except (LookupError, TypeError, ValueError):
        allowed = _describe(hint)
        quotes = " Put it in quotes." if allowed.startswith("text") and isinstance(value, (int, float)) else ""
        raise ConfigValueError(f"{name} is {shown(value)}; allowed is {allowed}.{quotes}") from None
    low, high = field.metadata["low"], field.metadata["high"]
    numbers = converted.values() if isinstance(converted, Named) else [converted]
    for each in numbers:
        if not isinstance(each, (int, float)) or isinstance(each, bool):
            continue
        if low is not None and each < low:
            raise ConfigValueError(f"{name} is {shown(value)}; it must be at least {low}.")
        if high is not None and each > high:
            raise ConfigValueError(f"{name} is {shown(value)}; it must be at most {high}.")
    return converted


def number(value: Any) -> float:
    """A finite number, from a number or a text that spells one; TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError
    try:
        converted = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(converted):
        raise ValueError
    return converted


def shown(value: Any) -> str:
    """A value for a message, shortened where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def explain(section: type, key: str) -> str:
    """What a field means, and in parentheses what is allowed."""
    metadata = fields_of(section)[key].metadata
    ends = {"from": metadata["low"], "to": metadata["high"]}
    bounds = [f"{word} {end:g}" for word, end in ends.items() if end is not None]
    return f"{metadata['doc']} ({' '.join([_describe(_type_hints(section)[key]), *bounds])})"


@functools.cache
def _type_hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _convert(hint: Any, value: Any) -> Any:
    """The value converted to a type; LookupError, TypeError or ValueError if it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for member in args:
            try:
                return _convert(member, value)
            except (LookupError, TypeError, ValueError):
                continue
        raise ValueError
    if origin is Literal:
        if isinstance(value, bool) or value not in args:
            if value is False and "off" in args:
                return "off"
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError
        members = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(member, item) for member, item in zip(members, value, strict=True))
    if origin is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError
        return Named({key: _convert(args[1], item) for key, item in value.items()})
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = _type_hints(typing.cast(type, hint))
        if value.keys() != hints.keys():
            raise LookupError
        return typing.cast(Any, hint)(**{key: _convert(hints[key], item) for key, item in value.items()})
    if hint is float:
        # YAML reads 1e-3 as text.
        return number(value)
    if hint is bool and isinstance(value, str):
        # The booleans of YAML 1.1, accepted only where a boolean is expected.
        return _TRUTH[value.lower()]
    if hint is type(None) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        if typing.get_origin(args[0]) is Literal:
            return _describe(args[0]).replace("one of", "a list of any of")
        if args[-1] is Ellipsis and typing.get_origin(args[0]) in (typing.Union, types.UnionType):
            return f"a list, each {_describe(args[0])}"
        length = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {length}{_describe(args[0]).removeprefix('a ')}s"
    if origin is Mapping:
        return f"a mapping of names, to {_describe(args[1])} each"
    if dataclasses.is_dataclass(hint):
        hints = _type_hints(typing.cast(type, hint)).items()
        held = (f"{key}: {_describe(each).removeprefix('one of ')}" for key, each in hints)
        return "{" + ", ".join(held) + "}"
    return {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
