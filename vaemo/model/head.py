"""Valence and arousal from the utterance and the session: a shared layer, then one linear head each.

Letters: L lanes, T steps, D width of z, H width of the hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        self.z_dim = z_dim
        self.squash = torch.sigmoid if label_range[0] == 0 else torch.tanh
        self.hidden = nn.Linear(z_dim + d_c, hidden)
        self.valence = nn.Linear(hidden, 1)
        self.arousal = nn.Linear(hidden, 1)

    def project(self, z: Tensor) -> Tensor:
        """The hidden layer's share of z, (..., H), with its bias."""
        return functional.linear(z, self.hidden.weight[:, : self.z_dim], self.hidden.bias)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` multiplies by: c's share of the hidden layer (H, d_c), the heads' weight (2, H), bias (2,)."""
        return (
            self.hidden.weight[:, self.z_dim :],
            torch.cat([self.valence.weight, self.arousal.weight]),
            torch.cat([self.valence.bias, self.arousal.bias]),
        )

    def forward(
        self, projected: Tensor, c: Tensor | None, weights: tuple[Tensor, Tensor, Tensor], dropout: Tensor | None
    ) -> Tensor:
        """Predictions (..., 2) on the label range.

        Args:
            projected: What `project` returned, (..., H).
            c: Session state, (..., d_c), or None without memory.
            weights: What `weights` returned.
            dropout: Scaled mask of the hidden layer, (..., H), or None.
        """
        of_c, last, bias = weights
        hidden = functional.relu(projected if c is None else projected + functional.linear(c, of_c))
        if dropout is not None:
            hidden = hidden * dropout
        return self.squash(functional.linear(hidden, last, bias))
