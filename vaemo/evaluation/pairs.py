"""Scores beside labels: the two joined on `session_id` and `utt_id`, both on the model's label range.

Reads a folder of scores and a store or a manifest; used by evaluation and reports.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files, scores
from vaemo.config import Config
from vaemo.data.manifest import read_manifest
from vaemo.data.sessions import LabelRanges, label_ranges, spread_labels
from vaemo.errors import LabelError, ReadManifestError, ReadScoresError, StorageError
from vaemo.progress import say
from vaemo.store import FeatureStore, is_store
from vaemo.tables import codes, typed, with_column
from vaemo.targets import Target, names_of, session_names, utterance_names
from vaemo.training.run_folder import USED, used_by
from vaemo.units import DIMENSIONS, LabelScale

KEYS = ("session_id", "utt_id")
PLACE = ("speaker_id", "role", "split", "fold", "position", "start_s", "end_s")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Utterances with a score and a label, in the order of the labels.

    Attributes:
        place: `session_id`, `utt_id`, `speaker_id`, `role`, `split`, `fold`, `position`, `start_s`, `end_s`: as the
            scores have them, else as the labels do.
        prediction: (n, K) float64, on `scale`; NaN = none, as a target of the session but at the session's last score.
        label: (n, K) float64, on `scale`; NaN = not labelled.
        scale: The range that scores are on.
        native: The corpus's own range of each target, where any is another.
        weight: (n, K less n_session), how much each counts where extremes are looked for; 1 where the scores do not
            say.
        order_in_session: (n,) how many utterances of its session with a score stand before each one, labelled or not:
            by position, else by time, else as the scores have them.
        missing: Labels without a score: `place`, `status` (`absent`: no row in the scores), and `target`, a target of
            sessions, one row for each session; null for utterances.
        names: The targets that scores and labels have, K, those of utterances first.
        n_session: How many of them are of sessions.
    """

    place: pa.Table
    prediction: np.ndarray
    label: np.ndarray
    scale: LabelScale
    native: dict[str, LabelScale] | None
    weight: np.ndarray
    order_in_session: np.ndarray
    missing: pa.Table
    names: tuple[str, ...] = DIMENSIONS
    n_session: int = 0

    def __len__(self) -> int:
        return len(self.label)

    def column(self, name: str) -> np.ndarray:
        """A column of `place`; null is None in text and NaN in numbers."""
        return self.place[name].to_numpy(zero_copy_only=False)

    def select(self, rows: np.ndarray, missing: np.ndarray | None = None) -> Pairs:
        """Some utterances, by a boolean per row or by indices, and by a boolean per row what of `missing` to keep."""
        place = self.place.filter(pa.array(rows)) if rows.dtype == bool else self.place.take(pa.array(rows))
        chosen = {name: getattr(self, name)[rows] for name in ("prediction", "label", "weight", "order_in_session")}
        lacking = self.missing if missing is None else self.missing.filter(pa.array(missing))
        return replace(self, place=place, missing=lacking, **chosen)

    @property
    def not_scored(self) -> dict[str, int]:
        """How many labelled utterances have no score, by status."""
        return _counts(self.missing.filter(pc.is_null(self.missing["target"]))["status"])

    @property
    def sessions_not_scored(self) -> dict[str, int]:
        """How many labelled sessions have no score, by target of sessions."""
        return _counts(self.missing["target"].drop_null())

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Number of each row's value of a text column, -1 for null, and the values in the order they appear in."""
        encoded = self.place[name].combine_chunks().dictionary_encode()
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers, encoded.dictionary.to_pylist()

    def sessions(self) -> np.ndarray:
        """(n,) the number of each row's session, from 0 without gaps, in the order they appear in."""
        return np.unique(self.codes("session_id")[0], return_inverse=True)[1]

    def time_in_session(self) -> tuple[np.ndarray, str]:
        """How far into its session each utterance is, (n,), and what that is counted in.

        Minutes since the first of these utterances began, where all begin at a known time; else utterances, from 1.
        """
        start_s, session = self.column("start_s").astype(np.float64), self.sessions()
        if not np.isfinite(start_s).all():
            return self.order_in_session + 1.0, "utterance of the session"
        first_s = np.full(int(session.max(initial=-1)) + 1, np.inf)
        np.minimum.at(first_s, session, start_s)
        return (start_s - first_s[session]) / 60, "minutes into the session"


def read_pairs(scored: str, labels: str, config: Config, *, quiet: bool = False) -> Pairs:
    """Join a folder of scores with the labels of a store or a manifest, on the targets that both have.

    Args:
        scored: The folder of scores.
        labels: The store or the manifest.
        config: Section `labels`.
        quiet: Do not print which targets of the scores have no labels, and which range of labels is assumed.

    Raises:
        LabelError: if there are no labels, one lies outside its range, or no labelled utterance is scored.
        ReadScoresError: if an utterance is scored twice.
    """
    (scale, native), targets = scores.read_scales(scored), scores.read_targets(scored)
    known, ranges = read_labels(labels, config, scale, targets, None if quiet else native)
    names = tuple(ranges)
    if not quiet and len(names) < len(names_of(targets)):
        lacking = ", ".join(name for name in names_of(targets) if name not in names)
        say(f"{labels} has no labels of {lacking}: evaluated are {', '.join(names)}.")
    table = _read_scores(scored, targets)
    renamed = known.rename_columns([name if name in KEYS else f"label_{name}" for name in known.column_names])
    joined = _numbered(renamed, "row").join(_numbered(table, "scored_row"), keys=list(KEYS), join_type="full outer")
    joined = joined.filter(pc.is_in(joined["session_id"], known["session_id"].unique()))
    joined = joined.sort_by([("row", "ascending"), ("scored_row", "ascending")])
    prediction, label = _matrix(joined, names), _matrix(joined, [f"label_{name}" for name in names])
    n_utterance = sum(name in utterance_names(targets) for name in names)
    weight = np.ones((len(label), n_utterance))
    for k, name in enumerate(scores.weight_names(names[:n_utterance])):
        if name in joined.column_names:
            weight[:, k] = np.nan_to_num(_matrix(joined, [name])[:, 0], nan=1.0)
    place_of = {name: joined[name] for name in KEYS}
    place_of |= {name: pc.coalesce(joined[name], joined[f"label_{name}"].cast(joined[name].type)) for name in PLACE}
    place = pa.table(place_of).combine_chunks()
    lost = _keep_scored_labels(joined, prediction, label, names, n_utterance)
    every = utterance_names(targets) or names
    has_score = ~np.isnan(_matrix(joined, every)).any(axis=1)
    lost[None] = np.flatnonzero(~has_score & ~np.isnan(label[:, :n_utterance]).all(axis=1))
    status = joined["status"].fill_null("absent")
    kept = has_score & ~np.isnan(label).all(axis=1)
    if not kept.any():
        raise LabelError(
            f"none of the {known.num_rows:,} labelled utterances of {labels} has a score in {scored}: ids there are "
            f"such as {_example(known)}, here {_example(table)}. Give the labels that belong to these scores."
        )
    natives = {name: held.native for name, held in ranges.items()}
    return Pairs(
        place.filter(pa.array(kept)),
        prediction[kept],
        label[kept],
        scale,
        natives if any(own != scale for own in natives.values()) else None,
        weight[kept],
        _ranks(place, has_score | pc.equal(status, "unfit").to_numpy())[kept],
        pa.concat_tables(_lost(place.append_column("status", status), rows, target) for target, rows in lost.items()),
        names,
        len(names) - n_utterance,
    )


def _numbered(table: pa.Table, name: str) -> pa.Table:
    return table.append_column(name, pa.array(np.arange(table.num_rows)))


def _lost(place: pa.Table, rows: np.ndarray, target: str | None) -> pa.Table:
    """Rows of `Pairs.missing`."""
    return place.take(pa.array(rows)).append_column("target", pa.array([target] * len(rows), pa.string()))


def _ranks(place: pa.Table, counted: np.ndarray) -> np.ndarray:
    """How many counted utterances of its session stand before each one: by position, else by time, else as they are."""
    session = codes(place["session_id"])
    start_s, position = (place[name].to_numpy(zero_copy_only=False) for name in ("start_s", "position"))
    order = np.lexsort((np.arange(len(session)), start_s, position, session))
    before = np.cumsum(counted[order]) - counted[order]
    first = np.r_[True, np.diff(session[order]) != 0][: len(order)]
    rank = np.empty(len(order), np.int64)
    rank[order] = before - np.maximum.accumulate(np.where(first, before, 0))
    return rank


def _read_scores(scored: str, targets: Sequence[str | Target]) -> pa.Table:
    """Ids, place, targets, status and weights of all utterances, each once."""
    table = scores.read_utterances(scored)
    weights = [name for name in scores.weight_names(targets) if name in table.column_names]
    table = table.select([*KEYS, *PLACE, *names_of(targets), "status", *weights])
    counts = table.group_by(list(KEYS)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        raise ReadScoresError(
            f"utterance {_example(repeated)} occurs more than once in {scored}; an utterance has one score. "
            "Give the folder of one run."
        )
    return table


def _keep_scored_labels(
    joined: pa.Table, prediction: np.ndarray, label: np.ndarray, names: Sequence[str], n_utterance: int
) -> dict[str | None, np.ndarray]:
    """Keep a label of the session, which is in all of its rows, only where it has a score.

    Changes `label`; returns a row of each labelled session without a score, by target.
    """
    session = codes(joined["session_id"])
    lost: dict[str | None, np.ndarray] = {}
    for k in range(n_utterance, len(names)):
        labelled, row = np.unique(np.where(np.isnan(label[:, k]), -1, session), return_index=True)
        label[np.isnan(prediction[:, k]), k] = np.nan
        lost[names[k]] = row[(labelled >= 0) & ~np.isin(labelled, session[~np.isnan(label[:, k])])]
    return lost


def read_labels(
    path: str,
    config: Config,
    scale: LabelScale,
    targets: Sequence[str | Target] = DIMENSIONS,
    trained_on: LabelScale | Mapping[str, LabelScale] | None = None,
) -> tuple[pa.Table, LabelRanges]:
    """The labelled utterances of a store or a manifest.

    Args:
        path: Of the store or the manifest.
        config: Section `labels`.
        scale: The range of the scores.
        targets: Whose labels are wanted.
        trained_on: The range of the labels of training, if known; a warning says where it is another than is assumed.

    Returns:
        table: `KEYS`, `PLACE`, and the targets that are labelled mapped onto `scale` (see
            `vaemo.data.sessions.label_ranges`); the label of a session in all of its rows.
        ranges: Of these targets.

    Raises:
        LabelError: if there are no labels, one lies outside its range, or a session has two of one target.
    """
    columns = [*KEYS, *PLACE, *names_of(targets)]
    store = FeatureStore.open(path) if has_features(path) else None
    table = store.read(columns) if store else read_manifest(path, targets=targets).select(columns)
    names = [name for name in names_of(targets) if table[name].null_count < table.num_rows]
    if not names:
        raise LabelError(f"{path} has no labels: {' and '.join(names_of(targets))} are null throughout.")
    table = table.select([*KEYS, *PLACE, *names])
    for name in names:
        table = with_column(table, name, table[name].cast(pa.float64()))
    for name in session_names(targets):
        if name in names:
            table = with_column(table, name, pa.array(spread_labels(table, name), from_pandas=True))
    labelled = functools.reduce(pc.or_, (pc.is_valid(table[name]) for name in names))
    ranges = label_ranges(config, store, scale, names)
    table = ranges.mapped(table.filter(labelled), names, path)
    others: dict[LabelScale, list[str]] = {}
    for name, held in ranges.items():
        own = trained_on.get(name) if isinstance(trained_on, Mapping) else trained_on
        if held.assumed and own and own != scale:
            others.setdefault(own, []).append(name)
    for own, of in others.items():
        say(
            f"warning: labels of {', '.join(of)} in {path} are read on [{scale.low:g}, {scale.high:g}], the range of "
            f"the scores; in training they were on [{own.low:g}, {own.high:g}]. If these are too, set labels.range."
        )
    return table, ranges


def has_features(path: str) -> bool:
    """Whether labels come from a store rather than a manifest; ReadManifestError where there is nothing."""
    if not files.exists(path):
        raise ReadManifestError(f"there is nothing at {path}; give a store or a manifest with labels.")
    return not files.is_file(path) or is_store(path)


def choose_split(pairs: Pairs, split: str | None, *, excluded: bool = False) -> tuple[str, Pairs]:
    """The utterances of a split; where none is asked for, of `test` where any row has it, else all, with a warning.

    Args:
        pairs: Of all splits.
        split: Its name.
        excluded: Whether utterances were left out already.

    Raises:
        LabelError: if no utterance is in the split.
    """
    column = pairs.column("split")
    if split is None and not (column == "test").any():
        say(
            "no utterance is in a split 'test': all that --exclude leaves are evaluated."
            if excluded
            else "warning: no utterance is in a split 'test': all are evaluated, also those trained on. Leave those "
            "out with --exclude RUN/used.parquet, or train with --folds and evaluate RUN/oof."
        )
        return "all", pairs
    name = split or "test"
    if not (column == name).any():
        found = sorted({value for value in column if value is not None})
        raise LabelError(
            f"no utterance with score and label is in the split '{name}'; there are: {', '.join(found) or 'none'}."
        )
    # A label that no row of the scores belongs to may be of any split, if it does not say.
    missing, absent = pairs.missing["split"], pc.equal(pairs.missing["status"], "absent")
    missing = pc.if_else(pc.is_null(missing), absent, pc.equal(missing, name))
    return name, pairs.select(column == name, missing.to_numpy())


def leave_out(pairs: Pairs, path: str) -> Pairs:
    """The utterances that a Parquet file does not list, by `utt_id` and, where it has one, `session_id`.

    Prints how many are left out.

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
    kept, missing = (
        np.array([row not in listed for row in zip(*(table[name].to_pylist() for name in keys), strict=True)], bool)
        for table in (pairs.place, pairs.missing)
    )
    if not kept.any():
        raise LabelError(f"--exclude {path} lists all {len(pairs):,} utterances with score and label; none is left.")
    if kept.all():
        say(
            f"warning: --exclude {path} lists none of the {len(pairs):,} utterances with score and label: ids there "
            f"are such as {_example(pa.table(keys))}, here {_example(pairs.place)}. All are evaluated."
        )
    else:
        say(f"left out: {(~kept).sum():,} of {len(pairs):,} utterances with score and label, by --exclude {path}")
    return pairs.select(kept, missing)


def in_common(first: Pairs, second: Pairs) -> tuple[Pairs, Pairs]:
    """The utterances that both have, in the order of the first.

    Raises:
        LabelError: if there are none.
        ReadScoresError: if the two are on different ranges, or of different targets.
    """
    if first.names != second.names:
        raise ReadScoresError(
            f"the scores with labels are of {', '.join(first.names)}, those compared with of "
            f"{', '.join(second.names)}; compare models of the same targets."
        )
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


def row_keys(table: pa.Table) -> pa.Array:
    """The `KEYS` of each row as one text."""
    return pc.binary_join_element_wise(*(table[key].cast(pa.string()) for key in KEYS), "\0").combine_chunks()


def used_rows(table: pa.Table, checkpoint: str) -> np.ndarray | None:
    """Which rows RUN/used.parquet beside a checkpoint lists as `train` or `dev`; None where there is no such file."""
    used = used_by(checkpoint)
    if used is None:
        return None
    known = used.filter(pc.is_in(used["split"], pa.array(["train", "dev"])))
    return pc.is_in(row_keys(table), value_set=row_keys(known)).to_numpy(zero_copy_only=False)


def warn_of_used(pairs: Pairs, scored: str) -> None:
    """Print a warning if checkpoints that made scores were trained on these utterances or chosen by them.

    Says nothing where the checkpoints are out of reach.
    """
    used = np.zeros(len(pairs), bool)
    for each in scores.read_provenance(scored).get("checkpoints", []):
        with contextlib.suppress(OSError, StorageError):
            rows = used_rows(pairs.place, each["path"]) if "path" in each else None
            used |= False if rows is None else rows
    if n := int(used.sum()):
        say(
            f"warning: {n:,} of the {len(pairs):,} utterances that are evaluated are known to the model of {scored}: "
            f"{USED} beside its checkpoint lists them as train or dev. Leave them out with --exclude RUN/{USED}; after "
            "train --folds, evaluate RUN/oof."
        )


def _matrix(table: pa.Table, names: list[str] | tuple[str, ...]) -> np.ndarray:
    return np.stack([table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names], axis=1)


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in values.value_counts().to_pylist()}


def _example(table: pa.Table) -> str:
    ids = (f"'{table[name][0]}'" for name in KEYS if name in table.column_names)
    return ", ".join(ids) if table.num_rows else "(no rows)"
