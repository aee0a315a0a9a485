"""An epoch of training from features, against the plain loop over utterances that the design was first written as.

Definitions: utterances per second of one epoch on 2 threads of an idle machine: T = 30, 16 lanes, default sizes,
features as wide as WavLM-base, eGeMAPS and ECAPA; gradients, clipping and AdamW included, dev results excluded.
Ratios are taken within one run, from medians of alternating epochs. A busy machine punishes threads of small
operations, and its ratios mean nothing.
"""

import copy
import statistics
import time

import pytest
import torch
from perf_cases import DIMS, sessions
from torch import nn
from torch.nn import functional

from vaemo.config import Config
from vaemo.data.lanes import schedule_lanes
from vaemo.training import trainer as trainer_module
from vaemo.training.loss import window_loss, window_sums
from vaemo.training.trainer import Trainer

pytestmark = pytest.mark.perf

SAME_CURVE = 2e-3
"""Losses of two orders of float32 sums, over an epoch of optimiser steps."""

ROUNDS = 9


class PlainLoop(nn.Module):
    """The model of the design, utterance by utterance, with another model's weights."""

    def __init__(self, model):
        super().__init__()
        self.m = copy.deepcopy(model)

    def step(self, speech, prosody, speaker, fed, c, tail, h):
        m, mixer = self.m, self.m.updater.blocks[0].mixer
        gamma, beta = m.film.last(functional.relu(m.film.hidden(m.standardize["speaker"](speaker)))).chunk(2, -1)
        speech = (1 + gamma.tanh()) * m.standardize["speech"](speech) + beta
        z = torch.cat([speech, m.prosody(m.standardize["prosody"](prosody))], -1)
        x = m.updater.input(torch.cat([z, fed], -1))
        u, gate = mixer.in_proj(m.updater.blocks[0].norm(x)).chunk(2, -1)
        tail = torch.cat([tail[:, 1:], u[:, None]], 1)
        u = functional.silu((tail * mixer.conv1d.weight[:, 0].T).sum(1) + mixer.conv1d.bias)
        dt, B, C = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        delta = functional.softplus(mixer.dt_proj(dt))[..., None]
        h = torch.exp(delta * -torch.exp(mixer.A_log)) * h + delta * B[:, None] * u[..., None]
        y = ((h * C[:, None]).sum(-1) + mixer.D * u) * functional.silu(gate)
        u = m.updater.norm(m.updater.output(x + mixer.out_proj(y)))
        c = 0.8 * c + 0.2 * u
        hidden = functional.relu(m.head.hidden(torch.cat([z, c], -1)))
        return torch.sigmoid(torch.cat([m.head.valence(hidden), m.head.arousal(hidden)], -1)), c, tail, h

    def fresh(self, lanes):
        mixer = self.m.updater.blocks[0].mixer
        sizes = (2,), (self.m.config.d_c,), (mixer.d_conv, mixer.d_inner), (mixer.d_inner, mixer.d_state)
        zeros = [torch.zeros(lanes, *size) for size in sizes]
        return [zeros[0] + 0.5, *zeros[1:]]

    def forward(self, window, state, labels_fed):
        fresh = [window.fresh.view(-1, *[1] * (part.dim() - 1)) for part in state]
        start = self.fresh(len(window.fresh))
        state = [torch.where(new, first, part.detach()) for new, first, part in zip(fresh, start, state, strict=True)]
        fed, predictions = state[0], []
        for t in range(window.labels.shape[1]):
            features = [getattr(window.features, name)[:, t] for name in ("speech", "prosody", "speaker")]
            prediction, *state[1:] = self.step(*features, fed, *state[1:])
            predictions.append(prediction)
            fed = window.labels[:, t].nan_to_num(0.5) if labels_fed else prediction
        return torch.stack(predictions, 1), [fed, *state[1:]]


def plain_epoch(plain, optimizer, trainer, epoch, labels_fed):
    packed, train = trainer._train, trainer.config.train
    schedule = schedule_lanes(packed.lengths, train.lanes, train.window, seed=train.seed, epoch=epoch)
    state, losses = plain.fresh(train.lanes), []
    for window in packed.windows(schedule):
        prediction, state = plain(window, state, labels_fed)
        cells = window.labels.shape[0] * window.labels.shape[1]
        loss = window_loss(window_sums(prediction, window.labels, 0.5), cells, train)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), train.clip)
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses)


def seconds(call):
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


@pytest.mark.parametrize(("feedback", "at_least"), [("label", 4), ("model", 1.5)])
def test_epoch_against_the_plain_loop(feedback, at_least):
    torch.set_num_threads(2)
    config = Config.load("seed", ["model.dropout=0", f"model.feedback={feedback}"])
    data = sessions(48, 40, 60, DIMS)
    trainer = Trainer(data, data[:2], config)
    plain = PlainLoop(trainer.model)
    optimizer = torch.optim.AdamW(plain.m.parameter_groups(config.train.weight_decay), lr=config.train.lr)
    ours, theirs = [], []
    for epoch in range(1 + ROUNDS):
        time_s, line = seconds(lambda epoch=epoch: trainer.train_epoch(epoch))
        ours.append(time_s)
        time_s, loss = seconds(lambda epoch=epoch: plain_epoch(plain, optimizer, trainer, epoch, feedback == "label"))
        theirs.append(time_s)
        assert line["train_loss"] == pytest.approx(loss, abs=SAME_CURVE)
    # The first epoch of a process pays for memory and for the choice of kernels.
    a, b, n = statistics.median(ours[1:]), statistics.median(theirs[1:]), sum(map(len, data))
    print(f"\n{feedback} fed back: {n / a:,.0f} utterances/s, the plain loop {n / b:,.0f}: {b / a:.1f} times faster")
    assert b / a >= at_least


def test_little_time_is_spent_outside_forward_and_backward(monkeypatch):
    """Forward is what leads from a window's features to predictions: noise, dropout masks, the model."""
    torch.set_num_threads(2)
    trainer = Trainer(sessions(48, 40, 60, DIMS), sessions(2, 5, 9, DIMS), Config.load("default"))
    spent = []

    def timed(function):
        def call(*args, **kwargs):
            time_s, value = seconds(lambda: function(*args, **kwargs))
            spent.append(time_s)
            return value

        return call

    trainer.train_epoch(0)
    for owner, name in (
        (trainer_module, "add_noise"),
        (trainer.model, "draw_dropout"),
        (trainer.model, "forward"),
        (torch.Tensor, "backward"),
    ):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    shares = []
    for epoch in range(1, 1 + ROUNDS):
        spent.clear()
        whole_s, _ = seconds(lambda epoch=epoch: trainer.train_epoch(epoch))
        shares.append(1 - sum(spent) / whole_s)
    outside = statistics.median(shares)
    print(f"\noutside forward and backward: {outside:.1%} of an epoch, from {min(shares):.1%} to {max(shares):.1%}")
    assert outside < 0.15


def test_cost_is_linear():
    torch.set_num_threads(1)
    config = Config.load("default", ["model.d_c=8", "model.head_hidden=16", "updater.d_model=16"])
    per_utterance = {}
    for n in (20, 200, 2000):
        data = sessions(n, 40, 60, {"speech": 16})
        trainer = Trainer(data, data[:2], config)
        trainer.train_epoch(0)
        count = sum(map(len, data))
        rounds = [seconds(lambda trainer=trainer: trainer.train_epoch(1))[0] for _ in range(3)]
        per_utterance[count] = min(rounds) / count
    print("\n" + ", ".join(f"{count:,} utterances: {1e6 * s:.0f} us each" for count, s in per_utterance.items()))
    small, middle, large = per_utterance.values()
    # The fewer, the more of a window is padding; from there on nothing may grow.
    assert large < 1.3 * middle
    assert large < 1.3 * small
