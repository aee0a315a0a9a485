"""A trained model in a folder: weights, config, metrics and provenance; written whole or not at all, never pickled.

Writes and reads `model.safetensors`, `config.yaml` (with the `features` section of the store that it was trained on,
so that recordings can be scored; without one, only stores can), `metrics.json` and `provenance.json`; and the folder
`encoder`, as transformers writes it, where the speech encoder was trained too.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from vaemo import files
from vaemo.config import Config, FeatureConfig, strict_yaml
from vaemo.errors import OtherRunError, ReadCheckpointError, UsageError
from vaemo.model.regressor import SessionRegressor
from vaemo.model.settling import ErrorByPosition

WEIGHTS, CONFIG, METRICS_FILE, PROVENANCE_FILE = "model.safetensors", "config.yaml", "metrics.json", "provenance.json"

ENCODER = "encoder"
"""Folder of a checkpoint's own speech encoder; `features.speech` in its `config.yaml` is then `./encoder`."""

ERRORS = "error_by_position"
"""In the metrics of a checkpoint, and of an evaluation: what `vaemo.model.settling.ErrorByPosition.to_dict` gives."""

_OWN = f"./{ENCODER}"

HELD_OUT = "oof"
"""In a run with folds, the scores of every held-out row."""

_BEST = "best"
"""Of a run; see `vaemo.training.run_folder`."""

_SUMMARY = "summary.json"
"""What a command leaves in a folder that it has written nothing else to."""

_RANDOM, _ASIDE = "[0-9a-f]" * 8, ".old"
"""A folder on its way to the name `best` is `.best.` and eight digits; the previous checkpoint gets the same name and
`.old`."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns.

    Attributes:
        model: With its weights, statistics and fingerprint, in float32 or float64 as saved, on the CPU.
        config: Resolved config of the run that trained it.
        features: Extractors of its features, `speech` the path of its own encoder where it has one; None where they are
            unknown, and recordings cannot be scored.
        metrics: As evaluated when it was saved.
        provenance: Code version, data fingerprints, seed, roles, `sequence_by`, `synthetic`.
        fingerprint: SHA-256 over weights, the encoder's too, and everything of the config that changes predictions.
        has_encoder: Whether it has a speech encoder of its own.
        errors: Its error by position on the dev split (`error_by_position` of the metrics); None if unknown.
    """

    model: SessionRegressor
    config: Config
    features: FeatureConfig | None
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    fingerprint: str
    has_encoder: bool = False
    errors: ErrorByPosition | None = None


def save_checkpoint(
    path: str | Path,
    model: SessionRegressor,
    config: Config | None = None,
    *,
    features: FeatureConfig | None = None,
    encoder: Mapping[str, bytes] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint folder, replacing an existing one, and return its fingerprint.

    Args:
        path: The folder.
        model: What to keep.
        config: Config of the run; None takes the defaults beside the model's own sections.
        features: Extractors of the store that it was trained on; None if the store does not say.
        encoder: Files of the speech encoder that was trained with it, by name; takes the place of `features.speech`.
        metrics: Plain values.
        provenance: Plain values.

    Raises:
        OtherRunError: if there is something else than a checkpoint at the path; nothing of it is touched.
        StorageError: if the storage refuses.
    """
    config = dataclasses.replace(config or Config(), model=model.config, updater=model.updater_config)
    sections = config.to_dict()
    if encoder and features:
        features = dataclasses.replace(features, speech=_OWN, speech_revision="main")
    if features is None:
        del sections["features"]
    else:
        sections["features"] = dataclasses.replace(config, features=features).to_dict()["features"]
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    own = {f"{ENCODER}/{name}": content for name, content in (encoder or {}).items()}
    fingerprint = checkpoint_fingerprint(weights, config, features, own)
    contents = {
        WEIGHTS: weights,
        CONFIG: strict_yaml.dump(sections).encode(),
        METRICS_FILE: json.dumps(dict(metrics or {}), indent=1).encode(),
        PROVENANCE_FILE: json.dumps({**(provenance or {}), "fingerprint": fingerprint}, indent=1).encode(),
        **own,
    }
    _write_folder(path, contents)
    return fingerprint


def _held(path: str | Path, name: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    """What a file of the checkpoint says; ValueError where it holds something else."""
    try:
        held = parse(_read(path, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error})") from None
    if not isinstance(held, dict):
        found = "nothing" if held is None else repr(held)
        raise ValueError(f"{name} holds {found}, where names and values are needed")
    return held


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ReadCheckpointError: if a file is missing or broken, the files do not belong together, or the weights do not
            fit the config.
    """
    path = _standing(path)
    weights = _read(path, WEIGHTS)
    try:
        sections = _held(path, CONFIG, lambda content: strict_yaml.load(content, CONFIG))
        metrics, provenance = (_held(path, name, json.loads) for name in (METRICS_FILE, PROVENANCE_FILE))
        tensors = load(weights)
        config = Config.from_dict(sections)
        by_position = metrics.get(ERRORS)
        errors = ErrorByPosition.from_dict(by_position) if by_position else None
    except (ValueError, SafetensorError, UsageError, TypeError, AttributeError) as error:
        raise ReadCheckpointError(f"checkpoint '{path}' is damaged: {error}") from None
    features = config.features if "features" in sections else None
    own = {name: _read(path, name) for name in _encoder_files(features)}
    fingerprint = checkpoint_fingerprint(weights, config, features, own)
    if provenance.get("fingerprint") != fingerprint:
        raise ReadCheckpointError(
            f"checkpoint '{path}' holds files of different checkpoints, or one was changed by hand: its fingerprint is "
            f"{fingerprint[:12]}, its provenance says {str(provenance.get('fingerprint'))[:12]}. Copy it again."
        )
    dims = {
        name.split(".")[1]: len(tensor)
        for name, tensor in tensors.items()
        if name.startswith("standardize.") and name.endswith(".mean")
    }
    model = SessionRegressor(config.model, config.updater, dims)
    model.to(tensors["label_deviation"].dtype)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ReadCheckpointError(
            f"checkpoint '{path}' has weights that do not fit its config: {' '.join(str(error).split())[:300]}"
        ) from None
    model.fingerprint = fingerprint
    if features and own:
        features = dataclasses.replace(features, speech=files.join(path, ENCODER))
        config = dataclasses.replace(config, features=features)
    return Checkpoint(model, config, features, metrics, provenance, fingerprint, bool(own), errors)


def checkpoints_in(path: str | Path) -> list[str]:
    """The checkpoints that a path names: itself, or all seeds of a run, or the one of a run.

    Raises:
        ReadCheckpointError: if the run has seeds that are not trained yet, or folds: models of different data.
    """
    path = str(path)
    seeds = itertools.takewhile(files.exists, (files.join(path, f"seed-{seed}") for seed in itertools.count()))
    found, best = [files.join(seed, _BEST) for seed in seeds], files.join(path, _BEST)
    if found and not files.exists(best):
        raise ReadCheckpointError(
            f"'{path}' is a run whose seeds are not all trained; run its training again, which does the rest, or give "
            "the checkpoints of single seeds."
        )
    if found:
        return found
    if files.exists(files.join(path, HELD_OUT)):
        folds = [held.removesuffix(WEIGHTS)[:-1] for held in files.list_files(path, WEIGHTS, recursive=True)]
        raise ReadCheckpointError(
            f"'{path}' is a run with folds, whose models learned from different data. The scores of what each has not "
            f"seen are in {files.join(path, HELD_OUT)}; to score other data, give the models: {' '.join(folds)}."
        )
    return [best] if not files.exists(files.join(path, WEIGHTS)) and files.exists(files.join(best, WEIGHTS)) else [path]


def one_checkpoint(path: str | Path) -> str:
    """The checkpoint that a path names, where only one is taken.

    Raises:
        UsageError: if it names several.
        ReadCheckpointError: as `checkpoints_in`.
    """
    found = checkpoints_in(path)
    if len(found) > 1:
        raise UsageError(
            f"'{path}' holds {len(found)} models, one for each seed, and one is taken here: give {found[0]}."
        )
    return found[0]


def copy_checkpoint(path: str | Path, to: str | Path, **provenance: Any) -> str:
    """Copy a checkpoint to another place and return its fingerprint.

    Args:
        path: The folder.
        to: The other one.
        provenance: Entries to add to its provenance.
    """
    held = load_checkpoint(path)
    encoder = None
    if held.has_encoder and held.features:
        own = dataclasses.replace(held.features, speech=_OWN)
        encoder = {name.removeprefix(f"{ENCODER}/"): _read(path, name) for name in _encoder_files(own)}
    return save_checkpoint(
        to,
        held.model,
        held.config,
        features=held.features,
        encoder=encoder,
        metrics=held.metrics,
        provenance={**held.provenance, **provenance},
    )


def checkpoint_fingerprint(
    weights: bytes, config: Config, features: FeatureConfig | None, encoder: Mapping[str, bytes] | None = None
) -> str:
    """SHA-256 over weights, the encoder's files, and everything of the config that changes predictions."""
    named = dataclasses.replace(config, features=features or FeatureConfig())
    parts = [named.fingerprint("model", "updater", "sessions"), named.fingerprint("features") if features else ""]
    parts += [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted((encoder or {}).items())]
    return hashlib.sha256(weights + json.dumps(parts).encode()).hexdigest()


def _encoder_files(features: FeatureConfig | None) -> list[str]:
    """Files of the speech encoder in a checkpoint with these features; empty if it has none."""
    if features is None or features.speech != _OWN:
        return []
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    if features.speech_layer == "weighted" or features.speech_pooling == "attention":
        names.append("pooling.safetensors")
    return [f"{ENCODER}/{name}" for name in names]


def _read(folder: str | Path, name: str) -> bytes:
    try:
        return files.read_bytes(files.join(folder, name))
    except OSError as error:
        best = files.join(folder, "best")
        hint = f" Give {best}." if files.exists(files.join(best, WEIGHTS)) else ""
        if isinstance(error, FileNotFoundError) and not files.exists(folder):
            raise ReadCheckpointError(
                f"the checkpoint '{folder}' does not exist. Give a folder such as RUN/best."
            ) from None
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise ReadCheckpointError(
            f"'{folder}' is not a whole checkpoint: {name} {why}. "
            f"A checkpoint holds {WEIGHTS}, {CONFIG}, {METRICS_FILE} and {PROVENANCE_FILE}.{hint}"
        ) from None


def _write_folder(path: str | Path, contents: Mapping[str, bytes]) -> None:
    """The files under a temporary name, renamed when all are written; the previous folder is kept until then.

    An object store cannot rename: there the files are written one after another, and the fingerprint in the provenance
        lets a reader detect a mixture of two checkpoints.
    """
    if files.is_uri(path):
        for name, content in contents.items():
            files.write_whole(files.join(path, name), content)
        return
    folder = Path(path)
    _require_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name, content in contents.items():
            files.write_whole(new / name, content)
        with files.storage_at(folder):
            _put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    # The new folder replaces everything that earlier, killed writes left.
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{_RANDOM}*"):
        shutil.rmtree(left, ignore_errors=True)


def _require_ours(folder: Path) -> None:
    """Refuse to replace what is no checkpoint: everything in the folder would be lost."""
    if folder.is_dir():
        held = [path.name for path in folder.iterdir() if path.name != _SUMMARY]
        if not held or PROVENANCE_FILE in held:
            return
        found = f"holds {len(held):,} files ({min(held)}, ...) but no {PROVENANCE_FILE}: it is no checkpoint"
    elif os.path.lexists(folder):
        found = "is a file"
    else:
        return
    raise OtherRunError(f"a checkpoint is to be written to {folder}, which {found}. Give an empty folder or a new one.")


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename a folder to the name of another, which is renamed first, so that nothing is deleted."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = new.with_name(new.name + _ASIDE)
    try:
        os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise


def _standing(path: str | Path) -> str | Path:
    """The folder of a checkpoint: its path, or the renamed one if a writer was killed while replacing it."""
    if files.is_uri(path) or Path(path).exists():
        return path
    folder = Path(path)
    aside = folder.parent.glob(f".{glob.escape(folder.name)}.{_RANDOM}{_ASIDE}")
    return max(aside, key=lambda old: old.stat().st_mtime, default=path)
