"""Scoring on the cluster: shards of whole sessions, each written once by a worker of its own.

The distributed form of `vaemo.score`. A folder of scores belongs to one run, told by its fingerprint; running again
does what is missing, and an archive may grow.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

import vaemo
from vaemo import files
from vaemo.audio import Decoder
from vaemo.calls import DATE, Calls, read_calls
from vaemo.cluster.extract import _gpu_share as gpu_share
from vaemo.cluster.runtime import connect, run_shards
from vaemo.cluster.sources import Listing, Source, StoreSource, Tools, open_source
from vaemo.config import Config
from vaemo.errors import FeatureMismatchError, TooManyFailuresError
from vaemo.features import describe, load_extractors
from vaemo.model.checkpoint import Checkpoint, load_checkpoint
from vaemo.progress import Progress, say
from vaemo.roles import NOT_KNOWN, RoleRules
from vaemo.score import check_features, score_table
from vaemo.scores import PROVENANCE, write_part
from vaemo.shards import Shard, claim_folder, digest, plan_missing, tag_keys


@dataclass(frozen=True)
class Request:
    """What the command asks for.

    Attributes:
        source: A feature store, a manifest or a folder of recordings.
        checkpoints: Folders of checkpoints; several give mean and deviation.
        out: The folder of scores.
        calls: Table of calls, or None.
        roles_unknown: Score speech of recordings whose role nobody knows.
        limit: Only the first sessions; None is all.
        dry_run: Say what would be done.
    """

    source: str
    checkpoints: tuple[str, ...]
    out: str
    calls: str | None = None
    roles_unknown: bool = False
    limit: int | None = None
    dry_run: bool = False


def score(request: Request, config: Config) -> None:
    """Score what is missing, on the cluster, with one line of progress and a table of failures at the end.

    Raises:
        RolesError: if recordings are to be scored and nobody says who speaks.
        FeatureMismatchError: if the features are not those that the checkpoints were trained on.
        OtherRunError: if the folder of scores holds another run.
        TooManyFailuresError: if more than `score.max_failed_fraction` of what may be scored has failed.
    """
    rules = RoleRules.of(config.score, roles_unknown=request.roles_unknown)
    checkpoints = [load_checkpoint(path) for path in request.checkpoints]
    source = open_source(request.source)
    config = _config_of(config, checkpoints, source, request.source)
    described = _check_features(checkpoints, source, config)
    calls = read_calls(request.calls, request.source) if request.calls else None
    listing = source.list()
    known = bool(calls and calls.has_roles and calls.contains(listing.session_ids).any())
    known |= bool(set(listing.roles) - set(NOT_KNOWN))
    rules.require_roles(n_cut=listing.n_cut, known=known, calls=calls is not None)
    _warn(checkpoints, source, config, rules, calls, listing)

    fingerprint, provenance = _provenance(checkpoints, source, config, rules, described, listing, calls)
    # Features cost a thousand times a replay: where they are computed, parts are small.
    target = config.extract.shard_recordings if source.needs_features else config.score.shard_sessions
    work = _plan(request.out, listing, calls, target, request.limit)
    if request.dry_run:
        say(f"would score {work.n_missing:,} of {work.n_sessions:,} {listing.unit} in {len(work.shards):,} parts")
        return
    claim_folder(request.out, PROVENANCE, fingerprint, provenance)
    statuses = _statuses(request.out) if work.n_missing < work.n_sessions else Counter()
    arguments = {
        "checkpoints": request.checkpoints,
        "source": source,
        "config": config.to_dict(),
        "rules": rules,
        "out": request.out,
        "run_id": fingerprint[:12],
    }
    if work.shards:
        connect()
        gpus = gpu_share(load_extractors(config.features)) if source.needs_features else 0.0
        progress = Progress("score", work.n_sessions, listing.unit, done=work.n_sessions - work.n_missing)
        for counts in run_shards(ScoreWorker, arguments, work.shards, gpus=gpus):
            statuses.update(counts["statuses"])
            progress.advance(counts["sessions"], f"{sum(statuses.values()):,} utterances")
        progress.close()
    _summarise(request.out, statuses, config)


class ScoreWorker:
    """Scores a shard and writes its two files; models, extractors and decoder are made once.

    Args:
        checkpoints: Folders.
        source: Reads what a shard describes.
        config: As `Config.to_dict` gives it, with the checkpoint's features.
        rules: Who may be scored.
        out: The folder of scores.
        run_id: Marks every row.
    """

    def __init__(
        self,
        checkpoints: Sequence[str],
        source: Source,
        config: Mapping[str, Any],
        rules: RoleRules,
        out: str,
        run_id: str,
    ) -> None:
        # One worker has one CPU, whatever the machine has.
        torch.set_num_threads(1)
        self._models = [load_checkpoint(path).model.eval() for path in checkpoints]
        self._source, self._rules, self._out, self._run_id = source, rules, out, run_id
        self._config = Config.from_dict(config)
        extract = self._config.extract
        features = source.needs_features
        self._tools = Tools(
            load_extractors(self._config.features, batch_s=extract.batch_s) if features else {},
            self._config,
            Decoder(extract.decode_timeout_s) if features else None,
            rules,
        )

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Score and write one shard; counts of it."""
        keys = tuple(json.loads(shard["keys"]))
        calls = Calls.from_bytes(shard["calls"]) if shard["calls"] else None
        table = self._source.read(shard, self._tools, calls)
        table, context = self._rules.judge(table)
        settings = self._config.score
        scored = score_table(
            table,
            self._models,
            lanes=settings.lanes,
            chunk=settings.chunk,
            sequence_by=self._config.sessions.sequence_by,
            speaker_means=self._config.features.speaker_aggregation == "running_mean",
            context=context if context.any() else None,
        )
        run_id = pa.repeat(self._run_id, scored.num_rows)
        scored = scored.set_column(scored.column_names.index("run_id"), "run_id", run_id)
        if calls:
            scored = _with_travelling(scored, calls)
        scored = tag_keys(scored, Shard(shard["name"], keys, ()))
        write_part(self._out, shard["name"], scored, settings, calls.travel if calls else ())
        statuses = {item["values"]: item["counts"] for item in scored["status"].value_counts().to_pylist()}
        return {"sessions": len(keys), "statuses": statuses}


@dataclass(frozen=True)
class _Work:
    shards: list[dict[str, Any]]
    n_sessions: int
    n_missing: int


def _plan(out: str, listing: Listing, calls: Calls | None, target: int, limit: int | None) -> _Work:
    """The shards that are missing, date by date where the calls have one."""
    n = len(listing.session_ids) if limit is None else min(limit, len(listing.session_ids))
    calls = calls.take(listing.session_ids) if calls else None
    roles = [calls.roles[name] for name in listing.session_ids] if calls else [()] * n
    keys = [
        # Who speaks where decides what is scored, so it belongs to a session's content.
        "\t".join((name, content + "".join(f",{role or ''}" for role in said))).rstrip("\t")
        for name, content, said in zip(listing.session_ids[:n], listing.contents, roles, strict=False)
    ]
    shards, n_missing = [], 0
    for folder, indices in _by_date(calls, n):
        missing, n_done = plan_missing(
            files.join(out, "utterances", folder) if folder else files.join(out, "utterances"),
            [keys[index] for index in indices],
            [listing.weights[index] for index in indices],
            target,
        )
        n_missing += len(indices) - n_done
        for shard in missing:
            picked = [indices[index] for index in shard.indices]
            shards.append(
                {
                    "name": files.join(folder, shard.name) if folder else shard.name,
                    "keys": json.dumps(shard.keys),
                    "calls": Calls(calls.rows.take(pa.array(picked))).to_bytes() if calls else b"",
                    **listing.pack(picked),
                }
            )
    return _Work(shards, n, n_missing)


def _by_date(calls: Calls | None, n: int) -> list[tuple[str, Sequence[int]]]:
    """Sessions by the folder that their date gives, in the order of dates."""
    if calls is None or DATE not in calls.travel:
        return [("", range(n))]
    dates = calls.rows[DATE].to_pylist()[:n]
    order = sorted(range(n), key=lambda index: (dates[index] or "", index))
    return [
        (f"date={date or '__HIVE_DEFAULT_PARTITION__'}", list(indices))
        for date, indices in itertools.groupby(order, key=lambda index: dates[index])
    ]


def _with_travelling(scored: pa.Table, calls: Calls) -> pa.Table:
    """The columns of a call beside its utterances."""
    row = pc.index_in(scored["session_id"], value_set=calls.rows["session_id"].combine_chunks())
    for name in calls.travel:
        column = calls.rows[name].take(row)
        # As a dictionary a date agrees with what readers make of the folder's name.
        scored = scored.append_column(name, column.dictionary_encode() if name == DATE else column)
    return scored


def _statuses(out: str) -> Counter[str]:
    """How many utterances of the finished parts have each status."""
    found: Counter[str] = Counter()
    for path in files.list_files(files.join(out, "utterances"), ".parquet", recursive=True):
        for item in files.read_parquet(path, ["status"])["status"].value_counts().to_pylist():
            found[item["values"]] += item["counts"]
    return found


def _summarise(out: str, statuses: Mapping[str, int], config: Config) -> None:
    scored, refused = statuses.get("ok", 0), statuses.get("not_scored_role", 0)
    failed = sum(statuses.values()) - scored - refused
    say(f"{out}: {scored:,} utterances scored, {refused:,} not scored for their role, {failed:,} failed")
    for status, count in sorted(statuses.items(), key=lambda item: -item[1]):
        if status not in ("ok", "not_scored_role"):
            say(f"  {count:>8,}  {status}")
    if failed > config.score.max_failed_fraction * (scored + failed):
        raise TooManyFailuresError(
            f"{failed:,} of {scored + failed:,} utterances failed ({failed / (scored + failed):.1%}); "
            f"score.max_failed_fraction allows {config.score.max_failed_fraction:.1%}. Every one is listed in "
            f"{files.join(out, 'utterances')} with its reason."
        )
