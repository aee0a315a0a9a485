"""What is fed back in training: labels, noise or nothing, drawn per lane and step.

The model takes known values of past utterances as `observed` and feeds back its own predictions where there is none.
Every training mode is a way of filling `observed`. All draws are functions of (seed, optimiser step) and made for all
lanes, so that they do not depend on how lanes are spread over workers. Letters: L lanes, T steps, F targets that
are fed back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vaemo.config import Config
from vaemo.model.streams import Streams


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything that is drawn in one optimiser step."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def label_probability(step: int, total: int, config: Config) -> float:
    """Probability with which the label of an utterance is fed back, at one of `total` optimiser steps.

    `label` feeds them always, `none`, `observed` and `model` never. `scheduled` feeds them always at first, then with a
    probability that falls linearly to 0, then never.
    """
    if config.model.feedback != "scheduled":
        return 1.0 if config.model.feedback == "label" else 0.0
    hold = config.train.sampling_hold_fraction * total
    end = (1 - config.train.sampling_end_fraction) * total
    if step < hold:
        return 1.0
    return max(0.0, (end - step) / (end - hold)) if step < end else 0.0


def counts_from(total: int, config: Config) -> int:
    """Optimiser steps after which dev results count: those before are fed what inference will not have."""
    fraction = config.train.no_feedback_fraction
    if config.model.feedback == "scheduled":
        fraction = max(fraction, 1 - config.train.sampling_end_fraction)
    return int(np.ceil(fraction * total))


def add_noise(
    features: Streams, deviations: Mapping[str, Tensor], lanes: int, picked: Tensor, generator: torch.Generator
) -> Streams:
    """Features with Gaussian noise, drawn for all lanes; what was heard before stays as it was heard.

    Args:
        features: Of the picked lanes, (lanes, T, D) each.
        deviations: Of the noise, (D,) per stream.
        lanes: L, over all workers.
        picked: Which of the L lanes `features` are.
        generator: Of this step.
    """

    def noisy(name: str, x: Tensor) -> Tensor:
        noise = torch.randn(lanes, *x.shape[1:], generator=generator)
        return noise[picked].to(x).mul_(deviations[name]).add_(x)

    return Streams.of({**features.past, **{name: noisy(name, x) for name, x in features.items()}})


class FeedbackDraws:
    """The random numbers of one optimiser step, for all lanes.

    Args:
        lanes: L, over all workers.
        steps: T of the window.
        generator: Of this step; advanced by the same amount in every mode.
        n_fed: F.
    """

    def __init__(self, lanes: int, steps: int, generator: torch.Generator, n_fed: int = 2) -> None:
        self.choice = torch.rand(lanes, steps, generator=generator)
        self.noise = torch.randn(lanes, steps, n_fed, generator=generator)
        self.shown = torch.rand(lanes, 1, generator=generator)
        self.share = torch.rand(lanes, 1, generator=generator)

    def observed(
        self, labels: Tensor, lanes: Tensor, step: int, total: int, config: Config, deviation: Tensor
    ) -> Tensor | None:
        """What is fed back beside the model's predictions, for some of the lanes.

        Args:
            labels: Of these lanes, (lanes, T, F), NaN = none.
            lanes: Which of the L lanes they are.
            step: The optimiser step.
            total: Optimiser steps in all.
            config: The mode and its numbers.
            deviation: Of the training labels, (F,), the unit of `model.feedback_noise`.

        Returns:
            (lanes, T, F), NaN where the prediction is fed back; None where it is everywhere.
        """
        train, model = config.train, config.model
        if model.feedback == "none":
            return None
        if step < train.no_feedback_fraction * total:
            if model.feedback == "observed":
                return None
            return torch.full_like(labels, sum(model.label_range) / 2)
        probability = label_probability(step, total, config)
        # A lane in which labels are observed shows a share of them, evenly spread between none and all. Only a model
        # that can tell them from predictions is shown any.
        fraction = train.observed_fraction if model.feedback == "observed" or model.feedback_flag else 0.0
        share = torch.where(self.shown < fraction, self.share, 0).clamp(min=probability)
        if not (share > 0).any():
            return None
        fed = labels
        if model.feedback_noise:
            fed = labels + model.feedback_noise * deviation * self.noise[lanes].to(labels)
        drawn = (self.choice < share)[lanes].to(labels.device)
        return torch.where(drawn[..., None], fed, torch.nan)
