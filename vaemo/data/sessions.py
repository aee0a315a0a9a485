"""Sessions from the rows of a feature store: arrays of utterances in time order.

Reads a table as `FeatureStore.read` returns it, writes nothing. `sessions.sequence_by` decides whether a sequence of
the model is a whole session or one speaker of it. Letters: T steps (utterances of the session), D features, K targets,
of which F are targets of utterances.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.config import Config
from vaemo.errors import LabelError, NonFiniteFeatureError, named
from vaemo.store import FeatureStore, part_schema
from vaemo.tables import codes, length_of_vectors, session_order, typed, vectors, with_column
from vaemo.targets import Target, label_names, names_of, observed_names, rater_columns, session_names, utterance_names
from vaemo.units import DIMENSIONS, STREAMS, LabelScale


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
        labels: Of the targets on the model's label range, (T, K), float32, NaN = unlabelled; a target of the session
            has its label at the session's last utterance.
        observed: Observed values, (T, F), float32, NaN = unknown.
        start_s: Start in the recording in seconds, (T,), float64, NaN = unknown.
        label_error: Standard errors of the labels over their raters, (T, K), float32, NaN = unknown; None where the
            table has no rater columns.
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
    label_error: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class LabelRange:
    """The range of a target's labels and observed values in the input.

    Attributes:
        scale: That range.
        native: The corpus's own.
        model: The range that they are mapped onto.
        cure: The end of the error message: where the range comes from, and what to do about a value outside it.
        assumed: Whether neither a store nor `labels.range` says it, so that it is the model's.
    """

    scale: LabelScale
    native: LabelScale
    model: LabelScale
    cure: str
    assumed: bool = False


class LabelRanges(dict[str, LabelRange]):
    """The range of each target."""

    def mapped(self, table: pa.Table, names: Sequence[str], where: str) -> pa.Table:
        """The table with some of its columns on the model's range, each in its type.

        Args:
            table: With the column `utt_id` and the named ones.
            names: Of labels and observed values of these targets.
            where: Where the table comes from, for messages.

        Raises:
            LabelError: if a value is outside the range.
        """
        for name in names:
            held = self[name.removeprefix("observed_")]
            scale, model = held.scale, held.model
            values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            # To the precision of float32, in which a store holds labels.
            slack = 1e-6 * max(abs(scale.low), abs(scale.high))
            outside = np.flatnonzero((values < scale.low - slack) | (values > scale.high + slack))
            if len(outside):
                row = int(outside[0])
                raise LabelError(
                    f"{name} of utterance {named(table['utt_id'][row])} in {where} is {values[row]:g}, outside "
                    f"[{scale.low:g}, {scale.high:g}]{held.cure}"
                )
            if scale != model:
                values = scale.to(model, values)
            values = values.clip(model.low, model.high)
            table = with_column(table, name, pa.array(values, table[name].type, from_pandas=True))
        return table

    def mapped_spread(self, table: pa.Table) -> pa.Table:
        """The table with the raters' deviations, where it has any, on the model's range too."""
        for name, held in self.items():
            column = f"{name}_rater_sd"
            if column in table.column_names:
                values = table[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
                values = values * (held.model.width / held.scale.width)
                table = with_column(table, column, pa.array(values, pa.float32(), from_pandas=True))
        return table

    @property
    def native(self) -> list[float] | dict[str, list[float]] | None:
        """The corpus's own ranges for JSON: a single one if all are equal; None if all are the model's."""
        native = {name: [held.native.low, held.native.high] for name, held in self.items()}
        if all(held.native == held.model for held in self.values()):
            return None
        first, *others = native.values()
        return native if any(other != first for other in others) else first


def label_ranges(
    config: Config, store: FeatureStore | None = None, model: LabelScale | None = None, names: Sequence[str] = ()
) -> LabelRanges:
    """The label range of each target, by one rule for all jobs, stores and manifests.

    It is the store's, where the store gives one; else `labels.range`; else the model's range.

    Args:
        config: Sections `labels` and `model`.
        store: The store with the labels; None for a manifest.
        model: The model's range, where the config is not the model's.
        names: Of the targets; none are those of the config.

    Raises:
        ConfigValueError: if `labels.range` names other targets only.
    """
    model = model or LabelScale(*config.model.label_range)
    return LabelRanges({name: _label_range(config, store, model, name) for name in names or config.model.names})


def _label_range(config: Config, store: FeatureStore | None, model: LabelScale, name: str) -> LabelRange:
    info = store.info if store else {}
    native, assumed = None, False
    if (held := info.get("label_range")) and name in info.get("targets", DIMENSIONS):
        scale = LabelScale(*held)
        native = info.get("native_range")
        native = native.get(name) if isinstance(native, Mapping) else native
        cure = ", as the store says in its _vaemo.json. Correct the label, or extract the store again."
    elif own := config.labels.range_of(name):
        scale = LabelScale(*own)
        cure = ", which is labels.range. Correct the label, or labels.range."
    else:
        scale, assumed = model, True
        cure = ". Give the corpus's own range, such as --set labels.range=[1,7], or correct the label."
    return LabelRange(scale, LabelScale(*native) if native else scale, model, cure, assumed)


def read_sessions(
    store: FeatureStore,
    config: Config,
    *,
    parts: Sequence[str] | None = None,
    split: np.ndarray | None = None,
    streams: Sequence[str] = STREAMS,
) -> list[Session]:
    """The sessions of a store, labels and observed values on the model's label range (see `label_ranges`).

    Args:
        store: Opened.
        config: Sections `labels`, `model`, `sessions`.
        parts: Only these files of the store; None is all.
        split: Replaces the store's own splits, one per row.
        streams: The streams to read; may be empty where only labels are needed.

    Raises:
        ReadStoreError: as `FeatureStore.read`.
        LabelError: if a label or an observed value is outside the range that it is on.
        NonFiniteFeatureError: if a feature is NaN or infinite.
    """
    targets = config.model.targets
    columns = [name for name in part_schema(store.dims, targets).names if name not in STREAMS or name in streams]
    columns += [name for name in rater_columns(targets) if name in store.columns]
    ranges = label_ranges(config, store)
    table = ranges.mapped(store.read(columns, parts), label_names(targets), store.path)
    table = ranges.mapped_spread(table)
    if split is not None:
        table = with_column(table, "split", pa.array(split, pa.string()))
    return assemble_sessions(table, sequence_by=config.sessions.sequence_by, streams=streams, targets=targets)


def assemble_sessions(
    table: pa.Table,
    *,
    sequence_by: Literal["session", "speaker"] = "session",
    streams: Sequence[str] = STREAMS,
    targets: Sequence[str | Target] = DIMENSIONS,
) -> list[Session]:
    """Cut a table into sessions, in order of first appearance, their rows by `vaemo.tables.session_order`.

    Rows whose status is not `ok` are left out, and so are sessions without any other row. The rows of a session need
    not be contiguous. The arrays of all sessions are views of one array each, in this order.

    Args:
        table: Columns `session_id`, `utt_id` and those of `streams` that it has, each of one dimension and present in
            every row with status `ok`; other columns of the contract may be missing and have its defaults. Where
            `position` is missing, `start_s` orders a session.
        sequence_by: One sequence for a session, or one for each speaker of it.
        streams: The streams to include.
        targets: The columns of labels. The label of a target of the session may be in any of its rows, whatever
            their status, and goes to its last utterance.

    Raises:
        LabelError: if a target of the session has two values in one.
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
    of_session = [session_labels(table, name)[rows].astype(np.float32) for name in session_names(targets)]
    labels = _stacked([_numbers(table, name, rows, np.float32) for name in utterance_names(targets)] + of_session, rows)
    observed = _stacked([_numbers(table, name, rows, np.float32) for name in observed_names(targets)], rows)
    start_s = _numbers(table, "start_s", rows, np.float64)
    error = _label_errors(table, rows, names_of(targets)) if _has_raters(table, targets) else None
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
            label_error=None if error is None else error[a:b],
        )
        for a, b in itertools.pairwise(edges)
    ]


def session_labels(table: pa.Table, name: str) -> np.ndarray:
    """The labels of a target of the session, (rows,), at the last row with status ok of each session, else NaN.

    Raises:
        LabelError: if a session has two values.
    """
    placed, everywhere, last = np.full(len(table), np.nan), spread_labels(table, name), last_rows(table)
    placed[last] = everywhere[last]
    return placed


def spread_labels(table: pa.Table, name: str) -> np.ndarray:
    """The label of a target of the session, (rows,), in all rows of each session that has one in any, else NaN.

    Raises:
        LabelError: if a session has two values.
    """
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    values = table[name].cast(pa.float64()).to_numpy()
    session, known = codes(table["session_id"]), np.flatnonzero(~np.isnan(values))
    of_session = np.full(int(session.max(initial=-1)) + 1, np.nan)
    of_session[session[known]] = values[known]
    other = known[values[known] != of_session[session[known]]]
    if len(other):
        row = int(other[0])
        raise LabelError(
            f"{name} of session {named(table['session_id'][row])} is {values[row]:g} and {of_session[session[row]]:g} "
            "in two of its rows; a target of the session has one value. Correct the labels, or make it a target of "
            "utterances."
        )
    return of_session[session]


def last_rows(table: pa.Table, without: np.ndarray | None = None) -> np.ndarray:
    """The last row with status ok of each session that has one, at which a target of the session is predicted.

    Args:
        table: As `assemble_sessions` takes it.
        without: Rows (bool) to skip.
    """
    rows = _rows_in_order(table, "session")
    if without is not None:
        rows = rows[~without[rows]]
    ids = codes(table["session_id"])[rows]
    return rows[np.r_[ids[1:] != ids[:-1], True]] if len(rows) else rows


def lost_labels(table: pa.Table, targets: Sequence[str | Target]) -> dict[str, int]:
    """For each target of the session, how many sessions have a label but no row with status ok."""
    lost = {}
    for name in session_names(targets):
        if name in table.column_names:
            labelled = pc.count_distinct(table["session_id"].filter(pc.is_valid(table[name]))).as_py()
            lost[name] = labelled - int((~np.isnan(session_labels(table, name))).sum())
    return {name: count for name, count in lost.items() if count}


def _has_raters(table: pa.Table, targets: Sequence[str | Target]) -> bool:
    return any({f"{name}_rater_sd", f"{name}_raters"} <= set(table.column_names) for name in names_of(targets))


def _label_errors(table: pa.Table, rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Standard errors of the labels at these rows, (rows, K), NaN where the raters' deviation or number is unknown."""
    spread, count = (
        _stacked([_numbers(table, f"{name}_{form}", rows, np.float32) for name in names], rows)
        for form in ("rater_sd", "raters")
    )
    return spread / np.sqrt(np.where(count > 1, count, np.nan))


def _stacked(columns: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), np.float32)


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
        # By first appearance of the pair, so that both values of sequence_by keep the order of the sessions.
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
    # Chunk by chunk: joining large list columns first would need twice the memory.
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
