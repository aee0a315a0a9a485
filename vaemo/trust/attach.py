"""What a finished training adds to its checkpoints: how far they err, and what they were trained on.

Reads the store of the run; writes `calibration.json` and `novelty.safetensors` beside the weights. Calibrated is on
the split `calib`, or on the held-out rows of folds, never on rows that a model learned from or was chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from vaemo.card import write_card
from vaemo.model.checkpoint import Checkpoint
from vaemo.progress import say
from vaemo.sessions import Session
from vaemo.splits import Fold
from vaemo.training.data import TrainingData
from vaemo.training.end_to_end import rehear
from vaemo.training.replay import replay
from vaemo.training.waveforms import Waveforms
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, calibrate
from vaemo.trust.novelty import SOUNDS, Novelty, sounds_of
from vaemo.units import CALIB, DIMENSIONS, STREAMS, LabelScale
from vaemo.windows import PackedSessions

COVERAGE = 0.9
"""For which a training says what its intervals rest on."""

_TRAIN_ROWS = 50_000


def attach(data: TrainingData, checkpoint: Checkpoint, folder: str, manifest: str | None = None) -> None:
    """Describe what a model was trained on, and calibrate it where the store has a split `calib`.

    Args:
        data: Of the run, without folds.
        checkpoint: What it kept.
        folder: Of the checkpoint.
        manifest: Of the store, where the checkpoint holds its own speech encoder.
    """
    (fold,) = data.parts
    sessions = data.read()
    novelty = _novelty(data, sessions, fold, checkpoint, (CALIB, "dev"))
    split = {session.rows[0]: fold.split[session.rows[0]] for session in sessions}
    judged = [session for session in data.aggregate(sessions, fold) if split[session.rows[0]] in ("dev", CALIB)]
    if any(session.split == CALIB for session in judged):
        table = _scored(data, judged, checkpoint, manifest)
        if novelty:
            table = table.append_column("novelty", pa.array(_novelty_of(data, novelty, sessions, len(table))))
        rows = {name: table.filter(pa.array(fold.split == name)) for name in ("dev", CALIB)}
        scale = LabelScale(*data.config.model.label_range)
        calibration = calibrate(rows[CALIB], rows["dev"], [checkpoint.fingerprint], CALIB_SPLIT, scale)
        calibration.write(folder)
        say(calibration.says(COVERAGE))
    if novelty:
        novelty.write(folder)
    write_card(folder)


def attach_folds(data: TrainingData, models: Mapping[str, Checkpoint], folders: Sequence[str], held: pa.Table) -> None:
    """The same for the models of folds, calibrated together on every row that one of them did not see.

    Args:
        data: Of the run.
        models: By the name of the fold.
        folders: Of their checkpoints, in that order.
        held: The scores of all held-out rows.
    """
    sessions = data.read()
    labels = _labels(data)
    key = data.table["session_id"].to_pylist(), data.table["utt_id"].to_pylist()
    place = {pair: number for number, pair in enumerate(zip(*key, strict=True))}
    held_rows = [place[pair] for pair in zip(held["session_id"].to_pylist(), held["utt_id"].to_pylist(), strict=True)]
    for name, values in labels.items():
        held = held.append_column(f"label_{name}", pa.array(values[held_rows]))
    fingerprints = [checkpoint.fingerprint for checkpoint in models.values()]
    scale = LabelScale(*data.config.model.label_range)
    calibration = calibrate(held, None, fingerprints, HELD_OUT, scale)
    say(calibration.says(COVERAGE))
    for fold, checkpoint, folder in zip(data.parts, models.values(), folders, strict=True):
        novelty = _novelty(data, sessions, fold, checkpoint, ("test",))
        if novelty:
            novelty.write(folder)
        calibration.write(folder)
        write_card(folder)


def _novelty(
    data: TrainingData, sessions: Sequence[Session], fold: Fold, checkpoint: Checkpoint, measures: Sequence[str]
) -> Novelty | None:
    """A description of what was trained on, measured on the first of these splits that has rows; None without any."""
    streams = [
        # What an encoder of its own hears does not lie in the store.
        name
        for name in STREAMS
        if name in checkpoint.model.dims and not (name == "speech" and checkpoint.has_encoder)
    ]
    split = np.array([fold.split[session.rows[0]] for session in sessions], object)
    measure = next((name for name in measures if (split == name).any()), None)
    train = np.flatnonzero(split == "train")
    if not streams or measure is None or not len(train):
        return None
    step = max(1, sum(len(sessions[number]) for number in train) // _TRAIN_ROWS)
    sounds = sounds_of(data.store.read([name for name in SOUNDS if name in data.store.columns] or ["session_id"]))
    novelty = Novelty.of(*_of([sessions[number] for number in train[::step]], streams, sounds))
    measured = [sessions[number] for number in np.flatnonzero(split == measure)]
    unusual, _ = novelty.unusual(*_of(measured, streams, sounds))
    rows = np.concatenate([session.rows for session in measured])
    order = np.argsort(rows)
    return novelty.referred(unusual[order], data.table.take(pa.array(rows[order])), measure == "dev")


def _of(
    sessions: Sequence[Session], streams: Sequence[str], sounds: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows = np.concatenate([session.rows for session in sessions])
    features = {name: np.concatenate([session.streams[name] for session in sessions]) for name in streams}
    return features, {name: values[rows] for name, values in sounds.items()}


def _novelty_of(data: TrainingData, novelty: Novelty, sessions: Sequence[Session], n: int) -> np.ndarray:
    """The novelty of every row of the store that has features, (n,)."""
    sounds = sounds_of(data.store.read([name for name in SOUNDS if name in data.store.columns] or ["session_id"]))
    found = np.full(n, np.nan)
    for session in sessions:
        features, said = _of([session], list(novelty.streams), sounds)
        found[session.rows] = novelty.novelty(novelty.unusual(features, said)[0])
    return found


def _scored(data: TrainingData, sessions: Sequence[Session], checkpoint: Checkpoint, manifest: str | None) -> pa.Table:
    """The table of the store with the predictions for some sessions, null elsewhere, and all labels."""
    sessions = list(sessions)
    if manifest and checkpoint.has_encoder and checkpoint.features:
        sessions = rehear(sessions, checkpoint.features, Waveforms.of_store(data.store, manifest, data.config))
    packed = PackedSessions.of(sessions, dtype=getattr(torch, data.config.train.dtype))
    known = packed.observed if not packed.observed.isnan().all() else None
    found = replay(checkpoint.model, packed, window=data.config.train.window, observed=known).prediction
    rows = np.concatenate([session.rows for session in sessions])
    table = data.table.drop_columns(list(DIMENSIONS))
    for number, name in enumerate(DIMENSIONS):
        values = np.full(len(table), np.nan)
        values[rows] = found[:, number]
        table = table.append_column(name, pa.array(values, from_pandas=True))
    for name, values in _labels(data).items():
        table = table.append_column(f"label_{name}", pa.array(values, from_pandas=True))
    return table


def _labels(data: TrainingData) -> dict[str, np.ndarray]:
    """The labels of every row of the store on the model's label range, NaN = none."""
    found = np.full((len(data.table), len(DIMENSIONS)), np.nan)
    for session in data.labelled:
        found[session.rows] = session.labels
    return {name: found[:, number] for number, name in enumerate(DIMENSIONS)}
