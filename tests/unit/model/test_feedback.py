"""The parallel solve beyond what S1 and S3 show: when it stops, when it gives up, where `auto` takes it."""

import pytest
import torch
from model_cases import FLOAT32, LANES, STEPS, assert_close, gradients, make_case, random_loss, with_gradients

from vaemo.model import feedback
from vaemo.model.chunk import Diagnostics
from vaemo.model.regressor import SessionRegressor

FULL = torch.full((LANES,), STEPS)


def run(case, gain):
    """A chunk with the feedback's weights scaled by `gain`; prediction, gradients, diagnostics."""
    with torch.no_grad():
        case.model.updater.input.weight[:, case.model.updater.z_dim :] *= gain
    features, state, diagnostics = with_gradients(case.features), with_gradients(case.state), Diagnostics()
    prediction, after = case.run(features=features, state=state, lengths=FULL, diagnostics=diagnostics)
    return prediction, gradients(case, random_loss(prediction, after, FULL), features, state), diagnostics


@pytest.mark.long
@pytest.mark.parametrize("gain", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("feedback_gradient", [True, False])
@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_whatever_the_gain_it_is_the_loop(updater, feedback_gradient, gain):
    found, found_grads, diagnostics = run(
        make_case(updater, "model", parallel_feedback="always", feedback_gradient=feedback_gradient), gain
    )
    expected, expected_grads, _ = run(
        make_case(updater, "model", parallel_feedback="never", feedback_gradient=feedback_gradient), gain
    )
    assert_close(found, expected)
    for name, grad in expected_grads.items():
        assert_close(found_grads[name], grad, 1e-9)
    assert diagnostics.n_passes <= feedback.MAX_PASSES
    if gain == 0:
        assert diagnostics.n_passes == 2  # the second finds that nothing moves
    if gain == 30:
        assert diagnostics.solved_by == "fallback"


def test_without_giving_up_it_is_exact_after_t_passes(monkeypatch):
    monkeypatch.setattr(feedback, "passes_left", lambda *_: 0)
    expected, expected_grads, _ = run(make_case("mamba", "model", parallel_feedback="never"), 30.0)
    monkeypatch.setattr(SessionRegressor, "parallel_passes", lambda model: STEPS + 1)
    found, found_grads, diagnostics = run(make_case("mamba", "model"), 30.0)
    assert diagnostics.solved_by == "parallel"
    assert diagnostics.n_passes > feedback.WORTHWHILE_PASSES
    assert_close(found, expected)
    for name, grad in expected_grads.items():
        assert_close(found_grads[name], grad, 1e-9)


def test_float32_agrees_to_its_tolerance():
    found, _, diagnostics = run(make_case("mamba2", "model", parallel_feedback="always", dtype=torch.float32), 0.3)
    expected, _, _ = run(make_case("mamba2", "model", parallel_feedback="never", dtype=torch.float32), 0.3)
    assert diagnostics.solved_by == "parallel"
    assert_close(found, expected, FLOAT32)


@pytest.mark.parametrize(
    ("change", "before", "left"), [(1e-3, 1e-2, 3), (1e-5, 1e-1, 0.25), (0.5, 0.5, float("inf")), (2, 1, float("inf"))]
)
def test_the_rate_of_convergence_tells_how_many_passes_are_left(change, before, left):
    assert feedback.passes_left(change, before, 1e-6) == pytest.approx(left)


@pytest.mark.parametrize(
    ("updater", "choice", "feedback_gradient", "solved_by"),
    [
        ("mamba2", "auto", False, "parallel"),
        ("mamba2", "auto", True, "loop"),
        ("mamba", "auto", False, "parallel"),
        ("mamba", "auto", True, "loop"),
        ("gru", "auto", False, "loop"),
        ("mamba", "always", True, "parallel"),
        ("mamba2", "never", False, "loop"),
    ],
)
def test_auto_is_parallel_where_it_is_faster(updater, choice, feedback_gradient, solved_by):
    case = make_case(updater, "model", parallel_feedback=choice, feedback_gradient=feedback_gradient)
    assert run(case, 0.01)[2].solved_by == solved_by


def test_beside_a_kernel_auto_is_parallel(monkeypatch):
    monkeypatch.setattr(SessionRegressor, "scan_used", lambda model, device: "kernel")
    assert make_case("mamba", "model").model.parallel_passes() == feedback.MAX_PASSES


def test_dropout_masks_hold_over_all_passes():
    cases = [make_case("mamba2", "model", parallel_feedback=choice, dropout=0.5) for choice in ("always", "never")]
    masks = cases[0].model.draw_dropout(LANES, STEPS, torch.Generator().manual_seed(0))
    found, expected = (case.run(dropout=masks)[0] for case in cases)
    assert_close(found, expected)
