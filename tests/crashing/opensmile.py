"""Stands in for openSMILE where this folder is on the path: crashes on loud speech, as native code does, or hangs."""

import enum
import os
import signal
import time

import numpy as np

FeatureLevel = enum.Enum("FeatureLevel", "Functionals")
FeatureSet = enum.Enum("FeatureSet", "eGeMAPSv02")


class Smile:
    """Its functionals are samples, which differ from utterance to utterance."""

    def __init__(self, feature_set, feature_level):
        assert (feature_set, feature_level) == (FeatureSet.eGeMAPSv02, FeatureLevel.Functionals)

    def __call__(self, samples, sampling_rate):
        if np.abs(samples).max() > 0.9:
            os.kill(os.getpid(), signal.SIGKILL)
        if np.abs(samples).max() > 0.7:
            time.sleep(600)
        return samples[:88]
