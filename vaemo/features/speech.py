"""Speech embeddings by WavLM, wav2vec2 or HuBERT: frames of one layer or all, pooled over the utterance.

An utterance's vector is the same alone and in any batch (`vaemo.features.speech_network` says how). Training end to
end embeds through the same functions as extraction.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vaemo import files
from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError
from vaemo.features.base import fingerprint_of, first_line
from vaemo.features.speech_network import POOLING, SpeechNetwork
from vaemo.units import SAMPLING_RATE_HZ

MODEL_TYPES = ("wavlm", "wav2vec2", "hubert")

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_OVERLAP_S = 1.0

_CPU_BATCH_S = 4.0
"""Larger batches are slower on a CPU, whose caches they leave: 60 s by a quarter."""


class SpeechEncoder:
    """A speech encoder of Hugging Face, from a hub name or a folder; safetensors only, no remote code.

    Args:
        config: Fields `speech` (hub name, folder, or URI of a folder), `speech_*` and `max_utterance_s`.
        batch_s: Seconds in one batch, padding included.

    Attributes:
        config: As given.

    Raises:
        ExtractorError: if the model is not there, is not of `MODEL_TYPES`, has no safetensors weights or no
            preprocessor config, wants another sampling rate, has fewer layers, or was trained with another pooling.
    """

    uses_gpu = True

    def __init__(self, config: FeatureConfig, *, batch_s: float = 60.0) -> None:
        self.config, self.name = config, config.speech
        self.version = metadata.version("transformers")
        self._batch_s, self._max_s = batch_s, config.max_utterance_s
        self._copy = _local_copy(self.name) if files.is_uri(self.name) else None
        self._source = self._copy.name if self._copy else self.name
        self._model_config = self._load_config()
        self._normalize = self._load_normalize()
        layers = self._model_config.num_hidden_layers
        if isinstance(config.speech_layer, int) and config.speech_layer > layers:
            raise ExtractorError(
                f"features.speech_layer is {config.speech_layer}, and {self.name} has {layers} layers; "
                f"give 0 to {layers}, or -1."
            )
        self._layer = layers if config.speech_layer == -1 else config.speech_layer
        self._pooling = self._load_pooling()
        self.dim = self._model_config.hidden_size
        self.fingerprint = fingerprint_of(
            weights=_digest(self.file(WEIGHTS)),
            config=self._model_config.to_json_string(),
            normalize=self._normalize,
            layer=self._layer,
            pooling=config.speech_pooling,
            trained=hashlib.sha256(self._pooling).hexdigest(),
            max_utterance_s=config.max_utterance_s,
        )

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; a row of NaN where an utterance is shorter than one frame (25 ms)."""
        network = self._network
        with torch.inference_mode():
            return self.embed(utterances, network).float().cpu().numpy()

    def embed(self, utterances: Sequence[np.ndarray], network: SpeechNetwork, *, checkpointing: bool = False) -> Tensor:
        """Vectors of utterances by a network of this encoder, with gradients for what of it requires them.

        Args:
            utterances: Samples of each, as for `__call__`.
            network: From `network`, or a copy of it.
            checkpointing: Keep no activations, and compute each batch again for its gradient.

        Returns:
            (len(utterances), dim), on the network's device and in its precision.
        """
        parts = [(row, part) for row, samples in enumerate(utterances) for part in self._cut(self._prepared(samples))]
        rows, lengths, pooled = [], [], []
        for batch in self._batches(parts):
            rows += [row for row, _ in batch]
            lengths += [len(part) for _, part in batch]
            samples = [torch.from_numpy(part) for _, part in batch]
            # Nothing in it is random: there is no generator to bring back.
            again = functools.partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False)
            pooled.append((again if checkpointing else network)(samples))
        if not pooled:
            return torch.full((len(utterances), self.dim), torch.nan)
        vectors = torch.cat(pooled)
        # Parts of one utterance are averaged by their length; an utterance without one is 0 / 0.
        weight = torch.tensor(lengths, dtype=torch.float64, device=vectors.device)
        row = torch.tensor(rows, device=vectors.device)
        total = weight.new_zeros(len(utterances)).index_add(0, row, weight)
        return (
            weight.new_zeros(len(utterances), self.dim)
            .index_add(0, row, vectors.double() * weight[:, None])
            .div(total[:, None])
            .to(vectors.dtype)
        )

    def network(
        self,
        *,
        layer: int | Literal["mean", "weighted"] | None = None,
        pooling: Literal["mean", "attention"] | None = None,
        precision: Literal["bf16", "fp16", "fp32"] | None = None,
    ) -> SpeechNetwork:
        """A new network with the encoder's weights, in float32 on the CPU, without gradients.

        Args:
            layer: In place of the config's.
            pooling: In place of the config's.
            precision: In place of the config's.

        Raises:
            ExtractorError: if weights are missing, or do not fit.
        """
        network = SpeechNetwork(
            self._load_model(),
            layer=self._layer if layer is None else layer,
            pooling=pooling or self.config.speech_pooling,
            precision=precision or self.config.speech_precision,
            trained=load(self._pooling) if self._pooling else None,
        )
        return network.requires_grad_(False)

    def file(self, name: str) -> str:
        """Local path of one of the model's files.

        Raises:
            ExtractorError: if the model has no such file.
        """
        from transformers.utils import cached_file

        try:
            path = cached_file(self._source, name, revision=self.config.speech_revision)
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"{self.name} (revision {self.config.speech_revision}) has no {name} ({first_line(error)}). Weights "
                "are read from safetensors alone; save the model with transformers' save_pretrained, preprocessor "
                "config included."
            ) from None
        assert path is not None
        return path

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

    @functools.cached_property
    def _device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _network(self) -> SpeechNetwork:
        network = self.network().to(self._device)
        if self.config.speech_compile and self._device.type == "cuda":
            network.compile_layers()
        return network

    def _load_model(self) -> Any:
        import transformers

        # Bars of its own, for each worker, get between the job's lines.
        transformers.utils.logging.disable_progress_bar()
        kinds = {"wavlm": "WavLMModel", "wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel"}
        model, report = getattr(transformers, kinds[self._model_config.model_type]).from_pretrained(
            self._source,
            revision=self.config.speech_revision,
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
        return model.eval()

    def _n_frames(self, n_samples: int) -> int:
        for kernel, stride in zip(self._model_config.conv_kernel, self._model_config.conv_stride, strict=True):
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    def _load_config(self) -> Any:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(
                self._source, revision=self.config.speech_revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ExtractorError(
                f"features.speech is '{self.name}', and no model can be loaded from there ({first_line(error)}). "
                "Give logmel, none, a folder, or the name of a model on the hub that this machine can reach."
            ) from None
        if config.model_type not in MODEL_TYPES:
            raise ExtractorError(
                f"features.speech is '{self.name}', a model of type {config.model_type}; "
                f"{', '.join(MODEL_TYPES)} are offered."
            )
        return config

    def _load_normalize(self) -> bool:
        settings = json.loads(Path(self.file(PREPROCESSOR)).read_text())
        if settings.get("sampling_rate", SAMPLING_RATE_HZ) != SAMPLING_RATE_HZ:
            raise ExtractorError(
                f"{self.name} was made for {settings['sampling_rate']} Hz; {SAMPLING_RATE_HZ} Hz is what is offered."
            )
        return bool(settings.get("do_normalize", True))

    def _load_pooling(self) -> bytes:
        """What was trained above the encoder, empty where nothing was; it must be what the config asks for."""
        path = Path(self._source, POOLING)
        content = path.read_bytes() if path.exists() else b""
        try:
            held = {name.partition(".")[0] for name in load(content)} if content else set()
        except SafetensorError as error:
            raise ExtractorError(f"{self.name}/{POOLING} cannot be read: {error}. Copy the folder anew.") from None
        choices = {
            "layer_scores": ("features.speech_layer", self.config.speech_layer, "weighted"),
            "attention": ("features.speech_pooling", self.config.speech_pooling, "attention"),
        }
        for name, (field, value, trained) in choices.items():
            if value == trained and name not in held:
                raise ExtractorError(
                    f"{field} is '{value}', which {self.name} was not trained with: pooling is fixed at extraction. "
                    "Give 'mean', or train it end to end (jobs/train.py --manifest, train.encoder)."
                )
            if name in held and value != trained:
                raise ExtractorError(
                    f"{self.name} was trained with {field} '{trained}', and the config says '{value}'; "
                    f"set {field}={trained}."
                )
        return content


def fitting_batch_s(most_s: float) -> float:
    """Seconds in a batch that suit this machine, `most_s` at most."""
    return most_s if torch.cuda.is_available() else min(most_s, _CPU_BATCH_S)


def _local_copy(uri: str) -> tempfile.TemporaryDirectory:
    """A folder with the model's files at a URI, which transformers does not read; gone with the object."""
    folder = tempfile.TemporaryDirectory(prefix="vaemo-encoder-")
    for name in (WEIGHTS, CONFIG, PREPROCESSOR, POOLING):
        if files.exists(files.join(uri, name)):
            Path(folder.name, name).write_bytes(files.read_bytes(files.join(uri, name)))
    return folder


def _digest(path: str) -> str:
    changed = os.stat(path)
    return _digest_of(path, changed.st_mtime_ns, changed.st_size)


@functools.lru_cache(maxsize=8)
def _digest_of(path: str, changed_ns: int, size: int) -> str:
    """The SHA-256 of a file, computed again where it was replaced."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
