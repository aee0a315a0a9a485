"""Extractors in a child process: the same vectors, and a crash that is told instead of shared."""

import time
from pathlib import Path

import numpy as np
import pytest
from processes import below

from vaemo.config import Config
from vaemo.errors import ExtractorError
from vaemo.features import ExtractorHung, ExtractorLost, StandIn, describe, load_extractors, watch
from vaemo.features.isolated import isolated
from vaemo.features.watch import begin_utterance, watched

CRASHING = Path(__file__).parents[2] / "crashing"
CONFIG = Config().replace({"features": {"speaker": "none"}})


def noise(seed, scale=0.1):
    return np.random.default_rng(seed).normal(scale=scale, size=4000).clip(-1, 1).astype(np.float32)


@pytest.mark.long
def test_a_child_computes_what_the_extractors_do_and_ends_with_the_context():
    extractors = load_extractors(CONFIG.features)
    with isolated(extractors, CONFIG, careful=False) as here:
        assert here is extractors
    elsewhere = StandIn.of(extractors["speech"], lambda utterances: lambda: np.full((len(utterances), 120), 7.0))
    utterances = [noise(0), noise(1)]
    before = set(below())
    with isolated({**extractors, "speaker": elsewhere}, CONFIG) as apart:
        assert not set(below()) - before
        assert describe(apart) == describe({**extractors, "speaker": elsewhere})
        for stream, extractor in extractors.items():
            np.testing.assert_array_equal(apart[stream](utterances), extractor(utterances))
        # What computes elsewhere already goes on there.
        assert apart["speaker"](utterances)[1, 0] == 7.0
        assert [process for process in set(below()) - before if "spawn_main" in " ".join(process.cmdline())]
    assert not [process for process in set(below()) - before if "spawn_main" in " ".join(process.cmdline())]


def test_a_crash_is_told_and_the_next_request_has_a_new_child(monkeypatch):
    monkeypatch.syspath_prepend(CRASHING)
    with isolated({"prosody": load_extractors(CONFIG.features)["prosody"]}, CONFIG) as apart:
        with pytest.raises(ExtractorLost, match=r"^SIGKILL$"):
            apart["prosody"]([noise(0), noise(1, scale=1.0)])
        np.testing.assert_array_equal(apart["prosody"]([noise(0)])[0], noise(0)[:88])


def test_a_child_that_hangs_is_ended_and_the_next_request_has_a_new_one(monkeypatch):
    monkeypatch.syspath_prepend(CRASHING)
    config = CONFIG.replace({"extract": {"features_timeout_s": 0.5}})
    with isolated({"prosody": load_extractors(CONFIG.features)["prosody"]}, config) as apart:
        with pytest.raises(ExtractorHung, match=r"^0\.5 s$"):
            apart["prosody"]([noise(0), noise(1, scale=1.0) * np.float32(0.8)])
        np.testing.assert_array_equal(apart["prosody"]([noise(0)])[0], noise(0)[:88])


def test_a_process_that_nobody_starts_again_is_not_watched(monkeypatch):
    monkeypatch.setattr(watch, "_expendable", False)
    with watched(0.05):
        begin_utterance()
        time.sleep(0.2)


def test_a_mistake_in_the_child_is_raised_here():
    config = CONFIG.replace({"features": {"prosody": "opensmile"}})
    with (
        isolated({"prosody": load_extractors(CONFIG.features)["prosody"]}, config) as apart,
        pytest.raises(ExtractorError, match=r"features.prosody is 'opensmile'; allowed are"),
    ):
        apart["prosody"]([noise(0)])
