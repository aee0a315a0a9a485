"""Coverage and width of intervals over seeds and numbers of groups: the tables of docs/trust.md.

    pytest -m slow tests/perf/test_coverage.py -s

prints for each number of groups the mean coverage, its standard error, seeds outside of the Beta law, and the width as
a share of what the residuals of the predictor itself on new sessions ask for: of the best predictor of a linear world,
and of models that were trained for a few epochs on dialogue worlds, alone and as folds. Then what 100 labelled calls of
another archive give back. VAEMO_BENCH_SEEDS takes some of the seeds, such as 0:5.
"""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vaemo.config import Config
from vaemo.data.sessions import assemble_sessions
from vaemo.data.windows import PackedSessions
from vaemo.tables import with_column
from vaemo.testing import dialogue_world, kalman_predictions, linear_world
from vaemo.training.replay import replay
from vaemo.training.trainer import Trainer
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, OWN_CALLS, calibrate
from vaemo.trust.conformal import quantiles, spread
from vaemo.trust.novelty import BEYOND, Novelty, features_of
from vaemo.trust.own_calls import _corrected
from vaemo.trust.rows import call_rows, calls_of, groups_of, mean_of, utterance_rows
from vaemo.units import DIMENSIONS, LabelScale

FIRST_SEED, END_SEED = map(int, os.environ.get("VAEMO_BENCH_SEEDS", "0:20").split(":"))
SEEDS, NEW = range(FIRST_SEED, END_SEED), 200
UNIT = LabelScale(0, 1)
KINDS = ("utterances", "calls")

pytestmark = pytest.mark.slow


def with_scores(table, predictions):
    """The rows with scores, and their labels as `label_NAME`."""
    scored = table.select(["session_id", "speaker_id", "role", "start_s", "end_s", "split", "status"])
    for k, name in enumerate(DIMENSIONS):
        scored = scored.append_column(name, pa.array(predictions[:, k]))
        scored = scored.append_column(f"label_{name}", table[name].cast(pa.float64()))
    return scored


def scored_by_the_best(world, table=None):
    table = world.table if table is None else table
    return with_scores(table, np.concatenate(kalman_predictions(world, assemble_sessions(table))))


def measured(calibration, new):
    """Of utterances and of calls, for each dimension: the mean over groups of the share inside, the width, and the
    width that the residuals of these rows themselves ask for; (kinds, dimensions, 3)."""
    found = []
    for kind, make in zip(KINDS, (utterance_rows, call_rows), strict=True):
        rows, margins = make(new, DIMENSIONS), getattr(calibration, kind)
        found.append([])
        for name in DIMENSIONS:
            reach = margins[name].reach(0.9, rows.signs, len(rows.group))
            error = np.abs(rows.prediction[name] - rows.label[name])
            # Few groups give no interval for calls that are judged; such a one holds everything.
            inside = np.ones(len(error)) if reach is None else (error <= reach).astype(float)
            covered = np.bincount(rows.group, inside) / np.bincount(rows.group)
            width = np.nan if reach is None else 2 * reach.mean()
            found[-1].append((covered.mean(), width, 2 * quantiles(error, rows.group, np.array([0.9]))[0]))
    return np.array(found)


def summed_up(title, n_groups, found):
    """Print the figures over seeds; mean coverage, its standard error, share of seeds outside, share of the width."""
    found = np.array(found)
    coverage, width, best = np.moveaxis(found, -1, 0)
    error = coverage.std(axis=0, ddof=1) / np.sqrt(len(found))
    low, high = spread(n_groups, 0.9)
    # The new groups have a spread of their own.
    slack = 2 * np.sqrt(0.09 / NEW)
    outside = ((coverage < low - slack) | (coverage > high + slack)).mean(axis=0)
    share = np.nanmean(width, axis=0) / best.mean(axis=0)
    for k, kind in enumerate(KINDS):
        for d, name in enumerate(DIMENSIONS):
            print(
                f"{title}, {n_groups} groups, {kind}, {name}: {coverage.mean(axis=0)[k, d]:.4f} ± {error[k, d]:.4f}, "
                f"{100 * outside[k, d]:.0f} % of seeds outside, width {share[k, d]:.3f} of the best, single seeds "
                f"{' '.join(f'{value:.3f}' for value in coverage[:, k, d])}"
            )
    return coverage.mean(axis=0), error, outside, share


@pytest.mark.parametrize("n_groups", [12, 50, 200])
def test_intervals_of_the_best_predictor_cover(n_groups):
    found = []
    for seed in SEEDS:
        table = scored_by_the_best(linear_world(seed, sessions=(40, n_groups, NEW), lengths=(5, 30)))
        dev, calib, new = (table.filter(pc.equal(table["split"], name)) for name in ("train", "dev", "test"))
        found.append(measured(calibrate(calib, dev, ["f"], CALIB_SPLIT, UNIT), new))
    coverage, error, outside, share = summed_up("best predictor", n_groups, found)
    assert (coverage >= 0.9 - 2 * error).all()
    assert (outside <= 0.1).all()
    assert n_groups < 200 or (share <= 1.1).all()


def trained(sessions, dev, seed, epochs=6):
    config = Config().replace({"train": {"epochs": epochs, "seed": seed}})
    trainer = Trainer(sessions, dev, config, say=lambda text: None)
    for _ in trainer:
        pass
    return trainer.kept


def predicted(model, sessions):
    return replay(model, PackedSessions.of(sessions).with_past(model.pasts), window=30).prediction


def test_intervals_of_trained_models_cover():
    """A model for each seed of the dialogue world, calibrated on pairs of speakers; and three of folds together."""
    found = {n: [] for n in (12, 50, 200)}
    of_folds = []
    for seed in SEEDS:
        world = dialogue_world(seed, pairs=(6, 2, 200 + NEW), dialogs=(20, 10, 2))
        table, train, dev = world.table, world.sessions("train"), world.sessions("dev")
        model = trained(train, dev, seed)
        sessions = [*dev, *world.sessions("test")]
        rows = np.concatenate([session.rows for session in sessions])
        scored = with_scores(table.take(pa.array(rows)), predicted(model, sessions))
        dev_scored = scored.filter(pc.equal(scored["split"], "dev"))
        others = scored.filter(pc.equal(scored["split"], "test"))
        group = groups_of(others)
        new = others.filter(pa.array(group >= 200))
        for n_groups, each in found.items():
            calib = others.filter(pa.array(group < n_groups))
            each.append(measured(calibrate(calib, dev_scored, ["f"], CALIB_SPLIT, UNIT), new))
        of_folds.append(folds_of(world, seed))
    for n_groups, each in found.items():
        coverage, error, outside, share = summed_up("trained", n_groups, each)
        assert (coverage >= 0.9 - 2 * error).all()
        assert (outside <= 0.1).all()
        assert n_groups < 200 or (share <= 1.1).all()
    coverage, error, _, _ = summed_up("three folds of 36 pairs", 36, of_folds)
    assert (coverage >= 0.9 - 2 * error).all()


def folds_of(world, seed, n_pairs=36, k=3):
    """Models of folds of pairs of speakers, calibrated on what each did not see, on new pairs scored by all."""
    table = world.table
    table = table.filter(pc.equal(table["split"], "test"))
    sessions, group = assemble_sessions(table), groups_of(table)
    of_session = np.array([group[session.rows[0]] for session in sessions])
    fold = np.where(of_session < n_pairs, of_session % k, -1)
    pick = lambda keep: [session for session, kept in zip(sessions, keep, strict=True) if kept]  # noqa: E731
    dev = world.sessions("dev")
    models = [trained(pick((fold >= 0) & (fold != number)), dev, seed) for number in range(k)]
    held = []
    for number, model in enumerate(models):
        mine = pick(fold == number)
        rows = np.concatenate([session.rows for session in mine])
        held.append(with_scores(table.take(pa.array(rows)), predicted(model, mine)))
    new = pick(of_session >= 200)
    rows = np.concatenate([session.rows for session in new])
    mean = np.mean([predicted(model, new) for model in models], axis=0)
    calibration = calibrate(pa.concat_tables(held), None, ["f"], HELD_OUT, UNIT)
    return measured(calibration, with_scores(table.take(pa.array(rows)), mean))


def test_100_labelled_calls_of_another_archive_bring_coverage_back():
    """Calls that sound noisier and are labelled lower by others: before, and with 100 of them labelled."""
    before, after, novel, bias = [], [], [], []
    for seed in SEEDS:
        world = linear_world(seed, sessions=(300, 100, 100 + NEW), lengths=(5, 30))
        table = world.table
        other = np.array(table["split"].to_pylist()) == "test"
        random = np.random.default_rng(1000 + seed)
        x = np.stack(table["speech"].to_numpy())
        x += other[:, None] * world.noise * random.standard_normal(x.shape)
        column = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), x.shape[1])
        table = with_column(table, "speech", column)
        scored = scored_by_the_best(world, table)
        moved = scored["label_valence"].to_numpy() - 0.1 * other
        scored = with_column(scored, "label_valence", pa.array(np.clip(moved, 0, 1)))
        train, calib, archive = (scored.filter(pc.equal(scored["split"], name)) for name in ("train", "dev", "test"))
        group = groups_of(archive)
        mine, new = archive.filter(pa.array(group < 100)), archive.filter(pa.array(group >= 100))
        first = calibrate(calib, train, ["f"], CALIB_SPLIT, UNIT)
        before.append(measured(first, new))
        corrections, mine, _ = _corrected(mine, UNIT, 0.9, DIMENSIONS)
        own = calibrate(mine, None, ["f"], OWN_CALLS, UNIT, scales_of=first, correction=corrections)
        after.append(measured(own, own.corrected(new)))
        bias.append([bias_of(each) for each in (new, own.corrected(new))])
        novel.append(share_beyond(table))
    fallen, *_ = summed_up("another archive, calibrated at home", 100, before)
    coverage, error, outside, _ = summed_up("another archive, 100 calls labelled", 100, after)
    first, second = np.abs(bias).mean(axis=0)
    print(f"bias of valence {first:.3f} -> {second:.3f}; calls beyond 0.95 of novelty {np.mean(novel):.2f}")
    assert fallen[0, 0] < 0.85
    assert (coverage >= 0.9 - 2 * error).all()
    assert (outside <= 0.1).all()
    assert second < first / 3
    assert np.mean(novel) > 0.5


def bias_of(scored):
    return float(np.mean(scored["valence"].to_numpy() - scored["label_valence"].to_numpy()))


def share_beyond(table):
    """Of the calls of the archive, how many novelty calls unusual."""
    train, dev, new = (table.filter(pc.equal(table["split"], name)) for name in ("train", "dev", "test"))
    novelty = Novelty.of(features_of(train, ["speech"]), {})
    novelty = novelty.referred(novelty.unusual(features_of(dev, ["speech"]), {})[0], dev, from_dev=True)
    values = novelty.novelty(novelty.unusual(features_of(new, ["speech"]), {})[0])
    call = calls_of(new)
    return float((novelty.of_calls(mean_of(call, values, np.full(len(call), np.nan))) > BEYOND).mean())
