"""Extraction on the cluster: shards of whole sessions, each written once by a worker of its own.

The distributed form of `vaemo.extract`. The store is a folder of parts that each name the sessions in them; a run does
what is missing, and what of it is to be done again is rewritten in place. Nothing is ever deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vaemo import files
from vaemo.audio import READING
from vaemo.audio.recording import Decoder
from vaemo.cluster.encoders import encoder_stage
from vaemo.cluster.estimate import estimate
from vaemo.cluster.runtime import connect, run_shards
from vaemo.config import Config
from vaemo.features import Extractor, describe, load_extractors
from vaemo.features.isolated import isolated
from vaemo.features.prosody import FEATURE_SETS, LICENSE_NOTE
from vaemo.index import Entry, Index
from vaemo.lease import lease
from vaemo.plan import Again, Plan, plan, write_shard
from vaemo.progress import Progress, say
from vaemo.scoring.erase import Tombstones
from vaemo.sessions import label_range
from vaemo.shards import claim_folder, digest
from vaemo.sources import Listing, ManifestSource, RecordingsSource, Source, Tools
from vaemo.store import INFO, store_info, write_part
from vaemo.tally import Tally, count
from vaemo.units import NOT_FAILED

SETTINGS = ("audio", "vad", "features", "labels")
"""Sections of the config that a store records."""


def run(
    config: Config,
    out: str,
    *,
    manifest: str | None = None,
    folder: str | None = None,
    exclude: Sequence[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
    again: Again = Again(),  # noqa: B008 - frozen
    about: Mapping[str, Any] | None = None,
) -> Tally:
    """Extract a manifest, or the recordings of a folder, into a store; run again, it does what is missing.

    Args:
        config: All sections.
        out: The store's folder.
        manifest: Which utterances; or
        folder: Where the recordings are.
        exclude: Patterns of recordings to leave out.
        limit: Only the first utterances (whole sessions) or recordings, at least 1.
        dry_run: Only say what would be done.
        again: Which finished sessions are done again.
        about: What else `_vaemo.json` is to say.

    Returns:
        What became of everything in the store.

    Raises:
        VaemoError: for whatever is wrong with the input, the settings, the store, the cluster, or too many failures.
    """
    extractors = load_extractors(config.features, batch_s=config.extract.batch_s)
    if manifest:
        native = label_range(config).scale
        source: Source = ManifestSource(manifest, config.extract.root, (native.low, native.high))
    else:
        assert folder is not None
        source = RecordingsSource(folder, config.audio, tuple(exclude), config.extract.min_age_s)
    listing = source.list()
    for note in listing.notes:
        say(note)
    listing = _first(listing.without(Tombstones.read(out).erased(listing.session_ids)), limit)
    if config.features.prosody in FEATURE_SETS and config.features.opensmile_license is None:
        say(LICENSE_NOTE)
    if dry_run:
        estimate(source, plan_extraction(source, listing, Index.open(out), config, again), config, extractors)
        return Tally()
    with lease(out), Index.open(out) as index:
        work = plan_extraction(source, listing, index, config, again)
        claim_store(out, config, extractors, source="manifest" if manifest else "recordings", about=about or {})
        tally = extract_missing(source, work, index, config, extractors)
    summarise(out, tally, work.listing.unit, config)
    return tally


def plan_extraction(
    source: Source,
    listing: Listing,
    index: Index,
    config: Config,
    again: Again = Again(),  # noqa: B008
) -> Plan:
    """What a store lacks of a source; see `vaemo.plan.plan`."""
    keys = [
        f"{session_id}\t{content}" if content else session_id
        for session_id, content in zip(listing.session_ids, listing.contents, strict=True)
    ]
    once = config.extract.duplicates == "skip"
    return plan(
        listing, keys, index, source.shard_size(config), again=again, alike=(lambda index: None) if once else None
    )


def claim_store(
    out: str, config: Config, extractors: Mapping[str, Extractor], *, source: str, about: Mapping[str, Any]
) -> None:
    """Make a folder the store of these settings, or find that it is.

    Args:
        out: The store.
        config: What decides results: sections audio, features, labels and, for recordings, vad.
        extractors: By stream.
        source: `manifest` or `recordings`.
        about: What else is to be said of the store in its `_vaemo.json`.

    Raises:
        OtherRunError: if it holds something else.
    """
    described = describe(extractors)
    sections = [name for name in SETTINGS if name != "vad" or source == "recordings"]
    # How speaker vectors are averaged is decided when sessions are put together, not here.
    decisive = config.replace({"features": {"speaker_aggregation": "utterance"}}).fingerprint(*sections)
    fingerprint = digest(
        source,
        decisive,
        json.dumps(config.model.label_range),
        *(item["fingerprint"] for item in described.values()),
        f"reading {READING}",
    )
    settings = {name: config.to_dict()[name] for name in SETTINGS} | {"reading": READING}
    info = store_info(described, config.model.label_range, config.labels.range, settings)
    claim_folder(out, INFO, fingerprint, {**info, "source": source, **about})


def extract_missing(
    source: Source, work: Plan, index: Index, config: Config, extractors: Mapping[str, Extractor]
) -> Tally:
    """Do what is to be done, on the cluster, with one line of progress; returns the counts of the whole store.

    Raises:
        ClusterError: if the cluster cannot run it, or nothing moves.
    """
    out, tally = index.folder, work.tally_of(index)
    if not work.shards:
        say(f"nothing to do: all {sum(work.listing.units):,} {work.listing.unit} are extracted")
        return tally
    connect()
    total = sum(work.listing.units)
    progress = Progress("extract", total, work.listing.unit, done=total - work.n_units)
    audio_s = failed = 0.0

    def detail(elapsed_s: float) -> str:
        return f"{audio_s / 3600:.2f} h of audio at {audio_s / elapsed_s:.0f} x real time, {failed:.0f} failed"

    needs = [files.join(out, INFO), *work.listing.places]
    with encoder_stage(extractors, config, len(work.shards)) as encoders:
        arguments = {"source": source, "config": config.to_dict(), "out": out, "encoders": encoders}
        for done in run_shards(ExtractWorker, arguments, work.shards, needs=needs):
            audio_s += done["audio_s"]
            failed += done["failed"]
            tally.add(index.add(Entry(**done["part"])))
            progress.advance(done["units"], detail)
    progress.close()
    return tally


class ExtractWorker:
    """Writes the part of a shard: extractors and decoder are made once and serve every shard that comes.

    Args:
        source: Reads what a shard describes.
        config: As `Config.to_dict` gives it.
        out: The store.
        encoders: Stand-ins for extractors that compute elsewhere; see `encoder_stage`.
    """

    def __init__(
        self, source: Source, config: Mapping[str, Any], out: str, encoders: Mapping[str, Extractor] | None = None
    ) -> None:
        self._source, self._config, self._out = source, Config.from_dict(config), out
        batch_s = self._config.extract.batch_s
        self._extractors = load_extractors(self._config.features, batch_s=batch_s, ready=encoders)
        self._decoder = Decoder(self._config.extract.decode_timeout_s)

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Do a shard; counts of it."""
        with isolated(self._extractors, self._config, careful=shard.get("careful", False)) as extractors:
            batch = self._source.read(shard, Tools(extractors, self._config, self._decoder, None))
        part = write_shard(
            self._out, shard, batch.table, batch.stamps, lambda name, rows: write_part(self._out, name, rows)
        )
        done = count(batch.table)
        units = batch.table.num_rows if self._source.counts_rows else done["sessions"]
        failed = sum(n for status, n in done["statuses"].items() if status not in NOT_FAILED)
        return {"units": units, "audio_s": done["audio_s"], "failed": failed, "part": asdict(part)}


def summarise(out: str, tally: Tally, unit: str, config: Config) -> None:
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
    where = "Put the files right and run with --retry-failed, or raise it."
    tally.check("extract", extract.max_failed_fraction, extract.max_silent_fraction, where)


def _first(listing: Listing, limit: int | None) -> Listing:
    """The first `limit` units, and what is left of the last one's session."""
    if limit is None or limit >= sum(listing.units):
        return listing
    taken = 0
    for n_sessions, units in enumerate(listing.units, 1):
        taken += units
        if taken >= limit:
            return listing.select(range(n_sessions))
    return listing
