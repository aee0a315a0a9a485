import dataclasses

import pytest
import torch
from model_cases import assert_states_equal, make_case, make_model
from safetensors.torch import save_file

from vaemo.errors import StateMismatchError
from vaemo.model.state import TENSOR_FIELDS, SessionState


@pytest.fixture
def state():
    return make_case("mamba", "scheduled").state


def test_fresh_is_zero_but_for_the_feedback_in_the_middle():
    for label_range, middle in (((0.0, 1.0), 0.5), ((-1.0, 1.0), 0.0)):
        fresh = make_model({"label_range": label_range}).fresh_state(2)
        assert torch.equal(fresh.last_feedback, torch.full((2, 2), middle, dtype=torch.float64))
        assert not any(x.any() for name, x in fresh.tensors().items() if name != "last_feedback")


def test_the_scan_state_has_at_least_float32():
    assert make_model(dtype=torch.bfloat16).fresh_state(1).ssm.dtype == torch.float32
    assert make_model(dtype=torch.float64).fresh_state(1).ssm.dtype == torch.float64


def test_select_and_stack_are_inverse(state):
    assert_states_equal(SessionState.stack([state.select([2]), state.select([0, 1])]), state.select([2, 0, 1]))
    assert state.select(slice(0, 2)).lanes == 2


def test_stack_refuses_states_of_two_models(state):
    other = make_case("mamba2", "scheduled").state
    with pytest.raises(StateMismatchError, match=r"conv_tail is .* per lane; this model has"):
        SessionState.stack([state, other])


def test_reset_takes_one_bool_per_lane(state):
    with pytest.raises(StateMismatchError, match=r"reset got torch.int64 of shape \(2,\).*: \(3,\)"):
        state.reset(torch.tensor([1, 0]))


def test_detach_cuts_the_graph():
    case = make_case("mamba", "scheduled")
    _, after = case.run()
    assert after.c.requires_grad
    assert not any(x.requires_grad for x in after.detach().tensors().values())


def test_to_keeps_everything(state):
    assert_states_equal(state.to("cpu"), state)


def test_save_and_load_keep_every_bit(state, tmp_path):
    stamped = dataclasses.replace(state, fingerprint="ab" * 32)
    stamped.save(tmp_path / "state")
    loaded = SessionState.load(tmp_path / "state", fingerprint="ab" * 32)
    assert_states_equal(loaded, stamped)
    assert (loaded.fingerprint, loaded.middle) == (stamped.fingerprint, stamped.middle)


def test_load_refuses_the_state_of_another_checkpoint(state, tmp_path):
    state.save(tmp_path / "state")
    with pytest.raises(StateMismatchError, match="belongs to the checkpoint 'none', not to 'cdcd"):
        SessionState.load(tmp_path / "state", fingerprint="cd" * 32)


@pytest.mark.parametrize("content", [None, b"not safetensors at all"])
def test_load_refuses_what_it_cannot_read(content, tmp_path):
    if content:
        (tmp_path / "state").write_bytes(content)
    with pytest.raises(StateMismatchError, match="cannot be read"):
        SessionState.load(tmp_path / "state")


@pytest.mark.parametrize("missing", TENSOR_FIELDS)
def test_load_refuses_a_state_that_is_not_whole(state, missing, tmp_path):
    tensors = {name: x.contiguous() for name, x in state.tensors().items() if name != missing}
    save_file(tensors, tmp_path / "state", metadata={"fingerprint": "", "middle": "0.5"})
    with pytest.raises(StateMismatchError, match="a whole one holds"):
        SessionState.load(tmp_path / "state")


def test_load_refuses_a_state_with_more_than_it_should_have(state, tmp_path):
    tensors = {name: x.contiguous() for name, x in state.tensors().items()} | {"more": torch.zeros(1)}
    save_file(tensors, tmp_path / "state", metadata={"fingerprint": "", "middle": "0.5"})
    with pytest.raises(StateMismatchError, match=r"holds c, .*more"):
        SessionState.load(tmp_path / "state")


def test_a_model_refuses_the_state_of_another_checkpoint():
    case = make_case("mamba", "scheduled")
    with pytest.raises(StateMismatchError, match="belongs to the checkpoint 'eeee"):
        case.run(state=dataclasses.replace(case.state, fingerprint="e" * 64))


def test_a_model_refuses_a_state_of_another_width_or_dtype():
    case = make_case("mamba", "scheduled")
    with pytest.raises(StateMismatchError, match=r"c is .*float64.* per lane; this model has"):
        case.run(state=dataclasses.replace(case.state, c=case.state.c[:, :5]))
    with pytest.raises(StateMismatchError, match=r"c is torch\.float32"):
        case.model.step(case.features.step(0), dataclasses.replace(case.state, c=case.state.c.float()))
