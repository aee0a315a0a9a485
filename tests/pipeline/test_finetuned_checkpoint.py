"""A checkpoint with a speech encoder of its own: what is scored with it, what is extracted, and what it is made of."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scoring_cases
import soundfile
import torch
from finetune_cases import LEARNED, RATE, Heard, extract, write_encoder
from safetensors.torch import load_file

from vaemo.config import Config
from vaemo.data.windows import PackedSessions
from vaemo.errors import FeatureMismatchError, ReadCheckpointError
from vaemo.features.speech import SpeechEncoder
from vaemo.metrics import ccc
from vaemo.model.checkpoint import load_checkpoint
from vaemo.stream import Stream
from vaemo.training.replay import replay
from vaemo.training.run_folder import keep, origin_of

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SINGLE = 1e-5
"""Rounding of float32 through an encoder and a session."""


@pytest.fixture(scope="module", params=["mean", "learned", "layer"])
def tuned(request, tmp_path_factory):
    """A corpus, the checkpoint of an encoder trained on it, the trainer, and its config."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, made, asked = {
        "mean": ("wav2vec2", {}, {}),
        "learned": ("wavlm", {"speech_layer": "mean"}, LEARNED["features"]),
        "layer": ("wav2vec2", {"speech_layer": 2}, {}),
    }[request.param]
    corpus = Heard(folder, kind, features=made)
    config = corpus.config(features=asked, encoder_lr=1e-2)
    trainer = corpus.trainer(config)
    list(trainer)
    keep(str(folder), trainer, corpus.store, origin_of(corpus.store, config, "data"))
    return corpus, str(folder / "best"), trainer


def pushed(corpus, checkpoint):
    """Predictions of a stream for each utterance of the corpus, (U, 2), and the utterances' ids."""
    rows = [json.loads(line) for line in Path(corpus.manifest).read_text().splitlines()]
    found, stream, session_id = [], None, None
    for row in rows:
        if row["session_id"] != session_id:
            session_id, stream = row["session_id"], Stream(checkpoint)
            recording = soundfile.read(Path(corpus.manifest).parent / row["audio_path"], dtype="float32")[0]
        samples = recording[round(row["start_s"] * RATE) : round(row["end_s"] * RATE)]
        prediction = stream.push(samples, RATE)
        found.append([prediction.valence, prediction.arousal])
    return np.array(found), [row["utt_id"] for row in rows]


def scored(rows):
    return np.column_stack([rows[name].to_numpy() for name in ("valence", "arousal")])


def in_order(rows, utt_ids):
    place = {utt_id: row for row, utt_id in enumerate(rows["utt_id"].to_pylist())}
    return scored(rows)[[place[utt_id] for utt_id in utt_ids]]


def test_recordings_the_stream_and_a_replay_by_hand_hear_the_trained_encoder(tuned, tmp_path):
    corpus, best, trainer = tuned
    checkpoint = load_checkpoint(best)
    assert checkpoint.features.speech == f"{best}/encoder"
    streamed, utt_ids = pushed(corpus, best)
    rows = scoring_cases.run(corpus.manifest, best, tmp_path / "scores")
    np.testing.assert_allclose(in_order(rows, utt_ids), streamed, atol=SINGLE)

    # By hand: the network in memory, never written, and the model beside it.
    _, dev = corpus.sessions(trainer.config)
    packed = trainer.end_to_end.embed_sessions(PackedSessions.of(dev), trainer.kept_network, trainer.group)
    replayed = replay(trainer.kept, packed, window=4).prediction
    np.testing.assert_allclose(in_order(rows, packed.utt_ids), replayed, atol=SINGLE)
    measured = ccc(replayed, packed.labels.numpy())
    assert trainer.history[-1]["dev_ccc_avg"] == pytest.approx(measured.mean(), abs=SINGLE)
    frozen = replay(trainer.kept, PackedSessions.of(dev), window=4).prediction
    assert np.abs(frozen - replayed).max() > 100 * SINGLE


def test_a_store_of_another_encoder_is_refused_and_one_of_this_encoder_is_scored(tuned, tmp_path):
    corpus, best, _ = tuned
    with pytest.raises(
        FeatureMismatchError, match=r"stream 'speech' of the store .*features.speech=CHECKPOINT/encoder"
    ):
        scoring_cases.run(corpus.store.path, best, tmp_path / "refused")

    features = load_checkpoint(best).features
    again = Config().replace({"features": dataclasses.asdict(features)})
    store = extract(corpus.manifest, tmp_path / "store", again)
    rows = scoring_cases.run(store.path, best, tmp_path / "scores")
    streamed, utt_ids = pushed(corpus, best)
    np.testing.assert_allclose(in_order(rows, utt_ids), streamed, atol=SINGLE)


def test_extraction_with_the_trained_encoder_does_not_depend_on_the_batch(tuned):
    corpus, best, trainer = tuned
    encoder = SpeechEncoder(load_checkpoint(best).features)
    samples = trainer.end_to_end.waveforms.read(corpus.sessions(trainer.config)[0][0].utt_ids)
    alone = np.concatenate([encoder([each]) for each in samples])
    assert np.abs(encoder(samples) - alone).max() < SINGLE * np.abs(alone).max()


def test_layers_behind_the_one_that_is_pooled_are_kept_as_they_were(tuned):
    corpus, best, trainer = tuned
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (corpus.encoder, f"{best}/encoder"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    behind = set()
    if trainer.end_to_end.features.speech_layer == 2:
        behind = {name for name in before if name.startswith(("encoder.layers.2.", "encoder.layer_norm."))}
    assert behind <= same
    assert {name for name in same - behind if "k_proj.bias" not in name} == {"masked_spec_embed"}


def test_where_a_checkpoint_lies_decides_nothing(tuned, tmp_path):
    corpus, best, _ = tuned
    scoring_cases.run(corpus.manifest, best, tmp_path / "scores")
    before = scoring_cases.written(tmp_path / "scores" / "utterances")
    moved = shutil.copytree(best, tmp_path / "moved")
    assert load_checkpoint(moved).fingerprint == load_checkpoint(best).fingerprint
    scoring_cases.run(corpus.manifest, str(moved), tmp_path / "scores")
    assert scoring_cases.written(tmp_path / "scores" / "utterances") == before


def test_a_checkpoint_says_where_its_encoder_comes_from(tuned):
    corpus, best, _ = tuned
    provenance = load_checkpoint(best).provenance
    assert provenance["encoder"]["name"] == corpus.encoder
    assert provenance["encoder"]["trained"] == "all"
    assert provenance["encoder"]["fingerprint"] == corpus.store.info["extractors"]["speech"]["fingerprint"]
    assert provenance["feature_fingerprints"]["speech"] == SpeechEncoder(load_checkpoint(best).features).fingerprint


def test_an_encoder_of_another_checkpoint_is_noticed(tuned, tmp_path):
    moved = Path(shutil.copytree(tuned[1], tmp_path / "moved"))
    write_encoder(tmp_path / "other", "wav2vec2", num_hidden_layers=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", moved / "encoder")
    with pytest.raises(ReadCheckpointError, match="holds files of different checkpoints"):
        load_checkpoint(moved)
    (moved / "encoder" / "model.safetensors").unlink()
    with pytest.raises(ReadCheckpointError, match=r"not a whole checkpoint: encoder/model.safetensors is not there"):
        load_checkpoint(moved)
