"""The short causal convolution in front of a Mamba scan, continuing from the inputs before the chunk.

Letters: L lanes, T steps, K convolution width, E channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def taps_of(weight: Tensor) -> Tensor:
    """The weight (E, 1, K) of an `nn.Conv1d` as (K, E), channels last."""
    return weight[:, 0].t().contiguous()


def conv_chunk(x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The depthwise causal convolution through a silu, and the tail after every lane's last valid step.

    Written as K shifted products: at these widths faster than a grouped convolution, and channels stay last.

    Args:
        x: (L, T, E).
        tail: The K-1 inputs before the chunk, (L, K-1, E).
        taps: (K, E).
        bias: (E,).
        valid: (L, T), bool, True for a prefix of every lane.

    Returns:
        y: (L, T, E).
        tail: (L, K-1, E); bit-identical where a lane has no valid step.
    """
    T, K = x.shape[1], len(taps)
    padded = torch.cat([tail, x], 1)
    y = torch.addcmul(bias, padded[:, :T], taps[0])
    for k in range(1, K):
        y = torch.addcmul(y, padded[:, k : k + T], taps[k])
    last = valid.sum(1)[:, None] + torch.arange(K - 1, device=x.device)
    return functional.silu(y), padded.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))


def conv_step(x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of `conv_chunk`: its arguments without T; `valid` (L,) or None where every lane is."""
    window = torch.cat([tail, x[:, None]], 1)
    y = (window * taps).sum(1) + bias
    after = window[:, 1:]
    if valid is not None:
        after = torch.where(valid[:, None, None], after, tail)
    return functional.silu(y), after
