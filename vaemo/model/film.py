"""Feature-wise linear modulation of the speech embedding by the speaker embedding, and its changes for one speaker.

Letters: D widths, S speakers with changes, R utterances.

Source:
    Perez et al. (2018), "FiLM: Visual Reasoning with a General Conditioning Layer"; gamma here is bounded, 1 + tanh,
    and the last layer starts at zero, so that training starts from the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class FilmDelta:
    """What some speakers add to FiLM's parameters, and whose utterance each one is.

    Attributes:
        parameters: By the names of `Film`'s state dict, (S, ...) each; what is absent is unchanged.
        speaker: Index into S of every utterance, (L, T), (L,) or (R,), int64; -1 where nothing is added.
    """

    parameters: Mapping[str, Tensor]
    speaker: Tensor

    def steps(self, start: int, stop: int) -> FilmDelta:
        """The chunk's steps from `start` up to `stop`."""
        return FilmDelta(self.parameters, self.speaker[:, start:stop])

    def rows(self, index: Tensor) -> FilmDelta:
        """The chunk's steps at `index`, (R,), counted through lane after lane."""
        return FilmDelta(self.parameters, self.speaker.flatten()[index])

    def to(self, device: torch.device | str) -> FilmDelta:
        """The changes on a device."""
        moved = {name: parameter.to(device) for name, parameter in self.parameters.items()}
        return FilmDelta(moved, self.speaker.to(device))


@dataclasses.dataclass(frozen=True)
class LaneDelta:
    """What is added to FiLM's parameters in every lane of one step.

    Attributes:
        parameters: By the names of `Film`'s state dict, (L, ...) each, zero where nothing is added.
    """

    parameters: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> LaneDelta:
        """The changes on a device."""
        return LaneDelta({name: parameter.to(device) for name, parameter in self.parameters.items()})

    def add(self, layer: str, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (L, D) for its input x, with what is added to it."""
        weight, bias = self.parameters[f"{layer}.weight"], self.parameters[f"{layer}.bias"]
        return y + torch.baddbmm(bias[..., None], weight, x[..., None])[..., 0]


class Film(nn.Module):
    """gamma * h + beta with (gamma, beta) = MLP(s): two layers, ReLU, gamma = 1 + tanh.

    Args:
        speaker_dim: Width of the speaker embedding s.
        speech_dim: Width of the speech embedding h.
        hidden: Width in between.
    """

    def __init__(self, speaker_dim: int, speech_dim: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(speaker_dim, hidden)
        self.last = nn.Linear(hidden, 2 * speech_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, speech: Tensor, speaker: Tensor, delta: FilmDelta | LaneDelta | None = None) -> Tensor:
        """The modulated speech embedding, (..., D) as `speech`."""
        if delta is None:
            gamma, beta = self.last(functional.relu(self.hidden(speaker))).chunk(2, -1)
        else:
            own = delta if isinstance(delta, LaneDelta) else _OwnUtterances(delta)
            hidden = functional.relu(own.add("hidden", speaker, self.hidden(speaker)))
            gamma, beta = own.add("last", hidden, self.last(hidden)).chunk(2, -1)
        # 1 + tanh(x) is 2 sigmoid(2 x), at a fifth of the cost on a CPU.
        return torch.addcmul(beta, speech, torch.sigmoid(2 * gamma), value=2)


class _OwnUtterances:
    """The utterances of the speakers with changes, gathered by speaker, so that one batched product serves all."""

    def __init__(self, delta: FilmDelta):
        self.parameters = delta.parameters
        speaker = delta.speaker.flatten()
        utterance = (speaker >= 0).nonzero()[:, 0]
        utterance = utterance[speaker[utterance].argsort(stable=True)]
        self.present, group, counts = speaker[utterance].unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(utterance), device=speaker.device) - (counts.cumsum(0) - counts)[group]
        self.utterance, self.group, self.place = utterance, group, place
        self.longest = int(counts.max()) if len(counts) else 0

    def add(self, layer: str, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., D) for its input x, with what the speakers add to it."""
        weight, bias = self.parameters.get(f"{layer}.weight"), self.parameters.get(f"{layer}.bias")
        if weight is None or bias is None or not self.longest:
            return y
        if len(self.present) < len(weight):
            weight, bias = weight[self.present], bias[self.present]
        rows = x.flatten(0, -2)[self.utterance]
        by_speaker = x.new_zeros(len(weight), self.longest, x.shape[-1])
        by_speaker = by_speaker.index_put((self.group, self.place), rows)
        added = torch.baddbmm(bias[:, None], by_speaker, weight.transpose(1, 2))[self.group, self.place]
        return y.flatten(0, -2).index_add(0, self.utterance, added).view_as(y)
