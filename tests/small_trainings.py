"""What the tests of many trainings share: settings and stores with which one takes no time, and spaces to search."""

from pathlib import Path

import yaml

from vaemo.testing import linear_world, write_store

SMALL = ["model.d_c=4", "model.head_hidden=8", "updater.d_model=8", "train.min_labelled=16", "train.trackers=[]"]
SMALL += ["evaluate.bootstrap=20"]
SMALL += ["model.scan=chunk"]  # a second less in each process than loading the compiled one


def write_small_store(folder, sessions=(24, 6, 4), lengths=(6, 12), features=4):
    world = linear_world(5, sessions=sessions, lengths=lengths, features=features, noise=2.0)
    return write_store(world, str(folder))


def write_space(folder, entries):
    path = Path(folder, "space.yaml")
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries, sort_keys=False))
    return str(path)
