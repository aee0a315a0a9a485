"""Sessions replayed through trained models: rows of features in, the same rows with the targets out.

Takes a table of the feature store's contract and gives one of the scores' contract; knows no files and no Ray.
Letters: U utterances of all sessions, L lanes, T steps, K targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vaemo.model.film import FilmDelta
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.scores import conform, spread_names, utterance_schema
from vaemo.sessions import assemble_sessions, last_rows
from vaemo.speakers import Enrolments, aggregate_speakers
from vaemo.tables import with_column
from vaemo.targets import observed_names, session_names
from vaemo.units import STREAMS, LabelScale
from vaemo.windows import PackedSessions

if TYPE_CHECKING:
    from vaemo.personalize import Personal

BLOCK_SESSIONS = 1024
"""Sessions whose states are held at once; bounds memory, not results."""


@torch.inference_mode()
def predict_sessions(
    model: SessionRegressor,
    sessions: PackedSessions,
    *,
    lanes: int,
    chunk: int,
    film_delta: FilmDelta | None = None,
) -> np.ndarray:
    """Predict every utterance of every session from a fresh state, feeding back predictions or what is observed.

    A session runs in chunks of `chunk` steps while it has so many left, then in one of half as many, and so on down
    to 1. So no step is padding, and every call has a shape that follows from the session alone, never from those in
    the other lanes: with a fixed number of lanes they change no bit of its predictions.

    Args:
        model: As loaded; predicts without dropout.
        sessions: On the model's device and in its dtype.
        lanes: Sessions side by side, L; lanes without a session are idle (`lengths` 0).
        chunk: Most steps of one call.
        film_delta: What speakers add to FiLM's parameters, by utterance (U,).

    Returns:
        Predictions on the model's label range, (U, K), in the order of the packed sessions.
    """
    sessions = sessions.with_past(model.pasts)
    predictions = np.empty((int(sessions.lengths.sum()), len(model.targets)), np.float64)
    for first in range(0, len(sessions.lengths), BLOCK_SESSIONS):
        block = slice(first, first + BLOCK_SESSIONS)
        left, row = sessions.lengths[block].copy(), sessions.offsets[block].copy()
        memory = model.fresh_state(len(left))
        steps = chunk
        while steps:
            for picked in _calls(left // steps, lanes):
                n = len(picked)
                lane = np.concatenate([picked, np.zeros(lanes - n, np.int64)])
                index = torch.from_numpy(row[lane, None] + np.arange(steps)).to(sessions.observed.device)
                # An idle lane repeats rows of another, which `lengths` hides.
                lengths = torch.from_numpy(np.where(np.arange(lanes) < n, steps, 0))
                prediction, state = model(
                    sessions.at(index),
                    memory.select(torch.from_numpy(lane)),
                    lengths,
                    observed=sessions.observed[index],
                    film_delta=film_delta and FilmDelta(film_delta.parameters, film_delta.speaker[index]),
                )
                predictions[row[picked, None] + np.arange(steps)] = prediction[:n].double().cpu().numpy()
                left[picked] -= steps
                row[picked] += steps
                _remember(memory, picked, state, left)
            steps //= 2
    return predictions


def _calls(n_chunks: np.ndarray, lanes: int) -> Iterator[np.ndarray]:
    """Which sessions each call takes, so that session i is taken `n_chunks[i]` times, never twice by one call.

    McNaughton's wrap-around rule: the fewest calls that there can be.
    """
    items = np.repeat(np.arange(len(n_chunks)), n_chunks)
    n_calls = max(int(n_chunks.max(initial=0)), -(-len(items) // lanes))
    for call in range(n_calls):
        yield items[call::n_calls]


def _remember(memory: SessionState, picked: np.ndarray, state: SessionState, left: np.ndarray) -> None:
    """Write the first lanes of a call's state back to the sessions it served, where they go on."""
    goes_on = np.flatnonzero(left[picked])
    if not len(goes_on):
        return
    source, target = torch.from_numpy(goes_on), torch.from_numpy(picked[goes_on])
    for name, tensor in memory.tensors().items():
        tensor[target] = getattr(state, name)[source]


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
) -> pa.Table:
    """Score whole sessions: the columns of the utterances of a score folder but `run_id`, row for row.

    Rows with a status other than `ok` keep it and their reason, have no scores and do not move the state. What stands
    in `observed_NAME` is fed back instead of the prediction; labels never are. A target of the session has its score
    at the last row of the session that is scored.

    Args:
        table: Rows of a feature store.
        models: At least one, all of the same targets on one label range. Several give the mean, and the deviation
            (n - 1) in `NAME_sd`.
        lanes: As for `predict_sessions`.
        chunk: As for `predict_sessions`.
        sequence_by: One memory for a session, or one for each speaker of it.
        speaker_aggregation: What the speaker embeddings become, as `aggregate_speakers` has it.
        enrolments: Voices for `enrolled`, which needs them.
        personal: Deltas of FiLM by speaker, of the one model.
        context: Rows (bool) that move the state and are not scored, whatever their status: nothing is predicted of
            them, the middle of the label range is fed back behind them, and no other row's past knows of them.

    Raises:
        NonFiniteFeatureError: if a feature is NaN or infinite.
        FeatureMismatchError: if somebody who is heard has no enrolment.
    """
    targets = models[0].config.targets
    heard = table if context is None else _with_context(table, context, models[0])
    streams = [name for name in STREAMS if any(name in model.dims for model in models)]
    assert speaker_aggregation != "enrolled" or enrolments or "speaker" not in streams
    sessions = assemble_sessions(heard, sequence_by=sequence_by, streams=streams, targets=targets)
    sessions = aggregate_speakers(sessions, speaker_aggregation, enrolments)
    names = models[0].targets
    found = np.full((len(models), table.num_rows, len(names)), np.nan)
    if sessions:
        rows = np.concatenate([session.rows for session in sessions])
        speaker_ids = np.concatenate([session.speaker_ids for session in sessions])
        film_delta = personal.delta(speaker_ids) if personal else None
        for number, model in enumerate(models):
            like = model.label_deviation
            packed = PackedSessions.of(sessions, dtype=like.dtype, device=like.device)
            # What is not scored is compared with its like, and nobody else with it.
            packed = packed.with_past(model.pasts, None if context is None else context[rows])
            found[number, rows] = predict_sessions(model, packed, lanes=lanes, chunk=chunk, film_delta=film_delta)
    if context is not None:
        found[:, context] = np.nan
    if session_names(targets):
        inside = np.ones(table.num_rows, bool)
        inside[last_rows(heard, context)] = False
        found[:, inside, models[0].n_fed :] = np.nan
    schema = utterance_schema(targets)
    kept = [name for name in schema.names if name in table.column_names and name not in names]
    columns: dict[str, Any] = {name: table[name] for name in kept}
    for axis, name in enumerate(names):
        columns[name] = _floats(found[:, :, axis].mean(axis=0))
    scored = conform(pa.table(columns), schema)
    if len(models) > 1:
        for axis, name in enumerate(spread_names(targets)):
            scored = scored.append_column(name, _floats(found[:, :, axis].std(axis=0, ddof=1)))
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
