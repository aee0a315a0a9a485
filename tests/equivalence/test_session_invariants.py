"""S1 to S12: what makes training, replay and live streaming one function."""

import dataclasses
import random
import subprocess
import sys

import pytest
import torch
from model_cases import (
    FEEDBACKS,
    FLOAT32,
    LANES,
    STEPS,
    UPDATERS,
    assert_close,
    assert_states_close,
    assert_states_equal,
    gradients,
    make_case,
    make_features,
    make_observed,
    random_loss,
    step_by_step,
    with_gradients,
)

from vaemo.model.chunk import Diagnostics
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams

every_case = pytest.mark.parametrize("feedback", FEEDBACKS)
every_updater = pytest.mark.parametrize("updater", UPDATERS)
both_solvers = pytest.mark.parametrize("solver", ["never", "always"])


@every_case
@every_updater
@both_solvers
def test_s1_forward_is_a_loop_of_step(updater, feedback, solver):
    case = make_case(updater, feedback, parallel_feedback=solver)
    expected, expected_state = step_by_step(case)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            prediction, state = case.run()
        assert_close(prediction, expected)
        assert_states_close(state, expected_state)


@every_case
@every_updater
def test_s2_any_chunking_is_one_chunk(updater, feedback):
    case = make_case(updater, feedback)
    expected, expected_state = case.run()
    draw = random.Random(0)
    random_cuts = [sorted(draw.choices(range(STEPS + 1), k=3)) for _ in range(3)]
    for cuts in ([], list(range(STEPS)), [2, 5, 5, 10], [3, 6, 9], [7], *random_cuts):
        state, predictions = case.state, []
        for start, stop in zip([0, *cuts], [*cuts, STEPS], strict=True):
            observed = None if case.observed is None else case.observed[:, start:stop]
            prediction, state = case.model(
                case.features.steps(start, stop),
                state,
                (case.lengths - start).clamp(0, stop - start),
                observed=observed,
            )
            predictions.append(prediction)
        assert_close(torch.cat(predictions, 1), expected)
        assert_states_close(state, expected_state)


@every_case
@every_updater
@both_solvers
@pytest.mark.parametrize("feedback_gradient", [True, False])
def test_s3_gradients_are_those_of_the_loop(updater, feedback, solver, feedback_gradient):
    case = make_case(updater, feedback, parallel_feedback=solver, feedback_gradient=feedback_gradient)
    found = []
    for run in (case.run, lambda features, state: step_by_step(case, features, state)):
        features, state = with_gradients(case.features), with_gradients(case.state)
        prediction, after = run(features=features, state=state)
        found.append(gradients(case, random_loss(prediction, after, case.lengths), features, state))
    for name, expected in found[1].items():
        assert_close(found[0][name], expected)
    if feedback == "model" and case.model.has_feedback:
        assert found[1]["state.last_feedback"][0].any() == feedback_gradient


@every_case
@every_updater
@both_solvers
def test_s4_no_future_leaks(updater, feedback, solver):
    case = make_case(updater, feedback, parallel_feedback=solver)
    features = with_gradients(case.features)
    observed = None if case.observed is None else case.observed
    prediction, _ = case.run(features=features, observed=observed)
    for t in (0, 3, STEPS - 1):
        leaves = [x for name, x in features.tensors().items() if name in (*case.model.dims, *case.model.pasts)]
        grads = torch.autograd.grad(prediction[:, t].sum(), leaves, retain_graph=True)
        assert not any(grad[:, t + 1 :].any() for grad in grads)
        assert any(grad[0, t].any() for grad in grads)


@every_case
@every_updater
def test_s5_lanes_are_independent(updater, feedback):
    case = make_case(updater, feedback, dtype=torch.float32)
    lengths = torch.tensor([STEPS, 4, 7])
    with torch.no_grad():
        expected, expected_state = case.run(lengths=lengths)
        others = make_features(seed=9, dtype=torch.float32)
        mixed = Streams.cat([case.features.select([0]), others.select(slice(1, None))])
        noise = torch.rand(LANES, STEPS, case.model.n_fed)
        observed = None if case.observed is None else torch.cat([case.observed[:1], noise[1:]])
        changed, changed_state = case.run(features=mixed, lengths=torch.tensor([STEPS, 9, 0]), observed=observed)
        assert torch.equal(changed[0], expected[0])
        assert_states_equal(changed_state.select([0]), expected_state.select([0]))

        order = torch.tensor([2, 0, 1, 1])
        observed = None if case.observed is None else case.observed[order]
        moved, moved_state = case.run(
            features=case.features.select(order),
            state=case.state.select(order),
            lengths=lengths[order],
            observed=observed,
        )
    assert_close(moved, expected[order], FLOAT32)
    assert_states_close(moved_state, expected_state.select(order), FLOAT32)


@every_case
@every_updater
@both_solvers
@pytest.mark.parametrize("garbage", [1e30, torch.nan, torch.inf])
def test_s6_padding_is_inert(updater, feedback, solver, garbage):
    case = make_case(updater, feedback, parallel_feedback=solver)
    padded = (torch.arange(STEPS) >= case.lengths[:, None])[..., None]
    expected, expected_state = case.run()
    assert not expected[padded.expand_as(expected)].any()
    observed = None if case.observed is None else case.observed.masked_fill(padded, 0.3)
    prediction, state = case.run(
        features=case.features.map(lambda x: x.masked_fill(padded, garbage)), observed=observed
    )
    assert torch.equal(prediction, expected)
    assert_states_equal(state, expected_state)
    assert_states_equal(state.select([2]), case.state.select([2]))

    longer = case.features.map(lambda x: torch.cat([x, torch.full_like(x[:, :3], garbage)], 1))
    observed = None if case.observed is None else torch.cat([case.observed, case.observed[:, :3]], 1)
    prediction, state = case.run(features=longer, observed=observed)
    assert_close(prediction[:, :STEPS], expected)
    assert_states_close(state, expected_state)


@every_updater
def test_s7_reset_is_fresh_there_and_untouched_elsewhere(updater):
    case = make_case(updater, "scheduled")
    where = torch.tensor([True, False, True])
    state = case.state.reset(where)
    assert_states_equal(state.select(where), case.model.fresh_state(2))
    assert_states_equal(state.select(~where), case.state.select(~where))
    assert not torch.equal(case.state.last_feedback, state.last_feedback)


CONTINUE = """
import sys, torch
from safetensors.torch import load_file, save_file
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams
folder = sys.argv[1]
torch.set_num_threads(1)
model = SessionRegressor.from_pretrained(f"{folder}/checkpoint")
state = SessionState.load(f"{folder}/state.safetensors", fingerprint=model.fingerprint)
given = load_file(f"{folder}/features.safetensors")
with torch.no_grad():
    prediction, state = model(Streams.of(given), state, torch.tensor([11, 4, 0]))
save_file({"prediction": prediction}, f"{folder}/prediction.safetensors")
state.save(f"{folder}/after.safetensors")
"""


def test_s8_a_new_process_continues_as_if_never_stopped(tmp_path):
    from safetensors.torch import load_file, save_file

    case = make_case("mamba-2-layers", "scheduled", dtype=torch.float32)
    case.model.save_pretrained(tmp_path / "checkpoint")
    model = SessionRegressor.from_pretrained(tmp_path / "checkpoint")
    warm = dataclasses.replace(case.state, fingerprint=model.fingerprint)
    warm.save(tmp_path / "state.safetensors")
    save_file(case.features.tensors(), tmp_path / "features.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected, expected_state = model(case.features, warm, case.lengths)
    assert_close(load_file(tmp_path / "prediction.safetensors")["prediction"], expected, FLOAT32)
    assert_states_close(SessionState.load(tmp_path / "after.safetensors"), expected_state, FLOAT32)


@every_updater
def test_s9_state_does_not_grow(updater):
    case = make_case(updater, "scheduled")
    sizes = {case.model.fresh_state(LANES).nbytes}
    state = case.state
    for _ in range(4):
        _, state = case.run(state=state)
        sizes.add(state.nbytes)
    assert len(sizes) == 1
    assert state.n_steps.tolist() == [STEPS * 5, 5 + 4 * 4, 2]


@every_case
@pytest.mark.parametrize("updater", ["mamba", "mamba2", "gru"])
def test_s10_detached_windows_are_the_hand_written_equivalent(updater, feedback):
    case = make_case(updater, feedback)
    window, lengths = 4, torch.full((LANES,), STEPS)

    def loss_of(prediction):
        return (prediction - 0.3).square().sum()

    def by_windows(size):
        state, loss = case.state, 0.0
        for start in range(0, STEPS, size):
            stop = min(start + size, STEPS)
            observed = None if case.observed is None else case.observed[:, start:stop]
            prediction, state = case.model(
                case.features.steps(start, stop), state.detach(), lengths.clamp(max=stop - start), observed=observed
            )
            loss = loss + loss_of(prediction)
        return loss

    def by_steps(size):
        state, loss = case.state, 0.0
        for t in range(STEPS):
            state = state.detach() if t % size == 0 else state
            observed = None if case.observed is None else case.observed[:, t]
            prediction, state = case.model.step(case.features.step(t), state, observed=observed)
            loss = loss + loss_of(prediction)
        return loss

    parameters = list(case.model.parameters())
    per_size = []
    for size in (window, STEPS):
        found = torch.autograd.grad(by_windows(size), parameters)
        for grad, expected in zip(found, torch.autograd.grad(by_steps(size), parameters), strict=True):
            assert_close(grad, expected)
        per_size.append(found)
    assert any(not torch.allclose(a, b) for a, b in zip(*per_size, strict=True))


@every_updater
@both_solvers
def test_s11_forward_leaves_every_module_as_it_was(updater, solver):
    case = make_case(updater, "scheduled", parallel_feedback=solver)

    def snapshot():
        attributes = {
            name: {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
            for name, module in case.model.named_modules()
        }
        return attributes, {name: tensor.clone() for name, tensor in case.model.state_dict().items()}

    attributes, tensors = snapshot()
    prediction, _ = case.run(diagnostics=Diagnostics())
    prediction.sum().backward()
    case.model.zero_grad()
    case.model.step(case.features.step(0), case.state)
    after, tensors_after = snapshot()
    assert after == attributes
    assert all(torch.equal(tensors_after[name], tensor) for name, tensor in tensors.items())


@every_updater
def test_s12_scores_do_not_depend_on_company_or_cuts(updater):
    case = make_case(updater, "scheduled", dtype=torch.float32)
    lanes, published = 8, 1e-5
    features = make_features(lanes, seed=6, dtype=torch.float32)
    observed = make_observed("scheduled", lanes, n_fed=case.model.n_fed, seed=7, dtype=torch.float32)

    def score(features, lengths, cuts):
        state, predictions = case.model.fresh_state(lanes), []
        for start, stop in zip([0, *cuts], [*cuts, STEPS], strict=True):
            prediction, state = case.model(
                features.steps(start, stop),
                state,
                (lengths - start).clamp(0, stop - start),
                observed=observed[:, start:stop],
            )
            predictions.append(prediction)
        return torch.cat(predictions, 1)

    with torch.no_grad():
        full = torch.full((lanes,), STEPS)
        whole, again = score(features, full, []), score(features, full, [])
        in_chunks = score(features, full, [4, 8])
        alone = full.clone()
        alone[1:] = 0
        by_itself = score(features, alone, [4, 8])
    assert torch.equal(whole, again)
    assert torch.equal(by_itself[0], in_chunks[0])
    assert_close(in_chunks, whole, published)
