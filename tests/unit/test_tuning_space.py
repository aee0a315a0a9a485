"""Search spaces: the files that come along, what is drawn, and every mistake that a file can hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_trainings import write_space

from vaemo.config import Config
from vaemo.errors import ConfigValueError, UnknownConfigKeyError, UsageError
from vaemo.model.checks import used_streams
from vaemo.tuning.space import SCHEDULE, WHILE_TRAINING, field_of, read_space

SPACES = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.yaml"))

ENTRIES = {
    "model.updater": {"choice": ["mamba", "gru", "none"]},
    "updater.d_state": {"choice": [8, 16, 32], "when": {"model.updater": "mamba"}},
    "updater.layers": {"int": [1, 2], "when": {"model.updater": ["mamba", "gru"]}},
    "model.dropout": {"uniform": [0.0, 0.5]},
    "train.lr": {"loguniform": [1e-4, 1e-2]},
}


@pytest.fixture
def space(tmp_path):
    def make(entries=ENTRIES, *overrides):
        return read_space(write_space(tmp_path, entries), Config.load("default", overrides))

    return make


def points(space, n=200):
    return [space.draw(np.random.default_rng([3, number])) for number in range(n)]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_spaces_that_come_along(path):
    space = read_space(path, Config())
    assert len(space.parameters) >= 2
    for point in points(space, 50):
        assert space.holds(point)
        config = space.apply(point)
        assert all(field_of(config, name) == value for name, value in point.items())
    if path.stem == "default":
        wanted = {"model.alpha", "model.d_c", "train.window", *SCHEDULE - {"train.no_feedback_fraction"}}
        assert wanted == set(space.names)
    if path.stem == "schedule":
        assert set(space.names) <= WHILE_TRAINING
    assert space.searches_schedule == (path.stem in ("default", "schedule"))


def test_default_space_holds_the_default_config():
    space = read_space(next(path for path in SPACES if path.stem == "default"), Config())
    assert space.holds(space.default())
    assert space.apply(space.default()) == Config()


def test_points_keep_to_ranges_and_conditions(space):
    space = space()
    drawn = points(space)
    for point in drawn:
        assert ("updater.d_state" in point) == (point["model.updater"] == "mamba")
        assert ("updater.layers" in point) == (point["model.updater"] != "none")
        assert 0 <= point["model.dropout"] <= 0.5
        assert 1e-4 <= point["train.lr"] <= 1e-2
    # Half of a logarithmic range lies below its geometric middle.
    assert 0.35 < np.mean([point["train.lr"] < 1e-3 for point in drawn]) < 0.65
    assert {point.get("updater.layers") for point in drawn} == {None, 1, 2}


def test_a_point_outside_the_space(space):
    space = space()
    inside = points(space, 1)[0]
    assert space.holds(inside)
    assert not space.holds({**inside, "model.dropout": 0.6})
    assert not space.holds({name: value for name, value in inside.items() if name != "train.lr"})
    assert not space.holds({**inside, "model.updater": "mamba2"})


def test_grid_is_every_combination_once(space):
    entries = {name: ENTRIES[name] for name in ("model.updater", "updater.d_state", "updater.layers")}
    grid = list(space(entries).grid())
    # mamba: 3 x 2, gru: 2, none: 1.
    assert len(grid) == len({tuple(sorted(point.items())) for point in grid}) == 9
    assert all(space(entries).holds(point) for point in grid)


def test_a_choice_of_lists_is_itself_again_when_it_was_saved(space):
    norm = {"choice": [[], ["prosody"], ["speech", "prosody"]]}
    weight = {"uniform": [0.0, 8.0], "when": {"model.speaker_norm": [["prosody"], ["speech", "prosody"]]}}
    space = space({"model.speaker_norm": norm, "model.speaker_norm_weight": weight})
    assert space.holds(space.default())
    drawn = points(space, 60)
    for point in drawn:
        assert space.holds(json.loads(json.dumps(point)))
        assert ("model.speaker_norm_weight" in point) == bool(point["model.speaker_norm"])
        assert space.apply(point).model.speaker_norm == tuple(point["model.speaker_norm"])
    assert {len(point["model.speaker_norm"]) for point in drawn} == {0, 1, 2}


def test_a_grid_needs_choices(space):
    with pytest.raises(UsageError, match=r"a grid cannot go through model.dropout, which is uniform"):
        list(space().grid())


def test_perturbed_points_are_near_and_inside(space):
    space = space({"train.lr": ENTRIES["train.lr"], "train.mse_weight": {"choice": [0.0, 0.1, 0.2, 0.4]}})
    random = np.random.default_rng(0)
    start = {"train.lr": 2e-3, "train.mse_weight": 0.1}
    moved = [space.perturb(start, random) for _ in range(400)]
    assert all(space.holds(point) for point in moved)
    factors = np.array([point["train.lr"] / 2e-3 for point in moved])
    near = np.isclose(factors, 0.8) | np.isclose(factors, 1.2)
    # A quarter is drawn again; three deviations of 400 draws are 0.065.
    assert near.mean() == pytest.approx(0.75, abs=0.07)
    assert {point["train.mse_weight"] for point in moved} == {0.0, 0.1, 0.2, 0.4}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.alhpa", "model.alpha"),
        ("alpha", "model.alpha"),
        ("training.learning_rate", "train.lr"),
        ("learning_rate", "train.lr"),
        ("updater.alpha", "model.alpha"),
    ],
)
def test_unknown_fields_are_refused_with_the_nearest(space, name, hint):
    with pytest.raises(UnknownConfigKeyError, match=f"unknown config key '{name}'") as refusal:
        space({name: {"uniform": [0.1, 0.9]}})
    assert not hint or f"Did you mean {hint}?" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("model.alpha", {"uniform": [0.5, 1.5]}, r"model.alpha is 1.5; it must be at most 0.999"),
        ("model.updater", {"choice": ["mamba", "lstm"]}, r"model.updater is 'lstm'; allowed is one of mamba"),
        ("train.window", {"uniform": [10, 60]}, r"train.window is 10.0; allowed is a whole number"),
        ("train.window", {"int": [10.5, 60]}, r"int holds \[10.5, 60\]; it takes the least and the greatest"),
        ("model.alpha", {"uniform": [0.5]}, r"uniform holds \[0.5\]; it takes the least and the greatest"),
        ("model.alpha", {"uniform": ["low", "high"]}, r"it takes the least and the greatest value"),
        ("model.alpha", {"uniform": [False, True]}, r"it takes the least and the greatest value"),
        ("train.window", {"int": ["010", 60]}, r"int holds \['010', 60\]; it takes the least and the greatest"),
        ("model.alpha", {"uniform": [0.9, 0.5]}, r"uniform goes from 0.9 to 0.5; the first must be the smaller"),
        ("train.weight_decay", {"loguniform": [0, 5]}, r"loguniform starts at 0; it must start above 0"),
        ("model.alpha", {"normal": [0, 1]}, r"model.alpha has normal; give exactly one of choice, uniform"),
        ("model.alpha", {"uniform": [0, 0.5], "choice": [0.1]}, r"has uniform and choice; give exactly one of"),
        ("model.alpha", {}, r"model.alpha has none; give exactly one of"),
        ("model.alpha", {"choice": []}, r"choice holds \[\]; it takes a list"),
        ("model.alpha", 0.5, r"model.alpha holds 0.5; give one of choice: \[a, b\]"),
        (
            "model.targets",
            {"choice": [["valence"]]},
            r"model.targets cannot be searched: trials would be judged on other",
        ),
        ("train.epochs", {"int": [5, 50]}, r"train.epochs cannot be searched: it follows from the optimiser steps"),
        ("train.seed", {"int": [0, 5]}, r"train.seed cannot be searched: --seeds"),
        ("features.speech_layer", {"int": [1, 12]}, r"decides the data, which all trials share"),
        ("model.scan", {"choice": ["reference", "chunk"]}, r"model.scan changes no result"),
    ],
)
def test_impossible_entries(space, name, entry, says):
    with pytest.raises(ConfigValueError, match=says):
        space({name: entry})


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("mamba", "when holds 'mamba'; give fields and values"),
        ({"model.ema": "fixed"}, "when names 'model.ema'; it may name a choice listed before it: model.updater"),
        ({"model.updater": "mamba2"}, "when wants model.updater to be 'mamba2'; its choices are mamba, gru, none"),
    ],
)
def test_impossible_conditions(space, when, says):
    with pytest.raises(ConfigValueError, match=says):
        space({"model.updater": ENTRIES["model.updater"], "updater.d_state": {"choice": [8, 16], "when": when}})


def test_values_that_contradict_each_other(space):
    entries = {
        "train.sampling_hold_fraction": {"uniform": [0.0, 0.8]},
        "train.sampling_end_fraction": {"uniform": [0.1, 0.4]},
    }
    with pytest.raises(
        ConfigValueError,
        match=r"train.sampling_hold_fraction=0.8, train.sampling_end_fraction=0.4 do not go together: .* 1 at most",
    ):
        space(entries)


MAMBA2 = {"model.updater": {"choice": ["gru", "mamba2"]}}


@pytest.mark.parametrize(
    ("entries", "overrides", "says"),
    [
        (
            {**MAMBA2, "updater.headdim": {"choice": [32, 48]}},
            [],
            r"space.yaml': model.updater=mamba2, updater.headdim=48 do not go together: .* = 256. Choose a divisor",
        ),
        ({"updater.headdim": {"choice": [32, 48]}}, ["model.updater=mamba2"], "updater.headdim=48 do not go together"),
        ({"updater.d_model": {"int": [32, 34]}}, ["model.updater=mamba2"], "updater.d_model=33 do not go together"),
        (
            {
                "updater.expand": {"choice": [1, 3]},
                "updater.d_model": {"choice": [32, 64], "when": {"updater.expand": 1}},
                "updater.headdim": {"choice": [32, 64], "when": {"updater.expand": 1}},
            },
            ["model.updater=mamba2"],
            "updater.expand=1, updater.d_model=32, updater.headdim=64 do not go together",
        ),
        (
            {
                "train.sampling_hold_fraction": {"choice": [0.1, 0.8]},
                "train.sampling_end_fraction": {"uniform": [0.1, 0.4]},
            },
            [],
            "train.sampling_hold_fraction=0.8, train.sampling_end_fraction=0.4 do not go together",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(space, entries, overrides, says):
    with pytest.raises(ConfigValueError, match=says):
        space(entries, *overrides)


def test_values_that_never_meet_are_fine(space):
    space({"updater.headdim": {"choice": [32, 48]}})
    entries = {**MAMBA2, "updater.headdim": {"choice": [32, 48], "when": {"model.updater": "gru"}}}
    space(entries)
    entries = {
        "updater.d_model": {"choice": [96, 192]},
        "updater.headdim": {"choice": [32, 48]},
        "model.dropout": {"uniform": [0.0, 0.5]},
    }
    assert len(space(entries, "model.updater=mamba2", "updater.d_model=96").names) == 3


def test_what_a_store_leaves_is_asked_of_every_combination(space):
    around = space({"model.prosody": {"choice": [True, False]}, "model.film": {"choice": ["film", "concat"]}})

    def check(config):
        return used_streams(config.model, {"prosody": 3, "speaker": 2})

    with pytest.raises(
        ConfigValueError, match=r"model.prosody=False, model.film=film do not go together: nothing is le"
    ):
        around.check_together(("model.prosody", "model.film"), check)
    with pytest.raises(ConfigValueError, match=r"^nothing is left to predict from"):
        space({"model.alpha": {"choice": [0.1, 0.5]}}, "model.prosody=off").check_together(("model.prosody",), check)


def test_conditions_are_converted_as_choices_are(space):
    text = "model.film: {choice: [film, off]}\nupdater.carry: {choice: [yes, no]}\n"
    text += "model.film_hidden: {choice: [8, 16], when: {model.film: film, updater.carry: no}}\n"
    made = space(text)
    assert [parameter.values for parameter in made.parameters] == [("film", "off"), (True, False), (8, 16)]
    assert made.parameters[2].when == {"model.film": ("film",), "updater.carry": (False,)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no field"),
        ("- a\n- b", "names no field"),
        ("a: [", "is not YAML"),
        ("train.lr: {choice: [1]}\ntrain.lr: {choice: [2]}", "line 2: 'train.lr' occurs twice, first on line 1"),
        ("train.lr: {choice: [1], choice: [2]}", "line 1: 'choice' occurs twice"),
        ("\ntrain.window: {choice: [1:30, 20]}", r"space.yaml', line 2: train.window is '1:30'; allowed is a whole"),
        ("train.window: {int: [010, 20]}", r"line 1: train.window: int holds \['010', 20\]"),
    ],
)
def test_files_that_are_no_space(space, text, says):
    with pytest.raises(ConfigValueError, match=says):
        space(text)


def test_no_file(tmp_path):
    with pytest.raises(ConfigValueError, match=r"cannot be read \(FileNotFoundError\)"):
        read_space(tmp_path / "nowhere.yaml", Config())
