"""RUN/oof: every held-out row scored by the model that did not see it, and the resulting metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vaemo import files, scores
from vaemo.config import ModelConfig
from vaemo.data.sessions import Session, label_ranges, last_rows
from vaemo.data.splits import Fold
from vaemo.data.windows import PackedSessions
from vaemo.metrics import Moments
from vaemo.model.checkpoint import Checkpoint
from vaemo.model.settling import mean_weights
from vaemo.progress import say
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
    labels = np.full((n, len(model.names)), np.nan)
    for session in data.labelled:
        labels[session.rows] = session.labels
    found, per_fold = _HeldOut.none_of(n, model), {}
    sessions, session_ids = data.read(), codes(data.table["session_id"])
    for fold in data.parts:
        tested = [session for session in data.aggregate(sessions, fold) if fold.held_out[session.rows].any()]
        of_fold = models[fold.name]
        found.add(
            fold, tested, np.stack([predict(data, checkpoint, tested, manifest) for checkpoint in of_fold]), of_fold
        )
        per_fold[fold.name] = _measures(found.prediction, labels, session_ids, fold.held_out, model)
    _write(data, found, models, out, fingerprint)
    keys = next(iter(per_fold.values()))
    return {
        "fold_mean": {key: _mean([measures[key] for measures in per_fold.values()]) for key in keys},
        "pooled": _measures(found.prediction, labels, session_ids, np.ones(n, bool), model),
        "folds": per_fold,
    }


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """What is known of every row of the store once the folds that held it out have been added, NaN or None before.

    Attributes:
        prediction: Mean over the fold's models, (rows, targets).
        spread: Deviation over them, where there are several.
        weight: Of the targets of utterances.
        fold: Name of the fold, (rows,).
    """

    prediction: np.ndarray
    spread: np.ndarray
    weight: np.ndarray
    fold: np.ndarray

    @classmethod
    def none_of(cls, n: int, model: ModelConfig) -> _HeldOut:
        """Nothing is known yet of `n` rows."""
        prediction, spread = (np.full((n, len(model.names)), np.nan) for _ in range(2))
        return cls(prediction, spread, np.full((n, len(model.utterance_targets)), np.nan), np.full(n, None, object))

    def add(
        self, fold: Fold, tested: Sequence[Session], predicted: np.ndarray, checkpoints: Sequence[Checkpoint]
    ) -> None:
        """Add the held-out rows of a fold.

        Args:
            fold: The fold.
            tested: The sessions that have such rows.
            predicted: For these sessions, (models, utterances, targets).
            checkpoints: The models.
        """
        rows = np.concatenate([session.rows for session in tested])
        mine = fold.held_out[rows]
        self.prediction[rows[mine]] = predicted.mean(axis=0)[mine]
        if len(predicted) > 1:
            self.spread[rows[mine]] = predicted.std(axis=0, ddof=1)[mine]
        position = np.concatenate([np.arange(len(session)) for session in tested])
        weight = mean_weights([checkpoint.errors for checkpoint in checkpoints], position)
        if weight is not None:
            self.weight[rows[mine]] = weight[mine]
        self.fold[fold.held_out] = fold.name


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
    data: TrainingData, found: _HeldOut, models: Mapping[str, Sequence[Checkpoint]], out: str, fingerprint: str
) -> None:
    model, inside = data.config.model, np.ones(len(found.fold), bool)
    inside[last_rows(data.table)] = False
    # A target of the session is at its last row.
    n_own = len(model.utterance_targets)
    found.prediction[inside, n_own:] = found.spread[inside, n_own:] = np.nan
    columns = dict(zip(data.table.column_names, data.table.columns, strict=True))
    columns |= _floats(model.names, found.prediction)
    if not np.isnan(found.spread).all():
        columns |= _floats(scores.spread_names(model.targets), found.spread)
    columns |= {
        "split": pa.array(["test" if name else None for name in found.fold], pa.string()),
        "fold": pa.array(found.fold, pa.string()),
        "run_id": pa.array([fingerprint[:12]] * len(found.fold)),
    }
    if not np.isnan(found.weight).all():
        columns |= _floats(scores.weight_names(model.targets), found.weight)
    provenance = {
        "fingerprint": fingerprint,
        "label_range": list(model.label_range),
        "native_range": label_ranges(data.config, data.store).native or list(model.label_range),
        **scores.targets_said(model),
        "held_out": data.folds,
        "checkpoints": [{"fingerprint": each.fingerprint} for of_fold in models.values() for each in of_fold],
    }
    files.write_json(files.join(out, scores.PROVENANCE), provenance)
    name = f"part-{fingerprint[:16]}.parquet"
    table = pa.table(columns)
    # What is in no fold is trained on in all of them, and has no score.
    never = pc.and_(pc.is_null(table["fold"]), pc.equal(table["status"], "ok"))
    if n := pc.sum(never).as_py():
        say(f"note: {n:,} utterances are in no fold: they are trained on in every fold, and not in {out}.")
    scores.write_part(out, name, table.filter(pc.invert(never)), data.config.score, targets=model.targets)


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
