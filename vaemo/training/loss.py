"""The training loss of a window, from sums that may be added over lanes, ranks and parts.

Letters: L lanes, T steps, K targets, those of sessions
last. A rank computes `window_sums` of its lanes, the sums are added over all ranks, and
`window_loss` of the total is the same number on every rank: CCC is that of the whole window, however it is distributed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vaemo.config import ModelConfig, TrainConfig

SESSION_WEIGHT = 0.1
"""Of a target of the session, beside one of utterances: it has one label where they have dozens, and overfits soon."""

CCC_EPSILON = 1e-8
"""Added to CCC's denominator: keeps the gradient finite where predictions and labels are constant and equal."""


@dataclass(frozen=True, eq=False)
class LossWeights:
    """The weight of each target in the loss.

    Attributes:
        share: Of the utterance targets' weights, float64, (K,), summing to 1 over them: that of 1 - CCC.
        weight: `train.target_weights`, float64, (K,).
        n_session: How many of the targets are of sessions.
        variance: Of the training labels, float64, (K,).
    """

    share: Tensor
    weight: Tensor
    n_session: int
    variance: Tensor

    @staticmethod
    def alike(sums: Tensor) -> LossWeights:
        """Equal weights for targets of utterances, on the device of their sums."""
        ones = torch.ones_like(sums[0])
        return LossWeights(ones / len(ones), ones, 0, ones)

    @staticmethod
    def of(model: ModelConfig, train: TrainConfig, deviation: Tensor) -> LossWeights:
        """The weights that a config gives.

        Args:
            model: Whose targets they are.
            train: `target_weights`.
            deviation: Of the training labels, (K,), where the loss is computed.
        """
        given = train.target_weights or {}
        weight = torch.tensor([given.get(name, 1.0) for name in model.names], dtype=torch.float64)
        n_session = len(model.session_targets)
        total = weight[: len(weight) - n_session].sum().clamp(min=1e-12)
        deviation = deviation.double()
        return LossWeights(
            (weight / total).to(deviation.device), weight.to(deviation.device), n_session, deviation.square()
        )


def window_sums(prediction: Tensor, labels: Tensor, centre: float, weights: Tensor | None = None) -> Tensor:
    """Sums over the labelled steps, in float64, differentiable in the prediction.

    Args:
        prediction: (L, T, K).
        labels: (L, T, K), NaN where there is no label or no step.
        centre: Subtracted from both, so that second moments keep their digits: the middle of the label range.
        weights: Of the labels, (L, T, K), 1 on average; None where all are alike.

    Returns:
        (7, K): count, then the sums of x, y, xx, yy, xy and (x - y)^2; x prediction, y label; all weighted.
    """
    known = ~torch.isnan(labels)
    x = torch.where(known, prediction - centre, 0).double()
    y = torch.where(known, labels - centre, 0).double()
    parts = torch.stack((known.double(), x, y, x * x, y * y, x * y, (x - y) ** 2))
    return (parts if weights is None else parts * weights.double()).sum(dim=(1, 2))


def window_loss(sums: Tensor, cells: int, train: TrainConfig, weights: LossWeights | None = None) -> Tensor:
    """The loss of a window, a float64 scalar.

    With `ccc_mse`: the sum over the targets of utterances of weight / total weight * (1 - CCC) + weight * mse_weight *
    MSE. A target with fewer than `min_labelled` labels has no CCC worth a gradient: it adds its MSE alone, weighted by
    its labels' share of the window. A target without labels adds nothing.

    A target of the session adds `SESSION_WEIGHT` * weight * (x - y)^2 / (2 * variance of the labels), summed over the
    steps of the window with their labels' weights, which are 1 together over a session, / lanes: about that share of
    what 1 - CCC would be, and as much for a long session as for a short one. Its gradient reaches back as far as the
    window; the last one holds the last `train.window` utterances of the session.

    Args:
        sums: `window_sums` of all lanes of all ranks, (7, K).
        cells: Lanes of all ranks times steps of the window, padding included.
        train: `loss`, `mse_weight`, `min_labelled`, `lanes`.
        weights: Of the targets; None takes them as targets of utterances with equal weights.
    """
    weights = weights or LossWeights.alike(sums)
    n, x, y, xx, yy, xy, error = sums
    count = n.clamp(min=1)
    mean_x, mean_y = x / count, y / count
    covariance = xy / count - mean_x * mean_y
    spread = (xx / count - mean_x**2) + (yy / count - mean_y**2) + (mean_x - mean_y) ** 2
    mse = weights.weight * (error / count)
    if train.loss == "ccc_mse":
        full = weights.share * (1 - 2 * covariance / (spread + CCC_EPSILON)) + train.mse_weight * mse
    else:
        full = mse
    terms = torch.where(n >= train.min_labelled, full, mse * (n / cells))
    if weights.n_session:
        own = slice(len(terms) - weights.n_session, None)
        ended = SESSION_WEIGHT * weights.weight[own] * error[own] / (2 * weights.variance[own]) / train.lanes
        terms = torch.cat([terms[: own.start], ended])
    return terms.sum()
