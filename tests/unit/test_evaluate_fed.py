"""Labels fed against running free, and how far into a session an utterance is."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from vaemo import scores
from vaemo.config import Config, ScoreConfig
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, UsageError
from vaemo.evaluation.evaluate import evaluate, table_of
from vaemo.evaluation.fed import replay_fed
from vaemo.evaluation.pairs import read_pairs
from vaemo.model.checkpoint import save_checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.testing import linear_world, write_store
from vaemo.training.replay import replay

SAME = 1e-5
"""float32, replayed in chunks of another length."""

FEATURES = 5
CONFIG = Config().replace({"evaluate": {"bootstrap": 100}})


@pytest.fixture(scope="module")
def world():
    return linear_world(6, sessions=(3, 2, 8), lengths=(5, 70), features=FEATURES, noise=1.0, unlabelled=0.1)


@pytest.fixture(scope="module")
def store(world, tmp_path_factory):
    return write_store(world, str(tmp_path_factory.mktemp("fed") / "store"))


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """Scores of the test sessions, in another order, one utterance of them missing; what they say plays no part."""
    folder = str(tmp_path_factory.mktemp("fed") / "scores")
    table = world.table.filter(pa.compute.equal(world.table["split"], "test")).slice(1)
    table = table.take(np.random.default_rng(0).permutation(len(table)))
    half = pa.array(np.full(len(table), 0.5, np.float32))
    for name in ("valence", "arousal"):
        table = table.set_column(table.column_names.index(name), name, half)
    scores.write_part(folder, "part-0.parquet", table.drop(["speech"]), ScoreConfig())
    return folder


def make_checkpoint(folder, features=FEATURES, **changes):
    config = Config().replace({"model": {"d_c": 4, "head_hidden": 8, **changes}, "updater": {"d_model": 8}})
    torch.manual_seed(1)
    model = SessionRegressor(config.model, config.updater, {"speech": features})
    with torch.no_grad():
        # Enough weight on what is fed that it shows.
        for parameter in model.parameters():
            parameter.mul_(2)
    save_checkpoint(folder, model, config)
    return str(folder), model


@pytest.mark.parametrize("changes", [{}, {"feedback": "model"}, {"label_range": [-1, 1]}])
def test_replays_are_those_of_the_trainer(world, store, scored, tmp_path, changes):
    path, model = make_checkpoint(tmp_path / "best", **changes)
    # The store does not say so itself.
    config = CONFIG.replace({"labels": {"range": [0, 1]}})
    pairs = read_pairs(scored, store, config)
    fed, free = replay_fed(pairs, store, path, config)
    packed = PackedSessions.of(world.sessions("test"))
    observed = 2 * packed.labels - 1 if "label_range" in changes else packed.labels
    utt_ids = [utt_id for session in world.sessions("test") for utt_id in session.utt_ids]
    rows = [utt_ids.index(utt_id) for utt_id in pairs.place["utt_id"].to_pylist()]
    for found, shown in ((fed, observed), (free, None)):
        expected = replay(model, packed, window=7, observed=shown).prediction[rows]
        if "label_range" in changes:
            expected = (expected + 1) / 2
        np.testing.assert_allclose(found.prediction, expected, atol=SAME)
        np.testing.assert_array_equal(found.label, pairs.label)
    assert np.abs(fed.prediction - free.prediction).max() > 100 * SAME


@pytest.mark.long
def test_evaluation_holds_both(store, scored, tmp_path):
    path, _ = make_checkpoint(tmp_path / "best")
    result = evaluate(scored, store, str(tmp_path / "out"), CONFIG, checkpoint=path)
    fed, free = replay_fed(read_pairs(scored, store, CONFIG), store, path, CONFIG)
    for name, pairs in (("first", fed), ("second", free)):
        known = ~np.isnan(pairs.label[:, 0])
        expected = np.abs(pairs.prediction - pairs.label)[known, 0].mean()
        assert result["label_fed"]["mae_valence"][name] == pytest.approx(expected)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert (tmp_path / "out" / "label_fed.png").read_bytes().startswith(b"\x89PNG")
    assert "with the labels of earlier utterances fed, less running free:" in table_of(result)


def test_a_model_without_feedback_is_refused(store, scored, tmp_path):
    path, _ = make_checkpoint(tmp_path / "best", feedback="none")
    with pytest.raises(UsageError, match=r"model\.feedback none: nothing is fed back"):
        evaluate(scored, store, str(tmp_path / "out"), CONFIG, checkpoint=path)


def test_features_of_another_width_are_refused(store, scored, tmp_path):
    path, _ = make_checkpoint(tmp_path / "best", features=FEATURES + 1)
    with pytest.raises(FeatureMismatchError, match="speech"):
        evaluate(scored, store, str(tmp_path / "out"), CONFIG, checkpoint=path)


def test_a_manifest_has_no_features(scored, tmp_path):
    path, _ = make_checkpoint(tmp_path / "best")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("{}")
    with pytest.raises(UsageError, match=r"--checkpoint needs features to replay, and .*m\.jsonl is a manifest"):
        evaluate(scored, str(manifest), str(tmp_path / "out"), CONFIG, checkpoint=path)


def test_time_in_session_counts_minutes_where_they_are_known(store, scored):
    pairs = read_pairs(scored, store, CONFIG)
    at, unit = pairs.time_in_session()
    assert unit == "minutes into the session"
    session, start_s = pairs.column("session_id"), pairs.column("start_s")
    for name in set(session):
        own = session == name
        np.testing.assert_allclose(at[own], (start_s[own] - start_s[own].min()) / 60)
    unknown = pairs.place.set_column(
        pairs.place.column_names.index("start_s"), "start_s", pa.nulls(len(pairs), pa.float64())
    )
    at, unit = dataclasses.replace(pairs, place=unknown).time_in_session()
    assert unit == "utterance of the session"
    np.testing.assert_array_equal(at, pairs.order_in_session + 1)
