"""The folder of a training run: the checkpoint to keep, a line per epoch, and the state to go on from.

    RUN/_run.json       identifies the run
    RUN/best/           the checkpoint (`vaemo.model.checkpoint`), with its speech encoder where that is trained too
    RUN/metrics.jsonl   one line per epoch
    RUN/curves.png      their picture
    RUN/speakers.parquet    voices of enrolled speakers, where they are enrolled from the store
    RUN/used.parquet    utterances of train, dev and calib, for `evaluate --exclude`
    RUN/_state/         states to resume from, one file for each of the last epochs
    RUN/summary.json    written last: the run is finished, unless `concluded` is false
    RUN/failure.txt     the traceback of a failed run
    RUN/fold-K/         with folds, a run each; RUN/oof holds the scores of every held-out row
    RUN/seed-K/         with several seeds, a run each, here or below each fold; best/ beside them is that of seed 0

A state is one safetensors file with JSON in its header: it is written whole or not at all, also in a bucket, and cannot
run code when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load

import vaemo
from vaemo import files
from vaemo.config import Config, FeatureConfig
from vaemo.data.sessions import label_ranges
from vaemo.model.checkpoint import ERRORS, save_checkpoint
from vaemo.store import FeatureStore
from vaemo.summary import results
from vaemo.training.card import write_card
from vaemo.training.trainer import Trainer

MARKER, SUMMARY, METRICS_LINES, CURVES, BEST = "_run.json", "summary.json", "metrics.jsonl", "curves.png", "best"
SPEAKERS, USED = "speakers.parquet", "used.parquet"
_STATES, _SUFFIX = "_state", ".safetensors"


def save_state(trainer: Trainer, out: str, keep: int) -> None:
    """Write the state to resume from after the epoch just finished, and delete the oldest.

    Args:
        trainer: Between two epochs.
        out: The run folder, a path or URI.
        keep: Number of states to keep.
    """
    progress = {"progress": json.dumps(trainer.progress())}
    files.write_safetensors(_state_path(out, len(trainer.history)), trainer.tensors(), progress)
    for path in files.list_files(files.join(out, _STATES), _SUFFIX)[:-keep]:
        files.delete(path)


def restore_state(trainer: Trainer, out: str) -> bool:
    """Restore a trainer to the last saved state of its run, of the same config and data; False if there is none.

    All workers use what the first one finds: another's listing might be older.
    """
    paths = files.list_files(files.join(out, _STATES), _SUFFIX) if trainer.group.rank == 0 else []
    newest = int(Path(paths[-1]).stem) if paths else 0
    epoch = int(trainer.group.add(torch.tensor(newest, device=trainer.device)))
    if not epoch:
        return False
    saved = files.read_bytes(_state_path(out, epoch))
    tensors = {name: tensor.to(trainer.device) for name, tensor in load(saved).items()}
    trainer.restore(tensors, json.loads(files.safetensors_metadata(saved)["progress"]))
    return True


def _state_path(out: str, epoch: int) -> str:
    return files.join(out, _STATES, f"{epoch:06d}{_SUFFIX}")


def keep(
    out: str, trainer: Trainer, store: FeatureStore, origin: Mapping[str, Any], rivals: Mapping[str, Any] | None = None
) -> None:
    """Write RUN/best with its model card, in place of an older one.

    Args:
        out: The run folder, a path or URI.
        trainer: Between two epochs; what it would keep, and its last line, are written.
        store: What it trains on; the extractors that it names make the checkpoint fit for recordings.
        origin: As `origin_of` found it.
        rivals: What the cheapest rivals give on dev (`vaemo.ablation.baselines.rivals`); None if they are not
            available.
    """
    config, errors, encoder = trainer.config, trainer.errors, trainer.kept_encoder()
    provenance = _provenance_of(origin, trainer)
    settings = store.info.get("settings", {})
    features: FeatureConfig | None = None
    if "features" in settings:
        aggregation = {"features": {"speaker_aggregation": config.features.speaker_aggregation}}
        made_by = {section: settings[section] for section in ("audio", "features", "vad") if section in settings}
        made = Config.from_dict(made_by).to_dict()
        config = config.replace({section: made[section] for section in made_by}).replace(aggregation)
        features = config.features
    if encoder:
        features = dataclasses.replace(encoder.features, speaker_aggregation=config.features.speaker_aggregation)
        made_by = {**provenance["feature_fingerprints"], "speech": encoder.fingerprint}
        provenance = {**provenance, "feature_fingerprints": made_by, "encoder": encoder.origin}
    best = files.join(out, BEST)
    save_checkpoint(
        best,
        trainer.kept,
        config,
        features=features,
        encoder=encoder.files if encoder else None,
        metrics={
            **trainer.history[-1],
            **({"rivals": rivals} if rivals else {}),
            **({ERRORS: errors.to_dict()} if errors else {}),
        },
        provenance=provenance,
    )
    write_card(best)


def origin_of(store: FeatureStore, config: Config, data: str) -> dict[str, Any]:
    """What all checkpoints of a store and a config say of their origin.

    Args:
        store: What they are trained on.
        config: Sections `labels` and `model`.
        data: Digest of ids, labels and splits.
    """
    return {
        "version": vaemo.__version__,
        "data_fingerprint": data,
        "feature_fingerprints": store.fingerprints,
        "native_range": label_ranges(config, store).native,
        "roles": _roles(store),
        "synthetic": bool(store.info.get("synthetic", False)),
    }


def _provenance_of(origin: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What one of them says."""
    config, model = trainer.config, trainer.model
    scan = model.scan_used(trainer.device.type)
    how: dict[str, Any] = {"seed": config.train.seed, "sequence_by": config.sessions.sequence_by, "scan": scan}
    # What a store lacks switches itself off, whatever the config says.
    how["streams"] = list(model.dims)
    compared = {"compared_with_past": list(model.pasts)} if model.pasts else {}
    return {**origin, **how, **compared}


def _roles(store: FeatureStore) -> list[str]:
    """The roles that the store's rows name."""
    if "role" not in store.columns:
        return []
    return sorted(pc.unique(store.read(["role"])["role"]).drop_null().to_pylist())


def write_metrics(out: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write RUN/metrics.jsonl: all lines, so that a run that goes on leaves none twice."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    files.write_whole(files.join(out, METRICS_LINES), lines.encode())


def used_by(checkpoint: str) -> pa.Table | None:
    """RUN/used.parquet of a checkpoint RUN/best or RUN/seed-K/best; None where there is none."""
    run = posixpath.dirname(checkpoint.rstrip("/"))
    runs = [run, *([posixpath.dirname(run)] if posixpath.basename(run).startswith("seed-") else [])]
    path = next((path for folder in runs if files.exists(path := files.join(folder, USED))), None)
    return None if path is None else files.read_parquet(path)


def fold_folder(out: str, fold: str) -> str:
    """Where the run of a fold lies."""
    return files.join(out, f"fold-{quote(fold, safe='')}")


def seed_folders(out: str, seeds: int) -> list[str]:
    """Where the runs of seeds 0, 1, ... lie: one alone in the folder itself."""
    return [out] if seeds == 1 else [files.join(out, f"seed-{seed}") for seed in range(seeds)]


def finished(out: str) -> dict[str, Any] | None:
    """The summary of a finished run; None while it is not."""
    return results(out) or None
