"""What is not installed: defaults do without and say so once, what was asked for by name is refused with its extra."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vaemo import extras
from vaemo.config import Config
from vaemo.drawing import write_pictures
from vaemo.errors import ExtractorError, UsageError
from vaemo.features import load_extractors
from vaemo.training.trackers import Trackers, chosen
from vaemo.tuning.search import Search, default_method
from vaemo.tuning.space import read_space


@pytest.fixture
def bare(monkeypatch):
    """Nothing but the core is installed."""
    monkeypatch.setattr("vaemo.extras.metadata.version", absent)
    extras.offers.cache_clear()
    yield
    extras.offers.cache_clear()


def absent(package):
    raise extras.metadata.PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("prosody", "egemaps", r"needs opensmile: pip install 'vaemo\[opensmile\]', or choose praat or none"),
        ("prosody", "praat", r"needs praat-parselmouth: pip install 'vaemo\[praat\]'"),
        ("speech", "microsoft/wavlm-base", r"needs transformers: pip install 'vaemo\[encoders\]', or choose logmel"),
        ("speaker", "speechbrain/x", r"needs speechbrain: pip install 'vaemo\[encoders\]', or choose ltas"),
    ],
)
def test_an_extractor_without_its_package_is_refused(bare, field, name, message):
    config = Config().replace({"features": {"speech": "logmel", "prosody": "none", "speaker": "none", field: name}})
    with pytest.raises(ExtractorError, match=f"^features.{field} is '{name}', which {message}"):
        load_extractors(config.features)


def test_the_built_in_extractors_need_nothing(bare):
    config = Config().replace({"features": {"speech": "logmel", "prosody": "none", "speaker": "ltas"}})
    assert list(load_extractors(config.features)) == ["speech", "speaker"]


def test_pictures_are_left_out_with_one_line(bare, tmp_path, capsys):
    def draw():
        raise AssertionError("nothing can be drawn")

    assert write_pictures(str(tmp_path), {"a": draw, "b": draw}) == {}
    assert write_pictures(str(tmp_path), {"c": draw}) == {}
    assert capsys.readouterr().out == "no pictures: matplotlib is not installed (pip install 'vaemo[report]')\n"
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_left_out_as_a_default_and_refused_by_name(bare, tmp_path, capsys, monkeypatch):
    assert chosen(Config().train.trackers) == ()
    assert (
        capsys.readouterr().out
        == "no TensorBoard files: tensorboard is not installed (pip install 'vaemo[trackers]')\n"
    )
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert chosen(["tensorboard", "auto"]) == ("tensorboard",)
    with pytest.raises(UsageError, match=r"'tensorboard', which is not installed: pip install 'vaemo\[trackers\]'"):
        Trackers(["tensorboard"], str(tmp_path), "run", {})


def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("vaemo.extras.metadata.version", lambda package: "2.0")
    extras.offers.cache_clear()
    assert chosen(Config().train.trackers) == ("tensorboard",)
    assert chosen(["mlflow", "auto"]) == ("mlflow", "tensorboard")
    assert chosen([]) == ()


def test_points_are_drawn_at_random_unless_tpe_is_asked_for(bare, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text("train.lr: {loguniform: [1.0e-4, 1.0e-2]}\n")
    space = read_space(str(tmp_path / "space.yaml"), Config())
    assert default_method() == "random"
    assert "optuna is not installed (pip install 'vaemo[search]')" in capsys.readouterr().out
    Search(space, "random", 0).point(1)
    with pytest.raises(UsageError, match=r"--search tpe needs optuna: pip install 'vaemo\[search\]', or take"):
        Search(space, "tpe", 0)


def test_every_extra_named_in_a_message_is_one_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package, extra in extras.EXTRAS.items():
        # transformers brings it.
        if package != "huggingface-hub":
            assert package in {Requirement(line).name for line in project["optional-dependencies"][extra]}
