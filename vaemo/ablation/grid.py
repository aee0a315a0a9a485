"""The grid: which changes are made to the model, and the trainings that follow from them.

A *variant* is the full model (the config unchanged), the same with one change, or a baseline; a *cell* is one
training of a variant: a seed and, where there are folds, one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from vaemo.ablation.baselines import Baseline, mean_of_labels, ridge, ridge_with_memory
from vaemo.config import Config
from vaemo.errors import ConfigValueError, FeatureMismatchError, UsageError
from vaemo.model.checks import used_pasts, used_streams


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: In file names and tables.
        title: For people.
        changes: Of the config, by section and field.
        baseline: Predicts in the place of the model; needs no seed.
    """

    name: str
    title: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    baseline: Baseline | None = None


FULL = Variant("full", "full model")


def _model(name: str, title: str, **changes: Any) -> Variant:
    return Variant(name, title, {"model": changes})


ABLATIONS = (
    _model("no-state", "no state", updater="none"),
    _model("mamba", "Mamba", updater="mamba"),
    _model("mamba2", "Mamba-2", updater="mamba2"),
    _model("gru", "GRU", updater="gru"),
    _model("no-prosody", "no prosody", prosody=False),
    _model("film", "FiLM", film="film"),
    _model("concat", "speaker embedding concatenated", film="concat"),
    _model("no-film", "no speaker embedding", film="off"),
    _model("plain-speech", "speech as it is", speech_mlp="none"),
    _model("speech-mlp", "a network on speech", speech_mlp="after_film"),
    _model("speech-mlp-film", "a network on speech, before FiLM", speech_mlp="before_film"),
    _model("no-norm", "compared with no past", speaker_norm=(), session_norm=()),
    _model("speaker-norm", "prosody compared with its speaker's past", speaker_norm=("prosody",), session_norm=()),
    _model(
        "session-norm",
        "prosody compared with its speaker's and the session's past",
        speaker_norm=("prosody",),
        session_norm=("prosody",),
    ),
    _model("fixed-alpha", "fixed alpha", ema="fixed"),
    _model("learned-alpha", "learned alpha", ema="learned"),
    _model("feedback-observed", "feedback: observed values alone", feedback="observed"),
    _model("feedback-scheduled", "feedback: scheduled sampling", feedback="scheduled"),
    _model("feedback-label", "feedback: labels", feedback="label"),
    _model("feedback-model", "feedback: predictions", feedback="model"),
)
"""Both sides of every comparison: the side of the config is the full model, and is left out of the grid."""

BASELINES = (
    Variant("mean", "mean of the labels", baseline=mean_of_labels),
    Variant("ridge", "ridge on z's inputs", baseline=ridge),
    Variant("ridge-ema", "ridge on them and their EMA", baseline=ridge_with_memory),
)
"""Baselines of a session model."""


def choose_variants(
    config: Config, dims: Mapping[str, int], only: Sequence[str] | None = None
) -> tuple[list[Variant], list[str]]:
    """The variants that differ from the full model on features of these widths, and reasons for leaving others out.

    Args:
        config: Of the full model.
        dims: Width of every stream of the store.
        only: Names of the ablations and baselines that are wanted; None is all.

    Returns:
        variants: The full model first, the baselines last.
        left_out: A line for every change that has nothing to act on.

    Raises:
        UsageError: if a wanted name does not exist.
        FeatureMismatchError: if the full model has nothing to predict from.
    """
    known = [variant.name for variant in (*ABLATIONS, *BASELINES)]
    wanted = known if only is None else only
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"--only {unknown[0]}: there is no such variant; there are {', '.join(known)}.")
    full = _effect(config, dims)
    chosen, left_out = [FULL], []
    for variant in ABLATIONS:
        if variant.name not in wanted:
            continue
        try:
            changed = config.replace(variant.changes)
            if changed == config:
                continue
            same = _effect(changed, dims) == full
        except (ConfigValueError, FeatureMismatchError) as error:
            left_out.append(f"'{variant.title}' is left out: {error}")
            continue
        if same:
            streams = ", ".join(dims)
            left_out.append(f"'{variant.title}' is left out: on a store with {streams} it is the full model itself.")
        else:
            chosen.append(variant)
    return [*chosen, *(baseline for baseline in BASELINES if baseline.name in wanted)], left_out


def _effect(config: Config, dims: Mapping[str, int]) -> tuple[Any, ...]:
    """A key of the model that a config makes for these features; equal for equal models."""
    film, used = used_streams(config.model, dims)
    pasts = used_pasts(config.model, used)
    model = config.to_dict()["model"] | {"film": film, "prosody": "prosody" in used, "speaker_norm": pasts}
    del model["session_norm"]
    if not pasts:
        del model["speaker_norm_weight"]
    if "speech" not in used:
        del model["speech_mlp"]
    elif model["speech_mlp"] != "none" and film != "film":
        model["speech_mlp"] = "after_film"
    if model["updater"] == "none":
        for switch in ("ema", "feedback"):
            del model[switch]
    return model, used


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        variant: What is trained.
        seed: Of the training; a baseline has 0.
        fold: Name of the fold; empty without folds.
    """

    variant: Variant
    seed: int
    fold: str

    @property
    def name(self) -> str:
        """The name of its file, without suffix."""
        parts = [self.variant.name]
        parts += [] if self.variant.baseline else [f"seed-{self.seed}"]
        parts += [f"fold-{quote(self.fold, safe='')}"] if self.fold else []
        return "-".join(parts)


def plan_cells(variants: Sequence[Variant], seeds: Sequence[int], folds: Sequence[str]) -> list[Cell]:
    """All trainings, seed by seed, so that a grid that is stopped has whole seeds to compare."""
    baselines = [variant for variant in variants if variant.baseline]
    models = [variant for variant in variants if not variant.baseline]
    cells = [Cell(variant, 0, fold) for variant in baselines for fold in folds]
    return cells + [Cell(variant, seed, fold) for seed in seeds for variant in models for fold in folds]
