"""The network behind speech embeddings: samples of a batch in, one vector each out, differentiable.

An utterance's vector is the same alone and in any batch. The convolutions run per utterance, because a group norm over
time (the `base` models) sees padding; frames are padded, because the transformer masks them; nothing is dropped or
masked at random, in training neither. Letters: B utterances of a batch, F frames of the longest, H hidden width,
N layers of the transformer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vaemo.errors import ExtractorError, UsageError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""Files of an encoder, as transformers names them."""

POOLING = "pooling.safetensors"
"""What was trained above the encoder, in its folder: weights of the layers, attention over frames."""

_ATTENTION_WIDTH = 128
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class AttentionPooling(nn.Module):
    """The mean of frames, weighted by what a small network makes of each; at first the plain mean.

    Source:
        Lin et al. (2017), A structured self-attentive sentence embedding, equation 5, with one hop.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, _ATTENTION_WIDTH)
        self.score = nn.Linear(_ATTENTION_WIDTH, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Vectors (B, H) of frames (B, F, H), of which `valid` (B, F) are there."""
        scores = self.score(self.hidden(hidden).tanh())[..., 0]
        weights = scores.masked_fill(~valid, -torch.inf).softmax(-1)
        return (hidden * weights[..., None]).sum(1)


class SpeechNetwork(nn.Module):
    """An encoder of transformers, one or all of its layers, and the pooling of their frames.

    Args:
        encoder: WavLM, wav2vec2 or HuBERT, in evaluation mode.
        layer: Hidden layer, 0 (before the transformer) to N; `mean` or `weighted` over all of them.
        pooling: `mean` or `attention`.
        precision: Arithmetic on CUDA: `bf16`, `fp16` or `fp32`.
        trained: Weights of the pooling and of the layers as `files` gives them; what is not among them begins as a
            plain mean.

    Raises:
        ExtractorError: if `trained` has other shapes.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        layer: int | Literal["mean", "weighted"],
        pooling: Literal["mean", "attention"],
        precision: Literal["bf16", "fp16", "fp32"],
        trained: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._layer, self._autocast = layer, _AUTOCAST[precision]
        n_layers = encoder.config.num_hidden_layers
        self.layer_scores = nn.Parameter(torch.zeros(n_layers + 1)) if layer == "weighted" else None
        self.attention = AttentionPooling(encoder.config.hidden_size) if pooling == "attention" else None
        # In a tuple, so that layers which nothing is computed of are no part of the module.
        self._whole = (encoder.encoder.layers, encoder.encoder.layer_norm)
        if isinstance(layer, int) and layer < n_layers:
            encoder.encoder.layers = encoder.encoder.layers[:layer]
            if encoder.config.do_stable_layer_norm:
                # The norm after the last layer is not part of the hidden layers before it.
                encoder.encoder.layer_norm = nn.Identity()
        self._take_pooling(trained or {})

    def forward(self, utterances: Sequence[Tensor]) -> Tensor:
        """Vectors of utterances, (B, H), in the precision of the weights.

        Args:
            utterances: Samples of each, (n,), normalised as the encoder wants them, at least one frame long.
        """
        like = self.encoder.feature_projection.projection.weight
        fast = like.is_cuda and like.dtype is torch.float32 and self._autocast is not torch.float32
        with torch.autocast("cuda", self._autocast, enabled=fast):
            frames = [self.encoder.feature_extractor(samples.to(like)[None])[0].T for samples in utterances]
            lengths = torch.tensor([len(each) for each in frames], device=like.device)
            padded = nn.utils.rnn.pad_sequence(frames, batch_first=True)
            valid = torch.arange(padded.shape[1], device=like.device) < lengths[:, None]
            projected = self.encoder.feature_projection(padded)
            hidden = self._hidden(projected[0] if isinstance(projected, tuple) else projected, valid)
        hidden = hidden.to(like.dtype)
        if self.attention is not None:
            return self.attention(hidden, valid)
        weights = valid.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1)

    def trainable(self, layers: int | None) -> list[nn.Parameter]:
        """Parameters of the encoder that are trained.

        Args:
            layers: Only these last layers of the transformer, with the norm behind them; None is the whole encoder.

        Raises:
            UsageError: if there are fewer layers.
        """
        if layers is None:
            # A vector that stands for frames which were masked in pretraining; nothing is masked here.
            return [parameter for name, parameter in self.encoder.named_parameters() if name != "masked_spec_embed"]
        transformer = self.encoder.encoder
        if layers > len(transformer.layers):
            raise UsageError(
                f"train.encoder_layers is {layers}; up to features.speech_layer the encoder has "
                f"{len(transformer.layers)} layers."
            )
        parts = list(transformer.layers[-layers:])
        if self.encoder.config.do_stable_layer_norm:
            parts.append(transformer.layer_norm)
        return [parameter for part in parts for parameter in part.parameters()]

    def pooling_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained above the encoder, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("encoder.")}

    def compile_layers(self) -> None:
        """Compile every layer of the transformer; only for inference, since a copy would run the original's layers."""
        for layer in self.encoder.encoder.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def files(self) -> dict[str, bytes]:
        """What transformers reads this encoder from, all its layers, and the pooling beside it, by name."""
        transformer = self.encoder.encoder
        used = (transformer.layers, transformer.layer_norm)
        transformer.layers, transformer.layer_norm = self._whole
        try:
            weights = save(_cpu(self.encoder.state_dict()), {"format": "pt"})
        finally:
            transformer.layers, transformer.layer_norm = used
        config = copy.deepcopy(self.encoder.config)
        config.architectures = [type(self.encoder).__name__]
        files = {CONFIG: config.to_json_string().encode(), WEIGHTS: weights}
        pooling = self.pooling_parameters()
        return {**files, **({POOLING: save(_cpu(pooling))} if pooling else {})}

    def _hidden(self, projected: Tensor, valid: Tensor) -> Tensor:
        """Frames of the layer, or of the mean over layers, (B, F, H)."""
        if isinstance(self._layer, int):
            return self.encoder.encoder(projected, attention_mask=valid).last_hidden_state
        with _inputs(self.encoder.encoder.layers) as states:
            states.append(self.encoder.encoder(projected, attention_mask=valid).last_hidden_state)
        if self.layer_scores is None:
            return sum(states[1:], states[0]) / len(states)
        weights = self.layer_scores.softmax(0)
        return sum((weight * state for weight, state in zip(weights, states, strict=True)), torch.zeros_like(states[0]))

    def _take_pooling(self, trained: Mapping[str, Tensor]) -> None:
        own = self.pooling_parameters()
        for name in own.keys() & trained.keys():
            if trained[name].shape != own[name].shape:
                raise ExtractorError(
                    f"{POOLING} holds {name} of shape {tuple(trained[name].shape)}, and this encoder takes "
                    f"{tuple(own[name].shape)}; copy the whole folder again."
                )
            own[name].data.copy_(trained[name])


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _inputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What goes into each layer, while the block runs: hidden states 0 to N - 1."""
    states: list[Tensor] = []
    # Hooks that stayed would travel into copies of the module and fill the original's list.
    hooks = [layer.register_forward_pre_hook(lambda _, given: states.append(given[0])) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
