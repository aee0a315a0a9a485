"""The source that a path names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vaemo import files
from vaemo.audio.archive import is_table_of_paths
from vaemo.audio.formats import kind_of
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.pipeline.sources.base import Source
from vaemo.pipeline.sources.manifest import ManifestSource
from vaemo.pipeline.sources.recordings import RecordingsSource
from vaemo.pipeline.sources.store import StoreSource
from vaemo.store import SUFFIXES, FeatureStore, find_parts, is_store


def open_source(path: str, config: Config, *, exclude: Sequence[str] = ()) -> Source:
    """The source that a path names: a feature store (see `vaemo.store.is_store`), a manifest, or recordings.

    Recordings are those of a folder, or those that a table of paths names (`vaemo.audio.archive.read_paths`).

    Args:
        path: What `--input` names.
        config: Sections audio and extract.
        exclude: Patterns of recordings to leave out.

    Raises:
        UsageError: if there is nothing, or a single recording.
        ReadStoreError: for a store that cannot be read, and a folder that holds nothing but other Parquet files.
    """
    if not files.exists(path):
        raise UsageError(f"--input {path} does not exist; give a feature store, a manifest or a folder of recordings.")
    single = files.is_file(path)
    # A bucket is listed once, whatever its content; on a disk most of it need not be listed.
    listed = list(files.walk(path)) if files.is_uri(path) and not single else None
    parts = find_parts(path, listed)
    if is_store(path, parts):
        source: Source = StoreSource(FeatureStore.open(path, parts, listed))
    elif single:
        if kind_of(path, config.audio) == "audio":
            raise UsageError(f"--input {path} is a recording; give the folder that it lies in.")
        if is_table_of_paths(path):
            return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s)
        source = ManifestSource(path, config.extract.root)
    elif _holds_tables_alone(parts, files.walk(path) if listed is None else listed, config):
        # Tables may be beside recordings. Alone they were meant as a store: the error names what they lack.
        source = StoreSource(FeatureStore.open(path, parts, listed))
    else:
        return RecordingsSource(path, config.audio, tuple(exclude), config.extract.min_age_s, listed)
    if exclude:
        raise UsageError(f"--exclude leaves out recordings of a folder, and --input {path} is none.")
    return source


def _holds_tables_alone(parts: Sequence[str], found: Iterable[files.Found], config: Config) -> bool:
    """Whether there are Parquet files, also in folders that are not read, and nothing that may be audio."""
    tables = bool(parts)
    for item in found:
        if kind_of(item.name, config.audio) != "other":
            return False
        tables |= item.name.lower().endswith(SUFFIXES)
    return tables
