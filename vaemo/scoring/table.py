"""Sessions replayed through trained models: rows of features in, the same rows with the targets out.

Takes a table of the feature store's contract and returns one of the scores' contract; uses neither files nor Ray.
Letters: U utterances of all sessions, L lanes, T steps, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.data.sessions import assemble_sessions, last_rows
from vaemo.data.speakers import Enrolments, aggregate_speakers
from vaemo.data.windows import PackedSessions
from vaemo.model.regressor import SessionRegressor
from vaemo.model.settling import ErrorByPosition, mean_weights
from vaemo.scores import conform, spread_names, utterance_schema, weight_names
from vaemo.tables import with_column
from vaemo.targets import observed_names, session_names
from vaemo.training.replay import predict_sessions
from vaemo.units import STREAMS, LabelScale

if TYPE_CHECKING:
    from vaemo.personalize import Personal


def score_table(
    table: pa.Table,
    models: Sequence[SessionRegressor],
    *,
    lanes: int,
    chunk: int,
    sequence_by: Literal["session", "speaker"] = "session",
    speaker_aggregation: Literal["utterance", "enrolled", "running_mean"] = "utterance",
    enrolments: Enrolments | None = None,
    personal: Personal | None = None,
    context: np.ndarray | None = None,
    errors: Sequence[ErrorByPosition | None] = (),
) -> pa.Table:
    """Score whole sessions: the columns of the utterances of a score folder but `run_id`, row for row.

    Rows with a status other than `ok` keep it and their reason, have no scores and do not update the state. A value in
    `observed_NAME` is fed back instead of the prediction; labels never are. A target of the session has its score at
    the last row of the session that is scored.

    Args:
        table: Rows of a feature store.
        models: At least one, all of the same targets on one label range. Several give the mean, and the deviation
            (n - 1) in `NAME_sd`.
        lanes: As for `vaemo.training.replay.predict_sessions`.
        chunk: As for `predict_sessions`.
        sequence_by: One memory for a session, or one for each speaker of it.
        speaker_aggregation: What the speaker embeddings become, as `aggregate_speakers` has it.
        enrolments: Voices for `enrolled`, which needs them.
        personal: Deltas of FiLM by speaker, of the one model.
        context: Rows (bool) that update the state without being scored, whatever their status: they get no prediction,
            the middle of the label range is fed back after them, and they are in no other row's past.
        errors: Each model's error by position, which gives `valence_weight` and `arousal_weight`, their
            mean over the models (1 for one that knows nothing). Without any the columns are left out.

    Raises:
        NonFiniteFeatureError: if a feature is NaN or infinite.
        FeatureMismatchError: if a speaker has no enrolment.
    """
    targets = models[0].config.targets
    heard = table if context is None else _with_context(table, context, models[0])
    streams = [name for name in STREAMS if any(name in model.dims for model in models)]
    assert speaker_aggregation != "enrolled" or enrolments or "speaker" not in streams
    sessions = assemble_sessions(heard, sequence_by=sequence_by, streams=streams, targets=targets)
    sessions = aggregate_speakers(sessions, speaker_aggregation, enrolments)
    found = np.full((len(models), table.num_rows, len(models[0].targets)), np.nan)
    weight = np.full((table.num_rows, models[0].n_fed), np.nan)
    if sessions:
        rows = np.concatenate([session.rows for session in sessions])
        speaker_ids = np.concatenate([session.speaker_ids for session in sessions])
        film_delta = personal.delta(speaker_ids) if personal else None
        position = np.concatenate([np.arange(len(session)) for session in sessions])
        if (of_errors := mean_weights(errors, position)) is not None:
            weight[rows] = of_errors
        for number, model in enumerate(models):
            like = model.label_deviation
            packed = PackedSessions.of(sessions, dtype=like.dtype, device=like.device)
            # Rows that are not scored have a past of their own, which no scored row uses.
            packed = packed.with_past(model.pasts, None if context is None else context[rows])
            predicted = predict_sessions(model, packed, lanes=lanes, chunk=chunk, film_delta=film_delta)
            found[number, rows] = predicted.cpu().numpy()
    if context is not None:
        found[:, context] = weight[context] = np.nan
    if session_names(targets):
        inside = np.ones(table.num_rows, bool)
        inside[last_rows(heard, context)] = False
        found[:, inside, models[0].n_fed :] = np.nan
    return _with_scores(table, models[0], found, weight if any(errors) else None)


def _with_scores(table: pa.Table, model: SessionRegressor, found: np.ndarray, weight: np.ndarray | None) -> pa.Table:
    """The rows with their scores.

    Args:
        table: Rows of a feature store.
        model: One of the models.
        found: Predictions of all models, (models, rows, K), NaN where there is none.
        weight: Of the utterances, (rows, targets of utterances), or None.
    """
    targets, names = model.config.targets, model.targets
    schema = utterance_schema(targets)
    kept = [name for name in schema.names if name in table.column_names and name not in names]
    columns: dict[str, Any] = {name: table[name] for name in kept}
    for axis, name in enumerate(names):
        columns[name] = _floats(found[:, :, axis].mean(axis=0))
    scored = conform(pa.table(columns), schema)
    if len(found) > 1:
        for axis, name in enumerate(spread_names(targets)):
            scored = scored.append_column(name, _floats(found[:, :, axis].std(axis=0, ddof=1)))
    if weight is not None:
        for axis, name in enumerate(weight_names(targets)):
            scored = scored.append_column(name, _floats(weight[:, axis]))
    return scored


def _with_context(table: pa.Table, context: np.ndarray, model: SessionRegressor) -> pa.Table:
    """The table with context rows as usable ones, after which the middle of the range is fed back."""
    middle = LabelScale(*model.config.label_range).middle
    where = pa.array(context)
    changed = {"status": "ok", **dict.fromkeys(observed_names(model.config.targets), middle)}
    for name, value in changed.items():
        column = table[name]
        table = with_column(table, name, pc.if_else(where, pa.scalar(value, column.type), column))
    return table


def _floats(values: np.ndarray) -> pa.Array:
    """Float32, null where NaN."""
    return pa.array(values.astype(np.float32), mask=np.isnan(values))
