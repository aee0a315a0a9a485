"""What the model costs: ratios of medians within one run, so that they hold on a busy machine.

Each line says what was timed. Sizes are the model's defaults: d_model 128, d_state 16, d_conv 4, expand 2.
"""

import statistics
import time

import mamba_references as references
import pytest
import torch
from model_cases import make_model
from speaker_world import biased_world

from vaemo.config import ModelConfig, PersonalizeConfig, UpdaterConfig
from vaemo.model.chunk import Diagnostics
from vaemo.model.mamba import Mamba
from vaemo.model.mamba2 import Mamba2
from vaemo.model.regressor import SessionRegressor
from vaemo.model.scan import scan_chunk, scan_compiled
from vaemo.model.streams import Streams
from vaemo.personalize import personalize

pytestmark = [pytest.mark.perf, pytest.mark.timeout(1200)]

D_MODEL, D_STATE, E = 128, 16, 256


@pytest.fixture(autouse=True)
def one_thread():
    """A second thread helps a quiet machine by a quarter; on a busy one the threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def median_s(*runs, repeats=7):
    """Median seconds of each function, measured in turns so that all see the same machine."""
    for run in runs:
        run()
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


@pytest.mark.parametrize("steps", [30, 50, 200])
def test_the_mamba_block_against_transformers_forward_and_backward(steps):
    torch.manual_seed(0)
    theirs, ours, second = references.hf_mamba_mixer(D_MODEL, D_STATE), Mamba(D_MODEL), Mamba2(D_MODEL)
    ours.load_state_dict(theirs.state_dict())
    x, valid = torch.randn(32, steps, D_MODEL), torch.ones(32, steps, dtype=torch.bool)

    def ours_of(block):
        memory = tuple(torch.zeros(32, *shape) for shape in block.memory_shapes().values())
        return lambda: block(x, memory, valid, block.constants())[0].square().sum().backward()

    a, b, c = median_s(ours_of(ours), lambda: theirs(x).square().sum().backward(), ours_of(second), repeats=3)
    print(
        f"\nblock, B 32, T {steps}: Mamba-1 {a * 1e3:.0f} ms, {b / a:.1f} times faster than MambaMixer "
        f"({b * 1e3:.0f} ms); Mamba-2 {c * 1e3:.0f} ms"
    )
    assert b / a >= 3


@pytest.mark.parametrize("steps", [30, 50, 200])
def test_the_scan_against_selective_scan_ref_forward_and_backward(steps):
    torch.manual_seed(0)
    x, B, C = torch.randn(32, steps, E), torch.randn(32, steps, D_STATE), torch.randn(32, steps, D_STATE)
    delta, A = torch.rand(32, steps, E) * 0.1, -torch.rand(D_STATE, E) * 8
    inputs = [tensor.requires_grad_() for tensor in (x, delta, A, B, C, torch.zeros(32, D_STATE, E))]
    first = [t.detach().transpose(-1, -2).contiguous().requires_grad_() for t in (x, delta, A, B, C)]
    a, b, c = median_s(
        lambda: scan_compiled(*inputs)[0].square().sum().backward(),
        lambda: references.interface.selective_scan_ref(*first).square().sum().backward(),
        lambda: scan_chunk(*inputs)[0].square().sum().backward(),
        repeats=5,
    )
    print(
        f"\nscan, B 32, T {steps}: {a * 1e3:.1f} ms, {b / a:.0f} times faster than selective_scan_ref, {c / a:.1f} "
        "times faster than in plain PyTorch"
    )
    assert b / a >= 10
    assert c / a >= 2


@pytest.mark.parametrize("lanes", [1, 64, 1024])
def test_a_step_against_the_cached_step_of_transformers(lanes):
    torch.manual_seed(0)
    theirs, ours = references.hf_mamba_mixer(D_MODEL, D_STATE), Mamba(D_MODEL)
    ours.load_state_dict(theirs.state_dict())
    x, constants = torch.randn(lanes, D_MODEL), ours.constants()
    cache = references.cache_of(theirs)
    memory = tuple(torch.zeros(lanes, *shape) for shape in ours.memory_shapes().values())
    with torch.no_grad():
        theirs(x[:, None].expand(-1, 4, -1), cache_params=cache)

    def step():
        with torch.no_grad():
            for _ in range(10):
                ours.step(x, memory, None, constants)

    def cached():
        with torch.no_grad():
            for _ in range(10):
                theirs(x[:, None], cache_params=cache)

    a, b = median_s(step, cached)
    print(
        f"\nstep of the block, {lanes} lanes: {a * 1e5 / lanes:.2f} us per utterance, "
        f"{b / a:.1f} times faster than MambaMixer with its cache"
    )
    assert b / a >= 1


def trained(updater, feedback, steps=120):
    """A model with default sizes that has learned an AR(1) latent seen through noise, in one feedback mode."""
    torch.manual_seed(0)
    lanes, T = 32, 50
    latent = [torch.randn(lanes, 2)]
    for _ in range(T - 1):
        latent.append(0.95 * latent[-1] + 0.31 * torch.randn(lanes, 2))
    x = torch.stack(latent, 1)
    labels, features = torch.sigmoid(x), Streams(speech=x @ torch.randn(2, 40) + 7 * torch.randn(lanes, T, 40))
    model = SessionRegressor(ModelConfig(updater=updater, feedback=feedback), UpdaterConfig(), {"speech": 40})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for number in range(steps):
        p = {"label": 1.0, "model": 0.0, "scheduled": 1 - number / steps}[feedback]
        observed = torch.where(torch.rand(lanes, T, 1) < p, labels, torch.nan)
        prediction, _ = model(features, model.fresh_state(lanes), torch.full((lanes,), T), observed=observed)
        optimizer.zero_grad()
        (prediction - labels).square().mean().backward()
        optimizer.step()
    return model, features


@pytest.mark.parametrize("feedback", ["label", "scheduled", "model"])
@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_parallel_feedback_against_the_loop(updater, feedback):
    model, features = trained(updater, feedback)
    for gradient in (True, False):
        for lanes, T in ((16, 30), (32, 50)):
            given, lengths = features.select(slice(lanes)).steps(0, T), torch.full((lanes,), T)
            variants, runs = {}, []
            for choice in ("never", "always", "auto"):
                config = ModelConfig(
                    updater=updater, feedback=feedback, parallel_feedback=choice, feedback_gradient=gradient
                )
                variant = SessionRegressor(config, UpdaterConfig(), {"speech": 40})
                variant.load_state_dict(model.state_dict())
                variants[choice] = Diagnostics()

                def run(variant=variant, diagnostics=variants[choice], given=given, lengths=lengths, lanes=lanes):
                    prediction, _ = variant(given, variant.fresh_state(lanes), lengths, diagnostics=diagnostics)
                    prediction.square().sum().backward()

                runs.append(run)
            loop, parallel, auto = median_s(*runs, repeats=5)
            print(
                f"\n{updater} trained with {feedback}, L {lanes}, T {T}, gradient through feedback {gradient}: "
                f"loop {loop * 1e3:.0f} ms, always {parallel * 1e3:.0f} ms ({variants['always'].solved_by}, "
                f"{variants['always'].n_passes} passes), auto {auto * 1e3:.0f} ms ({variants['auto'].solved_by})"
            )
            assert auto < 1.3 * loop


def test_personalising_many_speakers_at_once_against_one_after_the_other():
    model = make_model({"film_hidden": 256}, {"d_model": 32}, dims={"speech": 80, "speaker": 80}, dtype=torch.float32)
    sessions = biased_world(1000, seed=0, utterances=12, dim=80, speaker_dim=80)
    config = PersonalizeConfig(optim_steps=20)
    start = time.perf_counter()
    personalize(model, sessions, config)
    together = (time.perf_counter() - start) / len(sessions)
    start = time.perf_counter()
    for session in sessions[:100]:
        personalize(model, [session], config)
    alone = (time.perf_counter() - start) / 100
    print(
        f"\npersonalising 1,000 speakers: {together * 1e3:.1f} ms each, {alone / together:.1f} times faster than alone"
    )
    assert alone / together >= 3
