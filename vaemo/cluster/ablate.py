"""The ablation grid on Ray: every cell a task of its own, several at a time.

The distributed form of `vaemo.ablation`. The driver reads the store once, and every node holds it once; the driver also
keeps what comes back, one file per cell. So a grid that was killed, run again, does only the cells that are missing,
and may be given more seeds. A cell that fails is noted and tried again by the next run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from vaemo import files
from vaemo.ablation.cell import check_fold, read_result, run_cell, write_result
from vaemo.ablation.grid import Cell, choose_variants, plan_cells
from vaemo.ablation.pictures import ablation
from vaemo.ablation.table import Result, Row, summarise, to_latex, to_markdown, to_parquet
from vaemo.cluster.console import Console, tell
from vaemo.cluster.nodes import total
from vaemo.cluster.runtime import NO_PROGRESS_S, connect, fit_pool
from vaemo.config import Config
from vaemo.drawing import write_pictures
from vaemo.errors import UsageError, VaemoError, carried, raise_carried
from vaemo.model.checks import used_pasts
from vaemo.parts.shards import claim_folder, digest
from vaemo.progress import Progress, say
from vaemo.sessions import Session
from vaemo.splits import Fold
from vaemo.training.data import SECTIONS, TrainingData
from vaemo.windows import PackedSessions

MARKER, CELLS = "_ablation.json", "cells"

GPU_SHARE = 0.25
"""Of a GPU for each cell, where the cluster has any: a session model is small, and four keep one busy."""

MAX_ATTEMPTS = 3
"""How often a cell is begun whose worker dies; the grid then goes on without it."""


def ablate(
    store: str,
    out: str,
    config: Config,
    *,
    seeds: int = 3,
    folds: str | None = None,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """Train every variant with every seed on every fold, compare them, and write the table.

    Args:
        store: Path or URI of a feature store; only the driver reads it.
        out: Where `ablation.md`, `.parquet`, `.tex` and `.png`, `cells.parquet` (one row per training) and the cells'
            predictions go.
        config: Of the full model; seeds count from `train.seed`.
        seeds: How many.
        folds: `by=fold`, `by=speaker` or `k=N`, everything held out once; None compares on the split `test`.
        only: Names of the ablations and baselines to compare; None is all. Fewer comparisons are corrected less.

    Returns:
        The rows of the table; see `vaemo.ablation.table.summarise`.

    Raises:
        UsageError: for unknown folds or variants, or an encoder that is to be trained.
        ClusterError: if no node can do the work, or none is left.
        OtherRunError: if `out` holds a grid with other settings or data.
        VaemoError: what `vaemo.splits`, `vaemo.sessions` and `check_fold` raise; and, where no variant can be done,
            what the first cell failed with.
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
    failed = _run(missing, data, out, len(cells)) if missing else {}
    results = {cell: read_result(_path(out, cell)) for cell in cells if cell not in failed}
    rows = summarise(results, variants, names, config.evaluate)
    if not any(row["n_seeds"] for row in rows):
        raise next(iter(failed.values()))
    _write(out, rows, results, failed)
    return rows


def _claim(out: str, data: TrainingData) -> None:
    config = data.config
    how = config.features.speaker_aggregation
    settings = {**config.decisive(*SECTIONS), "folds": data.folds, "data": data.digest, "speaker_aggregation": how}
    fingerprint = digest(config.fingerprint(*SECTIONS), data.digest, how, str(data.folds))
    claim_folder(out, MARKER, fingerprint, {"data": data.digest, "settings": settings}, inputs=data.store.parts)


def _run(cells: Sequence[Cell], data: TrainingData, out: str, n_all: int) -> dict[Cell, Exception]:
    """Do cells, write each as it comes back, and say which could not be done, and why."""
    connect()
    gpus = GPU_SHARE if total("GPU") else 0.0
    pool = fit_pool(gpus=gpus)
    say(f"{min(pool.workers, len(cells))} at a time")
    failed: dict[Cell, Exception] = {}
    progress = Progress("ablate", n_all, "trainings", done=n_all - len(cells))
    with Console() as console:
        folds = {fold.name: fold for fold in data.parts}
        labelled, packed = ray.put(data.labelled), _share(data)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_cell)

        def start(cell: Cell) -> ray.ObjectRef:
            return task.remote(cell, labelled, packed[cell.fold], folds[cell.fold], data.config, console.lines)

        running = {start(cell): (cell, 1) for cell in cells}
        while running:
            ended, _ = ray.wait(list(running), timeout=NO_PROGRESS_S)
            if not ended:
                # A cell may take longer; but what waits for a node that is gone would wait for ever.
                fit_pool(gpus=gpus)
                continue
            (done,) = ended
            cell, attempt = running.pop(done)
            try:
                found = ray.get(done)
                raise_carried(found)
            except (RayError, VaemoError) as error:
                # What a cell itself raised it would raise again; a worker that died may have been unlucky.
                if not isinstance(error, RayTaskError | VaemoError) and attempt < MAX_ATTEMPTS:
                    running[start(cell)] = (cell, attempt + 1)
                    continue
                failed[cell] = error
                say(f"warning: {cell.name} failed: {_reason(error)}")
            else:
                write_result(_path(out, cell), found["table"], found["facts"])
            progress.advance(1, cell.name)
    progress.close()
    return failed


def _share(data: TrainingData) -> dict[str, ray.ObjectRef]:
    """The packed sessions of each fold: the same for all, but where voices differ."""
    pasts = used_pasts(data.config.model, data.store.dims)

    def share(fold: Fold) -> ray.ObjectRef:
        return ray.put(PackedSessions.of(data.sessions(fold)).with_past(pasts))

    if data.voices_differ:
        return {fold.name: share(fold) for fold in data.parts}
    return dict.fromkeys((fold.name for fold in data.parts), share(data.parts[0]))


def _run_cell(
    cell: Cell, sessions: list[Session], packed: PackedSessions, fold: Fold, config: Config, lines: Any
) -> dict[str, Any]:
    """What a worker does; a VaemoError is carried home as a value, without Ray's wrapping."""
    torch.set_num_threads(1)
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    try:
        table, facts = run_cell(
            cell, sessions, packed, fold, config, device=device, say=lambda text: tell(lines, f"{cell.name}: {text}")
        )
    except VaemoError as error:
        return carried(error)
    return {"table": table, "facts": facts}


def _write(out: str, rows: Sequence[Row], results: Mapping[Cell, Result], failed: Mapping[Cell, Exception]) -> None:
    notes = [f"{cell.name} failed: {_reason(error)}" for cell, error in failed.items()]
    markdown = to_markdown(rows, notes)
    files.write_parquet_whole(files.join(out, "ablation.parquet"), to_parquet(rows))
    files.write_whole(files.join(out, "ablation.md"), markdown.encode())
    files.write_whole(files.join(out, "ablation.tex"), to_latex(rows).encode())
    write_pictures(out, {"ablation": lambda: ablation(rows)})
    done = [{"status": "ok", "reason": None, **facts} for _, facts in results.values()]
    lost = [
        {"variant": cell.variant.name, "seed": cell.seed, "fold": cell.fold, "status": "failed", "reason": _reason(e)}
        for cell, e in failed.items()
    ]
    files.write_parquet_whole(files.join(out, "cells.parquet"), pa.Table.from_pylist(_same_keys([*done, *lost])))
    say(f"\n{markdown}\nsee {files.join(out, 'ablation.png')}; failed: {len(failed)} of {len(results) + len(failed)}")


def _same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _reason(error: Exception) -> str:
    """The last line of a message: of a traceback it is the one that says what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _path(out: str, cell: Cell) -> str:
    return files.join(out, CELLS, f"{cell.name}.parquet")
