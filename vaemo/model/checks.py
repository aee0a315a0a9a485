"""Validation of the session model's input: shapes, widths, dtypes, lengths and finite values.

Letters: L lanes, T steps, D features of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vaemo.config import ModelConfig
from vaemo.errors import FeatureMismatchError, NonFiniteFeatureError, ShapeError
from vaemo.model.streams import Streams
from vaemo.units import STREAMS


def used_streams(config: ModelConfig, dims: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """How the speaker embedding acts on features of these widths, and the width of every stream that is used.

    Raises:
        FeatureMismatchError: if nothing is left to predict from.
    """
    film = config.film if "speaker" in dims else "off"
    if film == "film" and "speech" not in dims:
        film = "off"
    used = {
        name: dim
        for name, dim in dims.items()
        if name == "speech" or (name == "prosody" and config.prosody) or (name == "speaker" and film != "off")
    }
    if not used:
        raise FeatureMismatchError(
            f"nothing is left to predict from: the features have {_listed(dims)}, model.prosody is {config.prosody} "
            f"and model.film is {config.film}. Extract speech or prosody, or set model.film=concat."
        )
    return film, {name: used[name] for name in STREAMS if name in used}


def used_pasts(config: ModelConfig, dims: Mapping[str, int]) -> tuple[str, ...]:
    """What a model of this config compares features of these widths with, by the names of `Streams.past`."""
    compared = {"speaker": config.speaker_norm, "session": config.session_norm}
    return tuple(
        f"{whose}.{stream}"
        for whose, streams in compared.items()
        for stream in STREAMS
        if stream in streams and stream in dims and (stream != "prosody" or config.prosody)
    )


def _listed(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({dim})" for name, dim in dims.items()) or "no stream"


def check_features(
    features: Streams,
    dims: Mapping[str, int],
    pasts: Sequence[str] = (),
    *,
    lanes: int,
    n_axes: int,
    dtype: torch.dtype,
) -> int:
    """The steps T of the features (1 where they have no such axis).

    Args:
        features: (L, T, D) or (L, D) per stream.
        dims: Width of the required streams.
        pasts: Names of the required pasts.
        lanes: L, as the state has it.
        n_axes: 3 for a chunk, 2 for a step.
        dtype: In which the model computes.

    Raises:
        ShapeError: if lanes, steps or dtype differ.
        FeatureMismatchError: if a stream is missing or has another width.
    """
    layout = "(L, T, D)" if n_axes == 3 else "(L, D)"
    steps, given = set(), features.tensors()
    # A past has the count beside the sums.
    for name, dim in {**dims, **{name: dims[name.partition(".")[2]] + 1 for name in pasts}}.items():
        x = given.get(name)
        if x is None and name in pasts:
            raise FeatureMismatchError(
                f"the model compares with the past '{name}' (model.speaker_norm, model.session_norm), which the "
                "features lack; PackedSessions.with_past makes Streams.past."
            )
        if x is None:
            raise FeatureMismatchError(
                f"the model needs the stream '{name}' ({dim} numbers), which the features lack; it uses "
                f"{_listed(dims)}."
            )
        if x.dim() != n_axes or len(x) != lanes:
            raise ShapeError(
                f"the stream '{name}' has shape {tuple(x.shape)}; with {lanes} lanes in the state it must be "
                f"{layout} with L = {lanes}."
            )
        if x.shape[-1] != dim:
            raise FeatureMismatchError(
                f"the stream '{name}' has {x.shape[-1]} numbers; the model was made for {dim}. "
                "Use features of the extractor that it was trained with."
            )
        if x.dtype != dtype:
            raise ShapeError(f"the stream '{name}' is {x.dtype}; the model computes in {dtype}. Use Streams.to.")
        steps.add(x.shape[1] if n_axes == 3 else 1)
    if len(steps) > 1:
        raise ShapeError(f"the streams have {sorted(steps)} steps; all must have the same T.")
    return steps.pop()


def check_finite(features: Streams, valid: Tensor | None = None) -> None:
    """Raise NonFiniteFeatureError, naming lane and step, if a feature is NaN or infinite.

    Args:
        features: (L, T, D) or (L, D) per stream, and the pasts.
        valid: Steps to check, (L, T), bool; None checks all.
    """
    for name, x in features.tensors().items():
        # One pass over the features; only a sum that is not finite is looked into.
        if x.sum().isfinite():
            continue
        broken = ~x.isfinite().all(-1)
        if valid is not None:
            broken &= valid
        if broken.any():
            lane, *step = broken.nonzero()[0].tolist()
            raise NonFiniteFeatureError(name, lane, step[0] if step else 0)


def check_lengths(lengths: Tensor, *, lanes: int, steps: int) -> tuple[int, int]:
    """The shortest and the longest of the valid lengths (0, 0 without lanes).

    Raises:
        ShapeError: unless `lengths` holds one int64 from 0 to `steps` per lane.
    """
    if lengths.shape != (lanes,) or lengths.dtype != torch.int64:
        raise ShapeError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; it takes one int64 per lane: ({lanes},)."
        )
    shortest, longest = (int(lengths.min()), int(lengths.max())) if lanes else (0, 0)
    if shortest < 0 or longest > steps:
        raise ShapeError(
            f"lengths runs from {shortest} to {longest}; the chunk has {steps} steps, so 0 to {steps} are allowed."
        )
    return shortest, longest


def check_observed(observed: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ShapeError for another shape, NonFiniteFeatureError for an infinity; NaN means unknown."""
    if observed is None:
        return
    if observed.shape != shape:
        raise ShapeError(
            f"observed has shape {tuple(observed.shape)}; here it must be {shape}, targets in their order."
        )
    if observed.isinf().any():
        lane, *step = observed.isinf().any(-1).nonzero()[0].tolist()
        raise NonFiniteFeatureError("observed", lane, step[0] if step else 0)
