"""The session model: features of a chunk and the session's state in, the targets and the next state out.

`forward` over a chunk and `step` over one utterance are one function: any cutting of a session into chunks, from any
state, gives the same predictions, state and gradients. Nothing is remembered outside `SessionState`.

Letters: L lanes, T steps, D features of a stream, H width of a hidden layer, K targets, the first F of which, those
of utterances, are fed back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaemo.config import ModelConfig, UpdaterConfig
from vaemo.errors import FeatureMismatchError
from vaemo.model.checks import check_features, check_finite, check_lengths, check_observed, used_pasts, used_streams
from vaemo.model.chunk import Carried, Chunk, Diagnostics, Dropout, Weights, replace_observed
from vaemo.model.ema import SessionEma
from vaemo.model.feedback import MAX_PASSES, WORTHWHILE_PASSES, Fed, run_known, run_loop, run_parallel
from vaemo.model.film import Film, FilmDelta, LaneDelta
from vaemo.model.gru import at_length
from vaemo.model.head import Head
from vaemo.model.scan import resolve_scan
from vaemo.model.standardize import Standardize
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams
from vaemo.model.updater import MEMORY_FIELDS, Updater
from vaemo.units import LabelScale


class SessionRegressor(nn.Module):
    """Predicts the targets (valence, arousal) of every utterance of a session, online, with a fixed-size memory.

    Args:
        model: What is combined, remembered and fed back.
        updater: Sizes of the recurrent part.
        dims: Width of every stream of the features. Parts that need an absent stream are switched off.

    Attributes:
        targets: Names of what is predicted, in the order of the last axis: K, of utterances first.
        n_fed: F.
        dims: Width of the streams that the model uses; others are ignored.
        pasts: What streams are compared with, as the streams allow: the names that `Streams.past` must hold.
        film_kind: `film`, `concat` or `off`, as the streams allow.
        feeds_predictions: Whether predictions are fed back where nothing is observed.
        feedback_gradient: Whether gradients flow through predictions that are fed back.
        fingerprint: Checkpoint that the model was loaded from; empty otherwise.

    Raises:
        FeatureMismatchError: if the streams leave nothing to predict from.

    Example:
        >>> model = SessionRegressor(ModelConfig(), UpdaterConfig(), {"speech": 40})
        >>> prediction, state = model.step(Streams(speech=torch.randn(1, 40)), model.fresh_state(1))
        >>> prediction.shape
        torch.Size([1, 2])
    """

    label_deviation: Tensor

    def __init__(self, model: ModelConfig, updater: UpdaterConfig, dims: Mapping[str, int]):
        super().__init__()
        self.config, self.updater_config = model, updater
        self.targets, self.n_fed = model.names, len(model.utterance_targets)
        self.film_kind, self.dims = used_streams(model, dims)
        self.pasts = used_pasts(model, self.dims)
        self.feedback_gradient = model.feedback_gradient
        self.fingerprint = ""
        self._empty: tuple[Any, SessionState] | None = None
        self.standardize = nn.ModuleDict({name: Standardize(dim) for name, dim in self.dims.items()})
        self.register_buffer("label_deviation", torch.ones(len(self.targets)))
        # Width of every stream with its differences from the past beside it.
        width = {
            name: dim * (1 + sum(past.endswith(f".{name}") for past in self.pasts)) for name, dim in self.dims.items()
        }
        self.speech_mlp = model.speech_mlp if "speech" in self.dims else "none"
        if self.film_kind == "film":
            modulated = model.speech_dim if self.speech_mlp == "before_film" else self.dims["speech"]
            self.film = Film(self.dims["speaker"], modulated, model.film_hidden)
        if "prosody" in self.dims:
            self.prosody = _network(width["prosody"], model.prosody_hidden, model.prosody_dim)
        if self.speech_mlp != "none":
            self.speech = _network(width["speech"], model.speech_hidden, model.speech_dim)
        z_dim = width.get("speech", 0) if self.speech_mlp == "none" else model.speech_dim
        z_dim += model.prosody_dim if "prosody" in self.dims else 0
        z_dim += self.dims["speaker"] if self.film_kind == "concat" else 0
        self.norm_z = nn.LayerNorm(z_dim) if model.norm_z else nn.Identity()
        self.has_memory = model.updater != "none"
        self.has_feedback = self.has_memory and model.feedback != "none" and self.n_fed > 0
        self.feeds_predictions = self.has_feedback and model.feedback != "observed"
        if self.has_memory:
            flagged = model.feedback_flag or not self.feeds_predictions
            feedback_dim = self.n_fed * (2 if flagged else 1) if self.has_feedback else 0
            self.updater = Updater(model.updater, updater, z_dim, feedback_dim, model.d_c, model.scan)
            self.ema = SessionEma(model.ema, model.d_c, model.coefficients)
        d_c = model.d_c if self.has_memory else 0
        self.head = Head(z_dim, d_c, model.head_hidden, model.label_range, self.targets)

    @staticmethod
    def from_config(model: ModelConfig, updater: UpdaterConfig, dims: Mapping[str, int]) -> SessionRegressor:
        """A model with new weights for features of these widths."""
        return SessionRegressor(model, updater, dims)

    @staticmethod
    def from_pretrained(path: str | Path) -> SessionRegressor:
        """The model of a checkpoint folder.

        Raises:
            ReadCheckpointError: if the folder is not a whole checkpoint.
        """
        from vaemo.model.checkpoint import load_checkpoint

        return load_checkpoint(path).model

    def save_pretrained(self, path: str | Path, **contents: Any) -> None:
        """Write a checkpoint folder; keywords as in `vaemo.model.checkpoint.save_checkpoint`."""
        from vaemo.model.checkpoint import save_checkpoint

        save_checkpoint(path, self, **contents)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per lane of what the model remembers; width 0 for what it does not use."""
        memory = self.updater.memory_shapes() if self.has_memory else dict.fromkeys(MEMORY_FIELDS, (0,))
        return {**memory, "c": (self.config.d_c if self.has_memory else 0,)}

    def fresh_state(self, lanes: int) -> SessionState:
        """The state of `lanes` sessions before their first utterance."""
        return SessionState.fresh(
            lanes,
            self.state_shapes(),
            middle=LabelScale(*self.config.label_range).middle,
            n_fed=self.n_fed,
            fingerprint=self.fingerprint,
            dtype=self.label_deviation.dtype,
            device=self.label_deviation.device,
        )

    def set_statistics(self, streams: Mapping[str, tuple[Any, Any]], label_deviation: Any) -> None:
        """Take the statistics of the training split.

        Args:
            streams: Mean and deviation, (D,) each, of every stream in `dims`; others are ignored.
            label_deviation: Deviations of the targets, (K,), on the label range.

        Raises:
            FeatureMismatchError: if a stream is absent, has another width, or a statistic is not finite.
        """
        for name, dim in self.dims.items():
            if name not in streams:
                raise FeatureMismatchError(f"statistics of the stream '{name}' are missing; the model uses it.")
            mean, deviation = (torch.as_tensor(values).to(self.label_deviation) for values in streams[name])
            if mean.shape != (dim,) or deviation.shape != (dim,):
                raise FeatureMismatchError(
                    f"statistics of the stream '{name}' have shapes {tuple(mean.shape)} and {tuple(deviation.shape)}; "
                    f"the model takes ({dim},) each."
                )
            if not (mean.isfinite().all() and deviation.isfinite().all()):
                raise FeatureMismatchError(
                    f"statistics of the stream '{name}' hold NaN or infinity. Correct or remove these rows of the "
                    "store."
                )
            cast(Standardize, self.standardize[name]).set(mean, deviation)
        self.label_deviation.copy_(torch.as_tensor(label_deviation))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimiser: decayed ones, and biases, norms and the scan's own, which are not."""
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (kept if parameter.dim() < 2 or name.endswith("A_log") else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]

    def scan_used(self, device: torch.device | str) -> str:
        """Form of the scan on a device, for provenance: see `vaemo.model.scan`; `none` without a scan."""
        if self.config.updater not in ("mamba", "mamba2"):
            return "none"
        return resolve_scan(self.config.scan, torch.device(device).type, self.config.updater)

    def parallel_passes(self) -> int:
        """Most passes of the parallel solve in training; 0 where the loop is taken at once.

        Under `auto` the solve is used where it is faster: on a CPU where a pass over a chunk is no loop in Python, and
        no gradient flows through the feedback. On CUDA kernels a step costs as much as a chunk, so that it is always
        used; that has not been measured.
        """
        choice, scan = self.config.parallel_feedback, self.scan_used(self.label_deviation.device)
        if choice == "always" or (choice == "auto" and scan == "kernel"):
            return MAX_PASSES
        fast = scan == "compiled" or (scan == "chunk" and self.config.updater == "mamba2")
        return WORTHWHILE_PASSES if choice == "auto" and fast and not self.feedback_gradient else 0

    def draw_dropout(self, lanes: int, steps: int, generator: torch.Generator | None = None) -> Dropout | None:
        """Masks for a chunk of (lanes, steps), on the generator's device; None where the config drops nothing."""
        keep = 1 - self.config.dropout
        if keep == 1:
            return None
        device = generator.device if generator is not None else torch.device("cpu")

        def draw(width: int) -> Tensor:
            mask = torch.empty(lanes, steps, width, dtype=self.label_deviation.dtype, device=device)
            return mask.bernoulli_(keep, generator=generator).div_(keep)

        return Dropout(draw(self.config.d_c if self.has_memory else 0), draw(self.config.head_hidden))

    # -- one chunk, one step -----------------------------------------------------------------------------------------

    def forward(
        self,
        features: Streams,
        state: SessionState,
        lengths: Tensor,
        *,
        observed: Tensor | None = None,
        dropout: Dropout | None = None,
        film_delta: FilmDelta | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> tuple[Tensor, SessionState]:
        """Predictions for a chunk, and the state after it.

        With gradients, a chunk whose predictions are fed back may be solved by parallel passes
        (`model.parallel_feedback`); without, it is always the loop, so that scores of a session do not depend on who
        shares its batch.

        Args:
            features: (L, T, D) per stream, as extracted, with what `pasts` names; content beyond `lengths` is
                ignored. T may be 0.
            state: Memory before the first step, L lanes. Not modified.
            lengths: Valid steps per lane, (L,), int64, 0 <= lengths <= T.
            observed: Known values of these utterances on the label range, (L, T, F), NaN where unknown.
                They replace the prediction that is fed back: they act from the next step on.
            dropout: Masks from `draw_dropout`; None drops nothing.
            film_delta: What speakers add to FiLM's parameters (`vaemo.personalize`), by utterance (L, T).
            diagnostics: Filled, where given.

        Returns:
            Predictions (L, T, K) on the label range, in the order of `targets`, zero beyond `lengths` (a target of the
            session is what it would be if the session ended there), and the memory after each lane's last valid step.

        Raises:
            ShapeError: if lanes, steps, dtypes or lengths disagree.
            FeatureMismatchError: if a stream or a past is missing or has another width.
            NonFiniteFeatureError: if a valid step holds NaN or infinity.
            StateMismatchError: if the state belongs to another model.
        """
        T, shortest, longest = self._check_chunk(features, state, lengths, observed)
        diagnostics = diagnostics if diagnostics is not None else Diagnostics()
        if longest == 0:
            return self.label_deviation.new_zeros(state.lanes, T, len(self.targets)), state
        lengths = lengths.to(self.label_deviation.device)
        valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
        features = features.pick((*self.dims, *self.pasts)).steps(0, longest)
        check_finite(features, valid)
        film_delta = None if film_delta is None else film_delta.steps(0, longest)
        weights = self._weights()
        encode = self._encode if shortest == longest else partial(self._encode_valid, valid=valid)
        to_updater, to_head = encode(features, weights, film_delta)
        chunk = Chunk(
            to_updater,
            to_head,
            valid,
            lengths,
            shortest,
            None if observed is None else observed[:, :longest].to(to_head),
            None if dropout is None else dropout.steps(0, longest),
            self.n_fed,
        )
        carried = Carried(self._unpack(state), state.c)
        run = self._runner(chunk)
        prediction, carried = run(self, chunk, weights, carried, self._first(state), diagnostics)
        prediction = prediction.masked_fill(~valid[..., None], 0)
        values, known = replace_observed(prediction, chunk.observed, self.n_fed)
        after = self._pack(
            state,
            carried,
            (at_length(values, state.last_feedback, lengths), at_length(known, state.last_observed, lengths)),
            lengths,
        )
        return functional.pad(prediction, (0, 0, 0, T - longest)), after

    def _check_chunk(
        self, features: Streams, state: SessionState, lengths: Tensor, observed: Tensor | None
    ) -> tuple[int, int, int]:
        """T, and the shortest and the longest of the valid lengths; errors as `forward`."""
        dtype = self.label_deviation.dtype
        T = check_features(features, self.dims, self.pasts, lanes=state.lanes, n_axes=3, dtype=dtype)
        self._check_state(state)
        shortest, longest = check_lengths(lengths, lanes=state.lanes, steps=T)
        check_observed(observed, (state.lanes, T, self.n_fed))
        return T, shortest, longest

    def step(
        self,
        features: Streams,
        state: SessionState,
        *,
        observed: Tensor | None = None,
        film_delta: FilmDelta | None = None,
    ) -> tuple[Tensor, SessionState]:
        """Predictions for one utterance per lane, and the state after it: `forward` at T = 1, all lanes valid.

        Args:
            features: (L, D) per stream, with what `pasts` names.
            state: Memory before the utterance, L lanes. Not modified.
            observed: Known values of this utterance, (L, F), NaN where unknown; they act on the next one.
            film_delta: As in `forward`, by utterance (L,).

        Returns:
            prediction: (L, K), on the label range.
            state: Memory after the utterance.

        Raises:
            As `forward`.
        """
        dtype = self.label_deviation.dtype
        check_features(features, self.dims, self.pasts, lanes=state.lanes, n_axes=2, dtype=dtype)
        self._check_state(state)
        check_observed(observed, (state.lanes, self.n_fed))
        features = features.pick((*self.dims, *self.pasts))
        check_finite(features)
        return self.unchecked_step(features, state, observed=observed, film_delta=film_delta)

    def unchecked_step(
        self,
        features: Streams,
        state: SessionState,
        *,
        observed: Tensor | None = None,
        film_delta: FilmDelta | LaneDelta | None = None,
    ) -> tuple[Tensor, SessionState]:
        """`step` without validation: only the arithmetic, independent of values, so that it can be exported."""
        weights = self._weights()
        to_updater, to_head = self._encode(features, weights, film_delta)
        carried = Carried(self._unpack(state), state.c)
        prediction, carried = self.advance(to_updater, to_head, weights, carried, self._first(state), None)
        fed = replace_observed(prediction, None if observed is None else observed.to(prediction), self.n_fed)
        return prediction, self._pack(state, carried, fed, torch.ones_like(state.n_steps))

    def evaluate(
        self,
        chunk: Chunk,
        weights: Weights,
        carried: Carried,
        fed: Fed | None,
        diagnostics: Diagnostics | None = None,
    ) -> tuple[Tensor, Carried]:
        """Predictions of a chunk (L, T, K), whose feedback is known, and what is carried on."""
        drop_u, drop_head = (chunk.dropout.updater, chunk.dropout.head) if chunk.dropout else (None, None)
        if chunk.to_updater is None:
            return self.head(chunk.to_head, None, weights.head, drop_head), carried
        u, memory = self.updater(
            chunk.to_updater, self._feedback_input(fed), carried.memory, chunk.valid, weights.updater
        )
        c = self.ema(u if drop_u is None else u * drop_u, carried.c)
        if diagnostics is not None:
            diagnostics.c = c.detach()
        prediction = self.head(chunk.to_head, c, weights.head, drop_head)
        return prediction, Carried(memory, at_length(c, carried.c, chunk.lengths))

    def advance(
        self,
        to_updater: Tensor | None,
        to_head: Tensor,
        weights: Weights,
        carried: Carried,
        fed: Fed,
        valid: Tensor | None,
        dropout: tuple[Tensor | None, Tensor | None] | list[Tensor | None] = (None, None),
    ) -> tuple[Tensor, Carried]:
        """Predictions of one step (L, K) and what is carried on; `valid` (L,), or None where every lane is."""
        if to_updater is None or weights.updater is None:
            return self.head(to_head, None, weights.head, dropout[1]), carried
        u, memory = self.updater.step(to_updater, self._feedback_input(fed), carried.memory, valid, weights.updater)
        c = self.ema.step(u if dropout[0] is None else u * dropout[0], carried.c, weights.alpha)
        if valid is not None:
            c = torch.where(valid[:, None], c, carried.c)
        return self.head(to_head, c, weights.head, dropout[1]), Carried(memory, c)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _encode(
        self, features: Streams, weights: Weights, delta: FilmDelta | LaneDelta | None
    ) -> tuple[Tensor | None, Tensor]:
        """What needs no feedback: the updater's and the head's shares of z, (..., d_model) and (..., H)."""
        standard = {name: self.standardize[name](x) for name, x in features.items()}
        parts = []
        if "speech" in standard:
            parts.append(self._speech(features, standard, delta))
        if "prosody" in standard:
            parts.append(self.prosody(_joined([standard["prosody"], *self._differences(features, "prosody")])))
        if self.film_kind == "concat":
            parts.append(standard["speaker"])
        z = self.norm_z(_joined(parts))
        to_head = self.head.project(z, weights.head)
        return (None if weights.updater is None else self.updater.project(z, weights.updater)), to_head

    def _speech(self, features: Streams, standard: Mapping[str, Tensor], delta: FilmDelta | LaneDelta | None) -> Tensor:
        """The share of the speech stream in z; FiLM leaves its differences from the past as they are."""
        x, beside = standard["speech"], self._differences(features, "speech")
        if self.speech_mlp == "before_film":
            x, beside = self.speech(_joined([x, *beside])), []
        if self.film_kind == "film":
            x = self.film(x, standard["speaker"], delta and delta.to(x.device))
        x = _joined([x, *beside])
        return self.speech(x) if self.speech_mlp == "after_film" else x

    def _differences(self, features: Streams, stream: str) -> list[Tensor]:
        """How far a stream is from each past that it is compared with, (..., D) each."""
        x, standardize = getattr(features, stream), cast(Standardize, self.standardize[stream])
        weight = self.config.speaker_norm_weight
        pasts = (features.past[past] for past in self.pasts if past.endswith(f".{stream}"))
        return [standardize.difference(x, past, weight) for past in pasts]

    def _encode_valid(
        self, features: Streams, weights: Weights, delta: FilmDelta | None, valid: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """`_encode` of a chunk with padding, whose content has no effect.

        With gradients only valid steps are encoded. Without, padding is encoded too, as zeros: a matrix product of
        another size rounds otherwise, and scores must not depend on how long the others in a batch are.
        """
        if not torch.is_grad_enabled():
            return self._encode(features.map(lambda x: x.masked_fill(~valid[..., None], 0)), weights, delta)
        rows = valid.flatten().nonzero()[:, 0]
        packed = features.map(lambda x: x.flatten(0, 1)[rows])
        to_updater, to_head = self._encode(packed, weights, delta and delta.to(rows.device).rows(rows))

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(valid.numel(), x.shape[-1]).index_copy(0, rows, x).unflatten(0, valid.shape)

        return (None if to_updater is None else spread(to_updater)), spread(to_head)

    def _weights(self) -> Weights:
        if not self.has_memory:
            return Weights(None, None, self.head.weights())
        return Weights(self.updater.constants(), self.ema.per_channel(self.label_deviation), self.head.weights())

    def _feedback_input(self, fed: Fed | None) -> Tensor | None:
        if fed is None or not self.has_feedback:
            return None
        if not self.feeds_predictions:
            # In deviations, so that a label weighs about as much as a feature; 0 is neutral, and so is its flag.
            middle = LabelScale(*self.config.label_range).middle
            values = torch.where(fed[1], (fed[0] - middle) / self.label_deviation[: self.n_fed], 0)
            return torch.cat([values, fed[1].to(values)], -1)
        values = fed[0] if self.feedback_gradient else fed[0].detach()
        return torch.cat([values, fed[1].to(values)], -1) if self.config.feedback_flag else values

    def _runner(self, chunk: Chunk) -> Callable[..., tuple[Tensor, Carried]]:
        """How this chunk is computed: see `vaemo.model.feedback`."""
        if not self.feeds_predictions:
            return run_known
        if not torch.is_grad_enabled():
            return run_loop
        unknown = chunk.valid[:, 1:, None]
        if chunk.observed is not None:
            unknown = unknown & chunk.observed[:, :-1].isnan()
        if not unknown.any():
            return run_known
        return run_parallel if self.parallel_passes() else run_loop

    def _check_state(self, state: SessionState) -> None:
        kind = self.fingerprint, self.label_deviation.dtype, self.label_deviation.device
        # Made once: at one lane making it takes a tenth of a step.
        if self._empty is None or self._empty[0] != kind:
            self._empty = kind, self.fresh_state(0)
        self._empty[1].check_same_model(state)

    def _first(self, state: SessionState) -> Fed:
        return state.last_feedback, state.last_observed

    def _unpack(self, state: SessionState) -> list[tuple[Tensor, ...]]:
        return self.updater.unpack(state.tensors()) if self.has_memory else []

    def _pack(self, state: SessionState, carried: Carried, fed: Fed, lengths: Tensor) -> SessionState:
        memory: dict[str, Any] = self.updater.pack(carried.memory) if self.has_memory else {}
        return dataclasses.replace(
            state,
            **memory,
            c=carried.c,
            last_feedback=fed[0],
            last_observed=fed[1],
            n_steps=state.n_steps + lengths,
        )


def _network(width: int, hidden: int, out: int) -> nn.Sequential:
    """The way in of a stream that is not taken as it is."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
