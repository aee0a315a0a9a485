"""What is done to sessions: rows of work to rows of features, rows of features to rows of scores.

Extraction is the first stage. Scoring a feature store is the second, and scoring a manifest or recordings is both, one
after the other. Stages know neither Ray nor where parts are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.data.speakers import Enrolments
from vaemo.features import Extractor, load_extractors
from vaemo.features.isolated import isolated
from vaemo.model.checkpoint import load_checkpoint
from vaemo.personalize import Personal
from vaemo.pipeline.sources import Batch, Source, Tools
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import RoleRules
from vaemo.scoring.table import score_table
from vaemo.targets import names_of
from vaemo.training.jobs import one_thread
from vaemo.trust.judge import Judge
from vaemo.voices.prints import valid_prints


class Extract:
    """Rows of work to rows of features; extractors and decoder are made once.

    Args:
        source: Reads what a shard describes; a feature store needs neither extractors nor decoder.
        config: Sections audio, vad, features, labels and extract.
        rules: Whose features are computed; None is everybody's.
        ready: Extractors that need not be loaded, by stream.
        prints: File of voices of persons, from which roles of voices follow, or None.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        rules: RoleRules | None = None,
        ready: Mapping[str, Extractor] | None = None,
        prints: str | None = None,
    ) -> None:
        self._source, self._config = source, config
        needed, extract = source.needs_features, config.extract
        self._decoder = Decoder(extract.decode_timeout_s) if needed else None
        extractors = load_extractors(config.features, batch_s=extract.batch_s, ready=ready) if needed else {}
        self._tools = Tools(extractors, config, self._decoder, rules, valid_prints(prints) if prints else None)

    def __call__(self, shard: Mapping[str, Any], calls: Calls | None = None) -> Batch:
        """The rows that a shard describes, and stamps of what they were made of."""
        with isolated(self._tools.extractors, self._config, careful=shard.get("careful", False)) as extractors:
            return self._source.read(shard, dataclasses.replace(self._tools, extractors=extractors), calls)

    def close(self) -> None:
        """End the process that decodes."""
        if self._decoder:
            self._decoder.close()


class Replay:
    """Rows of features to rows of scores, whole sessions at a time; models are loaded once.

    Args:
        checkpoints: Folders; several give mean and deviation.
        config: Sections score, sessions and features.
        rules: Who may be scored.
        personal: Folder of personal deltas, or None.
        speakers: File of enrolments, or None.
    """

    def __init__(
        self,
        checkpoints: Sequence[str],
        config: Config,
        rules: RoleRules,
        personal: str | None = None,
        speakers: str | None = None,
    ) -> None:
        loaded = [load_checkpoint(path) for path in checkpoints]
        self._models = [checkpoint.model.eval() for checkpoint in loaded]
        self._errors = [checkpoint.errors for checkpoint in loaded]
        self._personal = Personal.load(personal, fingerprint=loaded[0].fingerprint) if personal else None
        self._enrolments = Enrolments.read(speakers) if speakers else None
        self._rules, self._config = rules, config
        fingerprints = [checkpoint.fingerprint for checkpoint in loaded]
        self.judge = Judge.of(
            checkpoints, fingerprints, config.score.coverage, config.score.max_novelty, names_of(config.model.targets)
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """The columns of the utterances of a score folder but `run_id`, row for row; see `score_table` and `Judge`."""
        table, context = self._rules.judge(table)
        with one_thread():
            scored = score_table(
                table,
                self._models,
                lanes=self._config.score.lanes,
                chunk=self._config.score.chunk,
                sequence_by=self._config.sessions.sequence_by,
                speaker_aggregation=self._config.features.speaker_aggregation,
                enrolments=self._enrolments,
                personal=self._personal,
                context=context if context.any() else None,
                errors=self._errors,
            )
            return self.judge.utterances(table, scored) if self.judge else scored
