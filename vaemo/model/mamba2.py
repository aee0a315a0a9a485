"""The Mamba-2 block in matrix form, continuing from any state; its state dict is that of `mamba_ssm.Mamba2`.

Letters: L lanes, T steps, H width outside (d_model), E inner width, N state size, K convolution width, G heads,
P head width (G P = E).

Source:
    Dao and Gu (2024), "Transformers are SSMs", section 6: inside a sub-chunk a masked matrix product, between
    sub-chunks the state. As `mamba_ssm.Mamba2` with ngroups 1, rmsnorm and norm_before_gate false.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.errors import ConfigValueError
from vaemo.model.conv import conv_chunk, conv_step, resolve_conv, taps_of
from vaemo.model.mamba import initial_delta_bias
from vaemo.model.scan import Scanned, resolve_scan

BLOCK_STEPS = 64
"""Steps in one matrix; longer chunks go from sub-chunk to sub-chunk. Keeps cost and memory linear in T."""

NORM_EPSILON = 1e-5


def ssd_reference(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan of Mamba-2 as its definition says, step by step.

    Args:
        x: Input, (L, T, G, P).
        delta: Step sizes, (L, T, G), not negative; 0 where a step is padding.
        A: Decay rate of every head, (G,), negative.
        B: Input weights, (L, T, N).
        C: Output weights, (L, T, N).
        h: State before the first step, (L, G, P, N).

    Returns:
        y: (L, T, G, P).
        h: State after the last step, (L, G, P, N).
    """
    outputs = []
    for t in range(x.shape[1]):
        y, h = ssd_step(x[:, t], delta[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y)
    return torch.stack(outputs, 1), h


def ssd_step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """One step of the scan: the arguments of `ssd_reference` without T."""
    decay = torch.exp(delta * A)[:, :, None, None]
    h = decay * h + (delta[..., None] * x)[..., None] * B[:, None, None]
    return (h @ C[:, None, :, None])[..., 0], h


def ssd_chunk(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan as matrix products over sub-chunks of `BLOCK_STEPS`; arguments as `ssd_reference`."""
    outputs = []
    blocks = (tensor.split(BLOCK_STEPS, 1) for tensor in (x, delta, B, C))
    for x_block, delta_block, B_block, C_block in zip(*blocks, strict=True):
        y, h = _ssd_block(x_block, delta_block, A, B_block, C_block, h)
        outputs.append(y)
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]), h


def _ssd_block(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    T = x.shape[1]
    elapsed = (delta * A).cumsum(1).transpose(1, 2)  # (L, G, T), falling from 0
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    between = (elapsed[..., None] - elapsed[..., None, :]).masked_fill(future, -torch.inf)
    mixing = (C @ B.transpose(1, 2))[:, None] * between.exp()  # (L, G, T, T)
    dx = (delta[..., None] * x).transpose(1, 2)  # (L, G, T, P)
    from_state = (C[:, None] @ h.transpose(2, 3)) * elapsed.exp()[..., None]
    left = (elapsed[..., -1:] - elapsed).exp()[..., None]
    after = elapsed[..., -1, None, None].exp() * h + (left * dx).transpose(2, 3) @ B[:, None]
    return (mixing @ dx + from_state).transpose(1, 2), after


def ssd_kernel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Scanned:
    """The scan on the Triton kernels of `mamba-ssm`; arguments as `ssd_reference`."""
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return combined.mamba_chunk_scan_combined(
        x.contiguous(),
        delta.contiguous(),
        A,
        B[:, :, None].contiguous(),
        C[:, :, None].contiguous(),
        chunk_size=BLOCK_STEPS,
        initial_states=h,
        return_final_states=True,
    )


_SCANS = {"reference": ssd_reference, "chunk": ssd_chunk, "kernel": ssd_kernel}


class Mamba2Constants(NamedTuple):
    """What is derived from the parameters once per chunk.

    Attributes:
        A: Decay rates, (G,), negative, at least float32.
        taps: Of the convolution, (K, E + 2N).
        bias: Of the convolution.
    """

    A: Tensor
    taps: Tensor
    bias: Tensor


class Mamba2(nn.Module):
    """A state space with one scalar decay per head, a gated norm and a short causal convolution.

    Args:
        d_model: Width outside, H.
        d_state: State size, N.
        d_conv: Convolution width, K.
        expand: E over H.
        headdim: Head width, P.
        scan: `auto`, `reference`, `chunk` or `kernel`.

    Raises:
        ConfigValueError: if headdim does not divide expand * d_model.
    """

    memory = ("conv_tail", "ssm")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 32,
        scan: str = "auto",
    ):
        super().__init__()
        self.d_inner = E = expand * d_model
        if E % headdim:
            raise ConfigValueError(
                f"updater.headdim is {headdim}, which does not divide updater.expand * updater.d_model = {E}. "
                "Choose a divisor."
            )
        self.d_state, self.d_conv, self.headdim, self.heads, self.scan = d_state, d_conv, headdim, E // headdim, scan
        channels = E + 2 * d_state
        self.in_proj = nn.Linear(d_model, E + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(initial_delta_bias(self.heads))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(E, eps=NORM_EPSILON)
        self.out_proj = nn.Linear(E, d_model, bias=False)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane."""
        return {
            "conv_tail": (self.d_conv - 1, self.d_inner + 2 * self.d_state),
            "ssm": (self.heads, self.headdim, self.d_state),
        }

    def constants(self) -> Mamba2Constants:
        """What `forward` and `step` need of the parameters, computed once per chunk."""
        rates = torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        return Mamba2Constants(-rates, taps_of(self.conv1d.weight), cast(Tensor, self.conv1d.bias))

    def forward(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor, constants: Mamba2Constants
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block over a chunk.

        Args:
            x: (L, T, H).
            memory: Convolution tail (L, K-1, E + 2N) and scan state (L, G, P, N) before the first step.
            valid: (L, T), bool, True for a prefix of every lane.
            constants: What `constants` returned.

        Returns:
            y: (L, T, H).
            memory: After every lane's last valid step.
        """
        tail, h = memory
        gate, u, dt = self._project(x)
        scan = resolve_scan(self.scan, x.device.type, "mamba2")
        u, tail = conv_chunk(u, tail, constants.taps, constants.bias, valid, kernel=resolve_conv(scan))
        u, B, C = u.split([self.d_inner, self.d_state, self.d_state], -1)
        delta = functional.softplus(dt + self.dt_bias) * valid[..., None]
        u = u.unflatten(-1, (self.heads, self.headdim))
        y, h = _SCANS[scan](u, delta, constants.A, B, C, h)
        return self._gated(y + u * self.D[:, None], gate), (tail, h)

    def step(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor | None, constants: Mamba2Constants
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block over one step: the arguments of `forward` without T; `valid` None where every lane is."""
        before, h = memory
        gate, u, dt = self._project(x)
        u, tail = conv_step(u, before, constants.taps, constants.bias, valid)
        u, B, C = u.split([self.d_inner, self.d_state, self.d_state], -1)
        delta = functional.softplus(dt + self.dt_bias)
        if valid is not None:
            delta = delta * valid[:, None]
        u = u.unflatten(-1, (self.heads, self.headdim))
        y, h = ssd_step(u, delta, constants.A, B, C, h)
        return self._gated(y + u * self.D[:, None], gate), (tail, h)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gate (..., E), the convolution's input (..., E + 2N), and step sizes before the softplus (..., G)."""
        return self.in_proj(x).split([self.d_inner, self.d_inner + 2 * self.d_state, self.heads], -1)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.norm(y.flatten(-2) * functional.silu(gate)))
