"""c_t = alpha c_{t-1} + (1 - alpha) u_t, over a whole chunk in closed form.

Letters: L lanes, T steps, H width of c (d_c).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEARNED_RANGE = (0.6, 0.9)
"""A learned alpha stays within this range: below it forgets the session, above it stops following it."""

BLOCK_STEPS = 64
"""Steps in one matrix of powers; longer chunks go from block to block. Keeps the cost linear in T."""


class SessionEma(nn.Module):
    """The session EMA: none, fixed or learned, with one coefficient or one for each half of c.

    A learned coefficient is a sigmoid scaled to `LEARNED_RANGE`, so that it can reach neither end for good.

    Args:
        kind: `none`, `fixed` or `learned`.
        d_c: Width of c; its first half serves valence where the halves differ, the second arousal.
        alpha: Coefficient, or its start.
        alpha_arousal: Coefficient of the second half, or None for the same.
    """

    alphas: Tensor

    def __init__(self, kind: str, d_c: int, alpha: float, alpha_arousal: float | None):
        super().__init__()
        self.kind = kind
        alphas = [alpha] if alpha_arousal is None else [alpha, alpha_arousal]
        self.widths = [d_c] if alpha_arousal is None else [d_c - d_c // 2, d_c // 2]
        if kind == "learned":
            low, high = LEARNED_RANGE
            margin = 0.01 * (high - low)
            shares = [(min(max(a, low + margin), high - margin) - low) / (high - low) for a in alphas]
            self.logits = nn.Parameter(torch.tensor([math.log(share / (1 - share)) for share in shares]))
        elif kind == "fixed":
            self.register_buffer("alphas", torch.tensor(alphas, dtype=torch.float64), persistent=False)

    def alpha(self) -> Tensor | None:
        """The coefficients, (1,) or (2,) for the halves of c; None without smoothing."""
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
        halves = zip(alpha, u.split(self.widths, -1), c.split(self.widths, -1), strict=True)
        smoothed = [_smooth(a.to(u), u_half, c_half) for a, u_half, c_half in halves]
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
