"""The short causal convolution in front of a Mamba scan, continuing from the inputs before the chunk.

Letters: L lanes, T steps, K convolution width, E channels.
"""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

log = logging.getLogger(__name__)


@functools.cache
def resolve_conv(scan: str) -> bool:
    """Whether chunks use `causal-conv1d`: beside a scan on kernels, where it imports; decided and logged once.

    Args:
        scan: What `vaemo.model.scan.resolve_scan` chose.
    """
    if scan != "kernel":
        return False
    try:
        importlib.import_module("causal_conv1d")
    except Exception as error:  # a kernel package built for another torch fails in many ways
        log.info("convolution: plain (causal_conv1d cannot be imported: %s: %s)", error.__class__.__name__, error)
        return False
    log.info("convolution: causal_conv1d")
    return True


def taps_of(weight: Tensor) -> Tensor:
    """The weight (E, 1, K) of an `nn.Conv1d` as (K, E), channels last."""
    return weight[:, 0].t().contiguous()


def conv_chunk(
    x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor, valid: Tensor, *, kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """The depthwise causal convolution through a silu, and the tail after every lane's last valid step.

    Written as K shifted products: at these widths faster than a grouped convolution, and channels stay last.

    Args:
        x: (L, T, E).
        tail: The K-1 inputs before the chunk, (L, K-1, E).
        taps: (K, E).
        bias: (E,).
        valid: (L, T), bool, True for a prefix of every lane.
        kernel: Use `causal-conv1d`, on CUDA; see `resolve_conv`.

    Returns:
        y: (L, T, E).
        tail: (L, K-1, E); bit-identical where a lane has no valid step.
    """
    K = len(taps)
    padded = torch.cat([tail, x], 1)
    last = valid.sum(1)[:, None] + torch.arange(K - 1, device=x.device)
    after = padded.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    if kernel:
        causal_conv1d = importlib.import_module("causal_conv1d")
        y = causal_conv1d.causal_conv1d_fn(
            x.transpose(1, 2), taps.t(), bias, initial_states=tail.transpose(1, 2), activation="silu"
        )
        return y.transpose(1, 2), after
    return functional.silu(_Convolution.apply(padded, taps, bias)), after


class _Convolution(torch.autograd.Function):
    """The K shifted products, (L, T, E), of the inputs behind their tail, (L, T+K-1, E).

    One node of the graph: the gradient of every slice would cost a whole tensor.
    """

    @staticmethod
    def forward(ctx, padded, taps, bias):
        ctx.save_for_backward(padded, taps)
        T = padded.shape[1] - len(taps) + 1
        y = torch.addcmul(bias, padded[:, :T], taps[0])
        for k in range(1, len(taps)):
            y.addcmul_(padded[:, k : k + T], taps[k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        padded, taps = ctx.saved_tensors
        T = grad.shape[1]
        grad_padded, grad_taps = torch.zeros_like(padded), torch.empty_like(taps)
        for k, tap in enumerate(taps):
            grad_padded[:, k : k + T].addcmul_(grad, tap)
            grad_taps[k] = (grad * padded[:, k : k + T]).sum((0, 1))
        return grad_padded, grad_taps, grad.sum((0, 1))


def conv_step(x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of `conv_chunk`: its arguments without T; `valid` (L,) or None where every lane is."""
    window = torch.cat([tail, x[:, None]], 1)
    y = (window * taps).sum(1) + bias
    after = window[:, 1:]
    if valid is not None:
        after = torch.where(valid[:, None, None], after, tail)
    return functional.silu(y), after
