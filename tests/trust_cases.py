"""What the tests of trust share: a store with a split `calib`, and an untrained model described on it."""

import numpy as np
import pyarrow as pa
from scoring_cases import SMALL, make_checkpoint, make_world

from vaemo.config import Config
from vaemo.model.checkpoint import load_checkpoint
from vaemo.tables import with_column
from vaemo.testing import write_store
from vaemo.training.data import TrainingData
from vaemo.trust.attach import attach

SPLIT = ["train"] * 10 + ["dev"] * 6 + ["calib"] * 12 + ["test"] * 6


def make_store(path, split=SPLIT, shift=0.0, lengths=(12, 20), speakers=None):
    table = make_world(3, len(split), lengths).table
    number = np.array([int(name[1:]) for name in table["session_id"].to_pylist()])
    table = with_column(table, "split", pa.array(np.array(split, object)[number], pa.string()))
    if shift:
        moved = np.stack(table["speech"].to_numpy()) + shift * (number == len(split) - 1)[:, None]
        column = pa.FixedSizeListArray.from_arrays(pa.array(moved.astype(np.float32).ravel()), 6)
        table = with_column(table, "speech", column)
    if speakers:
        table = with_column(table, "speaker_id", pa.array([speakers(n) for n in number]))
    world = make_world(3, 1, (1, 1))
    object.__setattr__(world, "table", table)
    return write_store(world, str(path))


def trained(tmp_path, **options):
    """A store, and an untrained model that a training has described and calibrated on it."""
    store = make_store(tmp_path / "store", **options)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    attach(TrainingData.open(store, Config().replace(SMALL)), [load_checkpoint(checkpoint)], [checkpoint])
    return store, checkpoint
