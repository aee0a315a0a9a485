import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_cases import assert_close
from speaker_world import DIM, SPEAKER_DIM, biased_world, make_session

from vaemo.config import Config, ModelConfig, PersonalizeConfig, UpdaterConfig
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, LabelError, OtherRunError, ReadCheckpointError
from vaemo.model.regressor import SessionRegressor
from vaemo.model.streams import Streams
from vaemo.personalize import Personal, personalize, personalize_store
from vaemo.training.replay import replay

FIRST = PersonalizeConfig().utterances


def stacked(sessions):
    features = {name: torch.from_numpy(np.stack([s.streams[name] for s in sessions])) for name in sessions[0].streams}
    return Streams(**features), torch.from_numpy(np.stack([s.labels for s in sessions]))


def predict(model, sessions, personal=None):
    features, _ = stacked(sessions)
    delta = personal.delta(np.stack([s.speaker_ids for s in sessions])) if personal else None
    lengths = torch.full((len(sessions),), len(sessions[0]))
    with torch.no_grad():
        return model(features, model.fresh_state(len(sessions)), lengths, film_delta=delta)[0]


@pytest.fixture(scope="module")
def model() -> SessionRegressor:
    """A model that has learned the world, but none of the speakers that the tests personalise."""
    torch.manual_seed(0)
    features, labels = stacked(biased_world(32, seed=0, utterances=40))
    model = SessionRegressor(
        ModelConfig(updater="mamba2", feedback="none", d_c=16, film_hidden=32, head_hidden=32),
        UpdaterConfig(d_model=32, headdim=16),
        {"speech": DIM, "speaker": SPEAKER_DIM},
    )
    statistics = {name: (x.flatten(0, 1).mean(0), x.flatten(0, 1).std(0)) for name, x in features.items()}
    model.set_statistics(statistics, labels.flatten(0, 1).std(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        lanes = torch.randperm(32)[:16]
        prediction, _ = model(features.select(lanes), model.fresh_state(16), torch.full((16,), 40))
        optimizer.zero_grad()
        (prediction - labels[lanes]).square().mean().backward()
        optimizer.step()
    return model


def ccc(a, b):
    covariance = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    return (2 * covariance / (a.var(0) + b.var(0) + (a.mean(0) - b.mean(0)) ** 2)).mean()


def test_it_helps_speakers_with_a_bias_and_hurts_hardly_anyone(model):
    sessions = biased_world(20, seed=5)
    personal, speakers, used = personalize(model, sessions, PersonalizeConfig())
    labels = stacked(sessions)[1][:, FIRST:].numpy()
    before, after = (predict(model, sessions, p)[:, FIRST:].numpy() for p in (None, personal))
    gains = np.array([ccc(a, y) - ccc(b, y) for a, b, y in zip(after, before, labels, strict=True)])
    interval = 1.96 * gains.std(ddof=1) / len(gains) ** 0.5
    print(f"gain in CCC {gains.mean():.3f} +- {interval:.3f}, worst {gains.min():.3f}")
    assert gains.mean() - interval > 0
    assert gains.min() > -0.05
    kept = np.array(speakers["kept"].to_pylist())
    assert 4 <= kept.sum() < 20
    assert np.array_equal(after[~kept], before[~kept])
    assert (after[kept] != before[kept]).any((1, 2)).all()
    assert used.num_rows == 20 * FIRST
    assert used["utt_id"].to_pylist()[:2] == ["s0/0", "s0/1"]


@pytest.mark.parametrize("layers", ["last", "all"])
def test_many_speakers_at_once_are_each_alone(model, layers, monkeypatch):
    config = PersonalizeConfig(optim_steps=5, layers=layers)
    sessions = biased_world(6, seed=6, utterances=20)
    together, table, _ = personalize(model, sessions, config)
    assert together.index
    for k, session in enumerate(sessions):
        alone, row, _ = personalize(model, [session], config)
        assert_close(torch.tensor(row["mse_after"][0].as_py()), torch.tensor(table["mse_after"][k].as_py()), 1e-5)
        assert set(alone.index) == ({f"p{k}"} & set(together.index))
        for name in alone.parameters if alone.index else ():
            found = together.parameters[name][together.index[f"p{k}"]]
            torch.testing.assert_close(found, alone.parameters[name][0], rtol=1e-2, atol=2e-5)
    monkeypatch.setattr("vaemo.personalize.GROUP_BYTES", 1)
    in_groups, other, _ = personalize(model, sessions, config)
    assert in_groups.index == together.index
    assert np.allclose(other["mse_after"], table["mse_after"], rtol=1e-5)


def conversation(model):
    """Two speakers taking turns, in two sessions, some utterances unlabelled; a third who hardly speaks."""
    one, two = biased_world(2, seed=7, utterances=12)
    sessions = []
    for number, session in enumerate((one, two)):
        who = np.array([["a", "b"][t % 2] for t in range(12)])
        who[-1] = "c"
        labels = session.labels.copy()
        labels[1] = np.nan
        labels[2, 0] = np.nan
        sessions.append(make_session(f"t{number}", who, session.streams["speech"], session.streams["speaker"], labels))
    return sessions


def test_the_first_labelled_utterances_are_used_in_session_order(model):
    sessions = conversation(model)
    personal, speakers, used = personalize(model, sessions, PersonalizeConfig(utterances=7, optim_steps=2))
    assert dict(zip(speakers["speaker_id"].to_pylist(), speakers["n_utterances"].to_pylist(), strict=True)) == {
        "a": 7,
        "b": 7,
    }
    by_speaker = {"a": [], "b": [], "c": []}
    for row in used.to_pylist():
        by_speaker[row["speaker_id"]].append(row["utt_id"])
    assert by_speaker["a"] == ["t0/0", "t0/4", "t0/6", "t0/8", "t0/10", "t1/0", "t1/4"]
    assert by_speaker["b"] == ["t0/3", "t0/5", "t0/7", "t0/9", "t1/3", "t1/5", "t1/7"]
    assert by_speaker["c"] == []
    assert all(index in ("a", "b") for index in personal.index)


def test_a_change_touches_the_speakers_own_utterances_until_the_memory_spreads_it(model):
    session = conversation(model)[0]
    parameters = {"last.weight": torch.randn(1, 2 * DIM, 32), "last.bias": torch.randn(1, 2 * DIM)}
    personal = Personal(parameters, {"b": 0}, "")
    before, after = predict(model, [session]), predict(model, [session], personal)
    assert torch.equal(before[0, 0], after[0, 0])
    assert (before[0, 1:] != after[0, 1:]).any(-1).all()
    assert personal.delta(np.array([["a", "c"]], object)) is None


def test_fitting_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    personalize(model, biased_world(2, seed=8, utterances=12), PersonalizeConfig(optim_steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_film_and_a_corpus_without_labels_are_refused(model):
    sessions = biased_world(2, seed=8, utterances=12)
    without = SessionRegressor(ModelConfig(film="concat"), UpdaterConfig(), {"speech": DIM, "speaker": SPEAKER_DIM})
    with pytest.raises(FeatureMismatchError, match="acts by 'concat'; personalisation changes FiLM"):
        personalize(without, sessions, PersonalizeConfig())
    with pytest.raises(LabelError, match="no speaker has 4 labelled utterances among 0 sessions"):
        personalize(model, [], PersonalizeConfig())


def test_deltas_are_saved_and_loaded_for_their_checkpoint_alone(tmp_path):
    parameters = {"last.weight": torch.randn(2, 6, 4), "last.bias": torch.randn(2, 6)}
    personal = Personal(parameters, {"a/1": 0, "b.2": 1}, "ab" * 32)
    personal.save(str(tmp_path))
    loaded = Personal.load(str(tmp_path), fingerprint="ab" * 32)
    assert set(loaded.index) == set(personal.index)
    for speaker, row in personal.index.items():
        for name, tensor in parameters.items():
            assert torch.equal(loaded.parameters[name][loaded.index[speaker]], tensor[row])
    with pytest.raises(ReadCheckpointError, match="belongs to the checkpoint 'abababababab', not to 'cdcd"):
        Personal.load(str(tmp_path), fingerprint="cd" * 32)
    with pytest.raises(ReadCheckpointError, match=r"cannot be read \(FileNotFoundError\)"):
        Personal.load(str(tmp_path / "nowhere"), fingerprint="")
    (tmp_path / "deltas.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ReadCheckpointError, match="cannot be read"):
        Personal.load(str(tmp_path), fingerprint="")


def test_deltas_of_nobody_can_be_saved_and_loaded(tmp_path):
    Personal({"last.weight": torch.zeros(0, 6, 4)}, {}, "ab").save(str(tmp_path))
    assert Personal.load(str(tmp_path), fingerprint="ab").delta(np.array([["a"]], object)) is None


def test_a_store_and_a_checkpoint_become_a_folder(model, tmp_path):
    import pyarrow as pa

    sessions = conversation(model)
    rows = {
        "session_id": [s.session_id for s in sessions for _ in s.utt_ids],
        "utt_id": [u for s in sessions for u in s.utt_ids],
        "speaker_id": [w for s in sessions for w in s.speaker_ids],
        "valence": pa.array(np.concatenate([s.labels[:, 0] for s in sessions]), from_pandas=True),
        "arousal": pa.array(np.concatenate([s.labels[:, 1] for s in sessions]), from_pandas=True),
        "speech": list(np.concatenate([s.streams["speech"] for s in sessions])),
        "speaker": list(np.concatenate([s.streams["speaker"] for s in sessions])),
    }
    (tmp_path / "store").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "store" / "part-0.parquet")
    model.save_pretrained(tmp_path / "best")
    config = Config.load("default", ["personalize.optim_steps=3"])
    paths = str(tmp_path / "store"), str(tmp_path / "best"), str(tmp_path / "out")
    speakers = personalize_store(*paths, config)
    loaded = SessionRegressor.from_pretrained(tmp_path / "best")
    personal = Personal.load(paths[2], fingerprint=loaded.fingerprint)
    expected, table, used = personalize(loaded, sessions, config.personalize)
    assert set(personal.index) == set(expected.index)
    assert np.allclose(speakers["mse_after"], table["mse_after"])
    assert pq.read_table(tmp_path / "out" / "used.parquet")["utt_id"].to_pylist() == used["utt_id"].to_pylist()
    personalize_store(*paths, config)
    with pytest.raises(OtherRunError, match=r"personalize.optim_steps was 3, is now 4"):
        personalize_store(*paths, config.replace({"personalize": {"optim_steps": 4}}))


def test_personalised_speakers_are_compared_with_their_past(model):
    """What the fit hears is what scoring hears: errors before the fit are those of the whole session's replay."""
    torch.manual_seed(0)
    config = dataclasses.replace(model.config, speaker_norm=("speech",), session_norm=("speech",))
    compared = SessionRegressor(config, model.updater_config, model.dims)
    sessions = conversation(model)
    _, speakers, used = personalize(compared, sessions, PersonalizeConfig(utterances=7, optim_steps=1))
    predicted = replay(compared, PackedSessions.of(sessions), window=30).prediction
    labels = np.concatenate([session.labels for session in sessions])
    rows = {utt_id: row for row, utt_id in enumerate(np.concatenate([session.utt_ids for session in sessions]))}
    for row in speakers.to_pylist():
        own = [rows[r["utt_id"]] for r in used.to_pylist() if r["speaker_id"] == row["speaker_id"]]
        squares = np.square(predicted[own] - labels[own])
        halves = [squares[: len(own) // 2].mean(), squares[len(own) // 2 :].mean()]
        np.testing.assert_allclose(row["mse_before"], np.mean(halves), rtol=1e-4)
