"""Sources of features and scores: a feature store, a manifest, or recordings.

A source is light and is sent to every worker. Its listing (`list`) stays on the driver: the sessions, their keys for
`vaemo.parts.shards`, and `pack`, which describes some of them to a worker. `read` turns such a description into rows
of a feature store, whole sessions in order, and stamps from which a later run detects changed input.
"""

from vaemo.pipeline.sources.base import Batch, Listing, Part, Source, Tools
from vaemo.pipeline.sources.manifest import ManifestSource
from vaemo.pipeline.sources.open import open_source
from vaemo.pipeline.sources.recordings import RecordingsSource
from vaemo.pipeline.sources.store import StoreSource

__all__ = [
    "Batch",
    "Listing",
    "ManifestSource",
    "Part",
    "RecordingsSource",
    "Source",
    "StoreSource",
    "Tools",
    "open_source",
]
