"""The speech encoder inside the training loop: which encoder, which layers are trained, and how it is saved.

It is the encoder that made the store, with the same settings: training starts from the store's features, whose mean and
deviation over the training split standardise the speech stream throughout. Attention and layer weights start as plain
means, so that they do not change the features at first. Until the epoch at which it is unfrozen the store's features
are used, and no audio is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vaemo.config import Config, FeatureConfig
from vaemo.data.sessions import Session
from vaemo.data.windows import PackedSessions, Window
from vaemo.errors import FeatureMismatchError, UsageError
from vaemo.features.speech import SpeechEncoder, fitting_batch_s
from vaemo.features.speech_network import SpeechNetwork
from vaemo.parts.shards import digest
from vaemo.store import FeatureStore
from vaemo.training.group import Group
from vaemo.training.waveforms import Waveforms, ahead

READ_AT_ONCE = 64
"""Utterances whose samples are held at a time outside of windows."""

_BUILT_IN = ("logmel", "none")


@dataclass(frozen=True)
class KeptEncoder:
    """An encoder as a checkpoint holds it.

    Attributes:
        files: Of its folder, by name.
        features: Extractors of the checkpoint; the name of the speech encoder is a placeholder.
        fingerprint: Of the speech stream that it makes.
        origin: For the provenance: the encoder that training started from, and what of it was trained.
    """

    files: dict[str, bytes]
    features: FeatureConfig
    fingerprint: str
    origin: dict[str, Any]


@dataclass(frozen=True, eq=False)
class EndToEnd:
    """What end-to-end training takes beside a store's sessions.

    Attributes:
        network: What is trained; as opened on the CPU, nothing of it unfrozen.
        extractor: The encoder that training starts from; embeds with `network`, or a copy of it.
        waveforms: Of every utterance of the store that has features.
        features: Extractors of the store, with the pooling that is trained.
        config: Section `train`.
    """

    network: SpeechNetwork
    extractor: SpeechEncoder
    waveforms: Waveforms
    features: FeatureConfig
    config: Config

    @staticmethod
    def open(store: FeatureStore, manifest: str, config: Config) -> EndToEnd:
        """The encoder of a store and the audio of its manifest.

        Args:
            store: What `jobs/extract.py` wrote.
            manifest: From which it was extracted.
            config: Sections `train`, `features` (the pooling that is to be trained) and `extract`.

        Raises:
            UsageError: if the store's speech features come from no encoder that can be trained, more layers are to be
                trained than there are, or speech is compared with its past.
            FeatureMismatchError: if the encoder is no longer the one that made the store.
            ExtractorError: if it cannot be loaded.
            ReadManifestError: if the manifest cannot be read, or lacks utterances of the store.
        """
        assert config.train.encoder != "frozen"
        for name in ("speaker_norm", "session_norm"):
            if "speech" in getattr(config.model, name):
                raise UsageError(
                    f"model.{name} names speech, and train.encoder is '{config.train.encoder}': what came before "
                    "would be vectors of an encoder that has changed since. Compare prosody alone, or keep the encoder "
                    "frozen."
                )
        settings = store.info.get("settings", {})
        speech = settings.get("features", {}).get("speech", "none")
        if speech in _BUILT_IN:
            raise UsageError(
                f"train.encoder is '{config.train.encoder}', and the speech features of {store.path} are "
                f"{'unknown' if not settings else speech}: there is no encoder to train. Extract a store with "
                "features.speech set to a WavLM, wav2vec2 or HuBERT model."
            )
        made = Config.from_dict({"features": settings["features"]}).features
        extractor = SpeechEncoder(made, batch_s=fitting_batch_s(config.extract.batch_s))
        recorded = store.info["extractors"]["speech"]["fingerprint"]
        if extractor.fingerprint != recorded:
            raise FeatureMismatchError(
                f"the speech features of {store.path} were made by the encoder {recorded[:12]}, and {speech} is now "
                f"{extractor.fingerprint[:12]}. Restore the old one, or extract the store again."
            )
        features = _as_trained(made, config.features)
        # Random initial values are the same on every worker.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            network = extractor.network(
                layer="weighted" if features.speech_layer == "weighted" else None,
                pooling=features.speech_pooling,
                precision="bf16" if features.speech_precision == "fp16" else features.speech_precision,
            )
        opened = EndToEnd(network, extractor, Waveforms.of_store(store, manifest, config), features, config)
        opened.trained()
        return opened

    @property
    def fingerprint(self) -> str:
        """Of the encoder to start from, what is trained of it, and the audio."""
        pooling = f"{self.features.speech_layer} {self.features.speech_pooling} {self.features.speech_precision}"
        return digest(self.extractor.fingerprint, pooling, *self.waveforms.places())

    def trained(self) -> list[nn.Parameter]:
        """Parameters of the encoder that are trained, those of the pooling left out."""
        train = self.config.train
        return self.network.trainable(train.encoder_layers if train.encoder == "last_k" else None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimiser: the encoder at its own rate, the pooling at that of what is above; nothing decays.

        Weight decay would draw a pretrained encoder towards zero, not towards where it came from.
        """
        train = self.config.train
        groups = [(self.trained(), train.encoder_lr), (list(self.network.pooling_parameters().values()), train.lr)]
        return [{"params": parameters, "lr": lr, "weight_decay": 0.0} for parameters, lr in groups if parameters]

    def unfreeze(self) -> None:
        """Enable gradients for the trained parameters."""
        for group in self.parameter_groups():
            for parameter in group["params"]:
                parameter.requires_grad_(True)

    def embed_windows(self, windows: Iterator[Window], utt_ids: np.ndarray) -> Iterator[Window]:
        """The windows with speech vectors by the network as it is when each is asked for, with gradients.

        Args:
            windows: Of packed sessions; the samples of the next are read while one is in use.
            utt_ids: Of these sessions, (U,).
        """
        for window, samples in ahead((window, self._read(window, utt_ids)) for window in windows):
            speech = torch.zeros_like(cast(Tensor, window.features.speech))
            if samples:
                checkpointing = self.config.train.encoder_checkpointing
                vectors = self.extractor.embed(samples, self.network, checkpointing=checkpointing)
                speech[window.valid] = vectors
            yield dataclasses.replace(window, features=dataclasses.replace(window.features, speech=speech))

    @torch.no_grad()
    def embed_sessions(self, sessions: PackedSessions, network: SpeechNetwork, group: Group) -> PackedSessions:
        """The sessions with speech vectors by the network, or a copy of it; every worker computes a share of them."""
        own = sessions.gathered()
        speech = torch.zeros_like(cast(Tensor, own.features.speech))
        shares = range(group.rank * READ_AT_ONCE, len(speech), group.size * READ_AT_ONCE)
        blocks = (slice(first, first + READ_AT_ONCE) for first in shares)
        for block, samples in ahead((block, self.waveforms.read(sessions.utt_ids[block])) for block in blocks):
            speech[block] = self.extractor.embed(samples, network)
        return dataclasses.replace(own, features=dataclasses.replace(own.features, speech=group.add(speech)))

    def keep(self, network: SpeechNetwork) -> KeptEncoder:
        """What a checkpoint holds of the network, or of a copy of it."""
        train = self.config.train
        held, fingerprint = self.extractor.kept(network, self.features)
        return KeptEncoder(
            files=dict(sorted(held.items())),
            features=dataclasses.replace(self.features, speech="", speech_revision="main"),
            fingerprint=fingerprint,
            origin={
                "name": self.extractor.name,
                "revision": self.features.speech_revision,
                "fingerprint": self.extractor.fingerprint,
                "trained": f"last {train.encoder_layers} layers" if train.encoder == "last_k" else "all",
            },
        )

    def _read(self, window: Window, utt_ids: np.ndarray) -> list[np.ndarray]:
        return self.waveforms.read(utt_ids[window.index[window.valid].cpu().numpy()])


def check_encoder_settings(config: Config, manifest: str | None, info: Mapping[str, Any]) -> None:
    """Refuse contradictory settings about training the encoder.

    Args:
        config: Sections `train` and `features`.
        manifest: As given, or None.
        info: The store's metadata.

    Raises:
        UsageError: for a manifest without an encoder to train, an encoder without a manifest, or a pooling that is
            to be trained without an encoder.
    """
    encoder = config.train.encoder
    if encoder != "frozen" and manifest is None:
        raise UsageError(
            f"train.encoder is '{encoder}', and a feature store holds pooled features, not speech; give --manifest, "
            "the manifest that the store was extracted from."
        )
    if encoder == "frozen" and manifest is not None:
        raise UsageError("--manifest is there to train the encoder; set train.encoder to last_k or all, or leave it.")
    made = info.get("settings", {}).get("features", {})
    for name, learned in (("speech_pooling", "attention"), ("speech_layer", "weighted")):
        if encoder == "frozen" and getattr(config.features, name) == learned != made.get(name):
            raise UsageError(
                f"features.{name} is '{learned}', which is trained end to end, and train.encoder is 'frozen': the "
                "pooling of a store is fixed at extraction. Set train.encoder and --manifest, or leave it."
            )


def rehear(sessions: Iterable[Session], features: FeatureConfig, waveforms: Waveforms) -> list[Session]:
    """Sessions with the speech stream recomputed from audio by the speech encoder of `features`."""
    extractor = SpeechEncoder(features, batch_s=fitting_batch_s(60))
    return [
        dataclasses.replace(session, streams={**session.streams, "speech": extractor(waveforms.read(session.utt_ids))})
        for session in sessions
    ]


def _as_trained(made: FeatureConfig, asked: FeatureConfig) -> FeatureConfig:
    """The store's features with the pooling that is to be trained.

    Raises:
        UsageError: if a weighting of layers is to be trained on features that are not their plain mean.
    """
    if asked.speech_layer == "weighted" and made.speech_layer not in ("mean", "weighted"):
        raise UsageError(
            f"features.speech_layer is 'weighted', which begins as the plain mean over the layers, and the store holds "
            f"that of layer {made.speech_layer}. Extract it with features.speech_layer=mean."
        )
    return dataclasses.replace(
        made,
        speech_layer="weighted" if asked.speech_layer == "weighted" else made.speech_layer,
        speech_pooling="attention" if asked.speech_pooling == "attention" else made.speech_pooling,
    )
