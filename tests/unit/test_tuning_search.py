"""What is tried next: TPE finds what chance does not, goes on where it stopped, and respects conditions."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import yaml
from small_trainings import write_space

from vaemo.config import Config
from vaemo.tuning.search import METHODS, Search
from vaemo.tuning.space import read_space

ENTRIES = {
    "model.updater": {"choice": ["mamba", "gru"]},
    "updater.d_state": {"choice": [8, 16, 32, 64], "when": {"model.updater": "mamba"}},
    "model.alpha": {"uniform": [0.0, 0.99]},
    "train.lr": {"loguniform": [1e-4, 1e-1]},
    "train.window": {"int": [5, 80]},
}


@pytest.fixture
def space(tmp_path):
    return read_space(write_space(tmp_path, ENTRIES), Config())


def value_of(point):
    """A landscape whose best is known: mamba, alpha 0.7, lr 3e-3, d_state 32."""
    value = 1 - (point["model.alpha"] - 0.7) ** 2 - 0.1 * np.log10(point["train.lr"] / 3e-3) ** 2
    return value - (0.1 * abs(np.log2(point["updater.d_state"] / 32)) if "updater.d_state" in point else 0.3)


tpe = pytest.mark.skipif(not find_spec("optuna"), reason="the extra search is not installed")


def run(space, method, seed, trials):
    if method == "tpe":
        pytest.importorskip("optuna", reason="the extra search is not installed")
    search = Search(space, method, seed)
    found = []
    for number in range(trials):
        point = search.point(number)
        found.append(point)
        search.tell(number, point, value_of(point))
    return found


def test_tpe_beats_chance(space):
    best = {
        method: np.mean([max(map(value_of, run(space, method, seed, 40))) for seed in range(6)])
        for method in ("tpe", "random")
    }
    assert best["tpe"] > best["random"] + 0.005
    assert best["tpe"] > 0.97


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_points_lie_in_the_space_and_trial_0_is_the_config(space, method):
    found = run(space, method, 5, 25)
    assert found[0] == space.default()
    assert all(space.holds(point) for point in found)
    assert len({tuple(sorted(point.items())) for point in found}) == 25


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_search_goes_on_as_if_it_had_not_stopped(space, method):
    whole = run(space, method, 7, 24)
    again = Search(space, method, 7)
    for number, point in enumerate(whole[:16]):
        again.tell(number, point, value_of(point))
    for number in range(16, 24):
        assert again.point(number) == whole[number]
        again.tell(number, whole[number], value_of(whole[number]))


@tpe
def test_failed_and_stopped_trials_teach_where_not_to_look(space):
    def share_of_mamba(end):
        search = Search(space, "tpe", 1)
        random = np.random.default_rng(0)
        for number in range(30):
            point = space.draw(random)
            if point["model.updater"] == "mamba":
                end(search, number, point)
            else:
                search.tell(number, point, 0.5)
        return np.mean([search.point(number)["model.updater"] == "mamba" for number in range(30, 60)])

    def good(search, number, point):
        search.tell(number, point, 0.9)

    def stopped(search, number, point):
        search.tell(number, point, 0.1, stopped_at=40)

    assert share_of_mamba(stopped) < share_of_mamba(good) - 0.3


@tpe
def test_failed_trials_are_told_too(space):
    search = Search(space, "tpe", 1)
    for number in range(12):
        search.tell(number, search.point(number), None)
    assert space.holds(search.point(12))


@tpe
def test_a_config_outside_the_space_teaches_nothing(space):
    search = Search(space, "tpe", 0)
    search.tell(0, {"model.updater": "none"}, 0.9)
    assert space.holds(search.point(1))


@tpe
def test_a_choice_of_lists_is_told_as_it_was_saved(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model.speaker_norm": {"choice": [[], ["prosody"], ["speech"]]}, "train.lr": {"uniform": [0.1, 1]}}
        )
    )
    space = read_space(path, Config())
    search, again = Search(space, "tpe", 0), Search(space, "tpe", 0)
    for number in range(1, 12):
        point = search.point(number)
        value = float(point["model.speaker_norm"] == ["speech"])
        search.tell(number, point, value)
        again.tell(number, json.loads(json.dumps(point)), value)
    assert again.point(12) == search.point(12)


def test_grid(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"model.updater": {"choice": ["mamba", "gru"]}, "updater.layers": {"int": [1, 2]}}))
    search = Search(read_space(path, Config()), "grid", 0)
    assert search.trials == 4
    # The config itself is one of the four and comes first.
    found = [(point["model.updater"], point["updater.layers"]) for point in map(search.point, range(4))]
    assert found == [("mamba", 1), ("mamba", 2), ("gru", 1), ("gru", 2)]


def test_only_a_grid_ends(space):
    assert METHODS == ("tpe", "random", "grid")
    assert Search(space, "random", 0).trials is None


SMALL = {
    "model.updater": {"choice": ["mamba", "gru"]},
    "updater.layers": {"int": [1, 2], "when": {"model.updater": "gru"}},
}


def small_space(folder, entries=SMALL):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return read_space(path, Config())


@pytest.mark.parametrize("method", [pytest.param("tpe", marks=tpe), "random", "grid"])
def test_every_point_of_a_small_space_comes_once_and_then_no_more(tmp_path, method):
    space = small_space(tmp_path)
    search = Search(space, method, 0)
    found = []
    for number in range(3):
        found.append(search.point(number))
        search.tell(number, found[-1], 0.5)
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, space.grid()))
    assert search.point(3) is None
    again = Search(space, method, 0)
    again.tell(1, found[1], 0.5)
    again.take(found[2])
    assert again.point(3) is None, "what an earlier run has begun or ended is not drawn again"


@tpe
def test_a_point_that_is_drawn_again_makes_place_for_another(tmp_path):
    """Half of what is drawn has one value; the other half is endless."""
    entries = {
        "model.updater": {"choice": ["mamba", "gru"]},
        "train.lr": {"loguniform": [1e-4, 1e-2], "when": {"model.updater": "gru"}},
    }
    for method in ("tpe", "random"):
        search = Search(small_space(tmp_path, entries), method, 0)
        found = []
        for number in range(24):
            found.append(search.point(number))
            search.tell(number, found[-1], 0.5)
        assert len({json.dumps(point) for point in found}) == 24


def test_repeated_values_of_a_grid_count_once(tmp_path):
    search = Search(small_space(tmp_path, {"updater.layers": {"choice": [1, 2, 2, 1]}}), "grid", 0)
    assert search.trials == 2
    assert [search.point(number) for number in range(3)] == [{"updater.layers": 1}, {"updater.layers": 2}, None]
