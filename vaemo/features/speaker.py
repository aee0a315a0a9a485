"""Speaker embeddings by SpeechBrain: ECAPA-TDNN and x-vectors, from a hub name or a folder.

A SpeechBrain checkpoint is a `hyperparams.yaml` whose tags name the classes to build, and weights. Only known layers
are built (`vaemo.features.hyperparams`) and weights are tensors alone, so that a foreign checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from vaemo.errors import ExtractorError
from vaemo.features.base import fingerprint_of, first_line, needed_version
from vaemo.features.convert import PROG, read_tensors
from vaemo.features.hyperparams import Hyperparams
from vaemo.features.watch import begin_utterance
from vaemo.units import SAMPLING_RATE_HZ

_SETTINGS = "hyperparams.yaml"
_WEIGHTS = ("embedding_model.safetensors", "embedding_model.ckpt")
"""In this order: the second, as SpeechBrain publishes it, is read in a process of its own."""

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
        self.version = needed_version("speechbrain", f"features.speaker is '{name}'", "ltas or none")
        folder = _folder(name, revision)
        try:
            settings = (folder / _SETTINGS).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ExtractorError(f"{name}/{_SETTINGS} is not UTF-8 text ({error.reason}); copy it again.") from None
        weights = next(folder / file for file in _WEIGHTS if (folder / file).is_file())
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._features, self._norm, self._model = _build(settings, weights, name, self._device)
        self.dim = self._embed(torch.from_numpy(np.random.default_rng(0).normal(size=SAMPLING_RATE_HZ))).shape[0]
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.fingerprint = fingerprint_of(settings=settings, weights=digest)

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; each utterance on its own, since convolutions see padding; NaN below 0.1 s."""
        vectors = np.full((len(utterances), self.dim), np.nan, np.float32)
        for row, samples in enumerate(utterances):
            begin_utterance()
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
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[_SETTINGS, *_WEIGHTS]))
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"features.speaker is '{name}', and no model can be loaded from there ({first_line(error)}). "
                "Give ltas, campplus, none, a folder, or the name of a model on the hub that this machine can reach."
            ) from None
    if not (folder / _SETTINGS).is_file():
        raise ExtractorError(f"features.speaker is '{name}', which has no {_SETTINGS}; a SpeechBrain encoder has one.")
    if not any((folder / file).is_file() for file in _WEIGHTS):
        raise ExtractorError(
            f"features.speaker is '{name}', which has no {_WEIGHTS[1]}, nor {_WEIGHTS[0]}; a SpeechBrain encoder has "
            f"one. Other files of PyTorch are turned once by `{PROG} {name} --out FOLDER`; then give FOLDER."
        )
    return folder


def _build(settings: str, weights: Path, name: str, device: torch.device) -> list[Any]:
    """Features, their normalisation and the embedding model."""
    hyperparams = Hyperparams(settings, f"{name}/{_SETTINGS}")
    rate = hyperparams.get("sample_rate", SAMPLING_RATE_HZ)
    if rate != SAMPLING_RATE_HZ:
        raise ExtractorError(f"{name} was made for {rate} Hz; encoders for {SAMPLING_RATE_HZ} Hz are offered.")
    parameters = {part: hyperparams.get(part) for part in _PARTS}
    missing = [part for part in _PARTS if not isinstance(parameters[part], nn.Module)]
    if missing:
        raise ExtractorError(f"{name}/{_SETTINGS} has no '{missing[0]}'; ECAPA and x-vector encoders have one.")
    parts = [parameters[part] for part in _PARTS]
    if getattr(parts[1], "norm_type", "sentence") != "sentence":
        raise ExtractorError(
            f"{name} normalises by '{parts[1].norm_type}'; only `sentence`, which looks at the utterance alone, works."
        )
    try:
        content = weights.read_bytes() if weights.suffix == ".safetensors" else b"".join(read_tensors(weights, name))
        parts[2].load_state_dict(load(content))
    except (SafetensorError, RuntimeError, ExtractorError) as error:
        raise ExtractorError(
            f"{name}/{weights.name} does not hold this encoder's weights, and nothing else: {first_line(error)}"
        ) from None
    return [part.eval().requires_grad_(False).to(device) for part in parts]
