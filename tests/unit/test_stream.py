"""A conversation as it happens has the scores of the batch job, and goes on in another process."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scoring_cases import SINGLE, make_checkpoint
from stream_cases import EXTRACTORS, RATE, SPEAKERS, Energies, config, heard, push_all, utterances

from vaemo.config import FeatureConfig
from vaemo.data.speakers import running_means
from vaemo.errors import FeatureMismatchError, ShapeError, StateMismatchError, UsageError
from vaemo.model.checkpoint import load_checkpoint
from vaemo.model.regressor import SessionRegressor
from vaemo.model.streams import Streams
from vaemo.personalize import Personal
from vaemo.stream import Stream


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "c", dims={"speech": 6, "speaker": 4})


def predict(model, vectors):
    """One chunk over all utterances, (T, D) by stream."""
    features = Streams(**{name: torch.from_numpy(x[None].astype(np.float32)) for name, x in vectors.items()})
    length = torch.tensor([len(vectors["speech"])])
    with torch.inference_mode():
        return model(features, model.fresh_state(1), length)[0][0].numpy()


def vectors_of(samples):
    return {name: extractor(samples) for name, extractor in EXTRACTORS.items()}


def test_a_stream_is_the_chunk(checkpoint):
    samples = utterances()
    expected = predict(SessionRegressor.from_pretrained(checkpoint), vectors_of(samples))
    for model in (checkpoint, load_checkpoint(checkpoint), SessionRegressor.from_pretrained(checkpoint)):
        assert np.abs(push_all(Stream(model, EXTRACTORS), samples) - expected).max() < SINGLE


def test_a_speaker_may_have_a_memory_of_its_own(checkpoint):
    samples, speakers = utterances(8), list("abbabaab")
    both = push_all(
        Stream(checkpoint, EXTRACTORS, config=config(sessions={"sequence_by": "speaker"})), samples, speakers
    )
    for speaker in "ab":
        own = np.array(speakers) == speaker
        alone = push_all(Stream(checkpoint, EXTRACTORS), [x for x, kept in zip(samples, own, strict=True) if kept])
        assert np.abs(both[own] - alone).max() < SINGLE
    assert np.abs(both - push_all(Stream(checkpoint, EXTRACTORS), samples, speakers)).max() > SINGLE


def test_speaker_embeddings_are_averaged_over_the_past(checkpoint):
    samples, speakers = utterances(8), list("abbabaab")
    features = {"features": {"speaker_aggregation": "running_mean"}}
    found = push_all(Stream(checkpoint, EXTRACTORS, config=config(**features)), samples, speakers)
    vectors = vectors_of(samples)
    vectors["speaker"] = running_means(vectors["speaker"], np.array(speakers, object))
    assert np.abs(found - predict(SessionRegressor.from_pretrained(checkpoint), vectors)).max() < SINGLE


def test_personal_deltas_change_their_speakers_alone(checkpoint):
    model = SessionRegressor.from_pretrained(checkpoint)
    torch.manual_seed(0)
    changes = {name: torch.randn(1, *x.shape) for name, x in model.film.last.state_dict(prefix="last.").items()}
    known = Personal(changes, {"a": 0}, model.fingerprint)
    samples = utterances(4)
    plain = push_all(Stream(checkpoint, EXTRACTORS), samples)
    others = push_all(Stream(checkpoint, EXTRACTORS, personal=known), samples, list("bbbb"))
    own = push_all(Stream(checkpoint, EXTRACTORS, personal=known), samples, list("aaaa"))
    assert np.array_equal(others, plain)
    with torch.no_grad():
        for name, parameter in model.film.last.named_parameters():
            parameter += changes[f"last.{name}"][0]
    assert np.abs(own - predict(model, vectors_of(samples))).max() < SINGLE
    assert np.abs(own - plain).min() > SINGLE


def test_running_means_are_means_of_the_past_of_one_speaker():
    random = np.random.default_rng(0)
    vectors, speakers = random.standard_normal((9, 5)).astype(np.float32), np.array(list("aababbaba"), object)
    means = running_means(vectors, speakers)
    for step in range(9):
        past = vectors[: step + 1][speakers[: step + 1] == speakers[step]].astype(float).mean(axis=0)
        assert np.allclose(means[step], past / np.linalg.norm(past), atol=1e-6)
    assert np.array_equal(running_means(np.zeros((2, 3), np.float32), speakers[:2]), np.zeros((2, 3)))


def test_what_has_no_prediction_says_why_and_leaves_no_trace(checkpoint):
    samples = utterances(4)
    expected = push_all(Stream(checkpoint, EXTRACTORS), samples)
    stream = Stream(checkpoint, EXTRACTORS)
    found = []
    for x in samples:
        found.append(heard(stream.push(x, RATE)))
        short, silent, broken = x[:800], np.zeros(RATE, np.float32), np.full(RATE, np.nan, np.float32)
        for bad, status in ((short, "too_short"), (silent, "silent"), (broken, "nan_audio")):
            prediction = stream.push(bad, RATE)
            assert (prediction.valence, prediction.arousal, prediction.status) == (None, None, status)
            assert prediction.reason
    assert np.array_equal(found, expected)
    picky = Stream(checkpoint, {**EXTRACTORS, "speech": Energies("picky", 6)})
    assert "picky finds nothing to measure" in picky.push(samples[0], RATE).reason


def test_observed_values_act_on_the_next_utterance(checkpoint):
    samples = utterances(4)
    plain = push_all(Stream(checkpoint, EXTRACTORS), samples)
    stream = Stream(checkpoint, EXTRACTORS)
    known = [heard(stream.push(x, RATE, observed=(0.95, None) if i == 1 else None)) for i, x in enumerate(samples)]
    assert np.array_equal(known[:2], plain[:2])
    assert (np.array(known[2:]) != plain[2:]).all()


@pytest.mark.parametrize("value", [5, -1e6, np.inf])
def test_observed_values_outside_the_label_range_are_refused(checkpoint, value):
    with pytest.raises(UsageError, match=r"observed has .* for arousal; allowed are values on .* \[0, 1\]"):
        Stream(checkpoint, EXTRACTORS).push(utterances(1)[0], RATE, observed={"arousal": value})


def test_other_rates_are_resampled(checkpoint):
    from vaemo.audio.sinc import resample

    x = np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE).astype(np.float32) * np.hanning(RATE).astype(np.float32)
    slow = resample(torch.from_numpy(x), RATE, 8000).numpy()
    found = heard(Stream(checkpoint, EXTRACTORS).push(slow, 8000))
    assert np.abs(found - heard(Stream(checkpoint, EXTRACTORS).push(x, RATE))).max() < 1e-3  # two resampling filters


WHOLE = (32767 * utterances(1)[0].clip(-1, 1)).astype(np.int16)


@pytest.mark.parametrize(
    "samples",
    [
        WHOLE,
        WHOLE.astype(">i2"),
        WHOLE.astype(np.int32) * 65536,
        WHOLE / 32768,
        (WHOLE / 32768).astype(">f4"),
        (WHOLE / 32768).astype(np.longdouble),
        torch.from_numpy(WHOLE),
        (WHOLE / 32768).tolist(),
        WHOLE[None],
        WHOLE[:, None],
    ],
    ids=["int16", ">i2", "int32", "float64", ">f4", "longdouble", "tensor", "list", "row", "column"],
)
def test_arrays_of_every_kind_are_what_they_stand_for(checkpoint, samples):
    expected = heard(Stream(checkpoint, EXTRACTORS).push(WHOLE / np.float32(32768), RATE))
    assert np.array_equal(heard(Stream(checkpoint, EXTRACTORS).push(samples, RATE)), expected)


def test_half_precision_is_nearly_that(checkpoint):
    expected = heard(Stream(checkpoint, EXTRACTORS).push(WHOLE, RATE))
    found = heard(Stream(checkpoint, EXTRACTORS).push((WHOLE / 32768).astype(np.float16), RATE))
    assert np.abs(found - expected).max() < 1e-3


def test_few_samples_that_stick_out_are_clipped(checkpoint):
    spiky, clipped = WHOLE / 32768, WHOLE / 32768
    spiky[500::1200], clipped[500::1200] = 1e300, 4.0
    found = heard(Stream(checkpoint, EXTRACTORS).push(spiky, RATE))
    assert np.array_equal(found, heard(Stream(checkpoint, EXTRACTORS).push(clipped, RATE)))


@pytest.mark.parametrize(
    ("change", "rate", "error", "message"),
    [
        (lambda x: np.stack([x, x]), RATE, ShapeError, r"samples have the shape \(2, \d+\); an utterance is mono"),
        (lambda x: x[0], RATE, ShapeError, r"samples have the shape \(\)"),
        *(
            (lambda x, dtype=dtype: x.astype(dtype), RATE, ShapeError, "samples are .*Give int16, int32, float32")
            for dtype in (np.uint8, np.int8, np.int64, bool, np.complex64, object, str)
        ),
        (lambda x: 32768 * x, RATE, ShapeError, r"exceed 4 in magnitude.* int16 scale, it seems: divide by 32768"),
        (lambda x: 2.0**31 * x, RATE, ShapeError, r"exceed 4 in magnitude.* int32 scale"),
        (lambda x: torch.from_numpy(x).requires_grad_(), RATE, ShapeError, "samples of the type Tensor make no array"),
        (lambda x: x, 0, UsageError, "the sampling rate is 0 Hz; give a number from 2000 to 768000 Hz"),
        (lambda x: x, "8000", UsageError, "the sampling rate is '8000'; give a number from 2000 to 768000 Hz"),
        (lambda x: x, None, UsageError, "the sampling rate is None"),
        (lambda x: x, np.nan, UsageError, "the sampling rate is nan Hz"),
        (lambda x: x, True, UsageError, "the sampling rate is True"),
    ],
)
def test_samples_that_cannot_be_heard_are_refused(checkpoint, change, rate, error, message):
    with pytest.raises(error, match=message) as refused:
        Stream(checkpoint, EXTRACTORS).push(change(utterances(1)[0]), rate)
    assert len(str(refused.value).splitlines()) == 1


CONTINUE = """
import sys
import numpy as np
from stream_cases import *
from vaemo.stream import Stream
stream = Stream(sys.argv[1], EXTRACTORS, config=config(**SPEAKERS))
stream.load(sys.argv[2])
np.save(sys.argv[3], push_all(stream, utterances(8)[4:], list("abbabaab")[4:]))
"""


@pytest.mark.long
def test_a_stream_goes_on_in_another_process(checkpoint, tmp_path):
    samples, speakers = utterances(8), list("abbabaab")
    whole = push_all(Stream(checkpoint, EXTRACTORS, config=config(**SPEAKERS)), samples, speakers)
    stream = Stream(checkpoint, EXTRACTORS, config=config(**SPEAKERS))
    push_all(stream, samples[:4], speakers[:4])
    stream.save(tmp_path / "memory")
    arguments = [checkpoint, str(tmp_path / "memory"), str(tmp_path / "rest.npy")]
    paths = ":".join(sys.path)
    subprocess.run([sys.executable, "-c", CONTINUE, *arguments], check=True, env={"PYTHONPATH": paths, "PATH": ""})
    assert np.abs(np.load(tmp_path / "rest.npy") - whole[4:]).max() < SINGLE


def test_a_fresh_memory_can_be_saved(checkpoint, tmp_path):
    Stream(checkpoint, EXTRACTORS).save(tmp_path / "memory")
    stream = Stream(checkpoint, EXTRACTORS)
    push_all(stream, utterances(2))
    stream.load(tmp_path / "memory")
    assert np.array_equal(push_all(stream, utterances(2)), push_all(Stream(checkpoint, EXTRACTORS), utterances(2)))


def test_the_memory_of_another_checkpoint_is_refused(checkpoint, tmp_path):
    stream = Stream(checkpoint, EXTRACTORS)
    push_all(stream, utterances(2))
    stream.save(tmp_path / "memory")
    other = Stream(make_checkpoint(tmp_path / "other", 1, dims={"speech": 6, "speaker": 4}), EXTRACTORS)
    with pytest.raises(StateMismatchError, match="the memory belongs to the checkpoint"):
        other.load(tmp_path / "memory")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StateMismatchError, match="cannot be read"):
        stream.load(tmp_path / "text")
    stream.push(utterances(1)[0], RATE)
    SessionRegressor.from_pretrained(checkpoint).fresh_state(1).save(tmp_path / "state")
    with pytest.raises(StateMismatchError, match=r"is not a memory that Stream.save"):
        stream.load(tmp_path / "state")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model is of the type int; give the path of a checkpoint, a Checkpoint or a SessionRegressor"),
        ({"model": None, "extractors": EXTRACTORS}, "model is of the type NoneType; give the path"),
        ({"extractors": [1]}, "extractors is of the type list; give extractors by stream, or None"),
        ({"config": {"audio": {}}}, "config is of the type dict; give a vaemo.Config, or None"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Stream(**{"model": "none", **arguments})


def test_extractors_must_be_those_of_the_model(checkpoint, tmp_path):
    with pytest.raises(FeatureMismatchError, match=r"give them: Stream\(model, extractors\)"):
        Stream(checkpoint)
    with pytest.raises(FeatureMismatchError, match="the list of extractors has no stream 'speaker'"):
        Stream(checkpoint, {"speech": EXTRACTORS["speech"]})
    marked = make_checkpoint(tmp_path / "m", dims={"speech": 6, "speaker": 4}, feature_fingerprints={"speech": "g"})
    with pytest.raises(FeatureMismatchError, match="made by the extractor f"):
        Stream(marked, EXTRACTORS)
    with pytest.raises(FeatureMismatchError, match="knows no enrolment"):
        Stream(checkpoint, EXTRACTORS, config=config(features={"speaker_aggregation": "enrolled"}))
    full = make_checkpoint(
        tmp_path / "full", features=FeatureConfig(prosody="none"), dims={"speech": 120, "speaker": 64}
    )
    assert Stream(full).push(utterances(1)[0], RATE).status == "ok"
