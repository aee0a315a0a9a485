"""The Mamba-1 block, continuing from any state; its state dict is that of `mamba_ssm.Mamba`.

Letters: L lanes, T steps, H width outside (d_model), E inner width, N state size, K convolution width, R rank of delta.

Source:
    Gu and Dao (2023), "Mamba", figure 3 and section 3.4; parameters, shapes and initialisation as in `mamba_ssm`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.model.conv import conv_chunk, conv_step, resolve_conv, taps_of
from vaemo.model.scan import resolve_scan, scan_chunk, scan_compiled, scan_kernel, scan_reference, scan_step

_SCANS = {"reference": scan_reference, "chunk": scan_chunk, "compiled": scan_compiled, "kernel": scan_kernel}

DELTA_RANGE = (1e-3, 0.1)
DELTA_FLOOR = 1e-4


class MambaConstants(NamedTuple):
    """What is derived from the parameters once per chunk.

    Attributes:
        A: Decay rates, (N, E), negative, at least float32.
        taps: Of the convolution, (K, E).
        bias: Of the convolution.
    """

    A: Tensor
    taps: Tensor
    bias: Tensor


class Mamba(nn.Module):
    """A selective state space with a gate and a short causal convolution.

    Args:
        d_model: Width outside, H.
        d_state: State size per channel, N.
        d_conv: Convolution width, K.
        expand: E over H.
        scan: `auto`, `reference`, `chunk`, `compiled` or `kernel`.
    """

    memory = ("conv_tail", "ssm")

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scan: str = "auto"):
        super().__init__()
        self.d_inner = E = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.d_conv = d_conv
        self.scan = scan
        self.in_proj = nn.Linear(d_model, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, d_conv, groups=E, padding=d_conv - 1)
        self.x_proj = nn.Linear(E, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1).float()).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_delta_bias(E))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane."""
        return {"conv_tail": (self.d_conv - 1, self.d_inner), "ssm": (self.d_state, self.d_inner)}

    def constants(self) -> MambaConstants:
        """What `forward` and `step` need of the parameters, computed once per chunk."""
        rates = torch.exp(self.A_log.t().to(torch.promote_types(self.A_log.dtype, torch.float32)))
        return MambaConstants(-rates, taps_of(self.conv1d.weight), cast(Tensor, self.conv1d.bias))

    def forward(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor, constants: MambaConstants
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block over a chunk.

        Args:
            x: (L, T, H).
            memory: Convolution tail (L, K-1, E) and scan state (L, N, E) before the first step.
            valid: (L, T), bool, True for a prefix of every lane.
            constants: What `constants` returned.

        Returns:
            y: (L, T, H).
            memory: After every lane's last valid step.
        """
        tail, h = memory
        u, gate = self.in_proj(x).chunk(2, -1)
        scan = resolve_scan(self.scan, x.device.type)
        u, tail = conv_chunk(u, tail, constants.taps, constants.bias, valid, kernel=resolve_conv(scan))
        delta, B, C = self._selection(u)
        delta = delta * valid[..., None]
        y, h = _SCANS[scan](u, delta, constants.A, B, C, h)
        return self.out_proj(torch.addcmul(y, u, self.D) * functional.silu(gate)), (tail, h)

    def step(
        self, x: Tensor, memory: tuple[Tensor, ...], valid: Tensor | None, constants: MambaConstants
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block over one step: the arguments of `forward` without T; `valid` None where every lane is."""
        before, h = memory
        u, gate = self.in_proj(x).chunk(2, -1)
        u, tail = conv_step(u, before, constants.taps, constants.bias, valid)
        delta, B, C = self._selection(u)
        if valid is not None:
            delta = delta * valid[:, None]
        y, h = scan_step(u, delta, constants.A, B, C, h)
        return self.out_proj(torch.addcmul(y, u, self.D) * functional.silu(gate)), (tail, h)

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (..., E), input weights (..., N) and output weights (..., N) of every step."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return functional.softplus(self.dt_proj(dt)), B, C


def initial_delta_bias(width: int) -> Tensor:
    """A bias whose softplus is log-uniform over `DELTA_RANGE`, (width,)."""
    low, high = map(math.log, DELTA_RANGE)
    delta = torch.exp(torch.rand(width) * (high - low) + low).clamp(min=DELTA_FLOOR)
    return delta + torch.log(-torch.expm1(-delta))
