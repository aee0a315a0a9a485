"""Resampling by a windowed sinc.

Source:
    torchaudio 2.11, `transforms.Resample` with `sinc_interp_hann` (BSD 2-clause, Copyright (c) 2017 Facebook Inc.
    (Soumith Chintala)), written out so that nothing here needs its libraries; the samples are equal to the bit.
    J. O. Smith, "Digital Audio Resampling", for the method.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

_ROLLOFF = 0.99
"""Where the filter cuts off, as a share of the lower of both Nyquist frequencies."""


@functools.lru_cache(maxsize=32)
def sinc_kernel(old: int, new: int, zeros: int) -> tuple[Tensor, int]:
    """The filter of every output phase, and its reach.

    Args:
        old: Samples before, in lowest terms with `new`.
        new: Samples after.
        zeros: Zero crossings of the sinc on either side.

    Returns:
        kernel: (new, 1, 2 * width + old), float32.
        width: Input samples that it reaches to either side of a period.
    """
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(zeros * old / cutoff)
    taps = torch.arange(-width, width + old, dtype=torch.float64)[None, None] / old
    # The phases are rounded to float32, as torchaudio has them: other samples would give other features.
    phases = torch.arange(0, -new, -1)[:, None, None].to(torch.float32) / new
    t = ((phases + taps) * cutoff).clamp_(-zeros, zeros)
    window = torch.cos(t * math.pi / zeros / 2) ** 2
    t *= math.pi
    kernel = torch.where(t == 0, torch.ones((), dtype=t.dtype), t.sin() / t)
    kernel *= window * (cutoff / old)
    return kernel.to(torch.float32), width


def resample(samples: Tensor, old: int, new: int, zeros: int = 6) -> Tensor:
    """Samples (..., n), float32, as (..., ceil(n * new / old)), with silence around them; `old / new` in any terms."""
    common = math.gcd(old, new)
    old, new = old // common, new // common
    if old == new:
        return samples
    kernel, width = sinc_kernel(old, new, zeros)
    n = -(-samples.shape[-1] * new // old)
    flat = samples.flatten(0, -2) if samples.dim() > 1 else samples[None]
    padded = functional.pad(flat, (width, width + old))
    # (channels, new, periods): the phases of a period are its samples.
    out = functional.conv1d(padded[:, None], kernel, stride=old).transpose(1, 2).flatten(1)
    return out[:, :n].reshape(*samples.shape[:-1], n)
