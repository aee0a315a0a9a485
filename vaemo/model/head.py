"""Valence and arousal from the utterance and the session: a shared layer, then one linear head each.

Letters: L lanes, T steps, D width of z, H width of the hidden layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadWeights(NamedTuple):
    """What the head multiplies by, cut once per chunk: the gradient of every cut costs a whole weight.

    Attributes:
        of_z: The hidden layer's weight of z, (H, D).
        of_c: The hidden layer's weight of c, (H, d_c).
        last: The two heads' weight, (2, H).
        bias: The two heads' bias, (2,).
    """

    of_z: Tensor
    of_c: Tensor
    last: Tensor
    bias: Tensor


class Head(nn.Module):
    """y = squash(W relu([z ; c])), squash a sigmoid for [0, 1] and a tanh for [-1, 1].

    The hidden layer's share of z does not depend on the session, so `project` computes it for a whole chunk and
    `forward` adds the share of c.

    Args:
        z_dim: Width of z.
        d_c: Width of c; 0 where the model has no memory.
        hidden: Width of the hidden layer.
        label_range: [0, 1] or [-1, 1].
    """

    def __init__(self, z_dim: int, d_c: int, hidden: int, label_range: tuple[float, float]):
        super().__init__()
        self.z_dim, self.d_c = z_dim, d_c
        self.squash = torch.sigmoid if label_range[0] == 0 else torch.tanh
        self.hidden = nn.Linear(z_dim + d_c, hidden)
        self.valence = nn.Linear(hidden, 1)
        self.arousal = nn.Linear(hidden, 1)

    def weights(self) -> HeadWeights:
        """What `project` and `forward` multiply by."""
        of_z, of_c = self.hidden.weight.split([self.z_dim, self.d_c], 1)
        last = torch.cat([self.valence.weight, self.arousal.weight])
        return HeadWeights(of_z, of_c, last, torch.cat([self.valence.bias, self.arousal.bias]))

    def project(self, z: Tensor, weights: HeadWeights) -> Tensor:
        """The hidden layer's share of z, (..., H), with its bias."""
        return functional.linear(z, weights.of_z, self.hidden.bias)

    def forward(self, projected: Tensor, c: Tensor | None, weights: HeadWeights, dropout: Tensor | None) -> Tensor:
        """Predictions (..., 2) on the label range.

        Args:
            projected: What `project` returned, (..., H).
            c: Session state, (..., d_c), or None without memory.
            weights: What `weights` returned.
            dropout: Scaled mask of the hidden layer, (..., H), or None.
        """
        hidden = functional.relu(projected if c is None else projected + functional.linear(c, weights.of_c))
        if dropout is not None:
            hidden = hidden * dropout
        return self.squash(functional.linear(hidden, weights.last, weights.bias))
