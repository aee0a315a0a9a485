"""Speech embeddings by WavLM, wav2vec2 or HuBERT: frames of one layer or all, pooled over the utterance.

An utterance's vector is the same alone and in any batch (`vaemo.features.speech_network` says how). Training end to
end embeds through the same functions as extraction.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
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
from vaemo.features.base import fingerprint_of, first_line, needed_version
from vaemo.features.speech_network import CONFIG, POOLING, WEIGHTS, SpeechNetwork
from vaemo.features.watch import begin_utterance
from vaemo.units import SAMPLING_RATE_HZ

MODEL_TYPES = ("wavlm", "wav2vec2", "hubert")

INDEX = f"{WEIGHTS}.index.json"
"""Which files hold the weights, where one does not."""

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""What is done to samples, as feature extractors were saved, and as processors are since transformers 5."""

CONVERT = "python -m vaemo.features.convert"

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
        preprocessor: Content of the preprocessor config.

    Raises:
        ExtractorError: if the model is not there, is not of `MODEL_TYPES`, lacks safetensors weights or some of them,
            or its preprocessor config, wants another sampling rate, has fewer layers, or was trained with another
            pooling.
    """

    uses_gpu = True

    def __init__(self, config: FeatureConfig, *, batch_s: float = 60.0) -> None:
        self.config, self.name = config, config.speech
        self.version = needed_version("transformers", f"features.speech is '{self.name}'", "logmel or none")
        self._batch_s, self._max_s = batch_s, config.max_utterance_s
        self._copy = _local_copy(self.name) if files.is_uri(self.name) else None
        self._source = self._copy.name if self._copy else self.name
        self._model_config = self._load_config()
        self.preprocessor = self._load_preprocessor()
        layers = self._model_config.num_hidden_layers
        if isinstance(config.speech_layer, int) and config.speech_layer > layers:
            raise ExtractorError(
                f"features.speech_layer is {config.speech_layer}, and {self.name} has {layers} layers; "
                f"give 0 to {layers}, or -1."
            )
        self._layer = layers if config.speech_layer == -1 else config.speech_layer
        self._pooling = self._load_pooling()
        self.dim = self._model_config.hidden_size
        self.fingerprint = self._fingerprint(
            config, self._weights_digest(), self._model_config.to_json_string(), self._pooling
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
        parts = [(row, part) for row, samples in enumerate(utterances) for part in self.cut(self.prepared(samples))]
        rows, lengths, pooled = [], [], []
        for batch in self.batches(parts):
            begin_utterance()
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

    def kept(self, network: SpeechNetwork, config: FeatureConfig) -> tuple[dict[str, bytes], str]:
        """What a folder of a network of this encoder holds, and the fingerprint of the encoder that is read from there.

        Args:
            network: From `network`, or a copy of it, trained.
            config: Of the encoder that is kept: its layer and pooling.
        """
        held = {**network.files(), PREPROCESSOR: self.preprocessor}
        digest = hashlib.sha256(held[WEIGHTS]).hexdigest()
        return held, self._fingerprint(config, digest, held[CONFIG].decode(), held.get(POOLING, b""))

    def _fingerprint(self, config: FeatureConfig, weights: str, model: str, pooling: bytes) -> str:
        layer = config.speech_layer
        return fingerprint_of(
            weights=weights,
            config=model,
            normalize=self._normalize,
            layer=self._model_config.num_hidden_layers if layer == -1 else layer,
            pooling=config.speech_pooling,
            trained=hashlib.sha256(pooling).hexdigest(),
            max_utterance_s=config.max_utterance_s,
        )

    def _find(self, name: str) -> tuple[str | None, str]:
        """Local path of one of the model's files, None if it has no such file; and the reason."""
        if Path(self._source).is_dir():
            path = Path(self._source, name)
            return (str(path) if path.is_file() else None), "no such file"
        from transformers.utils import cached_file

        try:
            return cached_file(self._source, name, revision=self.config.speech_revision), ""
        except (OSError, ValueError) as error:
            return None, first_line(error)

    def _weights_digest(self) -> str:
        """Of the file, or of all files, that hold the weights."""
        whole, why = self._find(WEIGHTS)
        if whole:
            return _digest(whole)
        index, _ = self._find(INDEX)
        if not index:
            raise ExtractorError(
                f"{self.name} (revision {self.config.speech_revision}) has no {WEIGHTS}, nor {INDEX} ({why}). Weights "
                f"are read from safetensors alone. Where they are pytorch_model.bin, `{CONVERT} {self.name} --out "
                "FOLDER` turns them once; then give FOLDER."
            )
        digests = []
        for name in _parts(Path(index).read_bytes(), self.name):
            path, why = self._find(name)
            if not path:
                raise ExtractorError(
                    f"{self.name} has no {name} ({why}), which its {INDEX} names. Copy the folder again, all of it."
                )
            digests.append(f"{name} {_digest(path)}")
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def prepared(self, samples: np.ndarray) -> np.ndarray:
        """Samples, normalised if the model's preprocessor does it."""
        if not self._normalize:
            return samples
        return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)

    def cut(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Overlapping parts of equal length, of at most `max_utterance_s`; none of less than a frame."""
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

    def batches(self, parts: Sequence[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
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
        try:
            model, report = getattr(transformers, kinds[self._model_config.model_type]).from_pretrained(
                self._source,
                revision=self.config.speech_revision,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
            raise ExtractorError(
                f"the weights of {self.name} cannot be read ({first_line(error)}). Copy the folder again, all of it."
            ) from None
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
        except Exception as error:  # a library may raise anything on a bad file
            inside = sorted(Path(self._source).rglob(CONFIG)) if Path(self._source).is_dir() else []
            meant = [path.parent for path in inside if path.parent != Path(self._source)]
            hint = f" There is one in {meant[0]}." if meant else ""
            raise ExtractorError(
                f"features.speech is '{self.name}', and no model can be loaded from there ({first_line(error)}).{hint} "
                "Give logmel, none, a folder, or the name of a model on the hub that this machine can reach."
            ) from None
        if config.model_type not in MODEL_TYPES:
            raise ExtractorError(
                f"features.speech is '{self.name}', a model of type {config.model_type}; "
                f"{', '.join(MODEL_TYPES)} are offered."
            )
        return config

    @functools.cached_property
    def _normalize(self) -> bool:
        return bool(json.loads(self.preprocessor).get("do_normalize", True))

    def _load_preprocessor(self) -> bytes:
        path, why = self._find(PREPROCESSOR)
        settings: Any
        if path:
            content = Path(path).read_bytes()
            settings = _settings(content, f"{self.name}/{PREPROCESSOR}")
        else:
            path, _ = self._find(PROCESSOR)
            said = _settings(Path(path).read_bytes(), f"{self.name}/{PROCESSOR}") if path else {}
            settings = said.get("feature_extractor")
            content = json.dumps(settings, indent=2).encode()
        if not isinstance(settings, dict):
            raise ExtractorError(
                f"{self.name} (revision {self.config.speech_revision}) has no {PREPROCESSOR}, nor a {PROCESSOR} that "
                f"says what its feature extractor does ({why}). Save the model's feature extractor, or processor, with "
                "transformers' save_pretrained into the same folder."
            )
        rate = settings.get("sampling_rate", SAMPLING_RATE_HZ)
        if rate != SAMPLING_RATE_HZ:
            raise ExtractorError(f"{self.name} was made for {rate} Hz; {SAMPLING_RATE_HZ} Hz is what is offered.")
        return content

    def _load_pooling(self) -> bytes:
        """What was trained above the encoder, empty where nothing was; it must be what the config asks for."""
        path = Path(self._source, POOLING)
        content = path.read_bytes() if path.exists() else b""
        try:
            held = {name.partition(".")[0] for name in load(content)} if content else set()
        except SafetensorError as error:
            raise ExtractorError(f"{self.name}/{POOLING} cannot be read: {error}. Copy the folder again.") from None
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
    """A temporary local copy of a model at a URI, which transformers does not read; deleted with the object."""
    folder = tempfile.TemporaryDirectory(prefix="vaemo-encoder-")
    names = [WEIGHTS, INDEX, CONFIG, PREPROCESSOR, PROCESSOR, POOLING]
    while names:
        name = names.pop()
        if not files.exists(files.join(uri, name)):
            continue
        content = files.read_bytes(files.join(uri, name))
        files.write_whole(Path(folder.name, name), content)
        if name == INDEX:
            with contextlib.suppress(ExtractorError):
                names += _parts(content, uri)
    return folder


def _settings(content: bytes, path: str) -> dict[str, Any]:
    """The settings in a JSON file of a model; ExtractorError if it holds none."""
    try:
        said = json.loads(content)
    except ValueError as error:
        raise ExtractorError(f"{path} is not JSON ({error}); copy the folder again.") from None
    if not isinstance(said, dict):
        raise ExtractorError(f"{path} holds {type(said).__name__}, no settings; copy the folder again.")
    return said


def _parts(index: bytes, name: str) -> list[str]:
    """The files, below the model's folder, that an index of weights names; ExtractorError where it names none."""
    held = _settings(index, f"{name}/{INDEX}").get("weight_map")
    parts = sorted({str(part) for part in held.values()}) if isinstance(held, dict) else []
    if not parts or any(os.path.isabs(part) or ".." in part.split("/") for part in parts):
        raise ExtractorError(f"{name}/{INDEX} does not say which files hold the weights; copy the folder again.")
    return parts


def _digest(path: str) -> str:
    changed = os.stat(path)
    return _digest_of(path, changed.st_mtime_ns, changed.st_size)


@functools.lru_cache(maxsize=8)
def _digest_of(path: str, changed_ns: int, size: int) -> str:
    """The SHA-256 of a file, computed again where it was replaced."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
