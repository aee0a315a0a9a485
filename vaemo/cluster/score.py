"""Scoring on the cluster: shards of whole sessions, each written once by a worker of its own.

The distributed form of `vaemo.scoring.score`. A folder of scores belongs to one run, told by its fingerprint; running
again does what is missing, and an archive may grow.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.cluster.encoders import encoder_stage
from vaemo.cluster.prepare import Request, Run, prepare
from vaemo.cluster.runtime import connect, run_shards
from vaemo.config import Config
from vaemo.errors import OtherRunError
from vaemo.features import Extractor, load_extractors
from vaemo.features.isolated import isolated
from vaemo.index import Entry, Index
from vaemo.lease import lease
from vaemo.model.checkpoint import load_checkpoint
from vaemo.personalize import Personal
from vaemo.plan import NOT_NAMED, Plan, plan, write_shard
from vaemo.progress import Progress, say
from vaemo.scores import PROVENANCE, UTTERANCES, write_part
from vaemo.scoring.calls import DATE, Calls
from vaemo.scoring.ids import IdKey, hidden_errors
from vaemo.scoring.roles import RoleRules
from vaemo.scoring.score import score_table
from vaemo.shards import claim_folder
from vaemo.sources import Batch, Source, Tools
from vaemo.speakers import Enrolments
from vaemo.tables import from_bytes, to_bytes, with_column
from vaemo.tally import Tally

NO_DATE = "__HIVE_DEFAULT_PARTITION__"
"""What readers of partitioned folders take for null."""


def score(request: Request, config: Config) -> Tally:
    """Score what is missing, on the cluster, with one line of progress and a table of failures at the end.

    Returns:
        What became of everything in the folder of scores.

    Raises:
        OtherRunError: if the folder of scores holds another run, or what was scored there has changed in a store.
        TooManyFailuresError: if more than `score.max_failed_fraction` of what may be scored has failed.
        VaemoError: as `prepare`.
    """
    with hidden_errors(IdKey.from_environment("score.hash_ids") if config.score.hash_ids else None):
        return _score(request, config)


def _score(request: Request, config: Config) -> Tally:
    run = prepare(request, config)
    if request.dry_run:
        work = plan_scoring(run, Index.open(files.join(request.out, UTTERANCES)))
        n_sessions = len(work.listing.session_ids)
        say(f"would score {work.n_sessions:,} of {n_sessions:,} {run.unit} in {len(work.shards):,} parts")
        return Tally()
    fingerprint, provenance = run.provenance()
    with lease(request.out), Index.open(files.join(request.out, UTTERANCES)) as index:
        work = plan_scoring(run, index)
        claim_folder(request.out, PROVENANCE, fingerprint, provenance)
        if work.unchecked and run.source.needs_features:
            say(
                f"{work.unchecked:,} {run.unit} were scored by a version that did not note what they were; not checked."
            )
        tally = score_missing(run, work, index, fingerprint[:12])
    summarise(request.out, tally, run.unit, run.config)
    return tally


def score_missing(run: Run, work: Plan, index: Index, run_id: str) -> Tally:
    """Do what is to be done, on the cluster, with one line of progress; returns the counts of all scores.

    Raises:
        ClusterError: if the cluster cannot run it, or nothing moves.
    """
    request, tally, n_sessions = run.request, work.tally_of(index), len(work.listing.session_ids)
    if not work.shards:
        say(f"nothing to do: all {n_sessions:,} {run.unit} are scored")
        return tally
    connect()
    arguments = {
        "checkpoints": request.checkpoints,
        "source": run.source,
        "config": run.config.to_dict(),
        "rules": run.rules,
        "out": request.out,
        "run_id": run_id,
        "personal": request.personal,
        "speakers": request.speakers,
        "key": run.key,
    }
    extractors = load_extractors(run.config.features) if run.source.needs_features else {}
    progress = Progress("score", n_sessions, run.unit, done=n_sessions - work.n_sessions)
    needs = [files.join(request.out, PROVENANCE), *work.listing.places, *request.checkpoints]
    needs += [path for path in (request.personal, request.speakers) if path]
    with encoder_stage(extractors, run.config, len(work.shards)) as encoders:
        for done in run_shards(ScoreWorker, {**arguments, "encoders": encoders}, work.shards, needs=needs):
            tally.add(index.add(Entry(**done["part"])))
            progress.advance(done["sessions"], f"{tally.statuses.total():,} utterances")
    progress.close()
    return tally


def summarise(out: str, tally: Tally, unit: str, config: Config) -> None:
    """Print what the scores hold and a table of what failed.

    Raises:
        TooManyFailuresError: if the failed share is above `score.max_failed_fraction`, or the silent share above
            `score.max_silent_fraction`.
    """
    scored, refused = tally.statuses["ok"], tally.statuses["not_scored_role"]
    say(f"{out}: {scored:,} utterances scored, {refused:,} not scored for their role, {tally.failed:,} failed")
    if refused and not scored + tally.failed:
        say(
            "warning: nobody was scored: no utterance is of a customer. Name every channel, channel 0 first, in "
            "score.channel_roles, or in the table of calls."
        )
    tally.say(unit)
    where = f"Every one is listed in {files.join(out, UTTERANCES)} with its reason."
    tally.check("score", config.score.max_failed_fraction, config.score.max_silent_fraction, where)


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
        self._errors = [checkpoint.errors for checkpoint in loaded]
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
        settings, keys = self._config.score, json.loads(shard["keys"])
        calls = Calls(from_bytes(shard["calls"])) if shard["calls"] else None
        batch = self._read(shard, calls)
        table, context = self._rules.judge(batch.table)
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
            errors=self._errors,
        )
        scored = with_column(scored, "run_id", pa.repeat(self._run_id, scored.num_rows))
        if calls:
            scored = _with_travelling(scored, calls)
        stamps = batch.stamps
        if self._key:
            scored = self._key.hide(scored, table["audio_path"] if "audio_path" in table.column_names else None)
            stamps = {self._key.hash(session_id): held for session_id, held in stamps.items()}
        sessions = len(json.loads(shard["again"]) or keys)
        travel = calls.travel if calls else ()

        def write(name: str, rows: pa.Table) -> None:
            write_part(self._out, name, rows, settings, travel)

        part = write_shard(files.join(self._out, UTTERANCES), shard, scored, stamps, write)
        return {"sessions": sessions, "part": dataclasses.asdict(part)}

    def _read(self, shard: Mapping[str, Any], calls: Calls | None) -> Batch:
        """Rows of a shard, their features computed where its source needs that."""
        with isolated(self._tools.extractors, self._config, careful=shard.get("careful", False)) as extractors:
            return self._source.read(shard, dataclasses.replace(self._tools, extractors=extractors), calls)


def plan_scoring(run: Run, index: Index) -> Plan:
    """What the scores lack, date by date where the calls have one.

    Raises:
        OtherRunError: if the data of a store have changed since they were scored.
    """
    listing = run.listing
    calls = run.calls.take(listing.session_ids) if run.calls else None
    named = run.calls.contains(listing.session_ids) if run.calls else itertools.repeat(True)
    said = [calls.roles[name] for name in listing.session_ids] if calls else itertools.repeat(())
    keys = [
        _key(run.key, session_id, content, roles, known)
        for session_id, content, roles, known in zip(listing.session_ids, listing.contents, said, named, strict=False)
    ]

    def extra(indices: Sequence[int]) -> Mapping[str, Any]:
        return {"calls": to_bytes(calls.rows.take(pa.array(indices))) if calls else b""}

    def roles_of(index: int) -> Sequence[str | None]:
        return calls.roles[listing.session_ids[index]] if calls else ()

    work = plan(
        listing,
        keys,
        index,
        run.source.shard_size(run.config),
        places=_by_date(calls, len(keys)),
        again=run.request.again,
        alike=roles_of if run.config.extract.duplicates == "skip" else None,
        extra=extra,
    )
    if work.changed and not run.source.replaceable:
        raise OtherRunError(
            f"{run.request.out} holds scores of other data: the features of {len(work.changed):,} sessions of "
            f"{run.request.source} have changed since they were scored, such as those of '{work.changed[0]}'. Give "
            "another --out, or --changed redo to score these sessions anew."
        )
    return work


def _key(hidden: IdKey | None, session_id: str, content: str, roles: Sequence[str | None], named: bool) -> str:
    """What must be the same for a session's scores to be the same: who speaks where decides what is scored."""
    if any(roles):
        content += "," + ",".join(role or "" for role in roles)
    if hidden:
        session_id, content = hidden.hash(session_id), hidden.hash(content)
    content += "" if named else NOT_NAMED
    return f"{session_id}\t{content}" if content else session_id


def _by_date(calls: Calls | None, n: int) -> list[tuple[str, Sequence[int]]]:
    """Sessions by the folder that their date gives, in the order of dates."""
    if calls is None or DATE not in calls.travel:
        return [("", range(n))]
    dates = [date or NO_DATE for date in calls.rows[DATE].to_pylist()]
    order = sorted(range(n), key=dates.__getitem__)
    return [(f"date={date}", list(group)) for date, group in itertools.groupby(order, key=dates.__getitem__)]


def _with_travelling(scored: pa.Table, calls: Calls) -> pa.Table:
    """The columns of a call beside its utterances."""
    row = pc.index_in(scored["session_id"], value_set=calls.rows["session_id"].combine_chunks())
    for name in calls.travel:
        column = calls.rows[name].take(row)
        # As a dictionary a date agrees with what readers make of the folder's name.
        scored = scored.append_column(name, column.dictionary_encode() if name == DATE else column)
    return scored
