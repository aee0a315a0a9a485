"""RUN/oof: every held-out row scored by the model that did not see it, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vaemo import files, scores
from vaemo.config import ModelConfig
from vaemo.metrics import Moments
from vaemo.model.checkpoint import Checkpoint
from vaemo.sessions import label_ranges, last_rows
from vaemo.tables import codes
from vaemo.training.data import TrainingData
from vaemo.training.end_to_end import rehear
from vaemo.training.replay import replay
from vaemo.training.waveforms import Waveforms
from vaemo.windows import PackedSessions


def score_held_out(
    data: TrainingData, models: Mapping[str, Checkpoint], manifest: str | None, out: str, fingerprint: str
) -> dict[str, Any]:
    """Write the scores of all folds' held-out rows to `out`, a folder of scores.

    Args:
        data: With folds.
        models: The checkpoint of every fold, by its name.
        manifest: Of the store, where the checkpoints hold their own speech encoders.
        out: The folder.
        fingerprint: Of the run.

    Returns:
        CCC, CCC within sessions and RMSE: `fold_mean`, `pooled`, and `folds` by name.
    """
    config, n = data.config, len(data.table)
    targets, n_fed = config.model.names, len(config.model.utterance_targets)
    labels, predictions = (np.full((n, len(targets)), np.nan) for _ in range(2))
    weights = np.full((n, n_fed), np.nan)
    names, per_fold = np.full(n, None, object), {}
    for session in data.labelled:
        labels[session.rows] = session.labels
    sessions, session_ids = data.read(), codes(data.table["session_id"])
    for fold in data.parts:
        tested = [session for session in data.aggregate(sessions, fold) if fold.held_out[session.rows].any()]
        checkpoint = models[fold.name]
        if manifest and checkpoint.has_encoder and checkpoint.features:
            tested = rehear(tested, checkpoint.features, Waveforms.of_store(data.store, manifest, config))
        packed = PackedSessions.of(tested, dtype=getattr(torch, config.train.dtype))
        known = packed.observed if not packed.observed.isnan().all() else None
        found = replay(checkpoint.model, packed, window=config.train.window, observed=known).prediction
        rows = np.concatenate([session.rows for session in tested])
        mine = fold.held_out[rows]
        predictions[rows[mine]] = found[mine]
        if checkpoint.errors:
            position = np.arange(len(rows)) - np.repeat(packed.offsets, packed.lengths)
            weights[rows[mine]] = checkpoint.errors.weights(position)[mine]
        names[fold.held_out] = fold.name
        per_fold[fold.name] = _measures(predictions, labels, session_ids, fold.held_out, config.model)
    _write(data, predictions, weights, names, out, fingerprint)
    keys = next(iter(per_fold.values()))
    mean = {key: _mean([measures[key] for measures in per_fold.values()]) for key in keys}
    return {
        "fold_mean": mean,
        "pooled": _measures(predictions, labels, session_ids, np.ones(n, bool), config.model),
        "folds": per_fold,
    }


def _write(
    data: TrainingData, predictions: np.ndarray, weights: np.ndarray, names: np.ndarray, out: str, fingerprint: str
) -> None:
    model, ends = data.config.model, last_rows(data.table)
    columns = dict(zip(data.table.column_names, data.table.columns, strict=True))
    for n, name in enumerate(model.names):
        values = predictions[:, n]
        if name in model.session_targets:
            values = np.full(len(values), np.nan)
            values[ends] = predictions[ends, n]
        columns[name] = pa.array(values, pa.float32(), from_pandas=True)
    columns |= {
        "split": pa.array(["test" if name else None for name in names], pa.string()),
        "fold": pa.array(names, pa.string()),
        "run_id": pa.array([fingerprint[:12]] * len(names)),
    }
    if not np.isnan(weights).all():
        found = (pa.array(column, pa.float32(), from_pandas=True) for column in weights.T)
        columns |= dict(zip(scores.weight_names(model.targets), found, strict=True))
    files.write_json(
        files.join(out, scores.PROVENANCE),
        {
            "fingerprint": fingerprint,
            "label_range": list(data.config.model.label_range),
            "native_range": label_ranges(data.config, data.store).native or list(model.label_range),
            **scores.targets_said(model),
            "held_out": data.folds,
        },
    )
    scores.write_part(
        out, f"part-{fingerprint[:16]}.parquet", pa.table(columns), data.config.score, targets=model.targets
    )


def _measures(
    predictions: np.ndarray, labels: np.ndarray, session: np.ndarray, rows: np.ndarray, model: ModelConfig
) -> dict[str, float | None]:
    """CCC, CCC within sessions and RMSE of some rows; None where it is not defined."""
    x, y = predictions[rows], labels[rows]
    moments = Moments.of(x, y)
    pooled, within = moments.ccc(), Moments.within(x, y, session[rows]).ccc()
    # A target of the session has one label in each, and no agreement within it.
    within = within[: len(model.utterance_targets)]
    keys = [f"ccc_{name}" for name in (*model.names, "avg")]
    keys += [f"within_ccc_{name}" for name in (*model.utterance_targets, "avg")]
    keys += [f"rmse_{name}" for name in model.names]
    values = [*pooled, pooled.mean(), *within, within.mean() if len(within) else np.nan, *moments.rmse()]
    return {key: float(value) if np.isfinite(value) else None for key, value in zip(keys, values, strict=True)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
