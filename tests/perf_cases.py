"""What the benchmarks share: the sizes of WavLM-base-plus, speech to encode, sessions to train on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from vaemo.data.sessions import Session

SPEECH_S = 60.0 * float(os.environ.get("VAEMO_BENCH_MINUTES", "20"))
"""Speech to encode."""

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "conv_dim": (512,) * 7,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
"""The sizes of WavLM-base-plus."""

DIMS = {"speech": 768, "prosody": 88, "speaker": 192}
"""Features as wide as WavLM-base, eGeMAPS and ECAPA."""


def in_a_process(code, *arguments, **environment):
    """What Python code prints last, as JSON, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def noise_utterances(seconds, seed=0):
    rng = np.random.default_rng(seed)
    lengths = []
    while sum(lengths) < seconds:
        lengths.append(rng.uniform(0.5, 12.0))
    return [rng.normal(scale=0.1, size=int(length * 16000)).astype(np.float32) for length in lengths]


def flops_per_second(config):
    """Of one second of speech: convolutions, projection and transformer, attention's own products left out."""
    rate, channels, products = 16000.0, 1, 0.0
    for kernel, stride, width in zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True):
        rate /= stride
        products += rate * kernel * channels * width
        channels = width
    hidden = config.hidden_size
    layer = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    return 2 * (products + rate * (channels * hidden + config.num_hidden_layers * layer))


def sessions(n, low, high, dims, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for number in range(n):
        steps = int(random.integers(low, high + 1))
        nothing = np.full((steps, 2), np.nan, np.float32)
        labels = np.clip(0.5 + 0.2 * np.cumsum(random.standard_normal((steps, 2)), 0) / 5, 0, 1).astype(np.float32)
        streams = {name: random.standard_normal((steps, dim)).astype(np.float32) for name, dim in dims.items()}
        ids = np.array([f"{number}-{step}" for step in range(steps)], object)
        made.append(
            Session(str(number), np.arange(steps), ids, ids, None, None, streams, labels, nothing, nothing[:, 0])
        )
    return made
