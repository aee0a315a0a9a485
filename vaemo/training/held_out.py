"""RUN/oof: every held-out row scored by the model that did not see it, and the resulting metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vaemo import files, scores
from vaemo.config import ModelConfig
from vaemo.data.sessions import Session, label_ranges, last_rows
from vaemo.data.windows import PackedSessions
from vaemo.metrics import Moments
from vaemo.model.checkpoint import Checkpoint
from vaemo.tables import codes
from vaemo.training.data import TrainingData
from vaemo.training.end_to_end import rehear
from vaemo.training.replay import replay
from vaemo.training.waveforms import Waveforms


def score_held_out(
    data: TrainingData, models: Mapping[str, Sequence[Checkpoint]], manifest: str | None, out: str, fingerprint: str
) -> dict[str, Any]:
    """Write the scores of all folds' held-out rows to `out`, a folder of scores.

    Args:
        data: With folds.
        models: The checkpoints of every fold, by its name: one for each seed, whose mean counts.
        manifest: Of the store, where the checkpoints hold their own speech encoders.
        out: The folder.
        fingerprint: Of the run.

    Returns:
        CCC, CCC within sessions and RMSE: `fold_mean`, `pooled`, and `folds` by name.
    """
    model, n = data.config.model, len(data.table)
    labels, predictions, spread = (np.full((n, len(model.names)), np.nan) for _ in range(3))
    weights = np.full((n, len(model.utterance_targets)), np.nan)
    names, per_fold = np.full(n, None, object), {}
    for session in data.labelled:
        labels[session.rows] = session.labels
    sessions, session_ids = data.read(), codes(data.table["session_id"])
    for fold in data.parts:
        tested = [session for session in data.aggregate(sessions, fold) if fold.held_out[session.rows].any()]
        found = np.stack([predict(data, checkpoint, tested, manifest) for checkpoint in models[fold.name]])
        rows = np.concatenate([session.rows for session in tested])
        mine = fold.held_out[rows]
        predictions[rows[mine]] = found.mean(axis=0)[mine]
        if len(found) > 1:
            spread[rows[mine]] = found.std(axis=0, ddof=1)[mine]
        known = [checkpoint.errors for checkpoint in models[fold.name] if checkpoint.errors]
        if known:
            position = np.concatenate([np.arange(len(session)) for session in tested])
            n_models = len(found)
            summed = np.sum([errors.weights(position) for errors in known], axis=0) + n_models - len(known)
            weights[rows[mine]] = summed[mine] / n_models
        names[fold.held_out] = fold.name
        per_fold[fold.name] = _measures(predictions, labels, session_ids, fold.held_out, model)
    _write(data, predictions, spread, weights, names, out, fingerprint)
    keys = next(iter(per_fold.values()))
    mean = {key: _mean([measures[key] for measures in per_fold.values()]) for key in keys}
    return {
        "fold_mean": mean,
        "pooled": _measures(predictions, labels, session_ids, np.ones(n, bool), model),
        "folds": per_fold,
    }


def predict(
    data: TrainingData, checkpoint: Checkpoint, sessions: Sequence[Session], manifest: str | None = None
) -> np.ndarray:
    """A model's predictions for sessions, fed back except where values are observed: (utterances, targets)."""
    config = data.config
    if manifest and checkpoint.has_encoder and checkpoint.features:
        sessions = rehear(sessions, checkpoint.features, Waveforms.of_store(data.store, manifest, config))
    packed = PackedSessions.of(sessions, dtype=getattr(torch, config.train.dtype))
    known = packed.observed if not packed.observed.isnan().all() else None
    return replay(checkpoint.model, packed, window=config.train.window, observed=known).prediction


def _write(
    data: TrainingData,
    predictions: np.ndarray,
    spread: np.ndarray,
    weights: np.ndarray,
    names: np.ndarray,
    out: str,
    fingerprint: str,
) -> None:
    model, inside = data.config.model, np.ones(len(names), bool)
    inside[last_rows(data.table)] = False
    # A target of the session is at its last row.
    n_own = len(model.utterance_targets)
    predictions[inside, n_own:] = spread[inside, n_own:] = np.nan
    columns = dict(zip(data.table.column_names, data.table.columns, strict=True))
    columns |= _floats(model.names, predictions)
    if not np.isnan(spread).all():
        columns |= _floats(scores.spread_names(model.targets), spread)
    columns |= {
        "split": pa.array(["test" if name else None for name in names], pa.string()),
        "fold": pa.array(names, pa.string()),
        "run_id": pa.array([fingerprint[:12]] * len(names)),
    }
    if not np.isnan(weights).all():
        columns |= _floats(scores.weight_names(model.targets), weights)
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


def _floats(names: Sequence[str], values: np.ndarray) -> dict[str, pa.Array]:
    return {
        name: pa.array(column, pa.float32(), from_pandas=True) for name, column in zip(names, values.T, strict=True)
    }


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
