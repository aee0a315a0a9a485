"""u_t = Updater([z_t ; y_{t-1}]): a linear map, pre-norm residual recurrent blocks, a linear map and a LayerNorm.

Letters: L lanes, T steps, D width of z, H width inside (d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.config import UpdaterConfig
from vaemo.model.gru import Gru
from vaemo.model.mamba import Mamba
from vaemo.model.mamba2 import Mamba2

LayerMemory = tuple[Tensor, ...]
"""What a block remembers: (conv_tail, ssm) of a Mamba block, (hidden,) of a GRU."""

Memory = list[LayerMemory]
"""One for every layer."""

MEMORY_FIELDS = ("conv_tail", "ssm", "hidden")
"""The fields of `SessionState` that hold the memory of all layers."""


class UpdaterConstants(NamedTuple):
    """What is derived from the parameters once per chunk: in a loop, the gradient of a slice taken at every step
    would cost a whole weight each time.

    Attributes:
        of_z: The input's weight of z, (H, D).
        feedback: The input's weight of what is fed back, (H, 2 or 4), or (H, 0).
        mixers: Of every block.
    """

    of_z: Tensor
    feedback: Tensor
    mixers: list[Any]


class Mixer(Protocol):
    """What mixes steps inside a block; `Mamba`, `Mamba2` and `Gru` are ones."""

    memory: tuple[str, ...]

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane, by the names in `memory`."""
        ...

    def constants(self) -> Any:
        """What is derived from the parameters once per chunk."""
        ...

    def __call__(self, x: Tensor, memory: LayerMemory, valid: Tensor, constants: Any) -> tuple[Tensor, LayerMemory]:
        """Over a chunk (L, T, H)."""
        ...

    def step(self, x: Tensor, memory: LayerMemory, valid: Tensor | None, constants: Any) -> tuple[Tensor, LayerMemory]:
        """Over one step (L, H)."""
        ...


def _mixer(kind: str, config: UpdaterConfig, scan: str) -> nn.Module:
    if kind == "gru":
        return Gru(config.d_model)
    sizes = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand}
    if kind == "mamba2":
        return Mamba2(config.d_model, headdim=config.headdim, scan=scan, **sizes)
    return Mamba(config.d_model, scan=scan, **sizes)


class Block(nn.Module):
    """x + mixer(norm(x)), over a chunk or one step; arguments as the mixer's."""

    mixer: Mixer

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = mixer  # type: ignore[assignment]

    def forward(self, x: Tensor, memory: LayerMemory, valid: Tensor, constants: Any) -> tuple[Tensor, LayerMemory]:
        """Over a chunk (L, T, H)."""
        y, memory = self.mixer(self.norm(x), memory, valid, constants)
        return x + y, memory

    def step(self, x: Tensor, memory: LayerMemory, valid: Tensor | None, constants: Any) -> tuple[Tensor, LayerMemory]:
        """Over one step (L, H)."""
        y, memory = self.mixer.step(self.norm(x), memory, valid, constants)
        return x + y, memory


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
        self.z_dim, self.feedback_dim = z_dim, feedback_dim
        self.carry = config.carry
        self.input = nn.Linear(z_dim + feedback_dim, config.d_model)
        self.blocks = nn.ModuleList(Block(_mixer(kind, config, scan), config.d_model) for _ in range(config.layers))
        self.output = nn.Linear(config.d_model, d_c)
        self.norm = nn.LayerNorm(d_c)

    @property
    def layers(self) -> list[Block]:
        """The residual blocks."""
        return cast(list[Block], list(self.blocks))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the memory of one lane; layers first, and width 0 where nothing is carried."""
        shapes = self._mixer_shapes() if self.carry else {}
        return {name: (len(self.blocks), *shapes[name]) if name in shapes else (0,) for name in MEMORY_FIELDS}

    def _mixer_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.layers[0].mixer.memory_shapes()

    def unpack(self, fields: Mapping[str, Tensor]) -> Memory:
        """The memory by layer, from the fields of a `SessionState`."""
        if not self.carry:
            return []
        names = self.layers[0].mixer.memory
        return [tuple(fields[name][:, layer] for name in names) for layer in range(len(self.blocks))]

    def pack(self, memory: Memory) -> dict[str, Tensor]:
        """The fields of a `SessionState` that change, from the memory by layer."""
        if not self.carry:
            return {}
        names = self.layers[0].mixer.memory
        return {name: torch.stack(layers, 1) for name, layers in zip(names, zip(*memory, strict=True), strict=True)}

    def constants(self) -> UpdaterConstants:
        """What `forward` and `step` need of the parameters, computed once per chunk."""
        of_z, feedback = self.input.weight.split([self.z_dim, self.feedback_dim], 1)
        return UpdaterConstants(of_z, feedback, [block.mixer.constants() for block in self.layers])

    def project(self, z: Tensor, constants: UpdaterConstants) -> Tensor:
        """The input's share of z, (..., H), with its bias."""
        return functional.linear(z, constants.of_z, self.input.bias)

    def forward(
        self, projected: Tensor, fed: Tensor | None, memory: Memory, valid: Tensor, constants: UpdaterConstants
    ) -> tuple[Tensor, Memory]:
        """The output u over a chunk.

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
        if self.carry:
            return self._run([block.forward for block in self.layers], projected, fed, memory, valid, constants)
        u, _ = self.step(projected.flatten(0, 1), None if fed is None else fed.flatten(0, 1), [], None, constants)
        return u.unflatten(0, projected.shape[:2]), memory

    def step(
        self, projected: Tensor, fed: Tensor | None, memory: Memory, valid: Tensor | None, constants: UpdaterConstants
    ) -> tuple[Tensor, Memory]:
        """The output u of one step: the arguments of `forward` without T; `valid` None where every lane is."""
        steps = [block.step for block in self.layers]
        if self.carry:
            return self._run(steps, projected, fed, memory, valid, constants)
        nothing = tuple(projected.new_zeros(projected.shape[0], *shape) for shape in self._mixer_shapes().values())
        u, _ = self._run(steps, projected, fed, [nothing] * len(steps), None, constants)
        return u, memory

    def _run(
        self,
        blocks: Sequence[Callable[..., tuple[Tensor, LayerMemory]]],
        projected: Tensor,
        fed: Tensor | None,
        memory: Memory,
        valid: Tensor | None,
        constants: UpdaterConstants,
    ) -> tuple[Tensor, Memory]:
        x = projected if fed is None else projected + functional.linear(fed, constants.feedback)
        after = []
        for block, layer_memory, constant in zip(blocks, memory, constants.mixers, strict=True):
            x, layer_memory = block(x, layer_memory, valid, constant)
            after.append(layer_memory)
        return self.norm(self.output(x)), after
