"""Extractors: samples of an utterance become one vector per stream (speech, prosody, speaker)."""

from vaemo.features.base import Extractor, describe, load_extractors

__all__ = ["Extractor", "describe", "load_extractors"]
