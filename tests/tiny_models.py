"""Encoders of the real kinds with a few thousand random weights, written to disk as their makers would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
KINDS = {
    "wavlm": ({"feat_extract_norm": "group"}, False),
    "wav2vec2": ({"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}, True),
    "hubert": ({"feat_extract_norm": "group"}, True),
}
"""Norm and layout of the best known model of each kind, and its `do_normalize`."""

_SPEAKER = """
sample_rate: 16000
n_mels: 24
# The path on the hub; not used: !apply:os.system
pretrained_path: speechbrain/spkrec-somewhere
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
{model}
modules:
    compute_features: !ref <compute_features>
    embedding_model: !ref <embedding_model>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
"""
_ECAPA = """
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 48]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 16
    lin_neurons: 12
    res2net_scale: 4
    se_channels: 8
"""
_XVECTOR = """
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: !ref <n_mels>
    activation: !name:torch.nn.LeakyReLU
    tdnn_blocks: 5
    tdnn_channels: [16, 16, 16, 16, 48]
    tdnn_kernel_sizes: [5, 3, 3, 1, 1]
    tdnn_dilations: [1, 2, 3, 1, 1]
    lin_neurons: 10
"""
SPEAKERS = {"ecapa": (_ECAPA, 12), "xvector": (_XVECTOR, 10)}


def write_speech_model(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """A WavLM, wav2vec2 or HuBERT with its preprocessor config."""
    transformers = pytest.importorskip("transformers", reason="the extra encoders is not installed")

    options, normalize = KINDS[kind]
    names = {"wavlm": "WavLM", "wav2vec2": "Wav2Vec2", "hubert": "Hubert"}
    config = getattr(transformers, f"{names[kind]}Config")(**{**_SMALL, **options, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names[kind]}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    return folder


def write_speaker_model(folder: Path, kind: str, seed: int = 0, *, published: bool = False) -> Path:
    """An ECAPA-TDNN or x-vector encoder: `published` as SpeechBrain does it, a pickle, else turned into safetensors."""
    pytest.importorskip("speechbrain", reason="the extra encoders is not installed")
    from hyperpyyaml import load_hyperpyyaml

    settings = _SPEAKER.format(model=SPEAKERS[kind][0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.yaml").write_text(settings)
    torch.manual_seed(seed)
    weights = load_hyperpyyaml(settings)["embedding_model"].state_dict()
    if published:
        torch.save(weights, folder / "embedding_model.ckpt")
    else:
        save_file(weights, folder / "embedding_model.safetensors")
    return folder
