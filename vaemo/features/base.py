"""The contract of an extractor.

An extractor turns the samples of utterances into one vector each. An utterance's vector depends on that utterance
alone, never on what else is in the call. A `StandIn` computes it in another process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vaemo.errors import ExtractorError
from vaemo.extras import remedy, version_of


@runtime_checkable
class Extractor(Protocol):
    """Samples in, vectors out.

    Attributes:
        name: As the config names it.
        version: Of the code or package that computes the vectors.
        dim: Length of a vector.
        fingerprint: 16 hex digits of everything that its vectors depend on: name, version, settings, weights.
        uses_gpu: Whether it runs on a GPU where there is one.
    """

    name: str
    version: str
    dim: int
    fingerprint: str
    uses_gpu: bool

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """The vectors of utterances.

        Args:
            utterances: Samples of each, (n,), float32 in [-1, 1], mono, 16 kHz.

        Returns:
            (len(utterances), dim), float32. A row with NaN is an utterance that is too short for this extractor.
        """
        ...


class ExtractorLost(Exception):  # noqa: N818 - of an utterance alone it becomes a row, not an error
    """The process that computed the vectors has died; the message says how."""


class ExtractorHung(ExtractorLost):
    """The process was killed because an utterance exceeded the time limit; the message gives the limit."""


@dataclass(eq=False)
class StandIn:
    """An extractor whose vectors another process computes: its weights are never loaded here.

    Attributes:
        name: Of the extractor it stands for, as are the next four.
        version: Of its code or package.
        dim: Length of its vectors.
        fingerprint: Of everything that its vectors depend on.
        uses_gpu: Whether it runs on a GPU.
        begin: Takes utterances and returns at once, with a function that waits for their vectors; `ExtractorLost`
            where the process has died of them.
    """

    name: str
    version: str
    dim: int
    fingerprint: str
    uses_gpu: bool
    begin: Callable[[Sequence[np.ndarray]], Callable[[], np.ndarray]]

    @classmethod
    def of(cls, extractor: Extractor, begin: Callable[[Sequence[np.ndarray]], Callable[[], np.ndarray]]) -> StandIn:
        """The stand-in of an extractor."""
        known = extractor.name, extractor.version, extractor.dim, extractor.fingerprint, extractor.uses_gpu
        return cls(*known, begin)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`."""
        return self.begin(utterances)()


def describe(extractors: Mapping[str, Extractor]) -> dict[str, dict[str, Any]]:
    """Name, version, dimension and fingerprint by stream, as a store records them."""
    return {
        stream: {name: getattr(extractor, name) for name in ("name", "version", "dim", "fingerprint")}
        for stream, extractor in extractors.items()
    }


def fingerprint_of(**facts: Any) -> str:
    """16 hex digits that follow from the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def needed_version(package: str, asked: str, instead: str = "") -> str:
    """The version of the package that an extractor calls.

    Args:
        package: Name of the distribution.
        asked: The setting that needs the package: the beginning of the message.
        instead: The alternative without it.

    Raises:
        ExtractorError: if it is not installed.
    """
    version = version_of(package)
    if version is None:
        other = f", or choose {instead}" if instead else ""
        raise ExtractorError(f"{asked}, which needs {package}: {remedy(package)}{other}.")
    return version


def first_line(error: Exception) -> str:
    """The first line of a library's error, for use in a message."""
    return str(error).strip().partition("\n")[0]
