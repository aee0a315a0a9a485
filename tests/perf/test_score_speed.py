"""How fast a store is replayed, and recordings are scored.

Rates are those of the running pool, between the ends of parts: Ray's start and the loading of models are excluded.
Every rate is the best of several within one run, and ratios are taken of those.
"""

import json
import multiprocessing
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring_cases import make_audio_checkpoint, make_checkpoint, run, write_calls
from timed import Timed

import vaemo
from vaemo import files
from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.features import load_extractors
from vaemo.model.checkpoint import load_checkpoint
from vaemo.model.streams import Streams
from vaemo.pipeline.sources import RecordingsSource, Tools
from vaemo.scores import read_utterances
from vaemo.scoring.roles import RoleRules
from vaemo.scoring.table import score_table
from vaemo.trust.calibration import CALIB_SPLIT, calibrate
from vaemo.trust.novelty import Novelty
from vaemo.units import DIMENSIONS, LabelScale

pytestmark = [pytest.mark.perf, pytest.mark.ray]

DIMS = {"speech": 768, "prosody": 88, "speaker": 192}
SESSIONS, STEPS, PARTS = 96, 50, 12


def write_wide_store(path, parts=PARTS):
    """Sessions with the dimensions of WavLM, eGeMAPS and ECAPA."""
    random = np.random.default_rng(0)
    for part in range(parts):
        n = SESSIONS * STEPS
        columns = {
            "session_id": [f"s{part}-{row // STEPS}" for row in range(n)],
            "utt_id": [f"u{part}-{row}" for row in range(n)],
        }
        for stream, dim in DIMS.items():
            vectors = random.standard_normal(n * dim).astype(np.float32)
            columns[stream] = pa.FixedSizeListArray.from_arrays(pa.array(vectors), dim)
        files.write_parquet_whole(files.join(str(path), f"part-{part:03d}.parquet"), pa.table(columns))
    return str(path)


def write_trust(checkpoint, fingerprint):
    """Give a checkpoint a description of training data as wide as the store's, and a calibration that knows signs."""
    random = np.random.default_rng(1)
    features = {name: random.standard_normal((6000, dim)).astype(np.float32) for name, dim in DIMS.items()}
    n = np.arange(6000)
    table = pa.table({"session_id": [f"s{k // 30}" for k in n], "speaker_id": [f"p{k // 30}" for k in n]})
    table = table.append_column("role", pa.nulls(6000, pa.string()))
    novelty = Novelty.of(features, {})
    unusual, _ = novelty.unusual(features, {})
    novelty = novelty.referred(unusual, table, from_dev=False)
    novelty.write(checkpoint)
    for name in (*DIMENSIONS, "label_valence", "label_arousal"):
        table = table.append_column(name, pa.array(random.random(6000)))
    for name, values in (("novelty", novelty.novelty(unusual)), ("start_s", 5.0 * n), ("end_s", 5.0 * n + 4)):
        table = table.append_column(name, pa.array(values))
    calibrate(table, table, [fingerprint], CALIB_SPLIT, LabelScale(0, 1)).write(checkpoint)


def test_intervals_and_novelty_cost_little(tmp_path, capsys):
    """CPU time of scoring a store in this process, reading and writing included, the best of each, taken in turn."""
    plain, trusted = (make_checkpoint(tmp_path / name, config={}, dims=DIMS) for name in ("plain", "trusted"))
    write_trust(trusted, load_checkpoint(trusted).fingerprint)
    store = write_wide_store(tmp_path / "store", parts=8)
    found = {plain: [], trusted: []}
    for turn in range(5):
        for checkpoint, times in found.items():
            start = time.process_time()
            vaemo.score(input=store, checkpoint=checkpoint, out=f"{checkpoint}-scores-{turn}", executor="process")
            times.append(time.process_time() - start)
    table = read_utterances(f"{trusted}-scores-0")
    assert table["valence_low"].null_count == table["novelty"].null_count == 0
    without, with_trust = (min(times) for times in found.values())
    n = table.num_rows
    with capsys.disabled():
        print(
            f"\nscoring a store: {1e6 * without / n:.1f} us an utterance, with intervals and novelty "
            f"{1e6 * with_trust / n:.1f} ({100 * (with_trust / without - 1):+.1f} %)"
        )
    assert with_trust < 1.05 * without


def steps_per_second(model, threads, n=400):
    """`SessionRegressor.step` at one lane in a loop."""
    tensors = {stream: torch.randn(1, dim) for stream, dim in DIMS.items()}
    tensors |= {past: torch.ones(1, DIMS[past.partition(".")[2]] + 1) for past in model.pasts}
    features = Streams.of(tensors)
    state, before = model.fresh_state(1), torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for measured in (False, True):
            start = time.perf_counter()
            for _ in range(n if measured else 20):
                _, state = model.step(features, state)
    torch.set_num_threads(before)
    return n / (time.perf_counter() - start)


def test_replay_of_a_store_against_a_loop_of_steps(local_ray, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config={}, dims=DIMS)
    store = write_wide_store(tmp_path / "store")
    model = load_checkpoint(checkpoint).model.eval()
    loops = [steps_per_second(model, threads) for threads in (1, torch.get_num_threads()) for _ in range(3)]
    timed = Timed()
    run(store, checkpoint, tmp_path / "out", timed, score={"lanes": 32, "chunk": 64, "shard_sessions": 64})
    loops += [steps_per_second(model, 1) for _ in range(3)]
    replay, loop = timed.rate() * STEPS, max(loops)
    with capsys.disabled():
        print(f"\nreplay {replay:,.0f} utterances/s, step at one lane {loop:,.0f}/s: {replay / loop:.1f} times")
    assert replay > 20 * loop


def score_in_pool(arguments):
    """One recording scored by the same functions, in a process of a pool."""
    folder, name, checkpoint = arguments
    torch.set_num_threads(1)
    config = Config().replace({"features": load_checkpoint(checkpoint).config.to_dict()["features"]})
    tools = TOOLS.setdefault(
        "tools", Tools(load_extractors(config.features), config, Decoder(), RoleRules(score_unknown=True))
    )
    model = TOOLS.setdefault("model", load_checkpoint(checkpoint).model.eval())
    described = {"recordings": json.dumps([[name, f"{folder}/{name}"]])}
    table = RecordingsSource(folder).read(described, tools).table
    score_table(tools.rules.judge(table)[0], [model], lanes=4, chunk=16)
    return time.perf_counter()


TOOLS: dict = {}


def test_recordings_against_a_pool_of_processes(local_ray, tmp_path, capsys):
    names, _ = write_calls(tmp_path / "calls", utterances=12, formats=("wav", "flac") * 12)
    checkpoint = make_audio_checkpoint(tmp_path / "checkpoint")
    work = [(str(tmp_path / "calls"), name, checkpoint) for name in names]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        ends = list(pool.imap_unordered(score_in_pool, work))
    ends, half = sorted(ends), len(ends) // 2
    in_pool = max(half / (ends[first + half] - ends[first]) for first in range(len(ends) - half))
    timed = Timed()
    run(tmp_path / "calls", checkpoint, tmp_path / "out", timed, roles_unknown=True, extract={"shard_recordings": 1})
    rate = timed.rate()
    with capsys.disabled():
        print(f"\non Ray {rate:.2f} recordings/s, in a pool of 2 processes {in_pool:.2f}/s: {rate / in_pool:.2f}")
    assert rate > 0.8 * in_pool
