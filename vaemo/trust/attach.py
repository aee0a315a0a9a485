"""Calibration and novelty statistics that a finished training adds to its checkpoints.

Reads the store of the run; writes `calibration.json` and `novelty.safetensors` beside the weights. Calibrated is on
the split `calib`, or on the held-out rows of folds, never on rows that a model learned from or was chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from vaemo.data.sessions import Session
from vaemo.data.splits import Fold
from vaemo.model.checkpoint import Checkpoint
from vaemo.progress import say
from vaemo.targets import names_of, utterance_names
from vaemo.training.card import write_card
from vaemo.training.data import TrainingData
from vaemo.training.held_out import predict
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, calibrate
from vaemo.trust.novelty import SOUNDS, Novelty, sounds_of
from vaemo.units import CALIB, STREAMS, LabelScale

COVERAGE = 0.9
"""For which a training says what its intervals rest on."""

_TRAIN_ROWS = 50_000


def attach(
    data: TrainingData, checkpoints: Sequence[Checkpoint], folders: Sequence[str], manifest: str | None = None
) -> None:
    """Describe what models were trained on, and calibrate them together where the store has a split `calib`.

    Args:
        data: Of the run, without folds.
        checkpoints: What it kept, one for each seed; their mean is calibrated.
        folders: Of the checkpoints.
        manifest: Of the store, where the checkpoints hold their own speech encoders.
    """
    (fold,) = data.parts
    sessions = data.read()
    novelty = _novelty(data, sessions, fold, checkpoints[0], (CALIB, "dev"))
    judged = [session for session in data.aggregate(sessions, fold) if session.split in ("dev", CALIB)]
    if utterance_names(data.config.model.targets) and any(session.split == CALIB for session in judged):
        table = _scored(data, judged, checkpoints, manifest)
        if novelty:
            table = table.append_column("novelty", pa.array(_novelty_of(data, novelty, sessions)))
        calib, dev = (table.filter(pa.array(fold.split == name)) for name in (CALIB, "dev"))
        fingerprints = [checkpoint.fingerprint for checkpoint in checkpoints]
        scale = LabelScale(*data.config.model.label_range)
        calibration = calibrate(
            calib, dev, fingerprints, CALIB_SPLIT, scale, names=utterance_names(data.config.model.targets)
        )
        say(calibration.says(COVERAGE))
        for folder in folders:
            calibration.write(folder)
    for folder in folders:
        if novelty:
            novelty.write(folder)
        write_card(folder)


def attach_folds(
    data: TrainingData,
    models: Mapping[str, Sequence[Checkpoint]],
    folders: Mapping[str, Sequence[str]],
    held: pa.Table,
) -> None:
    """The same for the models of folds, calibrated together on every row that some of them did not see.

    Args:
        data: Of the run.
        models: By the name of the fold, one for each seed.
        folders: Of these checkpoints.
        held: The scores of all held-out rows.
    """
    keys = [
        list(zip(table["session_id"].to_pylist(), table["utt_id"].to_pylist(), strict=True))
        for table in (data.table, held)
    ]
    place = {key: row for row, key in enumerate(keys[0])}
    rows = [place[key] for key in keys[1]]
    for name, values in _labels(data).items():
        held = held.append_column(f"label_{name}", pa.array(values[rows], from_pandas=True))
    fingerprints = [checkpoint.fingerprint for of_fold in models.values() for checkpoint in of_fold]
    scale, names = LabelScale(*data.config.model.label_range), utterance_names(data.config.model.targets)
    if not names:
        return
    calibration = calibrate(held, None, fingerprints, HELD_OUT, scale, names=names)
    say(calibration.says(COVERAGE))
    sessions = data.read()
    for fold in data.parts:
        novelty = _novelty(data, sessions, fold, models[fold.name][0], ("test",))
        for folder in folders[fold.name]:
            calibration.write(folder)
            if novelty:
                novelty.write(folder)
            write_card(folder)


def _novelty(
    data: TrainingData, sessions: Sequence[Session], fold: Fold, checkpoint: Checkpoint, measures: Sequence[str]
) -> Novelty | None:
    """A description of what was trained on, measured on the first of these splits that has rows; None without any."""
    streams = [
        # The features of a trained encoder are not in the store.
        name
        for name in STREAMS
        if name in checkpoint.model.dims and not (name == "speech" and checkpoint.has_encoder)
    ]
    split = np.array([fold.split[session.rows[0]] for session in sessions], object)
    measure = next((name for name in measures if (split == name).any()), None)
    train = np.flatnonzero(split == "train").tolist()
    if not streams or measure is None or not train:
        return None
    step = max(1, sum(len(sessions[number]) for number in train) // _TRAIN_ROWS)
    sounds = _sounds(data)
    novelty = Novelty.of(*_of([sessions[number] for number in train[::step]], streams, sounds))
    measured = [sessions[number] for number in np.flatnonzero(split == measure).tolist()]
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


def _novelty_of(data: TrainingData, novelty: Novelty, sessions: Sequence[Session]) -> np.ndarray:
    """The novelty of every row of the store that has features, (n,), NaN elsewhere."""
    sounds, found = _sounds(data), np.full(len(data.table), np.nan)
    for session in sessions:
        found[session.rows] = novelty.novelty(novelty.unusual(*_of([session], list(novelty.streams), sounds))[0])
    return found


def _sounds(data: TrainingData) -> dict[str, np.ndarray]:
    names = [name for name in SOUNDS if name in data.store.columns]
    return sounds_of(data.store.read(names)) if names else {}


def _scored(
    data: TrainingData, sessions: Sequence[Session], checkpoints: Sequence[Checkpoint], manifest: str | None
) -> pa.Table:
    """The table of the store with the scores of some sessions, null elsewhere, and all labels."""
    found = np.stack([predict(data, checkpoint, sessions, manifest) for checkpoint in checkpoints])
    rows = np.concatenate([session.rows for session in sessions])
    targets = data.config.model.targets
    table = data.table.drop_columns([name for name in names_of(targets) if name in data.table.column_names])
    columns = {}
    for number, name in enumerate(utterance_names(targets)):
        columns[name] = found[..., number].mean(axis=0)
        if len(found) > 1:
            columns[f"{name}_sd"] = found[..., number].std(axis=0, ddof=1)
    for name, values in columns.items():
        every = np.full(len(table), np.nan)
        every[rows] = values
        table = table.append_column(name, pa.array(every, from_pandas=True))
    for name, values in _labels(data).items():
        table = table.append_column(f"label_{name}", pa.array(values, from_pandas=True))
    return table


def _labels(data: TrainingData) -> dict[str, np.ndarray]:
    """The labels of every row of the store on the model's label range, NaN = none."""
    targets = data.config.model.targets
    found = np.full((len(data.table), len(names_of(targets))), np.nan)
    for session in data.labelled:
        found[session.rows] = session.labels
    return {name: found[:, number] for number, name in enumerate(utterance_names(targets))}
