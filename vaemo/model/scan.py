"""The selective scan of Mamba-1, h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = C_t h_t, from any state.

Three forms with one contract: `reference`, a plain loop, is the specification; `chunk` is the fast one, in plain
PyTorch; `kernel` is the CUDA kernel of `mamba-ssm`. All take a state and return one, differentiable in everything.
A step with delta 0 leaves the state bit-identical: that is how padding is frozen.

Letters: L lanes, T steps, N state size, E inner width. Channels are last in every tensor.

Source:
    Gu and Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.
"""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaemo.errors import UsageError

log = logging.getLogger(__name__)

SCANS = ("reference", "chunk", "kernel")

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
    """One step without gradients: the arguments of `scan_reference` without T.

    One new tensor (L, N, E), filled in place: with many lanes a step is as fast as memory is.
    """
    after = torch.mul(delta[:, None], A).exp_().mul_(h).addcmul_(B[:, :, None], (delta * x)[:, None])
    return torch.bmm(C[:, None], after)[:, 0], after


def scan_chunk(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan as one node of the graph, with a hand-written backward; arguments as `scan_reference`.

    Steps follow one another on slabs of (L, N, E) that stay in the processor's cache. All states are kept for the
    backward, (T, L, N, E); the decays are computed again.
    """
    if not torch.is_grad_enabled():
        return _scan_without_history(x, delta, A, B, C, h)
    return _ChunkScan.apply(x, delta, A, B, C, h)


def _time_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1).contiguous() for tensor in tensors]


def _scan_without_history(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    dx, delta, B, C = _time_first(delta * x, delta, B, C)
    T, L, E = dx.shape
    y, decay, h = x.new_empty(T, L, 1, E), torch.empty_like(h), h.clone()
    for t in range(T):
        torch.mul(delta[t][:, None], A, out=decay).exp_()
        h.mul_(decay).addcmul_(B[t][:, :, None], dx[t][:, None])
        torch.bmm(C[t][:, None], h, out=y[t])
    return y[:, :, 0].transpose(0, 1), h


class _ChunkScan(torch.autograd.Function):
    """`scan_chunk` with its history and its gradient."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h):
        x, delta, B, C = _time_first(x, delta, B, C)
        T, L, E = x.shape
        dx = delta * x
        states, y, decay = x.new_empty(T, *h.shape), x.new_empty(T, L, 1, E), torch.empty_like(h)
        before = h
        for t in range(T):
            torch.mul(delta[t][:, None], A, out=decay).exp_()
            torch.mul(before, decay, out=states[t])
            before = states[t].addcmul_(B[t][:, :, None], dx[t][:, None])
            torch.bmm(C[t][:, None], before, out=y[t])
        ctx.save_for_backward(x, delta, A, B, C, h, states)
        return y[:, :, 0].transpose(0, 1), before.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, delta, A, B, C, h, states = ctx.saved_tensors
        (grad_y,) = _time_first(grad_y)
        T, L, E = x.shape
        dx = delta * x
        grad_dx, grad_decay_rate = x.new_empty(T, L, 1, E), torch.zeros_like(h)
        grad_delta, grad_B = torch.empty_like(delta), torch.empty_like(B)
        grad_C = torch.empty_like(C)
        decay, product, grad = torch.empty_like(h), torch.empty_like(h), grad_h.clone()
        for t in reversed(range(T)):
            before = states[t - 1] if t else h
            torch.mul(states[t], grad_y[t][:, None], out=product)
            torch.sum(product, -1, out=grad_C[t])
            grad.addcmul_(C[t][:, :, None], grad_y[t][:, None])
            torch.bmm(B[t][:, None], grad, out=grad_dx[t])
            torch.mul(grad, dx[t][:, None], out=product)
            torch.sum(product, -1, out=grad_B[t])
            torch.mul(delta[t][:, None], A, out=decay).exp_()
            grad.mul_(decay)
            torch.mul(grad, before, out=product)  # the gradient of delta_t A
            grad_decay_rate.addcmul_(product, delta[t][:, None])
            torch.sum(product.mul_(A), 1, out=grad_delta[t])
        grad_dx = grad_dx[:, :, 0]
        grad_delta.addcmul_(grad_dx, x)
        grads = (grad_dx * delta, grad_delta, grad_B, grad_C)
        grad_x, grad_delta, grad_B, grad_C = (g.transpose(0, 1) for g in grads)
        return grad_x, grad_delta, grad_decay_rate.sum(0), grad_B, grad_C, grad


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
        form: `auto`, `reference`, `chunk` or `kernel`.
        device_type: `cpu`, `cuda`, ...
        updater: `mamba` or `mamba2`; they have their kernels in different modules.

    Raises:
        ScanNotAvailableError: if `kernel` is asked for without CUDA or without `mamba-ssm`.
    """
    if form in ("reference", "chunk"):
        return form
    missing = _why_no_kernel(device_type, updater)
    if form == "kernel" and missing:
        raise ScanNotAvailableError(
            f"model.scan is kernel, but {missing}. Use auto or chunk, or install vaemo's cuda extra on a CUDA machine."
        )
    chosen = "chunk" if missing else "kernel"
    log.info("scan of %s on %s: %s%s", updater, device_type, chosen, f" ({missing})" if missing else "")
    return chosen


def _why_no_kernel(device_type: str, updater: str) -> str:
    """Why the kernels cannot be used, or nothing."""
    if device_type != "cuda":
        return f"the model is on {device_type}"
    module = "mamba_ssm.ops.selective_scan_interface" if updater == "mamba" else "mamba_ssm.ops.triton.ssd_combined"
    try:
        importlib.import_module(module)
    except Exception as error:  # a kernel package built for another torch fails in many ways
        return f"{module} cannot be imported: {error.__class__.__name__}: {error}"
    return ""
