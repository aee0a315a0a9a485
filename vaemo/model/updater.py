"""u_t = Updater([z_t ; y_{t-1}]): a linear map, pre-norm residual recurrent blocks, a linear map and a LayerNorm.

Letters: L lanes, T steps, D width of z, H width inside (d_model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaemo.config import UpdaterConfig
from vaemo.model.gru import Gru
from vaemo.model.mamba import Mamba
from vaemo.model.mamba2 import Mamba2

Memory = dict[str, Tensor]
"""conv_tail, ssm, hidden, as `SessionState` holds them: lanes, then layers; width 0 where not used."""

MEMORY_FIELDS = ("conv_tail", "ssm", "hidden")


def _mixer(kind: str, config: UpdaterConfig, scan: str) -> nn.Module:
    if kind == "gru":
        return Gru(config.d_model)
    sizes = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand, "scan": scan}
    if kind == "mamba2":
        return Mamba2(config.d_model, headdim=config.headdim, **sizes)
    return Mamba(config.d_model, **sizes)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = mixer


class Updater(nn.Module):
    """The recurrent part of the session model.

    What it gets of z does not depend on the feedback: `project` computes it for a whole chunk, `forward` and `step`
    add the feedback's share.

    Args:
        kind: `mamba`, `mamba2` or `gru`.
        config: Sizes.
        z_dim: Width of z, D.
        feedback_dim: Width of what is fed back; 0 without feedback.
        d_c: Width of u.
        scan: Form of the scan.
    """

    def __init__(self, kind: str, config: UpdaterConfig, z_dim: int, feedback_dim: int, d_c: int, scan: str):
        super().__init__()
        self.z_dim = z_dim
        self.carry = config.carry
        self.input = nn.Linear(z_dim + feedback_dim, config.d_model)
        self.blocks = nn.ModuleList(
            Block(_mixer(kind, config, scan), config.d_model) for _ in range(config.layers)
        )
        self.output = nn.Linear(config.d_model, d_c)
        self.norm = nn.LayerNorm(d_c)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane; layers first, and width 0 where nothing is carried."""
        shapes = self._mixer_shapes() if self.carry else {}
        return {name: (len(self.blocks), *shapes[name]) if name in shapes else (0,) for name in MEMORY_FIELDS}

    def _mixer_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.blocks[0].mixer.memory_shapes()

    def constants(self) -> list[Any]:
        """What every block derives from its parameters, once per chunk."""
        return [block.mixer.constants() for block in self.blocks]

    def project(self, z: Tensor) -> Tensor:
        """The input's share of z, (..., H), with its bias."""
        return F.linear(z, self.input.weight[:, : self.z_dim], self.input.bias)

    def forward(
        self, projected: Tensor, fed: Tensor | None, memory: Memory, valid: Tensor, constants: list[Any]
    ) -> tuple[Tensor, Memory]:
        """u over a chunk.

        Args:
            projected: What `project` returned, (L, T, H).
            fed: What is fed back, (L, T, 2) or with flags (L, T, 4); None without feedback.
            memory: Before the first step. Not modified.
            valid: (L, T), bool, True for a prefix of every lane.
            constants: What `constants` returned.

        Returns:
            u: (L, T, d_c).
            memory: After every lane's last valid step.
        """
        if not self.carry:
            u, _ = self.step(
                projected.flatten(0, 1), None if fed is None else fed.flatten(0, 1), memory, None, constants
            )
            return u.unflatten(0, projected.shape[:2]), memory
        return self._run("forward", projected, fed, memory, valid, constants)

    def step(
        self, projected: Tensor, fed: Tensor | None, memory: Memory, valid: Tensor | None, constants: list[Any]
    ) -> tuple[Tensor, Memory]:
        """u of one step: the arguments of `forward` without T; `valid` None where every lane is."""
        if self.carry:
            return self._run("step", projected, fed, memory, valid, constants)
        forgotten = {
            name: projected.new_zeros(len(projected), len(self.blocks), *shape)
            for name, shape in self._mixer_shapes().items()
        }
        u, _ = self._run("step", projected, fed, forgotten, None, constants)
        return u, memory

    def _run(
        self,
        form: str,
        projected: Tensor,
        fed: Tensor | None,
        memory: Memory,
        valid: Tensor | None,
        constants: list[Any],
    ) -> tuple[Tensor, Memory]:
        x = projected if fed is None else projected + F.linear(fed, self.input.weight[:, self.z_dim :])
        names = self.blocks[0].mixer.memory
        after = []
        for layer, (block, constant) in enumerate(zip(self.blocks, constants, strict=True)):
            run = block.mixer if form == "forward" else block.mixer.step
            y, layer_memory = run(block.norm(x), tuple(memory[name][:, layer] for name in names), valid, constant)
            x = x + y
            after.append(layer_memory)
        stacked = (torch.stack(tensors, 1) for tensors in zip(*after, strict=True))
        return self.norm(self.output(x)), memory | dict(zip(names, stacked, strict=True))
