"""The selective scan of Mamba-1, h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = C_t h_t, from any state.

Four forms with one contract: `reference`, a plain loop, is the specification; `chunk` is in plain PyTorch and runs
anywhere; `compiled` (`vaemo.model.scan_compiled`) is the fast one on a CPU; `kernel` is the CUDA kernel of `mamba-ssm`.
All take a state and return one, differentiable in everything. A step with delta 0 leaves the state bit-identical: that
is how padding is frozen.

Letters: L lanes, T steps, N state size, E inner width. Channels are last in every tensor.

Source:
    Gu and Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaemo.errors import UsageError

log = logging.getLogger(__name__)

BLOCK_STEPS = 6
"""Steps whose decays, inputs and sums are computed at once: enough to spare calls, few enough to stay in the cache."""

LOG2_E = math.log2(math.e)
"""Decays are powers of 2: on a CPU PyTorch takes those in a third of the time of `exp`."""

Scanned = tuple[Tensor, Tensor]


class ScanNotAvailableError(UsageError):
    """`model.scan` asks for a form that this machine does not have."""


def scan_reference(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan as its definition says, step by step.

    Args:
        x: Input, (L, T, E).
        delta: Step sizes, (L, T, E), not negative; 0 where a step is padding.
        A: Decay rates, (N, E), negative.
        B: Input weights, (L, T, N).
        C: Output weights, (L, T, N).
        h: State before the first step, (L, N, E).

    Returns:
        y: (L, T, E).
        h: State after the last step, (L, N, E).
    """
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, None] * A) * h + B[:, t, :, None] * (delta[:, t] * x[:, t])[:, None]
        outputs.append(torch.bmm(C[:, t, None], h)[:, 0])
    return torch.stack(outputs, 1), h


def scan_step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """One step: the arguments of `scan_reference` without T.

    Without gradients one new tensor (L, N, E), filled in place: with many lanes a step is as fast as memory is.
    """
    if torch.is_grad_enabled():
        return _StepScan.apply(x, delta, A, B, C, h)
    after = torch.mul(delta[:, None], A * LOG2_E).exp2_().mul_(h).addcmul_(B[:, :, None], (delta * x)[:, None])
    return torch.bmm(C[:, None], after)[:, 0], after


class _StepScan(torch.autograd.Function):
    """`scan_step` and its gradient, as one node of the graph."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h):
        decay = torch.mul(delta[:, None], A * LOG2_E).exp2_()
        after = torch.mul(decay, h).addcmul_(B[:, :, None], (delta * x)[:, None])
        ctx.save_for_backward(x, delta, A, B, C, h, decay, after)
        return torch.bmm(C[:, None], after)[:, 0], after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_after):
        x, delta, A, B, C, h, decay, after = ctx.saved_tensors
        grad = torch.addcmul(grad_after, C[:, :, None], grad_y[:, None])
        grad_C = torch.bmm(grad_y[:, None], after.transpose(1, 2))[:, 0]
        grad_B = torch.bmm((delta * x)[:, None], grad.transpose(1, 2))[:, 0]
        grad_dx = torch.bmm(B[:, None], grad)[:, 0]
        grad_h = grad.mul_(decay)
        grad_exponent = grad_h * h
        grad_A = (grad_exponent * delta[:, None]).sum(0)
        grad_delta = grad_exponent.mul_(A).sum(1).addcmul_(grad_dx, x)
        return grad_dx.mul_(delta), grad_delta, grad_A, grad_B, grad_C, grad_h


def scan_chunk(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan as one node of the graph, with a hand-written backward; arguments as `scan_reference`.

    It goes by blocks of K steps, (L, K, N, E), in buffers that stay in the processor's cache. Kept for the backward is
    the state before every block; to compute the others again is faster than to fetch them from memory.
    """
    return _ChunkScan.apply(x, delta, A, B, C, h)


def _blocks(steps: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_STEPS, steps)) for start in range(0, steps, BLOCK_STEPS)]


def _buffers(number: int, x: Tensor, A: Tensor) -> Tensor:
    """Room for some tensors of a block, (number, L, K, N, E), that serves all blocks."""
    return A.new_empty(number, len(x), min(BLOCK_STEPS, x.shape[1]), *A.shape)


def _states(delta: Tensor, A: Tensor, B: Tensor, dx: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of a block, in the first two buffers of `out`, from its steps' delta, B and dx = delta x."""
    decays, states = out[:2, :, : delta.shape[1]]
    torch.mul(delta[:, :, None], A * LOG2_E, out=decays).exp2_()
    torch.mul(B[..., None], dx[:, :, None], out=states)
    for decay, state in zip(decays.unbind(1), states.unbind(1), strict=True):
        h = state.addcmul_(decay, h)
    return decays, states


def _over_states(weights: Tensor, block: Tensor) -> Tensor:
    """Sums over N of a block with weights (L, K, N): (L, K, E)."""
    return torch.matmul(weights[:, :, None], block)[:, :, 0]


def _over_channels(weights: Tensor, block: Tensor) -> Tensor:
    """Sums over E of a block with weights (L, K, E): (L, K, N)."""
    return torch.matmul(weights[:, :, None], block.transpose(2, 3))[:, :, 0]


class _ChunkScan(torch.autograd.Function):
    """`scan_chunk` and its gradient; buffers hold decays, states, the states' gradients, and the sum for A's."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h):
        dx, y, starts = delta * x, torch.empty_like(x), []
        buffers = _buffers(2, x, A)
        for block in _blocks(x.shape[1]):
            starts.append(h)
            _, states = _states(delta[:, block], A, B[:, block], dx[:, block], h, buffers)
            y[:, block] = _over_states(C[:, block], states)
            h = states[:, -1].clone()
        ctx.save_for_backward(x, delta, A, B, C, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, delta, A, B, C, *starts = ctx.saved_tensors
        dx = delta * x
        grad_dx, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        buffers = _buffers(4, x, A)
        grad_A = buffers[3].zero_()
        for block, start in reversed(list(zip(_blocks(x.shape[1]), starts, strict=True))):
            delta_block, dx_block = delta[:, block], dx[:, block]
            decays, states = _states(delta_block, A, B[:, block], dx_block, start, buffers)
            grads = buffers[2, :, : states.shape[1]]
            torch.mul(C[:, block, :, None], grad_y[:, block, None], out=grads)
            grads[:, -1].add_(grad_h)
            backwards = reversed(list(zip(grads.unbind(1), decays.unbind(1), strict=True)))
            for (later, decay), (own, _) in itertools.pairwise(backwards):
                own.addcmul_(decay, later)
            grad_C[:, block] = _over_channels(grad_y[:, block], states)
            grad_B[:, block] = _over_channels(dx_block, grads)
            grad_dx[:, block] = _over_states(B[:, block], grads)
            grads.mul_(decays)
            grad_h = grads[:, 0].clone()
            grads[:, 0].mul_(start)
            grads[:, 1:].mul_(states[:, :-1])  # now the gradient of the exponents, delta A
            grad_A[:, : grads.shape[1]].addcmul_(grads, delta_block[:, :, None])
            grad_delta[:, block] = grads.mul_(A).sum(2)
        grad_delta.addcmul_(grad_dx, x)
        return grad_dx.mul_(delta), grad_delta, grad_A.sum((0, 1)), grad_B, grad_C, grad_h


def scan_compiled(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan compiled for this CPU, loaded when it is first used; arguments as `scan_reference`."""
    return importlib.import_module("vaemo.model.scan_compiled").scan_compiled(x, delta, A, B, C, h)


def scan_kernel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan on the kernel of `mamba-ssm`, which starts from zero; arguments as `scan_reference`.

    The scan is linear in its initial state, so that the decayed initial state's share of outputs and final state is
    added outside. The kernel gives no gradient for its final state: with gradients that state is computed outside too.
    """
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    channels_first = [tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C)]
    y, last = interface.selective_scan_fn(
        channels_first[0], channels_first[1], A.t().contiguous(), *channels_first[2:], return_last_state=True
    )
    elapsed = delta.cumsum(1)
    total = elapsed[:, -1]
    initial = torch.einsum("ltn,ltne,lne->lte", C, torch.exp(elapsed[:, :, None] * A), h)
    if torch.is_grad_enabled():
        left = torch.exp((total[:, None] - elapsed)[:, :, None] * A)
        own = torch.einsum("ltn,ltne,lte->lne", B, left, delta * x)
    else:
        own = last.transpose(1, 2).to(h)
    return y.transpose(1, 2) + initial, own + torch.exp(total[:, None] * A) * h


@functools.cache
def resolve_scan(form: str, device_type: str, updater: str = "mamba") -> str:
    """Which form `model.scan` means on a device: decided once, logged once, stored with results.

    Args:
        form: `auto`, `reference`, `chunk`, `compiled` or `kernel`.
        device_type: `cpu`, `cuda`, ...
        updater: `mamba` or `mamba2`; they have their kernels in different modules, and only `mamba` a compiled form.

    Raises:
        ScanNotAvailableError: if `kernel` is asked for without CUDA or without `mamba-ssm`, or `compiled` for what it
            cannot do.
    """
    compiled = device_type == "cpu" and updater == "mamba"
    if form in ("reference", "chunk") or (form == "compiled" and compiled):
        return form
    if form == "compiled":
        raise ScanNotAvailableError(
            f"model.scan is compiled, which is for mamba on a CPU; the model is {updater} on {device_type}. Use auto."
        )
    missing = why_no_kernel(device_type, updater)
    if form == "kernel" and missing:
        raise ScanNotAvailableError(
            f"model.scan is kernel, but {missing}. Use auto or chunk, or install vaemo[mamba-kernels] on a "
            "CUDA machine."
        )
    chosen = "kernel" if not missing else "compiled" if compiled else "chunk"
    log.info("scan of %s on %s: %s%s", updater, device_type, chosen, f" ({missing})" if missing else "")
    return chosen


def why_no_kernel(device_type: str, updater: str) -> str:
    """Why the kernels cannot be used, or nothing."""
    if device_type != "cuda":
        return f"the model is on {device_type}"
    module = "mamba_ssm.ops.selective_scan_interface" if updater == "mamba" else "mamba_ssm.ops.triton.ssd_combined"
    try:
        importlib.import_module(module)
    except Exception as error:  # a kernel package built for another torch fails in many ways
        return f"{module} cannot be imported: {error.__class__.__name__}: {error}"
    return ""
