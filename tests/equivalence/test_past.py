"""What a voice is compared with: its own past and the session's, the same numbers however a session is heard."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from model_cases import FLOAT64, PASTS, make_model
from stream_cases import RATE, Energies, heard, utterances
from training_cases import comparable, run_together

from vaemo.config import Config
from vaemo.data.lanes import schedule_lanes
from vaemo.data.sessions import assemble_sessions
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, UsageError
from vaemo.model.streams import Streams
from vaemo.scoring.table import score_table
from vaemo.stream import Stream
from vaemo.testing import linear_world
from vaemo.training.replay import replay
from vaemo.training.sampling import add_noise
from vaemo.training.trainer import Trainer
from vaemo.units import DIMENSIONS

PUBLISHED = 1e-5
"""Precision to which every way of scoring agrees."""

DIMS = {"speech": 6, "prosody": 5}
EXTRACTORS = {"speech": Energies("energies", 6), "prosody": Energies("tones", 5)}


def make_table(vectors, session_ids, speaker_ids, status=None):
    n = len(session_ids)
    columns = {
        "session_id": pa.array(session_ids),
        "utt_id": pa.array([f"u{row}" for row in range(n)]),
        "speaker_id": pa.array(speaker_ids),
        "status": pa.array(status if status is not None else ["ok"] * n),
        "reason": pa.nulls(n, pa.string()),
        **{f"{kind}{name}": pa.nulls(n, pa.float32()) for name in DIMENSIONS for kind in ("", "observed_")},
    }
    for name, x in vectors.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), x.shape[1])
    return pa.table(columns)


def random_vectors(n, seed=0):
    """Far from the training mean and from each other, so that no speaker could be taken for another."""
    random = np.random.default_rng(seed)
    return {name: 3 + 2 * random.standard_normal((n, dim)) for name, dim in DIMS.items()}


def values(table):
    return np.stack([table[name].to_numpy(zero_copy_only=False) for name in DIMENSIONS], axis=1).astype(float)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_difference_is_the_formula(weight):
    """Each number in deviations, less the sum of the earlier ones / (n + weight); the first is compared with 0."""
    speakers = list("abacbbacab")
    model = make_model({**PASTS, "speaker_norm_weight": weight}, dims=DIMS)
    (session,) = assemble_sessions(make_table(random_vectors(10), ["s"] * 10, speakers))
    packed = PackedSessions.of([session], dtype=torch.float64).with_past(model.pasts)
    part = model.standardize["prosody"]
    z = (session.streams["prosody"].astype(float) - part.mean.numpy()) / part.deviation.numpy()
    expected = np.empty((10, 15))
    for t in range(10):
        own = [i for i in range(t) if speakers[i] == speakers[t]]
        beside = [z[t] - sum(z[i] for i in past) / max(len(past) + weight, 1) for past in (own, range(t))]
        expected[t] = np.concatenate([z[t], *beside])
    assert np.array_equal(expected[0], np.tile(z[0], 3))
    seen = []
    model.prosody.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(packed.at(torch.arange(10)[None]), model.fresh_state(1), torch.tensor([10]))
    np.testing.assert_allclose(seen[0][0].detach().numpy(), np.clip(expected, -8, 8), atol=FLOAT64)
    assert (np.abs(expected) < 8).mean() > 0.9


def test_a_voice_far_from_the_training_split_is_compared_with_itself_all_the_same():
    part = make_model(PASTS, dims=DIMS).standardize["prosody"]
    x = part.mean + part.deviation * (50 + torch.randn(5))
    past = torch.cat([40 * (x - 0.5 * part.deviation), torch.tensor([40.0])])
    assert (part(x) == 8).all()
    np.testing.assert_allclose(part.difference(x, past, 0.0), 0.5, atol=1e-9)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Two sessions of two and of three speakers, with utterances between that are not heard, and a checkpoint."""
    spoken = utterances(20)
    speakers, sessions = list("abbacbaabcba" + "babaabba"), ["s0"] * 12 + ["s1"] * 8
    status = np.array(["ok"] * 20, object)
    status[[3, 4, 9, 13]] = "silent"
    vectors = {name: extractor(spoken) for name, extractor in EXTRACTORS.items()}
    for x in vectors.values():
        x[status != "ok"] = 99.0
    path = tmp_path_factory.mktemp("talk") / "best"
    model = make_model({"updater": "mamba", **PASTS}, dims=DIMS, dtype=torch.float32)
    statistics = {name: (x[status == "ok"].mean(0), x[status == "ok"].std(0)) for name, x in vectors.items()}
    model.set_statistics(statistics, [0.2, 0.2])
    model.save_pretrained(path)
    return spoken, make_table(vectors, sessions, speakers, status.tolist()), str(path)


def push_all(stream, spoken, table):
    """The table's rows pushed in order, silence where there is nothing to hear; a session is a stream of its own."""
    rows = table.select(["speaker_id", "status"]).to_pylist()
    found = np.full((len(rows), 2), np.nan)
    for number, (x, row) in enumerate(zip(spoken, rows, strict=True)):
        silent = row["status"] != "ok"
        prediction = stream.push(np.zeros_like(x) if silent else x, RATE, speaker=row["speaker_id"])
        assert (prediction.status == "silent") == silent
        found[number] = np.nan if silent else heard(prediction)
    return found


def one_by_one(model, sessions):
    """Every session in single steps, its sums made on the way."""
    found = []
    for session in sessions:
        state, held = model.fresh_state(1), {}
        for t, speaker in enumerate(session.speaker_ids):
            tensors = {name: torch.from_numpy(x[[t]]) for name, x in session.streams.items()}
            for past in model.pasts:
                whose, stream = past.split(".")
                key = (past, speaker if whose == "speaker" else "")
                before = held.setdefault(key, np.zeros(DIMS[stream] + 1))
                tensors[past] = torch.from_numpy(before[None].astype(np.float32))
                held[key] = before + np.append(session.streams[stream][t], 1)
            with torch.no_grad():
                prediction, state = model.step(Streams.of(tensors), state)
            found.append(prediction[0].numpy())
    return np.array(found)


@pytest.mark.parametrize("sequence_by", ["session", "speaker"])
def test_batch_replay_windows_and_stream_agree(talk, sequence_by):
    spoken, table, path = talk
    config = Config().replace({"sessions": {"sequence_by": sequence_by}})
    stream = Stream(path, EXTRACTORS, config=config)
    model = stream.model
    sessions = assemble_sessions(table, sequence_by=sequence_by)
    rows = np.concatenate([session.rows for session in sessions])
    expected = one_by_one(model, sessions)
    for lanes, chunk in ((1, 1), (3, 5), (32, 64)):
        scored = values(score_table(table, [model], lanes=lanes, chunk=chunk, sequence_by=sequence_by))
        np.testing.assert_allclose(scored[rows], expected, atol=PUBLISHED)
        assert np.isnan(np.delete(scored, rows, axis=0)).all()
    packed = PackedSessions.of(sessions)
    for window in (1, 4, 30):
        np.testing.assert_allclose(replay(model, packed, window=window).prediction, expected, atol=PUBLISHED)
    state, trained = model.fresh_state(2), np.empty_like(expected)
    for window in packed.with_past(model.pasts).windows(schedule_lanes(packed.lengths, 2, 5, seed=1)):
        prediction, state = model(window.features, state.reset(window.fresh), window.lengths)
        trained[window.index[window.valid]] = prediction[window.valid].detach()
    np.testing.assert_allclose(trained, expected, atol=PUBLISHED)
    live = [push_all(stream, spoken[:12], table[:12])]
    live.append(push_all(Stream(path, EXTRACTORS, config=config), spoken[12:], table[12:]))
    np.testing.assert_allclose(np.concatenate(live)[rows], expected, atol=PUBLISHED)


def test_each_kind_of_past_matters(talk):
    _, table, path = talk
    model = Stream(path, EXTRACTORS).model
    one = table.set_column(table.column_names.index("speaker_id"), "speaker_id", table["session_id"])
    plain, nobody = (values(score_table(rows, [model], lanes=4, chunk=8)) for rows in (table, one))
    changed = np.abs(plain - nobody).max(axis=1) > PUBLISHED
    # Until a second speaker speaks, the session and its speaker have one past.
    assert not changed[[0, 12, 14]].any()
    assert changed[[1, 2, 15]].all()


def test_a_stream_goes_on_with_the_past_that_it_saved(talk, tmp_path):
    spoken, table, path = talk
    whole = push_all(Stream(path, EXTRACTORS), spoken[:12], table[:12])
    stream = Stream(path, EXTRACTORS)
    push_all(stream, spoken[:7], table[:7])
    stream.save(tmp_path / "memory")
    again = Stream(path, EXTRACTORS)
    push_all(again, spoken[12:], table[12:])
    again.load(tmp_path / "memory")
    np.testing.assert_array_equal(push_all(again, spoken[7:12], table[7:12]), whole[7:])


def test_what_is_refused_moves_no_past(talk):
    spoken, table, path = talk
    whole = push_all(Stream(path, EXTRACTORS), spoken[:3], table[:3])
    stream = Stream(path, EXTRACTORS)
    for number in range(3):
        with pytest.raises(UsageError, match="observed has inf for valence"):
            stream.push(spoken[number], RATE, speaker="abb"[number], observed=(np.inf, None))
        found = heard(stream.push(spoken[number], RATE, speaker="abb"[number]))
        np.testing.assert_array_equal(found, whole[number])


def test_who_is_not_scored_moves_nobody_elses_past():
    """Without a memory the past is all that could carry anything from one utterance to another."""
    model = make_model({"updater": "none", **PASTS}, dims=DIMS, dtype=torch.float32)
    n, speakers = 16, list("abab" * 4)
    context = np.array(speakers) == "b"
    status = np.where(context, "not_scored_role", "ok").tolist()

    def score(vectors, speaker_ids=speakers, context=context):
        return values(
            score_table(make_table(vectors, ["s"] * n, speaker_ids, status), [model], lanes=2, chunk=8, context=context)
        )

    given = random_vectors(n)
    other = {name: np.where(context[:, None], random_vectors(n, 1)[name], x) for name, x in given.items()}
    for speaker_ids in (speakers, ["s"] * n):
        with_context = score(given, speaker_ids)
        assert np.array_equal(np.isnan(with_context).all(axis=1), context)
        assert np.array_equal(with_context, score(other, speaker_ids), equal_nan=True)
        unheard = score(given, speaker_ids, None)
        np.testing.assert_allclose(with_context, unheard, atol=PUBLISHED)
    # They themselves are compared with their like.
    session = assemble_sessions(make_table(given, ["s"] * n, ["s"] * n))
    past = PackedSessions.of(session).with_past(model.pasts, context).features.past
    for name in ("speaker.prosody", "session.prosody"):
        assert past[name][context, -1].tolist() == past[name][~context, -1].tolist() == list(range(8))


# -- training ------------------------------------------------------------------------------------------------------

SMALL = {
    "model": {"d_c": 8, "head_hidden": 12, "dropout": 0.2, "speech_mlp": "after_film", "speech_hidden": 8},
    "updater": {"d_model": 8, "d_state": 4},
    "train": {"epochs": 2, "lanes": 4, "window": 6, "lr": 3e-3, "min_labelled": 8, "dtype": "float64"},
}


def with_speakers(sessions):
    """Three speakers in turn at random, each with an offset of their own."""
    random, found = np.random.default_rng(3), []
    for session in sessions:
        who = random.integers(0, 3, len(session))
        offset = 4 * random.standard_normal((3, session.streams["speech"].shape[1]))
        speech = (session.streams["speech"] + offset[who]).astype(np.float32)
        found.append(
            dataclasses.replace(session, speaker_ids=np.array(list("abc"), object)[who], streams={"speech": speech})
        )
    return found


@pytest.fixture(scope="module")
def data():
    world = linear_world(1, sessions=(14, 5, 0), lengths=(3, 20), features=5, noise=1.0)
    return with_speakers(world.sessions("train")), with_speakers(world.sessions("dev"))


def config(*, norm=("speech",), **train):
    changed = Config().replace(SMALL).replace({"model": {"speaker_norm": norm, "session_norm": norm}})
    return changed.replace({"train": train})


def test_workers_equal_one(data):
    (alone,) = run_together(1, config(), *data, epochs=1)
    assert alone.model.pasts == ("speaker.speech", "session.speech")
    for trainer in run_together(2, config(), *data, epochs=1):
        for key, value in comparable(alone.history)[0].items():
            assert trainer.history[0][key] == pytest.approx(value, abs=1e-9), key


def test_folds_share_sessions_and_have_statistics_of_their_own(data):
    """Packed once, each fold's model forms the difference with the mean and deviation of its own training split."""
    everybody = [*data[0], *data[1]]
    shared = PackedSessions.of(everybody).with_past(("speaker.speech", "session.speech"))
    for train, dev in ((range(10), range(10, 19)), (range(8, 19), range(8))):
        settings = config(dtype="float32")
        together = Trainer(shared.select(train), shared.select(dev), settings)
        alone = Trainer([everybody[n] for n in train], [everybody[n] for n in dev], settings)
        assert together._train.features.past["speaker.speech"].data_ptr() == (
            shared.features.past["speaker.speech"].data_ptr()
        ), "copied"
        assert comparable(list(together)) == comparable(list(alone))
        speech = np.concatenate([everybody[n].streams["speech"] for n in train]).astype(float)
        np.testing.assert_allclose(together.model.standardize["speech"].mean, speech.mean(0), rtol=1e-5)


def test_noise_does_not_touch_the_past(data):
    packed = PackedSessions.of(data[0]).with_past(("speaker.speech",))
    features = packed.at(torch.arange(12).view(2, 6))
    generator = torch.Generator().manual_seed(0)
    noisy = add_noise(features, {"speech": torch.ones(5)}, 2, torch.arange(2), generator)
    assert torch.equal(noisy.past["speaker.speech"], features.past["speaker.speech"])
    assert (noisy.speech != features.speech).all()


def test_a_past_that_is_not_given_is_asked_for():
    model = make_model(PASTS, dims=DIMS)
    features = Streams(speech=torch.zeros(1, 6).double(), prosody=torch.zeros(1, 5).double())
    with pytest.raises(FeatureMismatchError, match=r"compares with the past 'speaker.speech' .*, which the features l"):
        model.step(features, model.fresh_state(1))
    narrow = dataclasses.replace(features, past={name: torch.zeros(1, 3).double() for name in model.pasts})
    with pytest.raises(FeatureMismatchError, match=r"'speaker.speech' has 3 numbers; the model was made for 7"):
        model.step(narrow, model.fresh_state(1))
