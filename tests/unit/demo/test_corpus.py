"""The corpus: what the manifest says is in the audio, speakers are disjoint, the same seed gives the same bytes."""

import hashlib
import json

import numpy as np
import pytest
import soundfile

from vaemo.data.manifest import read_manifest
from vaemo.demo.corpus import CORPUS_VOICES, UTTERANCES, draw_latent, express, make_corpus, make_recordings
from vaemo.units import SPLITS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, n_sessions=3, seed=5)
    return folder


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    make_recordings(folder, n_recordings=2, seed=5)
    return folder


def level(samples):
    return float(np.sqrt(np.mean(samples**2))) if len(samples) else 0.0


def test_the_manifest_is_one_and_its_utterances_hold_speech(corpus):
    table = read_manifest(corpus / "manifest.jsonl", label_range=(0, 1))
    sessions = table["session_id"].unique().to_pylist()
    assert len(sessions) == 3
    for session in sessions:
        rows = [row for row in table.to_pylist() if row["session_id"] == session]
        assert UTTERANCES[0] <= len(rows) <= UTTERANCES[1]
        samples, sampling_rate = soundfile.read(rows[0]["audio_path"], dtype="float32")
        assert sampling_rate == 16_000
        inside = np.zeros(len(samples), bool)
        for row in rows:
            start, end = int(row["start_s"] * sampling_rate), int(row["end_s"] * sampling_rate)
            inside[start:end] = True
            assert level(samples[start:end]) > 0.005
            assert 0.4 < row["end_s"] - row["start_s"] < 4
        assert level(samples[~inside]) < 1e-3


def test_speakers_stand_in_one_split_and_every_split_has_some():
    splits = {voice.speaker_id: voice.split for voice in CORPUS_VOICES}
    assert len(splits) == len(CORPUS_VOICES) == 12
    assert len({voice.name for voice in CORPUS_VOICES}) == 12
    assert set(splits.values()) == set(SPLITS)


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    make_corpus(tmp_path, n_sessions=3, seed=5)
    for path in sorted(corpus.rglob("*.*")):
        again = tmp_path / path.relative_to(corpus)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest(), path.name


def test_latents_drift_slowly_within_the_range():
    rng = np.random.default_rng(0)
    latents = [draw_latent(rng, 40) for _ in range(300)]
    values = np.concatenate(latents)
    assert ((values > 0) & (values < 1)).all()
    steps = np.concatenate([np.diff(latent, axis=0) for latent in latents])
    # Within a session they move; from one utterance to the next, little.
    assert values.std() > 4 * steps.std()
    assert np.mean([latent.std(axis=0) for latent in latents]) > 1.5 * steps.std()


def test_what_is_felt_is_heard():
    """Excited is louder and faster than calm; the noise of single utterances averages out."""
    rng = np.random.default_rng(0)
    voice = CORPUS_VOICES[0]
    heard = {}
    for arousal in (0.15, 0.85):
        spoken = [express(rng, "I can wait for a moment.", voice, np.array([0.5, arousal]))[0] for _ in range(25)]
        heard[arousal] = np.mean([level(samples) for samples in spoken]), np.mean([len(samples) for samples in spoken])
    assert heard[0.85][0] > 1.5 * heard[0.15][0]
    assert heard[0.85][1] < 0.9 * heard[0.15][1]


def test_recordings_are_telephone_calls_with_the_truth_beside_them(calls):
    truth = [json.loads(line) for line in (calls / "truth.jsonl").read_text().splitlines()]
    table = [json.loads(line) for line in (calls / "calls.jsonl").read_text().splitlines()]
    paths = sorted((calls / "recordings").iterdir())
    assert [path.name for path in paths] == [row["path"] for row in table] == ["call-1.wav", "call-2.wav"]
    assert {row["role_ch0"] for row in table} == {"customer"}
    corpus_speakers = {voice.speaker_id for voice in CORPUS_VOICES}
    assert not corpus_speakers & {row["speaker_id"] for row in truth}
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (8_000, 2, "ULAW")
        samples, sampling_rate = soundfile.read(path, dtype="float32")
        inside = np.zeros(samples.shape, bool)
        for row in (row for row in truth if row["session_id"] == path.name):
            start, end = int(row["start_s"] * sampling_rate), int(row["end_s"] * sampling_rate)
            inside[start:end, row["channel"]] = True
            assert level(samples[start:end, row["channel"]]) > 0.005
        assert level(samples[~inside]) < 1e-3
        assert inside[:, 0].sum() > inside[:, 1].sum() > 0
