"""Targets by name, from labels to scores: one, two, three and five of them, of utterances and of whole sessions."""

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from training_cases import comparable, run_together

from vaemo import scores
from vaemo.config import Config, ModelConfig, ScoreConfig, TrainConfig, UpdaterConfig
from vaemo.data.lanes import schedule_lanes
from vaemo.data.manifest import read_manifest, write_manifest
from vaemo.data.sessions import assemble_sessions, lost_labels, read_sessions
from vaemo.data.windows import PackedSessions
from vaemo.errors import ConfigValueError, LabelError, UsageError
from vaemo.evaluation.evaluate import evaluate
from vaemo.metrics import spearman, spearman_interval
from vaemo.model.regressor import SessionRegressor
from vaemo.model.streams import Streams
from vaemo.scoring.table import score_table
from vaemo.store import FeatureStore, part_schema
from vaemo.stream import Stream
from vaemo.targets import Target
from vaemo.testing import linear_world
from vaemo.training.data import TrainingData
from vaemo.training.loss import SESSION_WEIGHT, LossWeights, window_loss, window_sums
from vaemo.training.trainer import Trainer, rater_weights, spread_labels_of_sessions

CSAT = Target("csat", "session")
SETS = {
    "one": ("valence",),
    "three": ("valence", "arousal", "dominance"),
    "five": ("effort", "arousal", "valence", "hidden", "dominance"),
    "session beside others": (CSAT, "valence", "arousal"),
    "session alone": (CSAT,),
}
SAMPLES = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
every_set = pytest.mark.parametrize("targets", SETS.values(), ids=SETS)


def config_of(targets, **train):
    settings = {"epochs": 2, "lanes": 4, "window": 6, "lr": 3e-3, "min_labelled": 8, "dtype": "float64"}
    return Config.load("seed").replace(
        {
            "model": {"d_c": 8, "head_hidden": 12, "feedback": "scheduled", "targets": targets},
            "updater": {"d_model": 8, "d_state": 4},
            "train": {**settings, **train},
        }
    )


def table_with(targets, seed=0, sessions=(8, 5, 4)):
    """Rows of a store with a label of each target, one in ten missing; that of a session in one row of it."""
    table, random = (
        linear_world(seed, sessions=sessions, lengths=(3, 14), features=5).table,
        np.random.default_rng(seed),
    )
    table = table.drop_columns(["valence", "arousal"])
    first = np.array([True, *(a != b for a, b in zip(table["session_id"][1:], table["session_id"], strict=False))])
    for target in targets:
        labels = random.uniform(0, 1, len(table))
        absent = random.random(len(table)) < 0.1 if isinstance(target, str) else ~first
        name = target if isinstance(target, str) else target.name
        table = table.append_column(name, pa.array(labels, pa.float32(), mask=absent))
    return table


def splits_of(targets):
    sessions = assemble_sessions(table_with(targets), targets=targets)
    return [[session for session in sessions if session.split == split] for split in ("train", "dev")]


# -- training and scoring --------------------------------------------------------------------------------------------


@every_set
def test_workers_equal_one_for_any_targets(targets):
    workers_equal_one(2, targets, config_of(targets))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("updater", ["mamba", "mamba2", "gru", "none"])
@pytest.mark.parametrize("feedback", ["none", "observed", "label", "model"])
@pytest.mark.parametrize("targets", [("valence", "arousal"), *SETS.values()], ids=["two", *SETS])
def test_workers_equal_one_for_any_targets_updater_and_feedback(targets, feedback, updater, workers):
    config = config_of(targets).replace(
        {"model": {"feedback": feedback, "updater": updater}, "updater": {"headdim": 8}}
    )
    workers_equal_one(workers, targets, config)


def workers_equal_one(workers, targets, config):
    (alone,) = run_together(1, config, *splits_of(targets), epochs=1)
    for trainer in run_together(workers, config, *splits_of(targets), epochs=1):
        assert comparable(trainer.history)[0] == pytest.approx(comparable(alone.history)[0], abs=1e-9)
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(trainer.tensors()[name], tensor, atol=1e-9, rtol=0)
    names = config.model.names
    line = alone.history[0]
    assert line["dev_ccc_avg"] == pytest.approx(np.mean([line[f"dev_ccc_{name}"] for name in names]))
    assert all(f"{name} " in alone.line() for name in names)


@every_set
def test_a_table_is_scored_as_its_utterances_are_pushed(tmp_path, targets):
    model = Trainer(*splits_of(targets), config_of(targets)).model.eval()
    table = table_with(targets)
    scored = score_table(table, [model, model], lanes=4, chunk=8)
    sd = scored.select(scores.spread_names(targets))
    assert all(np.nanmax(column.to_numpy(zero_copy_only=False)) == 0 for column in sd.columns)
    session = next(each for each in assemble_sessions(table, targets=targets) if len(each) > 4)
    stream = Stream(model, {"speech": Given(session.streams["speech"])})
    pushed = [stream.push(SAMPLES, 16000) for _ in range(len(session))]
    rows = scored.take(pa.array(session.rows)).to_pylist()
    for place, (row, prediction) in enumerate(zip(rows, pushed, strict=True)):
        assert prediction.valence == prediction.values.get("valence")
        for name in model.targets:
            last = place == len(rows) - 1
            if name == "csat" and not last:
                assert row[name] is None
            else:
                assert row[name] == pytest.approx(prediction.values[name], abs=1e-6)
    scores.write_part(str(tmp_path), "part-0.parquet", scored, ScoreConfig(), targets=targets)
    (of_session,) = (
        row
        for row in scores.summarise_sessions(scored, ScoreConfig(), targets=targets).to_pylist()
        if row["session_id"] == session.session_id
    )
    for name in model.targets:
        if name == "csat":
            assert of_session[name] == pytest.approx(rows[-1][name])
        else:
            assert of_session[f"{name}_min"] == pytest.approx(min(row[name] for row in rows))


class Given:
    """An extractor that gives the next of some vectors, whatever it hears."""

    name, version, stream, fingerprint = "given", "1", "speech", "0"

    def __init__(self, vectors):
        self.dim, self._left = vectors.shape[1], list(vectors)

    def __call__(self, utterances):
        return np.stack([self._left.pop(0) for _ in utterances])


def test_observed_values_are_given_by_name_or_in_order():
    model = Trainer(*splits_of(SETS["three"]), config_of(SETS["three"])).model.eval()

    def second(observed):
        stream = Stream(model, {"speech": Given(np.ones((2, 5), np.float32))})
        stream.push(SAMPLES, 16000, observed=observed)
        return stream.push(SAMPLES, 16000).values

    assert second({"dominance": 0.9}) == second([None, None, 0.9]) != second(None)
    with pytest.raises(UsageError, match="observed has a value for 'csat'; it may have some for valence, arousal, dom"):
        second({"csat": 1.0})
    with pytest.raises(UsageError, match="observed has 2 values; the model takes valence, arousal, dominance"):
        second([0.1, 0.2])


# -- sessions --------------------------------------------------------------------------------------------------------


def session_rows(**columns):
    n = len(next(iter(columns.values())))
    rows = {"session_id": list("aaabb"), "utt_id": [f"u{row}" for row in range(n)], "position": [0, 1, 2, 0, 1]}
    return pa.table(rows | {"speech": [[1.0, 2.0]] * n} | columns)


@pytest.mark.parametrize("place", [0, 1, 2, "all"])
def test_a_label_of_the_session_counts_once_at_its_last_usable_row(place):
    labels = [0.7 if place in (row, "all") else None for row in range(3)] + [None, 0.2]
    table = session_rows(csat=labels, status=["ok", "ok", "silent", "ok", "ok"])
    first, second = assemble_sessions(table, targets=(CSAT, "valence"))
    np.testing.assert_allclose(first.labels, [[np.nan, np.nan], [np.nan, 0.7]])
    np.testing.assert_allclose(second.labels[:, 1], [np.nan, 0.2], rtol=1e-6)
    by_speaker = assemble_sessions(
        table.append_column("speaker_id", [["x", "y", "x", "x", "x"]]), sequence_by="speaker", targets=(CSAT,)
    )
    assert sum(int((~np.isnan(session.labels)).sum()) for session in by_speaker) == 2
    assert lost_labels(table, (CSAT,)) == {}


def test_two_labels_of_one_session_are_refused_and_lost_ones_counted():
    with pytest.raises(LabelError, match=r"csat of session 'a' is 0\.1 and 0\.7 in two of its rows"):
        assemble_sessions(session_rows(csat=[0.1, None, 0.7, None, None]), targets=(CSAT,))
    lost = session_rows(csat=[0.1, None, None, 0.5, None], status=["silent"] * 3 + ["ok"] * 2)
    assert lost_labels(lost, (CSAT,)) == {"csat": 1}


def test_windows_of_sessions_that_are_read_at_their_end_are_whole_there():
    lengths = np.array([1, 6, 7, 13, 20, 20, 31])
    plain, whole = (schedule_lanes(lengths, 3, 6, seed=0, whole_at_end=value) for value in (False, True))
    for session, length in enumerate(lengths):
        steps = [
            (int(start), int(start + n))
            for start, n in zip(
                whole.start[whole.session == session], whole.lengths[whole.session == session], strict=True
            )
        ]
        assert steps[0][0] == 0
        assert steps[-1][1] == length
        assert all(before[1] == after[0] for before, after in itertools.pairwise(steps))
        assert steps[-1][1] - steps[-1][0] == min(length, 6)
    assert whole.lengths.sum() == plain.lengths.sum() == lengths.sum()


# -- loss ------------------------------------------------------------------------------------------------------------


def test_a_label_of_a_session_is_learned_from_all_its_steps_and_counts_once():
    train, _ = splits_of(("valence", CSAT))
    packed = PackedSessions.of(train)
    spread = spread_labels_of_sessions(packed, 1)
    assert spread_labels_of_sessions(packed, 0) is packed
    torch.testing.assert_close(spread.labels[:, 0], packed.labels[:, 0], equal_nan=True)
    assert (spread.weights[:, 0] == 1).all()
    for start, length in zip(packed.offsets, packed.lengths, strict=True):
        rows = slice(start, start + length)
        (label,) = {float(each) for each in packed.labels[rows, 1] if not each.isnan()}
        assert spread.labels[rows, 1].tolist() == [label] * length
        assert float(spread.weights[rows, 1].sum()) == pytest.approx(1)
        assert spread.weights[rows, 1].tolist() == pytest.approx([1 / length] * length)
    raters = dataclasses.replace(packed, weights=torch.full_like(packed.labels, 3.0))
    assert float(spread_labels_of_sessions(raters, 1).weights[:, 1].sum()) == pytest.approx(3 * len(train), rel=1e-5)


def test_weights_of_targets_and_the_loss_of_a_session():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 10, 3, generator=random) for _ in range(2))
    y[:, :-1, 2] = torch.nan
    y[0, :, 2] = torch.nan
    train = TrainConfig(target_weights={"valence": 3.0, "csat": 0.5}, lanes=4, min_labelled=8)
    weights = LossWeights.of(ModelConfig(targets=("valence", "arousal", CSAT)), train, torch.tensor([0.2, 0.3, 0.25]))
    error = ((x - y) ** 2).double()

    def one_less_ccc(k):
        a, b = x[..., k].double().flatten(), y[..., k].double().flatten()
        covariance = ((a - a.mean()) * (b - b.mean())).mean()
        return 1 - 2 * covariance / (a.var(correction=0) + b.var(correction=0) + (a.mean() - b.mean()) ** 2)

    expected = 0.75 * one_less_ccc(0) + 0.25 * one_less_ccc(1)
    expected += train.mse_weight * (3 * error[..., 0].mean() + error[..., 1].mean())
    expected += SESSION_WEIGHT * 0.5 * error[1:, -1, 2].sum() / (2 * 0.25**2) / 4
    assert float(window_loss(window_sums(x, y, 0.5), 40, train, weights)) == pytest.approx(float(expected), abs=1e-6)
    # A session weighs the same, however many steps the window has.
    longer = [torch.cat([torch.full((4, 30, 3), torch.nan), each], 1) for each in (torch.nan_to_num(x), y)]
    alone = [torch.where(torch.arange(3) == 2, each, torch.nan) for each in (y, longer[1])]
    short = window_loss(window_sums(x, alone[0], 0.5), 40, train, weights)
    long = window_loss(window_sums(longer[0].nan_to_num(), alone[1], 0.5), 160, train, weights)
    assert float(short) == pytest.approx(float(long))


def test_labels_count_by_what_their_raters_leave_open():
    table = table_with(("valence",))
    n = len(table)
    spread = np.resize([0.05, 0.4, 0.4, np.nan], n)
    raters = np.resize([4.0, 4.0, 16.0, 1.0], n)
    table = table.append_column("valence_rater_sd", pa.array(spread, pa.float32(), from_pandas=True))
    table = table.append_column("valence_raters", pa.array(raters, pa.float32()))
    packed = PackedSessions.of(assemble_sessions(table, targets=("valence",)))
    config = config_of(("valence",), label_weight="raters", label_weight_floor=0.5)
    weight = rater_weights(packed, torch.tensor([0.2]), config)[:, 0]
    labelled = ~packed.labels[:, 0].isnan()
    error = np.array([0.1, 0.2, 0.1, np.nan])[np.arange(n) % 4]
    known = labelled & torch.from_numpy(~np.isnan(error))
    ratio = torch.from_numpy(np.maximum(error, 0.5 * 0.2) ** -2).float()
    torch.testing.assert_close(weight[known], (ratio / ratio[known].mean())[known])
    assert (weight[~known] == 1).all()
    history = list(Trainer(packed, packed, config))
    assert history[0]["train_loss"] != next(iter(Trainer(packed, packed, config_of(("valence",)))))["train_loss"]
    wrong = dataclasses.replace(packed, label_error=-packed.label_error)
    with pytest.raises(
        LabelError, match=r"training labels have a negative deviation of their raters \(valence_rater_sd"
    ):
        rater_weights(wrong, torch.tensor([0.2]), config)
    bare = dataclasses.replace(packed, label_error=None)
    with pytest.raises(LabelError, match="no training label has a number of raters and their deviation"):
        Trainer(bare, bare, config)


# -- config and stores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.targets=[]", "is empty"),
        ("model.targets=[a, a]", "names 'a' twice"),
        ("model.targets=[{name: a, level: session}, a]", "names 'a' twice"),
        ("model.targets=[role]", "'role', and role is a column of something else"),
        ("model.targets=[talk_s]", "'talk_s', and talk_s is"),
        *(
            (f"model.targets=[{name}]", f"'{name}', and {name} is")
            for schema in (scores.UTTERANCE_SCHEMA, scores.SESSION_SCHEMA, scores.TRUST_SCHEMA, part_schema({}))
            for name in schema.names
            if not name.endswith(("valence", "arousal")) and not name.startswith(("valence_", "arousal_"))
        ),
        ("model.targets=[speech]", "'speech'"),
        ("model.targets=[valence, observed_valence]", "'valence' and 'observed_valence', which would both"),
        ("model.targets=[valence, valence_sd]", "both have a column valence_sd"),
        ("model.targets=[csat, {name: csat_mean, level: session}]", "both have a column csat_mean"),
        ("model.targets=[two words]", "a target's name is a letter, then"),
        ("model.targets=[{name: csat, level: call}]", "allowed is a list, each text or {name: text, level: session}"),
        ("model.alphas={csat: 0.5}", "model.alphas gives 'csat' a coefficient, and model.targets are valence, arousal"),
        ("train.target_weights={valence: 0, arousal: 0}", "train.target_weights is 0 for every target"),
        ("train.target_weights={csat: 0.5}", "train.target_weights gives 'csat' a weight"),
        ("labels.range={valence: [7, 1]}", r"labels\.range of valence is \[7\.0, 1\.0\]"),
        ("score.low={valence: 2}", "must be at most 1"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(override, message):
    with pytest.raises(ConfigValueError, match=message):
        Config.load("default", [override])


@pytest.mark.parametrize(
    ("older", "newer", "read", "message"),
    [
        ("score.low_arousal={}", "score.low={{arousal: {}}}", lambda c: c.score.low_of(["arousal"])["arousal"],
         r"score\.low says 0\.2 for arousal, and score\.low_arousal says 0\.3"),
        ("model.alpha_arousal={}", "model.alphas={{arousal: {}}}", lambda c: c.model.coefficients[1],
         r"model\.alphas says 0\.2 for arousal, and model\.alpha_arousal says 0\.3"),
    ],
)  # fmt: skip
def test_older_fields_mean_the_same_and_must_not_differ(older, newer, read, message):
    for given in ([older.format(0.2)], [newer.format(0.2)], [older.format(0.2), newer.format(0.2)]):
        assert read(Config.load("default", given)) == 0.2
    with pytest.raises(ConfigValueError, match=message):
        Config.load("default", [older.format(0.3), newer.format(0.2)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.low={valense: 0.3}", r"score\.low: \{valense: \.\.\.\} names 'valense', .* valence, arousal\. "
         "Did you mean valence?"),
        ("score.low={csat: 0.3}", "'csat', and the targets that utterances have scores of are valence, arousal"),
        ("score.low_arousal=0.3", None),
    ],
)  # fmt: skip
def test_a_threshold_of_what_is_not_scored_is_refused(override, message):
    score = Config.load("default", [override]).score
    if message is None:
        assert score.low_of(["arousal"]) == {"arousal": 0.3}
        with pytest.raises(ConfigValueError, match=r"score\.low_arousal names 'arousal'"):
            score.low_of(["dominance"])
    else:
        with pytest.raises(ConfigValueError, match=message):
            score.low_of(["valence", "arousal"])


def test_a_config_of_other_targets_is_saved_and_others_keep_their_fingerprint():
    changes = ["model.targets=[valence, {name: csat, level: session}]", "labels.range={valence: [1, 7], csat: [0, 10]}"]
    config = Config.load("default", changes)
    assert config.model.names == ("valence", "csat")
    assert Config.from_dict(config.to_dict()) == config
    assert hash(config) == hash(Config.from_dict(config.to_dict()))
    assert "targets" not in Config().decisive("model")["model"]
    assert config.fingerprint("model") != Config().fingerprint("model")


def test_a_target_of_the_session_has_a_slow_part_of_the_memory():
    def coefficients(*changes):
        return Config.load("default", changes).model.coefficients

    targets = "model.targets=[valence, arousal, {name: csat, level: session}]"
    assert coefficients() == (0.5,)
    assert coefficients(targets) == (0.5, 0.5, 0.95)
    assert coefficients(targets, "model.alphas={arousal: 0.3, csat: 0.9}") == (0.5, 0.3, 0.9)
    assert coefficients(targets, "model.alpha_session=null") == (0.5,)
    older = Config.load("default", [targets]).to_dict()
    del older["model"]["alpha_session"]
    assert Config.from_dict(older).model.coefficients == (0.5,)


def test_labels_of_ranges_of_their_own(tmp_path):
    table = session_rows(valence=[1.0, 7.0, 4.0, 4.0, 4.0], csat=[None, 2.5, None, 10.0, None])
    scores.files.write_parquet_whole(tmp_path / "part-0.parquet", table)
    store = FeatureStore.open(str(tmp_path))
    targets = {"model": {"targets": ("valence", CSAT)}}
    config = Config().replace({"labels": {"range": {"valence": [1, 7], "csat": [0, 10]}}}, targets)
    first, second = read_sessions(store, config)
    np.testing.assert_allclose(first.labels, [[0, np.nan], [1, np.nan], [0.5, 0.25]])
    np.testing.assert_allclose(second.labels[-1], [0.5, 1.0])
    with pytest.raises(ConfigValueError, match=r"labels\.range has no range for 'csat'; it has valence"):
        read_sessions(store, config.replace({"labels": {"range": {"valence": [1, 7]}}}))
    with pytest.raises(LabelError, match=r"csat of utterance 'u3' in .* is 10, outside \[1, 7\]"):
        read_sessions(store, config.replace({"labels": {"range": [1, 7]}}))


def test_a_target_without_a_column_is_refused(tmp_path):
    scores.files.write_parquet_whole(tmp_path / "part-0.parquet", table_with(("valence", "arousal")))
    with pytest.raises(LabelError, match=r"has no column 'arousl', which model\.targets names\. Did you mean arousal"):
        TrainingData.open(str(tmp_path), config_of(("valence", "arousl")))


def test_a_manifest_gives_further_labels_as_numbers(tmp_path):
    rows = {"utt_id": ["u0", "u1"], "session_id": ["a", "a"], "speaker_id": ["p", "p"], "audio_path": ["x", "y"]}
    write_manifest(tmp_path / "m.jsonl", pa.table(rows | {"csat": ["9", None], "valence": [3.0, 4.0]}))
    table = read_manifest(
        tmp_path / "m.jsonl", targets=("valence", CSAT), label_range={"valence": [1, 7], "csat": [0, 10]}
    )
    assert table["csat"].to_pylist() == [9.0, None]
    with pytest.raises(Exception, match=r"csat is 9\.0, outside the range \[0, 5\]"):
        read_manifest(tmp_path / "m.jsonl", targets=("valence", CSAT), label_range={"valence": [1, 7], "csat": [0, 5]})


def test_weights_in_checkpoints_keep_their_names():
    model = SessionRegressor(ModelConfig(targets=("hidden", "valence", "squash")), UpdaterConfig(), {"speech": 4})
    names = [name for name in model.state_dict() if name.startswith("head.") and name.endswith("weight")]
    assert names == [
        "head.hidden.weight",
        "head.target:hidden.weight",
        "head.valence.weight",
        "head.target:squash.weight",
    ]
    prediction, _ = model.step(Streams(speech=torch.randn(2, 4)), model.fresh_state(2))
    assert prediction.shape == (2, 3)


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_a_target_of_the_session_is_evaluated_per_session(tmp_path, capsys):
    targets = ("valence", "effort", CSAT)
    random = np.random.default_rng(0)
    table = table_with(("valence", CSAT), sessions=(3, 3, 30))
    scored = table.select(
        [name for name in scores.UTTERANCE_SCHEMA.names if name in table.column_names and name != "arousal"]
    )
    n = len(table)
    last = np.array([*(a != b for a, b in zip(table["session_id"][:-1], table["session_id"][1:], strict=True)), True])
    spread = {}
    for session, label in zip(table["session_id"].to_pylist(), table["csat"].to_pylist(), strict=True):
        spread.setdefault(session, label)
    truth = np.array([spread[session] for session in table["session_id"].to_pylist()])
    predicted = (truth + random.normal(0, 0.1, n)).clip(0, 1)
    columns = {
        "valence": random.uniform(0, 1, n),
        "effort": random.uniform(0, 1, n),
        "csat": np.where(last, predicted, np.nan),
    }
    for name, values in columns.items():
        if name in scored.column_names:
            scored = scored.drop_columns([name])
        scored = scored.append_column(name, pa.array(values, pa.float32(), from_pandas=True))
    folder, store = tmp_path / "scores", tmp_path / "store"
    scores.write_part(str(folder), "part-0.parquet", scored, ScoreConfig(), targets=targets)
    said = {"targets": scores.targets_said(ModelConfig(targets=targets))["targets"], "native_range": None}
    scores.files.write_json(folder / scores.PROVENANCE, said)
    scores.files.write_parquet_whole(store / "part-0.parquet", table)
    result = evaluate(str(folder), str(store), str(tmp_path / "out"), Config().replace({"evaluate": {"bootstrap": 50}}))
    assert capsys.readouterr().out.count("has no labels of effort: evaluated are valence, csat") == 1
    tested = last & np.array([split == "test" for split in table["split"].to_pylist()])
    pooled = result["pooled"]
    assert pooled["n_csat"] == tested.sum() == 30
    assert pooled["spearman_csat"] == pytest.approx(spearman(predicted[tested], truth[tested]))
    assert pooled["mae_csat"] == pytest.approx(np.abs(predicted - truth)[tested].mean(), abs=1e-6)
    assert pooled["ccc_avg"] == pytest.approx((pooled["ccc_valence"] + pooled["ccc_csat"]) / 2)
    assert pooled["within_ccc_csat"] is None
    assert pooled["within_ccc_avg"] == pooled["within_ccc_valence"]
    low, high = pooled["ci95"]["spearman_csat"]
    assert low < pooled["spearman_csat"] < high
    # A session without a score is counted in its own split: here one of training, and two of test.
    lacking = np.isin(table["session_id"].to_pylist(), [table["session_id"][row].as_py() for row in (0, -1, -30)])
    csat = pa.array(np.where(last & ~lacking, predicted, np.nan), pa.float32(), from_pandas=True)
    scored = scored.drop_columns(["csat"]).append_column("csat", csat)
    scores.write_part(str(folder), "part-0.parquet", scored, ScoreConfig(), targets=targets)
    result = evaluate(str(folder), str(store), str(tmp_path / "out"), Config().replace({"evaluate": {"bootstrap": 50}}))
    assert result["sessions_not_scored"] == {"csat": len(set(table["session_id"].to_pylist()[-30::29]))}
    assert result["pooled"]["n_csat"] == 30 - result["sessions_not_scored"]["csat"]


def test_ranks_share_ties_and_their_interval_covers():
    assert spearman(np.array([1, 2, 2, 3.0]), np.array([10, 20, 20, 40.0])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3.0]), np.array([3, 3, 1.0])) == pytest.approx(-np.sqrt(3) / 2)
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        x = random.normal(size=60)
        y = 0.7 * x + np.sqrt(1 - 0.49) * random.normal(size=60)
        low, high = spearman_interval(spearman(x, y), 60)
        hits += low < 6 / np.pi * np.arcsin(0.35) < high
    assert hits >= 182
