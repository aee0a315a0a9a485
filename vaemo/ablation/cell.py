"""One training of the grid: sessions in, predictions of the held-out utterances out, and the file that keeps them."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vaemo import files
from vaemo.ablation.baselines import Given
from vaemo.ablation.grid import Cell
from vaemo.config import Config
from vaemo.data.sessions import Session
from vaemo.data.splits import Fold
from vaemo.data.windows import PackedSessions
from vaemo.errors import LabelError
from vaemo.metrics import ccc
from vaemo.model.checks import used_streams
from vaemo.model.regressor import SessionRegressor
from vaemo.progress import say
from vaemo.training.data import split_of
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer, check_labels
from vaemo.units import SPLITS, LabelScale

_FACTS = b"vaemo.cell"


def check_fold(sessions: Sequence[Session], fold: Fold, config: Config) -> None:
    """Raise LabelError unless every split of a fold has labels for training and for evaluation."""
    packed = PackedSessions.of(sessions)
    for name, part in zip(SPLITS, _parts(sessions, fold), strict=True):
        if name == "test" and not len(part):
            raise LabelError(
                "no utterance is in the split 'test', so that nothing is held out to compare the models on. Fill the "
                "column 'split', leave it out to have it made, or give --folds."
            )
        check_labels(packed.select(part), name, LabelScale(*config.model.label_range), config.model.names)


def run_cell(
    cell: Cell,
    sessions: Sequence[Session],
    packed: PackedSessions,
    fold: Fold,
    config: Config,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = say,
) -> tuple[pa.Table, dict[str, Any]]:
    """Train, and predict what is held out.

    Args:
        cell: What to train.
        sessions: Of the whole store; they need no features.
        packed: The same sessions, with features.
        fold: Who is trained on, chosen on, and held out.
        config: Of the full model; the cell's seed and changes are applied to it.
        device: Where to compute.
        say: Where the progress within long epochs is shown.

    Returns:
        table: The held-out utterances: `session_id`, `utt_id`, each target (running free), `fed_NAME` (with the labels
            of every earlier utterance fed; null for a model without feedback), `label_NAME`.
        facts: `variant`, `seed`, `fold`, CCC of the held-out utterances, `dev_ccc_avg`, `epochs`, `seconds`.

    Raises:
        VaemoError: as `Trainer`.
    """
    started = time.perf_counter()
    config = config.replace(cell.variant.changes).replace({"train": {"seed": cell.seed}})
    parts = _parts(sessions, fold)
    facts: dict[str, Any] = {"variant": cell.variant.name, "seed": cell.seed, "fold": cell.fold}
    fed = None
    if cell.variant.baseline:
        _, used = used_streams(config.model, {name: x.shape[1] for name, x in packed.features.items()})
        train, dev, test = ([_with_features(sessions[n], packed, n) for n in part] for part in parts)
        predicted = np.concatenate(cell.variant.baseline(Given(train, dev, test, list(used))))
    else:
        model, summary = _train(packed.select(parts[0]), packed.select(parts[1]), config, device, say)
        held = packed.select(parts[2]).to(device, getattr(torch, config.train.dtype)).with_past(model.pasts)
        known = None if held.observed.isnan().all() else held.observed
        predicted = replay(model, held, window=config.train.window, observed=known).prediction
        if model.has_feedback:
            fed = replay(model, held, window=config.train.window, observed=held.labels[:, : model.n_fed]).prediction
        facts |= {"dev_ccc_avg": summary["dev_ccc_avg"], "epochs": summary["epochs"]}
    names = config.model.names
    table = _table([sessions[number] for number in parts[2]], fold, names, predicted, fed)
    found = ccc(matrix(table, names), matrix(table, columns_named("label", names)))
    facts |= {f"ccc_{name}": float(value) for name, value in zip(names, found, strict=True)}
    facts |= {"n_session": len(config.model.session_targets)} if config.model.session_targets else {}
    return table, facts | {"ccc_avg": float(found.mean()), "seconds": time.perf_counter() - started}


def write_result(path: str, table: pa.Table, facts: dict[str, Any]) -> None:
    """Write the result of `run_cell`, with the facts in the file's metadata."""
    files.write_parquet_whole(path, table.replace_schema_metadata({_FACTS: json.dumps(facts)}))


def read_result(path: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read the result that `write_result` wrote."""
    table = files.read_parquet(path)
    return table, json.loads(table.schema.metadata[_FACTS])


def columns_named(what: str, targets: Sequence[str]) -> list[str]:
    """The columns of a result beside the targets' own: `fed`, or `label`."""
    return [f"{what}_{name}" for name in targets]


def targets_in(table: pa.Table) -> list[str]:
    """The targets that a result has."""
    return [name.removeprefix("label_") for name in table.column_names if name.startswith("label_")]


def matrix(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Columns of a result side by side, (n, columns); NaN where null."""
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def _train(
    train: PackedSessions, dev: PackedSessions, config: Config, device: str, say: Callable[[str], None]
) -> tuple[SessionRegressor, dict[str, Any]]:
    """The model that a run of the trainer keeps, and the run's summary."""
    trainer = Trainer(train, dev, config, device=device, say=say)
    kept = trainer.kept
    for _ in trainer:
        if trainer.improved:
            kept = copy.deepcopy(trainer.kept)
    return kept, trainer.summary()


def _parts(sessions: Sequence[Session], fold: Fold) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the sessions to train on, to choose on, and of those that hold what is held out."""
    split = split_of(sessions, fold)
    held = np.array([fold.held_out[session.rows].any() for session in sessions], bool)
    train, dev, test = (split == name for name in SPLITS)
    return np.flatnonzero(train), np.flatnonzero(dev), np.flatnonzero(test & held)


def _with_features(session: Session, packed: PackedSessions, number: int) -> Session:
    """A session as a baseline takes it; its number is that among the packed ones."""
    first = packed.offsets[number]
    features = packed.at(torch.arange(first, first + packed.lengths[number]))
    return dataclasses.replace(session, streams={name: x.numpy() for name, x in features.items()})


def _table(
    test: Sequence[Session], fold: Fold, targets: Sequence[str], predicted: np.ndarray, fed: np.ndarray | None
) -> pa.Table:
    kept = fold.held_out[np.concatenate([session.rows for session in test])]
    session_ids = np.concatenate([np.full(len(session), session.session_id, object) for session in test])
    columns: dict[str, Any] = {
        "session_id": pa.array(session_ids[kept], pa.string()),
        "utt_id": pa.array(np.concatenate([session.utt_ids for session in test])[kept], pa.string()),
    }
    labels = np.concatenate([session.labels for session in test])
    for names, values in (
        (targets, predicted),
        (columns_named("fed", targets), fed),
        (columns_named("label", targets), labels),
    ):
        for number, name in enumerate(names):
            column = np.full(len(kept), np.nan) if values is None else values[:, number]
            columns[name] = pa.array(column[kept], pa.float32(), from_pandas=True)
    return pa.table(columns)
