"""The folder of a sweep: what each trial was and gave, and what follows from all of them.

SWEEP/_sweep.json              whose folder it is
SWEEP/trials.parquet           a row per trial that has ended: trial_id, status, config.*, metric.*
SWEEP/trials/0003/trial.json   begun: its point
SWEEP/trials/0003/result.json  ended: a finished trial is never run again
SWEEP/trials/0003/state.safetensors, best/   to go on from; its checkpoint
SWEEP/best.yaml, best/         the best trial: its config, which jobs/train.py --config takes, and its checkpoint
SWEEP/summary.json, pictures/, index.html
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vaemo import files
from vaemo.card import write_card
from vaemo.config import Config
from vaemo.errors import SweepFailedError
from vaemo.model.checkpoint import load_checkpoint, save_checkpoint
from vaemo.training.run_folder import BEST
from vaemo.tuning.space import Point, Space
from vaemo.tuning.trial import METRIC

MARKER, TABLE, BEST_CONFIG, SUMMARY = "_sweep.json", "trials.parquet", "best.yaml", "summary.json"
_TRIAL, _RESULT, _STATE = "trial.json", "result.json", "state.safetensors"

DONE, STOPPED, FAILED = "done", "stopped", "failed"
"""A trial ran to its end, was ended early by the scheduler, or raised an error."""

MIN_GROUPED = 4
"""Quarters into which the values of a number are put to see whether results differ between them."""


@dataclass(frozen=True)
class Record:
    """A trial that has ended.

    Attributes:
        number: From 0, which is the config itself.
        status: `done`, `stopped` or `failed`.
        point: Its values of the fields that are searched.
        config: All fields that decide its result, as `Config.to_dict` gives them.
        metrics: Of its last epoch; empty where it failed before the first.
        curve: Optimiser step and dev CCC after every epoch.
        error: What a failed one raised.
    """

    number: int
    status: str
    point: Point
    config: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    curve: list[tuple[int, float]]
    error: str | None = None

    @property
    def trial_id(self) -> str:
        """Its name in the table and the folder."""
        return f"{self.number:04d}"

    @property
    def value(self) -> float | None:
        """The dev CCC; None where it failed."""
        return None if self.status == FAILED else self.metrics[METRIC]

    @property
    def stopped_at(self) -> int | None:
        """The optimiser step at which it was ended early; None where it was not."""
        return self.metrics["step"] if self.status == STOPPED else None


class Sweep:
    """What is in the folder of a sweep.

    Attributes:
        out: Path or URI; claimed already.
        records: The trials that have ended, by number.
        unfinished: The points of those that have begun.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.records: dict[int, Record] = {}
        self.unfinished: dict[int, Point] = {}
        for path in files.list_files(files.join(out, "trials"), ".json", recursive=True):
            folder, _, name = path.rpartition("/")
            if name not in (_TRIAL, _RESULT):
                continue
            number = int(folder.rpartition("/")[2])
            held = files.read_json(path)
            if name == _RESULT:
                self.records[number] = Record(**{**held, "curve": [tuple(at) for at in held["curve"]]})
            else:
                self.unfinished[number] = held["point"]
        self.unfinished = {n: point for n, point in self.unfinished.items() if n not in self.records}

    def folder(self, number: int) -> str:
        """Where a trial keeps its files."""
        return trial_folder(self.out, number)

    def begin(self, number: int, point: Mapping[str, Any]) -> None:
        """Note a trial before it runs."""
        files.write_json(files.join(self.folder(number), _TRIAL), {"point": dict(point)})
        self.unfinished[number] = dict(point)

    def end(self, record: Record) -> None:
        """Note what a trial gave, and renew the table."""
        files.write_json(files.join(self.folder(record.number), _RESULT), dataclasses.asdict(record))
        self.records[record.number] = record
        self.unfinished.pop(record.number, None)
        files.write_parquet_whole(files.join(self.out, TABLE), table_of(list(self.records.values())))

    @property
    def best(self) -> Record | None:
        """The trial with the highest dev CCC of those that ran to their end; the first of equals."""
        done = [record for _, record in sorted(self.records.items()) if record.status == DONE]
        return max(done, key=lambda record: record.value or -2.0, default=None)

    def keep_best(self) -> Record:
        """Write best.yaml and best/ from the best trial, and return it.

        Raises:
            SweepFailedError: if no trial ran to its end, with the first error.
        """
        best = self.best
        if best is None:
            failed = [record for _, record in sorted(self.records.items()) if record.status == FAILED]
            raise SweepFailedError(
                f"none of {len(self.records)} trials ran to its end, {len(failed)} failed"
                + (f"; the first, trial {failed[0].trial_id}: {failed[0].error}" if failed else ".")
            )
        config = Config.from_dict(best.config)
        files.write_whole(files.join(self.out, BEST_CONFIG), config.to_yaml().encode())
        held = load_checkpoint(files.join(self.folder(best.number), BEST))
        kept = files.join(self.out, BEST)
        provenance = {**held.provenance, "sweep": {"trial_id": best.trial_id, "trials": len(self.records)}}
        save_checkpoint(
            kept, held.model, held.config, features=held.features, metrics=held.metrics, provenance=provenance
        )
        write_card(kept)
        return best


def trial_folder(out: str, number: int) -> str:
    """Where a trial of a sweep keeps its files."""
    return files.join(out, "trials", f"{number:04d}")


def read_state(folder: str) -> bytes | None:
    """What `write_state` left in the folder of a trial; None where it has not come so far."""
    path = files.join(folder, _STATE)
    return files.read_bytes(path) if files.exists(path) else None


def write_state(folder: str, state: bytes) -> None:
    """Keep what a trial needs to go on, in place of what was kept before."""
    files.write_whole(files.join(folder, _STATE), state)


def table_of(records: Sequence[Record]) -> pa.Table:
    """A row per trial, by number: `trial_id`, `status`, `error`, `config.*` of fields searched, `metric.*`.

    A field that was not searched in a trial, since its condition did not hold, is null there.
    """
    records = sorted(records, key=lambda record: record.number)
    columns: dict[str, list[Any]] = {
        "trial_id": [record.trial_id for record in records],
        "status": [record.status for record in records],
        "error": [record.error for record in records],
    }
    for name in dict.fromkeys(name for record in records for name in record.point):
        columns[f"config.{name}"] = [record.point.get(name) for record in records]
    columns["config.train.epochs"] = [record.config["train"]["epochs"] for record in records]
    for name in dict.fromkeys(name for record in records for name in record.metrics):
        columns[f"metric.{name}"] = [record.metrics.get(name) for record in records]
    return pa.table({name: _column(name, values) for name, values in columns.items()})


def _column(name: str, values: list[Any]) -> pa.Array:
    """Numbers as numbers; what Parquet has no common type for as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and name.startswith("metric."):
        return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
    if kinds == {int, float}:
        return pa.array(values, pa.float64())
    if len(kinds) > 1 or kinds & {list, tuple}:
        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.array(values, None if kinds else pa.string())


def importance(space: Space, records: Sequence[Record]) -> dict[str, float | None]:
    """How much of the differences between trials a field explains by itself, between 0 and 1.

    The eta squared of the Kruskal-Wallis test, (H - k + 1) / (n - k), over the n trials that ran to their end and in
    which the field was searched; its k groups are the choices, or quarters of a number's values. It works on ranks, so
    that one collapsed trial does not decide it, and is corrected for the number of groups: a field without effect has
    0 on average, and negative values are shown as 0. None where there are too few trials or only one group.

    Source:
        Tomczak and Tomczak (2014), The need to report effect size estimates revisited, p. 22.
    """
    found: dict[str, float | None] = {}
    for parameter in space.parameters:
        mine = [r for r in records if r.status == DONE and parameter.name in r.point]
        values = [record.point[parameter.name] for record in mine]
        if parameter.kind == "choice":
            group = np.array([parameter.values.index(v) if v in parameter.values else -1 for v in values], np.int64)
        else:
            numbers = np.array(values, np.float64)
            inner = np.linspace(0, 1, MIN_GROUPED + 1)[1:-1]
            group = np.searchsorted(np.quantile(numbers, inner), numbers) if len(numbers) else np.zeros(0, np.int64)
        found[parameter.name] = _eta_squared(np.array([record.value for record in mine], np.float64), group)
    return found


def _eta_squared(values: np.ndarray, group: np.ndarray) -> float | None:
    n, k = len(values), len(np.unique(group))
    if k < 2 or n <= k or (values == values[:1]).all():
        return None
    ordered = np.sort(values)
    rank = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2
    between = sum((group == g).sum() * (rank[group == g].mean() - rank.mean()) ** 2 for g in np.unique(group))
    h = (n - 1) * between / ((rank - rank.mean()) ** 2).sum()
    return float(max(0.0, (h - k + 1) / (n - k)))
