"""One conversation, utterance by utterance: samples in, the model's targets out, a memory that can be saved.

The scores are those that the batch job gives for the same utterances. `vaemo.live` finds the utterances too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vaemo import files
from vaemo.audio.acoustics import sound_of
from vaemo.audio.recording import AudioProblem, Resampler
from vaemo.audio.scale import Scale
from vaemo.config import Config
from vaemo.data.speakers import unit
from vaemo.errors import FeatureMismatchError, ShapeError, StateMismatchError, UsageError
from vaemo.features import Extractor, describe, load_extractors
from vaemo.model.checkpoint import Checkpoint, load_checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import TENSOR_FIELDS, SessionState, read_tensors
from vaemo.model.streams import Streams
from vaemo.scoring.compatibility import check_compatible
from vaemo.trust.judge import Judge
from vaemo.units import SAMPLING_RATE_HZ, SAMPLING_RATES_HZ, LabelScale
from vaemo.utterances import as_heard, measured

if TYPE_CHECKING:
    from vaemo.personalize import Personal


@dataclass(frozen=True)
class Prediction:
    """The prediction for an utterance.

    Attributes:
        valence: On the model's label range; None unless `status` is `ok`, and where the model does not predict it.
        arousal: On the model's label range; None unless `status` is `ok`, and where the model does not predict it.
        status: `ok`, or why there is no prediction (`vaemo.units.STATUSES`).
        reason: Why there is no prediction, in words.
        channel: Its channel; None for an utterance that was pushed.
        start_s: Since the first packet; None for an utterance that was pushed.
        end_s: Since the first packet; None for an utterance that was pushed.
        values: All that the model predicts, by target, None unless `status` is `ok`. A target of the session is what
            it would be if the session ended here.
        intervals: By dimension, low and high of the interval that holds its label at the rate `score.coverage`; empty
            where the checkpoint is not calibrated.
        novelty: The share of calibration utterances that are less unusual; None where the checkpoint knows of none.

    Example:
        >>> prediction = Prediction.of({"valence": 0.6, "arousal": 0.3})
        >>> prediction.valence, prediction.status
        (0.6, 'ok')
    """

    valence: float | None
    arousal: float | None
    status: str = "ok"
    reason: str | None = None
    channel: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)

    @staticmethod
    def of(values: Mapping[str, float | None], status: str = "ok", reason: str | None = None) -> Prediction:
        """The prediction of some targets."""
        return Prediction(values.get("valence"), values.get("arousal"), status, reason, values=values)

    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    novelty: float | None = None


class Stream:
    """A conversation, utterance by utterance.

    Args:
        model: A model, a checkpoint, or the path of one.
        extractors: By stream; None loads those that the checkpoint names.
        config: Sections sessions (one memory for the conversation, or one per speaker), features (the shortest
            utterance, how speaker embeddings are averaged) and audio; None takes the checkpoint's, or the defaults.
        personal: Deltas of FiLM by speaker (`vaemo.personalize`).

    Raises:
        UsageError: for an argument of another type.
        FeatureMismatchError: if the extractors are not those that the model was made for, or none are known.

    Example:
        >>> stream = Stream("run/best")
        >>> utterance = 0.1 * np.random.default_rng(0).standard_normal(8000)
        >>> prediction = stream.push(utterance, 8000, speaker="caller")
        >>> prediction.status, 0 <= prediction.valence <= 1
        ('ok', True)
        >>> stream.push(np.zeros(8000), 8000, speaker="caller").status
        'silent'
        >>> stream.save("caller.safetensors")
    """

    def __init__(
        self,
        model: SessionRegressor | Checkpoint | str | Path,
        extractors: Mapping[str, Extractor] | None = None,
        *,
        config: Config | None = None,
        personal: Personal | None = None,
    ) -> None:
        models = SessionRegressor, Checkpoint, str, Path
        require_type("model", model, models, "the path of a checkpoint, a Checkpoint or a SessionRegressor")
        require_type("extractors", extractors, (Mapping, NoneType), "extractors by stream, or None")
        require_type("config", config, (Config, NoneType), "a vaemo.Config, or None")
        checkpoint = load_checkpoint(model) if isinstance(model, (str, Path)) else model
        trained_on: Mapping[str, str | None] = {}
        self._judge: Judge | None = None
        if isinstance(checkpoint, Checkpoint):
            config = config or checkpoint.config
            trained_on = checkpoint.provenance.get("feature_fingerprints", {})
            if extractors is None and checkpoint.features is not None:
                extractors = load_extractors(checkpoint.features)
        if extractors is None:
            raise FeatureMismatchError(
                "the model does not say which extractors its features come from; give them: Stream(model, extractors)."
            )
        if isinstance(checkpoint, Checkpoint) and isinstance(model, (str, Path)):
            score = (config or Config()).score
            self._judge = Judge.of(
                [str(model)], [checkpoint.fingerprint], score.coverage, score.max_novelty, checkpoint.model.targets
            )
        self.model = (checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint).eval()
        self._config = config or Config()
        described = describe(dict(extractors))
        dims = {stream: facts["dim"] for stream, facts in described.items()}
        made_by = {stream: facts["fingerprint"] for stream, facts in described.items()}
        check_compatible(self.model, trained_on, dims, made_by, "the list of extractors")
        if self._config.features.speaker_aggregation == "enrolled" and "speaker" in self.model.dims:
            raise FeatureMismatchError(
                "the model was trained on enrolled speaker embeddings (features.speaker_aggregation), and a stream "
                "knows no enrolment; score a store that holds them."
            )
        self._extractors = {stream: extractors[stream] for stream in self.model.dims}
        self._personal = personal
        self._n_scored = 0
        self._states: dict[str, SessionState] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._pasts: dict[tuple[str, str], np.ndarray] = {}

    def push(
        self,
        samples: np.ndarray,
        sampling_rate: float,
        *,
        speaker: str | None = None,
        observed: Sequence[float | None] | Mapping[str, float | None] | None = None,
    ) -> Prediction:
        """Predict the next utterance and update the memory.

        An utterance without a prediction (too short, silent, NaN) does not change the memory, as in the batch job.

        Args:
            samples: Mono, (n,), (1, n) or (n, 1), of a kind that `as_float32` takes.
            sampling_rate: Of the samples, in Hz.
            speaker: Who speaks; tells memories, speaker means and pasts apart where these are kept per speaker.
            observed: Observed values of this utterance on the model's label range, None where unknown, in the order of
                the targets of utterances, or by name; they affect the next utterance.

        Raises:
            ShapeError: for samples of more than one channel, of another kind, or on another scale.
            UsageError: for a sampling rate that is no number, or that no recording has, and for observed values of
                something else than the targets of utterances, or outside the label range.
        """
        known = self._known(observed)
        name = speaker or ""
        try:
            heard, sounds = self._features(_resampled(samples, sampling_rate))
        except AudioProblem as problem:
            return Prediction.of(dict.fromkeys(self.model.targets), problem.status, problem.reason)
        vectors = self._aggregated(heard, name)
        key = name if self._config.sessions.sequence_by == "speaker" else ""
        pasts = {past: (past, name if past.startswith("speaker.") else key) for past in self.model.pasts}
        features = self._with_past(vectors, pasts)
        like = self.model.label_deviation
        with torch.inference_mode():
            prediction, self._states[key] = self.model.step(
                features.to(like.device, like.dtype),
                self._states.get(key) or self.model.fresh_state(1),
                observed=torch.tensor([known], dtype=like.dtype, device=like.device),
                film_delta=self._personal.delta(np.array([name], object)) if self._personal else None,
            )
        for past, owned in pasts.items():
            vector = vectors[past.partition(".")[2]]
            self._pasts[owned] = self._pasts.get(owned, 0.0) + np.append(vector.astype(np.float64), 1)
        return self._judged(dict(zip(self.model.targets, prediction[0].tolist(), strict=True)), heard, sounds)

    def _known(self, observed: Sequence[float | None] | Mapping[str, float | None] | None) -> list[float]:
        """The observed values of one utterance in the order of the targets, NaN = unknown."""
        names = self.model.targets[: self.model.n_fed]
        if observed is None:
            return [np.nan] * len(names)
        if isinstance(observed, Mapping):
            other = next((name for name in observed if name not in names), None)
            if other is not None:
                raise UsageError(f"observed has a value for '{other}'; it may have some for {', '.join(names)}.")
            observed = [observed.get(name) for name in names]
        if len(observed) != len(names):
            raise UsageError(
                f"observed has {len(observed)} values; the model takes {', '.join(names)}, None where unknown."
            )
        known = [np.nan if value is None else float(value) for value in observed]
        scale = LabelScale(*self.model.config.label_range)
        for name, value in zip(names, known, strict=True):
            if not (np.isnan(value) or scale.contains(value)):
                raise UsageError(
                    f"observed has {value:g} for {name}; allowed are values on the model's label range "
                    f"[{scale.low:g}, {scale.high:g}]. Map yours to it, or give None."
                )
        return known

    def save(self, path: str | Path) -> None:
        """Write the memory as safetensors: states, sums of features, the checkpoint's fingerprint; no audio."""
        files.write_safetensors(path, *self.memory())

    def load(self, path: str | Path) -> None:
        """Continue from the memory that `save` wrote, in this process or another.

        Raises:
            StateMismatchError: if the file is no such memory, or belongs to another checkpoint.
        """
        self.restore(*read_memory(path))

    def _judged(
        self, values: Mapping[str, float], heard: Mapping[str, np.ndarray], sounds: Mapping[str, float]
    ) -> Prediction:
        """The prediction with interval and novelty, where the checkpoint is calibrated."""
        if self._judge is None:
            return Prediction.of(values)
        found, bounds, novelty = self._judge.one(values, heard, sounds, self._n_scored)
        self._n_scored += 1
        if self._judge.is_unfit(novelty):
            nothing = Prediction.of(dict.fromkeys(values), "unfit", self._judge.unfit_reason)
            return replace(nothing, novelty=novelty)
        return replace(Prediction.of(found), intervals=bounds, novelty=novelty)

    def _features(self, samples: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Features of an utterance, (D,) each, and how it sounds; AudioProblem where it has none."""
        heard, seconds = as_heard(samples, self._config), len(samples) / SAMPLING_RATE_HZ
        vectors = {
            stream: measured(extractor([heard])[0], extractor, seconds)
            for stream, extractor in self._extractors.items()
        }
        known = self._judge.novelty.sounds if self._judge and self._judge.novelty else ()
        return vectors, sound_of(heard)._asdict() if known else {}

    def _aggregated(self, heard: Mapping[str, np.ndarray], speaker: str) -> dict[str, np.ndarray]:
        """The features as the model takes them."""
        vectors = dict(heard)
        if "speaker" in vectors and self._config.features.speaker_aggregation == "running_mean":
            self._sums[speaker] = self._sums.get(speaker, 0.0) + vectors["speaker"].astype(np.float64)
            vectors["speaker"] = unit(self._sums[speaker])
        return vectors

    def _with_past(self, vectors: Mapping[str, np.ndarray], pasts: Mapping[str, tuple[str, str]]) -> Streams:
        """The features of an utterance and the pasts it is compared with, (1, D) each.

        Args:
            vectors: (D,) each.
            pasts: By the name of what the model compares with, the key of it in the memory.
        """
        tensors = {stream: torch.from_numpy(vector[None]) for stream, vector in vectors.items()}
        for name, key in pasts.items():
            nothing = np.zeros(len(vectors[name.partition(".")[2]]) + 1)
            tensors[name] = torch.from_numpy(self._pasts.get(key, nothing)[None])
        return Streams.of(tensors)

    def memory(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and texts that `restore` takes: states, sums of features, the checkpoint's fingerprint."""
        fresh = self.model.fresh_state(0)
        states = SessionState.stack([fresh, *self._states.values()])
        tensors = {f"state.{name}": tensor for name, tensor in states.tensors().items()}
        tensors |= {f"sum.{number}": torch.from_numpy(total) for number, total in enumerate(self._sums.values())}
        tensors |= {f"past.{number}": torch.from_numpy(past) for number, past in enumerate(self._pasts.values())}
        names: dict[str, Any] = {"states": list(self._states), "sums": list(self._sums), "pasts": list(self._pasts)}
        names["n_scored"] = self._n_scored
        return tensors, {"names": json.dumps(names), "fingerprint": fresh.fingerprint}

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Continue from what `memory` returned; errors as `load`."""
        fresh = self.model.fresh_state(0)
        if metadata["fingerprint"] != fresh.fingerprint:
            raise StateMismatchError(
                f"the memory belongs to the checkpoint '{metadata['fingerprint'][:12] or 'none'}', not to "
                f"'{fresh.fingerprint[:12] or 'none'}'. Continue it with its own checkpoint, or start afresh."
            )
        fields = {name: tensors[f"state.{name}"] for name in TENSOR_FIELDS}
        states = SessionState(**fields, middle=fresh.middle, fingerprint=fresh.fingerprint)
        fresh.check_same_model(states)
        states = states.to(self.model.label_deviation.device)
        names = json.loads(metadata["names"])
        self._states = {name: states.select([number]) for number, name in enumerate(names["states"])}
        self._sums = {name: tensors[f"sum.{number}"].numpy() for number, name in enumerate(names["sums"])}
        self._n_scored = names.get("n_scored", 0)
        # Older memories have no pasts, and belong to models that need none.
        pasts = enumerate(names.get("pasts", ()))
        self._pasts = {(name, owner): tensors[f"past.{number}"].numpy() for number, (name, owner) in pasts}


def require_type(name: str, value: object, types: type | tuple[type, ...], allowed: str) -> None:
    """Raise a UsageError for an argument of another type; `allowed` says what to give."""
    if not isinstance(value, types):
        raise UsageError(f"{name} is of the type {type(value).__name__}; give {allowed}.")


def as_float32(samples: Any, n_least: int = 1000) -> np.ndarray:
    """A float32 copy of samples, scaled to [-1, 1].

    Args:
        samples: An array, or what NumPy makes one of, of any shape. int16 and int32 are divided by 2^15 and 2^31.
            Floats (16, 32, 64 bits) are in [-1, 1]: a few may exceed it and are clipped beyond 4. NaN and
            infinities stay, for `require_usable` to find.
        n_least: Fewer samples are judged as if there were this many: a spike in a short packet is not another scale.

    Raises:
        ShapeError: for other types, whose full scale is unknown, and for floats on another scale: where more than one
            in a thousand exceeds 4 in magnitude.
    """
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ShapeError(f"samples of the type {type(samples).__name__} make no array: {said}. {_KINDS}") from None
    if array.dtype.kind == "i" and array.dtype.itemsize in (2, 4):
        return (array / 2.0 ** (8 * array.dtype.itemsize - 1)).astype(np.float32)
    if array.dtype.kind != "f":
        raise ShapeError(f"samples are {array.dtype}. {_KINDS}")
    scale = Scale(n_least)
    clipped = scale.take(array)
    if scale.mistake:
        raise ShapeError(f"{scale.mistake}.")
    return clipped.astype(np.float32)


_KINDS = "Give int16, int32, float32 or float64: integers that fill their range, or floats in [-1, 1]."


def resampler_of(sampling_rate: Any) -> Resampler:
    """The resampler from a rate in Hz to 16 kHz; UsageError for an invalid rate."""
    low, high = SAMPLING_RATES_HZ
    is_number = isinstance(sampling_rate, Real) and not isinstance(sampling_rate, bool)
    if not is_number or not low <= sampling_rate <= high:
        shown = f"{sampling_rate} Hz" if is_number else repr(sampling_rate)
        raise UsageError(f"the sampling rate is {shown}; give a number from {low} to {high} Hz.")
    return Resampler.to_16_khz(float(sampling_rate))


def _resampled(samples: np.ndarray, sampling_rate: float) -> np.ndarray:
    """The samples of one utterance at 16 kHz."""
    stream = resampler_of(sampling_rate).generator(1)
    next(stream)
    block = as_float32(samples)
    if block.ndim != 1 and not (block.ndim == 2 and 1 in block.shape):
        raise ShapeError(f"samples have the shape {block.shape}; an utterance is mono, (n,). Give one channel of it.")
    return np.concatenate([stream.send(block.reshape(1, -1)), stream.send(None)], axis=1)[0]


def read_memory(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a memory file; errors as `Stream.load`."""
    tensors, metadata = read_tensors(path, "the memory")
    if not {"names", "fingerprint"} <= metadata.keys():
        raise StateMismatchError(f"'{path}' is not a memory that Stream.save or LiveSession.save wrote.")
    return tensors, metadata
