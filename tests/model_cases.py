"""Small session models of every kind, with random weights, inputs and warm states, for the tests of the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaemo.config import ModelConfig, UpdaterConfig
from vaemo.model.regressor import SessionRegressor
from vaemo.model.state import SessionState
from vaemo.model.streams import Streams
from vaemo.targets import Target

FLOAT64 = 1e-10
"""Two orders of the same sums in float64: rounding of some hundred operations, far below any real difference."""

FLOAT32 = 1e-5
"""The same in float32."""

DIMS = {"speech": 6, "prosody": 5, "speaker": 4}
LANES, STEPS = 3, 11

PASTS = {"speaker_norm": ("prosody", "speech"), "session_norm": ("prosody",), "speaker_norm_weight": 1.5}
"""Compared with every kind of past."""

THREE = ("valence", "arousal", Target("csat", "session"))
FIVE = ("effort", "valence", "arousal", "dominance", "hidden")
"""Other targets than the two, some of the session."""

UPDATERS = {
    "mamba": ({"updater": "mamba"}, {}),
    "mamba-2-layers": (
        {"updater": "mamba", "feedback_flag": True, **PASTS, "speech_mlp": "before_film", "targets": THREE},
        {"layers": 2, "d_conv": 2},
    ),
    "mamba-forgetful": ({"updater": "mamba", "ema": "learned", "speech_mlp": "after_film"}, {"carry": False}),
    "mamba2": ({"updater": "mamba2", "alpha_arousal": 0.6}, {}),
    "mamba2-2-layers": (
        {"updater": "mamba2", "ema": "none", "label_range": (-1.0, 1.0), "targets": ("valence",)},
        {"layers": 2},
    ),
    "gru": (
        {"updater": "gru", "film": "concat", "norm_z": True, **PASTS, "speech_mlp": "after_film", "targets": FIVE},
        {"layers": 2},
    ),
    "none": ({"updater": "none", **PASTS}, {}),
}

FEEDBACKS = ("none", "observed", "label", "scheduled", "model")


@dataclass(frozen=True)
class Case:
    """A model in float64 with what a chunk needs: features, lengths (one lane idle, one full), observed, a state."""

    model: SessionRegressor
    features: Streams
    lengths: Tensor
    observed: Tensor | None
    state: SessionState

    def run(self, features=None, state=None, lengths=None, observed=None, **kwargs):
        features, state = features or self.features, state or self.state
        lengths = self.lengths if lengths is None else lengths
        observed = self.observed if observed is None else observed
        return self.model(features, state, lengths, observed=observed, **kwargs)


def make_model(model=None, updater=None, *, dims=DIMS, seed=0, dtype=torch.float64) -> SessionRegressor:
    """A small model, all of whose parameters and statistics are random: nothing hides behind zeros and ones."""
    torch.manual_seed(seed)
    config = ModelConfig(
        **{"d_c": 8, "film_hidden": 7, "head_hidden": 10, "prosody_hidden": 6, "prosody_dim": 3}
        | {"speech_hidden": 5, "speech_dim": 4}
        | (model or {})
    )
    regressor = SessionRegressor.from_config(
        config, UpdaterConfig(**{"d_model": 8, "d_state": 4, "headdim": 4} | (updater or {})), dims
    )
    regressor.to(dtype)
    with torch.no_grad():
        for parameter in regressor.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if regressor.has_feedback:
            regressor.updater.input.weight[:, regressor.updater.z_dim :] *= 4
    statistics = {name: (torch.randn(dim), torch.rand(dim) + 0.5) for name, dim in dims.items()}
    regressor.set_statistics(statistics, torch.rand(len(regressor.targets)) + 0.1)
    return regressor


def make_features(lanes=LANES, steps=STEPS, *, dims=DIMS, seed=1, dtype=torch.float64) -> Streams:
    """Features with random pasts of up to 3 utterances, which a model may want or not."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(lanes, steps, dim, generator=generator, dtype=dtype) for name, dim in dims.items()}
    for past in ("speaker.speech", "speaker.prosody", "session.prosody"):
        count = torch.randint(0, 4, (lanes, steps, 1), generator=generator).to(dtype)
        dim = dims.get(past.partition(".")[2], 0)
        total = torch.randn(lanes, steps, dim, generator=generator, dtype=dtype)
        tensors[past] = torch.cat([count * total, count], -1)
    return Streams.of(tensors)


def make_observed(feedback: str, lanes=LANES, steps=STEPS, *, n_fed=2, seed=2, dtype=torch.float64) -> Tensor | None:
    """What training feeds: every label, some (missing anywhere, also in one dimension alone), or none."""
    if feedback in ("none", "model"):
        return None
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(lanes, steps, n_fed, generator=generator, dtype=dtype)
    if feedback in ("scheduled", "observed"):
        labels[torch.rand(lanes, steps, n_fed, generator=generator) < 0.5] = torch.nan
    return labels


def make_case(updater: str, feedback: str, *, dtype=torch.float64, **changes) -> Case:
    """The case of one updater in `UPDATERS` and one feedback mode, from a warm state."""
    model_fields, updater_fields = UPDATERS[updater]
    model = make_model({**model_fields, "feedback": feedback, **changes}, updater_fields, dtype=dtype)
    lengths = torch.tensor([STEPS, 4, 0])
    with torch.no_grad():
        _, state = model(
            make_features(seed=3, dtype=dtype),
            model.fresh_state(LANES),
            torch.tensor([STEPS, 5, 2]),
            observed=make_observed(feedback, n_fed=model.n_fed, seed=4, dtype=dtype),
        )
    return Case(
        model, make_features(dtype=dtype), lengths, make_observed(feedback, n_fed=model.n_fed, dtype=dtype), state
    )


def step_by_step(case: Case, features=None, state=None) -> tuple[Tensor, SessionState]:
    """The chunk as a loop of `step`, every lane on its own and only as far as it goes."""
    features, state = features or case.features, state or case.state
    steps = next(iter(features.items()))[1].shape[1]
    predictions, states = [], []
    for lane, length in enumerate(case.lengths.tolist()):
        own, lane_predictions = state.select([lane]), []
        for t in range(length):
            observed = None if case.observed is None else case.observed[[lane], t]
            prediction, own = case.model.step(features.select([lane]).step(t), own, observed=observed)
            lane_predictions.append(prediction[0])
        padding = [torch.zeros(len(case.model.targets), dtype=case.model.label_deviation.dtype)] * (steps - length)
        predictions.append(torch.stack([*lane_predictions, *padding]))
        states.append(own)
    return torch.stack(predictions), SessionState.stack(states)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = FLOAT64) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_states_close(found: SessionState, expected: SessionState, tolerance: float = FLOAT64) -> None:
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(
            getattr(found, name), tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_states_equal(found: SessionState, expected: SessionState) -> None:
    for name, tensor in expected.tensors().items():
        assert torch.equal(getattr(found, name), tensor), name


def with_gradients(streams_or_state):
    """A copy whose floating-point tensors are leaves that collect gradients."""
    return streams_or_state.map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))


def gradients(case: Case, loss: Tensor, features: Streams, state: SessionState) -> dict[str, Tensor]:
    """Gradients of a loss for parameters, inputs and initial state; zeros where nothing depends on one."""
    leaves = dict(case.model.named_parameters())
    leaves |= {f"features.{name}": x for name, x in features.tensors().items()}
    leaves |= {f"state.{name}": x for name, x in state.tensors().items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def random_loss(prediction: Tensor, state: SessionState, lengths: Tensor) -> Tensor:
    """A loss that every prediction and every number of the final state takes part in."""
    generator = torch.Generator().manual_seed(5)
    loss = prediction.new_zeros(())
    for tensor in (prediction, *state.tensors().values()):
        if tensor.is_floating_point() and tensor.numel():
            loss = loss + (torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * tensor).sum()
    return loss


def outputs_and_gradients(scan, inputs):
    """What a scan gives, and the gradients of a random sum of it for all of its inputs, on any device."""
    outputs = scan(*inputs)
    torch.manual_seed(1)
    loss = sum((torch.randn(output.shape, dtype=output.dtype).to(output) * output).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]
