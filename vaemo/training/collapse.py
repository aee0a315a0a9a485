"""Signs that a training run collapses or leans on its feedback, read from a metrics line, with what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STILL = 0.1
"""Predictions that vary less than this share of the labels' deviation have collapsed."""

STILL_STATE = 1e-3
"""A session state that varies less than this is practically constant: LayerNorm gives u a deviation of about 1."""

COPYING, LEANING = 0.15, 0.1
"""Feedback gain, and CCC lost without labels, above which a model leans on its feedback: pure label feeding reaches
0.3 and 0.25 on acted dialogues, a model trained on its own predictions 0.01 and 0."""


def signs_of_collapse(metrics: Mapping[str, Any], label_deviation: Mapping[str, float]) -> list[str]:
    """Warnings from a metrics line, with what to try; empty if there are none.

    Args:
        metrics: Of one epoch.
        label_deviation: Of the training labels, by target.
    """
    signs = []
    for name, deviation in label_deviation.items():
        spread = metrics[f"prediction_sd_{name}"]
        if spread < STILL * deviation:
            signs.append(
                f"predictions of {name} hardly vary (deviation {spread:.4f}, labels {deviation:.4f}): "
                "try a lower train.lr with train.warmup_fraction=0.1, and look at the features."
            )
        gain = metrics.get(f"feedback_gain_{name}")
        if gain is not None and gain > COPYING and metrics["gap_ccc_avg"] > LEANING:
            signs.append(
                f"{name} copies what is fed back (gain {gain:.2f}), and the model is {metrics['gap_ccc_avg']:.2f} CCC "
                "worse without labels: try model.feedback=model, or model.feedback_noise=1.2."
            )
    if metrics["state_sd"] is not None and metrics["state_sd"] < STILL_STATE:
        signs.append(
            f"the session state hardly changes (deviation {metrics['state_sd']:.5f}): try a smaller model.alpha, "
            "a higher train.lr, or a longer train.window."
        )
    return signs
