"""c_t = alpha c_{t-1} + (1 - alpha) u_t, over a whole chunk in closed form.

Letters: L lanes, T steps, H width of c (d_c).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LEARNED_RANGE = (0.6, 0.9)
"""A learned alpha stays within this range: below it forgets the session, above it stops following it."""

BLOCK_STEPS = 64
"""Steps in one matrix of powers; longer chunks go from block to block. Keeps the cost linear in T."""


class SessionEma(nn.Module):
    """The session EMA: none, fixed or learned, with one coefficient or one for each of several parts of c.

    A learned coefficient is a sigmoid scaled to `LEARNED_RANGE`, so that it can reach neither end for good.

    Args:
        kind: `none`, `fixed` or `learned`.
        d_c: Width of c, which is cut into as many parts as there are coefficients, the first ones larger by 1 where
            they cannot all be equal.
        alphas: Coefficients, or their starts.
    """

    alphas: Tensor

    def __init__(self, kind: str, d_c: int, alphas: Sequence[float]):
        super().__init__()
        self.kind = kind
        self.widths = [d_c // len(alphas) + (part < d_c % len(alphas)) for part in range(len(alphas))]
        if kind == "learned":
            low, high = LEARNED_RANGE
            margin = 0.01 * (high - low)
            shares = [(min(max(a, low + margin), high - margin) - low) / (high - low) for a in alphas]
            self.logits = nn.Parameter(torch.tensor([math.log(share / (1 - share)) for share in shares]))
        elif kind == "fixed":
            self.register_buffer("alphas", torch.tensor(alphas, dtype=torch.float64), persistent=False)

    def alpha(self) -> Tensor | None:
        """The coefficients, one for each part of c; None without smoothing."""
        if self.kind == "none":
            return None
        if self.kind == "fixed":
            return self.alphas
        low, high = LEARNED_RANGE
        return low + (high - low) * self.logits.sigmoid()

    def per_channel(self, like: Tensor) -> Tensor | None:
        """The coefficient of every channel of c, (H,), for `step`; None without smoothing."""
        alpha = self.alpha()
        if alpha is None:
            return None
        return torch.cat([a.expand(width) for a, width in zip(alpha, self.widths, strict=True)]).to(like)

    @staticmethod
    def step(u: Tensor, c: Tensor, alpha: Tensor | None) -> Tensor:
        """The state c after one step.

        Args:
            u: Updater's output, (L, H).
            c: State before, (L, H).
            alpha: What `per_channel` returned.
        """
        return u if alpha is None else torch.lerp(u, c, alpha)

    def forward(self, u: Tensor, c: Tensor) -> Tensor:
        """The state c after every step of a chunk, (L, T, H), for u (L, T, H) and the state c (L, H) before it."""
        alpha = self.alpha()
        if alpha is None:
            return u
        parts = zip(alpha, u.split(self.widths, -1), c.split(self.widths, -1), strict=True)
        smoothed = [_smooth(a.to(u), u_part, c_part) for a, u_part, c_part in parts]
        return smoothed[0] if len(smoothed) == 1 else torch.cat(smoothed, -1)


def _smooth(alpha: Tensor, u: Tensor, c: Tensor) -> Tensor:
    blocks = []
    for block in u.split(BLOCK_STEPS, 1):
        steps = torch.arange(block.shape[1], device=u.device)
        age = steps[:, None] - steps
        powers = ((1 - alpha) * alpha ** age.clamp(min=0)).masked_fill(age < 0, 0)
        blocks.append(powers @ block + (alpha ** (steps + 1))[:, None] * c[:, None])
        c = blocks[-1][:, -1]
    return torch.cat(blocks, 1) if len(blocks) != 1 else blocks[0]
