"""The sections of a config: one frozen dataclass each, every field with its default, meaning and range.

A field marked `runtime` cannot change results, and stays out of fingerprints.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Literal

from vaemo.config import suggest
from vaemo.config.fields import option
from vaemo.errors import ConfigValueError
from vaemo.targets import Target, check_targets, names_of, session_names, utterance_names
from vaemo.units import DIMENSIONS, SAMPLING_RATES_HZ

HEADERLESS_CODECS = (
    *("mulaw", "alaw", "s8", "u8", "s16le", "s16be", "s24le", "s24be", "s32le", "s32be", "f32le", "f32be"),
    *("gsm", "vox", "g722", "g723_1", "g726_2", "g726_3", "g726_4", "g726_5", "g726be_4", "g729"),
)
"""How samples without a header may be coded. G.726 names its bits per sample, `be` where the first is the high one."""


@dataclasses.dataclass(frozen=True)
class Headerless:
    """How a file without a header is to be read: a member of `HEADERLESS_CODECS`, a rate in Hz, interleaved channels.

    Example:
        >>> Headerless.parse("s16le:8000:2")
        Headerless(codec='s16le', sampling_rate=8000, channels=2)
    """

    codec: str
    sampling_rate: int
    channels: int = 1

    @staticmethod
    def parse(text: str) -> Headerless:
        """Parse `CODEC:RATE` or `CODEC:RATE:CHANNELS`; ValueError for anything else."""
        codec, *numbers = text.strip().lower().removeprefix("pcm_").split(":")
        rate, channels = (int(number) for number in (*numbers, "1")[:2])
        known = codec in HEADERLESS_CODECS and len(numbers) in (1, 2)
        low, high = SAMPLING_RATES_HZ
        if not known or not low <= rate <= high or not 1 <= channels <= 64:
            raise ValueError(text)
        return Headerless(codec, rate, channels)


_LOW = 0.4
"""`score.low` of a target that it does not name."""

TOGETHER = (
    ("train.sampling_hold_fraction", "train.sampling_end_fraction"),
    ("train.encoder", "train.encoder_from_epoch", "train.epochs"),
    ("model.updater", "updater.headdim", "updater.expand", "updater.d_model"),
    ("model.targets", "model.alphas", "model.alpha_arousal", "train.target_weights"),
    ("score.low", "score.low_valence", "score.low_arousal"),
)
"""Fields that are validated together."""


def _by_target(
    field: str, given: Mapping[str, float] | None, also: Mapping[str, tuple[str, float | None, float | None]]
) -> dict[str, float]:
    """Values by target of a mapping field, merged with the older fields for single targets.

    Args:
        field: The mapping's name, `section.key`.
        given: Its value.
        also: By target, the key, value and default of the older field; its default counts as not given.

    Raises:
        ConfigValueError: if both give a target a value, and these differ.
    """
    found = dict(given or {})
    for target, (key, value, default) in also.items():
        if value is None or value == default:
            continue
        if found.setdefault(target, value) != value:
            name = f"{field.partition('.')[0]}.{key}"
            raise ConfigValueError(
                f"{field} says {found[target]:g} for {target}, and {name} says {value:g}; leave one of them out."
            )
    return found


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """How samples are read."""

    simulate_telephone: bool = option(
        False, "Pass every utterance through 8 kHz mu-law, to train on wideband speech for telephone calls."
    )
    max_recording_s: float = option(
        36_000.0,
        "A longer recording gets the status too_long, by its header before it is decoded, else while it is decoded.",
        low=1,
    )
    max_utterance_s: float = option(
        600.0, "A longer utterance of a manifest, which is held in memory, gets the status too_long.", low=1
    )
    headerless: str | None = option(
        None,
        "Format of .raw and .pcm files, which have no header, as CODEC:RATE:CHANNELS, such as "
        "s16le:8000:2 or mulaw:8000; null skips them.",
        before=None,
    )
    vox_rate_hz: int = option(
        8000, "Sampling rate of .vox files (Dialogic ADPCM); 6000 is usual too.", low=4000, high=48000, before=8000
    )

    def __post_init__(self) -> None:
        if self.headerless is not None:
            try:
                Headerless.parse(self.headerless)
            except ValueError:
                raise ConfigValueError(
                    f"audio.headerless is '{self.headerless}'; give CODEC:RATE or CODEC:RATE:CHANNELS, such as "
                    f"s16le:8000:2. Codecs are {', '.join(HEADERLESS_CODECS)}."
                ) from None

    @property
    def headerless_format(self) -> Headerless | None:
        """What `headerless` means."""
        return None if self.headerless is None else Headerless.parse(self.headerless)


@dataclasses.dataclass(frozen=True)
class VadConfig:
    """How utterances are found in a recording (silero-vad, per channel)."""

    threshold: float = option(0.5, "Speech probability above which a frame is speech.", low=0.05, high=0.95)
    min_utterance_s: float = option(0.3, "Shorter speech is dropped.", low=0.06)
    max_utterance_s: float = option(15.0, "Longer speech is cut at its quietest pause.", low=1)
    join_gap_s: float = option(0.3, "Pauses up to this length stay inside an utterance.", low=0)
    pad_s: float = option(0.1, "Added before and after every utterance, never overlapping the next.", low=0)
    crosstalk_db: float = option(
        15.0,
        "Speech that is this much quieter than simultaneous speech on the other channel is crosstalk; 0 keeps it.",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class VoicesConfig:
    """Who speaks when in a channel that holds several people."""

    mode: Literal["channel", "diarize", "auto"] = option(
        "channel",
        "What tells speakers apart: the channel; voices, found in every channel (diarize); or the channel where a "
        "recording has several, and voices where it has one (auto). Turns from --voices-from take precedence.",
        before="channel",
    )
    voices: int = option(4, "Largest number of voices in a channel; the number is estimated.", low=1, high=8, before=4)
    window_s: float = option(
        1.5, "Length of the windows of speech whose voices are compared.", low=0.5, high=5, before=1.5
    )
    model: Literal["campplus"] = option(
        "campplus", "Speaker encoder that compares voices (extra `diarize`).", before="campplus"
    )
    min_margin: float = option(
        0.14,
        "Speech with a smaller voice_margin (similarity to its own voice, less that to the next) is not scored where "
        "roles follow voices; where it lies at an end of an utterance, it is cut off.",
        low=0,
        high=1,
        before=0.14,
    )
    verification: float = option(
        0.89,
        "Least cosine similarity of a voice to one enrolled in --speakers to be attributed to that person.",
        low=0.2,
        high=1,
        before=0.89,
    )
    verification_margin: float = option(
        0.13,
        "Least lead of that similarity over every other voice of the call, and over every other enrolled person where "
        "persons are identified.",
        low=0,
        high=1,
        before=0.13,
    )
    identification: str = option(
        "",
        "Your record of the lawful basis for comparing voices with everyone enrolled, to identify them; stored with "
        "the scores. Empty compares a call only with the agent that agent_id in --calls names.",
        before="",
    )


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Which extractors turn samples into the three streams."""

    speech: str = option(
        "logmel", "`logmel` (built in), `none`, or a WavLM, wav2vec2 or HuBERT model: a hub name or a folder."
    )
    speech_revision: str = option("main", "Revision of a hub model; pin a commit to keep features reproducible.")
    speech_layer: int | Literal["mean", "weighted"] = option(
        -1,
        "Hidden layer that is pooled, -1 is the last; or the mean over all layers, plain or with weights that were "
        "trained end to end. Ignored by `logmel`.",
        low=-1,
        high=64,
    )
    speech_pooling: Literal["mean", "attention"] = option(
        "mean", "How frames become one vector: their mean, or weights over them that were trained end to end."
    )
    speech_precision: Literal["bf16", "fp16", "fp32"] = option(
        "bf16",
        "Arithmetic of the speech encoder on CUDA; on a CPU it is fp32. Training takes bf16 for fp16, whose range is "
        "too small for gradients.",
    )
    speech_compile: bool = option(
        False,
        "Compile the encoder's layers (torch.compile) where it runs on CUDA, to extract from thousands of utterances.",
        runtime=True,
    )
    prosody: str = option("egemaps", "`egemaps`, `gemaps` or `compare` (openSMILE), `praat` (extra), or `none`.")
    speaker: str = option(
        "ltas",
        "`ltas` (built in), `campplus` (extra `diarize`), `none`, or a SpeechBrain ECAPA or x-vector model: a hub name "
        "or a folder.",
    )
    speaker_revision: str = option("main", "Revision of a hub model of the speaker stream.")
    speaker_aggregation: Literal["utterance", "enrolled", "running_mean"] = option(
        "utterance",
        "Speaker embedding of each utterance, of an enrolment, or averaged over the past of the session.",
    )
    min_utterance_s: float = option(0.1, "A shorter utterance gets the status too_short.", low=0.06)
    max_utterance_s: float = option(
        30.0, "A longer utterance is embedded in overlapping parts that are pooled by duration.", low=1
    )
    opensmile_license: Literal["research", "commercial"] | None = option(
        None,
        "openSMILE may be used for research freely and commercially only under an agreement with audEERING: "
        "say which applies. It is recorded with the features.",
        runtime=True,
    )


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What the corpus's labels mean."""

    range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = option(
        None,
        "Native range of the labels, such as [1, 7], or one for each target, such as {valence: [1, 7], csat: [0, 10]}; "
        "null when they are on model.label_range.",
    )

    def __post_init__(self) -> None:
        ranges = self.range if isinstance(self.range, Mapping) else {"": self.range} if self.range else {}
        for name, (low, high) in ranges.items():
            if not low < high:
                of = f" of {name}" if name else ""
                raise ConfigValueError(
                    f"labels.range{of} is {[low, high]}; give the lowest and the highest label, such as [1, 7]."
                )

    def range_of(self, target: str) -> tuple[float, float] | None:
        """The native range of a target; None if there are no ranges.

        Raises:
            ConfigValueError: if other targets have a range and this one has none.
        """
        if not isinstance(self.range, Mapping):
            return self.range
        if target not in self.range:
            raise ConfigValueError(
                f"labels.range has no range for '{target}'; it has {', '.join(self.range) or 'none'}. Give one to "
                "every target in model.targets."
            )
        return self.range[target]


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """What one sequence of the model is."""

    sequence_by: Literal["session", "speaker"] = option(
        "session", "One memory for the whole session, or one for each speaker of it."
    )


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How train, dev and test are made where a store has no `split` column, and what they may share."""

    dev_fraction: float = option(0.15, "Share of utterances in dev, approximately.", low=0.0, high=0.9)
    test_fraction: float = option(0.2, "Share of utterances in test, approximately.", low=0.0, high=0.9)
    calib_fraction: float = option(
        0.0,
        "Share of utterances in calib, approximately: sessions that intervals are calibrated on.",
        low=0.0,
        high=0.9,
        before=0.0,
    )
    seed: int = option(0, "Seed of the assignment.", low=0)
    allow_speaker_overlap: bool = option(
        False, "Accept a speaker in two splits; numbers are then not those of unseen speakers."
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The session model: what is predicted, combined, remembered and fed back."""

    updater: Literal["mamba", "mamba2", "gru", "none"] = option(
        "mamba",
        "The recurrent part; `none` predicts from the utterance alone, and from what speaker_norm and session_norm "
        "compare it with.",
    )
    targets: tuple[str | Target, ...] = option(
        DIMENSIONS,
        "What is predicted: names of columns of manifests and stores, such as [valence, arousal, dominance]. A target "
        "of the whole session is written {name: csat, level: session}: its label may stand in any row of the session, "
        "and counts once.",
        before=DIMENSIONS,
    )
    feedback: Literal["none", "observed", "label", "scheduled", "model"] = option(
        "observed",
        "What the updater gets as the previous values of the targets: nothing; observed values where they are known, "
        "else nothing; or, in training, labels, labels with a falling probability, or the model's own predictions, "
        "and at inference observed values where they are known, else predictions.",
    )
    feedback_gradient: bool = option(True, "Let gradients flow through the predictions that are fed back.")
    feedback_noise: float = option(
        0.0, "Noise on labels that are fed, in deviations of the training labels.", low=0, high=10
    )
    feedback_flag: bool = option(
        False, "Tell the updater, for every target, whether the value fed back is a label or a prediction."
    )
    d_c: int = option(64, "Width of the session state c.", low=1, high=4096)
    ema: Literal["none", "fixed", "learned"] = option(
        "fixed", "c = alpha c + (1 - alpha) u with alpha fixed, learned (within 0.6 to 0.9), or no smoothing."
    )
    alpha: float = option(
        0.5,
        "EMA coefficient per utterance; where it is learned its start, brought into 0.6 to 0.9.",
        low=0,
        high=0.999,
    )
    alpha_arousal: float | None = option(
        None, "Arousal's own coefficient, the same as alphas: {arousal: ...}; null uses alpha.", low=0, high=0.999
    )
    alphas: Mapping[str, float] | None = option(
        None,
        "Coefficients of single targets, such as {arousal: 0.3}; the others have alpha. c is then cut into equal "
        "parts, one for each target. null cuts nothing, but where targets of the session have their own.",
        low=0,
        high=0.999,
        before=None,
    )
    alpha_session: float | None = option(
        0.95,
        "EMA coefficient of targets of the whole session that alphas does not name: what is said of a call after it is "
        "said of all of it. null uses alpha.",
        low=0,
        high=0.999,
        before=None,
    )
    film: Literal["film", "concat", "off"] = option(
        "film", "How the speaker embedding acts: scaling and shifting the speech embedding, beside it, or not."
    )
    film_hidden: int = option(256, "Hidden width of the FiLM network.", low=1)
    prosody: bool = option(True, "Use the prosody stream where the store has one.")
    prosody_hidden: int = option(128, "Hidden width of the prosody network.", low=1)
    prosody_dim: int = option(64, "Output width of the prosody network.", low=1)
    speech_mlp: Literal["none", "before_film", "after_film"] = option(
        "none",
        "A network on the speech stream, as the prosody stream has one: none, one that FiLM modulates, or one on what "
        "FiLM has modulated; without FiLM both are the same.",
        before="none",
    )
    speech_hidden: int = option(128, "Hidden width of the speech network.", low=1, before=128)
    speech_dim: int = option(64, "Output width of the speech network.", low=1, before=64)
    speaker_norm: tuple[Literal["speech", "prosody"], ...] = option(
        ("prosody",),
        "Streams that are compared with the same speaker's past in the session: beside each number stands how far it "
        "is, in deviations of the training split, from the sum over the speaker's earlier utterances / (their count + "
        "speaker_norm_weight). The first is compared with the training mean. A speaker is speaker_id, in recordings "
        "the channel or the voice.",
        before=(),
    )
    session_norm: tuple[Literal["speech", "prosody"], ...] = option(
        (),
        "Streams that are also compared with the past of the whole sequence, all speakers together; with "
        "sessions.sequence_by=speaker that is the speaker's own.",
        before=(),
    )
    speaker_norm_weight: float = option(
        2.0,
        "Weight of the training mean, in utterances, in the past that speaker_norm and session_norm compare with.",
        low=0,
        before=2.0,
    )
    norm_z: bool = option(False, "LayerNorm over z = [speech ; prosody].")
    head_hidden: int = option(256, "Hidden width of the shared regression head.", low=1)
    dropout: float = option(0.1, "Dropout after the updater and inside the head.", low=0, high=0.9)
    label_range: tuple[float, float] = option(
        (0.0, 1.0), "Range of predictions: [0, 1] ends in a sigmoid, [-1, 1] in a tanh."
    )
    scan: Literal["auto", "reference", "chunk", "compiled", "kernel"] = option(
        "auto",
        "Form of the Mamba scan; `auto` takes the CUDA kernels where they are installed, on a CPU `compiled`, else "
        "`chunk`.",
        runtime=True,
    )
    parallel_feedback: Literal["auto", "always", "never"] = option(
        "auto", "Solve a chunk with predictions fed back by parallel passes, or step by step.", runtime=True
    )

    def __post_init__(self) -> None:
        if tuple(self.label_range) not in {(0.0, 1.0), (-1.0, 1.0)}:
            raise ConfigValueError(
                f"model.label_range is {list(self.label_range)}; allowed are [0, 1] and [-1, 1]. "
                "Give the corpus's own range in labels.range."
            )
        check_targets(self.targets)
        own = _by_target("model.alphas", self.alphas, {"arousal": ("alpha_arousal", self.alpha_arousal, None)})
        for name in own:
            if name not in self.names:
                given = "alphas" if name in (self.alphas or {}) else f"alpha_{name}"
                raise ConfigValueError(
                    f"model.{given} gives '{name}' a coefficient, and model.targets are {', '.join(self.names)}."
                )

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The session EMA's: one for all of c, or one for each target's part of it, in the order of `names`."""
        own = _by_target("model.alphas", self.alphas, {"arousal": ("alpha_arousal", self.alpha_arousal, None)})
        if self.alpha_session is not None:
            own = {**dict.fromkeys(self.session_targets, self.alpha_session), **own}
        return tuple(own.get(name, self.alpha) for name in self.names) if own else (self.alpha,)

    @property
    def names(self) -> tuple[str, ...]:
        """The targets: those of utterances, then those of sessions; their order on every axis."""
        return names_of(self.targets)

    @property
    def utterance_targets(self) -> tuple[str, ...]:
        """The targets that every utterance has; these are fed back."""
        return utterance_names(self.targets)

    @property
    def session_targets(self) -> tuple[str, ...]:
        """The targets that a session has one of."""
        return session_names(self.targets)


@dataclasses.dataclass(frozen=True)
class UpdaterConfig:
    """Sizes of the updater, and what it remembers."""

    d_model: int = option(128, "Width inside the updater.", low=1, high=8192)
    layers: int = option(1, "Pre-norm residual blocks.", low=1, high=2)
    d_state: int = option(16, "State size of a Mamba channel.", low=1, high=256)
    d_conv: int = option(4, "Width of the causal convolution.", low=2, high=4)
    expand: int = option(2, "Inner width of a Mamba block over d_model.", low=1, high=8)
    headdim: int = option(32, "Head width of Mamba-2; divides expand * d_model.", low=1)
    carry: bool = option(
        True, "Keep the updater's own memory from step to step; false leaves only c and the last prediction."
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Truncated backpropagation through time over lanes of sessions."""

    seed: int = option(0, "Seed of weights, lanes, dropout and sampling.", low=0, high=2**62)
    epochs: int = option(30, "Most epochs.", low=1)
    patience: int = option(
        10, "Epochs without a better dev CCC, after the sampling schedule's end, to stop; for select `best`.", low=1
    )
    lanes: int = option(16, "Sessions side by side, over all workers; divisible by the workers.", low=1)
    window: int = option(30, "Steps that gradients flow through (T).", low=1)
    lr: float = option(1e-3, "Peak learning rate above the encoder.", low=1e-7, high=1)
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "Course of the learning rate after warm-up.")
    warmup_fraction: float = option(0.05, "Share of the optimiser steps with a rising learning rate.", low=0, high=1)
    weight_decay: float = option(
        5.0,
        "AdamW's, times the learning rate per step; not applied to norms, biases and the scan's own parameters. High, "
        "because a session model overfits a corpus of usual size within a few epochs.",
        low=0,
    )
    clip: float = option(1.0, "Largest norm of the gradient.", low=1e-6)
    loss: Literal["ccc_mse", "mse"] = option("ccc_mse", "1 - mean CCC + mse_weight * MSE, or MSE alone.")
    mse_weight: float = option(0.1, "Weight of the summed MSE in ccc_mse.", low=0)
    target_weights: Mapping[str, float] | None = option(
        None,
        "Weight of single targets in the loss, such as {dominance: 0.5}; 1 for a target that is not named.",
        low=0,
        before=None,
    )
    label_weight: Literal["none", "raters"] = option(
        "none",
        "`raters`: a label counts more in the loss the smaller the standard error of its mean is, by NAME_rater_sd and "
        "NAME_raters of the store. Weights average 1 over the training split.",
        before="none",
    )
    label_weight_floor: float = option(
        0.2,
        "Least standard error that label_weight takes for a label, as a share of the labels' deviation: raters who "
        "agree by chance, or a single one, do not outweigh the rest.",
        low=0.01,
        high=10,
        before=0.2,
    )
    min_labelled: int = option(
        64, "A target with fewer labelled steps in a window has its MSE alone in the loss there.", low=2
    )
    sampling_hold_fraction: float = option(
        0.3, "Share of the optimiser steps at the start in which only labels are fed (scheduled).", low=0, high=1
    )
    sampling_end_fraction: float = option(
        0.2, "Share of the optimiser steps at the end in which only predictions are fed (scheduled).", low=0, high=1
    )
    no_feedback_fraction: float = option(
        0.0, "Share of the optimiser steps at the start in which the middle of the range is fed.", low=0, high=1
    )
    observed_fraction: float = option(
        0.5,
        "Share of the lanes of a window in which labels, a random share of them, are shown as observed values; for "
        "feedback `observed`, or any with feedback_flag.",
        low=0,
        high=1,
    )
    feature_noise: float = option(
        0.25,
        "Noise on the features in training, in deviations of each; reduces overfitting.",
        low=0,
    )
    weight_averaging: float = option(
        0.99, "Decay per step of the averaged weights that are evaluated and kept; 0 is none.", low=0, high=0.99999
    )
    select: Literal["best", "last"] = option(
        "last", "Keep the epoch with the best dev CCC (and stop by patience), or the last one (and run all epochs)."
    )
    dtype: Literal["float32", "float64"] = option("float32", "Precision of the model.")
    keep_checkpoints: int = option(2, "Number of states to resume from that a run keeps.", low=1, runtime=True)
    encoder: Literal["frozen", "last_k", "all"] = option(
        "frozen",
        "What is trained of the speech encoder that made the store, from the manifest's audio: nothing, its last "
        "layers, or all of it.",
    )
    encoder_layers: int = option(
        2,
        "How many of the transformer's layers `last_k` trains; all of them leave the convolutions as they are.",
        low=1,
    )
    encoder_lr: float = option(3e-5, "Peak learning rate of the encoder.", low=1e-8, high=1)
    encoder_from_epoch: int = option(
        0, "Epochs on the store's features before the encoder is unfrozen and audio is read.", low=0
    )
    encoder_checkpointing: bool = option(
        True,
        "Compute each batch of the encoder once more for its gradient: memory of one batch instead of a whole "
        "window's, for one more forward pass.",
        runtime=True,
    )
    trackers: tuple[str, ...] = option(
        ("auto",),
        "Any of tensorboard, mlflow, wandb; auto is tensorboard where it is installed.",
        runtime=True,
    )

    def __post_init__(self) -> None:
        if self.sampling_hold_fraction + self.sampling_end_fraction > 1:
            raise ConfigValueError(
                f"train.sampling_hold_fraction is {self.sampling_hold_fraction} and train.sampling_end_fraction "
                f"{self.sampling_end_fraction}; together they may be 1 at most."
            )
        if self.encoder != "frozen" and self.encoder_from_epoch >= self.epochs:
            raise ConfigValueError(
                f"train.encoder is '{self.encoder}', and train.encoder_from_epoch {self.encoder_from_epoch} of "
                f"train.epochs {self.epochs}: the encoder would never be trained. Unfreeze it earlier."
            )


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """How extraction is cut into work, and what it tolerates."""

    shard_utterances: int = option(
        256, "Utterances in one part of the store, approximately; sessions stay whole.", low=1
    )
    shard_recordings: int = option(
        8, "Recordings in one part, of a store or of scores, where utterances are still to be found.", low=1
    )
    max_failed_fraction: float = option(
        0.05, "Failed share above which the job ends with exit code 1.", low=0, high=1, runtime=True
    )
    max_silent_fraction: float = option(
        0.5,
        "Share of recordings without any speech above which the job ends with exit code 1, from 20 recordings on: "
        "the archive may be misread.",
        low=0,
        high=1,
        runtime=True,
        before=1.0,
    )
    min_age_s: float = option(
        0.0,
        "Recordings modified less than this many seconds ago wait for the next run, also when scoring.",
        low=0,
        runtime=True,
        before=0.0,
    )
    duplicates: Literal["skip", "keep"] = option(
        "skip",
        "Recordings that are byte-identical to an earlier one get the status duplicate, or are processed again; also "
        "when scoring.",
        runtime=True,
        before="keep",
    )
    decode_timeout_s: float = option(
        120.0, "A decode that takes longer becomes a row with status timeout.", low=0.1, runtime=True
    )
    features_timeout_s: float = option(
        180.0,
        "If an extractor takes longer on an utterance, or an encoder on a batch, the worker is killed and the "
        "utterance becomes a row with status timeout. Without Ray nothing is killed.",
        low=0.1,
        runtime=True,
        before=180.0,
    )
    batch_s: float = option(
        60.0,
        "Seconds of speech in one batch of an encoder, less on a CPU. Raise it on a GPU with much memory.",
        low=1,
        runtime=True,
    )
    keep_speaker: bool = option(
        True,
        "Keep the speaker stream in the store. With it a store is a collection of voiceprints; without it models have "
        "no speaker stream.",
        before=True,
    )
    root: str | None = option(
        None,
        "Folder or URI that must contain all audio named in a manifest; for manifests from others.",
        runtime=True,
    )


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Who is scored, and how sessions are summed up."""

    channel_roles: str | tuple[str, ...] | None = option(
        None,
        "Role of each channel of a recording: a list such as [agent, customer], or a preset such as "
        "amazon-connect; null when a table of calls gives it.",
    )
    agents_exception: Literal["medical", "safety", "outside_eu"] | None = option(
        None, "Why employees may be scored; the EU's AI Act, Art. 5(1)(f), otherwise prohibits it."
    )
    agents_exception_reference: str = option("", "Your record of that exception; needed with agents_exception.")
    context_roles: tuple[str, ...] = option(
        (), "Roles whose utterances update the session's memory without being scored."
    )
    shard_sessions: int = option(
        64, "Sessions of a store in one part of the scores; more where its own parts have more.", low=1
    )
    lanes: int = option(32, "Sessions replayed side by side, always exactly this number.", low=1)
    chunk: int = option(64, "Steps of one replayed chunk.", low=1)
    low: Mapping[str, float] | None = option(
        None,
        "NAME_below_s counts speech scored under this (model scale), by target, such as {dominance: 0.3}; 0.4 for a "
        "target that is not named.",
        low=-1,
        high=1,
        before=None,
    )
    low_valence: float = option(0.4, "The same for valence alone, as in low: {valence: ...}.", low=-1, high=1)
    low_arousal: float = option(0.4, "The same for arousal alone, as in low: {arousal: ...}.", low=-1, high=1)
    end_half_life_s: float = option(60.0, "Half-life, back from the end of the call, of *_end_weighted.", low=1)
    max_failed_fraction: float = option(
        0.05, "Failed share above which the job ends with exit code 1.", low=0, high=1, runtime=True
    )
    max_silent_fraction: float = option(
        0.5,
        "Share of sessions without any speech above which the job ends with exit code 1, from 20 sessions on: the "
        "archive may be misread.",
        low=0,
        high=1,
        runtime=True,
        before=1.0,
    )
    calls_missing: Literal["not_scored", "channel_roles"] = option(
        "not_scored",
        "What to do with a session that the table of calls (`--calls`) does not name: leave it unscored, or take its "
        "roles from score.channel_roles.",
        before="not_scored",
    )
    hash_ids: bool = option(False, "Replace ids by keyed hashes; the key comes from VAEMO_ID_KEY.")
    coverage: float = option(
        0.9,
        "Share of labels that intervals (`*_low`, `*_high`) should contain, where the checkpoint is calibrated.",
        low=0.5,
        high=0.999,
        before=0.9,
    )
    max_novelty: float = option(
        1.0,
        "An utterance that is more unusual than this share of those calibrated with gets the status unfit and no "
        "score; 1 scores all.",
        low=0.5,
        high=1.0,
        before=1.0,
    )

    def __post_init__(self) -> None:
        self._own_low()

    def low_of(self, targets: Iterable[str]) -> dict[str, float]:
        """The threshold under which each target counts as low.

        Raises:
            ConfigValueError: if it names another target.
        """
        own, targets = self._own_low(), tuple(targets)
        for name in own:
            if name not in targets:
                key = f"low: {{{name}: ...}}" if name in (self.low or {}) else f"low_{name}"
                near = suggest.question(difflib.get_close_matches(name, targets, 1))
                raise ConfigValueError(
                    f"score.{key} names '{name}', and the targets that utterances have scores of are "
                    f"{', '.join(targets) or 'none'}.{near} Leave it out."
                )
        return {name: own.get(name, _LOW) for name in targets}

    def _own_low(self) -> dict[str, float]:
        both = {name: (f"low_{name}", getattr(self, f"low_{name}"), _LOW) for name in DIMENSIONS}
        return _by_target("score.low", self.low, both)


@dataclasses.dataclass(frozen=True)
class PersonalizeConfig:
    """How FiLM is fitted to single speakers, everything else frozen."""

    utterances: int = option(10, "Number of first labelled utterances of a speaker to learn from.", low=4, high=1000)
    layers: Literal["last", "all"] = option("last", "FiLM's last layer, or all of it.")
    optim_steps: int = option(60, "Optimiser steps.", low=1, high=1000)
    lr: float = option(3e-4, "Learning rate of Adam.", low=1e-6, high=1e-1)
    applied_share: float = option(
        0.4,
        "Share of the learned change that is applied. A few utterances mislead: less than half of the change brings "
        "most of its gain at less than half of its risk.",
        low=0.01,
        high=1,
    )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How intervals and the CCC are computed."""

    bootstrap: int = option(1000, "Resamples of sessions for the 95 % intervals.", low=0)
    seed: int = option(0, "Seed of the resampling.", low=0)
    variance: Literal["biased", "unbiased"] = option(
        "biased", "Variances in the CCC: divided by n (ours), or by n - 1 over a biased covariance (AVEC's)."
    )
    no_employees: tuple[str, ...] = option(
        (), "Columns of an archive by which results may be grouped (`--by`), since they name no employee.", before=()
    )
