"""Extraction on the cluster: shards of whole sessions, each written once by a worker of its own.

The distributed form of `vaemo.extract`. The store is a folder of parts that each name the sessions in them; a run does
what is missing, `retry_failed` rewrites parts in place. Nothing is ever deleted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.cluster.encoders import encoder_stage
from vaemo.cluster.estimate import estimate
from vaemo.cluster.runtime import connect, from_bytes, run_shards, to_bytes
from vaemo.config import Config
from vaemo.errors import ReadRecordingsError, TooManyFailuresError
from vaemo.extract import AUDIO_SUFFIXES, extract_recording, extract_utterances, failed_rows, failures, reasons
from vaemo.features import Extractor, describe, load_extractors
from vaemo.features.isolated import isolated
from vaemo.features.prosody import FEATURE_SETS, LICENSE_NOTE
from vaemo.manifest import COLUMNS, read_manifest
from vaemo.progress import Progress, say
from vaemo.scoring.erase import Tombstones
from vaemo.sessions import label_range
from vaemo.shards import Shard, claim_folder, digest, plan_missing, read_keys, tag_keys
from vaemo.store import INFO, store_info, write_part
from vaemo.tables import codes

SETTINGS = ("audio", "vad", "features", "labels")
"""Sections of the config that a store records."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to extract, planned.

    Attributes:
        shards: What is missing, as workers take it.
        n_units: Utterances of the manifest, or recordings of the folder.
        n_done: How many of them are finished.
        unit: What they are called.
        audio: Where the first of them is read from, if there is one.
    """

    shards: Sequence[Mapping[str, Any]]
    n_units: int
    n_done: int
    unit: str
    audio: Sequence[str]


def run(
    config: Config,
    out: str,
    *,
    manifest: str | None = None,
    folder: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    retry: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Extract a manifest, or the recordings of a folder, into a store; run again, it does what is missing.

    Args:
        config: All sections.
        out: The store's folder.
        manifest: Which utterances; or
        folder: Where the recordings are.
        limit: Only the first utterances (whole sessions) or recordings, at least 1.
        dry_run: Only say what would be done.
        retry: Try rows again that failed in an earlier run.
        about: What else `_vaemo.json` is to say.

    Raises:
        VaemoError: for whatever is wrong with the input, the settings, the store, the cluster, or too many failures.
    """
    extractors = load_extractors(config.features, batch_s=config.extract.batch_s)
    if manifest:
        native = label_range(config).scale
        table = read_manifest(manifest, label_range=(native.low, native.high), root=config.extract.root)
        work = plan_manifest(_first(_without_erased(table, out), limit), out, config)
    else:
        assert folder is not None
        found = list_recordings(folder)
        erased = frozenset(Tombstones.read(out).erased(found))
        kept = [name for index, name in enumerate(found) if index not in erased]
        work = plan_folder(folder, kept[:limit], out, config)
    if config.features.prosody in FEATURE_SETS and config.features.opensmile_license is None:
        say(LICENSE_NOTE)
    if dry_run:
        estimate(work, config, extractors)
        return
    claim_store(out, config, extractors, source="manifest" if manifest else "recordings", about=about or {})
    if retry:
        retry_failed(out, config, extractors)
    extract_missing(work, out, config, extractors)
    summarise(out, config)


def plan_manifest(table: pa.Table, out: str, config: Config) -> Work:
    """Shards of a manifest's sessions that the store still lacks.

    Args:
        table: As `read_manifest` returns it.
        out: The store.
        config: Section extract.

    Raises:
        OtherRunError: if a session is finished whose utterances have changed since.
    """
    keys, starts = _sessions(table)
    sizes = np.diff(starts)
    shards, _ = plan_missing(out, keys, sizes.tolist(), config.extract.shard_utterances)
    planned = []
    for shard in shards:
        rows = pa.concat_tables([table.slice(starts[index], sizes[index]) for index in shard.indices])
        planned.append({"name": shard.name, "keys": json.dumps(shard.keys), "rows": to_bytes(rows)})
    missing = sum(int(sizes[list(shard.indices)].sum()) for shard in shards)
    return Work(planned, table.num_rows, table.num_rows - missing, "utterances", table["audio_path"][:1].to_pylist())


def plan_folder(folder: str, recordings: Sequence[str], out: str, config: Config) -> Work:
    """Shards of a folder's recordings that the store still lacks.

    Args:
        folder: Their root.
        recordings: As `list_recordings` returns them.
        out: The store.
        config: Section extract.
    """
    shards, n_done = plan_missing(out, recordings, [1] * len(recordings), config.extract.shard_recordings)
    planned = [{"name": shard.name, "keys": json.dumps(shard.keys), "folder": folder} for shard in shards]
    return Work(planned, len(recordings), n_done, "recordings", [files.join(folder, name) for name in recordings[:1]])


def list_recordings(folder: str) -> list[str]:
    """Paths, relative to the folder, of every file below it whose name ends as an audio file's; sorted.

    Raises:
        ReadRecordingsError: if there is none.
    """
    skip = len(folder.rstrip("/")) + 1
    found = [path[skip:] for path in files.list_files(folder, recursive=True) if path.lower().endswith(AUDIO_SUFFIXES)]
    if not found:
        state = "holds no recordings" if files.exists(folder) else "does not exist"
        raise ReadRecordingsError(f"{folder} {state}; files are taken that end in {', '.join(AUDIO_SUFFIXES)}.")
    return found


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
        source, decisive, json.dumps(config.model.label_range), *(item["fingerprint"] for item in described.values())
    )
    settings = {name: config.to_dict()[name] for name in SETTINGS}
    info = store_info(described, config.model.label_range, config.labels.range, settings)
    claim_folder(out, INFO, fingerprint, {**info, "source": source, **about})


def extract_missing(work: Work, out: str, config: Config, extractors: Mapping[str, Extractor]) -> None:
    """Do what is missing, on the cluster, with one line of progress.

    Raises:
        ClusterError: if the cluster cannot run it, or nothing moves.
    """
    connect()
    arguments = {"config": config.to_dict(), "out": out}
    progress = Progress("extract", work.n_units, work.unit, done=work.n_done)
    audio_s = failed = 0.0

    def detail(elapsed_s: float) -> str:
        return f"{audio_s / 3600:.2f} h of audio at {audio_s / elapsed_s:.0f} x real time, {failed:.0f} failed"

    needs = [files.join(out, INFO), *work.audio]
    with encoder_stage(extractors, config, len(work.shards)) as encoders:
        for counts in run_shards(ExtractWorker, {**arguments, "encoders": encoders}, work.shards, needs=needs):
            audio_s += counts["audio_s"]
            failed += counts["failed"]
            progress.advance(counts["units"], detail)
    progress.close()


def retry_failed(out: str, config: Config, extractors: Mapping[str, Extractor]) -> None:
    """Try the rows again that have failed; parts are rewritten in place, whole or not at all."""
    parts = [path for path in files.list_files(out, ".parquet") if failures(files.read_parquet(path, ["status"]))]
    if not parts:
        return
    connect()
    progress = Progress("retry", len(parts), "parts")
    arguments = {"config": config.to_dict(), "out": out}
    shards = [{"path": path} for path in parts]
    with encoder_stage(extractors, config, len(shards)) as encoders:
        for counts in run_shards(RetryWorker, {**arguments, "encoders": encoders}, shards, needs=parts[:1]):
            progress.advance(1, f"{counts['mended']} of {counts['failed']} mended in the last")
    progress.close()


class ExtractWorker:
    """Writes the part of a shard: extractors and decoder are made once and serve every shard that comes.

    Args:
        config: As `Config.to_dict` gives it.
        out: The store.
        encoders: Stand-ins for extractors that compute elsewhere; see `encoder_stage`.
    """

    def __init__(self, config: Mapping[str, Any], out: str, encoders: Mapping[str, Extractor] | None = None) -> None:
        self._config = Config.from_dict(config)
        self._out = out
        batch_s = self._config.extract.batch_s
        self._extractors = load_extractors(self._config.features, batch_s=batch_s, ready=encoders)
        self._decoder = Decoder(self._config.extract.decode_timeout_s)

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, float]:
        """Do a shard; counts of it."""
        with isolated(self._extractors, self._config, careful=shard.get("careful", False)) as extractors:
            return self._do(shard, {"extractors": extractors, "config": self._config, "decoder": self._decoder})

    def _do(self, shard: Mapping[str, Any], tools: dict[str, Any]) -> dict[str, float]:
        """Extract and write a part."""
        keys = tuple(json.loads(shard["keys"]))
        if "rows" in shard:
            table = extract_utterances(from_bytes(shard["rows"]), **tools)
            units = table.num_rows
        else:
            table = pa.concat_tables(
                extract_recording(files.join(shard["folder"], name), name, **tools) for name in keys
            )
            units = len(keys)
        write_part(self._out, shard["name"], tag_keys(table, Shard(shard["name"], keys, ())))
        audio_s = pc.sum(table["duration_s"]).as_py() or 0.0
        return {"units": units, "audio_s": audio_s, "failed": failures(table)}


class RetryWorker(ExtractWorker):
    """Rewrites a part whose failed rows are tried again."""

    def _do(self, shard: Mapping[str, Any], tools: dict[str, Any]) -> dict[str, float]:
        """Rewrite a part."""
        path = shard["path"]
        held = files.read_parquet(path)
        # Labels in a part are on the model's range already.
        tools = {**tools, "config": self._config.replace({"labels": {"range": None}})}
        if files.read_json(files.join(self._out, INFO))["source"] == "manifest":
            wrong = failed_rows(held).to_numpy()
            computed = ["status", "reason", "duration_s", "bandwidth_hz", *self._extractors]
            rows = held.filter(pa.array(wrong)).drop_columns(computed)
            again = extract_utterances(rows, **tools).select(held.column_names)
            merged = pa.concat_tables([held.filter(pa.array(~wrong)), again])
            order = np.argsort(np.r_[np.flatnonzero(~wrong), np.flatnonzero(wrong)])
            table = merged.take(pa.array(order))
        else:
            wrong_ids = set(held.filter(failed_rows(held))["session_id"].to_pylist())
            paths = dict(zip(held["session_id"].to_pylist(), held["audio_path"].to_pylist(), strict=True))
            parts = []
            for session_id, audio in paths.items():
                if session_id in wrong_ids:
                    parts.append(extract_recording(audio, session_id, **tools).select(held.column_names))
                else:
                    parts.append(held.filter(pc.equal(held["session_id"], session_id)))
            table = pa.concat_tables(parts)
        name = path.rsplit("/", 1)[-1]
        write_part(self._out, name, tag_keys(table, Shard(name, tuple(read_keys(path)), ())))
        return {"failed": failures(held), "mended": failures(held) - failures(table)}


def summarise(out: str, config: Config) -> None:
    """Print what the store holds and a table of what failed.

    Raises:
        TooManyFailuresError: if the failed share is above `extract.max_failed_fraction`.
    """
    columns = ["session_id", "utt_id", "duration_s", "status", "reason"]
    table = pa.concat_tables(files.read_parquet(path, columns) for path in files.list_files(out, ".parquet"))
    n, n_failed = table.num_rows, failures(table)
    hours = (pc.sum(table["duration_s"]).as_py() or 0.0) / 3600
    sessions = len(pc.unique(table["session_id"]))
    say(f"{out}: {n:,} utterances of {sessions:,} sessions, {hours:.2f} h; {n_failed:,} without features")
    for line in reasons(table):
        say(line)
    if n_failed > config.extract.max_failed_fraction * n:
        raise TooManyFailuresError(
            f"{n_failed} of {n} utterances failed ({n_failed / n:.1%}); extract.max_failed_fraction allows "
            f"{config.extract.max_failed_fraction:.1%}. Mend the files and run with --retry-failed, or raise it."
        )


def _sessions(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """The key of every session (its id and a digest of its rows), and where sessions start, end included."""
    session = codes(table["session_id"])
    starts = np.r_[np.flatnonzero(np.r_[True, session[1:] != session[:-1]][: len(session)]), len(session)]
    # Where a corpus lies may change between two runs, what it holds may not.
    names = pc.replace_substring_regex(table["audio_path"], r"^.*/", "")
    texts = [names, *(table[name] for name in COLUMNS if name != "audio_path")]
    lines = pc.binary_join_element_wise(*(pc.fill_null(text.cast(pa.string()), "") for text in texts), "\t")
    lines, ids = lines.to_pylist(), table["session_id"].take(pa.array(starts[:-1])).to_pylist()
    keys = [
        f"{session_id}\t{digest(*lines[first:stop])[:16]}"
        for session_id, first, stop in zip(ids, starts[:-1], starts[1:], strict=True)
    ]
    return keys, starts


def _without_erased(table: pa.Table, out: str) -> pa.Table:
    """The utterances of the sessions that were not erased from the store."""
    session_ids = table["session_id"].unique()
    erased = session_ids.take(pa.array(Tombstones.read(out).erased(session_ids.to_pylist()), pa.int64()))
    return table.filter(pc.invert(pc.is_in(table["session_id"], erased))) if len(erased) else table


def _first(table: pa.Table, limit: int | None) -> pa.Table:
    """The first `limit` utterances, and what is left of the last one's session."""
    if limit is None or limit >= table.num_rows:
        return table
    session = codes(table["session_id"])
    return table.slice(0, int(np.searchsorted(session, session[limit - 1], side="right")))
