"""What an extraction would take, from a sample: counts, hours, time, and what would be refused."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.cluster.runtime import connect, fit_pool, from_bytes
from vaemo.config import Config
from vaemo.extract import extract_recording, extract_utterances, failures, reasons
from vaemo.features import Extractor
from vaemo.progress import duration, say

if TYPE_CHECKING:
    from vaemo.cluster.extract import Work

_SAMPLE_UTTERANCES = 16
_SAMPLE_RECORDINGS = 2


def estimate(work: Work, config: Config, extractors: Mapping[str, Extractor]) -> None:
    """Print what would be done, from a sample that is extracted here and thrown away.

    Args:
        work: The plan.
        config: As for the run.
        extractors: By stream.
    """
    left = work.n_units - work.n_done
    say(f"{work.n_units:,} {work.unit}, {work.n_done:,} of them finished; {len(work.shards):,} parts to write.")
    if not left:
        return
    sample, n, seconds = _extract_sample(work.shards, config, extractors)
    audio_s = pc.sum(sample["duration_s"]).as_py() or 0.0
    connect()
    workers = min(fit_pool().most, len(work.shards))
    say(
        f"A sample of {n} {work.unit} took {seconds:.1f} s ({audio_s / seconds:.0f} x real time). All of it is about "
        f"{audio_s / n * left / 3600:.1f} h of speech, and takes about {duration(seconds / n * left / workers)} "
        f"with {workers} workers."
    )
    if failures(sample):
        say(f"{failures(sample)} of the sample's {sample.num_rows} utterances would have no features:")
        for line in reasons(sample):
            say(line)


def _extract_sample(
    shards: Sequence[Mapping[str, Any]], config: Config, extractors: Mapping[str, Extractor]
) -> tuple[pa.Table, int, float]:
    """Rows, units and seconds of a sample spread over the shards."""
    picked = [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, _SAMPLE_UTTERANCES, dtype=int))]
    with Decoder(config.extract.decode_timeout_s) as decoder:
        tools: dict[str, Any] = {"extractors": extractors, "config": config, "decoder": decoder}
        if "rows" in picked[0]:
            tables = [from_bytes(shard["rows"]) for shard in picked]
            each = -(-_SAMPLE_UTTERANCES // len(tables))
            rows = pa.concat_tables(table.slice(0, each) for table in tables)
            # What is loaded at the first call is not part of the rate.
            extract_utterances(rows.slice(0, 1), **tools)
            start = time.monotonic()
            return extract_utterances(rows, **tools), rows.num_rows, time.monotonic() - start
        names = [(shard["folder"], name) for shard in picked for name in json.loads(shard["keys"])]
        names = names[:: -(-len(names) // _SAMPLE_RECORDINGS)]
        start = time.monotonic()
        found = [extract_recording(files.join(folder, name), name, **tools) for folder, name in names]
        return pa.concat_tables(found), len(names), time.monotonic() - start
