"""A config: all sections, loaded strictly, changed by overrides, and fingerprinted."""

# ruff: noqa: RUF009 - a section is frozen, so a default may be one.

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vaemo.config import strict_yaml, suggest
from vaemo.config.fields import explain, fields_of, fit, shown, younger
from vaemo.config.sections import (
    AudioConfig,
    EvaluateConfig,
    ExtractConfig,
    FeatureConfig,
    LabelConfig,
    ModelConfig,
    PersonalizeConfig,
    ScoreConfig,
    SessionConfig,
    SplitConfig,
    TrainConfig,
    UpdaterConfig,
    VadConfig,
    VoicesConfig,
)
from vaemo.errors import ConfigValueError, UnknownConfigKeyError, UsageError

PRESETS = ("default", "seed")


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections of a run.

    Example:
        >>> config = Config.load("default", ["train.epochs=5"])
        >>> config.train.epochs
        5
        >>> config.override(["train.epoch=6"])
        Traceback (most recent call last):
        vaemo.errors.UnknownConfigKeyError: ...
    """

    audio: AudioConfig = AudioConfig()
    vad: VadConfig = VadConfig()
    voices: VoicesConfig = VoicesConfig()
    features: FeatureConfig = FeatureConfig()
    labels: LabelConfig = LabelConfig()
    sessions: SessionConfig = SessionConfig()
    splits: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    updater: UpdaterConfig = UpdaterConfig()
    train: TrainConfig = TrainConfig()
    extract: ExtractConfig = ExtractConfig()
    score: ScoreConfig = ScoreConfig()
    personalize: PersonalizeConfig = PersonalizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        weights = self.train.target_weights or {}
        if not any(weights.get(name, 1.0) for name in self.model.names):
            raise ConfigValueError("train.target_weights is 0 for every target: nothing is left to learn.")
        for name in weights:
            if name not in self.model.names:
                raise ConfigValueError(
                    f"train.target_weights gives '{name}' a weight, and model.targets are "
                    f"{', '.join(self.model.names)}."
                )
        inner, headdim = self.updater.expand * self.updater.d_model, self.updater.headdim
        if self.model.updater == "mamba2" and inner % headdim:
            raise ConfigValueError(
                f"model.updater is mamba2, and updater.headdim is {headdim}, which does not divide updater.expand * "
                f"updater.d_model = {inner}. Choose a divisor."
            )

    @staticmethod
    def load(source: str | Path = "default", overrides: Iterable[str] = ()) -> Config:
        """The config of a preset or YAML file with overrides applied.

        Args:
            source: A name in `PRESETS` or the path of a YAML file. A file starts from the default preset and may leave
                out any section or field. A section that has every field but the younger ones was saved by an older
                version and keeps its meaning there. A section that had one field or none is recognised only beside
                another section.
            overrides: `section.key=value`, the value in YAML's notation.

        Raises:
            UnknownConfigKeyError: for a section or field that does not exist, with the nearest one.
            ConfigValueError: for an unreadable file, a wrong type or a value out of range.
        """
        loaded = _read_yaml(source)
        return Config().replace(_saved_before(loaded), loaded, _parse_overrides(overrides))

    @staticmethod
    def from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Config:
        """The config that `to_dict` wrote, now or in an older version.

        A field that did not exist then takes its `before` value, any other missing field its default.
        """
        return Config().replace({name: younger(section) for name, section in SECTIONS.items()}, sections)

    def override(self, overrides: Iterable[str]) -> Config:
        """A copy with `section.key=value` applied; values and errors as `load`."""
        return self.replace(_parse_overrides(overrides))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dicts and lists, fit for YAML and JSON."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The YAML text that `load` reads back."""
        return strict_yaml.dump(self.to_dict())

    def explained(self) -> str:
        """`to_yaml` with what every field means, and may be, in comments; `load` reads it back too."""
        lines = []
        for section, values in self.to_dict().items():
            lines.append(f"{section}:  # {(SECTIONS[section].__doc__ or '').splitlines()[0]}")
            for key, value in values.items():
                doc = explain(SECTIONS[section], key)
                lines += ["", *textwrap.wrap(doc, 120, initial_indent="  # ", subsequent_indent="  # ")]
                lines.append(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
            lines.append("")
        return "\n".join(lines)

    def replace(self, *layers: Mapping[str, Mapping[str, Any]]) -> Config:
        """A copy with the named fields changed, checked as `load` checks them.

        Args:
            layers: Sections with fields; of a field in several layers the last value counts. Combinations are checked
                on the result alone: a file may be valid only together with what `--set` changes.
        """
        changed: dict[str, dict[str, Any]] = {}
        for layer in layers:
            for section, values in layer.items():
                with _placed(layer, section):
                    fields = _fields_to_change(section, values)
                for key, value in values.items():
                    with _placed(values, key):
                        if key not in fields:
                            raise UnknownConfigKeyError(_unknown_key(section, str(key)))
                        fitting = fit(SECTIONS[section], f"{section}.{key}", value)
                    changed.setdefault(section, {})[key] = fitting
        sections = {}
        for section, fields in changed.items():
            with _placed(next(layer for layer in layers if section in layer), section):
                sections[section] = dataclasses.replace(getattr(self, section), **fields)
        return dataclasses.replace(self, **sections)

    def fingerprint(self, *sections: str) -> str:
        """SHA-256 (64 hex digits) of what `decisive` gives for these sections."""
        return hashlib.sha256(json.dumps(self.decisive(*sections), sort_keys=True).encode()).hexdigest()

    def decisive(self, *sections: str) -> dict[str, dict[str, Any]]:
        """The fields of these sections (all when none is named) that change results, as `to_dict` gives them.

        A younger field counts only where its value differs from its `before` value.
        """
        plain = self.to_dict()
        return {
            section: {
                key: value
                for key, value in plain[section].items()
                if decides(section, key) and not _is_as_before(section, key, value)
            }
            for section in (sections or SECTIONS)
        }


SECTIONS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Config)}


def decides(section: str, key: str) -> bool:
    """Whether results depend on a field."""
    return not fields_of(SECTIONS[section])[key].metadata["runtime"]


def settled(settings: Any) -> Any:
    """Settings from a file, in a form that compares across versions.

    Args:
        settings: Plain values; config sections may be nested at any depth.

    Returns:
        The same, with runtime fields removed from the sections and missing younger fields added.
    """
    if not isinstance(settings, Mapping):
        return settings
    return {name: _settled(name, value) if name in SECTIONS else settled(value) for name, value in settings.items()}


def _settled(section: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    known = fields_of(SECTIONS[section])
    filled = {**_plain(younger(SECTIONS[section])), **values}
    return {key: value for key, value in filled.items() if key not in known or decides(section, key)}


def _is_as_before(section: str, key: str, value: Any) -> bool:
    absent = younger(SECTIONS[section])
    return key in absent and value == _plain(absent[key])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _saved_before(loaded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The younger fields that a file of an older version lacks: one that names every older field of a section."""
    missing: dict[str, dict[str, Any]] = {}
    saved = False
    for name, section in SECTIONS.items():
        absent = younger(section)
        older = fields_of(section).keys() - absent.keys()
        given = loaded.get(name, {} if not older else None)
        if isinstance(given, Mapping) and given.keys() >= older:
            missing[name] = {key: value for key, value in absent.items() if key not in given}
            saved |= len(older) > 1
    # A single field, such as labels.range, is more likely to be written by hand.
    return missing if saved else {}


def fitting(name: str, value: Any) -> Any:
    """A value converted to the type of `section.key`; ConfigValueError if it is not allowed."""
    return fit(SECTIONS[name.partition(".")[0]], name, value)


def nearest(name: str) -> list[str]:
    """Suggestions for an unknown `section.key`."""
    return suggest.fields(name, {section: fields_of(fields).keys() for section, fields in SECTIONS.items()})


@contextlib.contextmanager
def _placed(values: Mapping[Any, Any], key: Any) -> Iterator[None]:
    """Add the key's line, where the values were read from a file, to an error raised in the block."""
    try:
        yield
    except UsageError as error:
        place = values.places.get(key, "") if isinstance(values, strict_yaml.Section) else ""
        raise type(error)(f"{place}{error}") from None


def _read_yaml(source: str | Path) -> Mapping[str, Any]:
    if str(source) in PRESETS:
        text = resources.files("vaemo.presets").joinpath(f"{source}.yaml").read_bytes()
    else:
        try:
            text = Path(source).read_bytes()
        except OSError as error:
            raise ConfigValueError(
                f"config '{source}' cannot be read ({error.__class__.__name__}); "
                f"give a YAML file or one of the presets {', '.join(PRESETS)}."
            ) from None
    try:
        loaded = strict_yaml.load(text, f"config '{source}'")
    except strict_yaml.NotPlainYaml as error:
        raise ConfigValueError(f"config '{source}' is not YAML that can be read: {error}.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigValueError(f"config '{source}' holds {type(loaded).__name__}; it needs sections with fields.")
    return loaded


def _parse_overrides(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sections and fields; of a field that is named twice the last value counts, so that a script's may be changed."""
    sections: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot or not key:
            meant = nearest(name.strip())
            raise ConfigValueError(
                f"--set {override}: give section.key=value, such as --set {meant[0] if meant else 'model.alpha'}="
                f"{(text or '0.9') if meant else '0.9'}."
            )
        try:
            value = strict_yaml.load(text)
        except strict_yaml.NotPlainYaml as error:
            raise ConfigValueError(f"--set {override}: '{text}' is not a YAML value ({error}).") from None
        sections.setdefault(section, {})[key] = value
    return sections


def _fields_to_change(section: str, values: Any) -> Mapping[str, Any]:
    """The fields of a section; an error if it does not exist, or its values are no mapping."""
    if section not in SECTIONS:
        raise UnknownConfigKeyError(_unknown_section(str(section), values))
    fields = fields_of(SECTIONS[section])
    if not isinstance(values, Mapping):
        raise ConfigValueError(
            f"config section '{section}' holds {shown(values)}; it takes fields such as {section}.{next(iter(fields))}."
        )
    return fields


def _unknown_key(section: str, key: str) -> str:
    allowed = ", ".join(f"{section}.{known}" for known in fields_of(SECTIONS[section]))
    name = f"{section}.{key}"
    return f"unknown config key '{name}'.{suggest.question(nearest(name))} Allowed: {allowed}."


def _unknown_section(section: str, values: Any) -> str:
    hint = ""
    if not isinstance(values, Mapping):
        # A field where a section should be: written as in --set or a search space, or without its section.
        meant = [name.partition(".") for name in nearest(section)]
        nested = [f"{other}: {{{key}: {json.dumps(values, ensure_ascii=False)[:60]}}}" for other, _, key in meant]
        hint = f" A field belongs inside its section: {' or '.join(nested)}." if nested else ""
    else:
        near, key = suggest.sections(section, SECTIONS), str(next(iter(values), ""))
        if near and (not key or key in fields_of(SECTIONS[near])):
            hint = suggest.question([near])
        else:
            hint = suggest.question((nearest(f"{section}.{key}") if key else []) or ([near] if near else []))
    return f"unknown config section '{section}'.{hint} Allowed: {', '.join(SECTIONS)}."
