"""Suggestions for unknown names in a config; no suggestion rather than a wrong one.

Covers names that other tools use for a field, and misspellings of one or two letters.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

_CLOSE, _CLOSER = 0.75, 0.85
"""Two letters exchanged in a word of five leave it this alike (`difflib`); for fields of another section it takes more:
`vad.model` is not `updater.d_model`."""

_FIRST = ("train", "model", "updater")
"""Sections that are suggested before others."""

ELSEWHERE = {
    "train.lr": "learning_rate learn_rate base_lr max_lr peak_lr lr_max",
    "train.lr_schedule": "scheduler lr_scheduler schedule lr_scheduler_type learning_rate_schedule",
    "train.warmup_fraction": "warmup warmup_ratio warmup_steps warmup_proportion num_warmup_steps lr_warmup",
    "train.weight_decay": "wd l2 decay l2_penalty",
    "train.clip": "grad_clip gradient_clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val clip_norm",
    "train.epochs": "num_epochs n_epochs max_epochs num_train_epochs number_of_epochs epoch_count",
    "train.patience": "early_stopping early_stopping_patience early_stop",
    "train.lanes": "batch_size batch train_batch_size per_device_train_batch_size batchsize bs",
    "train.window": "seq_len sequence_length max_seq_len window_size window_length bptt bptt_steps tbptt context",
    "train.loss": "loss_fn loss_function criterion objective",
    "train.seed": "random_seed random_state rng_seed",
    "train.dtype": "precision torch_dtype",
    "train.weight_averaging": "swa ema_decay model_ema averaging",
    "train.feature_noise": "noise input_noise noise_std",
    "train.encoder_lr": "encoder_learning_rate backbone_lr finetune_lr",
    "train.encoder": "finetune fine_tune freeze freeze_encoder unfreeze",
    "train.trackers": "tracker logger loggers report_to",
    "updater.d_model": "hidden_size hidden_dim hidden hidden_units dim model_dim embed_dim",
    "updater.layers": "num_layers n_layers n_layer depth num_hidden_layers",
    "updater.d_state": "state_size ssm_state_size state_dim",
    "updater.d_conv": "conv_kernel conv_width kernel_size",
    "updater.expand": "expansion expansion_factor",
    "updater.headdim": "head_dim head_size",
    "model.updater": "rnn rnn_type cell cell_type recurrent architecture",
    "model.dropout": "dropout_rate drop_rate dropout_p dropout_prob p_dropout",
    "model.alpha": "ema_alpha smoothing ema_coefficient",
    "model.feedback": "teacher_forcing scheduled_sampling",
    "model.d_c": "context_dim context_size",
    "features.speech": "encoder_name backbone speech_model speech_encoder ssl_model pretrained_model",
    "features.speaker": "speaker_model speaker_encoder",
    "features.prosody": "feature_set opensmile",
    "features.speech_layer": "layer encoder_layer hidden_layer",
    "features.speech_pooling": "pooling",
    "features.opensmile_license": "license licence opensmile_licence",
    "labels.range": "label_scale native_range scale label_min label_max",
    "vad.threshold": "vad_threshold speech_threshold",
    "extract.batch_s": "batch_size batch batch_seconds",
    "score.lanes": "batch_size batch",
    "score.channel_roles": "roles channels role",
    "splits.dev_fraction": "val_fraction validation_fraction val_split validation_split dev_size val_size",
    "splits.test_fraction": "test_split test_size",
    "evaluate.bootstrap": "n_bootstrap bootstraps resamples n_resamples",
}
"""Names that other tools use for a field; of several fields the first is suggested where no section is given."""

SECTION_ALIASES = {
    "train": "training trainer optim optimizer optimiser",
    "score": "scoring inference",
    "vad": "segmentation",
}
"""The same for sections."""


def fields(found: str, known: Mapping[str, Collection[str]]) -> list[str]:
    """Suggestions for an unknown `section.key`, or for a key alone; several where it is ambiguous.

    Args:
        found: The unknown name.
        known: The keys of every section.
    """
    section, key = _plain(found.partition(".")[0] if "." in found else ""), _plain(found.rpartition(".")[2])
    here = section if section in known else sections(section, known)
    inside = [f"{here}.{field}" for field in known.get(here, ())]
    every = [f"{name}.{field}" for name in dict.fromkeys([*_FIRST, *known]) for field in known.get(name, ())]
    return (
        _exact(key, inside)
        or _exact(key, every)
        or _otherwise(key, inside)
        or _close(key, inside, _CLOSE)
        or _otherwise(key, every)
        or _close(key, every, _CLOSER)
    )


def _exact(key: str, names: Collection[str]) -> list[str]:
    return [name for name in names if name.partition(".")[2] == key]


def _otherwise(key: str, names: Collection[str]) -> list[str]:
    return [name for name, others in ELSEWHERE.items() if key in others.split() and name in names][:1]


def _close(key: str, names: Collection[str], cutoff: float) -> list[str]:
    keys = {name.partition(".")[2] for name in names}
    return [name for near in difflib.get_close_matches(key, keys, 1, cutoff) for name in _exact(near, names)]


def sections(found: str, known: Collection[str]) -> str:
    """The suggestion for an unknown section; empty if there is none."""
    name = _plain(found)
    close = difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)
    also = [section for section, others in SECTION_ALIASES.items() if name in others.split()]
    return next(iter([*also, *close]), "")


def question(names: Collection[str]) -> str:
    """` Did you mean ...?` for a message; empty without suggestions."""
    *others, last = names or [""]
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
