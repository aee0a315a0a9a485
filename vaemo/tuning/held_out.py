"""The final evaluation of a sweep: sessions that no trial trains on or is selected by, fixed before the first trial.

The best of many dev results is optimistic. The winner's result on the test split of the store (of the first fold, where
there are folds) is not, as long as it is computed once: a sweep that continues until another trial wins has looked
again, and every look is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vaemo import files
from vaemo.evaluation.bootstrap import Resampled, SessionSums, defined
from vaemo.model.checkpoint import load_checkpoint
from vaemo.parts.shards import digest
from vaemo.progress import say
from vaemo.tables import codes
from vaemo.training.data import TrainingData, split_of
from vaemo.training.held_out import predict
from vaemo.training.run_folder import BEST
from vaemo.tuning.sweep import DONE, Record, Sweep

HELD_OUT = "_held_out.json"


class HeldOut:
    """The held-out part of a sweep.

    Args:
        sweep: Whose folder records it.
        data: What the sweep learns from.
        record: Its content; `n_sessions` is 0 where nothing is held out.
    """

    def __init__(self, sweep: Sweep, data: TrainingData, record: dict[str, Any]) -> None:
        self._sweep, self._data, self._record = sweep, data, record

    @staticmethod
    def open(sweep: Sweep, data: TrainingData) -> HeldOut:
        """The held-out part recorded in the sweep's folder; in a new sweep it is fixed now.

        It is empty if the store has no labelled session in the split test, and in sweeps of older versions, which held
        nothing out.
        """
        path = files.join(sweep.out, HELD_OUT)
        if files.exists(path):
            return HeldOut(sweep, data, files.read_json(path))
        fresh = not sweep.records and not sweep.unfinished
        ids = [data.labelled[number].session_id for number in _sessions(data)] if fresh else []
        record = {"fold": data.parts[0].name, "n_sessions": len(ids), "digest": digest(*ids), "looks": []}
        files.write_json(path, record)
        if fresh and not ids:
            say(
                "warning: nothing is held out, for no labelled session is in the split 'test'; the best dev result is "
                "chosen out of many and flatters."
            )
        return HeldOut(sweep, data, record)

    def judge(self, best: Record) -> dict[str, Any] | None:
        """The winner's result beside that of the config itself; None where nothing is held out.

        Returns:
            `fold`, `n_sessions`, `looks` (winners that have been looked at, this one too), `trial_id`; `best`,
            `default` (None where trial 0 has not ended) and `difference`: for CCC of every target and avg `value`
            and `ci95`, of the difference also `p`.
        """
        if not self._record["n_sessions"]:
            return None
        looks = self._record["looks"]
        found = next((look for look in looks if look["trial_id"] == best.trial_id), None)
        if found is None:
            found = {"trial_id": best.trial_id, **self._compare(best)}
            looks.append(found)
            files.write_json(files.join(self._sweep.out, HELD_OUT), self._record)
        about = {name: self._record[name] for name in ("fold", "n_sessions")}
        return {**about, "looks": len(looks), **found}

    def _compare(self, best: Record) -> dict[str, Any]:
        data, fold = self._data, self._data.parts[0]
        numbers = set(_sessions(data).tolist())
        every = data.aggregate(data.read(), fold)
        tested = [session for number, session in enumerate(every) if number in numbers]
        kept = fold.held_out[np.concatenate([session.rows for session in tested])]
        labels = np.concatenate([session.labels for session in tested])[kept]
        session = codes(np.concatenate([np.full(len(each), each.session_id, object) for each in tested])[kept])

        model = data.config.model
        names = (*model.names, "avg")

        def resampled(number: int) -> Resampled:
            checkpoint = load_checkpoint(files.join(self._sweep.folder(number), BEST))
            predicted = predict(data, checkpoint, tested)[kept]
            return Resampled.of(
                [SessionSums.of(predicted, labels, session, len(model.session_targets))], data.config.evaluate
            )

        def result(of: Resampled) -> dict[str, Any]:
            return _values(names, of.estimate["ccc"], *of.interval("ccc"))

        winner = resampled(best.number)
        default = self._sweep.records.get(0)
        if default is None or default.status != DONE:
            return {"best": result(winner), "default": None, "difference": None}
        itself = winner if best.number == 0 else resampled(0)
        less = winner.less(itself, "ccc")
        difference = _values(names, less.estimate, less.low, less.high)
        for name, p in zip(names, less.p, strict=True):
            difference[name]["p"] = defined(p)
        return {"best": result(winner), "default": result(itself), "difference": difference}


def told(found: Mapping[str, Any]) -> str:
    """The result of `HeldOut.judge` as a line of text."""
    parts = [f"held out ({found['n_sessions']:,} sessions): CCC-avg {_shown(found['best'])}"]
    if found["default"]:
        parts += [f"the config itself {_shown(found['default'])}", f"difference {_shown(found['difference'], '+')}"]
    if found["looks"] > 1:
        parts.append(f"winner number {found['looks']} that was looked at, so this flatters too")
    return ", ".join(parts)


def _shown(of: Mapping[str, Any], sign: str = "") -> str:
    value, (low, high) = of["avg"]["value"], of["avg"]["ci95"]
    interval = "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}" if value is not None else "not defined"


def _values(names: Sequence[str], *found: np.ndarray) -> dict[str, dict[str, Any]]:
    """By name, from the values and the ends of their intervals."""
    return {
        name: {"value": defined(value), "ci95": [defined(low), defined(high)]}
        for name, value, low, high in zip(names, *found, strict=True)
    }


def _sessions(data: TrainingData) -> np.ndarray:
    """Numbers of the sessions that are held out."""
    fold = data.parts[0]
    labelled = [
        bool(fold.held_out[session.rows].any() and not np.isnan(session.labels[fold.held_out[session.rows]]).all())
        for session in data.labelled
    ]
    return np.flatnonzero((split_of(data.labelled, fold) == "test") & np.array(labelled, bool))
