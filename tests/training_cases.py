"""What the tests of training share: jobs on Ray, workers as threads, and lines without what a clock measured."""

import threading

from vaemo.cluster.executor import OnRay
from vaemo.pipeline import ablation, training
from vaemo.training.group import Group
from vaemo.training.trainer import Trainer


def train(store, out, config, **options):
    """The summary of a training on Ray."""
    return dict(training.train(store, out, config, OnRay(), **options).summary)


def ablate(store, out, config, executor=None, **options):
    """The rows of a grid, on Ray unless an executor is given."""
    return ablation.ablate(store, out, config, executor or OnRay(), **options)


def comparable(history):
    """Metrics lines without what a clock measured."""
    return [{key: value for key, value in line.items() if key != "utterances_per_s"} for line in history]


class ThreadGroup(Group):
    """Workers as threads of one process."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def add(self, tensor):
        barrier, held = self._shared
        held[self.rank] = tensor.clone()
        barrier.wait()
        total = sum(held[1:], held[0].clone())
        barrier.wait()
        return tensor.copy_(total)


def run_together(size, config, train, dev, epochs, end_to_end=lambda: None):
    shared = (threading.Barrier(size), [None] * size)
    trainers = [
        Trainer(train, dev, config, group=ThreadGroup(rank, size, shared), end_to_end=end_to_end())
        for rank in range(size)
    ]

    def work(trainer):
        for line in trainer:
            if line["epoch"] == epochs:
                return

    threads = [threading.Thread(target=work, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return trainers
