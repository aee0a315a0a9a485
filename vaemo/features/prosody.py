"""Prosody by openSMILE: functionals of loudness, pitch, voice quality and spectrum over an utterance.

openSMILE is free for research; commercial use needs an agreement with audEERING (`features.opensmile_license`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vaemo.features.base import fingerprint_of, needed_version
from vaemo.features.watch import begin_utterance
from vaemo.units import SAMPLING_RATE_HZ

FEATURE_SETS = {"egemaps": ("eGeMAPSv02", 88), "gemaps": ("GeMAPSv01b", 62), "compare": ("ComParE_2016", 6373)}
"""openSMILE's own name and the number of functionals of every set that is offered."""

LICENSE_NOTE = (
    "openSMILE computes the prosody. It is free for research; commercial use needs an agreement with audEERING. Say "
    "which applies with --set features.opensmile_license=research (or commercial), or take another prosody, such as "
    "praat or none."
)
"""What a job says where `features.opensmile_license` is not set."""

_CEILING = 1.0 - 2.0**-15
"""openSMILE takes 16-bit samples and wraps +1.0 round to the most negative one."""


class OpenSmile:
    """One feature set of openSMILE; the engine starts at the first call and stays.

    Args:
        name: A key of `FEATURE_SETS`.

    Raises:
        ExtractorError: if openSMILE is not installed.

    Source:
        Eyben et al. (2016), The Geneva Minimalistic Acoustic Parameter Set; Eyben et al. (2010), openSMILE.
    """

    uses_gpu = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._set, self.dim = FEATURE_SETS[name]
        self.version = needed_version("opensmile", f"features.prosody is '{name}'", "praat or none")
        self.fingerprint = fingerprint_of(name=self._set, version=self.version)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; a row of NaN where openSMILE finds an utterance too short (about 60 ms)."""
        vectors = np.empty((len(utterances), self.dim), np.float32)
        with warnings.catch_warnings():
            # It warns of what the row of NaN says.
            warnings.filterwarnings("ignore", message="Segment too short")
            for row, samples in enumerate(utterances):
                begin_utterance()
                vectors[row] = self._engine(samples.clip(-1.0, _CEILING), SAMPLING_RATE_HZ).reshape(self.dim)
        return vectors

    @functools.cached_property
    def _engine(self) -> Any:
        import opensmile

        return opensmile.Smile(
            feature_set=getattr(opensmile.FeatureSet, self._set), feature_level=opensmile.FeatureLevel.Functionals
        )
