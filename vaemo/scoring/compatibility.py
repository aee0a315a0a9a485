"""Features a checkpoint was trained on: others are refused, and a store is read as those were.

Reads a store's metadata and sessions; writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vaemo.config import Config
from vaemo.data.sessions import Session, read_sessions
from vaemo.data.speakers import aggregate_speakers, note_unnamed_speakers
from vaemo.errors import FeatureMismatchError
from vaemo.model.checkpoint import Checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.progress import say
from vaemo.store import FeatureStore


def check_compatible(
    model: SessionRegressor,
    trained_on: Mapping[str, str | None],
    dims: Mapping[str, int],
    made_by: Mapping[str, str | None],
    where: str,
) -> None:
    """Refuse features that the model was not made for.

    Args:
        model: What needs them.
        trained_on: By stream, the fingerprint of the extractor of its training features, where that is known.
        dims: Dimension of each stream that there is.
        made_by: By stream, the fingerprint of the extractor that made it, where that is known.
        where: Whose features these are, for the message.

    Raises:
        FeatureMismatchError: if a stream is missing, has another dimension, or comes from another extractor.
    """
    for stream, dim in model.dims.items():
        if stream not in dims:
            raise FeatureMismatchError(
                f"{where} has no stream '{stream}', which the checkpoint uses; it has {', '.join(dims) or 'none'}. "
                "Extract it with the checkpoint's features."
            )
        if dims[stream] != dim:
            raise FeatureMismatchError(
                f"the stream '{stream}' of {where} has {dims[stream]} numbers; the checkpoint was made for {dim}. "
                "Extract it with the checkpoint's features."
            )
        made, wanted = made_by.get(stream), trained_on.get(stream)
        if made and wanted and made != wanted:
            raise FeatureMismatchError(
                f"the stream '{stream}' of {where} was made by the extractor {made[:12]}; the checkpoint was trained "
                f"on features of {wanted[:12]}. Extract it with the checkpoint's features (features.speech=CHECKPOINT/"
                "encoder where it has an encoder of its own), or score the manifest or the recordings."
            )


def note_other_band(checkpoint: Checkpoint, store: FeatureStore) -> None:
    """Warn where the recordings of a store were heard in another band than those of training."""
    made_by = store.info.get("settings", {}).get("audio")
    if made_by is None or checkpoint.features is None:
        return
    made, trained = made_by.get("simulate_telephone", False), checkpoint.config.audio.simulate_telephone
    if made != trained:
        say(
            f"warning: the features of {store.path} were made with audio.simulate_telephone={str(made).lower()}, those "
            f"of training with {str(trained).lower()}: scores are wrong, the more the wider the recordings' band. "
            f"Extract them with --set audio.simulate_telephone={str(trained).lower()}, or score the recordings."
        )


def read_as_trained(store_path: str, checkpoint: Checkpoint, config: Config) -> list[Session]:
    """All sessions of a store on the checkpoint's label range, cut and their speakers averaged as in its training.

    Args:
        store_path: A feature store.
        checkpoint: The checkpoint whose model reads them.
        config: Section `labels`, where the store does not say its own range.

    Raises:
        FeatureMismatchError: as `check_compatible`; and if the checkpoint was trained on enrolled speakers and one
            speaks in a single session.
        ReadStoreError: if the store cannot be read.
    """
    store = FeatureStore.open(store_path)
    trained_on = checkpoint.provenance.get("feature_fingerprints", {})
    check_compatible(checkpoint.model, trained_on, store.dims, store.fingerprints, store_path)
    note_other_band(checkpoint, store)
    note_unnamed_speakers(store, checkpoint.model.pasts)
    config = dataclasses.replace(config, model=checkpoint.config.model, sessions=checkpoint.config.sessions)
    sessions = read_sessions(store, config)
    return aggregate_speakers(sessions, checkpoint.features.speaker_aggregation) if checkpoint.features else sessions
