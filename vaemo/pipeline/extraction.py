"""The extraction job: a manifest, or the recordings of a folder, to a feature store.

The store is a folder of parts that each name the sessions in them; a run does what is missing, and rewrites in place
the parts to do again. Nothing is ever deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vaemo import files
from vaemo.audio import READING
from vaemo.config import Config
from vaemo.features import Extractor, describe, load_extractors, with_absolute_folders
from vaemo.features.prosody import FEATURE_SETS, LICENSE_NOTE
from vaemo.parts.index import Index
from vaemo.parts.lease import lease
from vaemo.parts.shards import claim_folder, digest, key_of
from vaemo.parts.tally import Tally
from vaemo.pipeline.estimate import estimate
from vaemo.pipeline.executors import Executor, Parts
from vaemo.pipeline.outcome import make_parts
from vaemo.pipeline.plan import NOT_NAMED, Again, Plan, n_sessions, plan, write_shard
from vaemo.pipeline.prepare import refuse_other_calls, require_encoder, voices_section, without_withheld
from vaemo.pipeline.sources import Listing, Source
from vaemo.pipeline.stages import Extract
from vaemo.progress import Progress, say
from vaemo.scoring.calls import read_calls
from vaemo.scoring.erase import Tombstones
from vaemo.store import INFO, store_info, write_part
from vaemo.units import DIMENSIONS

SETTINGS = ("audio", "vad", "features", "labels")
"""Sections of the config that a store records."""


def extract(
    source: Source,
    out: str,
    config: Config,
    executor: Executor,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    again: Again = Again(),  # noqa: B008 - frozen
    about: Mapping[str, Any] | None = None,
    voices_from: str | None = None,
    calls: str | None = None,
) -> Tally:
    """Extract a source into a store; run again, it does what is missing.

    Args:
        source: A manifest, or recordings.
        out: The store's folder.
        config: All sections.
        executor: Where the parts are made.
        limit: Only the first utterances (whole sessions) or recordings, at least 1.
        dry_run: Only print what would be done.
        again: Which finished sessions are done again.
        about: Further entries of `_vaemo.json`.
        voices_from: Who speaks when in recordings, a file or folder.
        calls: Table of calls, which says what recordings are one session and what may not be processed.

    Returns:
        Counts of all outcomes in the store.

    Raises:
        VaemoError: for a problem with the input, the settings, the store, the cluster, or too many failures.
    """
    if not config.extract.keep_speaker:
        config = config.replace({"features": {"speaker": "none"}})
    extractors = load_extractors(config.features, batch_s=config.extract.batch_s)
    require_encoder(config, source)
    named = read_calls(calls, source.path) if calls else None
    listing = source.list(named)
    if voices_from:
        listing = listing.with_turns(voices_from)
    if named:
        named = named.spelled_as(listing.session_ids)
        refuse_other_calls(listing, named, calls or "")
        listing = without_withheld(listing, named)
    for note in listing.notes:
        say(note)
    listing = _first(listing.without(Tombstones.read(out).erased(listing.session_ids)), limit)
    if config.features.prosody in FEATURE_SETS and config.features.opensmile_license is None:
        say(LICENSE_NOTE)
    if dry_run:
        work = plan_extraction(source, listing, Index.open(out), config, again)
        estimate(source, work, config, extractors, executor)
        return Tally()
    with lease(out), Index.open(out) as index:
        # What was erased while the source was listed: from here on erasing is refused.
        listing = listing.without(Tombstones.read(out).erased(listing.session_ids))
        work = plan_extraction(source, listing, index, config, again)
        claim_store(out, config, extractors, source=source.kind, about=about or {})
        tally = _extract_missing(source, work, index, config, extractors, executor)
    _summarise(out, tally, work.listing.unit, config)
    return tally


def plan_extraction(
    source: Source,
    listing: Listing,
    index: Index,
    config: Config,
    again: Again = Again(),  # noqa: B008
) -> Plan:
    """What a store lacks of a source; see `vaemo.pipeline.plan.plan`."""
    contents = list(listing.contents)
    for number, problem in listing.problems.items():
        # Processing may be allowed later.
        contents[number] += NOT_NAMED if problem.status == "withheld" else ""
    keys = [key_of(*of_session) for of_session in zip(listing.session_ids, contents, strict=True)]
    once = config.extract.duplicates == "skip"
    return plan(
        listing, keys, index, source.shard_size(config), again=again, alike=(lambda index: None) if once else None
    )


def claim_store(
    out: str, config: Config, extractors: Mapping[str, Extractor], *, source: str, about: Mapping[str, Any]
) -> None:
    """Claim a folder as the store of these settings, or verify that it is.

    Args:
        out: The store.
        config: What decides results: sections audio, features, labels and, for recordings, vad.
        extractors: By stream.
        source: `manifest` or `recordings`.
        about: Further entries of its `_vaemo.json`.

    Raises:
        OtherRunError: if it holds anything else.
    """
    described = describe(extractors)
    found = voices_section(config) if source == "recordings" else ()
    sections = [*(name for name in SETTINGS if name != "vad" or source == "recordings"), *found]
    # How speaker vectors are averaged is decided when sessions are put together, not here.
    decisive = config.replace({"features": {"speaker_aggregation": "utterance"}}).fingerprint(*sections)
    fingerprint = digest(
        source,
        decisive,
        json.dumps(config.model.label_range),
        *(item["fingerprint"] for item in described.values()),
        f"reading {READING}",
        # Younger than the others: older stores have valence and arousal.
        *([repr(config.model.targets)] if config.model.targets != DIMENSIONS else []),
    )
    settings = {name: config.to_dict()[name] for name in (*SETTINGS, *found)} | {"reading": READING}
    info = store_info(described, config.model.label_range, config.labels.range, settings, config.model.names)
    claim_folder(out, INFO, fingerprint, {**info, "source": source, **about})


def _extract_missing(
    source: Source,
    work: Plan,
    index: Index,
    config: Config,
    extractors: Mapping[str, Extractor],
    executor: Executor,
) -> Tally:
    """Do the missing work; returns the counts of the whole store."""
    total = sum(work.listing.units)
    if not work.shards:
        say(f"nothing to do: all {total:,} {work.listing.unit} are extracted")
        return work.tally_of(index)

    def detail(now: Tally, elapsed_s: float) -> str:
        return f"{now.audio_s / 3600:.2f} h of audio at {now.audio_s / elapsed_s:.0f} x real time, {now.failed} failed"

    config = with_absolute_folders(config)
    parts = Parts(
        work.shards,
        ExtractWorker,
        {"source": source, "config": config.to_dict(), "out": index.folder},
        config,
        extractors,
        needs=[files.join(index.folder, INFO), *work.listing.places],
    )
    progress = Progress("extract", total, work.listing.unit, done=total - work.n_units)
    return make_parts(parts, work, index, executor, progress, detail)


class ExtractWorker:
    """Writes the part of a shard.

    Args:
        source: Reads what a shard describes.
        config: As `Config.to_dict` gives it.
        out: The store.
        ready: Extractors that need not be loaded, by stream.
    """

    def __init__(
        self, source: Source, config: Mapping[str, Any], out: str, ready: Mapping[str, Extractor] | None = None
    ) -> None:
        self._source, self._out = source, out
        self._extract = Extract(source, Config.from_dict(config), ready=ready)

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Do a shard; counts of it."""
        batch = self._extract(shard)
        part = write_shard(
            self._out, shard, batch.table, batch.stamps, lambda name, rows: write_part(self._out, name, rows)
        )
        units = batch.table.num_rows if self._source.counts_rows else n_sessions(shard)
        return {"units": units, "part": asdict(part), "n_unused_turns": batch.n_unused_turns}

    def close(self) -> None:
        """End the process that decodes."""
        self._extract.close()


def _summarise(out: str, tally: Tally, unit: str, config: Config) -> None:
    """Print what the store holds and a table of what failed.

    Raises:
        TooManyFailuresError: if the failed share is above `extract.max_failed_fraction`, or the silent share above
            `extract.max_silent_fraction`.
    """
    say(
        f"{out}: {tally.statuses.total():,} utterances of {tally.sessions:,} sessions, {tally.audio_s / 3600:.2f} h; "
        f"{tally.failed:,} without features"
    )
    tally.say("sessions" if unit == "utterances" else unit)
    extract = config.extract
    where = "Correct the files and run with --retry-failed, or raise it."
    tally.check("extract", extract.max_failed_fraction, extract.max_silent_fraction, where)


def _first(listing: Listing, limit: int | None) -> Listing:
    """The first `limit` units, and the rest of the last one's session."""
    if limit is None or limit >= sum(listing.units):
        return listing
    taken = 0
    for n, units in enumerate(listing.units, 1):
        taken += units
        if taken >= limit:
            return listing.select(range(n))
    return listing
