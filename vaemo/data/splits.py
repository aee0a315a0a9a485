"""Splits and folds of whole sessions, disjoint in speakers.

Reads the id columns of a store, writes nothing. Sessions that share a speaker, directly or through others, form a
*component*; splits and folds keep components whole, so that no session and no speaker is on both sides.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.config import SplitConfig
from vaemo.errors import SplitError, UsageError
from vaemo.progress import say
from vaemo.tables import codes, shown
from vaemo.units import CALIB, SPLITS


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold: what is held out, and the split of every row.

    Attributes:
        name: What is held out: a fold, a speaker, or a number; empty for a plain split.
        split: `train`, `dev`, `test`, `calib`, or None for rows that are not used, one per row of the table, objects.
        held_out: Rows that this fold is evaluated on, bool, one per row: those of `test`, for `by=speaker` only the
            speaker's own.
    """

    name: str
    split: np.ndarray
    held_out: np.ndarray


def plain_split(table: pa.Table, config: SplitConfig) -> Fold:
    """The store's own splits where it has any, else newly made ones.

    A row without a split has that of its session, which is trained on as a whole.

    Args:
        table: Columns `session_id`, `speaker_id`, `split`; every row counts.
        config: Fractions, seed, and whether speakers may overlap.

    Raises:
        SplitError: if a session, or a speaker, is in two splits, a split has an unknown name, or train or dev
            would be empty.
    """
    split = table["split"].to_numpy(zero_copy_only=False)
    if (split != None).any():  # noqa: E711 -- elementwise
        _check_names(split)
    else:
        split = _made_split(table, config, config.test_fraction, config.calib_fraction)
    _check_disjoint(table, split, config)
    _note_spellings(table, split, config)
    # Who speaks in rows without one is not evaluated there: an agent may be in calls of all splits.
    split = _of_session(table, split)
    return Fold("", split, split == "test")


def make_folds(table: pa.Table, how: str, config: SplitConfig) -> list[Fold]:
    """The folds that `--folds` asks for; ignores the store's own splits and makes dev from the rest.

    Args:
        table: Columns `session_id`, `speaker_id`, `fold`.
        how: `by=fold` (one fold each for the values of the column), `by=speaker` (leave one speaker out: sessions
            in which the speaker takes part are not trained on), or `k=N` (N parts of about equal size).
        config: The dev fraction, the seed, and whether speakers may overlap.

    Raises:
        UsageError: for another `how`.
        SplitError: as `plain_split`; and if the column `fold` is empty, or there are fewer components than folds.
    """
    kind, _, value = how.partition("=")
    if (kind, value) == ("by", "fold"):
        held_out = _by_column(table, "fold")
        tested = held_out
    elif (kind, value) == ("by", "speaker"):
        held_out = _by_column(table, "speaker_id")
        tested = {name: _whole_sessions(table, rows) for name, rows in held_out.items()}
    elif kind == "k" and value.isdecimal() and int(value) >= 2:
        parts = _deal(table, config, [1.0] * int(value))
        held_out = tested = {str(number): parts == number for number in range(int(value))}
    else:
        raise UsageError(f"--folds {how}: give by=fold, by=speaker, or k=N with N of at least 2.")
    _note_spellings(table, _components(table, config).astype(str).astype(object), config)
    folds = []
    for name, rows in held_out.items():
        if not rows.any() or tested[name].all():
            raise SplitError(
                f"fold '{name}' of --folds {how} would hold {int(rows.sum())} of {len(rows)} utterances: sessions that "
                "share speakers stay together. Give fewer folds, or by=fold."
            )
        split = np.full(len(table), "test", object)
        split[~tested[name]] = _made_split(table.filter(pa.array(~tested[name])), config, 0.0)
        judged = split.copy()
        judged[tested[name] & ~rows] = None
        _check_disjoint(table, judged, config)
        folds.append(Fold(name, split, rows))
    return folds


def _of_session(table: pa.Table, split: np.ndarray) -> np.ndarray:
    """The split of every row's session; None where no row of it has one."""
    session, given = codes(table["session_id"]), split != None  # noqa: E711 -- elementwise
    of_session = np.full(session.max(initial=-1) + 1, None, object)
    of_session[session[given]] = split[given]
    return of_session[session]


def _by_column(table: pa.Table, name: str) -> dict[str, np.ndarray]:
    values = table[name].to_numpy(zero_copy_only=False)
    names = sorted({value for value in values if value is not None})
    if len(names) < 2:
        raise SplitError(
            f"the column '{name}' has {len(names)} values; leaving one out at a time takes at least 2. "
            "Fill the column, or give --folds k=N."
        )
    return {value: values == value for value in names}


def _whole_sessions(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    session = codes(table["session_id"])
    return np.isin(session, session[rows])


def _made_split(table: pa.Table, config: SplitConfig, test_fraction: float, calib_fraction: float = 0.0) -> np.ndarray:
    """Names of splits for every row."""
    train_fraction = 1 - config.dev_fraction - test_fraction - calib_fraction
    if train_fraction <= 0:
        also = f", splits.calib_fraction {calib_fraction}" if calib_fraction else ""
        raise SplitError(
            f"splits.dev_fraction is {config.dev_fraction} and splits.test_fraction {test_fraction}{also}: nothing is "
            "left to train on."
        )
    names = (*SPLITS, CALIB)
    shares = [train_fraction, config.dev_fraction, test_fraction, calib_fraction]
    part = _deal(table, config, shares)
    for number, name in enumerate(names):
        if shares[number] and not (part == number).any():
            raise SplitError(
                f"no utterance is left for {name}: sessions that share speakers stay together, and there are "
                f"{len(np.unique(_components(table, config)))} such groups. Fill the column 'split', or set "
                "splits.allow_speaker_overlap=true."
            )
    return np.array(names, object)[part]


def _deal(table: pa.Table, config: SplitConfig, shares: list[float]) -> np.ndarray:
    """The part of every row: components are dealt, largest first, each to the part that lacks most of its share."""
    component = _components(table, config)
    sizes = np.bincount(component)
    order = np.random.default_rng(config.seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    wanted = np.array(shares) / sum(shares) * sizes.sum()
    lacking = wanted.copy()
    part = np.full(len(sizes), -1)
    for left, number in zip(range(len(order), 0, -1), order, strict=True):
        empty = (lacking == wanted) & (wanted > 0)
        # The last components go to parts that are still empty.
        part[number] = np.where(empty, lacking, -np.inf).argmax() if left <= empty.sum() else lacking.argmax()
        lacking[part[number]] -= sizes[number]
    return part[component]


def _components(table: pa.Table, config: SplitConfig) -> np.ndarray:
    """The component of every row; each session is its own where speakers may overlap."""
    session = codes(table["session_id"])
    if config.allow_speaker_overlap:
        return session
    return linked_sessions(session, codes(table["speaker_id"]))


def _check_names(split: np.ndarray) -> None:
    allowed = (*SPLITS, CALIB)
    unknown = {name for name in split if name is not None} - set(allowed)
    if unknown:
        found = shown(min(unknown))
        raise SplitError(f"the column 'split' holds {found}; allowed are {', '.join(allowed)} and null.")


def _check_disjoint(table: pa.Table, split: np.ndarray, config: SplitConfig) -> None:
    for name in ("train", "dev"):
        if not (split == name).any():
            raise SplitError(f"no utterance is in {name}; fill the column 'split', or leave it out to have it made.")
    columns = ("session_id",) if config.allow_speaker_overlap else ("session_id", "speaker_id")
    for column in columns:
        pairs = pa.table({"id": table[column], "split": pa.array(split, pa.string())}).filter(
            pc.is_valid(pc.field("split"))
        )
        counts = pairs.group_by("id").aggregate([("split", "distinct")])
        several = counts.filter(pc.greater(pc.list_value_length(counts["split_distinct"]), 1))
        if len(several):
            what = column.removesuffix("_id")
            names = ", ".join(f"'{name}'" for name in sorted(several["id"].to_pylist())[:5])
            cure = (
                "Keep a session in one split."
                if what == "session"
                else "Numbers would not be those of unseen speakers; correct the column 'split', or set "
                "splits.allow_speaker_overlap=true."
            )
            raise SplitError(f"{len(several)} {what}(s) are in more than one split: {names}. {cure}")


def _note_spellings(table: pa.Table, side: np.ndarray, config: SplitConfig) -> None:
    """Print a note if names of speakers that differ only in spelling are on different sides.

    They are not refused: names that differ only in case may be those of two people.

    Args:
        table: Column `speaker_id`.
        side: What speakers must not be on both sides of, text or None, one per row.
        config: Whether speakers may overlap.
    """
    if config.allow_speaker_overlap:
        return
    pairs = pa.table({"name": table["speaker_id"], "side": pa.array(side, pa.string())}).drop_null()
    alike: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs.group_by(["name", "side"]).aggregate([]).to_pylist():
        plain = unicodedata.normalize("NFC", pair["name"]).strip().casefold()
        alike.setdefault(plain, []).append((pair["name"], pair["side"]))
    spelled = [tuple(map(set, zip(*held, strict=True))) for held in alike.values() if len(held) > 1]
    found = sorted(sorted(names) for names, sides in spelled if len(names) > 1 and len(sides) > 1)
    if found:
        such = " and ".join(f"'{name}'" for name in found[0])
        say(
            f"{len(found)} speaker(s) may be in more than one split under names that differ only in case, blanks or "
            f"Unicode form, such as {such}. If they are one person, write the name in one way."
        )


def linked_sessions(session: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """The component of each row, (n,), whole numbers from 0: sessions that share a speaker, also through others.

    Args:
        session: (n,) whole numbers from 0.
        speaker: (n,) whole numbers from 0.
    """
    label = np.arange(session.max(initial=-1) + 1)
    while True:
        # Every speaker takes the lowest number among its sessions, every session that among its speakers.
        of_speaker = np.full(speaker.max(initial=-1) + 1, len(label))
        np.minimum.at(of_speaker, speaker, label[session])
        lowered = label.copy()
        np.minimum.at(lowered, session, of_speaker[speaker])
        lowered = lowered[lowered]
        if (lowered == label).all():
            return np.unique(label, return_inverse=True)[1][session]
        label = lowered
