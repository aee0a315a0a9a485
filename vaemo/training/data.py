"""What a run learns from: the rows of a store, who is held out, the speakers' voices; checked before it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pyarrow as pa

from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.sessions import Session, read_sessions
from vaemo.shards import digest
from vaemo.speakers import Enrolments, aggregate_speakers
from vaemo.splits import Fold, make_folds, plain_split
from vaemo.store import FeatureStore
from vaemo.training.trainer import check_labels
from vaemo.units import LabelScale

LIGHT = [
    "session_id", "utt_id", "speaker_id", "channel", "role", "position", "split", "fold", "start_s", "end_s",
    "valence", "arousal", "status", "reason",
]  # fmt: skip
"""The columns of a store but for its features."""

SECTIONS = ("model", "updater", "train", "sessions", "splits", "labels")
"""Of the config, those that decide what a training gives."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """A store as training takes it.

    Attributes:
        store: Opened.
        config: Of the run.
        folds: What is held out in turn: `by=fold`, `by=speaker`, `k=N`; None trains once, on the splits.
        enrolments: Voices of the speakers, where the config enrols them from a file.
        table: The columns `LIGHT`, rows in session order.
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
        """Read what is light of a store, and divide it.

        Args:
            store: Path or URI.
            config: Sections `features`, `labels`, `model`, `sessions`, `splits`.
            folds: As above.
            speakers: File of enrolments, for `features.speaker_aggregation=enrolled`; None enrols the speakers of
                each session from the other sessions of its split.

        Raises:
            UsageError: if scoring could not aggregate the speaker embeddings likewise, or nothing asks for enrolments.
            VaemoError: what `vaemo.splits` and `vaemo.speakers` raise.
        """
        opened = FeatureStore.open(store)
        how = config.features.speaker_aggregation
        if how != "utterance" and "features" not in opened.info.get("settings", {}):
            raise UsageError(
                f"features.speaker_aggregation is '{how}', but {store} does not say what its features are, so that "
                "scoring would not know of it. Train on a store of jobs/extract.py, or take utterance."
            )
        if speakers and how != "enrolled":
            raise UsageError(
                f"--speakers {speakers} is given, but features.speaker_aggregation is {how}; enrolments need enrolled."
            )
        table = opened.read(LIGHT)
        parts = make_folds(table, folds, config.splits) if folds else [plain_split(table, config.splits)]
        return TrainingData(opened, config, folds, Enrolments.read(speakers) if speakers else None, table, parts)

    def check_labels(self) -> None:
        """Raise LabelError unless every part has labels to learn from and to judge by."""
        for fold in self.parts:
            for name in ("train", "dev"):
                chosen = [session for session in self.labelled if fold.split[session.rows[0]] == name]
                check_labels(chosen, name, LabelScale(*self.config.model.label_range))

    @functools.cached_property
    def labelled(self) -> list[Session]:
        """All sessions, without features."""
        return read_sessions(self.store, self.config, streams=())

    @functools.cached_property
    def digest(self) -> str:
        """Of ids, labels, splits, dimensions, extractors and voices."""
        voices = [self.enrolments.fingerprint] if self.enrolments else []
        return digest(
            *(digest(*map(str, self.table[name].to_pylist())) for name in LIGHT),
            str(sorted(self.store.dims.items())),
            str(self.store.info.get("extractors")),
            *voices,
        )

    def part(self, name: str) -> Fold:
        """The fold of a name; of the one split it is empty."""
        return next(fold for fold in self.parts if not self.folds or fold.name == name)

    def read(self) -> list[Session]:
        """All sessions with their features, as they lie in the store."""
        return read_sessions(self.store, self.config)

    def aggregate(self, sessions: Sequence[Session], fold: Fold | None = None) -> list[Session]:
        """What `read` returned, the speaker embeddings as the config wants them.

        Args:
            sessions: All of them.
            fold: Whose splits the sessions get, and which voices may be heard; None leaves the store's.
        """
        if fold is not None:
            sessions = [dataclasses.replace(session, split=fold.split[session.rows[0]]) for session in sessions]
        return aggregate_speakers(sessions, self.config.features.speaker_aggregation, self.enrolments)

    def sessions(self, fold: Fold | None = None) -> list[Session]:
        """All sessions, read and aggregated."""
        return self.aggregate(self.read(), fold)

    def shared_sessions(self) -> list[Session]:
        """All sessions, once for all parts: for those who train on them again and again.

        Raises:
            UsageError: if speakers are enrolled, whose voices differ from fold to fold.
        """
        if self.folds and self.config.features.speaker_aggregation == "enrolled":
            raise UsageError(
                "features.speaker_aggregation is 'enrolled', whose voices differ from fold to fold; here one set of "
                "sessions serves all folds. Leave --folds away, or take utterance or running_mean."
            )
        return self.sessions(None if self.folds else self.parts[0])

    def voices(self, fold: Fold) -> Enrolments | None:
        """What scoring with the model of a fold needs as its `--speakers`; None where nothing is enrolled."""
        if self.config.features.speaker_aggregation != "enrolled" or "speaker" not in self.store.dims:
            return None
        return self.enrolments or Enrolments.of_sessions(
            read_sessions(self.store, self.config, split=fold.split, streams=("speaker",))
        )
