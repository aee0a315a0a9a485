"""The ablation grid on a local Ray: the table, what is left to do, and cells that fail."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from processes import kill_job, start_job
from training_cases import ablate

from vaemo.ablation import grid
from vaemo.ablation.grid import Variant
from vaemo.config import Config
from vaemo.errors import DivergedError, LabelError, OtherRunError, UsageError
from vaemo.pipeline.executors import InProcess
from vaemo.testing import linear_world, write_store

pytestmark = pytest.mark.ray

OVERRIDES = [
    "model.scan=chunk",  # a second less in each process than loading the compiled one
    "model.d_c=8",
    "model.head_hidden=16",
    "updater.d_model=16",
    "train.epochs=4",
    "train.lr=1e-2",
    "train.lanes=8",
    "train.weight_averaging=0.9",
    "evaluate.bootstrap=200",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    world = linear_world(5, sessions=(60, 12, 24), lengths=(10, 30), features=8, noise=3.0)
    return write_store(world, str(tmp_path_factory.mktemp("store")))


ABLATIONS = {variant.name: variant for variant in grid.ABLATIONS}


@pytest.fixture
def small(monkeypatch):
    """One ablation and one baseline."""
    monkeypatch.setattr(grid, "ABLATIONS", [ABLATIONS["no-state"]])
    monkeypatch.setattr(grid, "BASELINES", grid.BASELINES[1:2])


def config(*overrides):
    return Config.load("default", [*OVERRIDES, *overrides])


def cells(out):
    return {path.name: path for path in Path(out, "cells").glob("*.parquet")}


def test_grid(store, small, local_ray, tmp_path, capsys):
    out = str(tmp_path / "grid")
    rows = ablate(store, out, config(), seeds=2)
    assert [row["variant"] for row in rows] == ["full", "no-state", "ridge"]
    assert [row["n_seeds"] for row in rows] == [2, 2, 1]
    full, stateless, _ = rows
    assert full["ccc_avg"] > 0.5
    assert stateless["difference_avg_high"] < 0
    assert pq.read_table(Path(out, "ablation.parquet")).to_pylist() == rows
    assert Path(out, "ablation.md").read_text() in capsys.readouterr().out
    assert Path(out, "ablation.tex").read_text().count(r"\\") == 4
    assert Path(out, "ablation.png").read_bytes().startswith(b"\x89PNG")
    trained = pq.read_table(Path(out, "cells.parquet")).to_pylist()
    assert {(row["variant"], row["seed"]) for row in trained} == {
        *((name, seed) for name in ("full", "no-state") for seed in (0, 1)), ("ridge", 0),
    }  # fmt: skip
    assert {row["status"] for row in trained} == {"ok"}

    # Only what is missing is done again, and it gives the same.
    Path(cells(out)["full-seed-1.parquet"]).unlink()
    before = {name: path.stat().st_mtime_ns for name, path in cells(out).items()}
    again = ablate(store, out, config("train.keep_checkpoints=5"), seeds=2)
    assert {name: cells(out)[name].stat().st_mtime_ns for name in before} == before
    assert [row["ccc_avg_seeds"] for row in again] == [row["ccc_avg_seeds"] for row in rows]
    assert "5 trainings, 1 of them to do" in capsys.readouterr().out

    with pytest.raises(OtherRunError, match=r"train.lr was 0.01, is now 0.02"):
        ablate(store, out, config("train.lr=2e-2"), seeds=2)


def failed(out):
    """By variant why its cells failed."""
    rows = pq.read_table(Path(out, "cells.parquet")).to_pylist()
    return {row["variant"]: row["reason"] for row in rows if row["status"] == "failed"}


def test_a_cell_that_fails_does_not_end_the_grid(store, small, tmp_path, capsys, monkeypatch):
    """One is refused, one is a bug."""

    def mistake(*_):
        raise RuntimeError("this cannot work")

    changes = {"model": {"norm_z": True}, "train": {"weight_decay": 1e300}}
    diverges = Variant("diverges", "a decay that no number outlives", changes)
    monkeypatch.setattr(grid, "ABLATIONS", [diverges])
    monkeypatch.setattr(grid, "BASELINES", [Variant("mistake", "is wrong", baseline=mistake)])
    out = str(tmp_path / "grid")
    rows = ablate(store, out, config(), InProcess(), seeds=1)
    assert {row["variant"]: row["n_seeds"] for row in rows} == {"full": 1, "diverges": 0, "mistake": 0}
    why = failed(out)
    assert "the loss is not a finite number" in why["diverges"]
    assert why["mistake"] == "RuntimeError: this cannot work"
    assert why.keys() == {"diverges", "mistake"}
    assert "in mistake" in Path(out, "cells", "mistake", "failure.txt").read_text(), "the traceback"
    assert "| a decay that no number outlives | failed |" in Path(out, "ablation.md").read_text()
    assert "warning: diverges-seed-0 failed: DivergedError: the loss is not a finite number" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_that_takes_its_process_down_does_not_end_the_grid(store, small, local_ray, tmp_path, monkeypatch):
    def crash(*_):
        os._exit(1)

    monkeypatch.setattr(grid, "ABLATIONS", [])
    monkeypatch.setattr(grid, "BASELINES", [Variant("crash", "crashes", baseline=crash)])
    out = str(tmp_path / "grid")
    rows = ablate(store, out, config(), seeds=1)
    assert {row["variant"]: row["n_seeds"] for row in rows} == {"full": 1, "crash": 0}
    assert failed(out).keys() == {"crash"}


def test_where_all_fail_the_first_error_ends_it(store, small, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "ABLATIONS", [])
    monkeypatch.setattr(grid, "BASELINES", [])
    diverges = config("train.weight_decay=1e300")
    with pytest.raises(DivergedError, match=r"the loss is not a finite number"):
        ablate(store, str(tmp_path / "grid"), diverges, InProcess(), seeds=2)
    assert not Path(tmp_path, "grid", "ablation.md").exists()


def test_folds_hold_out_everything(store, small, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "ABLATIONS", [])
    out = str(tmp_path / "grid")
    rows = ablate(store, out, config("train.epochs=1"), InProcess(), seeds=1, folds="k=2")
    assert set(cells(out)) == {f"{name}-fold-{fold}.parquet" for name in ("full-seed-0", "ridge") for fold in "01"}
    assert [(row["n_sessions"], row["n"]) for row in rows] == [(96, pq.read_table(store).num_rows)] * 2


@pytest.mark.parametrize(
    ("overrides", "folds", "message"),
    [
        (["train.encoder=all"], None, r"train.encoder is 'all'; the grid trains on the features of a store"),
        ([], "k=1", "--folds k=1: give by=fold"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(store, tmp_path, overrides, folds, message):
    with pytest.raises(UsageError, match=message):
        ablate(store, str(tmp_path / "grid"), config(*overrides), folds=folds)
    assert not Path(tmp_path, "grid").exists()


def test_a_store_without_test_sessions_is_refused(tmp_path):
    store = write_store(linear_world(5, sessions=(6, 3, 0), lengths=(4, 8), features=3), str(tmp_path / "store"))
    with pytest.raises(LabelError, match="nothing is held out to compare the models on"):
        ablate(store, str(tmp_path / "grid"), config())
    assert not Path(tmp_path, "grid").exists()


@pytest.mark.slow
def test_a_grid_that_was_killed_goes_on(store, tmp_path):
    out = str(tmp_path / "grid")
    command = ["ablate", "--store", store, "--out", out, "--seeds", "1"]
    kill_job(start_job(*command, overrides=OVERRIDES), due=lambda: len(cells(out)) >= 4)
    before = {name: path.stat().st_mtime_ns for name, path in cells(out).items()}
    assert 4 <= len(before) < 11
    assert not Path(out, "ablation.md").exists()

    again = start_job(*command, overrides=OVERRIDES)
    said, complained = again.communicate(timeout=240)
    assert again.returncode == 0, complained
    assert f"11 trainings, {11 - len(before)} of them to do" in said
    assert {name: cells(out)[name].stat().st_mtime_ns for name in before} == before
    rows = pq.read_table(Path(out, "ablation.parquet")).to_pylist()
    assert all(row["n_seeds"] == 1 for row in rows)
    assert json.loads(Path(out, "_ablation.json").read_text())["settings"]["folds"] is None
