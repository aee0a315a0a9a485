"""The effect of knowing past labels: sessions replayed with predictions fed back, and with labels fed.

A model that is far better with labels than without leans on them; one that is no better ignores what is observed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.errors import UsageError
from vaemo.evaluation.pairs import KEYS, Pairs
from vaemo.model.checkpoint import checkpoints_in, load_checkpoint
from vaemo.scoring.compatibility import read_as_trained
from vaemo.training.replay import predict_sessions
from vaemo.units import LabelScale


def replay_fed(pairs: Pairs, store_path: str, checkpoint_path: str, config: Config) -> tuple[Pairs, Pairs]:
    """The same utterances as a checkpoint predicts them, with the label of every earlier utterance fed, and without.

    Args:
        pairs: Utterances of the store; those without features are left out.
        store_path: Their feature store.
        checkpoint_path: The model, or a run with several seeds, whose mean counts.
        config: `labels`, where the store does not say its own range; `score`, for how sessions are replayed.

    Returns:
        fed, free: In the order of `pairs`, on its scale.

    Raises:
        UsageError: if the model feeds nothing back.
        FeatureMismatchError: if they are not the features that the model was trained on.
    """
    found = [_replay_one(pairs, store_path, path, config) for path in checkpoints_in(checkpoint_path)]
    fed, free = (
        dataclasses.replace(each[0], prediction=np.mean([pairs.prediction for pairs in each], axis=0))
        for each in zip(*found, strict=True)
    )
    return fed, free


def _replay_one(pairs: Pairs, store_path: str, checkpoint_path: str, config: Config) -> tuple[Pairs, Pairs]:
    """`replay_fed` for one model."""
    checkpoint = load_checkpoint(checkpoint_path)
    model = checkpoint.model
    if not model.has_feedback:
        raise UsageError(
            f"{checkpoint_path} has model.updater {model.config.updater} and model.feedback {model.config.feedback}: "
            "nothing is fed back, so labels make no difference. Leave out --checkpoint."
        )
    wanted = set(pairs.place["session_id"].to_pylist())
    sessions = [session for session in read_as_trained(store_path, checkpoint, config) if session.session_id in wanted]
    packed = PackedSessions.of(sessions, dtype=model.label_deviation.dtype).with_past(model.pasts)
    of_utterances = packed.labels[:, : model.n_fed]
    known = of_utterances.isnan().logical_not()
    row_of = {
        key: row
        for row, key in enumerate((session.session_id, utt_id) for session in sessions for utt_id in session.utt_ids)
    }
    keys = zip(*(pairs.place[name].to_pylist() for name in KEYS), strict=True)
    rows = np.array([row_of.get(key, -1) for key in keys])
    kept = pairs.select(rows >= 0)
    scale = LabelScale(*model.config.label_range)
    columns = [model.targets.index(name) for name in pairs.names]
    lanes, chunk = config.score.lanes, config.score.chunk
    fed, free = (
        predict_sessions(model, packed, observed=observed, lanes=lanes, chunk=chunk)
        .cpu()
        .numpy()[rows[rows >= 0]][:, columns]
        for observed in (of_utterances.where(known, packed.observed), packed.observed)
    )
    return (
        dataclasses.replace(kept, prediction=scale.to(pairs.scale, fed)),
        dataclasses.replace(kept, prediction=scale.to(pairs.scale, free)),
    )
