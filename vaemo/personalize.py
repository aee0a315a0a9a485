"""A small change of FiLM for every speaker, learned from the speaker's first labelled utterances.

Takes a trained model and labelled sessions, returns a delta of FiLM's parameters per speaker; everything else is
frozen. All speakers are fitted in one batched run: a speaker is a lane with parameters of its own, and since neither
the loss nor Adam mixes lanes, the result is that of fitting one after the other. The old weights are kept where the
change did not help on held-out utterances. Letters: S speakers, L lanes, T steps, D features.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vaemo import files
from vaemo.config import Config, PersonalizeConfig
from vaemo.data.sessions import Session
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, LabelError, ReadCheckpointError
from vaemo.model.checkpoint import load_checkpoint, one_checkpoint
from vaemo.model.film import FilmDelta
from vaemo.model.regressor import SessionRegressor
from vaemo.model.streams import Streams
from vaemo.parts.shards import claim_folder, digest
from vaemo.progress import Progress
from vaemo.scoring.compatibility import read_as_trained

DELTAS, SPEAKERS, USED, PERSONAL_FILE = "deltas.safetensors", "speakers.parquet", "used.parquet", "_provenance.json"

FIRST_HALF, SECOND_HALF, ALL = range(3)
"""What a fit learns from: the guard's two folds, and every utterance used."""

GROUP_BYTES = 512 << 20
"""Deltas, gradients and moments that are held at once; bounds memory, not results."""

FEWEST_UTTERANCES = 4
"""A speaker with fewer labelled utterances keeps the old weights: two are needed in either fold."""


@dataclass(frozen=True, eq=False)
class Personal:
    """Deltas of FiLM's parameters, and the checkpoint that they belong to.

    Attributes:
        parameters: By the names of `Film`'s state dict, (S, ...) each.
        index: Row of every speaker in them; absent speakers keep the old weights.
        fingerprint: Of the checkpoint.
    """

    parameters: Mapping[str, Tensor]
    index: Mapping[str, int]
    fingerprint: str

    def delta(self, speaker_ids: np.ndarray) -> FilmDelta | None:
        """What `SessionRegressor.forward` takes for utterances of these speakers, (L, T) or (L,); None if no speaker
        has a delta.
        """
        rows = np.vectorize(lambda speaker: self.index.get(speaker, -1), otypes=[np.int64])(speaker_ids)
        return FilmDelta(self.parameters, torch.from_numpy(rows)) if (rows >= 0).any() else None

    def save(self, folder: str) -> None:
        """Write the deltas as safetensors, one tensor per speaker and parameter."""
        tensors = {
            f"{speaker}/{name}": stacked[row].contiguous()
            for speaker, row in self.index.items()
            for name, stacked in self.parameters.items()
        }
        files.write_whole(files.join(folder, DELTAS), save(tensors, metadata={"fingerprint": self.fingerprint}))

    @staticmethod
    def load(folder: str, *, fingerprint: str) -> Personal:
        """The deltas that `save` wrote.

        Args:
            folder: What `--personal` names.
            fingerprint: Of the checkpoint that is about to use them.

        Raises:
            ReadCheckpointError: if they cannot be read or belong to another checkpoint.
        """
        path = files.join(folder, DELTAS)
        try:
            content = files.read_bytes(path)
            tensors, found = load(content), files.safetensors_metadata(content).get("fingerprint", "")
        except (OSError, SafetensorError) as error:
            raise ReadCheckpointError(
                f"'{path}' cannot be read ({error.__class__.__name__}); give the --out folder of jobs/personalize.py."
            ) from None
        if found != fingerprint:
            raise ReadCheckpointError(
                f"'{path}' belongs to the checkpoint '{found[:12]}', not to '{fingerprint[:12]}'. "
                "Score with that one, or personalize this one."
            )
        speakers = list(dict.fromkeys(name.rpartition("/")[0] for name in tensors))
        names = dict.fromkeys(name.rpartition("/")[2] for name in tensors)
        stacked = {name: torch.stack([tensors[f"{speaker}/{name}"] for speaker in speakers]) for name in names}
        return Personal(stacked, {speaker: row for row, speaker in enumerate(speakers)}, fingerprint)


@dataclass(frozen=True, eq=False)
class _Speaker:
    """A speaker's sequences up to the last utterance used, and which of their steps are used."""

    speaker_id: str
    parts: list[tuple[Session, np.ndarray]]

    @property
    def n_used(self) -> int:
        return sum(len(steps) for _, steps in self.parts)


def personalize(
    model: SessionRegressor, sessions: Sequence[Session], config: PersonalizeConfig, *, quiet: bool = True
) -> tuple[Personal, pa.Table, pa.Table]:
    """Fit FiLM to every speaker of labelled sessions.

    A speaker's sessions run from their start, with the utterances of others updating the state unchanged; loss and
    change apply to the speaker's own. Predictions are fed back, or observed values.

    Args:
        model: Trained, with FiLM. Not modified.
        sessions: Labels on the model's label range; order says which utterances come first.
        config: How many utterances, which layers, how long.
        quiet: Show no progress line.

    Returns:
        personal: Deltas of the speakers whose change was kept.
        speakers: One row each: `speaker_id`, `n_utterances`, `mse_before` and `mse_after` on the utterances held out
            in either fold, `kept`.
        used: `session_id`, `utt_id`, `speaker_id` of every utterance learned from; leave them out of evaluation.

    Raises:
        FeatureMismatchError: if the model has no FiLM.
        LabelError: if no speaker has enough labelled utterances.
    """
    if model.film_kind != "film":
        raise FeatureMismatchError(
            f"the model's speaker embedding acts by '{model.film_kind}'; personalisation changes FiLM. "
            "Train with model.film=film on a store with speech and speaker streams."
        )
    everyone = _first_labelled(sessions, config.utterances, model.n_fed)
    speakers = [speaker for speaker in everyone if speaker.n_used >= FEWEST_UTTERANCES]
    if not speakers:
        raise LabelError(
            f"no speaker has {FEWEST_UTTERANCES} labelled utterances among {len(sessions)} sessions; "
            "personalisation learns from labels."
        )
    frozen = copy.deepcopy(model).requires_grad_(False)
    before, after, fitted = [], [], []
    shown = Progress("personalize", len(speakers), "speakers")
    for group in _groups(speakers, frozen, config):
        errors, parameters = _fit(frozen, group, config)
        before.append(errors[0])
        after.append(errors[1])
        fitted.append(parameters)
        if not quiet:
            shown.advance(len(group))
    mse_before, mse_after = np.concatenate(before), np.concatenate(after)
    kept = mse_after < mse_before
    index = {speakers[row].speaker_id: place for place, row in enumerate(np.flatnonzero(kept))}
    stacked = {name: torch.cat([part[name] for part in fitted])[torch.from_numpy(kept)] for name in fitted[0]}
    table = pa.table(
        {
            "speaker_id": [speaker.speaker_id for speaker in speakers],
            "n_utterances": pa.array([speaker.n_used for speaker in speakers], pa.int32()),
            "mse_before": mse_before,
            "mse_after": mse_after,
            "kept": kept,
        }
    )
    return Personal(stacked, index, model.fingerprint), table, _used(speakers)


def personalize_store(store_path: str, checkpoint_path: str, out: str, config: Config) -> pa.Table:
    """Personalise a checkpoint to the speakers of a store, and write deltas, speakers and utterances used.

    Args:
        store_path: A feature store with labels.
        checkpoint_path: A checkpoint folder; its label range and `sequence_by` are used.
        out: Folder for the results, what scoring takes as `--personal`.
        config: Section `personalize`; `labels`, where the store does not say its own range.

    Returns:
        One row per speaker, as `personalize` gives it.

    Raises:
        FeatureMismatchError: if the features are not those that the checkpoint was trained on, it has no FiLM, or it
            was trained on enrolled speakers and one speaks in a single session.
        LabelError: if no speaker has enough labelled utterances.
        OtherRunError: if the folder holds another run.
    """
    checkpoint = load_checkpoint(one_checkpoint(checkpoint_path))
    sessions = read_as_trained(store_path, checkpoint, config)
    labelled = [session for session in sessions if not np.isnan(session.labels).all()]
    nothing = np.empty((0, len(checkpoint.model.targets)), np.float32)
    content = np.concatenate([session.labels for session in labelled] or [nothing])
    utt_ids = [utt_id for session in labelled for utt_id in session.utt_ids]
    settings = {"checkpoint": checkpoint.fingerprint, **config.decisive("personalize")}
    data = digest(*utt_ids, hashlib.sha256(content.tobytes()).hexdigest())
    fingerprint = digest(json.dumps(settings, sort_keys=True), data)
    claim_folder(out, PERSONAL_FILE, fingerprint, {"settings": {**settings, "data": data}})
    personal, speakers, used = personalize(checkpoint.model, labelled, config.personalize, quiet=False)
    files.write_parquet_whole(files.join(out, SPEAKERS), speakers)
    files.write_parquet_whole(files.join(out, USED), used)
    personal.save(out)
    return speakers


def _first_labelled(sessions: Sequence[Session], n: int, n_fed: int) -> list[_Speaker]:
    """Every speaker with the steps of the first `n` utterances that have all labels of utterances."""
    parts: dict[str, list[tuple[Session, np.ndarray]]] = {}
    left: dict[str, int] = {}
    for session in sessions:
        labelled = ~np.isnan(session.labels[:, :n_fed]).any(axis=1)
        for speaker in dict.fromkeys(session.speaker_ids[labelled]):
            room = left.get(speaker, n)
            steps = np.flatnonzero(labelled & (session.speaker_ids == speaker))[:room]
            if len(steps):
                parts.setdefault(speaker, []).append((session, steps))
                left[speaker] = room - len(steps)
    return [_Speaker(speaker, found) for speaker, found in parts.items()]


def _used(speakers: Sequence[_Speaker]) -> pa.Table:
    rows = [
        (session.session_id, session.utt_ids[step], speaker.speaker_id)
        for speaker in speakers
        for session, steps in speaker.parts
        for step in steps
    ]
    return pa.table(dict(zip(("session_id", "utt_id", "speaker_id"), zip(*rows, strict=True), strict=True)))


def _changed(model: SessionRegressor, config: PersonalizeConfig) -> dict[str, Tensor]:
    """FiLM's parameters that a speaker changes, by name."""
    return {
        name: parameter
        for name, parameter in model.film.named_parameters()
        if config.layers == "all" or name.startswith("last.")
    }


def _groups(speakers: list[_Speaker], model: SessionRegressor, config: PersonalizeConfig) -> Iterator[list[_Speaker]]:
    # Every fit of a speaker holds its delta, the gradient and Adam's two moments.
    per_speaker = 3 * 4 * sum(parameter.nbytes for parameter in _changed(model, config).values())
    size = max(1, GROUP_BYTES // per_speaker)
    return (speakers[first : first + size] for first in range(0, len(speakers), size))


@dataclass(frozen=True, eq=False)
class _Lanes:
    """All fits of a group side by side; a lane is one session of one speaker in one fit.

    Attributes:
        features: (L, T, D) each, and the pasts.
        lengths: (L,).
        observed: (L, T, F).
        owner: Row of the fit's parameters where the utterance is the speaker's own, else -1, (L, T).
        fit: That row, for every lane, (L,).
        learned: Labels that the fit learns from, (L, T, K), NaN elsewhere.
        held_out: Labels that it is evaluated on.
    """

    features: Streams
    lengths: Tensor
    observed: Tensor
    owner: Tensor
    fit: Tensor
    learned: Tensor
    held_out: Tensor


def _lanes(speakers: Sequence[_Speaker], model: SessionRegressor) -> _Lanes:
    lanes: list[tuple[Session, int, np.ndarray, np.ndarray, np.ndarray]] = []
    for fit in (FIRST_HALF, SECOND_HALF, ALL):
        for number, speaker in enumerate(speakers):
            half, seen = speaker.n_used // 2, 0
            for session, steps in speaker.parts:
                first = np.arange(seen, seen + len(steps)) < half
                seen += len(steps)
                learns = {FIRST_HALF: first, SECOND_HALF: ~first, ALL: np.ones(len(steps), bool)}[fit]
                own = session.speaker_ids == speaker.speaker_id
                lanes.append((session, fit * len(speakers) + number, own, steps[learns], steps[~learns]))
    lengths = [int(max([*learned, *held_out])) + 1 for _, _, _, learned, held_out in lanes]
    L, T = len(lanes), max(lengths)
    dtype = model.label_deviation.dtype

    def padded(arrays: list[np.ndarray], fill: float) -> Tensor:
        filled = np.full((L, T, *arrays[0].shape[1:]), fill, arrays[0].dtype)
        for lane, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
            filled[lane, :length] = array[:length]
        return torch.from_numpy(filled)

    def picked(session: Session, steps: np.ndarray) -> np.ndarray:
        labels = np.full_like(session.labels, np.nan)
        labels[steps, : model.n_fed] = session.labels[steps, : model.n_fed]
        return labels

    sessions = [session for session, *_ in lanes]
    features = {name: padded([session.streams[name] for session in sessions], 0.0) for name in model.dims}
    if model.pasts:
        past = PackedSessions.of(sessions, dtype=dtype).with_past(model.pasts).features.past
        ends = np.cumsum([len(session) for session in sessions])[:-1]
        features |= {name: padded(np.split(x.numpy(), ends), 0.0) for name, x in past.items()}
    return _Lanes(
        features=Streams.of(features).to(dtype),
        lengths=torch.tensor(lengths),
        observed=padded([lane[0].observed for lane in lanes], np.nan).to(dtype),
        owner=padded([np.where(own, fit, -1) for _, fit, own, _, _ in lanes], -1),
        fit=torch.tensor([fit for _, fit, *_ in lanes]),
        learned=padded([picked(session, learned) for session, _, _, learned, _ in lanes], np.nan).to(dtype),
        held_out=padded([picked(session, held_out) for session, _, _, _, held_out in lanes], np.nan).to(dtype),
    )


def _fit(
    model: SessionRegressor, speakers: Sequence[_Speaker], config: PersonalizeConfig
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, Tensor]]:
    """Held-out errors of every speaker before and after, (S,) each, and the deltas learned from all utterances."""
    lanes, n_fits = _lanes(speakers, model), 3 * len(speakers)
    deltas = {
        name: torch.zeros(n_fits, *parameter.shape, dtype=parameter.dtype, requires_grad=True)
        for name, parameter in _changed(model, config).items()
    }
    optimizer = torch.optim.Adam(deltas.values(), lr=config.lr, fused=True)

    def errors(labels: Tensor, change: FilmDelta | None) -> Tensor:
        prediction, _ = model(
            lanes.features,
            model.fresh_state(len(lanes.lengths)),
            lanes.lengths,
            observed=lanes.observed,
            film_delta=change,
        )
        known = ~labels.isnan()
        square = torch.where(known, prediction - labels.nan_to_num(), 0).square().sum((1, 2))
        count = known.sum((1, 2)).to(square)
        per_fit = square.new_zeros(2, n_fits).index_add(1, lanes.fit, torch.stack([square, count]))
        return per_fit[0] / per_fit[1].clamp(min=1)

    change = FilmDelta(deltas, lanes.owner)
    for _ in range(config.optim_steps):
        optimizer.zero_grad()
        errors(lanes.learned, change).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for delta in deltas.values():
            delta *= config.applied_share
        before, after = (
            errors(lanes.held_out, used).view(3, -1)[[FIRST_HALF, SECOND_HALF]].mean(0).double().numpy()
            for used in (None, change)
        )
        return (before, after), {
            name: delta.detach().view(3, -1, *delta.shape[1:])[ALL].clone() for name, delta in deltas.items()
        }
