"""What a sweep leaves behind: its records, its table, which fields mattered, its pictures and its page."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from picture_cases import look, share_of
from small_trainings import write_space

from vaemo.config import Config
from vaemo.errors import SweepFailedError
from vaemo.model.checkpoint import load_checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.tuning import pictures
from vaemo.tuning.search import importance
from vaemo.tuning.space import read_space
from vaemo.tuning.sweep import Record, Sweep, table_of, trial_folder
from vaemo.tuning.trial import read_state, write_state
from vaemo.tuning.write import sweep_page, write_summary

ENTRIES = {
    "model.updater": {"choice": ["mamba", "gru"]},
    "updater.d_state": {"choice": [8, 16, 32, 64], "when": {"model.updater": "mamba"}},
    "model.alpha": {"uniform": [0.0, 0.99]},
    "train.lr": {"loguniform": [1e-4, 1e-1]},
    "model.dropout": {"uniform": [0.0, 0.5]},
    "model.speaker_norm": {"choice": [[], ["prosody"]]},
}


@pytest.fixture
def space(tmp_path):
    return read_space(write_space(tmp_path, ENTRIES), Config())


def record(space, number, value, point=None, status="done", error=None):
    point = point or space.draw(np.random.default_rng([1, number]))
    metrics = {"step": 100, "dev_ccc_avg": value, "dev_ccc_valence": value, "train_s": 2.5, "gap_ccc_avg": None}
    return Record(
        number=number,
        status=status,
        point=point,
        config=space.apply(point).to_dict(),
        metrics={} if error else metrics,
        curve=[] if error else [(50, value / 2), (100, value)],
        error=error,
    )


def simulated(space, n=60):
    """Trials in which only alpha and the updater matter, one stopped, one failed."""
    noise = np.random.default_rng(0)
    records = []
    for number in range(n):
        made = record(space, number, 0.0)
        gain = 0.1 * (made.point["model.updater"] == "mamba") - 2 * (made.point["model.alpha"] - 0.6) ** 2
        records.append(record(space, number, 0.7 + gain + 0.01 * noise.standard_normal(), made.point))
    records[3] = record(space, 3, 0.2, records[3].point, status="stopped")
    records[5] = record(space, 5, None, records[5].point, status="failed", error="DivergedError: <not> finite")
    return records


def shares_of(space, records):
    return importance(space, [(made.point, made.value) for made in records if made.status == "done"])


def keep_checkpoint(out, number):
    model = SessionRegressor.from_config(Config().model, Config().updater, {"speech": 3})
    model.save_pretrained(Path(trial_folder(str(out), number), "best"), metrics={"epoch": 3})


def test_records_come_back(space, tmp_path):
    sweep = Sweep(str(tmp_path))
    records = simulated(space, 8)
    for made in records:
        sweep.begin(made.number, made.point)
    for made in records[:6]:
        sweep.end(made)
    keep_checkpoint(tmp_path, 0)
    again = Sweep(str(tmp_path))
    assert again.records == {made.number: made for made in records[:6]}
    assert again.unfinished == {made.number: made.point for made in records[6:]}
    assert pq.read_table(tmp_path / "trials.parquet").equals(table_of(records[:6]))


def test_state_of_a_trial(tmp_path):
    folder = trial_folder(str(tmp_path), 4)
    assert read_state(folder) is None
    write_state(folder, b"held")
    assert read_state(folder) == b"held"


def test_table(space):
    records = simulated(space, 12)
    table = table_of(records[::-1])
    assert table["trial_id"].to_pylist() == [f"{number:04d}" for number in range(12)]
    assert table["status"].to_pylist()[3:6] == ["stopped", "done", "failed"]
    assert table["error"].to_pylist()[5] == "DivergedError: <not> finite"
    assert table["config.model.alpha"].to_pylist() == [made.point["model.alpha"] for made in records]
    assert table["config.updater.d_state"].to_pylist() == [made.point.get("updater.d_state") for made in records]
    assert table["config.train.epochs"].to_pylist() == [Config().train.epochs] * 12
    assert table["metric.dev_ccc_avg"].to_pylist()[5] is None
    assert str(table.schema.field("metric.gap_ccc_avg").type) == "double"


def test_choices_of_several_kinds_stand_as_json(space):
    points = [{"model.alpha_arousal": value} for value in (None, 0.5, 0.9)]
    records = [record(space, number, 0.5) for number in range(3)]
    mixed = [Record(**{**vars(made), "point": point}) for made, point in zip(records, points, strict=True)]
    assert table_of(mixed)["config.model.alpha_arousal"].to_pylist() == [None, 0.5, 0.9]
    mixed[0] = Record(**{**vars(mixed[0]), "point": {"model.alpha_arousal": "none"}})
    assert table_of(mixed)["config.model.alpha_arousal"].to_pylist() == ['"none"', "0.5", "0.9"]


def test_importance_finds_what_matters(space):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    shares = shares_of(space, simulated(space, 200))
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == "model.alpha"
    without_effect = ("train.lr", "model.dropout", "model.speaker_norm", "updater.d_state")
    assert max(shares[name] for name in without_effect) < shares["model.alpha"] / 3


def test_a_field_that_few_trials_search_counts_there(space):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    """All good trials are of mamba with its largest state: within them alone it decides."""
    records = [record(space, number, 0.5) for number in range(120)]
    values = [0.9 if made.point.get("updater.d_state") == 64 else 0.5 + made.number * 1e-4 for made in records]
    shares = shares_of(
        space, [record(space, made.number, v, made.point) for made, v in zip(records, values, strict=True)]
    )
    assert max(shares, key=shares.get) == "updater.d_state"


def test_importance_needs_trials(space):
    assert set(shares_of(space, simulated(space, 11)).values()) == {None}
    assert set(shares_of(space, []).values()) == {None}
    # Trial 0 may stand outside the space, and teaches nothing of it.
    outside = [record(space, 0, 0.9, {"model.updater": "none"}), *simulated(space, 30)]
    assert shares_of(space, outside) == shares_of(space, outside[1:])


def test_best_is_the_best_that_ran_to_its_end(space, tmp_path):
    sweep = Sweep(str(tmp_path))
    for made in (
        record(space, 0, 0.5),
        record(space, 1, 0.8),
        record(space, 2, 0.9, status="stopped"),
        record(space, 3, None, status="failed", error="broken"),
    ):
        sweep.end(made)
    keep_checkpoint(tmp_path, 1)
    assert sweep.keep_best() == sweep.records[1]
    assert Config.load(tmp_path / "best.yaml") == space.apply(sweep.records[1].point)
    kept = load_checkpoint(tmp_path / "best")
    assert kept.metrics == {"epoch": 3}
    assert kept.provenance["sweep"] == {"trial_id": "0001", "trials": 4}
    assert (tmp_path / "best" / "README.md").exists()


def test_a_ccc_of_zero_is_better_than_one_below(space, tmp_path):
    sweep = Sweep(str(tmp_path))
    for made in (record(space, 0, -0.3), record(space, 1, 0.0)):
        sweep.end(made)
    assert sweep.best == sweep.records[1]


def test_all_trials_failing_ends_with_the_first_error(space, tmp_path):
    sweep = Sweep(str(tmp_path))
    for number in (1, 0):
        sweep.end(record(space, number, None, status="failed", error=f"DivergedError: the loss of {number}"))
    with pytest.raises(SweepFailedError, match=r"none of 2 trials ran .* trial 0000: DivergedError: the loss of 0"):
        sweep.keep_best()


@pytest.mark.long
def test_pictures_show_every_kind_of_trial(space):
    records = simulated(space, 30)
    shares = shares_of(space, records)
    course = look(pictures.history(records))
    assert share_of(course, pictures.PLAIN) > 1e-3
    assert share_of(course, pictures.MARKED) > 1e-3
    assert share_of(course, "#000000") > 1e-5
    lines = look(pictures.parallel_coordinates(space, records))
    assert share_of(lines, "#fde725") > 1e-4  # the best line
    points = look(pictures.slices(space, records, shares))
    assert share_of(points, pictures.MARKED) > 1e-5


def test_pictures_of_a_single_trial(space):
    records = [record(space, 0, 0.5, space.default())]
    drawn = [
        pictures.history(records),
        pictures.parallel_coordinates(space, records),
        pictures.slices(space, records, shares_of(space, records)),
    ]
    assert all((look(png) < 0.9).any() for png in drawn)


def test_page_holds_everything_and_loads_nothing(space):
    records = simulated(space, 10)
    drawn = {"history": b"one", "slices": b"two"}
    page = sweep_page(space, records, records[0], shares_of(space, records), drawn).decode()
    for picture in drawn.values():
        assert base64.b64encode(picture).decode() in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "&lt;not&gt; finite" in page
    assert "<not>" not in page
    for made in records:
        assert f">{made.trial_id}<" in page
    assert all(name in page for name in space.names)


@pytest.mark.long
def test_summary(space, tmp_path):
    sweep = Sweep(str(tmp_path))
    for made in simulated(space, 9):
        sweep.end(made)
        keep_checkpoint(tmp_path, made.number)
    summary = write_summary(sweep, space)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["trials"], summary["done"], summary["stopped"], summary["failed"]) == (9, 7, 1, 1)
    assert summary["best"]["dev_ccc_avg"] == max(made.value for made in sweep.records.values() if made.status == "done")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "history.png",
        "parallel_coordinates.png",
        "slices.png",
    }
    assert (tmp_path / "index.html").stat().st_size > 50_000
