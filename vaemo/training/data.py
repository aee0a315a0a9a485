"""The data of a training: rows of a store, folds and enrolments; validated before it starts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.config import Config, suggest
from vaemo.data.sessions import Session, lost_labels, read_sessions
from vaemo.data.speakers import Enrolments, aggregate_speakers, note_unnamed_speakers
from vaemo.data.splits import Fold, make_folds, plain_split
from vaemo.data.windows import PackedSessions
from vaemo.errors import LabelError, SplitError, UsageError
from vaemo.model.checks import used_pasts
from vaemo.parts.shards import digest
from vaemo.progress import say
from vaemo.store import FeatureStore
from vaemo.tables import shown
from vaemo.training.trainer import check_labels
from vaemo.units import CALIB, LabelScale

_LIGHT = [
    "session_id", "utt_id", "speaker_id", "channel", "role", "position", "split", "fold", "start_s", "end_s",
]  # fmt: skip


def light(targets: Sequence[str]) -> list[str]:
    """The columns of a store except the features."""
    return [*_LIGHT, *targets, "status", "reason"]


TRAINING_SECTIONS = ("model", "updater", "train", "sessions", "splits", "labels")
"""Config sections that affect the result of a training."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """A store as training takes it.

    Attributes:
        store: Opened.
        config: Of the run.
        folds: What to hold out in turn: `by=fold`, `by=speaker`, `k=N`; None trains once, on the splits.
        enrolments: Voices of the speakers, where the config enrols them from a file.
        table: The columns `light`, rows in session order.
        parts: The folds, or the one split.
    """

    store: FeatureStore
    config: Config
    folds: str | None
    enrolments: Enrolments | None
    table: pa.Table
    parts: list[Fold]

    @staticmethod
    def open(store: str, config: Config, folds: str | None = None, speakers: str | None = None) -> TrainingData:
        """Read a store without its features, and split it.

        Args:
            store: Path or URI.
            config: Sections `features`, `labels`, `model`, `sessions`, `splits`.
            folds: As above.
            speakers: File of enrolments, for `features.speaker_aggregation=enrolled`; None enrols the speakers of
                each session from the other sessions of its split.

        Raises:
            LabelError: if the store lacks the column of a target.
            UsageError: if scoring could not aggregate the speaker embeddings in the same way, or enrolments are given
                and not used.
            VaemoError: what `vaemo.data.splits` and `vaemo.data.speakers` raise.
        """
        opened = FeatureStore.open(store)
        how = config.features.speaker_aggregation
        if how != "utterance" and "features" not in opened.info.get("settings", {}):
            raise UsageError(
                f"features.speaker_aggregation is '{how}', but {store} does not record what its features are, so that "
                "scoring could not do the same. Train on a store of jobs/extract.py, or take utterance."
            )
        if speakers and how != "enrolled":
            raise UsageError(
                f"--speakers {speakers} is given, but features.speaker_aggregation is {how}; enrolments need enrolled."
            )
        table = opened.read(light(config.model.names))
        _require_labels(opened, config, table)
        note_unnamed_speakers(opened, used_pasts(config.model, opened.dims))
        parts = make_folds(table, folds, config.splits) if folds else [plain_split(table, config.splits)]
        if not folds:
            _require_splits(opened, config, table, parts[0])
        return TrainingData(opened, config, folds, Enrolments.read(speakers) if speakers else None, table, parts)

    def check_labels(self) -> None:
        """Raise LabelError unless every part has labels for training and for evaluation."""
        packed, scale = PackedSessions.of(self.labelled), LabelScale(*self.config.model.label_range)
        names = self.config.model.names
        for fold in self.parts:
            split = split_of(self.labelled, fold)
            for name in ("train", "dev"):
                check_labels(packed.select(np.flatnonzero(split == name)), name, scale, names)

    @functools.cached_property
    def labelled(self) -> list[Session]:
        """All sessions, without features."""
        return read_sessions(self.store, self.config, streams=())

    @functools.cached_property
    def digest(self) -> str:
        """Of ids, labels, splits, dimensions, extractors and voices."""
        voices = [self.enrolments.fingerprint] if self.enrolments else []
        return digest(
            *(digest(*map(str, self.table[name].to_pylist())) for name in light(self.config.model.names)),
            str(sorted(self.store.dims.items())),
            str(self.store.info.get("extractors")),
            *voices,
        )

    def read(self) -> list[Session]:
        """All sessions with their features, as stored."""
        sessions = read_sessions(self.store, self.config)
        # Arrow keeps the table's memory for the next table, but no other is as large.
        pa.default_memory_pool().release_unused()
        return sessions

    def aggregate(self, sessions: Sequence[Session], fold: Fold) -> list[Session]:
        """What `read` returned, with speaker embeddings aggregated as configured.

        Args:
            sessions: All of them.
            fold: Fold that gives the sessions their splits, and thus the speaker vectors they may use.
        """
        sessions = [dataclasses.replace(session, split=fold.split[session.rows[0]]) for session in sessions]
        return aggregate_speakers(sessions, self.config.features.speaker_aggregation, self.enrolments)

    def sessions(self, fold: Fold) -> list[Session]:
        """All sessions, read and aggregated."""
        return self.aggregate(self.read(), fold)

    @property
    def voices_differ(self) -> bool:
        """Whether splits use different vectors of the same speakers, and so cannot share one set of sessions."""
        return self.folds is not None and self.config.features.speaker_aggregation == "enrolled"

    def pack(self, fold: Fold | None = None, *, features: bool = True) -> SplitSessions:
        """The sessions to train and evaluate on, packed: for one fold, or once for all parts.

        Args:
            fold: Fold whose speaker vectors the sessions use.
            features: Whether to read features.

        Raises:
            UsageError: if one set is asked for and `voices_differ`.
        """
        if fold is None and self.voices_differ:
            raise UsageError(
                "features.speaker_aggregation is 'enrolled', whose voices differ from fold to fold; here one set of "
                "sessions serves all folds. Leave out --folds, or take utterance or running_mean."
            )
        parts = self.parts if fold is None else [fold]
        sessions = self.sessions(parts[0]) if features else self.labelled
        splits = np.stack([split_of(sessions, part) for part in parts])
        used = np.flatnonzero(np.isin(splits, ("train", "dev")).any(axis=0))
        packed = PackedSessions.of([sessions[number] for number in used])
        return SplitSessions(packed.with_past(self._pasts) if features else packed, splits[:, used])

    @property
    def _pasts(self) -> tuple[str, ...]:
        return used_pasts(self.config.model, self.store.dims)

    def used(self, fold: Fold) -> pa.Table:
        """The utterances to learn from, to choose by and to calibrate on: `session_id`, `utt_id`, `split`."""
        rows = self.table.select(["session_id", "utt_id"]).append_column("split", pa.array(fold.split, pa.string()))
        return rows.filter(pc.is_in(rows["split"], pa.array(["train", "dev", CALIB])))

    def voices(self, fold: Fold) -> Enrolments | None:
        """What scoring with the model of a fold needs as its `--speakers`; None where nothing is enrolled."""
        if self.config.features.speaker_aggregation != "enrolled" or "speaker" not in self.store.dims:
            return None
        return self.enrolments or Enrolments.of_sessions(
            read_sessions(self.store, self.config, split=fold.split, streams=("speaker",))
        )


def _require_splits(store: FeatureStore, config: Config, table: pa.Table, fold: Fold) -> None:
    """Raise SplitError for a labelled utterance without a split in a session that has one: is it to be used or not?"""
    given = table["split"].is_valid().to_numpy()
    if not given.any():
        return
    labelled = np.any([table[name].is_valid().to_numpy() for name in config.model.names], axis=0)
    usable = labelled & (table["status"].to_numpy() == "ok")
    unsaid = np.flatnonzero(usable & ~given & (fold.split != None))  # noqa: E711 -- elementwise
    if len(unsaid):
        row = int(unsaid[0])
        session, utterance = (shown(table[name][row].as_py()) for name in ("session_id", "utt_id"))
        raise SplitError(
            f"{store.path}: {len(unsaid):,} labelled utterances have no split, and others of their sessions have one: "
            f"for example {utterance} of session {session}, which is in {fold.split[row]}. A session is used as a "
            "whole: give all of its labelled utterances that split, or none of them."
        )


def _require_labels(store: FeatureStore, config: Config, table: pa.Table) -> None:
    """Raise LabelError for a target without a column; say how many labels of sessions are lost."""
    for name in config.model.names:
        if name not in store.columns:
            near = suggest.question(difflib.get_close_matches(name, sorted(store.columns), 1))
            raise LabelError(
                f"{store.path} has no column '{name}', which model.targets names.{near} Give the store that column, or "
                "leave the target out."
            )
    for name, count in lost_labels(table, config.model.targets).items():
        say(f"warning: {count:,} sessions have a label of {name} and no utterance with status ok: it is lost.")


@dataclasses.dataclass(frozen=True, eq=False)
class SplitSessions:
    """Sessions packed once for all trainings on a store, with their split in each fold.

    Attributes:
        sessions: Packed.
        splits: The split of each session in each fold, (folds, sessions), objects; a plain split is one fold.
    """

    sessions: PackedSessions
    splits: np.ndarray

    def split(self, fold: int, name: str) -> PackedSessions:
        """The sessions of one split, on the features of all."""
        return self.sessions.select(np.flatnonzero(self.splits[fold] == name))


def split_of(sessions: Sequence[Session], fold: Fold) -> np.ndarray:
    """The split of each session in a fold, (sessions,), objects."""
    return np.array([fold.split[session.rows[0]] for session in sessions], object)
