"""The grid: what takes part in it, and what one training of it gives."""

import dataclasses

import numpy as np
import pytest

from vaemo.ablation.cell import check_fold, columns_named, matrix, read_result, write_result
from vaemo.ablation.cell import run_cell as cell_of_the_grid
from vaemo.ablation.grid import ABLATIONS, FULL, Cell, Variant, choose_variants, plan_cells
from vaemo.config import Config
from vaemo.data.splits import make_folds, plain_split
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, LabelError, UsageError
from vaemo.metrics import ccc
from vaemo.testing import linear_world
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer
from vaemo.units import DIMENSIONS

FLOAT32 = 1e-6
"""Predictions are kept in float32."""

ALL = {"speech": 6, "prosody": 4, "speaker": 3}
QUICK = Config.load(
    "default",
    ["model.d_c=4", "model.head_hidden=8", "updater.d_model=8", "train.epochs=3", "train.lanes=4", "train.lr=1e-2"],
)


def names(config, dims=ALL):
    return [variant.name for variant in choose_variants(config, dims)[0]]


def test_the_six_questions_and_the_baselines():
    assert names(Config()) == [
        "full", "no-state", "mamba2", "gru", "no-prosody", "concat", "no-film", "speech-mlp", "speech-mlp-film",
        "no-norm", "session-norm", "learned-alpha", "feedback-scheduled", "feedback-label", "feedback-model",
        "mean", "ridge", "ridge-ema",
    ]  # fmt: skip


def test_what_is_compared_has_both_sides_too():
    config = Config.load("default", ["model.speaker_norm=[prosody]", "model.speech_mlp=before_film"])
    chosen = set(names(config))
    assert {"plain-speech", "speech-mlp", "no-norm", "session-norm"} <= chosen
    assert not {"speech-mlp-film", "speaker-norm"} & chosen
    # Without a prosody stream nothing is compared, and without FiLM there is nothing before or after it.
    assert not {"no-norm", "speaker-norm", "session-norm", "speech-mlp"} & set(names(config, {"speech": 6}))
    assert not {"plain-speech", "speech-mlp"} & set(names(config, {"prosody": 4}))


def test_what_the_config_has_is_the_full_model():
    config = Config.load("seed", ["model.updater=gru", "model.ema=learned", "model.film=concat"])
    chosen = names(config)
    assert {"mamba", "mamba2", "film", "fixed-alpha", "feedback-observed"} <= set(chosen)
    assert not {"gru", "concat", "learned-alpha", "feedback-scheduled"} & set(chosen)


@pytest.mark.parametrize(
    ("dims", "absent", "message"),
    [
        ({"speech": 6}, {"no-prosody", "concat", "no-film"}, "on a store with speech it is the full model itself"),
        ({"prosody": 4}, {"no-prosody", "no-film"}, "nothing is left to predict from"),
        ({"speech": 6, "prosody": 4}, {"concat", "no-film"}, "'no speaker embedding' is left out"),
    ],
)
def test_changes_without_their_stream_are_left_out(dims, absent, message):
    chosen, left_out = choose_variants(Config(), dims)
    assert not absent & {variant.name for variant in chosen}
    assert any(message in line for line in left_out)


def test_without_a_state_its_settings_are_no_question():
    chosen = names(Config.load("default", ["model.updater=none"]))
    assert "learned-alpha" not in chosen
    assert "feedback-label" not in chosen
    assert {"mamba", "gru", "no-prosody"} <= set(chosen)


def test_some_may_be_picked():
    chosen, left_out = choose_variants(Config(), ALL, ["ridge", "gru", "mamba"])
    assert [variant.name for variant in chosen] == ["full", "gru", "ridge"]
    assert left_out == []
    with pytest.raises(UsageError, match=r"--only nostate: there is no such variant; there are no-state, mamba"):
        choose_variants(Config(), ALL, ["gru", "nostate"])


def test_a_full_model_without_input_is_refused():
    with pytest.raises(FeatureMismatchError, match="nothing is left to predict from"):
        choose_variants(Config.load("default", ["model.prosody=false"]), {"prosody": 4})


def test_cells_come_seed_by_seed_and_have_names_of_their_own():
    variants, _ = choose_variants(Config(), ALL)
    cells = plan_cells(variants, [5, 6], ["a/b", "c"])
    assert len({cell.name for cell in cells}) == len(cells) == 2 * (3 + 2 * (len(variants) - 3))
    assert cells[0].name == "mean-fold-a%2Fb"
    assert cells[6].name == "full-seed-5-fold-a%2Fb"
    seeds = [cell.seed for cell in cells if not cell.variant.baseline]
    assert seeds == sorted(seeds)
    assert Cell(FULL, 3, "").name == "full-seed-3"


@pytest.fixture(scope="module")
def world():
    return linear_world(3, sessions=(12, 4, 5), lengths=(6, 14), features=6, noise=1.0, unlabelled=0.1)


@pytest.fixture(scope="module")
def sessions(world):
    return [session for split in ("train", "dev", "test") for session in world.sessions(split)]


def run_cell(cell, sessions, fold, config):
    """As a task of the grid does it: ids and labels here, features there."""
    light = [dataclasses.replace(session, streams={}) for session in sessions]
    return cell_of_the_grid(cell, light, PackedSessions.of(sessions), fold, config)


@pytest.mark.long
def test_a_cell_is_a_plain_training(world, sessions):
    table, facts = run_cell(Cell(FULL, 2, ""), sessions, plain_split(world.table, QUICK.splits), QUICK)
    trainer = Trainer(world.sessions("train"), world.sessions("dev"), QUICK.replace({"train": {"seed": 2}}))
    history = list(trainer)
    packed = PackedSessions.of(world.sessions("test"))
    free = replay(trainer.kept, packed, window=QUICK.train.window).prediction
    fed = replay(trainer.kept, packed, window=QUICK.train.window, observed=packed.labels).prediction
    np.testing.assert_allclose(matrix(table, DIMENSIONS), free, atol=FLOAT32)
    np.testing.assert_allclose(matrix(table, columns_named("fed", DIMENSIONS)), fed, atol=FLOAT32)
    assert table["utt_id"].to_pylist() == [utt_id for session in world.sessions("test") for utt_id in session.utt_ids]
    assert facts["dev_ccc_avg"] == history[-1]["dev_ccc_avg"]
    assert facts["ccc_avg"] == pytest.approx(ccc(free, packed.labels.numpy()).mean(), abs=FLOAT32)
    assert (facts["variant"], facts["seed"], facts["epochs"]) == ("full", 2, 3)


def test_the_kept_epoch_is_compared_not_the_last(world, sessions):
    """With select `best`, on a learning rate that spoils later epochs."""
    config = QUICK.replace({"train": {"select": "best", "lr": 0.1, "epochs": 4, "weight_averaging": 0.0}})
    _, facts = run_cell(Cell(FULL, 0, ""), sessions, plain_split(world.table, config.splits), config)
    trainer = Trainer(world.sessions("train"), world.sessions("dev"), config)
    history = list(trainer)
    best = max(range(4), key=lambda epoch: history[epoch]["dev_ccc_avg"])
    assert best < 3, "the last epoch is the best: nothing is tested"
    assert facts["dev_ccc_avg"] == history[best]["dev_ccc_avg"]
    again = Trainer(world.sessions("train"), world.sessions("dev"), config)
    for _ in zip(range(best + 1), again, strict=False):
        pass
    packed = PackedSessions.of(world.sessions("test"))
    expected = ccc(replay(again.kept, packed, window=30).prediction, packed.labels.numpy()).mean()
    assert facts["ccc_avg"] == pytest.approx(expected, abs=FLOAT32)


def test_without_feedback_nothing_is_fed(world, sessions):
    stateless = next(variant for variant in ABLATIONS if variant.name == "no-state")
    table, _ = run_cell(Cell(stateless, 0, ""), sessions, plain_split(world.table, QUICK.splits), QUICK)
    assert all(table[name].null_count == len(table) for name in columns_named("fed", DIMENSIONS))
    assert table["valence"].null_count == 0


def test_folds_hold_out_their_rows_alone(world, sessions):
    folds = make_folds(world.table, "k=3", QUICK.splits)
    seen = []
    for fold in folds:
        mean = Variant("mean", "", baseline=lambda given: [np.zeros((len(session), 2)) for session in given.test])
        table, _ = run_cell(Cell(mean, 0, fold.name), sessions, fold, QUICK)
        held = [u for u, out in zip(world.table["utt_id"].to_pylist(), fold.held_out, strict=True) if out]
        assert sorted(table["utt_id"].to_pylist()) == sorted(held)
        seen += held
    assert sorted(seen) == sorted(world.table["utt_id"].to_pylist())


def test_a_variant_that_the_config_makes_impossible_is_left_out():
    variants, left_out = choose_variants(QUICK, {"speech": 6})
    assert "mamba2" not in [variant.name for variant in variants]
    assert any("headdim is 32, which does not divide" in line for line in left_out)


def test_a_result_is_kept_whole(world, sessions, tmp_path):
    _, _, baseline = choose_variants(QUICK, {"speech": 6})[0][-3:]
    table, facts = run_cell(Cell(baseline, 0, ""), sessions, plain_split(world.table, QUICK.splits), QUICK)
    write_result(str(tmp_path / "cell.parquet"), table, facts)
    kept, same = read_result(str(tmp_path / "cell.parquet"))
    assert kept.equals(table)
    assert same == facts


def test_a_fold_must_have_labels_to_be_judged_by(world, sessions):
    fold = plain_split(world.table, QUICK.splits)
    check_fold(sessions, fold, QUICK)
    nothing = dataclasses.replace(fold, held_out=np.zeros(len(world.table), bool))
    with pytest.raises(LabelError, match="nothing is held out to compare the models on"):
        check_fold(sessions, nothing, QUICK)
    blank = [
        dataclasses.replace(s, labels=np.full_like(s.labels, np.nan)) if s.split == "test" else s for s in sessions
    ]
    with pytest.raises(LabelError, match="no utterance of the split 'test' has a label for valence"):
        check_fold(blank, fold, QUICK)
