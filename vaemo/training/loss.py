"""The training loss of a window, from sums that may be added over lanes, ranks and parts.

Letters: L lanes, T steps. A rank computes `window_sums` of its lanes, the sums are added over all ranks, and
`window_loss` of the total is the same number on every rank: CCC is that of the whole window, however it is spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaemo.config import TrainConfig

CCC_EPSILON = 1e-8
"""Added to CCC's denominator: keeps the gradient finite where predictions and labels are constant and equal."""


def window_sums(prediction: Tensor, labels: Tensor, centre: float) -> Tensor:
    """Sums over the labelled steps, in float64, differentiable in the prediction.

    Args:
        prediction: (L, T, 2).
        labels: (L, T, 2), NaN where there is no label or no step.
        centre: Subtracted from both, so that second moments keep their digits: the middle of the label range.

    Returns:
        (7, 2): count, then the sums of x, y, xx, yy, xy and (x - y)^2; x prediction, y label.
    """
    known = ~torch.isnan(labels)
    x = torch.where(known, prediction - centre, 0).double()
    y = torch.where(known, labels - centre, 0).double()
    parts = (known.double(), x, y, x * x, y * y, x * y, (x - y) ** 2)
    return torch.stack(parts).sum(dim=(1, 2))


def window_loss(sums: Tensor, cells: int, train: TrainConfig) -> Tensor:
    """The loss of a window, a float64 scalar.

    With `ccc_mse`: the sum over valence and arousal of (1 - CCC) / 2 + mse_weight * MSE. A dimension with fewer
    than `min_labelled` labels has no CCC worth a gradient: it adds its MSE alone, weighted by its labels' share
    of the window. A dimension without labels adds nothing.

    Args:
        sums: `window_sums` of all lanes of all ranks, (7, 2).
        cells: Lanes of all ranks times steps of the window, padding included.
        train: `loss`, `mse_weight`, `min_labelled`.
    """
    n, x, y, xx, yy, xy, error = sums
    count = n.clamp(min=1)
    mean_x, mean_y = x / count, y / count
    covariance = xy / count - mean_x * mean_y
    spread = (xx / count - mean_x**2) + (yy / count - mean_y**2) + (mean_x - mean_y) ** 2
    mse = error / count
    if train.loss == "ccc_mse":
        full = 0.5 * (1 - 2 * covariance / (spread + CCC_EPSILON)) + train.mse_weight * mse
    else:
        full = mse
    return torch.where(n >= train.min_labelled, full, mse * (n / cells)).sum()
