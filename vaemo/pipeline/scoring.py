"""The scoring job: shards of whole sessions, each written once.

A folder of scores belongs to one run, identified by its fingerprint; running again does what is missing, and an archive
may grow.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.config import Config
from vaemo.errors import OtherRunError
from vaemo.features import Extractor, load_extractors, with_absolute_folders
from vaemo.parts.index import Entry, Index
from vaemo.parts.lease import lease
from vaemo.parts.shards import claim_folder, key_of
from vaemo.parts.tally import Tally
from vaemo.pipeline.executors import Executor, Parts
from vaemo.pipeline.outcome import make_parts
from vaemo.pipeline.plan import NOT_NAMED, Plan, n_sessions, plan, write_shard
from vaemo.pipeline.prepare import Request, Run, prepare
from vaemo.pipeline.sources import Batch, Source
from vaemo.pipeline.stages import Extract, Replay
from vaemo.progress import Progress, say
from vaemo.scores import PROVENANCE, UTTERANCES, write_part
from vaemo.scoring.calls import DATE, Calls
from vaemo.scoring.compact import end_joining
from vaemo.scoring.erase import Tombstones
from vaemo.scoring.ids import IdKey, hidden_errors
from vaemo.scoring.roles import RoleRules
from vaemo.tables import from_bytes, to_bytes, with_column
from vaemo.trust.fit import write_fit

NO_DATE = "__HIVE_DEFAULT_PARTITION__"
"""The name that readers of partitioned folders take for null."""


def score(request: Request, config: Config, executor: Executor) -> Tally:
    """Score what is missing, with one line of progress and a table of failures at the end.

    Returns:
        Counts of all outcomes in the folder of scores.

    Raises:
        OtherRunError: if the folder of scores holds another run, or what was scored there has changed in a store.
        TooManyFailuresError: if more than `score.max_failed_fraction` of what may be scored has failed.
        VaemoError: as `prepare`.
    """
    with hidden_errors(IdKey.from_environment("score.hash_ids") if config.score.hash_ids else None):
        return _score(request, config, executor)


def _score(request: Request, config: Config, executor: Executor) -> Tally:
    run = prepare(request, config)
    if request.dry_run:
        work = plan_scoring(run, Index.open(files.join(request.out, UTTERANCES)))
        n_all = len(work.listing.session_ids)
        say(f"would score {work.n_sessions:,} of {n_all:,} {run.unit} in {len(work.shards):,} parts")
        return Tally()
    fingerprint, provenance = run.provenance()
    with lease(request.out), _index(request.out) as index:
        # What was erased while the source was listed: from here on erasing is refused.
        gone = Tombstones.read(request.out).erased(run.listing.session_ids)
        run = dataclasses.replace(run, listing=run.listing.without(gone))
        work = plan_scoring(run, index)
        claim_folder(request.out, PROVENANCE, fingerprint, provenance)
        if work.unchecked and run.source.needs_features:
            say(f"{work.unchecked:,} {run.unit} were scored by a version that kept no stamps; not checked.")
        tally = _score_missing(run, work, index, fingerprint[:12], executor)
    for line in write_fit(request.out, run.judge) if run.judge and run.judge.novelty and tally.statuses["ok"] else ():
        say(line)
    _summarise(request.out, tally, run.unit, run.config)
    return tally


def _index(out: str) -> Index:
    """The index of the scores, once parts that were being joined are."""
    end_joining(out)
    return Index.open(files.join(out, UTTERANCES))


def _score_missing(run: Run, work: Plan, index: Index, run_id: str, executor: Executor) -> Tally:
    """Do the missing work; returns the counts of all scores."""
    request, total = run.request, len(work.listing.session_ids)
    if not work.shards:
        say(f"nothing to do: all {total:,} {run.unit} are scored")
        return work.tally_of(index)
    config = with_absolute_folders(run.config)
    scoring = Scoring(
        request.checkpoints,
        run.source,
        config,
        run.rules,
        request.out,
        run_id,
        personal=request.personal,
        speakers=request.speakers if run.enrolments else None,
        prints=request.speakers if run.prints else None,
        key=run.key,
    )
    given = [path for path in (request.personal, request.speakers) if path]
    parts = Parts(
        work.shards,
        ScoreWorker,
        {"scoring": scoring},
        config,
        load_extractors(config.features) if run.source.needs_features else {},
        needs=[files.join(request.out, PROVENANCE), *work.listing.places, *request.checkpoints, *given],
    )
    progress = Progress("score", total, run.unit, done=total - work.n_sessions)
    return make_parts(
        parts, work, index, executor, progress, lambda now, elapsed_s: f"{now.statuses.total():,} utterances"
    )


def _summarise(out: str, tally: Tally, unit: str, config: Config) -> None:
    """Print what the scores hold and a table of what failed.

    Raises:
        TooManyFailuresError: if the failed share is above `score.max_failed_fraction`, or the silent share above
            `score.max_silent_fraction`.
    """
    scored, refused = tally.statuses["ok"], tally.statuses["not_scored_role"]
    say(f"{out}: {scored:,} utterances scored, {refused:,} not scored for their role, {tally.failed:,} failed")
    if refused and not scored + tally.failed:
        say(
            "warning: no utterance was scored: none is of a customer. Name every channel, channel 0 first, in "
            "score.channel_roles, or in the table of calls."
        )
    tally.say(unit)
    where = f"Every one is listed in {files.join(out, UTTERANCES)} with its reason."
    tally.check("score", config.score.max_failed_fraction, config.score.max_silent_fraction, where)


@dataclass(frozen=True, eq=False)
class Scoring:
    """What workers score, and with what.

    Attributes:
        checkpoints: Folders.
        source: Reads what a shard describes.
        config: With the checkpoints' features.
        rules: Who may be scored.
        out: The folder of scores.
        run_id: Id of the run in every row.
        personal: Folder of personal deltas.
        speakers: File of enrolments.
        prints: File of voices of persons, from which roles of voices follow.
        key: Hides ids.
    """

    checkpoints: Sequence[str]
    source: Source
    config: Config
    rules: RoleRules
    out: str
    run_id: str
    personal: str | None = None
    speakers: str | None = None
    prints: str | None = None
    key: IdKey | None = None


class ScoreWorker:
    """Scores a shard and writes its two files.

    Args:
        scoring: The same for all workers.
        ready: Extractors that need not be loaded, by stream.
    """

    def __init__(self, scoring: Scoring, ready: Mapping[str, Extractor] | None = None) -> None:
        config = scoring.config
        self._extract = Extract(scoring.source, config, scoring.rules, ready, scoring.prints)
        self._replay = Replay(scoring.checkpoints, config, scoring.rules, scoring.personal, scoring.speakers)
        self._scoring = scoring

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Score and write one shard; counts of it."""
        with hidden_errors(self._scoring.key):
            calls = Calls(from_bytes(shard["calls"])) if shard["calls"] else None
            batch = self._extract(shard, calls)
            scored = self._replay(batch.table)
            scored = with_column(scored, "run_id", pa.repeat(self._scoring.run_id, scored.num_rows))
            one_of_several = scored["offset_s"].is_valid()
            where = pc.if_else(one_of_several, scored["audio_path"], pa.scalar(None, pa.string()))
            scored = with_column(scored, "audio_path", where)
            if calls:
                scored = _with_travelling(scored, calls)
            part = self._write(shard, batch, scored, calls.travel if calls else ())
        facts = dataclasses.asdict(part)
        return {"units": n_sessions(shard), "part": facts, "n_unused_turns": batch.n_unused_turns}

    def _write(self, shard: Mapping[str, Any], batch: Batch, scored: pa.Table, travel: Sequence[str]) -> Entry:
        stamps, table = batch.stamps, batch.table
        out, config, key = self._scoring.out, self._scoring.config, self._scoring.key
        if key:
            scored = key.hide(scored, table["audio_path"] if "audio_path" in table.column_names else None)
            stamps = {key.hash(session_id): held for session_id, held in stamps.items()}

        def write(name: str, rows: pa.Table) -> None:
            judge = self._replay.judge
            further = judge.sessions if judge else None
            write_part(out, name, rows, config.score, travel, config.model.targets, further)

        return write_shard(files.join(out, UTTERANCES), shard, scored, stamps, write)

    def close(self) -> None:
        """End the process that decodes."""
        self._extract.close()


def plan_scoring(run: Run, index: Index) -> Plan:
    """What the scores lack, date by date where the calls have one.

    Raises:
        OtherRunError: if the data of a store have changed since they were scored.
    """
    listing = run.listing
    calls = run.calls.take(listing.session_ids) if run.calls else None
    named: Iterable[bool] = itertools.repeat(True)
    if run.calls:
        # Processing of withheld sessions may be allowed later.
        named = run.calls.contains(listing.session_ids) & ~run.calls.withheld(listing.session_ids)
    said = (
        [_said(run.calls, name, run.prints is not None) for name in listing.session_ids]
        if run.calls
        else itertools.repeat(())
    )
    keys = [
        _key(run.key, session_id, content, roles, known)
        for session_id, content, roles, known in zip(listing.session_ids, listing.contents, said, named, strict=False)
    ]

    def extra(indices: Sequence[int]) -> Mapping[str, Any]:
        if not (calls and run.calls):
            return {"calls": b""}
        recordings = run.calls.of_recordings([listing.session_ids[index] for index in indices])
        return {"calls": to_bytes(pa.concat_tables([calls.rows.take(pa.array(indices)), recordings]))}

    def roles_of(index: int) -> Sequence[str | None]:
        return calls.roles.get(listing.session_ids[index], ()) if calls else ()

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
            "another --out, or --changed redo to score these sessions again."
        )
    return work


def _said(calls: Calls, session_id: str, agents: bool) -> Sequence[str | None]:
    """The speakers according to the table of calls: roles of channels and of voices, and the agent."""
    said: list[str | None] = []
    for key in calls.keys_of(session_id):
        agent = [calls.agent_ids.get(key)] if agents else []
        said += [*calls.roles.get(key, ()), *calls.voice_roles.get(key, ()), *agent]
    return said


def _key(hidden: IdKey | None, session_id: str, content: str, roles: Sequence[str | None], named: bool) -> str:
    """The key of a session's scores: includes the roles, which decide what is scored."""
    if any(roles):
        content += "," + ",".join(role or "" for role in roles)
    if hidden:
        session_id, content = hidden.hash(session_id), hidden.hash(content)
    return key_of(session_id, content + ("" if named else NOT_NAMED))


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
        if name in scored.column_names:  # where a recording lies, which is known of some
            scored = with_column(scored, name, pc.coalesce(scored[name], column.cast(pa.string())))
            continue
        # As a dictionary a date agrees with what readers make of the folder's name.
        scored = scored.append_column(name, column.dictionary_encode() if name == DATE else column)
    return scored
