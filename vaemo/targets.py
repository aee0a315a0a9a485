"""What a model predicts: targets by name, of every utterance or of the whole session.

A target is a column of manifests, stores and scores, and other columns are named after it (`derived`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vaemo.errors import ConfigValueError

SUMMARY = ("mean", "min", "min_at_s", "slope_per_min", "below_s", "end_weighted")
"""What the table of sessions holds of a target, as `NAME_mean`."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

_TAKEN = {
    *("session_id", "utt_id", "speaker_id", "audio_path", "audio", "start_s", "end_s", "duration_s", "channel", "role"),
    *("position", "split", "fold", "status", "reason", "run_id", "lost_s", "duplicate_of", "n_channels"),
    *("bandwidth_hz", "level_db", "snr_db", "voice", "voice_margin", "role_by", "role_margin", "offset_s"),
    *("novelty", "novelty_of"),
    *("n_utterances", "n_scored", "n_failed", "talk_s", "speech", "prosody", "speaker"),
    *("text", "avg", "row", "date", "index", "level", "name"),
}
"""Columns and words of the contracts, which mean something else."""


@dataclass(frozen=True)
class Target:
    """A target of the whole session: one label a session, predicted at its last utterance.

    Attributes:
        name: Its column.
        level: `session`; what is of every utterance is written as its name alone.
    """

    name: str
    level: Literal["session"]


def names_of(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The names of targets in the order of every axis: those of utterances, then those of sessions."""
    return (*utterance_names(targets), *session_names(targets))


def targets_of(plain: Sequence[str | Mapping[str, str]]) -> tuple[str | Target, ...]:
    """The targets that a file says, as the config holds them."""
    return tuple(target if isinstance(target, str) else Target(target["name"], "session") for target in plain)


def utterance_names(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The targets that every utterance has; these are observed and fed back."""
    return tuple(target for target in targets if isinstance(target, str))


def session_names(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The targets that a session has one of."""
    return tuple(target.name for target in targets if isinstance(target, Target))


def observed_names(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The columns of observed values, known while a session runs."""
    return tuple(f"observed_{name}" for name in utterance_names(targets))


def label_names(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The columns of labels and of observed values."""
    return (*names_of(targets), *observed_names(targets))


def rater_columns(targets: Sequence[str | Target]) -> tuple[str, ...]:
    """The columns of how far a label's raters were apart (deviation, n - 1, on the label's range), and how many."""
    return tuple(f"{name}_{form}" for form in ("rater_sd", "raters") for name in names_of(targets))


def derived(name: str) -> set[str]:
    """The columns that a target of this name has, or may have, somewhere."""
    forms = (
        *("{}", "{}_sd", "{}_weight", "observed_{}", "label_{}", "fed_{}", "{}_rater_sd", "{}_raters"),
        *("{}_low", "{}_high", "{}_mean_low", "{}_mean_high"),
    )
    return {form.format(name) for form in forms} | {f"{name}_{summary}" for summary in SUMMARY}


def check_targets(targets: Sequence[str | Target]) -> None:
    """Raise ConfigValueError if these names clash with each other or with columns of the contracts."""
    names = [target if isinstance(target, str) else target.name for target in targets]
    if not names:
        raise ConfigValueError("model.targets is empty; name at least one, such as [valence, arousal].")
    owner: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigValueError(
                f"model.targets names '{name}'; a target's name is a letter, then letters, digits and underscores."
            )
        if names.count(name) > 1:
            raise ConfigValueError(f"model.targets names '{name}' twice; a target has one level.")
        for column in sorted(derived(name)):
            if column in _TAKEN:
                raise ConfigValueError(
                    f"model.targets names '{name}', and {column} is a column of something else. Rename the target's "
                    "column."
                )
            if owner.setdefault(column, name) != name:
                raise ConfigValueError(
                    f"model.targets names '{owner[column]}' and '{name}', which would both have a column {column}. "
                    "Rename one of them."
                )
