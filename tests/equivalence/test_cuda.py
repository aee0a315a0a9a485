"""The session model and its training on CUDA give what they give on a CPU."""

import numpy as np
import pytest
import torch
from model_cases import FEEDBACKS, UPDATERS, gradients, make_case, outputs_and_gradients, random_loss, with_gradients

from vaemo.config import Config
from vaemo.model.conv import conv_chunk
from vaemo.model.mamba2 import ssd_kernel, ssd_reference
from vaemo.model.scan import resolve_scan, scan_chunk, scan_kernel, scan_reference, why_no_kernel
from vaemo.testing import linear_world
from vaemo.training.trainer import Trainer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FLOAT64 = 1e-9
"""Sums in another order."""
FLOAT32 = 1e-4
"""Likewise, in float32 and without TF32: outputs and gradients relative to the largest of a tensor."""
TF32 = 5e-3
"""Products of numbers with 11 bits, added up in float32."""
COURSE = 2e-3
"""Losses and CCC over some epochs of optimiser steps in float32."""

L, T, E, N, G, P = 16, 30, 256, 16, 8, 32


@pytest.fixture
def kernels():
    """Skips where mamba-ssm's kernels are not to be had."""
    if missing := why_no_kernel(DEVICE, "mamba"):
        pytest.skip(missing)


@pytest.fixture(params=["chunk", "kernel"])
def form(request):
    """A form of the scan that this machine has."""
    if request.param == "kernel":
        request.getfixturevalue("kernels")
    return request.param


def assert_same(found, expected, tolerance):
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[1].numel()]
    assert pairs
    for pair in pairs:
        ours, theirs = (tensor.detach().cpu().double() for tensor in pair)
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("updater", UPDATERS)
def test_a_chunk(updater, feedback):
    results = []
    for device in ("cpu", DEVICE):
        case = make_case(updater, feedback, scan="auto" if device == "cpu" else "chunk")
        case.model.to(device)
        features, state = with_gradients(case.features.to(device)), with_gradients(case.state.to(device))
        observed = None if case.observed is None else case.observed.to(device)
        prediction, after = case.model(features, state, case.lengths.to(device), observed=observed)
        on_cpu = after.map(lambda x: x.to("cpu"))
        found = gradients(case, random_loss(prediction.cpu(), on_cpu, case.lengths), features, state)
        results.append([prediction, *on_cpu.tensors().values(), *found.values()])
    assert_same(results[1], results[0], FLOAT64)


def scan_inputs(*shapes):
    torch.manual_seed(0)
    x, A, h = shapes
    inputs = [torch.randn(x), torch.rand(x[:3]) * 0.2, -torch.rand(A) * 8]
    inputs[1][1, T // 2 :] = 0
    inputs += [torch.randn(L, T, N), torch.randn(L, T, N), torch.randn(h)]
    return [tensor.to(DEVICE).requires_grad_() for tensor in inputs]


def test_scans_of_mamba(form):
    scan = {"chunk": scan_chunk, "kernel": scan_kernel}[form]
    inputs = scan_inputs((L, T, E), (N, E), (L, N, E))
    expected = outputs_and_gradients(scan_reference, inputs)
    assert_same(outputs_and_gradients(scan, inputs), expected, FLOAT32)
    with torch.no_grad():
        assert_same(scan(*inputs), expected[:2], FLOAT32)


def test_the_kernel_of_mamba2(kernels):
    inputs = scan_inputs((L, T, G, P), (G,), (L, G, P, N))
    expected = outputs_and_gradients(ssd_reference, inputs)
    assert_same(outputs_and_gradients(ssd_kernel, inputs), expected, TF32)


def test_the_convolution(kernels):
    pytest.importorskip("causal_conv1d")
    torch.manual_seed(0)
    inputs = [torch.randn(*shape).to(DEVICE).requires_grad_() for shape in ((L, T, E), (L, 3, E), (4, E), (E,))]
    valid = (torch.arange(T) < torch.randint(0, T + 1, (L, 1))).to(DEVICE)
    found, expected = (
        outputs_and_gradients(lambda *x, kernel=kernel: conv_chunk(*x, valid, kernel=kernel), inputs)
        for kernel in (True, False)
    )
    assert_same(found, expected, FLOAT32)


@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_auto_takes_the_kernels(kernels, updater):
    assert resolve_scan("auto", DEVICE, updater) == "kernel"


@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_training(updater, form):
    world = linear_world(5, sessions=(40, 12, 2), lengths=(20, 60), features=8, noise=2.0)
    small = [f"model.updater={updater}", "model.d_c=16", "train.epochs=3", "train.min_labelled=32"]
    courses = []
    for device, scan in (("cpu", "auto"), (DEVICE, form)):
        config = Config.load("default", [*small, f"model.scan={scan}"])
        trainer = Trainer(world.sessions("train"), world.sessions("dev"), config, device=device)
        courses.append([[line["train_loss"], line["dev_ccc_avg"]] for line in trainer])
    np.testing.assert_allclose(courses[1], courses[0], atol=COURSE)
