"""Extractors: samples of an utterance become one vector per stream (speech, prosody, speaker)."""

from vaemo.features.base import Extractor, ExtractorHung, ExtractorLost, StandIn, describe
from vaemo.features.load import load_extractor, load_extractors, with_absolute_folders

__all__ = [
    "Extractor",
    "ExtractorHung",
    "ExtractorLost",
    "StandIn",
    "describe",
    "load_extractor",
    "load_extractors",
    "with_absolute_folders",
]
