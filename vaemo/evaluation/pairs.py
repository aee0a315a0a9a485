"""Scores beside labels: the two joined on `session_id` and `utt_id`, both on the model's label range.

Reads a folder of scores and a store or a manifest; what is evaluated and what a report shows comes from here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files, scores
from vaemo.config import Config
from vaemo.errors import LabelError, ReadManifestError, ReadScoresError
from vaemo.manifest import read_manifest
from vaemo.progress import say
from vaemo.sessions import label_range
from vaemo.store import FeatureStore, is_store
from vaemo.tables import typed, with_column
from vaemo.units import DIMENSIONS, LabelScale

KEYS = ("session_id", "utt_id")
PLACE = ("speaker_id", "role", "split", "fold", "position", "start_s", "end_s")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Utterances with a score and a label, in the order of the labels.

    Attributes:
        place: `session_id`, `utt_id`, `speaker_id`, `role`, `split`, `fold`, `position`, `start_s`, `end_s`: as the
            scores have them, else as the labels do.
        prediction: (n, 2) float64, on `scale`.
        label: (n, 2) float64, on `scale`; NaN = not labelled in that dimension.
        scale: The range that scores are on.
        native: The corpus's own range, where it is another.
        weight: (n, 2), how much each counts where extremes are looked for; 1 where the scores do not say.
        not_scored: How many labelled utterances have no score, by status (`absent`: no row in the scores).
    """

    place: pa.Table
    prediction: np.ndarray
    label: np.ndarray
    scale: LabelScale
    native: LabelScale | None
    weight: np.ndarray
    not_scored: dict[str, int]

    def __len__(self) -> int:
        return len(self.label)

    def column(self, name: str) -> np.ndarray:
        """A column of `place`; null is None in text and NaN in numbers."""
        return self.place[name].to_numpy(zero_copy_only=False)

    def select(self, rows: np.ndarray) -> Pairs:
        """Some utterances, by a boolean per row or by indices."""
        place = self.place.filter(pa.array(rows)) if rows.dtype == bool else self.place.take(pa.array(rows))
        return dataclasses.replace(
            self, place=place, prediction=self.prediction[rows], label=self.label[rows], weight=self.weight[rows]
        )

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Number of each row's value of a text column, -1 for null, and the values in the order they appear in."""
        encoded = self.place[name].combine_chunks().dictionary_encode()
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers, encoded.dictionary.to_pylist()

    def sessions(self) -> np.ndarray:
        """(n,) the number of each row's session, from 0 without gaps, in the order they appear in."""
        return np.unique(self.codes("session_id")[0], return_inverse=True)[1]

    def order_in_session(self) -> np.ndarray:
        """(n,) the rank of each utterance among those of its session, from 0: by position, else by time, else as is."""
        session, _ = self.codes("session_id")
        order = np.lexsort((np.arange(len(self)), self.column("start_s"), self.column("position"), session))
        first = np.r_[True, np.diff(session[order]) != 0] if len(self) else np.zeros(0, bool)
        start = np.maximum.accumulate(np.where(first, np.arange(len(self)), 0))
        rank = np.empty(len(self), np.int64)
        rank[order] = np.arange(len(self)) - start
        return rank

    def time_in_session(self) -> tuple[np.ndarray, str]:
        """How far into its session each utterance is, (n,), and what that is counted in.

        Minutes since the first of these utterances began, where all begin at a known time; else utterances, from 1.
        """
        start_s, session = self.column("start_s").astype(np.float64), self.sessions()
        if not np.isfinite(start_s).all():
            return self.order_in_session() + 1.0, "utterance of the session"
        first_s = np.full(int(session.max(initial=-1)) + 1, np.inf)
        np.minimum.at(first_s, session, start_s)
        return (start_s - first_s[session]) / 60, "minutes into the session"


def read_pairs(scored: str, labels: str, config: Config) -> Pairs:
    """Join a folder of scores with the labels of a store or a manifest.

    Raises:
        LabelError: if there are no labels, one lies outside its range, or no labelled utterance is scored.
        ReadScoresError: if an utterance is scored twice.
    """
    scale, _ = scores.read_scales(scored)
    known, native = read_labels(labels, config, scale)
    table = scores.read_utterances(scored)
    weights = [name for name in scores.WEIGHT_SCHEMA.names if name in table.column_names]
    table = table.select([*KEYS, *PLACE, *DIMENSIONS, "status", *weights])
    counts = table.group_by(list(KEYS)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        raise ReadScoresError(
            f"utterance {_example(repeated)} stands more than once in {scored}; an utterance has one score. "
            "Give the folder of one run."
        )
    renamed = known.rename_columns([name if name in KEYS else f"label_{name}" for name in known.column_names])
    renamed = renamed.append_column("row", pa.array(np.arange(renamed.num_rows)))
    joined = renamed.join(table, keys=list(KEYS), join_type="left outer").sort_by("row")
    has_score = pc.and_(pc.is_valid(joined["valence"]), pc.is_valid(joined["arousal"]))
    missing = joined.filter(pc.invert(has_score))["status"].fill_null("absent").value_counts().to_pylist()
    joined = joined.filter(has_score)
    if not joined.num_rows:
        raise LabelError(
            f"none of the {known.num_rows:,} labelled utterances of {labels} has a score in {scored}: there they are "
            f"called such as {_example(known)}, here {_example(table)}. Give the labels that belong to these scores."
        )
    place = {name: joined[name] for name in KEYS}
    place |= {name: pc.coalesce(joined[name], joined[f"label_{name}"].cast(joined[name].type)) for name in PLACE}
    return Pairs(
        pa.table(place).combine_chunks(),
        _matrix(joined, DIMENSIONS),
        _matrix(joined, [f"label_{name}" for name in DIMENSIONS]),
        scale,
        native,
        np.nan_to_num(_matrix(joined, weights), nan=1.0) if weights else np.ones((joined.num_rows, 2)),
        {item["values"]: item["counts"] for item in missing},
    )


def read_labels(path: str, config: Config, scale: LabelScale) -> tuple[pa.Table, LabelScale | None]:
    """The labelled utterances of a store or a manifest.

    Args:
        path: Of the store or the manifest.
        config: Section `labels`.
        scale: The range of the scores.

    Returns:
        table: `KEYS`, `PLACE`, and `valence`, `arousal` mapped onto `scale` (see `vaemo.sessions.label_range`).
        native: The corpus's own range, None where it is `scale`.

    Raises:
        LabelError: if there are no labels, or one lies outside its range.
    """
    columns = [*KEYS, *PLACE, *DIMENSIONS]
    store = FeatureStore.open(path) if has_features(path) else None
    table = store.read(columns) if store else read_manifest(path).select(columns)
    table = table.filter(pc.or_(pc.is_valid(table["valence"]), pc.is_valid(table["arousal"])))
    if not table.num_rows:
        raise LabelError(f"{path} has no labels: valence and arousal are null throughout.")
    for name in DIMENSIONS:
        table = with_column(table, name, table[name].cast(pa.float64()))
    labels = label_range(config, store, scale)
    return labels.mapped(table, DIMENSIONS, path), labels.native if labels.native != scale else None


def has_features(path: str) -> bool:
    """Whether labels come from a store rather than a manifest; ReadManifestError where there is nothing."""
    if not files.exists(path):
        raise ReadManifestError(f"there is nothing at {path}; give a store or a manifest with labels.")
    return not files.is_file(path) or is_store(path)


def choose_split(pairs: Pairs, split: str | None) -> tuple[str, Pairs]:
    """The utterances of a split; where none is asked for, of `test` where any row has it, else all, with a warning.

    Raises:
        LabelError: if no utterance is in the split.
    """
    column = pairs.column("split")
    if split is None and not (column == "test").any():
        say(
            "warning: no utterance is in a split 'test': all are evaluated, also those trained on. Leave those out "
            "with --exclude RUN/used.parquet, or train with --folds and evaluate RUN/oof."
        )
        return "all", pairs
    name = split or "test"
    if not (column == name).any():
        found = sorted({value for value in column if value is not None})
        raise LabelError(
            f"no utterance with score and label is in the split '{name}'; there are: {', '.join(found) or 'none'}."
        )
    return name, pairs.select(column == name)


def leave_out(pairs: Pairs, path: str) -> Pairs:
    """The utterances that a Parquet file does not list, by `utt_id` and, where it has one, `session_id`.

    Raises:
        LabelError: if the file cannot be read, has no `utt_id`, or lists all of them.
    """
    try:
        used = files.read_parquet(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise LabelError(f"--exclude {path} cannot be read: {' '.join(str(error).split())}") from None
    keys = {name: typed(used[name], name, pa.string()) for name in KEYS if name in used.column_names}
    if "utt_id" not in keys:
        raise LabelError(f"--exclude {path} has no column utt_id; it needs one, with the utterances to leave out.")
    listed = set(zip(*(ids.to_pylist() for ids in keys.values()), strict=True))
    rows = zip(*(pairs.place[name].to_pylist() for name in keys), strict=True)
    kept = np.fromiter((row not in listed for row in rows), bool, len(pairs))
    if not kept.any():
        raise LabelError(f"--exclude {path} lists all {len(pairs):,} utterances with score and label; none is left.")
    return pairs.select(kept)


def in_common(first: Pairs, second: Pairs) -> tuple[Pairs, Pairs]:
    """The utterances that both have, in the order of the first.

    Raises:
        LabelError: if there are none.
        ReadScoresError: if the two are on different ranges.
    """
    if first.scale != second.scale:
        raise ReadScoresError(
            f"the scores are on [{first.scale.low:g}, {first.scale.high:g}], those compared with on "
            f"[{second.scale.low:g}, {second.scale.high:g}]; compare models of one label range."
        )
    keys = [list(zip(*(pairs.place[name].to_pylist() for name in KEYS), strict=True)) for pairs in (first, second)]
    row_of = {key: row for row, key in enumerate(keys[1])}
    rows = np.array([(row, row_of[key]) for row, key in enumerate(keys[0]) if key in row_of], np.int64)
    if not len(rows):
        raise LabelError("the two folders of scores have no labelled utterance in common; nothing can be compared.")
    return first.select(rows[:, 0]), second.select(rows[:, 1])


def _matrix(table: pa.Table, names: list[str] | tuple[str, ...]) -> np.ndarray:
    return np.stack([table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names], axis=1)


def _example(table: pa.Table) -> str:
    return f"'{table['session_id'][0]}', '{table['utt_id'][0]}'" if table.num_rows else "(no rows)"
