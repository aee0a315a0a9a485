"""The targets from the utterance and the session: a shared layer, then one linear head each.

Letters: L lanes, T steps, D width of z, H width of the hidden layer, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.units import DIMENSIONS


class HeadWeights(NamedTuple):
    """What the head multiplies by, cut once per chunk: the gradient of every cut costs a whole weight.

    Attributes:
        of_z: The hidden layer's weight of z, (H, D).
        of_c: The hidden layer's weight of c, (H, d_c).
        last: The heads' weight, (K, H).
        bias: The heads' bias, (K,).
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
        targets: Their names.
    """

    def __init__(
        self, z_dim: int, d_c: int, hidden: int, label_range: tuple[float, float], targets: Sequence[str] = DIMENSIONS
    ):
        super().__init__()
        self.z_dim, self.d_c = z_dim, d_c
        self.squash = torch.sigmoid if label_range[0] == 0 else torch.tanh
        self.hidden = nn.Linear(z_dim + d_c, hidden)
        self._names = []
        for target in targets:
            # A target may be called as something that a module has.
            name = f"target:{target}" if hasattr(self, target) else target
            self.add_module(name, nn.Linear(hidden, 1))
            self._names.append(name)

    def outputs(self) -> list[nn.Linear]:
        """The linear head of each target, in their order."""
        return [cast(nn.Linear, getattr(self, name)) for name in self._names]

    def weights(self) -> HeadWeights:
        """What `project` and `forward` multiply by."""
        of_z, of_c = self.hidden.weight.split([self.z_dim, self.d_c], 1)
        heads = self.outputs()
        return HeadWeights(
            of_z, of_c, torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        )

    def project(self, z: Tensor, weights: HeadWeights) -> Tensor:
        """The hidden layer's share of z, (..., H), with its bias."""
        return functional.linear(z, weights.of_z, self.hidden.bias)

    def forward(self, projected: Tensor, c: Tensor | None, weights: HeadWeights, dropout: Tensor | None) -> Tensor:
        """Predictions (..., K) on the label range.

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
