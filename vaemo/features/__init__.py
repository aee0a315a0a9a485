"""Extractors: samples of an utterance become one vector per stream (speech, prosody, speaker)."""

from vaemo.features.base import Extractor, ExtractorLost, StandIn, describe, load_extractor, load_extractors

__all__ = ["Extractor", "ExtractorLost", "StandIn", "describe", "load_extractor", "load_extractors"]
