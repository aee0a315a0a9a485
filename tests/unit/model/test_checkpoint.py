import dataclasses
import errno
import itertools
import json
import os
import shutil

import pytest
import torch
import yaml
from model_cases import DIMS, LANES, STEPS, UPDATERS, make_case, make_features, make_model
from safetensors.torch import load_file, save_file

from vaemo.config import Config, FeatureConfig, ModelConfig
from vaemo.config.fields import younger
from vaemo.errors import OtherRunError, ReadCheckpointError, StorageError
from vaemo.model.checkpoint import CONFIG, METRICS_FILE, PROVENANCE_FILE, WEIGHTS, load_checkpoint, save_checkpoint
from vaemo.model.regressor import SessionRegressor


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "best", make_model(dtype=torch.float32), metrics={"dev_ccc_avg": 0.5})
    return tmp_path / "best"


@pytest.mark.parametrize("updater", UPDATERS)
def test_what_is_loaded_predicts_the_same(updater, tmp_path):
    case = make_case(updater, "scheduled", dtype=torch.float64)
    case.model.save_pretrained(tmp_path / "best", metrics={"a": 1}, provenance={"seed": 3})
    loaded = SessionRegressor.from_pretrained(tmp_path / "best")
    assert torch.equal(loaded(case.features, loaded.fresh_state(LANES), case.lengths)[0],
                       case.model(case.features, case.model.fresh_state(LANES), case.lengths)[0])  # fmt: skip
    assert loaded.fresh_state(1).fingerprint == loaded.fingerprint
    assert len(loaded.fingerprint) == 64


@pytest.mark.parametrize("dims", [DIMS, {"speech": 6}, {"prosody": 5, "speaker": 4}])
def test_dimensions_come_from_the_statistics(dims, tmp_path):
    model = make_model(dims=dims)
    model.save_pretrained(tmp_path / "best")
    loaded = SessionRegressor.from_pretrained(tmp_path / "best")
    assert (loaded.dims, loaded.film_kind) == (model.dims, model.film_kind)


def test_config_metrics_provenance_and_features_travel(tmp_path):
    config = Config.load("seed", ["train.seed=7", "features.speech=none"])
    model = make_model(dtype=torch.float32)
    fingerprint = save_checkpoint(
        tmp_path / "best", model, config, features=config.features, metrics={"x": 0.5}, provenance={"synthetic": True}
    )
    checkpoint = load_checkpoint(tmp_path / "best")
    assert checkpoint.fingerprint == checkpoint.model.fingerprint == fingerprint
    assert checkpoint.config == dataclasses.replace(config, model=model.config, updater=model.updater_config)
    assert checkpoint.features == config.features
    assert checkpoint.metrics == {"x": 0.5}
    assert checkpoint.provenance == {"synthetic": True, "fingerprint": fingerprint}
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == sorted(
        [WEIGHTS, CONFIG, METRICS_FILE, PROVENANCE_FILE]
    )


def test_a_checkpoint_of_before_has_none_of_the_younger_fields_and_is_the_same(tmp_path):
    folder = tmp_path / "before"
    save_checkpoint(folder, make_model(younger(ModelConfig), dtype=torch.float32))
    before = load_checkpoint(folder)
    sections = yaml.safe_load((folder / CONFIG).read_text())
    absent = younger(ModelConfig)
    assert {"speaker_norm", "session_norm", "speech_mlp"} <= absent.keys()
    sections["model"] = {name: value for name, value in sections["model"].items() if name not in absent}
    (folder / CONFIG).write_text(yaml.safe_dump(sections))
    loaded = load_checkpoint(folder)
    assert loaded.fingerprint == before.fingerprint
    assert (loaded.model.pasts, loaded.model.speech_mlp) == ((), "none")
    features, lengths = make_features(dtype=torch.float32), torch.full((LANES,), STEPS)
    predicted = [c.model(features, c.model.fresh_state(LANES), lengths)[0] for c in (before, loaded)]
    assert torch.equal(*predicted)


def test_without_features_the_checkpoint_says_so(folder):
    assert "features" not in yaml.safe_load((folder / CONFIG).read_text())
    assert load_checkpoint(folder).features is None


def test_the_fingerprint_covers_what_changes_predictions_and_nothing_else(tmp_path):
    model = make_model(dtype=torch.float32)

    def fingerprint(config=None, features=None):
        return save_checkpoint(tmp_path / "best", model, config, features=features)

    first = fingerprint()
    assert fingerprint(Config.load("default", ["train.epochs=3", "score.lanes=4"])) == first
    assert fingerprint(features=FeatureConfig()) != first
    assert fingerprint(features=FeatureConfig(speech="none")) != fingerprint(features=FeatureConfig())
    with torch.no_grad():
        model.head.valence.bias += 1e-6
    assert fingerprint() != first


def test_a_checkpoint_takes_the_place_of_an_older_one_and_leaves_nothing_behind(folder):
    other = make_model(seed=8, dtype=torch.float32)
    other.save_pretrained(folder)
    assert torch.equal(load_checkpoint(folder).model.head.hidden.weight, other.head.hidden.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_write_that_fails_leaves_the_older_one(folder, monkeypatch):
    before = load_checkpoint(folder).fingerprint

    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr("vaemo.files.write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        make_model(seed=8).save_pretrained(folder)
    assert load_checkpoint(folder).fingerprint == before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


@pytest.fixture
def fail_renaming(monkeypatch):
    """Makes `os.rename` fail at these calls, and gives it back."""
    with monkeypatch.context() as patched:

        def fail(*numbers):
            patched.setattr(os, "rename", failing(os.rename, *numbers))
            return patched.undo

        yield fail


def failing(rename, *numbers):
    calls = itertools.count(1)

    def renames(old, new):
        if next(calls) in numbers:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old))
        rename(old, new)

    return renames


@pytest.mark.parametrize("numbers", [(1,), (2,), (2, 3), (1, 2, 3)])
def test_a_renaming_that_fails_costs_no_checkpoint(folder, fail_renaming, numbers):
    before, other = load_checkpoint(folder).fingerprint, make_model(seed=8, dtype=torch.float32)
    mend = fail_renaming(*numbers)
    with pytest.raises(StorageError, match=r"storage failed.*Invalid cross-device link: '.*best"):
        other.save_pretrained(folder)
    assert load_checkpoint(folder).fingerprint == before
    assert folder.exists() == (numbers != (2, 3))
    mend()
    other.save_pretrained(folder)
    assert load_checkpoint(folder).fingerprint != before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_the_first_checkpoint_cannot_be_renamed(tmp_path, fail_renaming):
    fail_renaming(1)
    with pytest.raises(StorageError, match=r"storage failed.*Invalid cross-device link: '.*best"):
        make_model().save_pretrained(tmp_path / "best")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("renamings", [0, 1, 2])
def test_a_writer_that_is_killed_costs_no_checkpoint(folder, renamings):
    """Before the first renaming, between the two, and before what was replaced is deleted."""
    before, other = load_checkpoint(folder).fingerprint, make_model(seed=8, dtype=torch.float32)

    def die(*_, **__):
        os._exit(9)

    writer = os.fork()
    if not writer:
        rename, calls = os.rename, itertools.count()
        os.rename = lambda old, new: die() if next(calls) == renamings else rename(old, new)
        shutil.rmtree = die
        try:
            other.save_pretrained(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 9
    assert len(list(folder.parent.iterdir())) == 2
    assert folder.exists() == (renamings != 1)
    assert (load_checkpoint(folder).fingerprint == before) == (renamings < 2)
    save_checkpoint(folder, other)
    assert load_checkpoint(folder).fingerprint != before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_an_object_store_holds_one_too():
    model = make_model(dtype=torch.float32)
    fingerprint = save_checkpoint("memory://bucket/run/best", model)
    loaded = load_checkpoint("memory://bucket/run/best")
    assert loaded.fingerprint == fingerprint
    features, lengths = make_features(dtype=torch.float32), torch.full((LANES,), STEPS)
    state = loaded.model.fresh_state(LANES)
    assert loaded.model(features, state, lengths)[0].isfinite().all()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METRICS_FILE, PROVENANCE_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ReadCheckpointError, match=rf"not a whole checkpoint: {name} is not there\."):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (WEIGHTS, "x", "header too small"),
        (CONFIG, "model: {nonsense: 1}", "nonsense"),
        (CONFIG, "a: [b", "line 1"),
        (CONFIG, "7", "config.yaml holds 7, where names and values are needed"),
        (CONFIG, "", "config.yaml holds nothing"),
        (METRICS_FILE, "{", "metrics.json is not JSON"),
        (METRICS_FILE, "[]", r"metrics.json holds \[\], where"),
        (METRICS_FILE, '{"error_by_position": {"from": [1]}}', ""),
        (METRICS_FILE, b"\xff", ""),
        (PROVENANCE_FILE, "?", "provenance.json is not JSON"),
    ],
)
def test_a_damaged_file_is_an_error(folder, name, content, said):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReadCheckpointError, match=f"is damaged: .*{said}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("place", ["store", "store/part.parquet"])
def test_what_is_no_checkpoint_is_never_replaced_by_one(folder, tmp_path, place):
    part = tmp_path / "store" / "part.parquet"
    part.parent.mkdir()
    part.write_text("rows")
    model = load_checkpoint(folder).model
    with pytest.raises(OtherRunError, match=r"it is no checkpoint|is a file"):
        model.save_pretrained(tmp_path / place)
    assert part.read_text() == "rows"
    part.rename(tmp_path / "elsewhere")
    (tmp_path / "store" / "summary.json").write_text("{}")
    model.save_pretrained(tmp_path / "store")
    model.save_pretrained(tmp_path / "store")
    assert load_checkpoint(tmp_path / "store").model.targets == model.targets


def test_files_of_two_checkpoints_are_not_taken_for_one(folder, tmp_path):
    make_model(seed=8, dtype=torch.float32).save_pretrained(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(ReadCheckpointError, match="files of different checkpoints, or one was changed by hand"):
        load_checkpoint(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    from vaemo.model import checkpoint

    tensors = load_file(folder / WEIGHTS)
    tensors["head.hidden.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / WEIGHTS)
    config = Config.from_dict(yaml.safe_load((folder / CONFIG).read_text()))
    fingerprint = checkpoint.checkpoint_fingerprint((folder / WEIGHTS).read_bytes(), config, None)
    (folder / PROVENANCE_FILE).write_text(json.dumps({"fingerprint": fingerprint}))
    with pytest.raises(ReadCheckpointError, match=r"weights that do not fit its config: .*head\.hidden\.weight"):
        load_checkpoint(folder)


def test_a_checkpoint_that_does_not_exist_is_said_to_be_so(tmp_path):
    with pytest.raises(
        ReadCheckpointError, match=r"the checkpoint '.*nowhere' does not exist\. Give a folder such as RUN"
    ):
        load_checkpoint(tmp_path / "nowhere")
