"""The contract of an extractor, and the extractors that a config asks for.

An extractor turns the samples of utterances into one vector each. An utterance's vector depends on that utterance
alone, never on what else is in the call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError
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


def load_extractors(config: FeatureConfig, *, batch_s: float = 60.0) -> dict[str, Extractor]:
    """The extractor of every stream that is not `none`, in the order of `STREAMS`.

    Weights are loaded at the first call of an extractor, so that this is cheap and may be done where only names,
    dimensions and fingerprints are wanted.

    Args:
        config: Which extractors.
        batch_s: Most seconds of speech in one batch of a neural encoder.

    Raises:
        ExtractorError: if one is unknown, not installed, or its model cannot be found.
    """
    loaders = {"speech": _load_speech, "prosody": _load_prosody, "speaker": _load_speaker}
    extractors = {stream: loaders[stream](config, batch_s) for stream in STREAMS if getattr(config, stream) != "none"}
    if not extractors:
        raise ExtractorError(
            "features.speech, features.prosody and features.speaker are all `none`; at least one stream is needed."
        )
    return extractors


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
    from vaemo.features.speaker import SpeakerEncoder

    return SpeakerEncoder(config.speaker, revision=config.speaker_revision)
