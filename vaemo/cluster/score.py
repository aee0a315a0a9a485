"""Scoring on the cluster: shards of whole sessions, each written once by a worker of its own.

The distributed form of `vaemo.scoring.score`. A folder of scores belongs to one run, told by its fingerprint; running
again does what is missing, and an archive may grow.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.cluster.encoders import encoder_stage
from vaemo.cluster.prepare import Request, Run, prepare
from vaemo.cluster.runtime import connect, from_bytes, run_shards, to_bytes
from vaemo.cluster.sources import Source, Tools
from vaemo.config import Config
from vaemo.errors import TooManyFailuresError
from vaemo.features import Extractor, load_extractors
from vaemo.features.isolated import isolated
from vaemo.model.checkpoint import load_checkpoint
from vaemo.personalize import Personal
from vaemo.progress import Progress, say
from vaemo.scores import PROVENANCE, write_part
from vaemo.scoring.calls import DATE, Calls
from vaemo.scoring.ids import IdKey, hidden_errors
from vaemo.scoring.roles import RoleRules
from vaemo.scoring.score import score_table
from vaemo.shards import Shard, claim_folder, plan_missing, tag_keys
from vaemo.speakers import Enrolments
from vaemo.tables import with_column
from vaemo.units import NOT_FAILED

NO_DATE = "__HIVE_DEFAULT_PARTITION__"
"""What readers of partitioned folders take for null."""


def score(request: Request, config: Config) -> None:
    """Score what is missing, on the cluster, with one line of progress and a table of failures at the end.

    Raises:
        OtherRunError: if the folder of scores holds another run.
        TooManyFailuresError: if more than `score.max_failed_fraction` of what may be scored has failed.
        VaemoError: as `prepare`.
    """
    run = prepare(request, config)
    fingerprint, provenance = run.provenance()
    n_sessions, unit = len(run.listing.session_ids), run.listing.unit
    shards, n_missing = plan(run)
    if request.dry_run:
        say(f"would score {n_missing:,} of {n_sessions:,} {unit} in {len(shards):,} parts")
        return
    claim_folder(request.out, PROVENANCE, fingerprint, provenance)
    tally = _Tally(request.out)
    if shards:
        connect()
        arguments = {
            "checkpoints": request.checkpoints,
            "source": run.source,
            "config": run.config.to_dict(),
            "rules": run.rules,
            "out": request.out,
            "run_id": fingerprint[:12],
            "personal": request.personal,
            "speakers": request.speakers,
            "key": run.key,
        }
        extractors = load_extractors(run.config.features) if run.source.needs_features else {}
        progress = Progress("score", n_sessions, unit, done=n_sessions - n_missing)
        # Where the source is a folder of recordings, a session's id is the path of one of them.
        first = files.join(request.source, run.listing.session_ids[0])
        needs = [files.join(request.out, PROVENANCE), request.source, first, *request.checkpoints]
        needs += [path for path in (request.personal, request.speakers) if path]
        with encoder_stage(extractors, run.config, len(shards)) as encoders:
            for counts in run_shards(ScoreWorker, {**arguments, "encoders": encoders}, shards, needs=needs):
                tally.add(counts)
                progress.advance(counts["sessions"], f"{tally.statuses.total():,} utterances")
        progress.close()
    tally.summarise(run.config.score.max_failed_fraction)


class ScoreWorker:
    """Scores a shard and writes its two files; models, extractors and decoder are made once.

    Args:
        checkpoints: Folders.
        source: Reads what a shard describes.
        config: As `Config.to_dict` gives it, with the checkpoints' features.
        rules: Who may be scored.
        out: The folder of scores.
        run_id: Marks every row.
        personal: Folder of personal deltas.
        speakers: File of enrolments.
        key: Hides ids.
        encoders: Stand-ins for extractors that compute elsewhere; see `encoder_stage`.
    """

    def __init__(
        self,
        checkpoints: Sequence[str],
        source: Source,
        config: Mapping[str, Any],
        rules: RoleRules,
        out: str,
        run_id: str,
        personal: str | None = None,
        speakers: str | None = None,
        key: IdKey | None = None,
        encoders: Mapping[str, Extractor] | None = None,
    ) -> None:
        # One worker has one CPU, whatever the machine has.
        torch.set_num_threads(1)
        loaded = [load_checkpoint(path) for path in checkpoints]
        self._models = [checkpoint.model.eval() for checkpoint in loaded]
        self._personal = Personal.load(personal, fingerprint=loaded[0].fingerprint) if personal else None
        self._enrolments = Enrolments.read(speakers) if speakers else None
        self._source, self._rules, self._out, self._run_id, self._key = source, rules, out, run_id, key
        self._config = Config.from_dict(config)
        extract, features = self._config.extract, source.needs_features
        self._tools = Tools(
            load_extractors(self._config.features, batch_s=extract.batch_s, ready=encoders) if features else {},
            self._config,
            Decoder(extract.decode_timeout_s) if features else None,
            rules,
        )

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Score and write one shard; counts of it."""
        with hidden_errors(self._key):
            return self._score(shard)

    def _score(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        settings, keys = self._config.score, tuple(json.loads(shard["keys"]))
        calls = Calls(from_bytes(shard["calls"])) if shard["calls"] else None
        table, context = self._rules.judge(self._read(shard, calls))
        scored = score_table(
            table,
            self._models,
            lanes=settings.lanes,
            chunk=settings.chunk,
            sequence_by=self._config.sessions.sequence_by,
            speaker_aggregation=self._config.features.speaker_aggregation,
            enrolments=self._enrolments,
            personal=self._personal,
            context=context if context.any() else None,
        )
        scored = with_column(scored, "run_id", pa.repeat(self._run_id, scored.num_rows))
        if calls:
            scored = _with_travelling(scored, calls)
        if self._key:
            scored = self._key.hide(scored, table["audio_path"] if "audio_path" in table.column_names else None)
        scored = tag_keys(scored, Shard(shard["name"], keys, ()))
        write_part(self._out, shard["name"], scored, settings, calls.travel if calls else ())
        return {"sessions": len(keys), **_counts(scored)}

    def _read(self, shard: Mapping[str, Any], calls: Calls | None) -> pa.Table:
        """Rows of a shard, their features computed where its source needs that."""
        with isolated(self._tools.extractors, self._config, careful=shard.get("careful", False)) as extractors:
            return self._source.read(shard, dataclasses.replace(self._tools, extractors=extractors), calls)


def plan(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The shards that are missing, date by date where the calls have one, and how many sessions they hold."""
    listing = run.listing
    calls = run.calls.take(listing.session_ids) if run.calls else None
    said = [calls.roles[name] for name in listing.session_ids] if calls else itertools.repeat(())
    keys = [
        _key(run.key, session_id, content, roles)
        for session_id, content, roles in zip(listing.session_ids, listing.contents, said, strict=False)
    ]
    # Features cost a thousand times a replay: where they are computed, parts are small.
    config = run.config
    target = config.extract.shard_recordings if run.source.needs_features else config.score.shard_sessions
    shards, n_missing = [], 0
    for folder, indices in _by_date(calls, len(keys)):
        missing, n_done = plan_missing(
            files.join(run.request.out, "utterances", *folder),
            [keys[index] for index in indices],
            # A part of a store that is heavier than a shard is one shard.
            [min(listing.weights[index], target) for index in indices],
            target,
        )
        n_missing += len(indices) - n_done
        for shard in missing:
            picked = [indices[index] for index in shard.indices]
            described = {
                "name": "/".join((*folder, shard.name)),
                "keys": json.dumps(shard.keys),
                "calls": to_bytes(calls.rows.take(pa.array(picked))) if calls else b"",
            }
            shards.append(described | listing.pack(picked))
    return shards, n_missing


def _key(hidden: IdKey | None, session_id: str, content: str, roles: Sequence[str | None]) -> str:
    """What must be the same for a session's scores to be the same: who speaks where decides what is scored."""
    if any(roles):
        content += "," + ",".join(role or "" for role in roles)
    if hidden:
        session_id, content = hidden.hash(session_id), hidden.hash(content)
    return f"{session_id}\t{content}" if content else session_id


def _by_date(calls: Calls | None, n: int) -> list[tuple[tuple[str, ...], Sequence[int]]]:
    """Sessions by the folder that their date gives, in the order of dates."""
    if calls is None or DATE not in calls.travel:
        return [((), range(n))]
    dates = [date or NO_DATE for date in calls.rows[DATE].to_pylist()]
    order = sorted(range(n), key=dates.__getitem__)
    return [((f"date={date}",), list(group)) for date, group in itertools.groupby(order, key=dates.__getitem__)]


def _with_travelling(scored: pa.Table, calls: Calls) -> pa.Table:
    """The columns of a call beside its utterances."""
    row = pc.index_in(scored["session_id"], value_set=calls.rows["session_id"].combine_chunks())
    for name in calls.travel:
        column = calls.rows[name].take(row)
        # As a dictionary a date agrees with what readers make of the folder's name.
        scored = scored.append_column(name, column.dictionary_encode() if name == DATE else column)
    return scored


def _counts(scored: pa.Table) -> dict[str, Any]:
    """Utterances by status; sessions `heard`, in which anything may be scored, and `lost`, where all of it failed."""
    ok = pc.equal(scored["status"], "ok")
    failed = pc.invert(pc.is_in(scored["status"], pa.array(NOT_FAILED)))
    well, ill = (set(scored["session_id"].filter(rows).unique().to_pylist()) for rows in (ok, failed))
    statuses = {item["values"]: item["counts"] for item in scored["status"].value_counts().to_pylist()}
    return {"statuses": statuses, "heard": len(well | ill), "lost": len(ill - well)}


class _Tally:
    """What became of everything in a folder of scores, the parts of earlier runs included."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.statuses: Counter[str] = Counter()
        self.heard = self.lost = 0
        for path in files.list_files(files.join(out, "utterances"), ".parquet", recursive=True):
            self.add(_counts(files.read_parquet(path, ["session_id", "status"])))

    def add(self, counts: Mapping[str, Any]) -> None:
        self.statuses.update(counts["statuses"])
        self.heard += counts["heard"]
        self.lost += counts["lost"]

    def summarise(self, limit: float) -> None:
        """Print it, and refuse to be content where more than a share `limit` has failed."""
        scored, refused = self.statuses["ok"], self.statuses["not_scored_role"]
        failed = self.statuses.total() - scored - refused
        say(f"{self.out}: {scored:,} utterances scored, {refused:,} not scored for their role, {failed:,} failed")
        if refused and not scored + failed:
            say(
                "warning: nobody was scored: no utterance is of a customer. Name every channel, channel 0 first, in "
                "score.channel_roles, or in the table of calls."
            )
        for status, count in self.statuses.most_common():
            if status not in NOT_FAILED:
                say(f"  {count:>8,}  {status}")
        # A recording that cannot be read is one row: by rows alone an archive of them would go unnoticed.
        for unit, lost, heard in (("utterances", failed, scored + failed), ("sessions", self.lost, self.heard)):
            if lost > limit * heard:
                raise TooManyFailuresError(
                    f"{lost:,} of {heard:,} {unit} failed ({lost / heard:.1%}); score.max_failed_fraction allows "
                    f"{limit:.1%}. Every one is listed in {files.join(self.out, 'utterances')} with its reason."
                )
