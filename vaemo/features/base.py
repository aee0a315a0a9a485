"""The contract of an extractor, and the extractors that a config asks for.

An extractor turns the samples of utterances into one vector each. An utterance's vector depends on that utterance
alone, never on what else is in the call. Where it is computed is a matter of its own: a `StandIn` has another process
do it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError
from vaemo.extras import remedy, version_of
from vaemo.units import STREAMS


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
    """The process that computed vectors for this one has died of it; the message says how."""


class ExtractorHung(ExtractorLost):
    """It was ended, since an utterance took longer than it may; the message says how long."""


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
        """What stands for an extractor."""
        known = extractor.name, extractor.version, extractor.dim, extractor.fingerprint, extractor.uses_gpu
        return cls(*known, begin)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`."""
        return self.begin(utterances)()


def load_extractors(
    config: FeatureConfig, *, batch_s: float = 60.0, ready: Mapping[str, Extractor] | None = None
) -> dict[str, Extractor]:
    """The extractor of every stream that is not `none`, in the order of `STREAMS`.

    Weights are loaded at the first call of an extractor, so that this is cheap and may be done where only names,
    dimensions and fingerprints are wanted.

    Args:
        config: Which extractors.
        batch_s: Most seconds of speech in one batch of a neural encoder.
        ready: Extractors that are there already, by stream.

    Raises:
        ExtractorError: if one is unknown, not installed, or its model cannot be found.
    """
    there = ready or {}
    streams = [stream for stream in STREAMS if getattr(config, stream) != "none"]
    extractors = {stream: there.get(stream) or load_extractor(stream, config, batch_s=batch_s) for stream in streams}
    if not extractors:
        raise ExtractorError(
            "features.speech, features.prosody and features.speaker are all `none`; at least one stream is needed."
        )
    return extractors


def load_extractor(stream: str, config: FeatureConfig, *, batch_s: float = 60.0) -> Extractor:
    """The extractor of one stream, which is not `none`; otherwise as `load_extractors`."""
    return {"speech": _load_speech, "prosody": _load_prosody, "speaker": _load_speaker}[stream](config, batch_s)


def describe(extractors: Mapping[str, Extractor]) -> dict[str, dict[str, Any]]:
    """Name, version, dimension and fingerprint by stream, as a store records them."""
    return {
        stream: {name: getattr(extractor, name) for name in ("name", "version", "dim", "fingerprint")}
        for stream, extractor in extractors.items()
    }


def fingerprint_of(**facts: Any) -> str:
    """16 hex digits that follow from the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _load_speech(config: FeatureConfig, batch_s: float) -> Extractor:
    if config.speech == "logmel":
        from vaemo.features.spectral import LogMel

        return LogMel()
    from vaemo.features.speech import SpeechEncoder, fitting_batch_s

    return SpeechEncoder(config, batch_s=fitting_batch_s(batch_s))


def _load_prosody(config: FeatureConfig, batch_s: float) -> Extractor:
    if config.prosody == "praat":
        from vaemo.features.praat import Praat

        return Praat()
    from vaemo.features.prosody import FEATURE_SETS, OpenSmile

    if config.prosody not in FEATURE_SETS:
        raise ExtractorError(
            f"features.prosody is '{config.prosody}'; allowed are {', '.join(FEATURE_SETS)}, praat and none."
        )
    return OpenSmile(config.prosody)


def _load_speaker(config: FeatureConfig, batch_s: float) -> Extractor:
    if config.speaker == "ltas":
        from vaemo.features.spectral import LongTermSpectrum

        return LongTermSpectrum()
    if config.speaker == "campplus":
        from vaemo.features.campplus import CampPlus

        return CampPlus()
    from vaemo.features.speaker import SpeakerEncoder

    return SpeakerEncoder(config.speaker, revision=config.speaker_revision)


def needed_version(package: str, asked: str, instead: str = "") -> str:
    """The version of the package that an extractor calls.

    Args:
        package: Name of the distribution.
        asked: What was asked for, the begin of the message.
        instead: What can be had without it.

    Raises:
        ExtractorError: if it is not installed.
    """
    version = version_of(package)
    if version is None:
        other = f", or choose {instead}" if instead else ""
        raise ExtractorError(f"{asked}, which needs {package}: {remedy(package)}{other}.")
    return version


def first_line(error: Exception) -> str:
    """What somebody else's error says first, to be part of a message."""
    return str(error).strip().partition("\n")[0]
