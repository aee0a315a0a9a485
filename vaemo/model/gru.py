"""A gated recurrent unit with the interface of the Mamba blocks.

Letters: L lanes, T steps, H width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class Gru(nn.Module):
    """One GRU layer; its memory is its hidden state.

    Args:
        d_model: Width of input and state, H.
    """

    memory = ("hidden",)

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.gru = nn.GRU(d_model, d_model, batch_first=True)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane."""
        return {"hidden": (self.d_model,)}

    def constants(self) -> tuple[Tensor, ...]:
        """What `step` needs of the parameters: the weights and biases of input and state."""
        return cast(tuple[Tensor, ...], self.gru.all_weights[0])

    def forward(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor, constants: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer over a chunk.

        Args:
            x: (L, T, H).
            memory: Hidden state (L, H) before the first step.
            valid: (L, T), bool, True for a prefix of every lane.
            constants: What `constants` returned.

        Returns:
            y: (L, T, H).
            memory: After every lane's last valid step.
        """
        (before,) = memory
        y, _ = self.gru(x, before[None].contiguous())
        return y, (at_length(y, before, valid.sum(1)),)

    def step(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor | None, constants: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer over one step: the arguments of `forward` without T; `valid` None where every lane is."""
        (before,) = memory
        y = torch.gru_cell(x, before, *constants)
        return y, (y if valid is None else torch.where(valid[:, None], y, before),)


def at_length(values: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """The values after every lane's last valid step: from `values` (L, T, ...), or `before` (L, ...) if it has none."""
    index = (lengths - 1).clamp(min=0).view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return torch.where(lengths.view(-1, *[1] * (before.dim() - 1)) > 0, values.gather(1, index)[:, 0], before)
