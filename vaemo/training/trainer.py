"""Truncated backpropagation through time over lanes of sessions: one loop, in one process or in many.

Takes sessions and a config, gives a metrics line per epoch, a model to keep, and a state to go on from. Knows no
folders of runs and no Ray: `pipeline.training` adds those. Letters: L lanes over all workers, T steps of a window.

How W workers equal one: every worker computes the lane schedule, the dropout masks and the draws of all lanes, and
takes lanes r, r + W, ... The sums that make up the loss are added over the workers, and each one's gradient flows
through its own share of them; the gradients are then added too. No average is taken anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vaemo.config import Config
from vaemo.data.lanes import LaneSchedule, schedule_lanes
from vaemo.data.sessions import Session
from vaemo.data.windows import PackedSessions, Window
from vaemo.errors import DivergedError, LabelError, UsageError
from vaemo.features.speech_network import SpeechNetwork
from vaemo.metrics import Moments
from vaemo.model.chunk import Diagnostics
from vaemo.model.regressor import SessionRegressor
from vaemo.model.settling import ErrorByPosition
from vaemo.model.state import SessionState
from vaemo.progress import duration, say
from vaemo.targets import rater_columns
from vaemo.training.collapse import signs_of_collapse
from vaemo.training.end_to_end import EndToEnd, KeptEncoder
from vaemo.training.group import Group
from vaemo.training.loss import LossWeights, window_loss, window_sums
from vaemo.training.optimiser import lr_factor, moving_average
from vaemo.training.replay import replay
from vaemo.training.sampling import FeedbackDraws, add_noise, counts_from, label_probability, step_generator
from vaemo.units import DIMENSIONS, LabelScale

SHOWN_EVERY_S = 10.0


def _require_encoder(config: Config, end_to_end: EndToEnd | None) -> None:
    if config.train.encoder != "frozen" and end_to_end is None:
        raise UsageError(
            f"train.encoder is '{config.train.encoder}', and only jobs/train.py --manifest trains an encoder; "
            "leave it frozen here."
        )


def _packed(sessions: Sequence[Session] | PackedSessions, device: torch.device, dtype: torch.dtype) -> PackedSessions:
    if isinstance(sessions, PackedSessions):
        return sessions.to(device, dtype)
    return PackedSessions.of(sessions, dtype=dtype, device=device)


def _new_model(config: Config, sessions: PackedSessions) -> SessionRegressor:
    """A model with the initial weights of `train.seed`, for the features of these sessions."""
    dims = {name: features.shape[-1] for name, features in sessions.features.items()}
    # The caller's global generator is left unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return SessionRegressor.from_config(config.model, config.updater, dims)


def _averaged(modules: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(modules, multi_avg_fn=moving_average(decay)) if decay else None


class Trainer:
    """A training run: iterate over it for one metrics line per epoch.

    Between two epochs `kept` is the model that would be kept, `errors` its dev errors by position, `improved` says
    whether it is to be kept now, and `tensors` and `progress` are what `restore` needs to go on as if nothing had
    happened.

    Args:
        train: Sessions to train on, packed perhaps: then they are read where they lie, and may be shared.
        dev: Sessions to judge by, likewise.
        config: Sections `model`, `updater`, `train`.
        group: The workers.
        device: Where this worker computes.
        end_to_end: The speech encoder, where `train.encoder` wants it trained too.
        say: Where the progress within an epoch is shown, a line every `SHOWN_EVERY_S`.

    Raises:
        LabelError: if a split has no labels of a target, constant ones, or some outside the label range.
        UsageError: if the encoder is to be trained and none is given.
    """

    def __init__(
        self,
        train: Sequence[Session] | PackedSessions,
        dev: Sequence[Session] | PackedSessions,
        config: Config,
        *,
        group: Group | None = None,
        device: torch.device | str = "cpu",
        end_to_end: EndToEnd | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        _require_encoder(config, end_to_end)
        self.config = config
        self.group = group or Group()
        self.device = torch.device(device)
        self._say = say
        dtype = getattr(torch, config.train.dtype)
        self._dev = _packed(dev, self.device, dtype)
        self._train = self._labelled(_packed(train, self.device, dtype))
        self.model = _new_model(config, self._train).to(self.device, dtype)
        self._train, self._dev = (sessions.with_past(self.model.pasts) for sessions in (self._train, self._dev))
        statistics = self._train.statistics()
        self.model.set_statistics(statistics, self._deviation)
        self._noise = {
            name: (config.train.feature_noise * deviation).to(self.device, dtype)
            for name, (_, deviation) in statistics.items()
        }
        self.end_to_end = end_to_end
        self._modules = nn.ModuleDict({"model": self.model})
        if end_to_end:
            self._modules["encoder"] = end_to_end.network.to(self.device, dtype)
        self._averaged = _averaged(self._modules, config.train.weight_averaging)
        self.optimizer = self._new_optimizer()
        self._peak_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.schedules = [self._schedule(epoch) for epoch in range(config.train.epochs)]
        self.total_steps = sum(map(len, self.schedules))
        self._lanes = torch.arange(self.group.rank, config.train.lanes, self.group.size)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.improved = False
        self.errors: ErrorByPosition | None = None
        self.warnings: list[str] = []
        # CCC is at least -1, so that the first epoch that counts is always an improvement.
        self._best, self._kept_epoch, self._stale = -2.0, 0, 0
        self._epoch_s = 0.0

    def _labelled(self, train: PackedSessions) -> PackedSessions:
        """The sessions to train on with their labels weighed and spread, once the labels of both splits are checked."""
        config = self.config
        for name, packed in (("train", train), ("dev", self._dev)):
            check_labels(packed, name, LabelScale(*config.model.label_range), config.model.names)
        self._deviation = torch.from_numpy(np.nanstd(train.labels.double().cpu().numpy(), axis=0))
        self._deviation = self._deviation.to(self.device, train.labels.dtype)
        self._loss_weights = LossWeights.of(config.model, config.train, self._deviation)
        if config.train.label_weight == "raters":
            train = replace(train, weights=rater_weights(train, self._deviation, config))
        return spread_labels_of_sessions(train, len(config.model.session_targets))

    def _new_optimizer(self) -> torch.optim.AdamW:
        """An optimiser of the model's parameters, and of the encoder's where it is trained."""
        groups = self.model.parameter_groups(self.config.train.weight_decay)
        if self.end_to_end:
            groups += self.end_to_end.parameter_groups()
        return torch.optim.AdamW(groups, lr=self.config.train.lr, fused=True)

    @property
    def kept(self) -> SessionRegressor:
        """The model of the last epoch as it would be kept: with averaged weights where they are averaged."""
        return cast(SessionRegressor, self._kept_modules["model"])

    def kept_encoder(self) -> KeptEncoder | None:
        """The files of the speech encoder that belongs to `kept`; None while the store's features are used."""
        encoder = self._unfrozen(len(self.history) - 1)
        return encoder.keep(self.kept_network) if encoder else None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the dev results have not improved for `train.patience` epochs."""
        train = self.config.train
        return len(self.history) >= train.epochs or self._stale >= train.patience

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self.finished:
            epoch = len(self.history)
            started = time.perf_counter()
            metrics = {"epoch": epoch + 1, **self.train_epoch(epoch), **self._judge(self._dev_sessions(epoch))}
            self._epoch_s = time.perf_counter() - started
            self.history.append(metrics)
            self._select(metrics["dev_ccc_avg"])
            self.warnings = signs_of_collapse(
                metrics, dict(zip(self.model.targets, self._deviation.tolist(), strict=True))
            )
            yield metrics

    def line(self) -> str:
        """The last epoch in words, with what it warns of."""
        metrics, train = self.history[-1], self.config.train
        left_s = (train.epochs - len(self.history)) * self._epoch_s
        parts = [
            f"epoch {metrics['epoch']} of {train.epochs}: loss {metrics['train_loss']:.3f}",
            f"dev CCC {metrics['dev_ccc_avg']:.3f} ("
            + ", ".join(f"{name} {metrics[f'dev_ccc_{name}']:.3f}" for name in self.model.targets)
            + ")",
            "RMSE " + " and ".join(f"{metrics[f'dev_rmse_{name}']:.3f}" for name in self.model.targets),
            f"p {metrics['p']:.2f}",
            f"{metrics['padded_share']:.0%} padded",
            f"{metrics['utterances_per_s']:,.0f} utterances/s",
            *(["kept"] if self.improved and train.select == "best" else []),
            *([f"{duration(left_s)} left at most"] if not self.finished else []),
        ]
        return "\n".join([", ".join(parts), *(f"  warning: {sign}" for sign in self.warnings)])

    def summary(self) -> dict[str, Any]:
        """How the run ended: epochs done, the line of the epoch that was kept, and the best of those that count."""
        line = self.history[self._kept_epoch - 1]
        counts = counts_from(self.total_steps, self.config)
        counted = [metrics for metrics in self.history if metrics["step"] >= counts] or self.history
        best = max(counted, key=lambda metrics: metrics["dev_ccc_avg"])
        peak = {"peak_epoch": best["epoch"], "peak_dev_ccc_avg": best["dev_ccc_avg"]}
        shown = {key: value for key, value in line.items() if key.startswith(("dev_", "gap_", "feedback_gain_"))}
        return {"epochs": len(self.history), "kept_epoch": self._kept_epoch, **peak, **shown}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averaged weights and the optimiser's moments, by name."""
        found = dict(self._modules.state_dict())
        if self._averaged:
            found |= {f"averaged.{name}": tensor for name, tensor in self._averaged.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}

    def progress(self) -> dict[str, Any]:
        """Everything else that the next epoch depends on, fit for JSON."""
        return {
            "step": self.step,
            "history": self.history,
            "best": self._best,
            "kept_epoch": self._kept_epoch,
            "stale": self._stale,
            "errors": self.errors and self.errors.to_dict(),
        }

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Go on from what `tensors` and `progress` gave after some epoch of a run with the same config and data."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        names = self._modules.state_dict().keys()
        self._modules.load_state_dict({name: tensor for name, tensor in tensors.items() if name in names})
        if self._averaged:
            self._averaged.load_state_dict(part("averaged."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            number, _, field = name.partition(".")
            moments.setdefault(int(number), {})[field] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = progress["step"]
        self.history = list(progress["history"])
        self._best, self._kept_epoch, self._stale = progress["best"], progress["kept_epoch"], progress["stale"]
        # Older versions did not keep them.
        if errors := progress.get("errors"):
            self.errors = ErrorByPosition.from_dict(errors)

    def _schedule(self, epoch: int) -> LaneSchedule:
        train = self.config.train
        # The gradient of what is read at a session's end reaches back as far as its last window.
        whole_at_end = bool(self.config.model.session_targets)
        lengths = self._train.lengths
        return schedule_lanes(
            lengths, train.lanes, train.window, seed=train.seed, epoch=epoch, whole_at_end=whole_at_end
        )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch; its part of the metrics line."""
        schedule = self.schedules[epoch]
        before = self.step
        losses, passes = [], []
        state = self.model.fresh_state(len(self._lanes))
        ends, n_utterances = np.cumsum(schedule.lengths.sum(axis=1)), int(schedule.lengths.sum())
        windows = self._train.windows(schedule, self._lanes.numpy())
        if encoder := self._unfrozen(epoch):
            encoder.unfreeze()
            windows = encoder.embed_windows(windows, self._train.utt_ids)
        started = shown = time.perf_counter()
        for number, window in enumerate(windows):
            loss, state, n_passes = self._train_window(window, state)
            losses.append(loss)
            passes.append(n_passes)
            if not math.isfinite(loss):
                self._diverged(epoch, schedule.session[number])
            now = time.perf_counter()
            if self.group.rank == 0 and now - shown > SHOWN_EVERY_S:
                shown, rate = now, ends[number] / (now - started)
                left_s = (n_utterances - ends[number]) / rate
                self._say(
                    f"epoch {epoch + 1} of {self.config.train.epochs}: {ends[number]:,} of {n_utterances:,} "
                    f"utterances, {rate:,.0f}/s, loss {loss:.3f}, {duration(left_s)} left of it"
                )
        elapsed_s = time.perf_counter() - started
        return {
            "step": self.step,
            "p": label_probability(before, self.total_steps, self.config),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": float(np.mean(losses)),
            "padded_share": schedule.padded_share,
            "passes": float(np.mean(passes)),
            "utterances_per_s": n_utterances / elapsed_s,
        }

    def _train_window(self, window: Window, state: SessionState) -> tuple[float, SessionState, int]:
        """One optimiser step; the loss, the state to carry on, and passes of the parallel solve."""
        config, train = self.config, self.config.train
        steps = window.labels.shape[1]
        generator = step_generator(train.seed, self.step)
        n_fed = self.model.n_fed
        draws = FeedbackDraws(train.lanes, steps, generator, n_fed)
        dropout = self.model.draw_dropout(train.lanes, steps, generator)
        observed = draws.observed(
            window.labels[..., :n_fed], self._lanes, self.step, self.total_steps, config, self._deviation[:n_fed]
        )
        state = state.detach().reset(window.fresh)
        features = window.features
        if train.feature_noise:
            features = add_noise(features, self._noise, train.lanes, self._lanes, generator)
        diagnostics = Diagnostics()
        prediction, state = self.model(
            features,
            state,
            window.lengths,
            observed=observed,
            dropout=None if dropout is None else dropout.select(self._lanes).to(self.device),
            diagnostics=diagnostics,
        )
        own = window_sums(prediction, window.labels, LabelScale(*config.model.label_range).middle, window.weights)
        total = self.group.add(own.detach().clone())
        # The value of all workers' sums, the gradient of this worker's.
        loss = window_loss(own + (total - own.detach()), train.lanes * steps, train, self._loss_weights)
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        self._add_gradients()
        for group, peak_lr in zip(self.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = peak_lr * lr_factor(self.step, self.total_steps, train)
        self._clip_gradients(train.clip)
        value = loss.item()
        if math.isfinite(value):
            self.optimizer.step()
            if self._averaged:
                self._averaged.update_parameters(self._modules)
        self.step += 1
        return value, state, diagnostics.n_passes

    def _add_gradients(self) -> None:
        """Sum of the workers' gradients, in one message."""
        if self.group.size == 1:
            return
        parameters = [parameter for parameter in self._modules.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.group.add(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _clip_gradients(self, most: float) -> None:
        """`clip_grad_norm_`, which goes through all gradients once more, only where there is something to clip."""
        gradients = [p.grad for p in self._modules.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm > most:
            torch.nn.utils.clip_grads_with_norm_(self._modules.parameters(), most, norm)

    def _unfrozen(self, epoch: int) -> EndToEnd | None:
        """What trains the encoder in an epoch, counted from 0; None while the store's features are used."""
        return self.end_to_end if epoch >= self.config.train.encoder_from_epoch else None

    @property
    def _kept_modules(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self._averaged.module) if self._averaged else self._modules

    @property
    def kept_network(self) -> SpeechNetwork:
        """The speech encoder that belongs to `kept`."""
        return cast(SpeechNetwork, self._kept_modules["encoder"])

    def _dev_sessions(self, epoch: int) -> PackedSessions:
        """The dev sessions, their speech embedded by the encoder that would be kept."""
        encoder = self._unfrozen(epoch)
        return encoder.embed_sessions(self._dev, self.kept_network, self.group) if encoder else self._dev

    def _judge(self, dev: PackedSessions) -> dict[str, Any]:
        """Dev results of the model that would be kept: running free as at inference, and fed labels beside it."""
        free = replay(self.kept, dev, group=self.group, window=self.config.train.window)
        measured = free.moments(dev.labels)
        metrics: dict[str, Any] = {}
        names, n_fed = self.model.targets, self.model.n_fed
        for number, name in enumerate(names):
            metrics[f"dev_ccc_{name}"] = float(measured.ccc()[number])
            metrics[f"dev_rmse_{name}"] = float(measured.rmse()[number])
            metrics[f"prediction_sd_{name}"] = float(measured.sd()[0][number])
        metrics["dev_ccc_avg"] = float(measured.ccc().mean())
        within = Moments.within(free.prediction, dev.labels.double().cpu().numpy(), dev.session_numbers).ccc()[:n_fed]
        # Not a number where no dev session has two labels.
        average = within.mean() if n_fed else math.nan
        for name, value in zip((*names[:n_fed], "avg"), [*within, average], strict=True):
            metrics[f"dev_within_ccc_{name}"] = float(value) if math.isfinite(value) else None
        metrics["state_sd"] = free.state_sd
        sequence = np.repeat(np.arange(len(dev.lengths)), dev.lengths)
        position = np.arange(len(sequence)) - dev.offsets[sequence]
        labels = dev.labels[:, :n_fed].double().cpu().numpy()
        self.errors = ErrorByPosition.of(free.prediction[:, :n_fed], labels, sequence, position, names[:n_fed])
        if self.config.model.feedback != "none" and n_fed:
            known = dev.labels[:, :n_fed]
            fed = replay(self.kept, dev, group=self.group, window=self.config.train.window, observed=known)
            metrics["gap_ccc_avg"] = float(fed.moments(dev.labels).ccc().mean()) - metrics["dev_ccc_avg"]
            for name, gain in zip(names[:n_fed], free.feedback_gain, strict=True):
                metrics[f"feedback_gain_{name}"] = gain
        return metrics

    def _select(self, dev_ccc_avg: float) -> None:
        counts = self.step >= counts_from(self.total_steps, self.config)
        self.improved = self.config.train.select == "last" or (counts and dev_ccc_avg > self._best)
        if self.improved:
            self._best, self._kept_epoch, self._stale = dev_ccc_avg, len(self.history), 0
        elif counts:
            self._stale += 1

    def _diverged(self, epoch: int, sessions: np.ndarray) -> None:
        names = ", ".join(f"'{self._train.session_ids[session]}'" for session in sessions if session >= 0)
        raise DivergedError(
            f"the loss is not a finite number at epoch {epoch + 1}, optimiser step {self.step}, in a window of the "
            f"sessions {names}. Look at their features and labels, or lower train.lr ({self.config.train.lr}) or "
            f"train.clip ({self.config.train.clip}). What was kept before is untouched."
        )


def rater_weights(sessions: PackedSessions, deviation: Tensor, config: Config) -> Tensor:
    """What each label counts in the loss by what its raters leave open, (U, K), 1 on average over the known ones.

    A weight is 1 / e^2, with e the label's standard error, at least `train.label_weight_floor` of the deviation of all
    labels. A label of which nothing is known counts 1.

    Args:
        sessions: With `label_error`.
        deviation: Of the labels, (K,).
        config: Sections `model` and `train`.

    Raises:
        LabelError: if nothing is known of any, or a deviation is negative.
    """
    error = sessions.label_error
    known = None if error is None else ~(error.isnan() | sessions.labels.isnan())
    if error is None or known is None or not known.any():
        columns = ", ".join(rater_columns(config.model.targets[:1]))
        raise LabelError(
            f"train.label_weight is 'raters', and no training label has a number of raters and their deviation: there "
            f"are no columns such as {columns}. Make the manifest of a corpus that has single ratings, or take none."
        )
    if n_wrong := int((error < 0).sum()):
        columns = ", ".join(name for name in rater_columns(config.model.targets) if name.endswith("_sd"))
        raise LabelError(
            f"{n_wrong:,} training labels have a negative deviation of their raters ({columns}); it is at least 0, and "
            "null where it is not known."
        )
    weight = error.maximum(config.train.label_weight_floor * deviation).square().reciprocal().masked_fill(~known, 0)
    mean = weight.sum(0) / known.sum(0).clamp(min=1)
    return torch.where(known, weight / mean.clamp(min=1e-30), 1)


def spread_labels_of_sessions(sessions: PackedSessions, n_session: int) -> PackedSessions:
    """The sessions, with the label of each one at all of its steps, of one weight together.

    From last steps alone, where such a target is read, a model overfits a few hundred labels of sessions: the features
    of one utterance tell sessions apart. Over all steps these vary and the label does not, so that the model has to use
    its memory.

    Args:
        sessions: To be trained on.
        n_session: How many of the targets, the last ones, are of sessions.
    """
    if not n_session:
        return sessions
    device, dtype = sessions.labels.device, sessions.labels.dtype
    number = torch.from_numpy(np.repeat(np.arange(len(sessions.lengths)), sessions.lengths)).to(device)
    length = torch.from_numpy(sessions.lengths).to(device)[number]
    labels = sessions.labels.clone()
    n = (len(sessions.lengths),)
    weights = torch.ones_like(labels) if sessions.weights is None else sessions.weights.clone()
    share = length.to(dtype).reciprocal()
    for k in range(labels.shape[1] - n_session, labels.shape[1]):
        known = ~labels[:, k].isnan()
        of_session = torch.stack([labels.new_full(n, math.nan), labels.new_ones(n)])
        of_session[:, number[known]] = torch.stack([labels[known, k], weights[known, k]])
        labels[:, k], weights[:, k] = of_session[0][number], of_session[1][number] * share
    return replace(sessions, labels=labels, weights=weights)


def check_labels(sessions: PackedSessions, split: str, scale: LabelScale, targets: Sequence[str] = DIMENSIONS) -> None:
    """Raise LabelError unless a split has labels of every target that vary and lie in the label range."""
    labels = sessions.labels.cpu().numpy().T if len(sessions.labels) else np.zeros((len(targets), 0))
    for name, values in zip(targets, labels, strict=True):
        known = values[~np.isnan(values)]
        if not len(known):
            raise LabelError(f"no utterance of the split '{split}' has a label for {name}; training needs some in it.")
        outside = np.flatnonzero((values < scale.low) | (values > scale.high))
        if len(outside):
            utt_id = sessions.utt_ids[outside[0]]
            raise LabelError(
                f"{name} of utterance '{utt_id}' is {values[outside[0]]:g}, outside the model's range "
                f"[{scale.low:g}, {scale.high:g}]. Say the labels' own range in labels.range, or map them onto it."
            )
        if known.min() == known.max():
            raise LabelError(f"all {name} labels of the split '{split}' are {known[0]:g}; CCC needs labels that vary.")
