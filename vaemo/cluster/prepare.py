"""What is settled before anything is scored: models, extractors, roles, and the run's provenance.

Called by `vaemo.cluster.score` on the driver; reads checkpoints and what a source says of itself, writes nothing.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import vaemo
from vaemo.calls import Calls
from vaemo.cluster.sources import Listing, Source, StoreSource
from vaemo.config import Config
from vaemo.errors import FeatureMismatchError
from vaemo.features import describe, load_extractors
from vaemo.model.checkpoint import Checkpoint
from vaemo.progress import say
from vaemo.roles import RoleRules
from vaemo.score import check_features as require_features
from vaemo.shards import digest


def config_of(config: Config, checkpoints: Sequence[Checkpoint], source: Source, where: str) -> Config:
    """The config of the job with the checkpoints' model and, where features are to be computed, their extractors."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.config.model.label_range != first.config.model.label_range or other.features != first.features:
            raise FeatureMismatchError(
                "the checkpoints differ in their label range or their features: "
                f"{list(first.config.model.label_range)} and {list(other.config.model.label_range)}; "
                f"{first.features} and {other.features}. Score them one by one."
            )
    sections = {"model": {"label_range": list(first.config.model.label_range)}}
    if first.features is not None:
        sections["features"] = first.config.to_dict()["features"]
    if source.needs_features:
        if first.features is None:
            raise FeatureMismatchError(
                "the checkpoint does not say which extractors its features come from, so the features of "
                f"{where} cannot be computed. Train on a store that jobs/extract.py wrote, or score a store."
            )
        if first.features.speaker_aggregation == "enrolled" and "speaker" in first.model.dims:
            raise FeatureMismatchError(
                "the checkpoint was trained on enrolled speaker embeddings (features.speaker_aggregation), which "
                f"{where} has not. Extract a store with enrolments and score that."
            )
    return config.replace(sections)


def check_features(checkpoints: Sequence[Checkpoint], source: Source, config: Config) -> dict[str, Any]:
    """Refuse features that do not fit; returns what is known of the extractors, by stream."""
    if isinstance(source, StoreSource):
        described, dims = dict(source.store.info.get("extractors", {})), dict(source.store.dims)
        where = f"the store {source.store.path}"
    else:
        described = describe(load_extractors(config.features))
        dims = {stream: extractor["dim"] for stream, extractor in described.items()}
        where = "the checkpoint's own list of extractors"
    made_by = {stream: extractor.get("fingerprint") for stream, extractor in described.items()}
    for checkpoint in checkpoints:
        trained_on = checkpoint.provenance.get("feature_fingerprints", {})
        require_features(checkpoint.model, trained_on, dims, made_by, where)
    return described


def warn(
    checkpoints: Sequence[Checkpoint],
    source: Source,
    config: Config,
    rules: RoleRules,
    calls: Calls | None,
    listing: Listing,
) -> None:
    sequence_by = config.sessions.sequence_by
    for checkpoint in checkpoints:
        trained = checkpoint.config.sessions.sequence_by
        if trained != sequence_by:
            say(
                f"warning: sessions.sequence_by is {sequence_by}, the checkpoint was trained with {trained}; "
                f"--set sessions.sequence_by={trained} scores as it was trained."
            )
    if _synthetic(checkpoints) and not _synthetic_source(source):
        say(
            "warning: the checkpoint was trained on synthetic speech (provenance: synthetic). Its scores of real "
            "recordings mean nothing; train on labelled speech."
        )
    if rules.score_unknown and listing.n_cut:
        say("warning: --roles-unknown scores all channels of recordings; employees may be included.")
    if calls:
        absent = int((~calls.contains(listing.session_ids)).sum())
        if absent:
            say(f"warning: {absent:,} of {len(listing.session_ids):,} {listing.unit} are not in the table of calls.")


def _synthetic(checkpoints: Sequence[Checkpoint]) -> bool:
    return any(checkpoint.provenance.get("synthetic") for checkpoint in checkpoints)


def _synthetic_source(source: Source) -> bool:
    return isinstance(source, StoreSource) and bool(source.store.info.get("synthetic"))


def provenance(
    checkpoints: Sequence[Checkpoint],
    source: Source,
    config: Config,
    rules: RoleRules,
    described: Mapping[str, Any],
    listing: Listing,
    calls: Calls | None,
) -> tuple[str, dict[str, Any]]:
    """The run's fingerprint, and what `_provenance.json` says beside it."""
    sections = ["score", "sessions"] + (["audio", "vad", "features", "labels"] if source.needs_features else [])
    features = {stream: extractor.get("fingerprint") for stream, extractor in described.items()}
    settings = {
        **config.decisive(*sections),
        "checkpoints": [checkpoint.fingerprint for checkpoint in checkpoints],
        "features_used": features,
        "roles_unknown": rules.score_unknown,
    }
    fingerprint = digest(json.dumps(settings, sort_keys=True))
    first = checkpoints[0]
    named = [*listing.roles, *(rules.channel_roles or ())]
    if calls:
        named += {role for roles in calls.roles.values() for role in roles if role}
    return fingerprint, {
        "run_id": fingerprint[:12],
        "settings": settings,
        "config_fingerprint": config.fingerprint(*sections),
        "checkpoints": [
            {"fingerprint": checkpoint.fingerprint, "provenance": checkpoint.provenance} for checkpoint in checkpoints
        ],
        "extractors": dict(described),
        "scan": first.model.scan_used("cpu"),
        "label_range": list(first.config.model.label_range),
        "native_range": first.provenance.get("native_range"),
        "synthetic": _synthetic(checkpoints),
        **rules.provenance(named),
        "versions": {
            "vaemo": vaemo.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pyarrow", "ray")},
        },
    }
