"""Features in deviations from the training split's mean; the statistics travel in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLIP = 8.0
"""Standardised features are clipped at this many deviations: one broken utterance must not flood the state."""


class Standardize(nn.Module):
    """(x - mean) / deviation, clipped; the identity until `set` is called.

    Attributes:
        mean: (D,), of the training split.
        deviation: (D,), of the training split; 1 where a feature was constant there.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Take the statistics (D,) of the training split."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        """The features (..., D) in deviations."""
        return (x - self.mean).div_(self.deviation).clamp_(-CLIP, CLIP)

    def difference(self, x: Tensor, past: Tensor, weight: float) -> Tensor:
        """How far the features are from their past, in deviations: x - sum of the past / (its count + weight), clipped.

        Only the difference is clipped: a voice that lies far from the training split is as near to its own past as any.

        Args:
            x: (..., D), as extracted.
            past: Their sum over earlier utterances as extracted, then how many these are, (..., D + 1).
            weight: For how many utterances the mean of the training split counts; at least 0.
        """
        total, count = past[..., :-1], past[..., -1:]
        # Without a past its sum is 0, whatever it is divided by. The training mean has the share that is left.
        each = (count + weight).clamp(min=1).reciprocal()
        compared = torch.addcmul(x, total, each, value=-1).addcmul_(self.mean, count * each - 1)
        return compared.div_(self.deviation).clamp_(-CLIP, CLIP)
