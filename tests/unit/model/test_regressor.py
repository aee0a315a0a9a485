import dataclasses

import pytest
import torch
from model_cases import DIMS, LANES, STEPS, assert_close, make_case, make_features, make_model, make_observed

from vaemo.config import ModelConfig, UpdaterConfig
from vaemo.errors import FeatureMismatchError, NonFiniteFeatureError, ShapeError
from vaemo.model.chunk import Diagnostics
from vaemo.model.film import FilmDelta
from vaemo.model.regressor import SessionRegressor
from vaemo.model.streams import Streams


@pytest.fixture
def case():
    return make_case("mamba", "scheduled")


@pytest.mark.parametrize(
    ("dims", "config", "film", "used"),
    [
        (DIMS, {}, "film", ["speech", "prosody", "speaker"]),
        (DIMS, {"film": "concat"}, "concat", ["speech", "prosody", "speaker"]),
        (DIMS, {"film": "off"}, "off", ["speech", "prosody"]),
        (DIMS, {"prosody": False}, "film", ["speech", "speaker"]),
        ({"speech": 6}, {}, "off", ["speech"]),
        ({"prosody": 5}, {}, "off", ["prosody"]),
        ({"prosody": 5, "speaker": 4}, {}, "off", ["prosody"]),
        ({"prosody": 5, "speaker": 4}, {"film": "concat"}, "concat", ["prosody", "speaker"]),
        ({"speaker": 4}, {"film": "concat"}, "concat", ["speaker"]),
    ],
)
def test_what_needs_an_absent_stream_switches_itself_off(dims, config, film, used):
    model = make_model(config, dims=dims)
    assert (model.film_kind, list(model.dims)) == (film, used)
    prediction, _ = model(make_features(dims=dims), model.fresh_state(LANES), torch.full((LANES,), STEPS))
    assert 0 < prediction.min() < prediction.max() < 1
    assert make_model(config, dims=model.dims).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("dims", "config"), [({"speaker": 4}, {}), ({"prosody": 5}, {"prosody": False}), ({}, {})])
def test_nothing_left_to_predict_from(dims, config):
    with pytest.raises(FeatureMismatchError, match="nothing is left to predict from: the features have"):
        SessionRegressor(ModelConfig(**config), UpdaterConfig(), dims)


def test_streams_that_are_not_used_are_ignored():
    model = make_model({"film": "off", "prosody": False})
    features = make_features()
    state, lengths = model.fresh_state(LANES), torch.full((LANES,), STEPS)
    noisy = dataclasses.replace(features, speaker=features.speaker * torch.nan)
    assert torch.equal(model(noisy, state, lengths)[0], model(Streams(features.speech), state, lengths)[0])


def test_without_feedback_nothing_that_was_observed_matters():
    case = make_case("mamba", "none")
    observed = torch.rand(LANES, STEPS, 2, dtype=torch.float64)
    assert torch.equal(case.run(observed=observed)[0], case.run()[0])


def test_changes_of_film_find_their_utterances_beside_padding(case):
    film = case.model.film
    changes = {f"last.{name}": torch.randn(2, *x.shape, dtype=x.dtype) for name, x in film.last.named_parameters()}
    delta = FilmDelta(changes, torch.randint(-1, 2, (LANES, STEPS)))
    found, _ = case.run(film_delta=delta)
    with torch.no_grad():
        assert_close(case.run(film_delta=delta)[0], found)
    assert not torch.allclose(case.run()[0], found)
    for lane, length in enumerate(case.lengths.tolist()):
        alone, _ = case.model(
            case.features.select([lane]).steps(0, length),
            case.state.select([lane]),
            case.lengths[[lane]],
            observed=case.observed[[lane], :length],
            film_delta=FilmDelta(changes, delta.speaker[[lane], :length]),
        )
        assert_close(found[[lane], :length], alone)


def test_observed_values_act_from_the_next_step_on_across_the_border_of_a_chunk(case):
    lengths, T = torch.full((LANES,), STEPS), STEPS
    observed = torch.full((LANES, T, 2), torch.nan, dtype=torch.float64)
    plain, plain_state = case.run(lengths=lengths, observed=observed)
    observed[:, 4, 1] = 0.9
    changed, _ = case.run(lengths=lengths, observed=observed)
    assert torch.equal(changed[:, :5], plain[:, :5])
    assert (changed[:, 5] != plain[:, 5]).all()

    observed = torch.full_like(observed, torch.nan)
    observed[:, -1, 0] = 0.1
    last, state = case.run(lengths=lengths, observed=observed)
    assert torch.equal(last, plain)
    assert state.last_feedback.tolist() == [[0.1, row[1].item()] for row in plain[:, -1]]
    assert state.last_observed.tolist() == [[True, False]] * LANES
    assert (case.run(state=state)[0][0, 0] != case.run(state=plain_state)[0][0, 0]).all()


@pytest.mark.parametrize("solver", ["never", "always"])
def test_a_flag_tells_labels_from_predictions(solver):
    case = make_case("mamba-2-layers", "model", parallel_feedback=solver)
    lengths = torch.full((LANES,), STEPS)
    prediction, _ = case.run(lengths=lengths)
    told, _ = case.run(lengths=lengths, observed=prediction[..., : case.model.n_fed].detach())
    assert (told[:, 1:] != prediction[:, 1:]).any()
    with torch.no_grad():
        case.model.updater.input.weight[:, -2:] = 0
    prediction, _ = case.run(lengths=lengths)
    told, _ = case.run(lengths=lengths, observed=prediction[..., : case.model.n_fed].detach())
    assert_close(told, prediction)


@pytest.mark.parametrize("updater", ["mamba", "none"])
def test_dropout_masks_act_and_are_independent_of_who_draws_them(updater):
    case = make_case(updater, "scheduled", dropout=0.5)
    lanes = case.state.lanes
    masks = case.model.draw_dropout(lanes, STEPS, torch.Generator().manual_seed(3))
    again = case.model.draw_dropout(lanes, STEPS, torch.Generator().manual_seed(3))
    assert torch.equal(masks.head, again.head)
    assert masks.head.unique().tolist() == [0, 2]
    assert masks.updater.shape == (lanes, STEPS, case.model.config.d_c if updater == "mamba" else 0)
    dropped, _ = case.run(dropout=masks)
    assert not torch.equal(dropped, case.run()[0])
    part, _ = case.model(
        case.features.select([1]), case.state.select([1]), case.lengths[[1]],
        observed=case.observed[[1]], dropout=masks.select([1]).to(torch.float64),
    )  # fmt: skip
    assert_close(part[0], dropped[1])


def test_masks_of_one_change_nothing_and_none_are_drawn_without_dropout(case):
    masks = case.model.draw_dropout(LANES, STEPS)
    ones = dataclasses.replace(masks, updater=torch.ones_like(masks.updater), head=torch.ones_like(masks.head))
    assert torch.equal(case.run(dropout=ones)[0], case.run()[0])
    assert make_model({"dropout": 0.0}).draw_dropout(LANES, STEPS) is None


def test_t_may_be_0_and_all_lanes_idle(case):
    prediction, state = case.run(features=case.features.steps(0, 0), lengths=torch.zeros(LANES, dtype=torch.int64),
                                 observed=case.observed[:, :0])  # fmt: skip
    assert prediction.shape == (LANES, 0, 2)
    assert state is case.state
    prediction, state = case.run(lengths=torch.zeros(LANES, dtype=torch.int64))
    assert prediction.shape == (LANES, STEPS, 2)
    assert not prediction.any()
    assert state is case.state


@pytest.mark.parametrize("updater", ["mamba", "mamba-2-layers"])
def test_set_statistics_standardises_by_the_training_split(updater):
    case, shift = make_case(updater, "scheduled"), 3.0
    before, _ = case.run()
    moved = {name: (part.mean + shift, part.deviation) for name, part in case.model.standardize.items()}
    deviation = torch.tensor([0.125, 0.25, 0.5, 1.0, 2.0])[: len(case.model.targets)]
    case.model.set_statistics(moved, deviation)
    features = {name: x + shift for name, x in case.features.items()}
    # A past is a sum of as many numbers as it says.
    for name, past in case.features.past.items():
        total, count = past[..., :-1], past[..., -1:]
        features[name] = torch.cat([total + shift * count, count], -1)
    assert_close(case.run(features=Streams.of(features))[0], before)
    assert case.model.label_deviation.tolist() == deviation.tolist()


def test_set_statistics_refuses_what_does_not_fit(case):
    good = {name: (torch.zeros(dim), torch.ones(dim)) for name, dim in DIMS.items()}
    for bad, message in (
        ({**good, "prosody": (torch.zeros(7), torch.ones(7))}, r"'prosody' have shapes \(7,\) and \(7,\)"),
        ({**good, "speech": (torch.full((6,), torch.nan), torch.ones(6))}, "'speech' hold NaN or infinity"),
        ({name: good[name] for name in ("speech", "prosody")}, "'speaker' are missing"),
    ):
        with pytest.raises(FeatureMismatchError, match=message):
            case.model.set_statistics(bad, torch.ones(2))


def test_weight_decay_spares_biases_norms_and_the_scan():
    for updater in ("mamba", "mamba2", "gru"):
        model = make_model({"updater": updater, "ema": "learned", "norm_z": True})
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, spared = ([names[id(p)] for p in group["params"]] for group in model.parameter_groups(0.1))
        assert len(decayed) + len(spared) == len(names)
        assert all(name.endswith("weight") or "gru.weight" in name for name in decayed)
        assert not any("norm" in name for name in decayed)
        scan = [name for name in names.values() if name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias", "logits")]
        assert set(scan) <= set(spared)
    assert [group["weight_decay"] for group in model.parameter_groups(0.1)] == [0.1, 0.0]


def test_scan_used_for_provenance():
    assert make_model().scan_used("cpu") == "compiled"
    assert make_model({"updater": "mamba2"}).scan_used("cpu") == "chunk"
    assert make_model({"scan": "reference"}).scan_used(torch.device("cpu")) == "reference"
    assert make_model({"updater": "gru"}).scan_used("cpu") == "none"


@pytest.mark.parametrize(
    ("updater", "scan"),
    [("mamba", "reference"), ("mamba", "chunk"), ("mamba", "compiled"), ("mamba2", "reference"), ("mamba2", "chunk")],
)
def test_every_form_of_the_scan_gives_the_same(updater, scan):
    auto, other = make_case(updater, "none"), make_case(updater, "none", scan=scan)
    assert_close(other.run()[0], auto.run()[0])


def test_features_that_do_not_fit(case):
    x = case.features
    state = case.state
    for features, error, message in (
        (Streams(x.speech, x.prosody), FeatureMismatchError, r"needs the stream 'speaker' \(4 numbers\)"),
        (dataclasses.replace(x, speech=x.speech[:2]), ShapeError, r"'speech' has shape \(2, 11, 6\); with 3 lanes"),
        (dataclasses.replace(x, speech=x.speech[:, 0]), ShapeError, r"must be \(L, T, D\) with L = 3"),
        (dataclasses.replace(x, speech=x.speech[..., :5]), FeatureMismatchError, "has 5 numbers; .* made for 6"),
        (x.to(torch.float32), ShapeError, "'speech' is torch.float32; the model computes in torch.float64"),
        (dataclasses.replace(x, speech=x.speech[:, :5]), ShapeError, r"have \[5, 11\] steps; all must have the same T"),
    ):
        with pytest.raises(error, match=message):
            case.model(features, state, case.lengths)
    with pytest.raises(ShapeError, match=r"must be \(L, D\) with L = 3"):
        case.model.step(x, state)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 2]), r"torch.int64 of shape \(2,\); it takes one int64 per lane: \(3,\)"),
        (torch.tensor([1.0, 2.0, 3.0]), "lengths is torch.float32"),
        (torch.tensor([1, 2, STEPS + 1]), "runs from 1 to 12; the chunk has 11 steps"),
        (torch.tensor([-1, 2, 3]), "runs from -1 to 3"),
    ],
)
def test_lengths_that_do_not_fit(case, lengths, message):
    with pytest.raises(ShapeError, match=message):
        case.run(lengths=lengths)


def test_observed_values_that_do_not_fit(case):
    with pytest.raises(ShapeError, match=r"observed has shape \(3, 11\); here it must be \(3, 11, 2\)"):
        case.run(observed=case.observed[..., 0])
    infinite = case.observed.clone()
    infinite[1, 2, 0] = torch.inf
    with pytest.raises(NonFiniteFeatureError, match="observed of lane 1, step 2 holds"):
        case.run(observed=infinite)
    with pytest.raises(NonFiniteFeatureError, match="observed of lane 1, step 0 holds"):
        case.model.step(case.features.step(0), case.state, observed=infinite[:, 2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_refused_with_its_place(case, bad):
    prosody = case.features.prosody.clone()
    prosody[1, 3, 2] = bad
    features = dataclasses.replace(case.features, prosody=prosody)
    with pytest.raises(NonFiniteFeatureError, match="prosody of lane 1, step 3 holds NaN or infinity") as caught:
        case.run(features=features)
    assert (caught.value.stream, caught.value.lane, caught.value.step) == ("prosody", 1, 3)
    with pytest.raises(NonFiniteFeatureError, match="prosody of lane 1, step 0"):
        case.model.step(features.step(3), case.state)
    named = NonFiniteFeatureError("prosody", 1, 3, "c17/u042")
    assert "utterance 'c17/u042'" in str(named)


def test_diagnostics_say_how_a_chunk_was_computed():
    def solved(case, **kwargs):
        diagnostics = Diagnostics()
        case.run(diagnostics=diagnostics, **kwargs)
        return diagnostics

    full = torch.full((LANES,), STEPS)
    observed = make_observed("label")
    assert solved(make_case("mamba", "none")).solved_by == "known"
    assert solved(make_case("mamba", "label", parallel_feedback="always")).solved_by == "known"
    case = make_case("mamba", "model", parallel_feedback="always")
    assert solved(case, lengths=full, observed=observed).solved_by == "known"
    assert solved(case, lengths=full.clamp(max=1)).solved_by == "known"
    found = solved(case, lengths=full)
    assert found.solved_by in ("parallel", "fallback")
    assert found.n_passes > 1
    assert found.c.shape == (LANES, STEPS, case.model.config.d_c)
    assert solved(make_case("mamba", "model")).solved_by == "loop"
    with torch.no_grad():
        assert solved(case, observed=observed).solved_by == "loop"
    assert solved(make_case("none", "none")).c is None
