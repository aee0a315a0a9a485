"""The extractors that a config asks for. Each lies in a file of its own, which is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from vaemo.config import Config, FeatureConfig
from vaemo.errors import ExtractorError
from vaemo.features.base import Extractor
from vaemo.units import STREAMS

_BUILT_IN = ("none", "logmel", "ltas", "campplus")
"""Names in `features.speech` and `features.speaker` that mean no folder, even where there is one."""


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


def with_absolute_folders(config: Config) -> Config:
    """The config for processes in other working directories: folders of encoders are absolute paths."""
    folders = {
        stream: os.path.abspath(name)
        for stream in ("speech", "speaker")
        if (name := getattr(config.features, stream)) not in _BUILT_IN and os.path.isdir(name)
    }
    return dataclasses.replace(config, features=dataclasses.replace(config.features, **folders))
