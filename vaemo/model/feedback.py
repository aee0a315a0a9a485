"""A chunk whose predictions are fed back: step by step, or by passes over the whole chunk.

The prediction of an utterance is an input of the next one. That makes a chunk sequential, but the feedback is a few
numbers and strictly causal: feed each pass's predictions to the next pass and, after k passes, the first k steps are
exact. Where the model does not copy its feedback a few passes reach rounding error.

The gradient of the parallel form is the loop's. With fed = shift(prediction) and J the Jacobian of the chunk's
predictions with respect to what is fed, the gradient v of the predictions solves v = g + shift(J)^T v, which is
nilpotent: passes of the chunk's own backward solve it, exactly after T.

Letters: L lanes, T steps, K targets, F of them fed back.

Source:
    Song et al. (2021), "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving" (Jacobi passes);
    Bai, Kolter and Koltun (2019), "Deep Equilibrium Models" (the gradient at a fixed point).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaemo.model.chunk import Carried, Chunk, Diagnostics, Weights, replace_observed

if TYPE_CHECKING:
    from vaemo.model.regressor import SessionRegressor

MAX_PASSES = 8
"""Passes after which the loop takes over."""

WORTHWHILE_PASSES = 5
"""Passes up to which a Mamba chunk on a CPU is solved faster than by the loop, without a gradient through the
feedback; with one the backward makes as many passes again, and the loop is as fast (`tests/perf/test_model.py`)."""

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Largest change of a prediction, on the label range, that counts as converged."""

Fed = tuple[Tensor, Tensor]
"""Values (..., F) and whether they were observed (..., F)."""


def run_known(
    model: SessionRegressor, chunk: Chunk, weights: Weights, carried: Carried, first: Fed, diagnostics: Diagnostics
) -> tuple[Tensor, Carried]:
    """Predictions (L, T, K) and what is carried on, where no prediction of this chunk is fed back within it."""
    diagnostics.solved_by = "known"
    if not model.has_feedback:
        return model.evaluate(chunk, weights, carried, None, diagnostics)
    unknown = chunk.to_head.new_zeros(*chunk.valid.shape, chunk.n_fed)
    return model.evaluate(chunk, weights, carried, _shifted(unknown, chunk, first), diagnostics)


def run_loop(
    model: SessionRegressor, chunk: Chunk, weights: Weights, carried: Carried, first: Fed, diagnostics: Diagnostics
) -> tuple[Tensor, Carried]:
    """Predictions (L, T, K) and what is carried on, step by step: the definition, and what scoring uses."""
    diagnostics.solved_by = diagnostics.solved_by or "loop"
    steps = _unbound(chunk)
    fed, predictions, states = first, [], []
    for t, (to_updater, to_head, valid, observed, *dropout) in enumerate(steps):
        valid = None if t < chunk.shortest else valid
        prediction, carried = model.advance(to_updater, to_head, weights, carried, fed, valid, dropout)
        fed = replace_observed(prediction, observed, chunk.n_fed)
        predictions.append(prediction)
        states.append(carried.c.detach())
    diagnostics.c = torch.stack(states, 1)
    return torch.stack(predictions, 1), carried


def _unbound(chunk: Chunk) -> list[tuple]:
    """The chunk's tensors step by step; unbind, since the gradient of T slices would cost T full tensors."""
    masks = (None, None) if chunk.dropout is None else (chunk.dropout.updater, chunk.dropout.head)
    tensors = (chunk.to_updater, chunk.to_head, chunk.valid, chunk.observed, *masks)
    nothing = [None] * chunk.n_steps
    return list(zip(*(nothing if tensor is None else tensor.unbind(1) for tensor in tensors), strict=True))


def run_parallel(
    model: SessionRegressor, chunk: Chunk, weights: Weights, carried: Carried, first: Fed, diagnostics: Diagnostics
) -> tuple[Tensor, Carried]:
    """Predictions (L, T, K) and what is carried on, by passes over the whole chunk; the loop's, with its gradients."""
    found = _solve(model, chunk, weights, carried, first, model.parallel_passes(), diagnostics)
    if found is None:
        diagnostics.solved_by = "fallback"
        return run_loop(model, chunk, weights, carried, first, diagnostics)
    diagnostics.solved_by = "parallel"
    leaf = found.requires_grad_(model.feedback_gradient)
    prediction, after = model.evaluate(chunk, weights, carried, _shifted(leaf, chunk, first), diagnostics)
    if not model.feedback_gradient:
        return prediction, after
    outputs = [prediction, after.c, *(tensor for layer in after.memory for tensor in layer)]
    prediction, c, *tensors = _CloseFeedback.apply(leaf, *outputs)
    rest = iter(tensors)
    return prediction, Carried([tuple(next(rest) for _ in layer) for layer in after.memory], c)


def _solve(
    model: SessionRegressor,
    chunk: Chunk,
    weights: Weights,
    carried: Carried,
    first: Fed,
    limit: int,
    diagnostics: Diagnostics,
) -> Tensor | None:
    """Predictions that reproduce themselves when fed back, (L, T, K); None if `limit` passes do not find them.

    Stops early if the rate of convergence shows that `limit` passes will not be enough.
    """
    tolerance = TOLERANCE[chunk.to_head.dtype]
    before = math.inf
    with torch.no_grad():
        guess = first[0][:, None].expand(*chunk.valid.shape, chunk.n_fed)
        for n_passes in range(1, limit + 1):
            prediction, _ = model.evaluate(chunk, weights, carried, _shifted(guess, chunk, first))
            diagnostics.n_passes = n_passes
            change = float((_fed_on(prediction, chunk) - _fed_on(guess, chunk)).abs().max())
            if change <= tolerance:
                return prediction
            if n_passes > 1 and passes_left(change, before, tolerance) > limit - n_passes:
                return None
            guess, before = prediction, change
    return None


def passes_left(change: float, before: float, tolerance: float) -> float:
    """How many more passes bring the change under the tolerance, if it keeps falling at the same rate."""
    return math.log(tolerance / change) / math.log(change / before) if change < before else math.inf


def _fed_on(prediction: Tensor, chunk: Chunk) -> Tensor:
    """What the steps of a chunk pass on to each other: zero where nothing is."""
    values = replace_observed(prediction, chunk.observed, chunk.n_fed)[0][:, :-1]
    return values.masked_fill(~chunk.valid[:, 1:, None], 0)


def _shifted(prediction: Tensor, chunk: Chunk, first: Fed) -> Fed:
    """What every step receives: the value that the step before it feeds on, (L, T, F), and whether it was observed."""
    values, known = replace_observed(prediction, chunk.observed, chunk.n_fed)
    values = torch.cat([first[0][:, None], values[:, :-1]], 1)
    return values, torch.cat([first[1][:, None], known[:, :-1]], 1)


class _CloseFeedback(torch.autograd.Function):
    """Its inputs unchanged; its backward adds to the predictions' gradient what returns through the feedback.

    The first input is the leaf that was fed back in place of the predictions, the second the predictions made of it;
    the others are what the chunk leaves behind.
    """

    @staticmethod
    def forward(ctx, leaf, *outputs):
        ctx.leaf, ctx.outputs = leaf, outputs
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        pairs = [pair for pair in zip(ctx.outputs[1:], grads[1:], strict=True) if pair[1] is not None]
        others, other_grads = [output for output, _ in pairs], [grad for _, grad in pairs]
        prediction = ctx.outputs[0]
        direct = torch.zeros_like(prediction) if grads[0] is None else grads[0]
        tolerance = TOLERANCE[prediction.dtype]
        total = direct
        for _ in range(prediction.shape[1]):
            (returned,) = torch.autograd.grad([prediction, *others], ctx.leaf, [total, *other_grads], retain_graph=True)
            before, total = total, direct + returned
            if (total - before).abs().max() <= tolerance * total.abs().max():
                break
        return None, total, *grads[1:]
