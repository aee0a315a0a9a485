"""A sweep on a local Ray: what it leaves, what a kill costs, what it refuses, and that it finds what is there."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from commands import run_job_here
from processes import ROOT, kill, kill_job, start_job, workers
from ray.tune.schedulers import TrialScheduler
from small_trainings import SMALL, write_small_store, write_space
from training_cases import train

from vaemo.cluster.tune import decided, make_scheduler, tune
from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.errors import (
    ClusterError,
    ConfigValueError,
    LabelError,
    OtherRunError,
    SweepFailedError,
    UsageError,
)
from vaemo.model.checkpoint import load_checkpoint
from vaemo.testing import ccc_avg, linear_world, write_store
from vaemo.training.data import SplitSessions
from vaemo.training.replay import replay
from vaemo.tuning.course import Course
from vaemo.tuning.search import Search
from vaemo.tuning.space import read_space
from vaemo.tuning.sweep import Record, Sweep
from vaemo.tuning.trial import METRIC, Trial, write_state

pytestmark = pytest.mark.ray

SAME_RUN = 1e-6
"""A run that is made again: the same operations on the same machine."""

SPACE = {"model.alpha": {"uniform": [0.3, 0.95]}, "train.window": {"choice": [5, 10, 20]}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_small_store(tmp_path_factory.mktemp("store"), (40, 8, 0), (10, 30), 6)


def config(*overrides):
    return Config.load("default", [*SMALL, "train.epochs=3", *overrides])


def results(out):
    return {path.parent.name: path.read_bytes() for path in Path(out, "trials").glob("*/result.json")}


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A sweep of four trials, two of which have other windows, and its summary."""
    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    folder = tmp_path_factory.mktemp("finished")
    out = str(folder / "sweep")
    return (
        out,
        tune(store, write_space(folder, SPACE), out, config(), trials=4, scheduler="none"),
        write_space(folder, SPACE),
    )


def test_sweep_folder(finished):
    out, summary, _ = finished
    table = pq.read_table(Path(out, "trials.parquet")).to_pandas().set_index("trial_id")
    assert list(table.index) == ["0000", "0001", "0002", "0003"]
    assert set(table["status"]) == {"done"}
    assert table.loc["0000", "config.model.alpha"] == 0.5
    assert table.loc["0000", "config.train.window"] == 30
    assert len(set(table["config.model.alpha"])) == 4
    best = table["metric.dev_ccc_avg"].idxmax()
    assert summary["best"]["trial_id"] == best
    assert table.loc[best, "metric.dev_ccc_avg"] == summary["best"]["dev_ccc_avg"]
    # To within half an epoch.
    steps = table["metric.step"]
    # An epoch may have a window more or less than the mean of them.
    per_epoch = steps / table["config.train.epochs"] + 1
    assert ((steps - steps["0000"]).abs() <= per_epoch / 2).all()
    assert set(summary["importance"]) == set(SPACE)
    assert {path.name for path in Path(out, "pictures").iterdir()} == {
        "history.png", "parallel_coordinates.png", "slices.png",
    }  # fmt: skip
    assert Path(out, "index.html").exists()
    assert not list(Path(out, "_ray").glob("sweep-*"))


@pytest.mark.slow
def test_best_config_trains_to_the_same_result(finished, store, local_ray, tmp_path):
    out, summary, _ = finished
    again = train(store, str(tmp_path / "run"), Config.load(Path(out, "best.yaml")))
    assert again["dev_ccc_avg"] == pytest.approx(summary["best"]["dev_ccc_avg"], abs=SAME_RUN)
    kept, retrained = load_checkpoint(Path(out, "best")), load_checkpoint(tmp_path / "run" / "best")
    assert kept.fingerprint == retrained.fingerprint
    assert kept.provenance["sweep"]["trial_id"] == summary["best"]["trial_id"]
    shared = kept.provenance.keys() - {"sweep"}
    assert {key: kept.provenance[key] for key in shared} == {key: retrained.provenance[key] for key in shared}


def test_finished_sweep_is_left_alone_and_may_grow(finished, store, local_ray):
    out, summary, space = finished
    before = results(out)
    assert tune(store, space, out, config(), trials=4, scheduler="none") == summary
    grown = tune(store, space, out, config(), trials=5, scheduler="none")
    assert grown["trials"] == 5
    after = results(out)
    assert {number: after[number] for number in before} == before


def test_another_sweep_is_refused(finished, store):
    out, _, space = finished
    with pytest.raises(OtherRunError, match=r"train.lr was 0.001, is now 0.002"):
        tune(store, space, out, config("train.lr=2e-3"), trials=4, scheduler="none")


def test_a_failing_trial_is_recorded_and_the_rest_goes_on(store, local_ray, tmp_path):
    # A decay that no number outlives: only training shows it.
    entries = {"train.weight_decay": {"choice": [0.0, 1e300]}, "updater.layers": {"int": [1, 2]}}
    summary = tune(
        store, write_space(tmp_path, entries), str(tmp_path / "sweep"), config(), search="grid", scheduler="none"
    )
    assert (summary["done"], summary["failed"]) == (3, 2)
    table = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    for row in table:
        assert (row["status"] == "failed") == (row["config.train.weight_decay"] == 1e300)
        assert (row["error"] or "").startswith("DivergedError: the loss is not") == (row["status"] == "failed")
        trace = tmp_path / "sweep" / "trials" / row["trial_id"] / "failure.txt"
        assert trace.exists() == (row["status"] == "failed")
        assert "Traceback" in (trace.read_text() if trace.exists() else "Traceback")


@pytest.mark.slow
def test_all_trials_failing_ends_with_the_first_error(store, local_ray, tmp_path):
    space = write_space(tmp_path, {"train.weight_decay": {"choice": [1e299, 1e300]}})
    with pytest.raises(
        SweepFailedError, match=r"2 failed; the first, trial 0000: DivergedError: the loss is not a finite number"
    ):
        tune(store, space, str(tmp_path / "sweep"), config("train.weight_decay=1e301"), trials=2)


def test_killed_and_run_again_loses_no_finished_trial(store, local_ray, tmp_path):
    """The driver is; the cluster lives on, as after `ray job submit`."""
    out, space = str(tmp_path / "sweep"), write_space(tmp_path, SPACE)
    args = ["--store", store, "--space", space, "--out", out, "--trials", "6", "--scheduler", "none"]

    def start():
        address = ray.get_runtime_context().gcs_address
        return start_job("tune", *args, overrides=[*SMALL, "train.epochs=8"], RAY_ADDRESS=address)

    kill_job(start(), due=lambda: len(results(out)) >= 2)
    before = results(out)
    begun = {path.parent.name: path.read_bytes() for path in Path(out, "trials").glob("*/trial.json")}
    assert 2 <= len(before) < 6, "the sweep ended before it could be killed"

    again = start()
    said, complained = again.communicate(timeout=240)
    assert again.returncode == 0, complained
    after = results(out)
    assert len(after) == 6
    assert {number: after[number] for number in before} == before
    # What was under way keeps its point.
    assert all(Path(out, "trials", number, "trial.json").read_bytes() == held for number, held in begun.items())
    assert f"6 trials, {len(before)} of them finished" in said
    assert "Trial status" not in said + complained, "Ray Tune's own tables"


@pytest.mark.slow
def test_trials_on_two_workers_equal_trials_on_one(store, local_ray, tmp_path):
    space = write_space(tmp_path, {"train.lr": {"choice": [1e-3, 3e-3]}})
    values = []
    for count in (1, 2):
        out = str(tmp_path / f"sweep{count}")
        tune(store, space, out, config(), search="grid", workers=count, scheduler="none")
        values.append([json.loads(held)["metrics"]["dev_ccc_avg"] for _, held in sorted(results(out).items())])
    # float32 sums in another order, over 3 epochs.
    assert values[1] == pytest.approx(values[0], abs=1e-4)


@pytest.mark.slow
def test_population_goes_on_from_its_best(store, local_ray, tmp_path, capsys):
    space = write_space(tmp_path, {"train.lr": {"loguniform": [1e-5, 1e-2]}})
    out = str(tmp_path / "sweep")
    summary = tune(store, space, out, config("train.epochs=10", "train.warmup_fraction=0"), trials=4, scheduler="pbt")
    assert summary["done"] == 4
    drawn = {
        path.parent.name: json.loads(path.read_text())["point"]["train.lr"]
        for path in Path(out, "trials").glob("*/trial.json")
    }
    ended = {number: json.loads(held)["point"]["train.lr"] for number, held in results(out).items()}
    assert drawn.keys() == ended.keys()
    assert drawn != ended, "no member took over from another"
    values = [json.loads(held)["metrics"]["dev_ccc_avg"] for held in results(out).values()]
    # Alone, a learning rate of 1e-5 or so ends near 0 and drags the mean down.
    assert min(values) > 0.3 * max(values)


@pytest.mark.parametrize(("feedback", "from_step"), [("observed", 25), ("scheduled", 80)])
def test_what_earlier_trials_reached_decides_after_a_restart(tmp_path, feedback, from_step):
    space = read_space(write_space(tmp_path, SPACE), config(f"model.feedback={feedback}"))
    sweep = Sweep(str(tmp_path / "sweep"))
    for number in range(1, 5):
        point = space.draw(np.random.default_rng(number))
        curve = [(step, 0.5 + 0.01 * number) for step in range(5, 101, 5)]
        metrics = {"step": 100, METRIC: curve[-1][1]}
        sweep.end(Record(number, "done", point, space.apply(point).to_dict(), metrics, curve))
    scheduler = make_scheduler("asha", space, Sweep(sweep.out), 100)

    def decide(number, step, value):
        trial = SimpleNamespace(trial_id=f"{number}-{step}-{value}", config={"job": SimpleNamespace(number=number)})
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"step": step, METRIC: value})

    assert decide(7, from_step - 1, 0.1) == TrialScheduler.CONTINUE
    assert decide(7, from_step, 0.1) == TrialScheduler.STOP
    assert decide(7, from_step, 0.9) == TrialScheduler.CONTINUE
    assert decide(0, from_step, 0.1) == TrialScheduler.CONTINUE, "trial 0 is what the others are compared with"


@pytest.mark.parametrize(
    ("scheduler", "name", "found"),
    [
        ("auto", "smoke", "asha"),
        ("auto", "default", "none"),
        ("asha", "default", "asha"),
        ("none", "smoke", "none"),
    ],
)
def test_nothing_is_ended_early_where_the_schedule_is_searched(scheduler, name, found):
    assert decided(scheduler, read_space(ROOT / "tune_spaces" / f"{name}.yaml", Config())) == found


def test_a_population_goes_on_where_it_was_saved(tmp_path):
    space = read_space(write_space(tmp_path, SPACE), config())
    sweep = Sweep(str(tmp_path / "sweep"))
    world = linear_world(5, sessions=(6, 2, 0), lengths=(4, 8), features=3)
    sessions = [*world.sessions("train"), *world.sessions("dev")]
    data = SplitSessions(PackedSessions.of(sessions), np.array([[session.split for session in sessions]], object))

    def jobs():
        return list(Course(sweep, Search(space, "random", 0), space, data, "", 2).jobs([0, 1]))

    drawn = [job.point for job in jobs()]
    assert drawn == [space.default(), Search(space, "random", 0).point(1)]
    moved = {"model.alpha": 0.5, "train.window": 5}
    write_state(sweep.folder(1), Trial(data, config(), 1).save(moved))
    again = jobs()
    assert [job.point for job in again] == [drawn[0], moved]
    assert (again[1].config.model.alpha, again[1].config.train.window) == (0.5, 5)


@pytest.mark.slow
def test_asha_ends_the_poor_and_spares_the_config(store, local_ray, tmp_path):
    space = write_space(tmp_path, {"train.lr": {"choice": [1e-6, 2e-6, 3e-3, 4e-3]}})
    out = str(tmp_path / "sweep")
    tune(store, space, out, config("train.lr=1e-7", "train.epochs=8"), search="grid")
    rows = pq.read_table(Path(out, "trials.parquet")).to_pylist()
    assert rows[0]["status"] == "done"
    stopped = [row["config.train.lr"] for row in rows if row["status"] == "stopped"]
    assert set(stopped) <= {1e-6, 2e-6, 3e-3}
    assert {row["status"] for row in rows if row["config.train.lr"] == 4e-3} == {"done"}
    assert all(row["metric.step"] >= rows[0]["metric.step"] / 4 for row in rows)


def kill_trials(times):
    """SIGKILL the process of a trial, each time it has come up again and trained a while."""
    for _ in range(times):
        found = []
        while not found:
            time.sleep(2)
            found = workers("ImplicitFunc")
        kill(found[-1])
        while found[-1].is_running() and found[-1].status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "ends"), [(1, "done"), (4, "failed")])
def test_a_trial_whose_process_dies(store, local_ray, tmp_path, times, ends):
    out = str(tmp_path / "sweep")
    killer = threading.Thread(target=kill_trials, args=(times,), daemon=True)
    killer.start()
    slow = config("train.epochs=400" if ends == "failed" else "train.epochs=60")
    if ends == "done":
        assert tune(store, write_space(tmp_path, SPACE), out, slow, trials=1)["done"] == 1
    else:
        with pytest.raises(SweepFailedError, match="trial 0000: its process died 4 times"):
            tune(store, write_space(tmp_path, SPACE), out, slow, trials=1)
    killer.join(timeout=60)
    assert not killer.is_alive()


@pytest.mark.slow
def test_folds_and_seeds(store, local_ray, tmp_path):
    out = str(tmp_path / "sweep")
    summary = tune(store, write_space(tmp_path, SPACE), out, config("train.epochs=1"), trials=1, folds="k=2", seeds=2)
    assert summary["best"]["runs"] == 4
    assert summary["best"]["dev_ccc_avg_sd"] > 0


@pytest.mark.parametrize(
    ("kwargs", "entries", "error", "says"),
    [
        ({"workers": 3}, SPACE, UsageError, "train.lanes may be 16, which 3 workers cannot share"),
        ({"workers": 4}, {"train.lanes": {"choice": [8, 6]}}, UsageError, "train.lanes may be 6, which 4 workers"),
        ({"scheduler": "pbt"}, SPACE, UsageError, "model.alpha cannot change then. It may search model.feedback"),
        ({"scheduler": "pbt", "search": "grid"}, SPACE, UsageError, "--search grid does not go with it"),
        ({"scheduler": "pbt", "workers": 2}, SPACE, UsageError, "leave out --workers 2, or take --scheduler asha"),
        ({}, {"model.alpha": {"uniform": [0.5, 2]}}, ConfigValueError, "model.alpha is 2.0; it must be at most"),
        ({"search": "grid"}, SPACE, UsageError, "a grid cannot go through model.alpha"),
        (
            {},
            {"model.updater": {"choice": ["gru", "mamba2"]}},
            ConfigValueError,
            "mamba2 do not go together: .*headdim is 32",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(store, tmp_path, kwargs, entries, error, says):
    with pytest.raises(error, match=says):
        tune(store, write_space(tmp_path, entries), str(tmp_path / "sweep"), config(), **kwargs)
    assert not (tmp_path / "sweep").exists()


def test_streams_that_some_trials_would_lack_are_found_before_anything_starts(tmp_path):
    world = linear_world(5, sessions=(6, 2, 2), lengths=(4, 8), features=3)
    table = world.table.rename_columns(["prosody" if name == "speech" else name for name in world.table.column_names])
    store = write_store(dataclasses.replace(world, table=table), str(tmp_path / "store"))
    space = write_space(tmp_path, {"model.prosody": {"choice": [True, False]}})
    with pytest.raises(ConfigValueError, match=r"model.prosody=False do not go together: nothing is left to predict"):
        tune(store, space, str(tmp_path / "sweep"), config())
    assert not (tmp_path / "sweep").exists()


def test_labels_are_looked_at_before_anything_starts(tmp_path):
    world = linear_world(5, sessions=(6, 2, 2), lengths=(4, 8), features=3, unlabelled=1.0)
    store = write_store(world, str(tmp_path / "store"))
    with pytest.raises(LabelError, match="no utterance of the split 'train' has a label for valence"):
        tune(store, write_space(tmp_path, SPACE), str(tmp_path / "sweep"), config())
    assert not (tmp_path / "sweep").exists()


def test_a_negative_share_of_a_gpu(store, local_ray, tmp_path):
    with pytest.raises(UsageError, match="--gpus -1: give a share of a GPU"):
        tune(store, write_space(tmp_path, SPACE), str(tmp_path / "sweep"), config(), gpus=-1)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"workers": 4}, "--workers 4 need 4 CPUs; the Ray cluster has 2"),
        ({"gpus": 0.5}, "--gpus 0.5 for each process, and the Ray cluster has 0 GPUs"),
    ],
)
def test_too_small_a_cluster(store, local_ray, tmp_path, kwargs, says):
    with pytest.raises(ClusterError, match=says):
        tune(store, write_space(tmp_path, SPACE), str(tmp_path / "sweep"), config(), **kwargs)


def test_a_mistake_is_one_line(store, tmp_path):
    space = write_space(tmp_path, {"model.alhpa": {"uniform": [0.5, 0.9]}})
    ended = run_job_here("tune", "--store", store, "--space", space, "--out", tmp_path / "sweep")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "unknown config key 'model.alhpa'. Did you mean model.alpha?" in line


STEADY = {"valence": 0.69, "arousal": 0.51}
"""Weight of the past in the Kalman filter of the small linear world (12 features at noise 3) once it has settled: AR
coefficient times 1 - gain."""
LOST_ON_TEST = 0.01
"""The best of 20 on few dev sessions: what is a tie may fall to either side on test."""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_default_space_on_a_world_whose_best_is_known(local_ray, tmp_path):
    world = linear_world(12, sessions=(60, 15, 40), lengths=(20, 60), features=12, noise=3.0)
    store = write_store(world, str(tmp_path / "store"))
    out = str(tmp_path / "sweep")
    base = Config.load("default", ["train.epochs=25"])
    summary = tune(store, str(ROOT / "tune_spaces" / "default.yaml"), out, base, trials=20)
    rows = pq.read_table(Path(out, "trials.parquet")).to_pylist()
    test = world.sessions("test")
    packed = PackedSessions.of(test)

    def on_test(number):
        model = load_checkpoint(Path(out, "trials", number, "best")).model
        return ccc_avg([replay(model, packed, window=30).prediction], test)

    best, default = on_test(summary["best"]["trial_id"]), on_test("0000")
    print(f"\nbest {summary['best']['point']}: test {best:.4f}, the config itself {default:.4f}")
    assert summary["best"]["dev_ccc_avg"] >= rows[0]["metric.dev_ccc_avg"]
    assert best > default - LOST_ON_TEST
    top = sorted(rows, key=lambda row: -row["metric.dev_ccc_avg"])[:5]
    alpha = np.median([row["config.model.alpha"] for row in top])
    assert STEADY["arousal"] - 0.15 < alpha < STEADY["valence"] + 0.15
    # The filter forgets within 3 steps, the latent within 20: gradients over more windows beat gradients over longer.
    assert np.median([row["config.train.window"] for row in top]) <= 30
