"""Corrections, novelty, intervals and the status `unfit`, added to scores while they are made.

Reads `calibration.json` and `novelty.safetensors` of the checkpoints; adds nothing where there is neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.tables import with_column
from vaemo.trust.calibration import Calibration
from vaemo.trust.conformal import groups_needed
from vaemo.trust.novelty import Novelty, features_of, sounds_of
from vaemo.trust.rows import calls_of, floats, mean_of
from vaemo.units import DIMENSIONS


@dataclass(frozen=True, eq=False)
class Judge:
    """What checkpoints say of the trust that their scores deserve.

    Attributes:
        calibration: Of these checkpoints together; None where there is none.
        novelty: Of the first checkpoint; None where there is none.
        coverage: `score.coverage`.
        max_novelty: `score.max_novelty`.
        other: Whether a checkpoint is calibrated, but alone or with others.
        names: The targets.
    """

    calibration: Calibration | None
    novelty: Novelty | None
    coverage: float
    max_novelty: float = 1.0
    other: bool = False
    names: Sequence[str] = DIMENSIONS

    @staticmethod
    def of(
        checkpoints: Sequence[str],
        fingerprints: Sequence[str],
        coverage: float,
        max_novelty: float = 1.0,
        names: Sequence[str] = DIMENSIONS,
    ) -> Judge | None:
        """The calibration of these checkpoints; None if they have none.

        Raises:
            ReadCheckpointError: if a file is damaged.
        """
        found = [each for each in map(Calibration.read, checkpoints) if each]
        together = tuple(sorted(fingerprints))
        calibration = next((each for each in found if each.checkpoints == together), None)
        novelty = Novelty.read(checkpoints[0])
        if novelty is None and not found:
            return None
        return Judge(
            calibration, novelty, coverage, max_novelty, other=bool(found) and calibration is None, names=names
        )

    @property
    def settings(self) -> dict[str, str | None]:
        """What decides results."""
        return {
            "calibration": self.calibration.digest if self.calibration else None,
            "novelty": self.novelty.digest if self.novelty else None,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """What the scores say of their own trust; `evaluate` and reports read it."""
        known = self.calibration
        enough = known is not None and known.n_groups >= groups_needed(self.coverage)
        return {
            "coverage": self.coverage if enough else None,
            "calibrated_on": known.made_on if known else None,
            "n_groups": known.n_groups if known else None,
            "corrected": bool(known and known.correction),
            "novelty": "dev" if self.novelty and self.novelty.from_dev else "calib" if self.novelty else None,
            "expected_beyond": self.novelty.expected if self.novelty else None,
        }

    @property
    def notes(self) -> list[str]:
        """What a user is told before scoring, a line each."""
        if self.other:
            return [
                "no intervals: the checkpoints are calibrated, but not these together; an ensemble has its own "
                "calibration (jobs/calibrate.py --checkpoint A,B)."
            ]
        return [self.calibration.says(self.coverage)] if self.calibration else []

    def utterances(self, table: pa.Table, scored: pa.Table) -> pa.Table:
        """The scores of utterances with what is known of their trust.

        Args:
            table: Rows of features, sessions whole and in order.
            scored: Their scores, row for row.
        """
        if self.calibration:
            scored = self.calibration.corrected(scored)
        if self.novelty:
            novelty, which = self._novelty_of(table, scored)
            names = pa.array(self.novelty.names)
            known = np.isfinite(novelty)
            scored = scored.append_column("novelty", pa.array(novelty.astype(np.float32), mask=~known))
            scored = scored.append_column("novelty_of", names.take(pa.array(which, mask=~known)))
        if self.calibration:
            scored = self.calibration.with_intervals(scored, self.coverage)
        return self._without_unfit(scored)

    def one(
        self,
        values: Mapping[str, float],
        vectors: Mapping[str, np.ndarray],
        sounds: Mapping[str, float],
        position: int,
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]], float | None]:
        """What `utterances` gives a single utterance: corrected scores, the bounds of intervals, novelty.

        Args:
            values: Its scores.
            vectors: Its features as a store has them, (D,) each.
            sounds: What is known of its sound.
            position: Scored utterances of the session before it.
        """
        found, novelty, bounds = dict(values), None, {}
        if self.novelty:
            features = {name: vectors[name][None] for name in self.novelty.streams}
            unusual, _ = self.novelty.unusual(features, {name: np.array([value]) for name, value in sounds.items()})
            novelty = float(self.novelty.novelty(unusual)[0])
        if self.calibration:
            known, scale = self.calibration, self.calibration.label_range
            for name, correct in known.correction.items():
                found[name] = float(correct(np.array(found[name]), scale))
            signs = {"position": np.array([float(position)])}
            if novelty is not None:
                signs["novelty"] = np.array([novelty])
            for name, margin in known.utterances.items():
                reach = margin.reach(self.coverage, signs, 1)
                if reach is not None:
                    low, high = found[name] - float(reach[0]), found[name] + float(reach[0])
                    bounds[name] = max(low, scale.low), min(high, scale.high)
        return found, bounds, novelty

    def is_unfit(self, novelty: float | None) -> bool:
        """Whether an utterance is too unusual to be scored."""
        return novelty is not None and self.max_novelty < 1 and novelty > self.max_novelty

    @property
    def unfit_reason(self) -> str:
        """What its row says."""
        return f"more unusual than {100 * self.max_novelty:g} % of what the model was calibrated with"

    def sessions(self, utterances: pa.Table, sessions: pa.Table) -> pa.Table:
        """The summaries of sessions with what is known of their trust.

        Args:
            utterances: As `utterances` returned them, whole sessions.
            sessions: As `vaemo.scores.summarise_sessions` makes them of these.
        """
        means = np.full(sessions.num_rows, np.nan)
        if self.novelty:
            call = calls_of(utterances)
            values = floats(utterances, "novelty")
            means = mean_of(call, values, np.full(len(call), np.nan))
            novelty = self.novelty.of_calls(means)
            sessions = sessions.append_column("novelty", pa.array(novelty.astype(np.float32), mask=np.isnan(novelty)))
            sessions = sessions.append_column("novelty_of", _most_unusual(call, values, utterances))
        if self.calibration:
            sessions = self.calibration.with_call_intervals(sessions, means, self.coverage)
        return sessions

    def _novelty_of(self, table: pa.Table, scored: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        assert self.novelty
        novelty, which = np.full(table.num_rows, np.nan), np.zeros(table.num_rows, np.int64)
        rows = np.flatnonzero(pc.equal(scored["status"], "ok").to_numpy())
        if len(rows):
            some = table.select([name for name in table.column_names if name in self.novelty.names])
            some = some if len(rows) == table.num_rows else some.take(pa.array(rows))
            unusual, which[rows] = self.novelty.unusual(features_of(some, list(self.novelty.streams)), sounds_of(some))
            novelty[rows] = self.novelty.novelty(unusual)
        return novelty, which

    def _without_unfit(self, scored: pa.Table) -> pa.Table:
        """The scores, where what is too unusual has none."""
        if self.novelty is None or self.max_novelty >= 1:
            return scored
        unfit = pc.fill_null(pc.greater(scored["novelty"], self.max_novelty), False)
        for name, value in (("status", "unfit"), ("reason", self.unfit_reason)):
            scored = with_column(scored, name, pc.if_else(unfit, pa.scalar(value), scored[name]))
        for name in self.names:
            for column in (name, f"{name}_sd", f"{name}_low", f"{name}_high"):
                if column in scored.column_names:
                    nothing = pa.scalar(None, scored[column].type)
                    scored = with_column(scored, column, pc.if_else(unfit, nothing, scored[column]))
        return scored


def _most_unusual(call: np.ndarray, novelty: np.ndarray, utterances: pa.Table) -> pa.Array:
    """Of each call the view that its most unusual utterance differs in."""
    order = np.lexsort((-np.nan_to_num(novelty, nan=-1.0), call))
    first = np.unique(call[order], return_index=True)[1]
    return utterances["novelty_of"].combine_chunks().take(pa.array(order[first]))
