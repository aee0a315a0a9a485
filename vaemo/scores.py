"""The folder of scores: schema, writing and reading of its two tables, and the summary of each session.

    SCORES/utterances/part-*.parquet   one row per utterance (`utterance_schema`)
    SCORES/sessions/part-*.parquet     one row per session and role (`session_schema`)
    SCORES/_provenance.json            what made them

Parts hold whole sessions, so a part of sessions is computed from the part of utterances with the same name. Scores are
on the model's label range. Either table may have further columns, after those of the schema; they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaemo import files
from vaemo.config import ModelConfig, ScoreConfig
from vaemo.data.manifest import common_schema
from vaemo.errors import ColumnError, ReadScoresError
from vaemo.model.settling import drawn_to_mean
from vaemo.tables import as_text, codes, typed, with_column
from vaemo.targets import SUMMARY, Target, names_of, session_names, targets_of, utterance_names
from vaemo.units import DIMENSIONS, NOT_FAILED, LabelScale


def utterance_schema(targets: Sequence[str | Target] = DIMENSIONS) -> pa.Schema:
    """Columns of the utterances.

    A target (`valence`, `arousal`, ...) is null unless `status` is `ok`, and one of the session also but at its last
    utterance with a score; several checkpoints add `valence_sd` and `arousal_sd`, and most of them `valence_weight` and
    `arousal_weight`. A recording that cannot be read is one row with null times. `lost_s` is how much of the utterance
    its file does not hold, null where no audio was read. A recording whose bytes were scored under another name
    (`duplicate`) names that in `duplicate_of`. Where voices separate speakers, `voice` is which of the channel's
    speaks and `voice_margin` how certain that is, `role_by` what decided its role (`calls`, `voices_from`, `verified`,
    `identified`, `channel`) and `role_margin` by how much a voice was verified; all null elsewhere. In a session of
    several recordings `audio_path` is the one that `start_s` and `end_s` count in, and `offset_s` how many seconds
    after the session it begins; null in others.
    """
    return pa.schema(
        [
            ("session_id", pa.string()),
            ("utt_id", pa.string()),
            ("speaker_id", pa.string()),
            ("channel", pa.int32()),
            ("role", pa.string()),
            ("position", pa.int32()),
            ("split", pa.string()),
            ("fold", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            *((name, pa.float32()) for name in names_of(targets)),
            ("status", pa.string()),
            ("reason", pa.string()),
            ("run_id", pa.string()),
            ("lost_s", pa.float64()),
            ("duplicate_of", pa.string()),
            ("voice", pa.int32()),
            ("voice_margin", pa.float32()),
            ("role_by", pa.string()),
            ("role_margin", pa.float32()),
            ("audio_path", pa.string()),
            ("offset_s", pa.float64()),
        ]
    )


def spread_names(targets: Sequence[str | Target] = DIMENSIONS) -> list[str]:
    """Columns that scoring with several checkpoints adds: the deviation over the models."""
    return [f"{name}_sd" for name in names_of(targets)]


def weight_names(targets: Sequence[str | Target] = DIMENSIONS) -> list[str]:
    """Columns from a checkpoint with its error by position.

    The weight of an utterance for the lowest score and the slope of a session (`vaemo.model.settling`). Without them
    all weights are equal.
    """
    return [f"{name}_weight" for name in utterance_names(targets)]


def session_schema(targets: Sequence[str | Target] = DIMENSIONS) -> pa.Schema:
    """Columns of the sessions; `summarise_sessions` says what each is."""
    kinds = {summary: pa.float64() if summary.endswith("_s") else pa.float32() for summary in SUMMARY}
    return pa.schema(
        [
            ("session_id", pa.string()),
            ("role", pa.string()),
            ("n_utterances", pa.int32()),
            ("n_scored", pa.int32()),
            ("n_failed", pa.int32()),
            ("talk_s", pa.float64()),
            *((f"{name}_{summary}", kind) for name in utterance_names(targets) for summary, kind in kinds.items()),
            *((name, pa.float32()) for name in session_names(targets)),
            ("run_id", pa.string()),
            ("role_by", pa.string()),
            ("role_margin", pa.float32()),
        ]
    )


UTTERANCE_SCHEMA, SESSION_SCHEMA = utterance_schema(), session_schema()
SPREAD_SCHEMA, WEIGHT_SCHEMA = (
    pa.schema([(name, pa.float32()) for name in names()]) for names in (spread_names, weight_names)
)
"""For scores of valence and arousal."""


def trust_schema(targets: Sequence[str | Target] = DIMENSIONS) -> pa.Schema:
    """Columns from a calibrated checkpoint.

    They are bounds of utterances and of the means of sessions, and, in both tables, how unusual the features are, and
    which of them.
    """
    bounds = (
        f"{name}{of}_{end}" for name in utterance_names(targets) for of in ("", "_mean") for end in ("low", "high")
    )
    return pa.schema(
        [("novelty", pa.float32()), ("novelty_of", pa.string()), *((name, pa.float32()) for name in bounds)]
    )


TRUST_SCHEMA = trust_schema()
"""For scores of valence and arousal."""

UTTERANCES, SESSIONS = "utterances", "sessions"
"""The folders of the two tables."""

PROVENANCE = "_provenance.json"
"""The file that records what made the scores and guards the folder. `label_range` ([low, high] of the scores) and
`native_range` (of the corpus trained on, or null) are read back by `read_scales`, `targets` by
`read_targets`."""

JOINING = "_joining.json"
"""The file that records which parts are being joined to which other one (`vaemo.scoring.compact`)."""

_READERS = 16


def conform(table: pa.Table, schema: pa.Schema = UTTERANCE_SCHEMA) -> pa.Table:
    """The columns of `schema` in its order and types, null where `table` has none; other columns follow as they are."""
    columns = {
        field.name: table[field.name].cast(field.type)
        if field.name in table.column_names
        # Scores without a status were written by another program.
        else pa.repeat(pa.scalar("ok" if field.name == "status" else None, field.type), table.num_rows)
        for field in schema
    }
    columns |= {name: table[name] for name in table.column_names if name not in columns}
    return pa.table(columns, metadata=table.schema.metadata)


def write_part(
    folder: str,
    name: str,
    utterances: pa.Table,
    score: ScoreConfig,
    travel: Sequence[str] = (),
    targets: Sequence[str | Target] = DIMENSIONS,
    further: Callable[[pa.Table, pa.Table], pa.Table] | None = None,
) -> None:
    """Write one part of whole sessions: `sessions/NAME`, then `utterances/NAME`.

    Each file appears whole or not at all. A part is finished when its utterances are there, since they come last;
    writing it again writes the same rows.

    Args:
        folder: The folder of scores.
        name: File name of the part, `part-....parquet`, below a `date=.../` where the archive is partitioned.
        utterances: Rows of `utterance_schema`, all utterances of the part's sessions in session order.
        score: What counts as low, and the half-life of the weighted end.
        travel: Columns of a call, which its sessions keep too.
        targets: What was predicted.
        further: Adds columns to the sessions, given the utterances and them.
    """
    utterances = conform(utterances, utterance_schema(targets))
    sessions = summarise_sessions(utterances, score, travel, targets)
    sessions = further(utterances, sessions) if further else sessions
    files.write_parquet_whole(files.join(folder, SESSIONS, name), sessions)
    files.write_parquet_whole(files.join(folder, UTTERANCES, name), utterances)


def read_utterances(
    folder: str, columns: Sequence[str] | None = None, sessions: Iterable[str] | None = None
) -> pa.Table:
    """The utterances of a folder of scores, part after part.

    Args:
        folder: The folder of scores.
        columns: Names to keep; all when left out.
        sessions: Ids of the only sessions wanted; all when left out.

    Raises:
        ReadScoresError: if the folder has no part, or a part cannot be read or lacks a column of the contract.
    """
    return _read(folder, UTTERANCES, columns, sessions)


def scan_utterances(folder: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The utterances of a folder of scores, one part at a time: archives do not fit in memory."""
    targets = read_targets(folder)
    for part in _parts(folder, UTTERANCES):
        yield _read_part(part, UTTERANCES, columns, targets)


def read_sessions(folder: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The sessions of a folder of scores, one row per session and role; errors as in `read_utterances`."""
    return _read(folder, SESSIONS, columns, None)


def read_provenance(folder: str) -> dict[str, Any]:
    """What made these scores (`PROVENANCE`); empty for a folder that another program wrote."""
    path = files.join(folder, PROVENANCE)
    return files.read_json(path) if files.exists(path) else {}


def read_targets(folder: str) -> tuple[str | Target, ...]:
    """The targets of these scores; valence and arousal if not recorded."""
    return targets_of(read_provenance(folder).get("targets", DIMENSIONS))


def targets_said(model: ModelConfig) -> dict[str, Any]:
    """The targets in `PROVENANCE`."""
    return {"targets": [target if isinstance(target, str) else asdict(target) for target in model.targets]}


def read_scales(folder: str) -> tuple[LabelScale, LabelScale | dict[str, LabelScale] | None]:
    """The range that the scores are on ([0, 1] if not recorded), and the native one of the corpus trained on.

    Where its targets have ranges of their own, the second are these.
    """
    provenance = read_provenance(folder)
    native, on = provenance.get("native_range"), LabelScale(*provenance.get("label_range", (0.0, 1.0)))
    if isinstance(native, Mapping):
        return on, {name: LabelScale(*ends) for name, ends in native.items()}
    return on, LabelScale(*native) if native else None


def summarise_sessions(
    utterances: pa.Table,
    score: ScoreConfig,
    travel: Sequence[str] = (),
    targets: Sequence[str | Target] = DIMENSIONS,
) -> pa.Table:
    """One row per session and role, in the order of their first utterances.

    Only utterances with a score count, except in `n_utterances`, `n_failed` (a status other than `ok` and
    `not_scored_role`) and `talk_s` (the summed length of all utterances that have times). A target of the session
    is in its one column; for every other one:

    - `mean`: weighted by the utterances' lengths; plain where one of them has no times.
    - `min`, `min_at_s`: the lowest score, and the start of the first utterance that has it. Where utterances have
      weights (`weight_names`), the lowest is looked for after each score was drawn to the mean by its weight, and
      given as it was scored: the error is larger at the start of a session.
    - `slope_per_min`: least-squares slope over the utterances' middles, weighted by length, and by their weights
      where they have any; null when all scored speech is at one time.
    - `below_s`: length of the speech scored below what `score.low` says.
    - `end_weighted`: mean weighted by length and by 2^(-age / `score.end_half_life_s`), the age reaching from the
      utterance's end to the end of the last utterance of the session, whoever speaks it.

    What needs times is null where a scored utterance has none, and every score is null where nothing is scored. Times
    are those of the session: `start_s` and `offset_s` together.

    Args:
        utterances: Rows of `utterance_schema`; the sessions must be whole.
        score: What counts as low, and the half-life.
        travel: Further columns to keep; the first value of each session and role.
        targets: What was predicted.
    """
    utterances = conform(utterances, utterance_schema(targets))
    session = codes(utterances["session_id"])
    role = codes(utterances["role"])
    key = session * (role.max(initial=0) + 1) + role
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    groups = _Groups(group, len(first))

    status = utterances["status"]
    failed = pc.invert(pc.is_in(status, pa.array(NOT_FAILED))).to_numpy(zero_copy_only=False)
    values = {name: _floats(utterances[name]) for name in utterance_names(targets)}
    scored = pc.equal(status, "ok").to_numpy(zero_copy_only=False)
    if values:
        scored = np.isfinite(np.stack(list(values.values()))).all(axis=0)
    rows = _Rows.of(utterances, groups, scored, session, score.end_half_life_s)
    columns: dict[str, Any] = {
        "session_id": utterances["session_id"].take(first),
        "role": utterances["role"].take(first),
        "n_utterances": groups.count(np.ones(len(group), bool)),
        "n_scored": groups.count(scored),
        "n_failed": groups.count(failed),
        "talk_s": np.where(groups.count(rows.timed) > 0, groups.sum(np.where(rows.timed, rows.length_s, 0.0)), np.nan),
    }
    for target, low in score.low_of(values).items():
        summary = _summarise(rows, values[target], low, _weights(utterances, target))
        columns |= {f"{target}_{name}": column for name, column in summary.items()}
    for target in session_names(targets):
        of_session = _of_sessions(_floats(utterances[target]), session)
        columns[target] = np.where(columns["n_scored"] > 0, of_session[session[first]], np.nan)
    columns |= {name: utterances[name].take(first) for name in ("run_id", "role_by", "role_margin", *travel)}
    # An undefined number is null, never NaN.
    arrays = {
        name: pa.array(column, from_pandas=True) if isinstance(column, np.ndarray) else column
        for name, column in columns.items()
    }
    return conform(pa.table(arrays), session_schema(targets))


def _of_sessions(of_row: np.ndarray, session: np.ndarray) -> np.ndarray:
    """The value of each session, from any of its rows that has one; NaN where none has."""
    of_session = np.full(session.max(initial=-1) + 1, np.nan)
    known = np.isfinite(of_row)
    of_session[session[known]] = of_row[known]
    return of_session


class _Groups:
    """Sums over the rows of each group, without a loop over groups."""

    def __init__(self, group: np.ndarray, n_groups: int) -> None:
        self.group, self.n_groups = group, n_groups

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.group, weights=values, minlength=self.n_groups)

    def count(self, where: np.ndarray) -> np.ndarray:
        return np.bincount(self.group[where], minlength=self.n_groups)

    def mean(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weighted mean of each group, NaN where the weights are all zero."""
        total = self.sum(weights)
        return np.divide(self.sum(weights * values), total, out=np.full(self.n_groups, np.nan), where=total > 0)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The utterances that are summarised, (rows,) each.

    Attributes:
        groups: The session and role of each.
        scored: Whether it has a score.
        timed: Whether it has times.
        start_s: Start in the session.
        length_s: Its length.
        recency: 2^(-age / half-life) at the end of its session.
    """

    groups: _Groups
    scored: np.ndarray
    timed: np.ndarray
    start_s: np.ndarray
    length_s: np.ndarray
    recency: np.ndarray

    @classmethod
    def of(
        cls, utterances: pa.Table, groups: _Groups, scored: np.ndarray, session: np.ndarray, half_life_s: float
    ) -> _Rows:
        """Those of a table whose rows are of the sessions with these numbers."""
        offset_s = _floats(utterances["offset_s"].fill_null(0.0))
        start_s, end_s = _floats(utterances["start_s"]) + offset_s, _floats(utterances["end_s"]) + offset_s
        length_s = end_s - start_s
        timed = np.isfinite(length_s)
        last_s = np.full(session.max(initial=-1) + 1, -np.inf)
        np.maximum.at(last_s, session[timed], end_s[timed])
        recency = np.exp2((end_s - last_s[session]) / half_life_s)
        return cls(groups, scored, timed, start_s, length_s, recency)


def _summarise(rows: _Rows, values: np.ndarray, low: float, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The summaries of one target, by group."""
    groups, scored, timed, start_s = rows.groups, rows.scored, rows.timed, rows.start_s
    values = np.where(scored, values, 0.0)
    n_scored = groups.count(scored)
    has_times = (n_scored > 0) & (groups.count(scored & ~timed) == 0)
    inside = scored & has_times[groups.group]
    length_s = np.where(inside, rows.length_s, 0.0)
    weights = np.where(has_times[groups.group], length_s, scored.astype(float))

    settled = groups.mean(values, weights * weight)[groups.group]
    lowest = lowest_rows(drawn_to_mean(values, weight, settled), scored, groups.group)
    lowest_group = groups.group[lowest]
    minimum, minimum_at_s = np.full(groups.n_groups, np.nan), np.full(groups.n_groups, np.nan)
    minimum[lowest_group] = values[lowest]
    minimum_at_s[lowest_group] = np.where(has_times[lowest_group], start_s[lowest], np.nan)

    mean = groups.mean(values, weights)
    minute = np.where(inside, (start_s + length_s / 2) / 60.0, 0.0)
    counted_s = length_s * weight
    minute = np.where(inside, minute - groups.mean(minute, counted_s)[groups.group], 0.0)
    spread = groups.sum(counted_s * minute**2)
    # Rounding alone leaves about 1e-16 of the squared times; a minute squared is 1.
    covariance = groups.sum(counted_s * minute * np.where(inside, values - mean[groups.group], 0.0))
    slope = np.divide(covariance, spread, out=np.full(groups.n_groups, np.nan), where=spread > 1e-9)
    return {
        "mean": mean,
        "min": minimum,
        "min_at_s": minimum_at_s,
        "slope_per_min": slope,
        "below_s": np.where(has_times, groups.sum(length_s * (values < low)), np.nan),
        "end_weighted": groups.mean(values, np.where(inside, length_s * np.nan_to_num(rows.recency), 0.0)),
    }


def lowest_of(rows: Sequence[Mapping[str, Any]], dimension: str) -> int | None:
    """Index of the lowest utterance of one session, as `summarise_sessions` would find it in a single role.

    Args:
        rows: Of the utterances' table.
        dimension: `valence` or `arousal`.

    Returns:
        Its index; None where nothing is scored.
    """
    columns = (dimension, f"{dimension}_weight", "start_s", "end_s")
    values, weight, start_s, end_s = (np.array([row.get(key) for row in rows], np.float64) for key in columns)
    scored, length_s = np.isfinite(values), end_s - start_s
    if not scored.any():
        return None
    weight = np.where(weight > 0, weight, 1.0)
    timed = np.isfinite(length_s[scored]).all() and length_s[scored].sum() > 0
    counted = (weight * length_s if timed else weight)[scored]
    mean = np.full(len(rows), np.average(values[scored], weights=counted))
    return int(lowest_rows(drawn_to_mean(values, weight, mean), scored, np.zeros(len(rows), np.int64))[0])


def lowest_rows(values: np.ndarray, where: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The row of each group's lowest value, the first of several, in the order of the groups that have any.

    Args:
        values: (n,).
        where: Rows that count, (n,), bool.
        group: (n,) whole numbers from 0.
    """
    order = np.lexsort((np.arange(len(values)), values, group))
    order = order[where[order]]
    return order[np.unique(group[order], return_index=True)[1]]


def _weights(utterances: pa.Table, dimension: str) -> np.ndarray:
    """The weight of each utterance, 1 if not recorded."""
    name = f"{dimension}_weight"
    if name not in utterances.column_names:
        return np.ones(utterances.num_rows)
    weight = np.nan_to_num(_floats(utterances[name]), nan=1.0)
    return np.where(weight > 0, weight, 1.0)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _read(folder: str, kind: str, columns: Sequence[str] | None, sessions: Iterable[str] | None) -> pa.Table:
    wanted = (
        None
        if sessions is None
        else pc.field("session_id").cast(pa.string()).isin(pa.array(list(sessions), pa.string()))
    )
    targets = read_targets(folder)
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda part: _read_part(part, kind, columns, targets, wanted), _parts(folder, kind)))
    return joined(tables)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other. Where a column has types that do not go together, it becomes text.

    A reference that was a number in all calls of one night may have letters in those of the next.
    """
    texts = {field.name for field in common_schema([table.schema for table in tables]) if field.type == pa.string()}
    return pa.concat_tables([_with_texts(table, texts) for table in tables], promote_options="permissive")


def _with_texts(table: pa.Table, names: Collection[str]) -> pa.Table:
    for field in table.schema:
        if field.name in names and field.type not in (pa.string(), pa.null()):
            column, nested = table[field.name], pa.types.is_nested(field.type)
            table = with_column(table, field.name, as_text(column.to_pylist()) if nested else column.cast(pa.string()))
    return table


def superseded(folder: str) -> set[str]:
    """Names of parts whose rows are in another part too: while parts are joined, or after a kill.

    The joined part counts once its utterances exist; until then it is ignored.
    """
    path = files.join(folder, JOINING)
    if not files.exists(path):
        return set()
    held = files.read_json(path)
    return set(held["of"]) if files.exists(files.join(folder, UTTERANCES, held["part"])) else {held["part"]}


def _parts(folder: str, kind: str) -> list[str]:
    parts = files.list_files(files.join(folder, kind), ".parquet", recursive=True)
    gone = {files.join(folder, kind, name) for name in superseded(folder)}
    parts = [part for part in parts if part not in gone]
    if not parts:
        raise ReadScoresError(f"'{folder}' has no {kind}/part-*.parquet; give a folder that jobs/score.py wrote.")
    return parts


def _read_part(
    part: str,
    kind: str,
    columns: Sequence[str] | None,
    targets: Sequence[str | Target],
    wanted: pc.Expression | None = None,
) -> pa.Table:
    schema = (utterance_schema if kind == UTTERANCES else session_schema)(targets)
    required = ("session_id", "utt_id", *names_of(targets)) if kind == UTTERANCES else ("session_id", "n_scored")
    filesystem, path = files.filesystem_of(part)
    try:
        table = pq.read_table(path, filesystem=filesystem, filters=wanted, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise ReadScoresError(f"'{part}' cannot be read: {' '.join(str(error).split())}") from None
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ReadScoresError(f"'{part}' has no column {', '.join(missing)}; scores need {', '.join(required)}.")
    try:
        for name, type_ in zip(schema.names, schema.types, strict=True):
            # Another program may have written them: NaN for null, integers as ids.
            if name in table.column_names and (table[name].type != type_ or pa.types.is_floating(type_)):
                table = with_column(table, name, typed(table[name], name, type_))
    except ColumnError as error:
        raise ReadScoresError(f"'{part}': {error}.") from None
    table = conform(table, schema)
    return table if columns is None else table.select(columns)


if __name__ == "__main__":
    import runpy

    # The commands are in `vaemo.scoring.tend`; this module provides their name.
    runpy.run_module("vaemo.scoring.tend", run_name="__main__")
