"""What the tests of streams share with the processes that they start."""

import numpy as np

from vaemo.config import Config

RATE = 16_000


class Energies:
    """A small extractor: log energies of so many slices of the utterance."""

    version, uses_gpu = "1", False

    def __init__(self, name, dim, fingerprint="f"):
        self.name, self.dim, self.fingerprint = name, dim, fingerprint

    def __call__(self, utterances):
        rows = [[np.log(part.std() + 1e-6) for part in np.array_split(x, self.dim)] for x in utterances]
        vectors = np.array(rows, np.float32).reshape(len(utterances), self.dim)
        return vectors if self.name != "picky" else vectors * np.nan


EXTRACTORS = {"speech": Energies("energies", 6), "speaker": Energies("voices", 4)}


def utterances(n=6, seed=0):
    random = np.random.default_rng(seed)
    sizes = random.integers(RATE // 2, 2 * RATE, n)
    return [(random.uniform(0.01, 0.3) * random.standard_normal(size)).astype(np.float32) for size in sizes]


def heard(prediction):
    return np.array([prediction.valence, prediction.arousal])


def push_all(stream, samples, speakers=None):
    speakers = speakers or [None] * len(samples)
    return np.array([heard(stream.push(x, RATE, speaker=s)) for x, s in zip(samples, speakers, strict=True)])


def config(**sections):
    return Config().replace(sections)


SPEAKERS = {"sessions": {"sequence_by": "speaker"}, "features": {"speaker_aggregation": "running_mean"}}
