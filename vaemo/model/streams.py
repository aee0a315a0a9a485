"""What an utterance is to the model: its three feature streams, lanes first.

Letters: L lanes, T steps, D features of a stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
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
    """

    speech: Tensor | None = None
    prosody: Tensor | None = None
    speaker: Tensor | None = None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and features of every stream that is there, in the order of `STREAMS`."""
        for name in STREAMS:
            features = getattr(self, name)
            if features is not None:
                yield name, features

    def map(self, function: Callable[[Tensor], Tensor]) -> Streams:
        """The streams with `function` applied to each one that is there."""
        return Streams(**{name: function(features) for name, features in self.items()})

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
        """Streams joined along lanes (0) or steps (1); all parts hold the same streams."""
        names = [name for name, _ in parts[0].items()]
        return Streams(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name in names})
