"""Where there are GPUs one encoder on each computes for all workers, and stores are as if there were none."""

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile
import torch
from announced import announce
from extract_cases import CONFIG, make_loud, rows_of, write_corpus
from processes import kill, meanwhile, watching, workers
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from scoring_cases import assert_close, make_audio_checkpoint, run
from speech_cases import call
from tiny_models import write_speaker_model, write_speech_model

import vaemo
from vaemo.cluster import encoders, runtime
from vaemo.config import FeatureConfig
from vaemo.errors import ClusterError, ExtractorError, StorageError
from vaemo.features import ExtractorHung, ExtractorLost, load_extractors
from vaemo.features.speaker import SpeakerEncoder
from vaemo.features.speech import SpeechEncoder
from vaemo.pipeline import extraction
from vaemo.pipeline.executors import InProcess

pytestmark = pytest.mark.ray

SESSIONS = 30
SAME_BATCHES = 1e-5
"""Relative, float32: the same batches through the same code, in another process."""


@pytest.fixture
def gpus(request):
    """A Ray of two CPUs and as many GPUs as the parameter says: by name, torch computes on the CPU."""
    ray.shutdown()
    ray.init(num_cpus=2, num_gpus=request.param, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield request.param
    ray.shutdown()


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys()
    for name, row in found.items():
        for column, value in row.items():
            if column in ("speech", "speaker") and value is not None:
                np.testing.assert_allclose(value, expected[name][column], rtol=SAME_BATCHES, atol=SAME_BATCHES)
            else:
                assert value == expected[name][column], (name, column)


def kill_one(names, out, stop, killed):
    """Kill a process of each name in turn, one each time another part is there."""
    for n, name in enumerate(names, 1):
        while len(list(Path(out).glob("part-*.parquet"))) < n and not stop.is_set():
            time.sleep(0.01)
        for process in workers(name)[:1]:
            kill(process)
            killed.append(process.pid)


def check_kills(tmp_path, config, gpus, names):
    """Processes that die cost nothing: the store is that of one stage, and no GPU ever has two encoders."""
    manifest, _ = write_corpus(tmp_path / "c", SESSIONS)
    vaemo.extract(config=config, out=tmp_path / "plain", manifest=manifest, executor="process")
    out = tmp_path / "out"
    stop, killed = threading.Event(), []
    with watching(lambda: len(workers("ray::_Encoder"))) as seen, meanwhile(kill_one, names, out, stop, killed):
        vaemo.extract(config=config, out=str(out), manifest=str(manifest))
        stop.set()
    assert killed
    assert max(seen) == gpus
    assert_same_rows(rows_of(out), rows_of(tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_an_encoder_that_is_killed_costs_nothing(gpus, tmp_path):
    config = CONFIG.replace({"features": {"speech": str(write_speech_model(tmp_path / "wavlm", "wavlm"))}})
    check_kills(tmp_path, config, gpus, ["ray::_Encoder"])


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2], indirect=True)
def test_encoders_and_workers_that_are_killed_again_and_again_cost_nothing(gpus, tmp_path):
    models = {
        "speech": str(write_speech_model(tmp_path / "wavlm", "wavlm")),
        "speaker": str(write_speaker_model(tmp_path / "ecapa", "ecapa")),
    }
    names = 4 * ["ray::_Encoder", "ray::MapWorker"]
    check_kills(tmp_path, CONFIG.replace({"features": models}), gpus, names)


class Loudness:
    """What the driver knows of an encoder; workers could not load it, for the config names a model that is nowhere."""

    name, version, dim, fingerprint, uses_gpu = "loudness", "1", 2, "0" * 16, True


NOWHERE = CONFIG.replace({"features": {"speech": "/nowhere", "speaker": "none"}})


def fragile():
    """The class of an encoder that loud speech kills; its vectors are loudness and the process that measured it."""

    def measure(utterances):
        if max(np.abs(samples).max() for samples in utterances) > 0.9:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([[samples.std(), os.getpid()] for samples in utterances], np.float32)

    class Fragile(encoders._Encoder):
        def _extractor(self, stream):
            return measure

    return Fragile


@pytest.fixture
def fragile_encoders(monkeypatch):
    monkeypatch.setattr(encoders, "_Encoder", fragile())
    monkeypatch.setattr(extraction, "load_extractors", lambda *_, **__: {"speech": Loudness()})


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_an_utterance_that_kills_its_encoder_each_time_is_a_row(gpus, fragile_encoders, tmp_path):
    manifest, rows = write_corpus(tmp_path / "c", SESSIONS)
    make_loud(tmp_path / "c" / "7.wav", 0, 2400)
    vaemo.extract(config=NOWHERE, out=str(tmp_path / "out"), manifest=str(manifest))
    found = rows_of(tmp_path / "out")
    assert len(found) == len(rows)
    bad = {name: (row["status"], row["reason"]) for name, row in found.items() if row["status"] != "ok"}
    assert bad == {"s7-0": ("undecodable", "loudness ended its process on it (2 encoders died)")}
    assert all(0.05 < row["speech"][0] < 0.2 for row in found.values() if row["status"] == "ok")
    # Two GPUs, and one more encoder for each time that one died: twice with its buffer, twice alone.
    assert len({row["speech"][1] for row in found.values() if row["speech"]}) <= gpus + 4


@pytest.mark.slow
def test_encoders_whose_gpu_is_still_to_come_are_not_waited_for(fragile_encoders, tmp_path):
    manifest, rows = write_corpus(tmp_path / "c", SESSIONS)
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    out = tmp_path / "out"
    try:
        # Two nodes may come; one does.
        announce({"CPU": 1, "GPU": 1}, most=2)
        job = threading.Thread(target=vaemo.extract, kwargs={"config": NOWHERE, "out": out, "manifest": manifest})
        job.start()
        job.join(10.0)
        assert job.is_alive()
        assert not list(out.glob("part-*.parquet"))
        nodes.add_node(num_cpus=1, num_gpus=1)
        job.join(120.0)
        assert not job.is_alive()
    finally:
        ray.shutdown()
        nodes.shutdown()
    found = rows_of(out)
    assert len(found) == len(rows)
    assert len({row["speech"][1] for row in found.values()}) == 1


@pytest.mark.slow
def test_a_gpu_that_never_comes_ends_the_job(fragile_encoders, tmp_path, monkeypatch):
    manifest, _ = write_corpus(tmp_path / "c", 2)
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    monkeypatch.setattr(runtime, "NO_PROGRESS_S", 8.0)
    try:
        announce({"GPU": 1}, most=1)
        with pytest.raises(ClusterError, match=r"nothing moved on the cluster for 8 s: .*no GPU, or"):
            vaemo.extract(config=NOWHERE, out=str(tmp_path / "out"), manifest=str(manifest))
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_recordings_are_scored_as_in_one_stage(gpus, tmp_path, monkeypatch):
    (tmp_path / "calls").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "calls" / f"{number}.wav", call(4, seed=number)[0].T, 16000)
    features = FeatureConfig(
        speech=str(write_speech_model(tmp_path / "wavlm", "wavlm")),
        prosody="none",
        speaker=str(write_speaker_model(tmp_path / "ecapa", "ecapa")),
    )
    checkpoint = make_audio_checkpoint(tmp_path / "checkpoint", features=features)
    with watching(lambda: len(workers("ray::_Encoder"))) as seen:
        scored = run(tmp_path / "calls", checkpoint, tmp_path / "out", "ray", roles_unknown=True)
    assert max(seen) == 1
    assert_close(scored, run(tmp_path / "calls", checkpoint, tmp_path / "plain", roles_unknown=True))

    class Careful(InProcess):
        def run(self, parts):
            return super().run(replace(parts, shards=[{**shard, "careful": True} for shard in parts.shards]))

    # Nothing is computed here then, but in a child.
    monkeypatch.setattr(SpeechEncoder, "__call__", None)
    monkeypatch.setattr(SpeakerEncoder, "__call__", None)
    assert_close(scored, run(tmp_path / "calls", checkpoint, tmp_path / "careful", Careful(), roles_unknown=True))


class Answers:
    """Stands in for an encoder's handle: on a node, with what it dies of, as often as that stands there."""

    def __init__(self, where, deadly=()):
        self.where, self.deadly = where, list(deadly)
        self.work, self.busy = [], False
        self.encode = self.node = self

    def options(self, max_task_retries):
        assert max_task_retries == -1
        return self

    async def remote(self, *work):
        await asyncio.sleep(0)
        if not work:
            return self.where
        assert not self.busy
        self.busy = True
        await asyncio.sleep(0.01)
        self.busy = False
        what = work[1]
        self.work.append(what)
        if what in self.deadly:
            self.deadly.remove(what)
            raise ActorDiedError
        return f"{what} on {self.where}"


def dispatch(handles, asked):
    """What a dispatcher returns to those who ask at once, each for something and from a node."""

    async def ask():
        dispatcher = encoders._Dispatcher(handles, 180.0)
        return await asyncio.gather(*(dispatcher.encode("speech", [what], node) for what, node in asked))

    return asyncio.run(ask())


def test_an_encoder_does_one_thing_at_a_time_for_its_own_node_first():
    assert dispatch([Answers("a"), Answers("b")], [("x", "a"), ("y", "a")]) == ["x on a", "y on b"]
    assert dispatch([Answers("a"), Answers("b")], [("x", "b"), ("y", "b")]) == ["x on b", "y on a"]
    handles = [Answers("a"), Answers("b")]
    done = dispatch(handles, [(str(number), "c") for number in range(9)])
    assert [text.split()[0] for text in done] == [str(number) for number in range(9)]
    assert min(len(handle.work) for handle in handles) >= 4


def test_what_ends_its_encoder_is_tried_once_more_and_harms_nobody_else():
    once, twice = Answers("a", deadly=["x"]), Answers("a", deadly=["x", "x"])
    assert dispatch([once], [("x", "a"), ("y", "a")]) == ["x on a", "y on a"]
    assert dispatch([twice], [("x", "a"), ("y", "a")]) == [encoders._DIED, "y on a"]
    assert sorted(twice.work) == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ExtractorError("it has no weights"), ExtractorError, "^it has no weights$"),
        (PermissionError(13, "Permission denied", "/models/a"), StorageError, "Permission denied: '/models/a'"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            ExtractorError,
            r"features.speech with extract.batch_s=60 needs more memory than the GPU has \(CUDA out of memory\). Lower",
        ),
    ],
)
def test_an_encoders_mistake_is_raised_where_its_vectors_are_waited_for(monkeypatch, error, kind, message):
    def fail(utterances):
        raise error

    encoder = encoders._Encoder(CONFIG.to_dict())
    encoder._extractors["speech"] = fail
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    with pytest.raises(kind, match=message):
        encoders._receive(encoder.encode("speech", [np.zeros(16000, np.float32)]), 180.0)


def test_how_encoders_ended_is_told_apart(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    for answer, kind in ((encoders._DIED, ExtractorLost), (encoders._HUNG, ExtractorHung)):
        with pytest.raises(ExtractorLost) as caught:
            encoders._receive(answer, 180.0)
        assert type(caught.value) is kind


def test_a_dispatcher_that_is_lost_is_one_clear_error(monkeypatch):
    def lost(answer):
        raise ActorDiedError

    monkeypatch.setattr(ray, "get", lost)
    with pytest.raises(ClusterError, match=r"hands speech to the encoders has died .* run the same command again"):
        encoders._receive(encoders._DIED, 180.0)


def test_an_encoder_computes_as_its_extractor_does():
    rng = np.random.default_rng(0)
    utterances = [rng.normal(scale=0.1, size=n).astype(np.float32) for n in (8000, 12000)]
    for samples in utterances:
        samples.flags.writeable = False
    found = encoders._Encoder(CONFIG.to_dict()).encode("speech", utterances)
    expected = load_extractors(CONFIG.features)["speech"]([samples.copy() for samples in utterances])
    np.testing.assert_array_equal(found, expected)


def test_without_gpus_or_use_for_them_there_is_no_stage(monkeypatch):
    monkeypatch.setattr(encoders, "total", lambda resource: 0.0)
    with encoders.encoder_stage({"speech": Loudness()}, CONFIG, 8) as stage:
        assert stage == {}
    monkeypatch.setattr(encoders, "total", lambda resource: 4.0)
    with encoders.encoder_stage(load_extractors(CONFIG.features), CONFIG, 8) as stage:
        assert stage == {}
