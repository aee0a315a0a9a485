"""The ablation job: every cell of the grid is one training, run by an executor.

Reads a feature store, writes one file per cell, and the table. A killed grid, run again, does only the missing cells,
and may be given more seeds. A failed cell is recorded and retried by the next run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vaemo import files
from vaemo.ablation.cell import check_fold, read_result, run_cell, write_result
from vaemo.ablation.grid import Cell, choose_variants, plan_cells
from vaemo.ablation.pictures import ablation
from vaemo.ablation.table import Result, Row, summarise, to_latex, to_markdown, to_parquet
from vaemo.config import Config
from vaemo.data.sessions import Session
from vaemo.data.splits import Fold
from vaemo.data.windows import PackedSessions
from vaemo.drawing import write_pictures
from vaemo.errors import UsageError
from vaemo.model.checks import used_pasts
from vaemo.parts.shards import claim_folder, digest
from vaemo.pipeline.executors import Executor
from vaemo.progress import Progress, say
from vaemo.training.data import TRAINING_SECTIONS, TrainingData
from vaemo.training.jobs import Failure, Job, Jobs, Line, Place

MARKER, CELLS = "_ablation.json", "cells"

MAX_DEATHS = 2
"""How often the process of a cell may die before the grid continues without it."""


def ablate(
    store: str,
    out: str,
    config: Config,
    executor: Executor,
    *,
    seeds: int = 3,
    folds: str | None = None,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """Train every variant with every seed on every fold, compare them, and write the table.

    Args:
        store: Path or URI of a feature store.
        out: Where `ablation.md`, `.parquet`, `.tex` and `.png`, `cells.parquet` (one row per training) and the cells'
            predictions go, on storage that every node sees.
        config: Of the full model; seeds count from `train.seed`.
        executor: Where to train.
        seeds: How many.
        folds: `by=fold`, `by=speaker` or `k=N`, everything held out once; None compares on the split `test`.
        only: Names of the ablations and baselines to compare; None is all. Fewer comparisons are corrected less.

    Returns:
        The rows of the table; see `vaemo.ablation.table.summarise`.

    Raises:
        UsageError: for unknown folds or variants, or an encoder that is to be trained.
        ClusterError: if no node can do the work, or none is left.
        OtherRunError: if `out` holds a grid with other settings or data.
        VaemoError: what `vaemo.data` and `check_fold` raise; and, where no variant can be done, what the first cell
            failed with.
    """
    if config.train.encoder != "frozen":
        raise UsageError(
            f"train.encoder is '{config.train.encoder}'; the grid trains on the features of a store, so only 'frozen' "
            "can be compared."
        )
    data = TrainingData.open(store, config, folds)
    for fold in data.parts:
        check_fold(data.labelled, fold, config)
    variants, left_out = choose_variants(config, data.store.dims, only)
    first = config.train.seed
    names = [fold.name for fold in data.parts]
    cells = plan_cells(variants, range(first, first + seeds), names)
    _claim(out, data)
    for line in left_out:
        say(line)

    missing = [cell for cell in cells if not files.exists(_path(out, cell))]
    say(f"{len(variants)} variants, {len(cells)} trainings, {len(missing)} of them to do")
    failed = _run(missing, data, out, len(cells), executor) if missing else {}
    results = {cell: read_result(_path(out, cell)) for cell in cells if cell not in failed}
    rows = summarise(results, variants, names, config.evaluate)
    if not any(row["n_seeds"] for row in rows):
        raise next(failure.error(job) for job, failure in failed.values())
    _write(out, rows, results, failed)
    return rows


def _claim(out: str, data: TrainingData) -> None:
    config = data.config
    how = config.features.speaker_aggregation
    settings = {
        **config.decisive(*TRAINING_SECTIONS),
        "folds": data.folds,
        "data": data.digest,
        "speaker_aggregation": how,
    }
    fingerprint = digest(config.fingerprint(*TRAINING_SECTIONS), data.digest, how, str(data.folds))
    claim_folder(out, MARKER, fingerprint, {"data": data.digest, "settings": settings}, inputs=data.store.parts)


def _run(
    cells: Sequence[Cell], data: TrainingData, out: str, n_all: int, executor: Executor
) -> dict[Cell, tuple[Job, Failure]]:
    """Run cells, and print which failed, and why."""
    config, folds = data.config, {fold.name: fold for fold in data.parts}
    failed: dict[Cell, tuple[Job, Failure]] = {}
    progress = Progress("ablate", n_all, "trainings", done=n_all - len(cells))

    def ended(job: Job, line: Line, failure: Failure | None) -> None:
        if failure:
            failed[cells[job.number]] = job, failure
            say(f"warning: {job.name} failed: {failure.text}")
        progress.advance(1, job.name)

    def pack(part: str | None) -> PackedSessions:
        sessions = data.sessions(data.parts[0] if part is None else folds[part])
        return PackedSessions.of(sessions).with_past(used_pasts(config.model, data.store.dims))

    executor.train(
        Jobs(
            work=Cells(cells, data.labelled, folds, config),
            jobs=[
                Job(
                    number,
                    cell.name,
                    files.join(out, CELLS, cell.name),
                    config.replace({"train": {"seed": cell.seed}}),
                    cell.fold,
                    data.digest,
                )
                for number, cell in enumerate(cells)
            ],
            pack=pack,
            ended=ended,
            count=len(cells),
            storage=files.join(out, "_ray"),
            apart=data.voices_differ,
            needs=[files.join(out, MARKER)],
            deaths=MAX_DEATHS,
        )
    )
    progress.close()
    return failed


@dataclass(frozen=True)
class Cells:
    """The work of a job of the grid: train a cell, and write its predictions.

    Attributes:
        cells: By the number of the job.
        sessions: Of the whole store, without features.
        folds: By name.
        config: Of the full model.
    """

    cells: Sequence[Cell]
    sessions: Sequence[Session]
    folds: Mapping[str, Fold]
    config: Config

    def __call__(self, job: Job, sessions: PackedSessions, place: Place) -> Iterator[Line]:
        """See `vaemo.training.jobs.Work`; `sessions` are those of the store, with features."""
        cell = self.cells[job.number]
        fold, device = self.folds[cell.fold], str(place.device)
        table, facts = run_cell(cell, self.sessions, sessions, fold, self.config, device=device, say=place.say)
        write_result(f"{job.out}.parquet", table, facts)
        yield {"finished": True}


def _write(
    out: str, rows: Sequence[Row], results: Mapping[Cell, Result], failed: Mapping[Cell, tuple[Job, Failure]]
) -> None:
    notes = [f"{cell.name} failed: {failure.text}" for cell, (_, failure) in failed.items()]
    markdown = to_markdown(rows, notes)
    files.write_parquet_whole(files.join(out, "ablation.parquet"), to_parquet(rows))
    files.write_whole(files.join(out, "ablation.md"), markdown.encode())
    files.write_whole(files.join(out, "ablation.tex"), to_latex(rows).encode())
    write_pictures(out, {"ablation": lambda: ablation(rows)})
    done = [{"status": "ok", "reason": None, **facts} for _, facts in results.values()]
    lost = [
        {"variant": cell.variant.name, "seed": cell.seed, "fold": cell.fold, "status": "failed", "reason": failure.text}
        for cell, (_, failure) in failed.items()
    ]
    files.write_parquet_whole(files.join(out, "cells.parquet"), pa.Table.from_pylist(_same_keys([*done, *lost])))
    say(f"\n{markdown}\nsee {files.join(out, 'ablation.png')}; failed: {len(failed)} of {len(results) + len(failed)}")


def _same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _path(out: str, cell: Cell) -> str:
    return files.join(out, CELLS, f"{cell.name}.parquet")
