"""Speaker embeddings by SpeechBrain: ECAPA-TDNN and x-vectors, from a hub name or a folder.

A SpeechBrain checkpoint is a `hyperparams.yaml` whose tags name the classes to build, and weights. Only the classes of
`_ALLOWED` are built and weights are loaded as tensors alone, so that a foreign checkpoint cannot run code of its own.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaemo.errors import ExtractorError
from vaemo.features.base import fingerprint_of, first_line
from vaemo.units import SAMPLING_RATE_HZ

_ALLOWED = (
    "speechbrain.lobes.",
    "speechbrain.nnet.",
    "speechbrain.processing.",
    "speechbrain.dataio.encoder.",
    "speechbrain.utils.parameter_transfer.",
    "torch.nn.",
)
_PLAIN_TAGS = ("ref", "copy", "tuple", "PLACEHOLDER")
_SETTINGS, _WEIGHTS = "hyperparams.yaml", "embedding_model.ckpt"
_PARTS = ("compute_features", "mean_var_norm", "embedding_model")
_LONGEST_S = 30.0
_SHORTEST_S = 0.1


class SpeakerEncoder:
    """A speaker encoder of SpeechBrain, frozen; its vectors have unit length.

    Args:
        name: Folder, or hub name such as `speechbrain/spkrec-ecapa-voxceleb`.
        revision: Revision of a hub model.

    Raises:
        ExtractorError: if the checkpoint is not there, names a class that is not allowed, lacks a part, or wants
            another sampling rate.

    Source:
        Desplanques et al. (2020), ECAPA-TDNN; Snyder et al. (2018), X-vectors; SpeechBrain, Ravanelli et al. (2021).
    """

    uses_gpu = True

    def __init__(self, name: str, *, revision: str = "main") -> None:
        self.name = name
        self.version = metadata.version("speechbrain")
        folder = _folder(name, revision)
        settings = (folder / _SETTINGS).read_text(encoding="utf-8")
        _refuse_foreign_classes(settings, name)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._features, self._norm, self._model = _build(settings, folder, name, self._device)
        self.dim = self._embed(torch.from_numpy(np.random.default_rng(0).normal(size=SAMPLING_RATE_HZ))).shape[0]
        weights = hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()
        self.fingerprint = fingerprint_of(settings=settings, weights=weights)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; each utterance on its own, since convolutions see padding; NaN below 0.1 s."""
        vectors = np.full((len(utterances), self.dim), np.nan, np.float32)
        for row, samples in enumerate(utterances):
            if len(samples) < _SHORTEST_S * SAMPLING_RATE_HZ:
                continue
            # A long utterance in equal parts, which then weigh the same.
            n_parts = int(-(-len(samples) // (_LONGEST_S * SAMPLING_RATE_HZ)))
            parts = [self._embed(torch.from_numpy(part)) for part in np.array_split(samples, n_parts)]
            vectors[row] = nn.functional.normalize(torch.stack(parts).mean(0), dim=0).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def _embed(self, samples: Tensor) -> Tensor:
        whole = torch.ones(1, device=self._device)
        # The statistics pooling of x-vectors adds a little noise, in evaluation too: always the same.
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(0)
            features = self._features(samples[None].float().to(self._device))
            embedding = self._model(self._norm(features, whole), whole)
        return nn.functional.normalize(embedding.reshape(-1), dim=0)


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        folder = Path(name)
    else:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[_SETTINGS, _WEIGHTS]))
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"features.speaker is '{name}', and no model can be loaded from there ({first_line(error)}). "
                "Give ltas, none, a folder, or the name of a model on the hub that this machine can reach."
            ) from None
    for file in (_SETTINGS, _WEIGHTS):
        if not (folder / file).is_file():
            raise ExtractorError(f"features.speaker is '{name}', which has no {file}; a SpeechBrain encoder has one.")
    return folder


def _refuse_foreign_classes(settings: str, name: str) -> None:
    for tag in re.findall(r"(?:^|[\s\[{,:-])!([^\s,\]}]+)", re.sub(r"(?m)^\s*#.*$", "", settings)):
        kind, _, target = tag.partition(":")
        known = kind in _PLAIN_TAGS or (kind in ("new", "name") and target.startswith(_ALLOWED))
        if not known:
            raise ExtractorError(
                f"{name}/{_SETTINGS} asks for '!{tag}'; only layers of SpeechBrain and torch.nn are built."
            )


def _build(settings: str, folder: Path, name: str, device: torch.device) -> list[Any]:
    """Features, their normalisation and the embedding model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hyperpyyaml import load_hyperpyyaml

        parameters = load_hyperpyyaml(settings)
    rate = parameters.get("sample_rate", SAMPLING_RATE_HZ)
    if rate != SAMPLING_RATE_HZ:
        raise ExtractorError(f"{name} was made for {rate} Hz; encoders for {SAMPLING_RATE_HZ} Hz are offered.")
    missing = [part for part in _PARTS if not isinstance(parameters.get(part), nn.Module)]
    if missing:
        raise ExtractorError(f"{name}/{_SETTINGS} has no '{missing[0]}'; ECAPA and x-vector encoders have one.")
    parts = [parameters[part] for part in _PARTS]
    if getattr(parts[1], "norm_type", "sentence") != "sentence":
        raise ExtractorError(
            f"{name} normalises by '{parts[1].norm_type}'; only `sentence`, which looks at the utterance alone, works."
        )
    try:
        parts[2].load_state_dict(torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ExtractorError(
            f"{name}/{_WEIGHTS} does not hold this encoder's weights, and nothing else: {first_line(error)}"
        ) from None
    return [part.eval().requires_grad_(False).to(device) for part in parts]
