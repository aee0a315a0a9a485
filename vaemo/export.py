"""One step of a model as ONNX: flat tensors in and out, for programs without PyTorch.

Inputs, lanes L first, any number of them:

    speech, prosody, speaker              features of the utterance, (L, D), of the streams that the model uses
    speaker.prosody.sum, .count           sum and number of earlier utterances, (L, D) and (L,), if the model uses them
    observed                              observed values of this utterance, (L, targets), NaN where unknown
    film.hidden.weight, film.last.bias    what is added to FiLM for whoever speaks, (L, ...), where it is asked for
    state.NAME                            the session's memory before the utterance

Outputs are the targets by name, (L,), and `next.NAME`, the memory after it: the next step's `state.NAME`. What a fresh
memory holds, and what all of it means, is in the file's metadata, as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaemo import __version__, files
from vaemo.errors import UsageError
from vaemo.extras import remedy, version_of
from vaemo.model.checkpoint import Checkpoint, load_checkpoint
from vaemo.model.film import LaneDelta
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import TENSOR_FIELDS, SessionState
from vaemo.model.streams import Streams
from vaemo.progress import say

_LANES = 3
"""Lanes of the traced example: a number that is not mistaken for a constant."""

_OPSET = 20


class OneStep(nn.Module):
    """`SessionRegressor.step` with flat tensors, by name.

    Args:
        model: In float32; its fields of width 0 are left out.
        film_delta: Whether what is added to FiLM is an input.

    Attributes:
        shapes: Shape per lane of every input.
        targets: What is predicted.
    """

    def __init__(self, model: SessionRegressor, *, film_delta: bool = False) -> None:
        super().__init__()
        self.model = model
        fresh = model.fresh_state(1)
        self.fields = tuple(name for name, tensor in fresh.tensors().items() if tensor.numel())
        self.targets = model.targets
        self.shapes: dict[str, tuple[int, ...]] = {name: (dim,) for name, dim in model.dims.items()}
        for past in model.pasts:
            self.shapes |= {f"{past}.sum": self.shapes[past.partition(".")[2]], f"{past}.count": ()}
        self.shapes["observed"] = (model.n_fed,)
        self.deltas = tuple(model.film.state_dict()) if film_delta else ()
        self.shapes |= {f"film.{name}": tuple(model.film.get_parameter(name).shape) for name in self.deltas}
        self.shapes |= {f"state.{name}": tuple(getattr(fresh, name).shape[1:]) for name in self.fields}

    def outputs(self) -> tuple[str, ...]:
        """Their names, in order."""
        return (*self.targets, *(f"next.{name}" for name in self.fields))

    def example(self, lanes: int = _LANES) -> dict[str, Tensor]:
        """Inputs of a first utterance: features of zero, nothing known."""
        state = self.model.fresh_state(lanes).tensors()
        given = {name: torch.zeros(lanes, *shape) for name, shape in self.shapes.items()}
        known = {"observed": torch.full((lanes, self.model.n_fed), torch.nan)}
        return {**given, **known, **{f"state.{name}": state[name] for name in self.fields}}

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs, for the inputs in the order of `shapes`."""
        given = dict(zip(self.shapes, inputs, strict=True))
        features = {name: given[name] for name in self.model.dims}
        for past in self.model.pasts:
            features[past] = torch.cat([given[f"{past}.sum"], given[f"{past}.count"][:, None]], -1)
        lanes = given["observed"].shape[0]  # `len` would make it a constant
        # A field without width is the same for any memory.
        empty = {name: tensor.expand(lanes, *tensor.shape[1:]) for name, tensor in self._fresh().tensors().items()}
        fields: dict[str, Any] = {name: given.get(f"state.{name}", empty[name]) for name in TENSOR_FIELDS}
        delta = LaneDelta({name: given[f"film.{name}"] for name in self.deltas}) if self.deltas else None
        prediction, after = self.model.unchecked_step(
            Streams.of(features),
            SessionState(**fields, middle=self._fresh().middle),
            observed=given["observed"],
            film_delta=delta,
        )
        values = [value.clone() for value in prediction.unbind(-1)]
        return [*values, *(getattr(after, name) for name in self.fields)]

    def _fresh(self) -> SessionState:
        return self.model.fresh_state(1)


def export_onnx(checkpoint: str | Checkpoint, out: str, *, film_delta: bool = False) -> dict[str, Any]:
    """Write one step of a checkpoint's model as ONNX.

    Args:
        checkpoint: The folder, or what `load_checkpoint` gave.
        out: The file to write; path or URI.
        film_delta: Take what is added to FiLM (`vaemo personalize`) as inputs.

    Returns:
        What the file's metadata says.

    Raises:
        UsageError: if the extra `onnx` is not installed, or the model has no FiLM to add to.
    """
    for package in ("onnx", "onnxscript"):
        if version_of(package) is None:
            raise UsageError(f"export needs {package}: {remedy(package)}.")
    loaded = load_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    if film_delta and loaded.model.film_kind != "film":
        raise UsageError(f"--film-delta needs a model with FiLM; model.film of this one is {loaded.model.film_kind}.")
    step = OneStep(loaded.model.float().eval().requires_grad_(False), film_delta=film_delta)
    about = metadata_of(step, loaded)
    files.write_whole(out, _program(step, {name: json.dumps(value) for name, value in about.items()}))
    say(f"{out}: {len(step.shapes)} inputs, {len(step.outputs())} outputs; of any number of lanes")
    return about


def metadata_of(step: OneStep, checkpoint: Checkpoint) -> dict[str, Any]:
    """The file's metadata: inputs, outputs and origin."""
    fresh = step.model.fresh_state(1)
    features = checkpoint.features
    return {
        "vaemo": __version__,
        "fingerprint": checkpoint.fingerprint,
        "targets": list(step.targets),
        "label_range": list(step.model.config.label_range),
        "inputs": {name: ["lanes", *shape] for name, shape in step.shapes.items()},
        "outputs": list(step.outputs()),
        "fresh": {f"state.{name}": _constant(getattr(fresh, name)) for name in step.fields},
        "extractors": None if features is None else {name: getattr(features, name) for name in step.model.dims},
        "feature_fingerprints": checkpoint.provenance.get("feature_fingerprints", {}),
        "speaker_aggregation": checkpoint.config.features.speaker_aggregation,
        "sequence_by": checkpoint.config.sessions.sequence_by,
        "simulate_telephone": checkpoint.config.audio.simulate_telephone,
        "synthetic": bool(checkpoint.provenance.get("synthetic")),
    }


def _constant(tensor: Tensor) -> float:
    """The number that a field of a fresh memory is filled with."""
    (value,) = set(tensor.flatten().tolist())
    return float(value)


def _program(step: OneStep, metadata: Mapping[str, str]) -> bytes:
    import onnx

    example = step.example()
    lanes = torch.export.Dim("lanes", min=1, max=1 << 20)
    with torch.no_grad(), _quiet(), tempfile.TemporaryDirectory(prefix="vaemo-onnx-") as folder:
        path = Path(folder, "step.onnx")
        traced = torch.export.export(
            step, (list(example.values()),), dynamic_shapes=([{0: lanes} for _ in example],), strict=False
        )
        program = torch.onnx.export(
            traced,
            input_names=list(example),
            output_names=list(step.outputs()),
            opset_version=_OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert program is not None
        program.save(path)
        proto = onnx.load(path)
    _name_lanes(proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    proto.producer_name, proto.producer_version = "vaemo", __version__
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _name_lanes(proto: Any) -> None:
    """Name the one free axis; the tracer chooses an arbitrary name."""
    traced = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(traced, "lanes")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress, logs which packages it does not find, and warns of deprecations of its own."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
