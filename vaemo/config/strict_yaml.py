"""Strict YAML for settings: plain values only, no repeated key, numbers only in unambiguous notation.

YAML 1.1 takes 010 for 8, 1:30 for 90, `no` for false and 2024-01-01 for an object. Here a scalar that is not plainly a
number, a boolean or null stays text, and the field validates it. Output is YAML 1.1, which quotes more, so that it
reads back unchanged.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

MOST_VALUES = 10_000
"""Limit on the values in one text; a value counts again for every alias of it."""

_DEEPEST = 50


class NotPlainYaml(ValueError):  # noqa: N818 - a text that is not YAML, or not of the plain kind
    """What was found, and on which line; one line long."""


class Section(dict[Any, Any]):
    """A mapping with the position of each key in its file.

    Attributes:
        places: Position by key, as the prefix of a message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[Any, str] = {}

    def fill(self, other: Section) -> None:
        """Add the keys that are missing."""
        for key in other.keys() - self.keys():
            self.places[key] = other.places[key]
        for key, value in other.items():
            self.setdefault(key, value)


def load(text: str | bytes, source: str = "") -> Any:
    """The value that a YAML text holds; mappings in it are `Section`.

    Args:
        text: One document; bytes are UTF-8, or UTF-16 with its mark.
        source: What messages call it.

    Raises:
        NotPlainYaml: for what is not YAML, a repeated key, a tag, an alias within its own anchor, or aliases
            that stand for more than `MOST_VALUES` values.
    """
    with _one_line():
        node = compose(text)
        loader = _Loader("")
        loader.source = source and f"{source}, "
        return None if node is None else loader.construct_document(node)


def compose(text: str | bytes) -> yaml.Node | None:
    """The nodes of a YAML text, their tags uninterpreted; None if it is empty.

    Raises:
        NotPlainYaml: as `load`, but for keys and tags.
    """
    with _one_line():
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            _measure(node, {})
        return node


def construct(node: yaml.Node) -> Any:
    """The value of a node that `compose` gave, as `load` makes it."""
    with _one_line():
        return _Loader("").construct_document(node)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn PyYAML's errors in the block into a one-line `NotPlainYaml`."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        said = " ".join(filter(None, (error.context, error.problem)))
        raise NotPlainYaml(f"{where}{' '.join(said.split())}") from None
    except yaml.YAMLError as error:
        raise NotPlainYaml(" ".join(str(error).split())) from None
    except RecursionError:
        raise NotPlainYaml("its values are nested too deep") from None


def dump(value: Any) -> str:
    """The YAML text of plain values, keys in their order, that `load` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes a `Section` as a plain mapping."""


_Dumper.add_representer(Section, yaml.SafeDumper.represent_dict)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of values in a node, and their depth; aliases count once per use."""
    if id(node) in known:
        size, depth = known[id(node)]
        if not size:
            raise _refused(node, "an alias is inside its own anchor")
        return size, depth
    known[id(node)] = 0, 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        children = [each for pair in node.value for each in pair]
    measured = [_measure(child, known) for child in children]
    size = 1 + sum(size for size, _ in measured)
    depth = 1 + max((depth for _, depth in measured), default=0)
    if size > MOST_VALUES:
        raise _refused(node, f"with its aliases it stands for more than {MOST_VALUES} values")
    if depth > _DEEPEST:
        raise _refused(node, f"its values are nested deeper than {_DEEPEST}")
    known[id(node)] = size, depth
    return size, depth


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """Constructs null, truth values, numbers, text, lists and `Section`, and nothing else."""

    source = ""

    def construct_null(self, node: yaml.Node) -> None:
        return None

    def construct_bool(self, node: Any) -> bool:
        return self._scalar(node, _BOOL).lower() == "true"

    def construct_int(self, node: Any) -> int:
        return int(self._scalar(node, _INT).replace("_", ""))

    def construct_float(self, node: Any) -> float:
        text = self._scalar(node, _FLOAT).replace("_", "").lower()
        return float(re.sub(r"\.(?=inf|nan)", "", text))

    def construct_text(self, node: Any) -> str:
        return self.construct_scalar(node)

    def construct_list(self, node: Any) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def construct_section(self, node: Any) -> Section:
        section, lines = Section(), dict[Any, int]()
        for key_node, value_node in node.value:
            merge = key_node.tag == _MERGE
            key = _MERGE if merge else self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise _refused(key_node, "a key is a single value")
            if key in section:
                said = f"'{'<<' if merge else key}' occurs twice, first on line {lines[key]}; leave one of them out"
                raise _refused(key_node, said)
            section[key], lines[key] = self.construct_object(value_node, deep=True), key_node.start_mark.line + 1
            section.places[key] = f"{self.source}line {lines[key]}: "
        if _MERGE in section:
            # A merged key does not override the mapping's own.
            section.fill(self._merged(node, section.pop(_MERGE)))
        return section

    def _merged(self, node: yaml.Node, value: Any) -> Section:
        """The mappings that `<<` names as one, in which the first counts."""
        merged = Section()
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, Section):
                raise _refused(node, "'<<' takes a mapping, or a list of them")
            merged.fill(each)
        return merged

    def construct_undefined(self, node: Any) -> NoReturn:
        raise _refused(node, f"could not determine a constructor for the tag {node.tag!r}: plain values alone are read")

    def _scalar(self, node: Any, form: re.Pattern[str]) -> str:
        text = self.construct_scalar(node)
        if not form.fullmatch(text):
            raise _refused(node, f"'{text}' is not what its tag says")
        return text


# Each narrower than in YAML 1.1: no octal, no sexagesimal, no dates; `yes` and `off` are text. `1e-3` is text there
# too.
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9](?:_?[0-9]){0,99})")
_FLOAT = re.compile(
    r"[-+]?(?:0|[1-9](?:_?[0-9])*)\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_MERGE = "tag:yaml.org,2002:merge"
_Loader.yaml_constructors, _Loader.yaml_implicit_resolvers = {}, {}
for _name, _form, _first, _make in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""], _Loader.construct_null),
    ("bool", _BOOL, list("tTfF"), _Loader.construct_bool),
    ("int", _INT, list("-+0123456789"), _Loader.construct_int),
    ("float", _FLOAT, list("-+0123456789."), _Loader.construct_float),
    ("merge", re.compile(r"<<"), ["<"], _Loader.construct_undefined),
    ("str", None, None, _Loader.construct_text),
    ("seq", None, None, _Loader.construct_list),
    ("map", None, None, _Loader.construct_section),
):
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_constructor(_tag, _make)
    if _form is not None:
        _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_form.pattern})\Z"), _first)
_Loader.add_constructor(None, _Loader.construct_undefined)
