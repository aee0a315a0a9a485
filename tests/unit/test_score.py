"""Replay of sessions: what is predicted depends on the session alone, whoever shares its batch."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from vaemo.config import ModelConfig, UpdaterConfig
from vaemo.data.sessions import assemble_sessions
from vaemo.data.windows import PackedSessions
from vaemo.errors import NonFiniteFeatureError
from vaemo.model.regressor import SessionRegressor
from vaemo.model.settling import ErrorByPosition
from vaemo.model.streams import Streams
from vaemo.scoring.table import score_table
from vaemo.testing import linear_world
from vaemo.training import replay
from vaemo.units import DIMENSIONS

SINGLE = 2e-6
"""Rounding of float32 over a session of 60 steps, on a range of width 1."""


def make_model(seed=0, dims=None, **settings):
    torch.manual_seed(seed)
    config = ModelConfig(**{"d_c": 8, "head_hidden": 16, **settings})
    return SessionRegressor(config, UpdaterConfig(d_model=16), dims or {"speech": 6}).eval()


def make_table(seed=0, sessions=7, lengths=(1, 60)):
    return linear_world(seed, sessions=(sessions, 0, 0), lengths=lengths, features=6).table


def values(table, suffix=""):
    columns = [table[f"{name}{suffix}"].to_numpy(zero_copy_only=False) for name in DIMENSIONS]
    return np.stack(columns, axis=1).astype(float)


def run(table, *models, lanes=4, chunk=16, **options):
    return score_table(table, models or (make_model(),), lanes=lanes, chunk=chunk, **options)


def of_session(table, session_id):
    return table.filter(pa.compute.equal(table["session_id"], session_id))


def replace(table, name, column):
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(index), column)


def step_by_step(model, session):
    state, predictions = model.fresh_state(1), []
    with torch.inference_mode():
        for step in range(len(session)):
            features = Streams(**{name: torch.from_numpy(x[step : step + 1]) for name, x in session.streams.items()})
            observed = torch.from_numpy(session.observed[step : step + 1])
            prediction, state = model.step(features, state, observed=observed)
            predictions.append(prediction[0].numpy())
    return np.array(predictions)


@pytest.mark.parametrize("updater", ["mamba", "mamba2", "gru", "none"])
def test_a_replay_is_the_loop_of_steps(updater):
    model, table = make_model(updater=updater), make_table()
    expected = np.concatenate([step_by_step(model, session) for session in assemble_sessions(table)])
    assert np.abs(values(run(table, model)) - expected).max() < SINGLE
    assert len(np.unique(expected[:, 0])) == len(expected)


@pytest.mark.parametrize("lanes", [1, 3, 32])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_lanes_and_chunks_change_nothing_but_the_rounding(lanes, chunk):
    table = make_table()
    assert np.abs(values(run(table, lanes=lanes, chunk=chunk)) - values(run(table))).max() < SINGLE


def test_the_content_of_other_lanes_changes_no_bit():
    table = make_table()
    others = pa.compute.not_equal(table["session_id"], "s0003").to_numpy()
    speech = np.stack(table["speech"].to_numpy(zero_copy_only=False))
    speech[others] = np.random.default_rng(1).normal(0, 30, (others.sum(), 6))
    changed = replace(table, "speech", pa.FixedSizeListArray.from_arrays(pa.array(speech.ravel()), 6))
    before, after = run(table), run(changed)
    assert np.array_equal(values(of_session(before, "s0003")), values(of_session(after, "s0003")))
    assert not np.array_equal(values(before), values(after))


def test_a_session_scores_the_same_alone_and_among_others():
    table = make_table(sessions=50)
    together = run(table, lanes=32)
    for session_id in ("s0000", "s0017", "s0049"):
        alone = run(of_session(table, session_id), lanes=32)
        assert np.abs(values(alone) - values(of_session(together, session_id))).max() < SINGLE


def test_blocks_of_sessions_change_nothing(monkeypatch):
    table = make_table(sessions=11)
    whole = values(run(table))
    monkeypatch.setattr(replay, "BLOCK_SESSIONS", 3)
    assert np.abs(values(run(table)) - whole).max() < SINGLE


@pytest.mark.parametrize("seed", range(20))
def test_calls_serve_every_chunk_once_and_are_as_few_as_can_be(seed):
    random = np.random.default_rng(seed)
    n_chunks = random.integers(0, 9, random.integers(1, 30))
    lanes = int(random.integers(1, 12))
    calls = list(replay.calls_of(n_chunks, lanes))
    assert np.array_equal(np.bincount(np.concatenate([*calls, []]).astype(int), minlength=len(n_chunks)), n_chunks)
    assert all(len(np.unique(call)) == len(call) <= lanes for call in calls)
    assert len(calls) == max(n_chunks.max(), -(-n_chunks.sum() // lanes))


def test_no_step_is_padding_and_shapes_follow_from_the_session():
    model, seen = make_model(), []
    model.register_forward_pre_hook(lambda _, args: seen.append((args[0].speech.shape[1], args[2].tolist())))
    packed = PackedSessions.of(assemble_sessions(make_table(sessions=5)))
    replay.predict_sessions(model, packed, lanes=4, chunk=16)
    assert all(len(lengths) == 4 and set(lengths) <= {0, steps} for steps, lengths in seen)
    assert sum(map(sum, (lengths for _, lengths in seen))) == packed.lengths.sum()


def test_failed_rows_keep_their_status_and_do_not_move_the_state():
    table = make_table(sessions=3, lengths=(20, 30))
    random = np.random.default_rng(0)
    failed = random.random(len(table)) < 0.3
    status = np.where(failed, "silent", "ok")
    marked = replace(table, "status", pa.array(status))
    marked = replace(marked, "reason", pa.array(np.where(failed, "no sound", None)))
    scored = run(marked)
    assert scored["status"].to_pylist() == status.tolist()
    assert scored.filter(pa.array(failed))["reason"].to_pylist() == ["no sound"] * failed.sum()
    assert np.array_equal(np.isnan(values(scored)).all(axis=1), failed)
    without = run(table.filter(pa.array(~failed)))
    assert np.array_equal(values(scored)[~failed], values(without))


def test_a_table_without_usable_rows_is_scored_with_nulls():
    table = make_table(sessions=2)
    scored = run(replace(table, "status", pa.array(["missing"] * len(table))))
    assert scored["valence"].null_count == scored["arousal"].null_count == len(table)


def test_labels_are_not_looked_at():
    table = make_table()
    swapped = replace(table, "valence", table["arousal"])
    assert run(table).equals(run(swapped))


def test_observed_values_act_from_the_next_step_on():
    table = make_table(sessions=2, lengths=(20, 20))
    model = make_model()
    with torch.no_grad():
        model.updater.input.weight[:, -2:] *= 50  # an untrained model hardly listens to its feedback
    observed = np.full(len(table), None, object)
    observed[7] = 0.95
    watched = replace(table, "observed_valence", pa.array(observed, pa.float32()))
    plain, known = values(run(table, model)), values(run(watched, model))
    assert np.array_equal(plain[:8], known[:8])
    assert (plain[8:20] != known[8:20]).any(axis=1).all()
    assert np.array_equal(plain[20:], known[20:])
    expected = np.concatenate([step_by_step(model, session) for session in assemble_sessions(watched)])
    assert np.abs(known - expected).max() < SINGLE


def test_several_models_give_mean_and_deviation():
    table, models = make_table(), [make_model(seed) for seed in range(3)]
    single = np.stack([values(run(table, model)) for model in models])
    scored = run(table, *models)
    assert np.abs(values(scored) - single.mean(axis=0)).max() < SINGLE
    assert np.abs(values(scored, "_sd") - single.std(axis=0, ddof=1)).max() < SINGLE
    assert "valence_sd" not in run(table, models[0]).column_names


def test_one_memory_per_speaker():
    table = make_table(sessions=3, lengths=(10, 20))
    speakers = np.random.default_rng(0).choice(["a", "b"], len(table))
    mixed = replace(table, "speaker_id", pa.array(speakers))
    by_speaker = values(run(mixed, sequence_by="speaker"))
    for speaker in "ab":
        own = speakers == speaker
        assert np.abs(values(run(mixed.filter(pa.array(own)))) - by_speaker[own]).max() < SINGLE
    assert np.abs(by_speaker - values(run(mixed))).max() > SINGLE


def test_context_moves_the_state_without_a_score():
    table = make_table(sessions=2, lengths=(20, 20))
    context = np.arange(len(table)) % 4 == 1
    listed = replace(table, "status", pa.array(np.where(context, "not_scored_role", "ok")))
    scored = run(listed, context=context)
    assert np.array_equal(np.isnan(values(scored)).all(axis=1), context)
    assert scored["status"].to_pylist() == listed["status"].to_pylist()
    unheard = values(run(listed))
    assert np.abs(values(scored) - unheard)[2:20][~context[2:20]].min() > 0
    # Nothing predicted of those steps is fed back: as if the middle of the range had been observed there.
    middle = replace(
        table, "observed_valence", pa.array(np.where(context, 0.5, np.nan), pa.float32(), from_pandas=True)
    )
    middle = replace(middle, "observed_arousal", middle["observed_valence"])
    assert np.array_equal(values(scored)[~context], values(run(middle))[~context])


def test_a_feature_that_is_not_finite_is_refused():
    table = make_table(sessions=1)
    speech = np.stack(table["speech"].to_numpy(zero_copy_only=False))
    speech[0, 2] = np.inf
    with pytest.raises(NonFiniteFeatureError, match="s0000-0000"):
        run(replace(table, "speech", pa.FixedSizeListArray.from_arrays(pa.array(speech.ravel()), 6)))


def known_errors(first=0.4):
    """Errors of a model that errs more on the first utterance, and on no later one."""
    session, position = np.repeat(np.arange(50), 4), np.tile(np.arange(4), 50)
    random = np.random.default_rng(0)
    error = random.standard_normal((200, 2)) * np.where(position == 0, first, 0.1)[:, None]
    return ErrorByPosition.of(error, np.zeros((200, 2)), session, position)


def test_weights_are_those_of_the_place_among_what_moved_the_memory():
    table = make_table(sessions=4, lengths=(9, 9))
    status = np.array(["ok"] * 36, object)
    status[[0, 9]] = "too_short"
    table = replace(table, "status", pa.array(status))
    context = np.zeros(36, bool)
    context[18] = True
    errors = known_errors()
    scored = run(table, errors=[errors], context=context)
    expected = np.concatenate([errors.weights(np.arange(9))] * 4)
    for first in (0, 9):
        expected[first] = np.nan
        expected[first + 1 : first + 9] = errors.weights(np.arange(8))
    # What is heard and not scored moves the memory: the next utterance is the second.
    expected[18] = np.nan
    np.testing.assert_allclose(values(scored, "_weight"), expected.astype(np.float32))
    assert expected[27, 0] < 0.3
    assert scored.drop(["valence_weight", "arousal_weight"]) == run(table, context=context)


def test_several_models_have_the_mean_of_their_weights():
    table, models = make_table(sessions=2, lengths=(9, 9)), [make_model(seed) for seed in range(2)]
    errors = known_errors()
    one, both, none = (
        values(run(table, *models, errors=each), "_weight") if any(each) else None
        for each in ([errors, None], [errors, known_errors(first=0.2)], [None, None])
    )
    np.testing.assert_allclose(one[0], (errors.weights(np.zeros(1, int))[0] + 1) / 2, atol=SINGLE)
    expected = (errors.weights(np.zeros(1, int)) + known_errors(first=0.2).weights(np.zeros(1, int)))[0] / 2
    np.testing.assert_allclose(both[0], expected, atol=SINGLE)
    assert none is None
    assert "valence_weight" not in run(table, *models, errors=[None, None]).column_names
