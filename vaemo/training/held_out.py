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
from vaemo.sessions import label_range
from vaemo.tables import codes
from vaemo.training.data import LIGHT, TrainingData
from vaemo.training.end_to_end import rehear
from vaemo.training.replay import replay
from vaemo.training.waveforms import Waveforms
from vaemo.units import DIMENSIONS
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
    labels, predictions = np.full((n, 2), np.nan), np.full((n, 2), np.nan)
    weights = np.full((n, 2), np.nan)
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
        per_fold[fold.name] = _measures(predictions, labels, session_ids, fold.held_out)
    _write(data, predictions, weights, names, out, fingerprint)
    mean = {key: _mean([measures[key] for measures in per_fold.values()]) for key in _KEYS}
    return {
        "fold_mean": mean,
        "pooled": _measures(predictions, labels, session_ids, np.ones(n, bool)),
        "folds": per_fold,
    }


def _write(
    data: TrainingData, predictions: np.ndarray, weights: np.ndarray, names: np.ndarray, out: str, fingerprint: str
) -> None:
    columns = {name: data.table[name] for name in LIGHT if name not in DIMENSIONS}
    columns |= {name: pa.array(predictions[:, n], pa.float32(), from_pandas=True) for n, name in enumerate(DIMENSIONS)}
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
