"""The folder of a sweep: the point and result of each trial, and the results of the sweep.

SWEEP/_sweep.json              identifies the sweep
SWEEP/trials.parquet           a row per trial that has ended: trial_id, status, config.*, metric.*
SWEEP/trials/0003/trial.json   begun: its point
SWEEP/trials/0003/result.json  ended: a finished trial is never run again
SWEEP/trials/0003/state.safetensors, best/   to resume from; its checkpoint
SWEEP/trials/0003/failure.txt  the traceback of a failed trial
SWEEP/_held_out.json           the held-out sessions, and how often they were evaluated
SWEEP/best.yaml, best/         the best trial: its config, which jobs/train.py --config takes, and its checkpoint
SWEEP/summary.json, pictures/, index.html
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vaemo import files
from vaemo.config import Config
from vaemo.errors import SweepFailedError
from vaemo.model.checkpoint import copy_checkpoint
from vaemo.training.card import write_card
from vaemo.training.run_folder import BEST
from vaemo.tuning.space import Point
from vaemo.tuning.trial import METRIC

MARKER, TABLE, BEST_CONFIG, SUMMARY = "_sweep.json", "trials.parquet", "best.yaml", "summary.json"
_TRIAL, _RESULT = "trial.json", "result.json"

DONE, STOPPED, FAILED = "done", "stopped", "failed"
"""A trial ran to its end, was ended early by the scheduler, or raised an error."""


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
        error: The error of a failed trial.
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
    """The content of the folder of a sweep.

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
        """The folder of a trial."""
        return trial_folder(self.out, number)

    def begin(self, number: int, point: Mapping[str, Any]) -> None:
        """Note a trial before it runs."""
        files.write_json(files.join(self.folder(number), _TRIAL), {"point": dict(point)})
        self.unfinished[number] = dict(point)

    def end(self, record: Record) -> None:
        """Record the result of a trial, and rewrite the table."""
        files.write_json(files.join(self.folder(record.number), _RESULT), dataclasses.asdict(record))
        self.records[record.number] = record
        self.unfinished.pop(record.number, None)
        files.write_parquet_whole(files.join(self.out, TABLE), table_of(list(self.records.values())))

    @property
    def best(self) -> Record | None:
        """The trial with the highest dev CCC of those that ran to their end; the first of equals."""
        done = [record for _, record in sorted(self.records.items()) if record.status == DONE]
        return max(done, key=lambda record: -2.0 if record.value is None else record.value, default=None)

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
        kept, about = files.join(self.out, BEST), {"trial_id": best.trial_id, "trials": len(self.records)}
        copy_checkpoint(files.join(self.folder(best.number), BEST), kept, sweep=about)
        write_card(kept)
        return best


def trial_folder(out: str, number: int) -> str:
    """Where a trial of a sweep keeps its files."""
    return files.join(out, "trials", f"{number:04d}")


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
