"""The table of the ablation: what its numbers are, what counts, and how it is written."""

import json

import numpy as np
import pyarrow as pa
import pytest
from picture_cases import look, share_of

from vaemo.ablation.grid import FULL, Cell, Variant
from vaemo.ablation.pictures import ablation
from vaemo.ablation.table import summarise, to_latex, to_markdown, to_parquet
from vaemo.config import EvaluateConfig
from vaemo.evaluation.bootstrap import Resampled, SessionSums, holm
from vaemo.metrics import ccc
from vaemo.units import DIMENSIONS

FLOAT32 = 1e-6
"""Predictions are kept in float32."""

CONFIG = EvaluateConfig(bootstrap=200)
WORSE, SAME = Variant("worse", "much worse", {"model": {"updater": "none"}}), Variant("same", "hardly other", {})
BASE = Variant("base", "a baseline", baseline=lambda *_: [])
VARIANTS = [FULL, WORSE, SAME, BASE]
NOISE = {"full": 0.5, "worse": 1.5, "same": 0.5, "base": 1.0}
SESSIONS, LENGTH = 20, 15


def make_result(variant, seed, fold, *, fed=True):
    """Half of the sessions in each of two folds; the labels are those of the fold, whatever the variant."""
    truth = np.random.default_rng([7, fold])
    latent = np.repeat(truth.standard_normal((SESSIONS, 2)), LENGTH, axis=0)
    label = latent + 0.3 * truth.standard_normal(latent.shape)
    own = np.random.default_rng([sum(map(ord, variant.name)), seed, fold])
    noise = NOISE[variant.name] * own.standard_normal(latent.shape)
    columns = {
        "session_id": [f"f{fold}-s{n}" for n in np.repeat(range(SESSIONS), LENGTH)],
        "utt_id": [f"f{fold}-u{n}" for n in range(len(latent))],
    }
    for prefix, values in (("", label + noise), ("fed_", label + noise / 2), ("label_", label)):
        for k, name in enumerate(DIMENSIONS):
            missing = prefix == "fed_" and not fed
            columns[f"{prefix}{name}"] = pa.array(
                [None] * len(values) if missing else values[:, k].astype(np.float32), pa.float32()
            )
    return pa.table(columns), {"variant": variant.name, "seed": seed, "seconds": 2.0}


@pytest.fixture(scope="module")
def results():
    found = {}
    for variant in VARIANTS:
        for seed in (0,) if variant.baseline else (0, 1, 2):
            for fold in (0, 1):
                found[Cell(variant, seed, str(fold))] = make_result(variant, seed, fold, fed=not variant.baseline)
    return found


@pytest.fixture(scope="module")
def rows(results):
    return summarise(results, VARIANTS, ["0", "1"], CONFIG)


def pooled(results, variant, seed, prefix=""):
    tables = [results[Cell(variant, seed, fold)][0] for fold in ("0", "1")]
    return [
        np.concatenate([np.stack([t[f"{p}{name}"].to_numpy() for name in DIMENSIONS], 1) for t in tables])
        for p in (prefix, "label_")
    ]


def test_means_and_spread_are_those_of_the_seeds(results, rows):
    for row, variant in zip(rows, VARIANTS, strict=True):
        seeds = (0,) if variant.baseline else (0, 1, 2)
        each = np.array([ccc(*pooled(results, variant, seed)) for seed in seeds])
        values = np.column_stack([each, each.mean(axis=1)])
        assert row["n_seeds"] == len(seeds)
        assert (row["n"], row["n_sessions"]) == (2 * SESSIONS * LENGTH, 2 * SESSIONS)
        assert row["seconds"] == 4.0
        for k, name in enumerate((*DIMENSIONS, "avg")):
            assert row[f"ccc_{name}_seeds"] == pytest.approx(values[:, k], abs=FLOAT32)
            assert row[f"ccc_{name}"] == pytest.approx(values[:, k].mean(), abs=FLOAT32)
            if len(seeds) > 1:
                assert row[f"ccc_{name}_sd"] == pytest.approx(values[:, k].std(ddof=1), abs=FLOAT32)
            else:
                assert row[f"ccc_{name}_sd"] is None


def test_intervals_and_differences_are_those_of_resampled_sessions(results, rows):
    session = np.repeat(range(2 * SESSIONS), LENGTH)
    resampled = {
        variant: Resampled.of([SessionSums.of(*pooled(results, variant, seed), session) for seed in range(3)], CONFIG)
        for variant in (FULL, WORSE)
    }
    low, high = resampled[WORSE].interval("ccc")
    difference = resampled[WORSE].less(resampled[FULL], "ccc")
    row = rows[1]
    assert (row["ccc_avg_low"], row["ccc_avg_high"]) == pytest.approx((low[2], high[2]), abs=FLOAT32)
    for k, name in enumerate((*DIMENSIONS, "avg")):
        found = [row[f"difference_{name}{suffix}"] for suffix in ("", "_low", "_high")]
        expected = [difference.estimate[k], difference.low[k], difference.high[k]]
        assert found == pytest.approx(expected, abs=FLOAT32)
        assert found[0] == pytest.approx(row[f"ccc_{name}"] - rows[0][f"ccc_{name}"], abs=FLOAT32)
    assert row["p"] == pytest.approx(difference.p[2])


def test_what_is_worse_is_told_from_what_is_not(rows):
    full, worse, same, base = rows
    assert worse["difference_avg_high"] < 0
    assert same["difference_avg_low"] < 0 < same["difference_avg_high"]
    assert full["p"] is full["p_holm"] is full["difference_avg"] is None
    assert [row["p_holm"] for row in rows[1:]] == holm([row["p"] for row in rows[1:]])
    assert worse["p_holm"] < 0.05 < same["p_holm"]
    assert base["fed_ccc_avg"] is None
    assert full["fed_ccc_avg"] > full["ccc_avg"]


def test_only_whole_seeds_count(results):
    some = {cell: found for cell, found in results.items() if cell != Cell(FULL, 1, "1")}
    some = {cell: found for cell, found in some.items() if cell.variant != WORSE}
    full, worse, same, base = summarise(some, VARIANTS, ["0", "1"], CONFIG)
    assert full["n_seeds"] == 2
    assert worse["n_seeds"] == 0
    assert worse["ccc_avg"] is worse["p"] is None
    # Only the comparisons that there are count.
    assert [same["p_holm"], base["p_holm"]] == holm([same["p"], base["p"]])


def test_without_the_full_model_nothing_is_compared(results):
    some = {cell: found for cell, found in results.items() if cell.variant != FULL}
    rows = summarise(some, VARIANTS, ["0", "1"], CONFIG)
    assert all(row["difference_avg"] is None for row in rows)
    assert rows[1]["ccc_avg"] is not None
    to_markdown(rows, [])
    ablation(rows)


def test_markdown(rows):
    text = to_markdown([*rows[:2], {**rows[2], "n_seeds": 0}], ["same-seed-0 failed: for a reason"])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    row = rows[1]
    expected = (
        f"{row['ccc_avg']:.3f} ± {row['ccc_avg_sd']:.3f} | [{row['ccc_avg_low']:.3f}, {row['ccc_avg_high']:.3f}] | "
        f"{row['within_ccc_avg']:.3f} | {row['fed_ccc_avg']:.3f} | {row['difference_avg']:+.3f}"
    )
    assert expected in lines[3]
    assert lines[4].startswith("| hardly other | failed | failed | failed | - |")
    assert "600 held-out utterances of 40 sessions" in text
    assert "mean and deviation over 3 seeds" in text
    assert text.endswith("same-seed-0 failed: for a reason\n")


def test_latex(rows):
    lines = to_latex(rows).splitlines()
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 1 + len(rows)
    assert len({line.count("&") for line in body}) == 1
    assert lines[1] == rf"\begin{{tabular}}{{l{'r' * body[0].count('&')}}}"
    assert "±" not in "".join(body)
    assert r"95 \% interval" in body[0]


def test_parquet_has_every_number(rows):
    table = to_parquet(rows)
    assert table.to_pylist() == json.loads(json.dumps(rows))
    assert table.schema.field("p_holm").type == pa.float64()
    assert to_parquet([{**row, "p": None} for row in rows]).schema == table.schema


def test_picture(rows):
    pixels = look(ablation(rows))
    assert pixels.shape[1] > 1300
    assert share_of(pixels, "#2a7f9e") > 1e-4
    assert share_of(pixels, "#d9662b") > 1e-4
    assert share_of(look(ablation([rows[0], rows[2]])), "#d9662b") == 0
