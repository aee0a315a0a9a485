"""Speech embeddings by WavLM, wav2vec2 or HuBERT: frames of one layer, averaged over the utterance.

An utterance's vector is the same alone and in any batch. The convolutions run per utterance, because a group norm over
time (the `base` models) sees padding; frames are padded, because the transformer masks them. Letters: B utterances of
a batch, F frames of the longest, H hidden width.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaemo.errors import ExtractorError
from vaemo.features.base import fingerprint_of
from vaemo.units import SAMPLING_RATE_HZ

MODEL_TYPES = ("wavlm", "wav2vec2", "hubert")

_WEIGHTS = "model.safetensors"
_OVERLAP_S = 1.0

_CPU_BATCH_S = 4.0
"""Larger batches are slower on a CPU, whose caches they leave: 60 s by a quarter."""


class SpeechEncoder:
    """A speech encoder of Hugging Face, from a hub name or a folder; frozen, safetensors only, no remote code.

    Args:
        name: Hub name or folder.
        revision: Revision of a hub model.
        layer: Hidden layer that is pooled, 0 (before the transformer) to the number of layers; -1 is the last.
        max_utterance_s: A longer utterance is cut into overlapping parts of equal length, pooled by duration.
        batch_s: Seconds in one batch, padding included.

    Raises:
        ExtractorError: if the model is not there, is not of `MODEL_TYPES`, has no safetensors weights or no
            preprocessor config, wants another sampling rate, or has fewer layers.
    """

    uses_gpu = True

    def __init__(
        self,
        name: str,
        *,
        revision: str = "main",
        layer: int = -1,
        max_utterance_s: float = 30.0,
        batch_s: float = 60.0,
    ) -> None:
        self.name = name
        self.version = metadata.version("transformers")
        self._revision, self._batch_s, self._max_s = revision, batch_s, max_utterance_s
        self._config = self._load_config()
        self._normalize = self._load_normalize()
        layers = self._config.num_hidden_layers
        if layer > layers:
            raise ExtractorError(
                f"features.speech_layer is {layer}, and {name} has {layers} layers; give 0 to {layers}, or -1."
            )
        self._layer = layers if layer == -1 else layer
        self.dim = self._config.hidden_size
        self.fingerprint = fingerprint_of(
            weights=_digest(self._file(_WEIGHTS)),
            config=self._config.to_json_string(),
            normalize=self._normalize,
            layer=self._layer,
            max_utterance_s=max_utterance_s,
        )

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; a row of NaN where an utterance is shorter than one frame (25 ms)."""
        parts = [(row, part) for row, samples in enumerate(utterances) for part in self._cut(self._prepared(samples))]
        total = np.zeros((len(utterances), self.dim))
        weight = np.zeros(len(utterances))
        for batch in self._batches(parts):
            pooled = self._pool([part for _, part in batch])
            for (row, part), vector in zip(batch, pooled, strict=True):
                total[row] += vector * len(part)
                weight[row] += len(part)
        with np.errstate(invalid="ignore"):
            return (total / weight[:, None]).astype(np.float32)

    def _prepared(self, samples: np.ndarray) -> np.ndarray:
        if not self._normalize:
            return samples
        return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)

    def _cut(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        longest, overlap = int(self._max_s * SAMPLING_RATE_HZ), int(_OVERLAP_S * SAMPLING_RATE_HZ)
        if self._n_frames(len(samples)) < 1:
            return
        if len(samples) <= longest:
            yield samples
            return
        overlap = min(overlap, longest // 2)
        n_parts = -(-(len(samples) - overlap) // (longest - overlap))
        length = -(-(len(samples) + (n_parts - 1) * overlap) // n_parts)
        for part in range(n_parts):
            start = min(part * (length - overlap), len(samples) - length)
            yield samples[start : start + length]

    def _batches(self, parts: Sequence[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
        """Parts of like length together, as many as `batch_s` holds."""
        budget = self._batch_s * SAMPLING_RATE_HZ
        batch: list[tuple[int, np.ndarray]] = []
        for item in sorted(parts, key=lambda item: -len(item[1])):
            if batch and (len(batch) + 1) * len(batch[0][1]) > budget:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    @torch.inference_mode()
    def _pool(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Mean of the frames of each part, (B, H)."""
        model, device = self._model, self._device
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            frames = [
                model.feature_extractor(torch.from_numpy(part)[None].to(device))[0].T for part in parts
            ]  # each (F, C)
            lengths = torch.tensor([len(each) for each in frames], device=device)
            padded = nn.utils.rnn.pad_sequence(frames, batch_first=True)
            valid = torch.arange(padded.shape[1], device=device) < lengths[:, None]
            projected = model.feature_projection(padded)
            hidden = projected[0] if isinstance(projected, tuple) else projected
            hidden = model.encoder(hidden, attention_mask=valid).last_hidden_state
        return _masked_mean(hidden.float(), valid).cpu().numpy()

    @functools.cached_property
    def _device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _model(self) -> Any:
        import transformers

        kinds = {"wavlm": "WavLMModel", "wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel"}
        model, report = getattr(transformers, kinds[self._config.model_type]).from_pretrained(
            self.name,
            revision=self._revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
        missing = sorted(key for key in report["missing_keys"] if key != "masked_spec_embed")
        if missing:
            raise ExtractorError(
                f"{self.name} has no weights for {missing[0]} ({len(missing)} such); it is not a whole encoder."
            )
        _keep_layers(model, self._layer)
        return model.eval().requires_grad_(False).to(self._device)

    def _n_frames(self, n_samples: int) -> int:
        for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    def _load_config(self) -> Any:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(
                self.name, revision=self._revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"features.speech is '{self.name}', and no model can be loaded from there ({_first_line(error)}). "
                "Give logmel, none, a folder, or the name of a model on the hub that this machine can reach."
            ) from None
        if config.model_type not in MODEL_TYPES:
            raise ExtractorError(
                f"features.speech is '{self.name}', a model of type {config.model_type}; "
                f"{', '.join(MODEL_TYPES)} are offered."
            )
        return config

    def _load_normalize(self) -> bool:
        settings = json.loads(Path(self._file("preprocessor_config.json")).read_text())
        if settings.get("sampling_rate", SAMPLING_RATE_HZ) != SAMPLING_RATE_HZ:
            raise ExtractorError(
                f"{self.name} was made for {settings['sampling_rate']} Hz; {SAMPLING_RATE_HZ} Hz is what is offered."
            )
        return bool(settings.get("do_normalize", True))

    def _file(self, name: str) -> str:
        from transformers.utils import cached_file

        try:
            path = cached_file(self.name, name, revision=self._revision)
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"{self.name} (revision {self._revision}) has no {name} ({_first_line(error)}). Weights are read from "
                "safetensors alone; save the model with transformers' save_pretrained, preprocessor config included."
            ) from None
        assert path is not None
        return path


def fitting_batch_s(most_s: float) -> float:
    """Seconds in a batch that suit this machine, `most_s` at most."""
    return most_s if torch.cuda.is_available() else min(most_s, _CPU_BATCH_S)


def _keep_layers(model: Any, layer: int) -> None:
    """Cut a model behind a hidden layer, so that its encoder ends there."""
    if layer == model.config.num_hidden_layers:
        return
    model.encoder.layers = model.encoder.layers[:layer]
    if model.config.do_stable_layer_norm:
        # The norm after the last layer is not part of the hidden layers before it.
        model.encoder.layer_norm = nn.Identity()


def _masked_mean(hidden: Tensor, valid: Tensor) -> Tensor:
    weights = valid.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


@functools.lru_cache(maxsize=8)
def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
