"""`calibration.json` of a checkpoint: errors of its scores on unseen sessions, from which intervals are made.

Made by `calibrate` from scores and labels, kept beside the weights, applied while scoring. A checkpoint without the
file scores as it always did. See `vaemo.trust.conformal` for what is guaranteed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.errors import ReadCheckpointError
from vaemo.parts.shards import digest
from vaemo.tables import with_column
from vaemo.trust import conformal
from vaemo.trust.rows import Rows, call_rows, floats, signs_of, utterance_rows
from vaemo.units import DIMENSIONS, LabelScale

CALIBRATION = "calibration.json"

MANY_GROUPS = 50
"""With fewer groups the coverage of one calibration may be far from the nominal one, and a line is printed."""

CALIB_SPLIT, HELD_OUT, OWN_CALLS = "the split calib", "held-out folds", "own labelled calls"
"""What a calibration was made on."""

_EXCHANGEABLE = (
    "on average over calibrations, a random utterance, or the mean of a random call, of a new group of linked sessions "
    "of the same kind has its label inside at least as often as the level says (Lee, Barber and Willett 2023); not so "
    "within every call, nor for groups of another kind"
)
GUARANTEES = {
    CALIB_SPLIT: _EXCHANGEABLE,
    OWN_CALLS: _EXCHANGEABLE + "; where a correction was learned from the same calls, up to what its two numbers fit",
    HELD_OUT: "none that is proved for the mean of the models: the errors of each fold's model on the groups that it "
    "did not see are pooled (cross-conformal: Vovk 2015), and the mean of all models errs no more than one of them on "
    "average. CV+ (Barber et al. 2021) would prove no more than 1 - 2 (1 - level)",
}
"""The guarantee of intervals by the data they were made on, as recorded in `calibration.json`."""

_VERSION = 1
_FEWEST_ROWS, _FEWEST_CALLS = 200, 40
"""Least rows of dev to learn the scale of the error from; with fewer it is constant."""
_RIDGE = 0.01
_MOST = 3.0


@dataclass(frozen=True)
class Scale:
    """How large an error is to be expected, from what is known before the label: exp of a linear function.

    Attributes:
        names: Of the signs.
        middle: Of each sign, as transformed.
        deviation: Of each sign, as transformed.
        weight: Of each standardised sign.
    """

    names: tuple[str, ...]
    middle: tuple[float, ...]
    deviation: tuple[float, ...]
    weight: tuple[float, ...]

    @staticmethod
    def fit(residual: np.ndarray, signs: Mapping[str, np.ndarray], fewest: int) -> Scale | None:
        """Learn from residuals of data that intervals are not calibrated on; None where there are too few.

        Args:
            residual: (n,) at least 0, NaN = not known.
            signs: (n,) each.
            fewest: Residuals.
        """
        names, columns = [], []
        for name, values in signs.items():
            column = _transformed(name, values)
            if np.isfinite(column).all() and column.std() > 1e-6:
                names.append(name)
                columns.append(column)
        known = np.isfinite(residual)
        if known.sum() < fewest or not names:
            return None
        x = np.column_stack(columns)[known]
        middle, deviation = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
        x = (x - middle) / deviation
        # A residual that happens to be tiny carries no information on the size of errors.
        y = np.log(residual[known] + 0.1 * np.median(residual[known]) + 1e-12)
        weight = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(len(names)), x.T @ (y - y.mean()))
        return Scale(tuple(names), *(tuple(map(float, each)) for each in (middle, deviation, weight)))

    def __call__(self, signs: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        """(n,), between 1/3 and 3. What is not known counts as its mean."""
        exponent = np.zeros(n)
        for name, middle, deviation, weight in zip(self.names, self.middle, self.deviation, self.weight, strict=True):
            values = signs.get(name)
            if values is not None:
                exponent += weight * np.nan_to_num((_transformed(name, values) - middle) / deviation)
        return np.clip(np.exp(exponent), 1 / _MOST, _MOST)


def _transformed(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith("_sd"):
        return np.log(np.maximum(values, 0) + 1e-4)
    return values if name == "novelty" else np.log1p(values)


@dataclass(frozen=True, eq=False)
class Margin:
    """How far labels lie from scores of one dimension.

    Attributes:
        n_groups: Groups calibrated on.
        n: Their labelled rows.
        quantiles: Of the scaled residuals at `conformal.LEVELS`; infinite where there are too few groups.
        scale: Of the residuals; None is constant.
    """

    n_groups: int
    n: int
    quantiles: np.ndarray
    scale: Scale | None = None

    @staticmethod
    def of(rows: Rows, name: str, scale: Scale | None) -> Margin:
        """Calibrate on rows that neither trained nor scaled."""
        residual = np.abs(rows.prediction[name] - rows.label[name])
        known = np.isfinite(residual)
        if scale:
            residual = residual / scale(_signs_of(rows.signs, name), len(residual))
        n_groups = len(np.unique(rows.group[known]))
        return Margin(n_groups, int(known.sum()), conformal.quantiles(residual, rows.group), scale)

    def reach(self, coverage: float, signs: Mapping[str, np.ndarray], n: int) -> np.ndarray | None:
        """How far the interval reaches to either side, (n,); None where there are too few groups for the coverage."""
        # Rounded up to a level that was kept.
        place = int(np.searchsorted(conformal.LEVELS, coverage - 1e-9))
        quantile = self.quantiles[place] if place < len(self.quantiles) else np.inf
        if not np.isfinite(quantile):
            return None
        return quantile * (self.scale(signs, n) if self.scale else np.ones(n))

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        known = [float(value) if np.isfinite(value) else None for value in self.quantiles]
        scale = dataclasses.asdict(self.scale) if self.scale else None
        return {"n_groups": self.n_groups, "n": self.n, "scale": scale, "quantiles": known}

    @staticmethod
    def of_plain(plain: Mapping[str, Any]) -> Margin:
        """What `to_plain` gave."""
        known = np.array([np.inf if value is None else value for value in plain["quantiles"]])
        if len(known) != len(conformal.LEVELS):
            raise ValueError(f"{len(known)} quantiles instead of {len(conformal.LEVELS)}")
        said = plain["scale"]
        scale = Scale(**{name: tuple(value) for name, value in said.items()}) if said else None
        return Margin(plain["n_groups"], plain["n"], known, scale)


def _signs_of(signs: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The signs that concern a dimension, another's deviation left out."""
    return {sign: values for sign, values in signs.items() if not sign.endswith("_sd") or sign == f"{name}_sd"}


@dataclass(frozen=True)
class Correction:
    """score -> offset + slope * score, cut to the label range."""

    offset: float
    slope: float

    def __call__(self, values: np.ndarray, scale: LabelScale) -> np.ndarray:
        """The corrected scores; NaN stays."""
        return np.clip(self.offset + self.slope * values, scale.low, scale.high)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibration.json` holds.

    Attributes:
        checkpoints: Fingerprints of the checkpoints whose common scores were calibrated, sorted.
        made_on: One of `CALIB_SPLIT`, `HELD_OUT`, `OWN_CALLS`.
        label_range: The scores' range.
        utterances: Margins by dimension.
        calls: Margins of the means of calls, by dimension.
        correction: By dimension; empty where scores stay as they are.
        worth: What is known of it by cross-validation.
    """

    checkpoints: tuple[str, ...]
    made_on: str
    label_range: LabelScale
    utterances: Mapping[str, Margin]
    calls: Mapping[str, Margin]
    correction: Mapping[str, Correction] = dataclasses.field(default_factory=dict)
    worth: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def n_groups(self) -> int:
        """The fewest groups that a dimension was calibrated on."""
        return min(margin.n_groups for margin in self.utterances.values())

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "version": _VERSION,
            "checkpoints": list(self.checkpoints),
            "made_on": self.made_on,
            "guarantee": GUARANTEES.get(self.made_on),
            "label_range": [self.label_range.low, self.label_range.high],
            "levels": [float(conformal.LEVELS[0]), float(conformal.LEVELS[-1])],
            "utterances": {name: margin.to_plain() for name, margin in self.utterances.items()},
            "calls": {name: margin.to_plain() for name, margin in self.calls.items()},
            "correction": {name: dataclasses.asdict(each) for name, each in self.correction.items()},
            "worth": dict(self.worth),
        }

    @staticmethod
    def of_plain(plain: Mapping[str, Any]) -> Calibration:
        """What `to_plain` gave; ValueError, KeyError or TypeError for anything else."""
        if plain["version"] != _VERSION:
            raise ValueError(f"version {plain['version']}; known is {_VERSION}")
        of_utterances, of_calls = (
            {name: Margin.of_plain(margin) for name, margin in plain[kind].items()} for kind in ("utterances", "calls")
        )
        correction = {name: Correction(**each) for name, each in plain["correction"].items()}
        scale = LabelScale(*plain["label_range"])
        made = tuple(plain["checkpoints"]), plain["made_on"], scale
        return Calibration(*made, of_utterances, of_calls, correction, plain["worth"])

    @property
    def digest(self) -> str:
        """Of everything that changes scores."""
        plain = self.to_plain()
        return digest(*(str(plain[name]) for name in ("checkpoints", "utterances", "calls", "correction")))

    def write(self, checkpoint: str) -> None:
        """Put it into a checkpoint's folder, in place of another."""
        files.write_json(files.join(checkpoint, CALIBRATION), self.to_plain())

    @staticmethod
    def read(checkpoint: str) -> Calibration | None:
        """That of a checkpoint; None where it has none.

        Raises:
            ReadCheckpointError: if the file is damaged.
        """
        path = files.join(checkpoint, CALIBRATION)
        if not files.exists(path):
            return None
        try:
            return Calibration.of_plain(files.read_json(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReadCheckpointError(
                f"'{path}' is damaged ({error.__class__.__name__}: {error}). Calibrate again with jobs/calibrate.py or "
                "remove the file: scores then have no intervals."
            ) from None

    def corrected(self, scored: pa.Table) -> pa.Table:
        """The scores, with their deviations, as the correction makes them."""
        for name, correct in self.correction.items():
            scored = _with_floats(scored, name, correct(floats(scored, name), self.label_range))
            if f"{name}_sd" in scored.column_names:
                scored = _with_floats(scored, f"{name}_sd", abs(correct.slope) * floats(scored, f"{name}_sd"))
        return scored

    def with_intervals(self, scored: pa.Table, coverage: float) -> pa.Table:
        """The utterances of scores with `NAME_low` and `NAME_high`, null where there is no score.

        Args:
            scored: Corrected; with `novelty` where that is known; in session order.
            coverage: Share of labels that the intervals are to hold.
        """
        signs = signs_of(scored, tuple(self.utterances))
        for name, margin in self.utterances.items():
            reach = margin.reach(coverage, _signs_of(signs, name), scored.num_rows)
            scored = self._between(scored, name, floats(scored, name), reach)
        return scored

    def with_call_intervals(self, sessions: pa.Table, novelty: np.ndarray, coverage: float) -> pa.Table:
        """The sessions of scores with `NAME_mean_low` and `NAME_mean_high`.

        Args:
            sessions: As `vaemo.scores.summarise_sessions` gives them.
            novelty: The mean of each call's utterances, NaN = not known.
            coverage: As above.
        """
        signs = {"n": floats(sessions, "n_scored"), "novelty": novelty}
        for name, margin in self.calls.items():
            reach = margin.reach(coverage, signs, sessions.num_rows)
            sessions = self._between(sessions, f"{name}_mean", floats(sessions, f"{name}_mean"), reach)
        return sessions

    def _between(self, table: pa.Table, name: str, values: np.ndarray, reach: np.ndarray | None) -> pa.Table:
        if reach is None:
            return table
        for end, sign in (("low", -1.0), ("high", 1.0)):
            bound = np.clip(values + sign * reach, self.label_range.low, self.label_range.high)
            table = _with_floats(table, f"{name}_{end}", bound)
        return table

    def says(self, coverage: float) -> str:
        """One line: what the intervals are made on and how far that carries; what is lacking where there are none."""
        needed, percent = conformal.groups_needed(coverage), f"{100 * coverage:g} %"
        found = f"{self.n_groups} groups of linked sessions ({self.made_on})"
        if self.n_groups < needed:
            return f"no {percent} intervals: calibrated on {found}, and {needed} are needed."
        if self.n_groups < MANY_GROUPS:
            low, high = conformal.spread(self.n_groups, coverage)
            return (
                f"warning: {percent} intervals rest on {found}: with so few, their true coverage is "
                f"{100 * low:.0f} to {100 * high:.0f} % in 19 of 20 such calibrations."
            )
        return f"{percent} intervals rest on {found}."


def calibrate(
    table: pa.Table,
    scale_on: pa.Table | None,
    checkpoints: Sequence[str],
    made_on: str,
    label_range: LabelScale,
    *,
    scales_of: Calibration | None = None,
    correction: Mapping[str, Correction] | None = None,
    names: Sequence[str] = DIMENSIONS,
) -> Calibration:
    """Calibrate scores on labels.

    Args:
        table: Utterances of the scores in session order, corrected, with `label_NAME` on the scores' range.
        scale_on: The same of other data, from which the scale of the error is learned; None learns none.
        checkpoints: Fingerprints of what made the scores together.
        made_on: As in `Calibration`.
        label_range: Of the scores.
        scales_of: An earlier calibration, whose scales hold where nothing is learned.
        correction: What was already applied.
        names: The targets of utterances.
    """
    margins: list[dict[str, Margin]] = []
    for kind, make, fewest in (("utterances", utterance_rows, _FEWEST_ROWS), ("calls", call_rows, _FEWEST_CALLS)):
        rows, other = make(table, names), make(scale_on, names) if scale_on is not None and scale_on.num_rows else None
        earlier = getattr(scales_of, kind) if scales_of else {}
        margins.append({})
        for name in names:
            scale = earlier[name].scale if name in earlier else None
            if other is not None:
                error = np.abs(other.prediction[name] - other.label[name])
                scale = Scale.fit(error, _signs_of(other.signs, name), fewest)
            margins[-1][name] = Margin.of(rows, name, scale)
    of_utterances, of_calls = margins
    made = tuple(sorted(checkpoints)), made_on, label_range
    return Calibration(*made, of_utterances, of_calls, correction or {})


def _with_floats(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    column = pa.array(values.astype(np.float32), mask=~np.isfinite(values))
    return with_column(table, name, column) if name in table.column_names else table.append_column(name, column)
