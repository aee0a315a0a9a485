"""The course of the learning rate, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vaemo.config import TrainConfig


def lr_factor(step: int, total: int, train: TrainConfig) -> float:
    """Learning rate at one of `total` optimiser steps over its peak: a linear rise, then constant or half a cosine."""
    rise = train.warmup_fraction * total
    if step < rise:
        return (step + 1) / (rise + 1)
    if train.lr_schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """The update of `AveragedModel`: an exponential average that starts as the plain average of all steps so far.

    Otherwise the first weights would dominate it for 1 / (1 - decay) steps, most of a training on a small corpus.
    """

    def update(averaged: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        n = int(n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
