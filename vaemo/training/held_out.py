"""RUN/oof: every held-out row scored by the model that did not see it, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vaemo import files, scores
from vaemo.metrics import Moments
from vaemo.model.checkpoint import Checkpoint
from vaemo.sessions import Session, label_range
from vaemo.tables import codes
from vaemo.training.data import LIGHT, TrainingData
from vaemo.training.end_to_end import rehear
from vaemo.training.replay import replay
from vaemo.training.waveforms import Waveforms
from vaemo.units import DIMENSIONS
from vaemo.windows import PackedSessions


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
    n = len(data.table)
    labels, predictions, spread, weights = (np.full((n, len(DIMENSIONS)), np.nan) for _ in range(4))
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
        per_fold[fold.name] = _measures(predictions, labels, session_ids, fold.held_out)
    _write(data, predictions, spread, weights, names, out, fingerprint)
    mean = {key: _mean([measures[key] for measures in per_fold.values()]) for key in _KEYS}
    return {
        "fold_mean": mean,
        "pooled": _measures(predictions, labels, session_ids, np.ones(n, bool)),
        "folds": per_fold,
    }


def predict(
    data: TrainingData, checkpoint: Checkpoint, sessions: Sequence[Session], manifest: str | None = None
) -> np.ndarray:
    """What a model predicts of sessions, running free but for what is observed: (utterances, dimensions)."""
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
    columns = {name: data.table[name] for name in LIGHT if name not in DIMENSIONS}
    columns |= {name: pa.array(predictions[:, n], pa.float32(), from_pandas=True) for n, name in enumerate(DIMENSIONS)}
    if not np.isnan(spread).all():
        columns |= {
            f"{name}_sd": pa.array(spread[:, n], pa.float32(), from_pandas=True) for n, name in enumerate(DIMENSIONS)
        }
    columns |= {
        "split": pa.array(["test" if name else None for name in names], pa.string()),
        "fold": pa.array(names, pa.string()),
        "run_id": pa.array([fingerprint[:12]] * len(names)),
    }
    if not np.isnan(weights).all():
        found = (pa.array(weights[:, n], pa.float32(), from_pandas=True) for n in range(len(DIMENSIONS)))
        columns |= dict(zip(scores.WEIGHT_SCHEMA.names, found, strict=True))
    native = label_range(data.config, data.store).native
    files.write_json(
        files.join(out, scores.PROVENANCE),
        {
            "fingerprint": fingerprint,
            "label_range": list(data.config.model.label_range),
            "native_range": [native.low, native.high],
            "held_out": data.folds,
        },
    )
    scores.write_part(out, f"part-{fingerprint[:16]}.parquet", pa.table(columns), data.config.score)


_NAMES = (*DIMENSIONS, "avg")
_KEYS = [f"{metric}_{name}" for metric in ("ccc", "within_ccc") for name in _NAMES]
_KEYS += [f"rmse_{name}" for name in DIMENSIONS]


def _measures(
    predictions: np.ndarray, labels: np.ndarray, session: np.ndarray, rows: np.ndarray
) -> dict[str, float | None]:
    """CCC, CCC within sessions and RMSE of some rows; None where it is not defined."""
    x, y = predictions[rows], labels[rows]
    moments = Moments.of(x, y)
    pooled, within = moments.ccc(), Moments.within(x, y, session[rows]).ccc()
    values = [*pooled, pooled.mean(), *within, within.mean(), *moments.rmse()]
    return {key: float(value) if np.isfinite(value) else None for key, value in zip(_KEYS, values, strict=True)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
