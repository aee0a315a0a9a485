"""Rows of a feature store become sessions: arrays of utterances in time order.

Reads a table as `FeatureStore.read` returns it, writes nothing. One session is one sequence of the model; what a
sequence is (the whole session, or one speaker of it) is `sessions.sequence_by`. Letters: T steps (utterances of
the session), D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.config import Config
from vaemo.errors import LabelError, NonFiniteFeatureError, named
from vaemo.store import FeatureStore, part_schema
from vaemo.tables import codes, length_of_vectors, session_order, typed, vectors, with_column
from vaemo.units import DIMENSIONS, STREAMS, LabelScale

OBSERVED = tuple(f"observed_{name}" for name in DIMENSIONS)
"""Columns of the values that somebody knows while a session runs."""


@dataclass(frozen=True, eq=False)
class Session:
    """One sequence of the model: T utterances in order, all with status `ok`.

    Attributes:
        session_id: The session's id; with `sequence_by="speaker"` several sequences share it.
        rows: Their row numbers in the table, (T,), int64.
        utt_ids: (T,), objects.
        speaker_ids: (T,), objects.
        split: `train`, `dev` or `test`; None where there is none or the rows disagree (training refuses those).
        fold: The fold, as text; None where there is none or the rows disagree.
        streams: Features by stream, (T, D), float32, finite, not standardised.
        labels: Valence and arousal on the model's label range, (T, 2), float32, NaN = unlabelled.
        observed: Values known when the session is replayed, (T, 2), float32, NaN = unknown.
        start_s: Start in the recording in seconds, (T,), float64, NaN = unknown.
    """

    session_id: str
    rows: np.ndarray
    utt_ids: np.ndarray
    speaker_ids: np.ndarray
    split: str | None
    fold: str | None
    streams: dict[str, np.ndarray]
    labels: np.ndarray
    observed: np.ndarray
    start_s: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class LabelRange:
    """The range that labels and observed values are on, as they are read.

    Attributes:
        scale: That range.
        native: The corpus's own.
        model: The range that they are mapped onto.
        cure: Who says that range, and what is to be done where a value lies outside it.
    """

    scale: LabelScale
    native: LabelScale
    model: LabelScale
    cure: str

    def mapped(self, table: pa.Table, names: Sequence[str], where: str) -> pa.Table:
        """The table with some of its columns on the model's range, each in its type.

        Args:
            table: Columns `utt_id` and those that are named.
            names: Of labels and observed values.
            where: Where the table comes from, for messages.

        Raises:
            LabelError: if a value is outside the range.
        """
        for name in names:
            values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            # As far as a float32 can tell: a store's labels are no more exact.
            slack = 1e-6 * max(abs(self.scale.low), abs(self.scale.high))
            outside = np.flatnonzero((values < self.scale.low - slack) | (values > self.scale.high + slack))
            if len(outside):
                row = int(outside[0])
                raise LabelError(
                    f"{name} of utterance {named(table['utt_id'][row])} in {where} is {values[row]:g}, outside "
                    f"[{self.scale.low:g}, {self.scale.high:g}]{self.cure}"
                )
            if self.scale != self.model:
                values = self.scale.to(self.model, values)
            values = values.clip(self.model.low, self.model.high)
            table = with_column(table, name, pa.array(values, table[name].type, from_pandas=True))
        return table


def label_range(config: Config, store: FeatureStore | None = None, model: LabelScale | None = None) -> LabelRange:
    """The range that labels are on: one rule for all jobs, for stores and manifests.

    A store that says it is believed; else it is `labels.range`, and where that is null the model's range.

    Args:
        config: Sections `labels` and `model`.
        store: Whose labels they are; None for a manifest's.
        model: The model's range, where the config is not the model's.
    """
    info = store.info if store else {}
    model = model or LabelScale(*config.model.label_range)
    if held := info.get("label_range"):
        scale = LabelScale(*held)
        cure = ", as the store says in its _vaemo.json. Mend the label, or extract the store anew."
    elif config.labels.range:
        scale = LabelScale(*config.labels.range)
        cure = ", which is labels.range. Mend the label, or labels.range."
    else:
        scale = model
        cure = ". Say the corpus's own range, such as --set labels.range=[1,7], or correct the label."
    native = info.get("native_range")
    return LabelRange(scale, LabelScale(*native) if native else scale, model, cure)


def read_sessions(
    store: FeatureStore,
    config: Config,
    *,
    parts: Sequence[str] | None = None,
    split: np.ndarray | None = None,
    streams: Sequence[str] = STREAMS,
) -> list[Session]:
    """The sessions of a store, labels and observed values on the model's label range (see `label_range`).

    Args:
        store: Opened.
        config: Sections `labels`, `model`, `sessions`.
        parts: Only these files of the store; None is all.
        split: Takes the place of the store's own splits, one per row.
        streams: The streams to read; none is enough to look at labels.

    Raises:
        ReadStoreError: as `FeatureStore.read`.
        LabelError: if a label or an observed value is outside the range that it is on.
        NonFiniteFeatureError: if a feature is NaN or infinite.
    """
    columns = [name for name in part_schema(store.dims).names if name not in STREAMS or name in streams]
    table = label_range(config, store).mapped(store.read(columns, parts), [*DIMENSIONS, *OBSERVED], store.path)
    if split is not None:
        table = with_column(table, "split", pa.array(split, pa.string()))
    return assemble_sessions(table, sequence_by=config.sessions.sequence_by, streams=streams)


def assemble_sessions(
    table: pa.Table, *, sequence_by: Literal["session", "speaker"] = "session", streams: Sequence[str] = STREAMS
) -> list[Session]:
    """Cut a table into sessions, in order of first appearance, their rows by `vaemo.tables.session_order`.

    Rows whose status is not `ok` are left out; a session without a row left does not appear. Sessions may be
    scattered over the table. The arrays of all sessions are views of one array each, laid out in this order.

    Args:
        table: Columns `session_id`, `utt_id` and those of `streams` that it has, each of one dimension and there
            in every row with status `ok`; other columns of the contract may be missing and have its defaults. Where
            `position` is missing, `start_s` orders a session.
        sequence_by: One sequence for a session, or one for each speaker of it.
        streams: The streams to take along.

    Raises:
        NonFiniteFeatureError: if a feature is NaN or infinite.
        ColumnError: if the features are no vectors of one dimension, or some rows of a session have a position, or
            else a time, and others none.
    """
    rows = _rows_in_order(table, sequence_by)
    if not len(rows):
        return []
    utt_ids = _texts(table, "utt_id", rows)
    speaker_ids = _texts(table, "speaker_id" if "speaker_id" in table.column_names else "session_id", rows)
    session_ids = _texts(table, "session_id", rows)
    features = {name: _vectors(table, name, rows, utt_ids) for name in streams if name in table.column_names}
    labels = np.stack([_numbers(table, name, rows, np.float32) for name in DIMENSIONS], axis=1)
    observed = np.stack([_numbers(table, f"observed_{name}", rows, np.float32) for name in DIMENSIONS], axis=1)
    start_s = _numbers(table, "start_s", rows, np.float64)
    split, fold = _texts(table, "split", rows), _texts(table, "fold", rows)

    starts_new = session_ids[1:] != session_ids[:-1]
    if sequence_by == "speaker":
        starts_new |= speaker_ids[1:] != speaker_ids[:-1]
    edges = [0, *(np.flatnonzero(starts_new) + 1), len(rows)]
    return [
        Session(
            session_id=session_ids[a],
            rows=rows[a:b],
            utt_ids=utt_ids[a:b],
            speaker_ids=speaker_ids[a:b],
            split=_common(split[a:b]),
            fold=_common(fold[a:b]),
            streams={name: matrix[a:b] for name, matrix in features.items()},
            labels=labels[a:b],
            observed=observed[a:b],
            start_s=start_s[a:b],
        )
        for a, b in itertools.pairwise(edges)
    ]


def _rows_in_order(table: pa.Table, sequence_by: str) -> np.ndarray:
    """Row numbers of the utterances with status ok: sequences by first appearance, inside them by position."""
    usable = np.ones(len(table), bool)
    if "status" in table.column_names:
        usable = pc.fill_null(pc.equal(table["status"], "ok"), True).to_numpy()
    given, start_s = (
        typed(table[name], name, type_) if name in table.column_names else pa.nulls(len(table), type_)
        for name, type_ in (("position", pa.int32()), ("start_s", pa.float64()))
    )
    _, position = session_order(table["session_id"], given, start_s, usable)
    keys = [codes(table["session_id"])]
    if sequence_by == "speaker" and "speaker_id" in table.column_names:
        speaker = codes(table["speaker_id"])
        # First appearance of the pair, so that both ways of cutting keep the order of the sessions.
        pair = keys[0] * (int(speaker.max(initial=0)) + 1) + speaker
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        keys.append(first[inverse])
    order = np.lexsort([position, *reversed(keys)])
    return order[usable[order]]


def _texts(table: pa.Table, name: str, rows: np.ndarray) -> np.ndarray:
    if name not in table.column_names:
        return np.full(len(rows), None, object)
    return table[name].cast(pa.string()).to_numpy()[rows]


def _numbers(table: pa.Table, name: str, rows: np.ndarray, dtype: type) -> np.ndarray:
    if name not in table.column_names:
        return np.full(len(rows), np.nan, dtype)
    return table[name].cast(pa.float64()).to_numpy()[rows].astype(dtype)


def _vectors(table: pa.Table, name: str, rows: np.ndarray, utt_ids: np.ndarray) -> np.ndarray:
    """The vectors of one stream at these rows, (rows, D)."""
    wanted = np.zeros(len(table), bool)
    wanted[rows] = True
    matrix = np.empty((len(rows), length_of_vectors(table[name], name) or 0), np.float32)
    offset = filled = 0
    # Chunk by chunk: joining large list columns first would hold them twice.
    for chunk in vectors(table[name], name, matrix.shape[1]).chunks:
        kept = chunk.filter(pa.array(wanted[offset : offset + len(chunk)]))
        matrix[filled : filled + len(kept)].reshape(-1)[:] = kept.flatten().to_numpy(zero_copy_only=False)
        offset, filled = offset + len(chunk), filled + len(kept)
    if (np.diff(rows) < 0).any():
        matrix = matrix[np.searchsorted(np.flatnonzero(wanted), rows)]
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        lane, step = 0, int(np.argmin(finite))
        raise NonFiniteFeatureError(name, lane, step, utt_ids[step])
    return matrix


def _common(values: np.ndarray) -> str | None:
    return values[0] if (values == values[0]).all() else None
