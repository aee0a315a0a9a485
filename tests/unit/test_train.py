"""The training loop in one process: what it computes, what it repeats exactly, what it refuses, what it warns of."""

import dataclasses

import numpy as np
import pytest
import torch
from training_cases import comparable, run_together

from vaemo.config import Config
from vaemo.data.lanes import schedule_lanes
from vaemo.data.windows import PackedSessions
from vaemo.errors import DivergedError, LabelError
from vaemo.metrics import Moments, ccc
from vaemo.model.settling import ErrorByPosition
from vaemo.testing import linear_world
from vaemo.training import curves
from vaemo.training.collapse import signs_of_collapse
from vaemo.training.loss import window_loss, window_sums
from vaemo.training.optimiser import lr_factor, moving_average
from vaemo.training.replay import replay
from vaemo.training.run_folder import restore_state, save_state
from vaemo.training.sampling import FeedbackDraws, counts_from, label_probability, step_generator
from vaemo.training.trainer import Trainer

FLOAT64 = 1e-9
"""Sums in another order, through one optimiser step in float64."""
FLOAT32 = 1e-5
"""The same in float32."""

SPREAD = {"valence": 0.16, "arousal": 0.16}

SMALL = {
    "model": {"d_c": 8, "head_hidden": 12, "feedback": "scheduled", "feedback_flag": True, "dropout": 0.2},
    "updater": {"d_model": 8, "d_state": 4},
    "train": {"epochs": 3, "lanes": 4, "window": 6, "lr": 3e-3, "min_labelled": 8, "weight_averaging": 0.9},
}


def small(**train):
    return Config.load("seed").replace(SMALL).replace({"train": train})


def world(**changes):
    return linear_world(1, **{"sessions": (14, 5, 4), "lengths": (3, 20), "features": 5, "noise": 1.0, **changes})


@pytest.fixture(scope="module")
def data():
    made = world()
    return made.sessions("train"), made.sessions("dev")


# -- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("size", [2, 4])
def test_workers_equal_one(data, size, dtype, tolerance):
    config = small(dtype=dtype, feature_noise=0.3, observed_fraction=0.5)
    (alone,) = run_together(1, config, *data, epochs=1)
    together = run_together(size, config, *data, epochs=1)
    for trainer in together:
        for key, value in comparable(alone.history)[0].items():
            assert trainer.history[0][key] == pytest.approx(value, abs=tolerance), key
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(trainer.tensors()[name], tensor, atol=tolerance, rtol=0)


def test_one_step_is_the_hand_written_one(data):
    config = small(dtype="float64", weight_averaging=0.0, clip=0.5, lanes=4)
    config = config.replace({"model": {"dropout": 0.0, "feedback": "label"}})
    train, dev = data
    trainer, reference = (Trainer(train, dev, config) for _ in range(2))
    packed = PackedSessions.of(train, dtype=torch.float64)
    schedule = schedule_lanes(packed.lengths, 4, 6, seed=0, epoch=0)
    window = next(packed.windows(schedule))
    optimizer = torch.optim.AdamW(reference.model.parameter_groups(0.01), lr=3e-3)
    prediction, _ = reference.model(
        window.features, reference.model.fresh_state(4), window.lengths, observed=window.labels
    )
    window_loss(window_sums(prediction, window.labels, 0.5), 4 * 6, config.train).backward()
    torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 0.5)
    optimizer.step()
    trainer._train_window(window, trainer.model.fresh_state(4))
    for name, tensor in reference.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, atol=FLOAT64, rtol=0)


@pytest.mark.long
def test_same_seed_same_bits(data):
    histories = [list(Trainer(*data, small())) for _ in range(2)]
    assert comparable(histories[0]) == comparable(histories[1])
    assert comparable(list(Trainer(*data, small(seed=1)))) != comparable(histories[0])


def test_packed_sessions_train_as_sessions_do(data):
    packed = PackedSessions.of([*data[0], *data[1]])
    parts = np.split(np.arange(len(packed.lengths)), [len(data[0])])
    trained = list(Trainer(*(packed.select(part) for part in parts), small()))
    assert comparable(trained) == comparable(list(Trainer(*data, small())))


def test_global_generator_is_left_alone(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    next(iter(Trainer(*data, small())))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("done", [1, 2])
def test_going_on_equals_never_having_stopped(data, tmp_path, done):
    whole = Trainer(*data, small())
    list(whole)
    stopped = Trainer(*data, small())
    for line in stopped:
        if line["epoch"] == done:
            break
    save_state(stopped, str(tmp_path), keep=1)
    resumed = Trainer(*data, small())
    assert restore_state(resumed, str(tmp_path))
    list(resumed)
    assert comparable(resumed.history) == comparable(whole.history)
    assert resumed.summary() == whole.summary()
    assert resumed.errors.to_dict() == whole.errors.to_dict()
    again = Trainer(*data, small())
    again.restore(stopped.tensors(), stopped.progress())
    assert again.errors.to_dict() == stopped.errors.to_dict()
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


# -- replay --------------------------------------------------------------------------------------------------------


def test_replay_is_the_session_alone(data):
    trainer = Trainer(*data, small(dtype="float64"))
    next(iter(trainer))
    packed = PackedSessions.of(data[1], dtype=torch.float64)
    together = replay(trainer.kept, packed, window=4)
    offset = 0
    for session in data[1]:
        alone = replay(trainer.kept, PackedSessions.of([session], dtype=torch.float64), window=7)
        np.testing.assert_allclose(together.prediction[offset : offset + len(session)], alone.prediction, atol=1e-12)
        offset += len(session)


def test_feedback_gain_is_the_derivative(data):
    config = small(dtype="float64", window=4)
    trainer = Trainer(*data, config)
    list(trainer)
    packed = PackedSessions.of(data[1], dtype=torch.float64)
    model, slopes = trainer.kept, []
    for number, length in enumerate(packed.lengths):
        state = model.fresh_state(1)
        for step in range(length):
            features = packed.features.map(lambda x, row=packed.offsets[number] + step: x[row : row + 1])
            if step and step % 4 == 0:
                fed = state.last_feedback.clone().requires_grad_()
                prediction, _ = model.step(features, dataclasses.replace(state, last_feedback=fed))
                slopes.append(
                    [torch.autograd.grad(prediction[0, d], fed, retain_graph=True)[0][0, d] for d in range(2)]
                )
            with torch.no_grad():
                _, state = model.step(features, state)
    expected = np.mean(np.array(slopes, float), axis=0)
    # A difference over 0.01 of the range against a derivative.
    assert replay(model, packed, window=4).feedback_gain == pytest.approx(expected, rel=0.05, abs=1e-5)


def test_dev_metrics_are_those_of_the_kept_model_running_free(data):
    trainer = Trainer(*data, small())
    line = list(trainer)[-1]
    packed = PackedSessions.of(data[1])
    measured = ccc(replay(trainer.kept, packed, window=6).prediction, packed.labels.numpy())
    assert [line["dev_ccc_valence"], line["dev_ccc_arousal"]] == pytest.approx(measured, abs=FLOAT32)
    session = np.repeat(np.arange(len(data[1])), [len(each) for each in data[1]])
    within = Moments.within(replay(trainer.kept, packed, window=6).prediction, packed.labels.numpy(), session).ccc()
    names = ("valence", "arousal", "avg")
    assert [line[f"dev_within_ccc_{name}"] for name in names] == pytest.approx([*within, within.mean()], abs=FLOAT32)
    position = np.concatenate([np.arange(len(each)) for each in data[1]])
    free = replay(trainer.kept, packed, window=6).prediction
    errors = ErrorByPosition.of(free, packed.labels.numpy(), session, position)
    np.testing.assert_allclose(trainer.errors.within_mse, errors.within_mse, atol=FLOAT32)
    fed = ccc(replay(trainer.kept, packed, window=6, observed=packed.labels).prediction, packed.labels.numpy())
    assert line["gap_ccc_avg"] == pytest.approx(fed.mean() - measured.mean(), abs=FLOAT32)


# -- schedules -----------------------------------------------------------------------------------------------------


def feedback(mode, **train):
    return Config.load("seed").replace({"model": {"feedback": mode}, "train": train})


def test_label_probability_follows_the_design():
    config = feedback("scheduled", sampling_hold_fraction=0.3, sampling_end_fraction=0.2)
    course = [label_probability(step, 100, config) for step in range(100)]
    assert course[:30] == [1] * 30
    assert course[80:] == [0] * 20
    assert course[55] == pytest.approx(0.5)
    assert np.allclose(np.diff(course[30:81]), -1 / 50)
    assert [label_probability(9, 10, feedback(mode)) for mode in ("label", "model", "none")] == [1, 0, 0]


def test_dev_results_count_from_the_end_of_the_schedule():
    assert counts_from(100, feedback("scheduled", sampling_end_fraction=0.2)) == 80
    assert counts_from(100, feedback("model")) == 0
    assert counts_from(100, feedback("model", no_feedback_fraction=0.25)) == 25


def draw(config, step, total=100, lanes=64, steps=50):
    labels = torch.rand(lanes, steps, 2, generator=torch.Generator().manual_seed(1))
    labels[0] = torch.nan
    draws = FeedbackDraws(lanes, steps, step_generator(0, step))
    return labels, draws.observed(labels, torch.arange(lanes), step, total, config, torch.tensor([0.1, 0.2]))


def test_scheduled_sampling_shows_labels_with_probability_p():
    config = feedback("scheduled")
    labels, observed = draw(config, 0)
    assert torch.equal(observed[1:], labels[1:])
    assert observed[0].isnan().all()
    labels, observed = draw(config, 55)
    shown = ~observed.isnan()
    # 3150 draws: five standard errors.
    assert shown[1:].float().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(shown[..., 0], shown[..., 1])
    assert torch.equal(observed[shown], labels[shown])
    assert draw(config, 99)[1] is None


def test_other_modes():
    assert draw(feedback("none"), 0)[1] is None
    assert draw(feedback("model"), 0)[1] is None
    warm = feedback("model", no_feedback_fraction=0.5)
    assert (draw(warm, 10)[1] == 0.5).all()
    assert draw(warm, 60)[1] is None
    noisy = feedback("label").replace({"model": {"feedback_noise": 1.5}})
    labels, observed = draw(noisy, 3)
    spread = (observed - labels)[1:].std(dim=(0, 1))
    torch.testing.assert_close(spread, torch.tensor([0.15, 0.3]), rtol=0.1, atol=0)


def test_observed_fraction_shows_some_lanes_a_share_of_their_labels():
    _, observed = draw(feedback("observed", observed_fraction=0.5), 3, lanes=400)
    share = (~observed[..., 0].isnan()).float().mean(dim=1)[1:]
    assert (share == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert share[share > 0].mean().item() == pytest.approx(0.5, abs=0.1)
    # A model that cannot tell them from predictions sees none.
    assert draw(feedback("model", observed_fraction=0.5), 3)[1] is None
    warm = feedback("observed", observed_fraction=1.0, no_feedback_fraction=0.5)
    assert draw(warm, 10)[1] is None
    assert draw(warm, 60)[1] is not None


def test_learning_rate():
    train = small(warmup_fraction=0.1, lr_schedule="cosine").train
    course = [lr_factor(step, 100, train) for step in range(100)]
    assert np.all(np.diff(course[:10]) > 0)
    assert course[10] == 1
    assert np.all(np.diff(course[10:]) < 0)
    assert course[-1] < 0.01
    assert lr_factor(50, 100, small().train) == 1


def test_averaged_weights():
    value, current = torch.zeros(3), torch.zeros(3)
    update = moving_average(0.8)
    seen = []
    for n in range(60):
        current = torch.full((3,), float(n))
        seen.append(n)
        update([value], [current], torch.tensor(n + 1))
    # In the long run a moving average lags by 0.8 / 0.2 steps behind a line.
    assert value[0].item() == pytest.approx(59 - 4, abs=0.01)


# -- selection, warnings, refusals ---------------------------------------------------------------------------------


def test_best_counts_from_the_end_of_the_schedule(data):
    trainer = Trainer(*data, small(epochs=6, select="best", sampling_end_fraction=0.5, sampling_hold_fraction=0.1))
    improved = [trainer.improved for _ in trainer]
    steps = [line["step"] for line in trainer.history]
    counted = [step >= counts_from(trainer.total_steps, trainer.config) for step in steps]
    assert not any(now for now, counts in zip(improved, counted, strict=True) if not counts)
    best = max(
        (line["dev_ccc_avg"], line["epoch"]) for line, counts in zip(trainer.history, counted, strict=True) if counts
    )
    assert trainer.summary()["kept_epoch"] == best[1]
    assert trainer.summary()["dev_ccc_avg"] == best[0] == trainer.summary()["peak_dev_ccc_avg"]


def test_patience_ends_a_run(data):
    trainer = Trainer(
        *data, small(epochs=40, patience=2, lr=1e-7, weight_averaging=0.0).replace({"model": {"feedback": "none"}})
    )
    trainer.history = []
    results = iter([0.3, 0.2, 0.25, 0.1, 0.9])
    trainer._judge = lambda dev: {
        **dict.fromkeys(("dev_ccc_valence", "dev_ccc_arousal", "dev_rmse_valence", "dev_rmse_arousal"), 0.0),
        **dict.fromkeys(("prediction_sd_valence", "prediction_sd_arousal", "state_sd"), 1.0),
        "dev_ccc_avg": next(results),
    }
    assert len(list(trainer)) == 3
    assert trainer.summary()["kept_epoch"] == 1


def test_last_keeps_every_epoch_and_never_stops_early(data):
    trainer = Trainer(*data, small(epochs=4, patience=1, select="last"))
    assert [trainer.improved for _ in trainer] == [True] * 4
    summary = trainer.summary()
    assert summary["kept_epoch"] == 4
    assert summary["peak_dev_ccc_avg"] == max(line["dev_ccc_avg"] for line in trainer.history)
    assert summary["peak_dev_ccc_avg"] == trainer.history[summary["peak_epoch"] - 1]["dev_ccc_avg"]
    assert "kept" not in trainer.line()


def healthy():
    line = {f"prediction_sd_{name}": 0.1 for name in ("valence", "arousal")}
    return line | {"feedback_gain_valence": 0.01, "feedback_gain_arousal": None, "gap_ccc_avg": 0.0, "state_sd": 0.5}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prediction_sd_arousal": 0.001}, "predictions of arousal hardly vary .* try a lower train.lr"),
        (
            {"feedback_gain_valence": 0.3, "gap_ccc_avg": 0.25},
            "valence copies what is fed back .* model.feedback=model",
        ),
        ({"state_sd": 1e-5}, "session state hardly changes .* model.alpha"),
    ],
)
def test_signs_of_collapse(change, text):
    assert signs_of_collapse(healthy(), SPREAD) == []
    (sign,) = signs_of_collapse(healthy() | change, SPREAD)
    import re

    assert re.search(text, sign)


def test_a_line_in_words(data):
    trainer = Trainer(*data, small())
    list(trainer)
    assert "epoch 3 of 3: loss" in trainer.line()
    trainer.warnings = ["look here"]
    assert trainer.line().endswith("warning: look here")


def relabelled(sessions, change):
    return [dataclasses.replace(session, labels=change(session.labels.copy())) for session in sessions]


def only_arousal(labels):
    labels[:, 0] = np.nan
    return labels


def still(labels):
    labels[:, 1] = 0.25
    return labels


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (only_arousal, "no utterance of the split 'dev' has a label for valence"),
        (still, "all arousal labels of the split 'dev' are 0.25; CCC needs labels that vary"),
        (
            lambda labels: labels * 7,
            r"valence of utterance 's\d+-\d+' is .*, outside the model's range \[0, 1\]. Say the labels' own range",
        ),
    ],
)
def test_labels_that_cannot_be_used(data, change, text):
    train, dev = data
    with pytest.raises(LabelError, match=text):
        Trainer(train, relabelled(dev, change), small())


def test_divergence_names_step_and_sessions(data):
    trainer = Trainer(*data, small())
    with torch.no_grad():
        trainer.model.head.valence.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"epoch 1, optimiser step 1, in a window of the sessions 's\d+'.*train.lr"):
        next(iter(trainer))


def test_odd_shapes_of_data_train():
    one_step = world(lengths=(1, 1), sessions=(30, 12, 4))
    few = world(sessions=(2, 2, 1), lengths=(8, 12))
    holes = world(unlabelled=0.7)
    for made in (one_step, few, holes):
        trainer = Trainer(made.sessions("train"), made.sessions("dev"), small(epochs=1))
        (line,) = trainer
        assert np.isfinite(line["train_loss"])
    assert line["dev_ccc_avg"] == pytest.approx(line["dev_ccc_valence"] / 2 + line["dev_ccc_arousal"] / 2)


@pytest.mark.long
def test_loss_falls_and_memory_is_learned(data):
    trainer = Trainer(*data, small(epochs=12, select="last"))
    history = list(trainer)
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert history[-1]["dev_ccc_avg"] > history[0]["dev_ccc_avg"]


def test_progress_is_said_within_an_epoch(data, monkeypatch):
    monkeypatch.setattr("vaemo.training.trainer.SHOWN_EVERY_S", 0.0)
    said = []
    next(iter(Trainer(*data, small(), say=said.append)))
    assert "epoch 1 of 3: " in said[0]
    assert "utterances, " in said[0]
    assert said[-1].endswith("0 s left of it")


def test_curves_are_a_picture(data):
    trainer = Trainer(*data, small())
    picture = curves.draw_curves(list(trainer), "run")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
