"""An estimate of an extraction from a sample: counts, hours, time, and failures."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.features import Extractor
from vaemo.parts.tally import Tally, count
from vaemo.pipeline.executors import Executor
from vaemo.pipeline.plan import Plan
from vaemo.pipeline.sources import Listing, Source, Tools
from vaemo.progress import duration, say

_SAMPLE_UTTERANCES = 16
_SAMPLE_RECORDINGS = 2


def estimate(
    source: Source, work: Plan, config: Config, extractors: Mapping[str, Extractor], executor: Executor
) -> None:
    """Print what would be done, estimated from a sample that is extracted here and discarded.

    Args:
        source: Where the utterances come from.
        work: The plan.
        config: As for the run.
        extractors: By stream.
        executor: Where it would be done; the sample is extracted in this process.
    """
    listing, total = work.listing, sum(work.listing.units)
    done = total - work.n_units
    say(f"{total:,} {listing.unit}, {done:,} of them finished; {len(work.shards):,} parts to write.")
    if not work.n_units:
        return
    tally, n, seconds = _extract_sample(source, listing, config, extractors)
    workers = executor.workers(len(work.shards))
    say(
        f"A sample of {n} {listing.unit} took {seconds:.1f} s ({tally.audio_s / seconds:.0f} x real time). All of it "
        f"is about {tally.audio_s / n * work.n_units / 3600:.1f} h of speech, and takes about "
        f"{duration(seconds / n * work.n_units / workers)} with {workers} workers."
    )
    if tally.failed:
        say(f"{tally.failed} of the sample's {tally.statuses.total()} utterances would have no features:")
        tally.say(listing.unit)


def _extract_sample(
    source: Source, listing: Listing, config: Config, extractors: Mapping[str, Extractor]
) -> tuple[Tally, int, float]:
    """Counts, units and seconds of a sample spread over the sessions."""
    wanted = _SAMPLE_UTTERANCES if source.counts_rows else _SAMPLE_RECORDINGS
    spread = np.unique(np.linspace(0, len(listing.session_ids) - 1, wanted, dtype=int)).tolist()
    picked, n = [], 0
    for index in spread:
        if n < wanted:
            picked.append(index)
            n += listing.units[index]
    with Decoder(config.extract.decode_timeout_s) as decoder:
        tools = Tools(extractors, config, decoder, None)
        # The first call, which loads models, does not count for the rate.
        smallest = min(picked, key=lambda index: listing.units[index])
        source.read(listing.described([smallest]), tools)
        start = time.monotonic()
        batch = source.read(listing.described(picked), tools)
        seconds = time.monotonic() - start
    tally = Tally()
    tally.add(count(batch.table))
    return tally, n, seconds
