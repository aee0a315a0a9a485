"""Further columns of scores and labels, row for row beside the pairs of an evaluation."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files, scores
from vaemo.config import EvaluateConfig
from vaemo.data.manifest import read_manifest
from vaemo.errors import LabelError, UsageError
from vaemo.evaluation.pairs import KEYS, Pairs, has_features, row_keys
from vaemo.scoring.roles import cut_by_vaemo
from vaemo.store import FeatureStore, partition_of
from vaemo.targets import derived, names_of
from vaemo.units import STREAMS

OF_CUSTOMERS = frozenset(
    {
        *(
            "sex",
            "gender",
            "age",
            "age_band",
            "age_group",
            "language",
            "lang",
            "dialect",
            "accent",
            "country",
            "region",
        ),
        *("codec", "device", "bandwidth", "bandwidth_hz", "n_channels", "channel", "corpus", "domain", "direction"),
        *("date", "year", "month", "split", "fold", "role", "status", "position", "duration_s", "novelty_of"),
    }
)
"""Columns that by their names identify customers, calls or lines, and no employee."""

_EMPLOYEES = re.compile(
    r"(^|_)(agent|employee|staff|operator|advisor|worker|supervisor|rep|handler|team|teller)s?(_|$)"
)
MOST_GROUPS = 50
SCORED_OR_UNFIT = ("ok", "unfit")
_MOST_CODES = 12
"""Numbers of so few different values are codes: each is a group."""

_BANDS = 4


def beside(rows: pa.Table, table: pa.Table, name: str) -> pa.Array:
    """A column of a table with `session_id` and `utt_id`, for rows that have them; null where it lacks the row."""
    return table[name].combine_chunks().take(pc.index_in(row_keys(rows), value_set=row_keys(table)))


@dataclass(frozen=True)
class Column:
    """Groups by a column.

    Attributes:
        group: Of each row of the pairs, -1 = none.
        names: Of the groups; some may have no row among the pairs.
        unfit: By group the share of utterances without a score for `score.max_novelty`, of those that have one or would
            have one, whoever has labels; empty where nothing is unfit.
    """

    group: np.ndarray
    names: list[str]
    unfit: dict[str, float]


def column_of(pairs: Pairs, scored: str, labels: str, name: str, config: EvaluateConfig, split: str) -> Column:
    """Groups by a column of the labels or of the scores.

    Numbers of more than 12 different values become four bands with about as many rows each.

    Args:
        pairs: Of the split that is judged by.
        scored: The folder of scores.
        labels: The store or the manifest.
        name: The column.
        config: `no_employees`.
        split: Whose pairs they are, `all` of them perhaps.

    Raises:
        UsageError: if the column does not exist, has no values or too many groups, or may name employees in an archive.
    """
    refuse_employees(scored, name, config)
    table = _with_column(scored, labels, name)
    rows = scores.read_utterances(scored, [*KEYS, "split", "status"])
    rows = rows.filter(pc.is_in(rows["status"], pa.array(SCORED_OR_UNFIT)))
    if split != "all" and pc.any(pc.equal(rows["split"], split)).as_py():
        rows = rows.filter(pc.equal(rows["split"], split))
    mine = beside(pairs.place, table, name)
    group, names = _grouped(pa.concat_arrays([mine, beside(rows, table, name)]), name)
    return Column(group[: len(mine)], names, unfit_shares(group[len(mine) :], names, rows["status"]))


def unfit_shares(group: np.ndarray, names: Sequence[str], status: pa.ChunkedArray) -> dict[str, float]:
    """By group, the share of rows that are unfit; empty where none is.

    Args:
        group: Of each row, -1 = none.
        names: Of the groups.
        status: `ok` or `unfit`.
    """
    unfit = pc.equal(status, "unfit").to_numpy(zero_copy_only=False)
    if not unfit.any():
        return {}
    known = group >= 0
    n = np.bincount(group[known], minlength=len(names))
    counts = np.bincount(group[known & unfit], minlength=len(names))
    return {name: float(counts[number] / n[number]) for number, name in enumerate(names) if n[number]}


def refuse_employees(scored: str, name: str, config: EvaluateConfig) -> None:
    """Refuse a column by which employees could be told apart.

    Results by employee are an evaluation of employees by their emotions or those that they meet with. In an archive
    any column is refused of which it is not known that it names none.
    """
    plain = name.strip().lower()
    if _EMPLOYEES.search(plain):
        raise UsageError(
            f"--by {name}: the column names employees, and results are never grouped by employee. Group by what tells "
            "customers or lines apart, such as gender, language or codec."
        )
    if plain in OF_CUSTOMERS or name in config.no_employees or not _is_archive(scored):
        return
    raise UsageError(
        f"--by {name}: these are scores of an archive, and the column may name employees. If it does not, add it: "
        f"--set evaluate.no_employees=[{name}]."
    )


def _is_archive(scored: str) -> bool:
    """Whether utterances were cut from recordings, or columns of a table of calls travel with the scores."""
    targets = scores.read_targets(scored)
    ours = {*scores.utterance_schema(targets).names, *scores.trust_schema(targets).names}
    ours |= {column for name in names_of(targets) for column in derived(name)}
    return any(
        bool(set(part.column_names) - ours) or cut_by_vaemo(part).any() for part in scores.scan_utterances(scored)
    )


def _with_column(scored: str, labels: str, name: str) -> pa.Table:
    """A table that has values in the column, the labels' before the scores'.

    Raises:
        UsageError: if neither has any.
    """
    found = _labels(labels, name)
    if _has_values(found, name):
        return found
    other = scores.read_utterances(scored)
    if _has_values(other, name):
        return other
    if name in (*found.column_names, *other.column_names):
        raise UsageError(f"--by {name}: the column is null throughout in {labels} and {scored}; name one with values.")
    known = {each for table in (found, other) for each in table.column_names if _has_values(table, each)}
    near = difflib.get_close_matches(name, sorted(known - set(KEYS)), 1)
    close = f"; did you mean {near[0]}?" if near else "."
    raise UsageError(f"--by {name}: neither {labels} nor {scored} has such a column{close}")


def _has_values(table: pa.Table, name: str) -> bool:
    return name in table.column_names and table[name].null_count < table.num_rows


def _labels(labels: str, name: str) -> pa.Table:
    """All columns of a store but its streams, and that one of its folders' names, or of a manifest."""
    if not has_features(labels):
        return read_manifest(labels)
    tables = []
    for path in FeatureStore.open(labels).parts:
        part = files.read_parquet(path)
        part = part.drop_columns([stream for stream in STREAMS if stream in part.column_names])
        if name not in part.column_names and (value := partition_of(labels, path).get(name)) is not None:
            part = part.append_column(name, pa.repeat(pa.scalar(value), part.num_rows))
        tables.append(part)
    return pa.concat_tables(tables, promote_options="permissive")


def _grouped(column: pa.Array, name: str) -> tuple[np.ndarray, list[str]]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        values = column.to_numpy(zero_copy_only=False)
        known = np.isfinite(values)
        distinct = np.unique(values[known])
        if not 0 < len(distinct) <= _MOST_CODES:
            return _bands(values.astype(np.float64))
        return np.where(known, np.searchsorted(distinct, values), -1), [_plain(value) for value in distinct]
    try:
        encoded = column.cast(pa.string()).dictionary_encode()
    except pa.ArrowException:
        raise UsageError(f"--by {name}: the column is {column.type}; text or numbers make groups.") from None
    if (n := len(encoded.dictionary)) > MOST_GROUPS:
        raise UsageError(f"--by {name}: the column has {n:,} values; at most {MOST_GROUPS} groups are compared.")
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _plain(value: np.number) -> str:
    """A number as short as its precision allows, in any type: 0 and 1 are codes also where a null made them floats."""
    return str(value).removesuffix(".0")


def _bands(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    known = np.isfinite(values)
    if not known.any():
        raise LabelError("the column of --by has no number for any utterance with score and label.")
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, _BANDS + 1)))
    inner = edges[1:-1]
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] or [f"{edges[0]:g}"]
    return np.where(known, np.searchsorted(inner, values, side="right"), -1), names
