"""The `hyperparams.yaml` of a SpeechBrain encoder: numbers, references, and layers of a few modules, built when asked.

The file comes from anywhere, and its own notation (HyperPyYAML) can name any function to be called. Here a tag is a
reference, or the name of a class in `MODULES`; no function is called, nothing that a file names is imported, and layers
are built only on request.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import operator
import re
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from vaemo.config import strict_yaml
from vaemo.config.fields import number
from vaemo.errors import ExtractorError
from vaemo.features.base import first_line

MODULES = (
    "speechbrain.lobes.features",
    "speechbrain.lobes.models.ECAPA_TDNN",
    "speechbrain.lobes.models.ResNet",
    "speechbrain.lobes.models.Xvector",
    "speechbrain.nnet",
    "speechbrain.processing.features",
    "torch.nn",
)
"""Where classes that are built come from, and may be defined."""

_NAMED = (*MODULES, "speechbrain.lobes", "speechbrain.processing", "speechbrain.dataio.encoder",
          "speechbrain.utils.parameter_transfer")  # fmt: skip
"""Where classes come from that files of encoders name too; they are not built."""

_CORE = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_UNDER_WAY = object()
_DEEPEST = 50
_REFERENCE = re.compile(r"<([^>]*)>")
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Hyperparams:
    """The content of a file.

    Args:
        text: Of the file.
        name: What messages call it.

    Raises:
        ExtractorError: if it is not YAML, has a key twice, a placeholder, a reference to nothing, or a tag that is
            neither a reference nor a class that encoders have.
    """

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._built: dict[int, Any] = {}
        try:
            root = strict_yaml.compose(text)
        except strict_yaml.NotPlainYaml as error:
            raise ExtractorError(f"{name} is not YAML that can be read: {error}.") from None
        if not isinstance(root, yaml.MappingNode):
            found = "is empty" if root is None else "does not hold names and values"
            raise ExtractorError(f"{name} {found}; a SpeechBrain encoder has a file that describes its parts.")
        self._root = root
        for node in _walk(root, set()):
            self._check(node)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, built where it is a layer.

        Raises:
            ExtractorError: if it cannot be built.
        """
        node = self._child(self._root, key)
        return default if node is None else self._value(node)

    def _check(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _CORE:
                    self._refuse(key, "a name is no plain text.")
                if key.value in lines:
                    self._refuse(key, f"'{key.value}' occurs twice, first on line {lines[key.value]}; leave one out.")
                lines[key.value] = key.start_mark.line + 1
        if node.tag in ("!ref", "!copy", "!tuple") and not isinstance(node, yaml.ScalarNode):
            self._refuse(node, f"{node.tag} takes a text.")
        if node.tag == "!PLACEHOLDER":
            self._refuse(node, "a !PLACEHOLDER stands where a value should; write the value of the trained encoder.")
        kind, _, target = node.tag.partition(":")
        named = kind in ("!new", "!name") and target.startswith(tuple(f"{module}." for module in _NAMED))
        if not named and node.tag not in (*_CORE, "!ref", "!copy", "!tuple"):
            self._refuse(node, f"it asks for '{node.tag}'; only layers of SpeechBrain and torch.nn are built.")
        if node.tag in ("!ref", "!copy"):
            for reference in _REFERENCE.findall(str(node.value)):
                self._find(reference.partition(".")[0], node)

    def _value(self, node: yaml.Node) -> Any:
        """What a node stands for; the same object wherever it is referred to."""
        if id(node) not in self._built:
            self._built[id(node)] = _UNDER_WAY
            self._built[id(node)] = self._build(node)
        if self._built[id(node)] is _UNDER_WAY:
            self._refuse(node, "it is a part of itself.")
        return self._built[id(node)]

    def _build(self, node: Any) -> Any:
        kind, _, target = node.tag.partition(":")
        in_brackets = isinstance(node, yaml.ScalarNode) and not node.style and re.fullmatch(r"\(.*\)", node.value)
        if kind == "!ref":
            return self._referred(node)
        if kind == "!copy":
            return self._build(self._find(node.value.strip("<>"), node))
        if kind == "!tuple" or in_brackets:
            return self._tuple(node)
        if kind in ("!new", "!name"):
            return self._layer(node, target, call=kind == "!new")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {self._value(key): self._value(value) for key, value in node.value}
        try:
            return _plain(node)
        except strict_yaml.NotPlainYaml as error:
            self._refuse(node, f"{error}.")

    def _layer(self, node: Any, target: str, *, call: bool) -> Any:
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name) if _is_below(module, MODULES) else None
        except (ImportError, AttributeError, ValueError):
            found = None
        # A module holds what it imports too: what counts is where a class was defined.
        if not (inspect.isclass(found) or (inspect.isfunction(found) and not call)) or not _is_below(
            found.__module__, MODULES
        ):
            self._refuse(
                node, f"there is no layer {target} that is built; encoders are ECAPA-TDNN, x-vectors and ResNet."
            )
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        if isinstance(node, yaml.SequenceNode):
            arguments = [self._value(item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            named = {str(key.value): self._value(value) for key, value in node.value}
        if not call:
            return functools.partial(found, *arguments, **named) if arguments or named else found
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return found(*arguments, **named)
        except Exception as error:  # a library's class may raise anything for a foreign file's values
            self._refuse(node, f"{target} cannot be made of these values: {first_line(error)}.")

    def _referred(self, node: Any) -> Any:
        """What a reference stands for: a value, or a text or sum in which values stand."""
        if whole := _REFERENCE.fullmatch(node.value):
            return self._value(self._find(whole.group(1), node))
        filled = _REFERENCE.sub(lambda found: str(self._value(self._find(found.group(1), node))), node.value)
        try:
            return _computed(ast.parse(filled, mode="eval").body)
        except (ArithmeticError, RecursionError, SyntaxError, TypeError, ValueError):
            return filled

    def _find(self, reference: str, at: yaml.Node, depth: int = 0) -> yaml.Node:
        """The node that `key[of][key]` leads to, also by way of other references; a mistake is one at `at`."""
        node: yaml.Node | None = self._root
        for part in reference.split("["):
            node = self._child(node and self._end(node, at, depth), part.strip("]"))
        if node is None:
            self._refuse(at, f"'<{reference}>' refers to nothing in this file.")
        return self._end(node, at, depth)

    def _end(self, node: yaml.Node, at: yaml.Node, depth: int) -> yaml.Node:
        whole = node.tag == "!ref" and _REFERENCE.fullmatch(node.value)
        if whole and depth > _DEEPEST:
            self._refuse(at, f"'{node.value}' refers to itself.")
        return self._find(whole.group(1), at, depth + 1) if whole else node

    def _child(self, node: yaml.Node | None, key: str) -> yaml.Node | None:
        if not isinstance(node, yaml.MappingNode):
            return None
        return next((value for name, value in node.value if str(name.value) == key), None)

    def _tuple(self, node: Any) -> tuple[Any, ...]:
        text = str(node.value).strip()
        with contextlib.suppress(strict_yaml.NotPlainYaml):
            listed = strict_yaml.compose(f"[{text[1:-1]}]") if text.startswith("(") and text.endswith(")") else None
            items = listed.value if isinstance(listed, yaml.SequenceNode) else [node]
            if all(isinstance(item, yaml.ScalarNode) and item.tag in _CORE for item in items):
                return tuple(map(_plain, items))
        self._refuse(node, f"'{text[:80]}' is no tuple of plain values.")

    def _refuse(self, node: yaml.Node, why: str) -> NoReturn:
        raise ExtractorError(f"{self._name}, line {node.start_mark.line + 1}: {why}")


def _walk(node: yaml.Node, seen: set[int]) -> Iterator[yaml.Node]:
    """Every node once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    for child in [] if isinstance(node, yaml.ScalarNode) else node.value:
        for each in child if isinstance(child, tuple) else [child]:
            yield from _walk(each, seen)


def _is_below(module: str, modules: tuple[str, ...]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in modules)


def _plain(node: Any) -> Any:
    """The value of a scalar; 1e-3 is a number here, as in YAML 1.2."""
    value = strict_yaml.construct(node)
    if isinstance(value, str) and not node.style:
        with contextlib.suppress(ValueError):
            return number(value)
    return value


def _computed(node: ast.expr) -> int | float:
    """The value of a sum of numbers; TypeError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_computed(node.left), _computed(node.right))
    raise TypeError
