"""The model's input for utterances: the three feature streams and the past of each utterance, lanes first.

Letters: L lanes, T steps, D features of a stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vaemo.units import STREAMS


@dataclasses.dataclass(frozen=True)
class Streams:
    """Features of a chunk (L, T, D) or of one step (L, D); a stream that a store lacks is None.

    Attributes:
        speech: Pooled speech embedding.
        prosody: Prosodic functionals.
        speaker: Speaker embedding.
        past: What a model compares features with (`SessionRegressor.pasts`), by name, such as `speaker.prosody`: the
            sum over earlier utterances, then their number, (L, T, D + 1) or (L, D + 1).
    """

    speech: Tensor | None = None
    prosody: Tensor | None = None
    speaker: Tensor | None = None
    past: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Streams:
        """The streams from tensors by name, the inverse of `tensors`."""
        streams = {name: x for name, x in tensors.items() if "." not in name}
        return Streams(**streams, past={name: x for name, x in tensors.items() if "." in name})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: the streams present, then the pasts."""
        return {**dict(self.items()), **self.past}

    def pick(self, names: Collection[str]) -> Streams:
        """Only the streams and pasts with these names."""
        return Streams.of({name: x for name, x in self.tensors().items() if name in names})

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and features of every stream present, in the order of `STREAMS`."""
        for name in STREAMS:
            features = getattr(self, name)
            if features is not None:
                yield name, features

    def map(self, function: Callable[[Tensor], Tensor]) -> Streams:
        """The streams with `function` applied to every tensor."""
        return Streams.of({name: function(x) for name, x in self.tensors().items()})

    def to(self, *args: Any, **kwargs: Any) -> Streams:
        """The streams on a device or in a dtype, as `Tensor.to` takes them."""
        return self.map(lambda features: features.to(*args, **kwargs))

    def select(self, lanes: Tensor | slice | list[int]) -> Streams:
        """The streams of some lanes."""
        return self.map(lambda features: features[lanes])

    def steps(self, start: int, stop: int) -> Streams:
        """The chunk's steps from `start` up to `stop`."""
        return self.map(lambda features: features[:, start:stop])

    def step(self, index: int) -> Streams:
        """One step of a chunk, as `SessionRegressor.step` takes it: (L, D) each."""
        return self.map(lambda features: features[:, index])

    @staticmethod
    def cat(parts: list[Streams], dim: int = 0) -> Streams:
        """Streams joined along lanes (0) or steps (1); all parts hold the same tensors."""
        every = [part.tensors() for part in parts]
        return Streams.of({name: torch.cat([part[name] for part in every], dim) for name in every[0]})
