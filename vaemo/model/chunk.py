"""A chunk as the recurrent part of the model takes it, with everything that needs no feedback computed.

Letters: L lanes, T steps, H width, K targets, F of them fed back.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaemo.model.head import HeadWeights
from vaemo.model.updater import Memory, UpdaterConstants


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout masks of a chunk, drawn beforehand and scaled by 1 / (1 - p).

    Attributes:
        updater: Mask of u, (L, T, d_c).
        head: Mask of the head's hidden layer, (L, T, head_hidden).
    """

    updater: Tensor
    head: Tensor

    def select(self, lanes: Tensor | slice | list[int]) -> Dropout:
        """The masks of some lanes."""
        return Dropout(self.updater[lanes], self.head[lanes])

    def steps(self, start: int, stop: int) -> Dropout:
        """The masks of the chunk's steps from `start` up to `stop`."""
        return Dropout(self.updater[:, start:stop], self.head[:, start:stop])

    def to(self, *args: Any, **kwargs: Any) -> Dropout:
        """The masks on a device or in a dtype, as `Tensor.to` takes them."""
        return Dropout(self.updater.to(*args, **kwargs), self.head.to(*args, **kwargs))


@dataclasses.dataclass
class Diagnostics:
    """How a chunk was computed; pass one to `SessionRegressor.forward` to have it filled.

    Attributes:
        solved_by: `known` (nothing predicted is fed back), `loop`, `parallel`, or `fallback` (parallel, then loop).
        n_passes: Passes over the chunk until the predictions fed back converged; 0 if not tried.
        c: Session state after every step, (L, T, d_c), detached; None without memory.
    """

    solved_by: str = ""
    n_passes: int = 0
    c: Tensor | None = None


class Weights(NamedTuple):
    """What is derived from the parameters once per chunk."""

    updater: UpdaterConstants | None
    alpha: Tensor | None
    head: HeadWeights


class Carried(NamedTuple):
    """What is carried from step to step beside the feedback: the updater's memory by layer, and c (L, d_c)."""

    memory: Memory
    c: Tensor


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk before its feedback is known.

    Attributes:
        to_updater: The updater's input but for the feedback, (L, T, H); None without updater.
        to_head: The head's hidden layer but for c, (L, T, H).
        valid: True for real steps, a prefix of every lane, (L, T).
        lengths: Valid steps of every lane, (L,).
        shortest: Steps that all lanes have.
        observed: Known values of every utterance, (L, T, F), NaN where unknown; None if nothing is.
        dropout: Masks, or None.
        n_fed: F.
    """

    to_updater: Tensor | None
    to_head: Tensor
    valid: Tensor
    lengths: Tensor
    shortest: int
    observed: Tensor | None
    dropout: Dropout | None
    n_fed: int

    @property
    def n_steps(self) -> int:
        """Steps of the longest lane."""
        return self.to_head.shape[1]


def replace_observed(prediction: Tensor, observed: Tensor | None, n_fed: int) -> tuple[Tensor, Tensor]:
    """The values that an utterance feeds to the next: the observed value where there is one, else the prediction.

    Args:
        prediction: (..., K).
        observed: (..., F), NaN where unknown, or None.
        n_fed: F; the first F targets are fed back.

    Returns:
        values: (..., F).
        known: True where the value was observed, (..., F).
    """
    if prediction.shape[-1] != n_fed:
        prediction = prediction[..., :n_fed]
    if observed is None:
        return prediction, torch.zeros_like(prediction, dtype=torch.bool)
    known = ~observed.isnan()
    return torch.where(known, observed, prediction), known
