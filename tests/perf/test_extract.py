"""What extraction costs: against plain functions, against naive batches, and in memory.

Every figure is a ratio within one run on this machine, and is printed.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile
import torch
from perf_cases import BASE, SPEECH_S, noise_utterances
from processes import memory, watching
from speech_cases import SENTENCES, VOICES, sentence
from tiny_models import write_speech_model

from vaemo.cluster import encoders
from vaemo.cluster.runtime import connect, run_shards
from vaemo.config import Config, FeatureConfig
from vaemo.data.manifest import write_manifest
from vaemo.features.speech import SpeechEncoder, fitting_batch_s
from vaemo.parts.index import Index
from vaemo.pipeline import extraction
from vaemo.pipeline.sources import ManifestSource

pytestmark = [pytest.mark.perf, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]


def write_recordings(folder, seconds, each_s):
    """Recordings of sentences with pauses; rows of a manifest."""
    import pyarrow as pa

    folder.mkdir()
    rows, total, index = [], 0.0, 0
    while total < seconds:
        pieces, at = [], 0.0
        name = f"{len(list(folder.iterdir()))}.wav"
        while at < each_s:
            said = sentence(index % len(SENTENCES), VOICES[index % 2])
            said_s = len(said) / 16000
            place = {"start_s": at, "end_s": at + said_s, "audio_path": name}
            rows.append({"utt_id": f"u{index}", "session_id": name, "speaker_id": "p", **place})
            pieces += [said, np.zeros(12_000, np.float32)]
            at += said_s + 0.75
            total += said_s
            index += 1
        soundfile.write(folder / name, np.concatenate(pieces), 16000)
    write_manifest(folder / "m.parquet", pa.Table.from_pylist(rows))
    return total


class TimedWorker:
    """Extracts shards as a job does, and says when, at what cost in CPU time, and in which process."""

    def __init__(self, source, config, out):
        torch.set_num_threads(1)
        self.worker = extraction.ExtractWorker(source, config, out)

    def __call__(self, shard):
        begin, cpu_s = time.time(), time.process_time()
        self.worker(shard)
        return {"pid": os.getpid(), "begin": begin, "end": time.time(), "cpu_s": time.process_time() - cpu_s}


_worker = None


def _make_worker(source, config, out):
    global _worker
    # Ray's workers run at niceness 15 unless told otherwise: on a busy machine it would be priorities that compete.
    os.nice(int(os.environ.get("RAY_worker_niceness", "15")))  # noqa: SIM112 - as Ray calls it
    _worker = TimedWorker(source, config, out)


def _call_worker(shard):
    return _worker(shard)


def in_pool(arguments, shards):
    with multiprocessing.get_context("spawn").Pool(2, _make_worker, tuple(arguments.values())) as pool:
        return list(pool.imap_unordered(_call_worker, shards))


def on_cluster(arguments, shards):
    connect()
    return list(run_shards(TimedWorker, arguments, shards))


@pytest.mark.ray
def test_the_cluster_is_nearly_as_fast_as_a_plain_pool(local_ray, tmp_path):
    """From the first shard to the last: what starts the processes, Ray's or Python's, is printed and left out."""
    seconds = write_recordings(tmp_path / "c", SPEECH_S, 60.0)
    config = Config.load("default", ["extract.shard_utterances=32"])
    source = ManifestSource(str(tmp_path / "c" / "m.parquet"))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rates = {in_pool: [], on_cluster: []}
    for run in (in_pool, on_cluster, on_cluster, in_pool):
        out = str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        arguments = {"source": source, "config": config.to_dict(), "out": out}
        work = extraction.plan_extraction(source, source.list(), Index(out), config)
        start = time.time()
        calls = run(arguments, work.shards)
        begin, end = min(call["begin"] for call in calls), max(call["end"] for call in calls)
        rates[run].append(seconds / (end - begin))
        working_s = sum(call["end"] - call["begin"] for call in calls) / len({call["pid"] for call in calls})
        print(
            f"\n{run.__name__}: {rates[run][-1]:.0f} x real time, {sum(call['cpu_s'] for call in calls):.1f} s of CPU, "
            f"workers busy {working_s / (end - begin):.0%}; {begin - start:.1f} s to the first shard"
        )
    ratio = max(rates[on_cluster]) / max(rates[in_pool])
    print(f"extraction of {seconds / 60:.0f} min of speech, cluster / pool {ratio:.2f}")
    assert ratio >= 0.8


def naive_batches(model, utterances, device):
    """Batches of 8 in the order of the corpus, padded to the longest."""
    with torch.inference_mode():
        for first in range(0, len(utterances), 8):
            batch = [torch.from_numpy(samples) for samples in utterances[first : first + 8]]
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            lengths = torch.tensor([len(samples) for samples in batch])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long().to(device)
            model(padded, attention_mask=mask).last_hidden_state.mean(1).cpu()


def test_the_encoder_beats_naive_batches(tmp_path):
    import transformers

    folder = write_speech_model(tmp_path / "base", "wavlm", **BASE)
    utterances = noise_utterances(SPEECH_S)
    encoder = SpeechEncoder(FeatureConfig(speech=str(folder)), batch_s=fitting_batch_s(60.0))
    model = transformers.WavLMModel.from_pretrained(folder).eval().to(encoder._device)
    encoder(utterances[:1])
    spent = {"ours": 0.0, "naive": 0.0}
    # In alternation, so that what else the machine does falls on both.
    for first in range(0, len(utterances), 16):
        some = utterances[first : first + 16]
        start = time.process_time()
        encoder(some)
        spent["ours"] += time.process_time() - start
        start = time.process_time()
        naive_batches(model, some, encoder._device)
        spent["naive"] += time.process_time() - start
    total = sum(map(len, utterances)) / 16000
    ratio = spent["naive"] / spent["ours"]
    rates = {name: f"{total / seconds:.1f}" for name, seconds in spent.items()}
    print(f"\nencoder, seconds of speech per second of CPU: {rates}; ours / naive {ratio:.2f}")
    assert ratio >= 1.8


def peak_of_job(folder, out):
    job = subprocess.Popen(
        # One recording a part: an hour keeps every worker busy, as four hours do.
        [
            *(sys.executable, "jobs/extract.py", "--input", folder, "--out", out),
            *("--set", "features.prosody=none", "--set", "extract.shard_recordings=1"),
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
    )
    with watching(lambda: memory(job.pid), every_s=0.5) as seen:
        assert job.wait() == 0
    return max(seen)


@pytest.mark.ray
def test_memory_does_not_grow_with_the_archive(tmp_path):
    write_recordings(tmp_path / "one", 450.0, 600.0)
    recording = next((tmp_path / "one").glob("*.wav"))
    peaks = {}
    for hours in (1, 4):
        folder = tmp_path / f"{hours}h"
        folder.mkdir()
        for index in range(6 * hours):
            (folder / f"{index}.wav").symlink_to(recording)
        peaks[hours] = peak_of_job(folder, tmp_path / f"out{hours}") / 2**30
    print(f"\npeak memory (PSS of all processes) in GiB by hours of audio: {peaks}; ratio {peaks[4] / peaks[1]:.2f}")
    assert peaks[4] <= 1.2 * peaks[1]


def idle_encoder():
    """The class of an encoder that computes nothing, made here so that it travels by value."""

    class Idle(encoders._Encoder):
        def encode(self, stream, utterances):
            return np.zeros((len(utterances), 768), np.float32)

    return Idle


class Known:
    """What the driver knows of it."""

    name, version, dim, fingerprint, uses_gpu = "idle", "1", 768, "0" * 16, True


@pytest.mark.ray
def test_the_way_to_an_encoder_is_short(monkeypatch):
    """Ten minutes of speech to an encoder that does nothing, and vectors back, one buffer after the other."""
    ray.shutdown()
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    monkeypatch.setattr(encoders, "_Encoder", idle_encoder())
    utterances = noise_utterances(600.0)
    spent_s = []
    try:
        with encoders.encoder_stage({"speech": Known()}, Config(), 1) as stage:
            for _ in range(12):
                start = time.monotonic()
                assert stage["speech"](utterances).shape == (len(utterances), 768)
                spent_s.append(time.monotonic() - start)
    finally:
        ray.shutdown()
    median_s = float(np.median(spent_s[2:]))
    print(f"\nto an encoder and back: {median_s * 1000:.0f} ms for 600 s of speech, {600 / median_s:.0f} x real time")
    assert 600 / median_s > 2000
