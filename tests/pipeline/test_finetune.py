"""The speech encoder trained with the session model: what learns, what is repeated exactly, kept, and refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_cases import LEARNED, Heard, write_encoder
from training_cases import comparable, run_together, train

from vaemo.errors import FeatureMismatchError, ReadManifestError, UsageError
from vaemo.training.run_folder import restore_state, save_state
from vaemo.training.trainer import Trainer
from vaemo.training.waveforms import Waveforms, ahead

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SINGLE = 1e-5
"""Rounding of float32 through an encoder and a session."""
CHECKPOINTING = 1e-6
"""The same operations, done twice."""
FLOAT64 = 1e-9
"""Sums in another order, through an epoch in float64."""

KINDS = ("wav2vec2", "wavlm")


@pytest.fixture(scope="module", params=KINDS)
def heard(request, tmp_path_factory):
    """A corpus and its store, whose speech stream is the mean over the layers of a tiny encoder."""
    return Heard(tmp_path_factory.mktemp(request.param), request.param, features={"speech_layer": "mean"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same of the encoder's last layer."""
    return Heard(tmp_path_factory.mktemp("plain"))


# -- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_sessions"), [("wav2vec2", 24), pytest.param("wavlm", 32, marks=pytest.mark.slow)])
def test_what_the_pooled_features_hide_is_learned_end_to_end_alone(tmp_path, kind, n_sessions):
    corpus = Heard(tmp_path, kind, sessions=(n_sessions, 10), lengths=(4, 8))
    base = corpus.config(
        model={"updater": "none", "head_hidden": 32, "dropout": 0.0},
        lanes=8, window=8, weight_averaging=0.0, feature_noise=0.0, weight_decay=0.1,
    )  # fmt: skip
    frozen = list(corpus.trainer(base.replace({"train": {"encoder": "frozen", "epochs": 40}})))
    tuned = list(corpus.trainer(base.replace({"train": {"encoder_lr": 1e-2, "epochs": 7}})))
    assert tuned[-1]["dev_ccc_avg"] > max(line["dev_ccc_avg"] for line in frozen) + 0.3


def test_training_starts_from_the_features_of_the_store(tmp_path):
    long = {"audio": {"simulate_telephone": True}, "lengths": (4, 5)}
    corpus = Heard(tmp_path, "wavlm", features={"speech_layer": "mean"}, **long)
    for features in ({}, *LEARNED.values()):
        config = corpus.config(features=features)
        end_to_end = corpus.end_to_end(config)
        for session in corpus.sessions(config)[0]:
            samples = end_to_end.waveforms.read(session.utt_ids)
            found = end_to_end.extractor.embed(samples, end_to_end.network).numpy()
            np.testing.assert_allclose(found, session.streams["speech"], atol=SINGLE * np.abs(found).max())


def touched(heard, config):
    """Names of the encoder's parameters that an optimiser step moves; those with a gradient must be the same."""
    trainer = heard.trainer(config)
    network = trainer.end_to_end.network
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    trainer.train_epoch(0)
    assert {name for name, value in network.named_parameters() if value.grad is not None} == {
        name for name, value in network.named_parameters() if value.requires_grad
    }
    return {name for name, value in network.named_parameters() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_reach_exactly_the_last_layers(heard, k):
    names = dict(heard.end_to_end(heard.config()).network.named_parameters())
    last = {name for name in names if any(f"encoder.encoder.layers.{n}." in name for n in range(3 - k, 3))}
    if "wav2vec2" in heard.encoder:
        # A stable layer norm stands behind the last layer.
        last |= {f"encoder.encoder.layer_norm.{name}" for name in ("weight", "bias")}
    # A bias of keys adds the same to every score of a query: its gradient is rounding, or none.
    moved = touched(heard, heard.config(encoder="last_k", encoder_layers=k))
    assert moved <= last
    assert {name for name in last if "k_proj.bias" not in name} <= moved


def test_gradients_reach_the_whole_encoder_and_its_pooling(heard):
    config = heard.config(**LEARNED)
    names = set(dict(heard.end_to_end(config).network.named_parameters()))
    assert {"layer_scores", "attention.score.weight"} <= names
    moved = touched(heard, config)
    assert {name for name in names - moved if "k_proj.bias" not in name} == {"encoder.masked_spec_embed"}


def test_the_encoder_learns_at_its_own_rate(heard):
    trainer = heard.trainer(heard.config(**LEARNED, encoder_lr=7e-4, warmup_fraction=0.0))
    trainer.train_epoch(0)
    groups = trainer.optimizer.param_groups
    factor = groups[0]["lr"] / 3e-3
    assert [group["lr"] / factor for group in groups] == pytest.approx([3e-3, 3e-3, 7e-4, 3e-3])
    assert [group["weight_decay"] for group in groups[2:]] == [0.0, 0.0]


# -- what is repeated exactly ----------------------------------------------------------------------------------------


def test_until_it_is_unfrozen_the_encoder_stands_still_and_no_audio_is_read(heard, monkeypatch):
    frozen = next(iter(heard.trainer(heard.config(encoder="frozen"))))
    trainer = heard.trainer(heard.config(encoder_from_epoch=1))
    before = {name: value.clone() for name, value in trainer.end_to_end.network.state_dict().items()}
    epochs = iter(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(Waveforms, "read", lambda *_: pytest.fail("audio was read"))
        assert comparable([next(epochs)]) == comparable([frozen])
    assert trainer.kept_encoder() is None
    for name, value in trainer.end_to_end.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    next(epochs)
    assert trainer.kept_encoder() is not None
    assert not torch.equal(
        trainer.end_to_end.network.state_dict()["encoder.encoder.layers.0.attention.v_proj.weight"],
        before["encoder.encoder.layers.0.attention.v_proj.weight"],
    )


def test_checkpointing_changes_nothing(heard):
    config = heard.config(**LEARNED, epochs=1)
    ended = []
    for checkpointing in (True, False):
        trainer = heard.trainer(config.replace({"train": {"encoder_checkpointing": checkpointing}}))
        list(trainer)
        ended.append(trainer.tensors())
    for name, tensor in ended[0].items():
        torch.testing.assert_close(ended[1][name], tensor, atol=CHECKPOINTING, rtol=0)


def test_checkpointing_keeps_no_activations(heard):
    """Bytes that a backward pass would need: those of one pooled batch instead of the encoder's."""
    end_to_end = heard.end_to_end(heard.config())
    end_to_end.unfreeze()
    samples = end_to_end.waveforms.read(heard.sessions(heard.config())[0][0].utt_ids)
    kept = {}
    for checkpointing in (True, False):
        kept[checkpointing] = 0

        def pack(tensor, checkpointing=checkpointing):
            kept[checkpointing] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            end_to_end.extractor.embed(samples, end_to_end.network, checkpointing=checkpointing)
    assert kept[True] < 0.1 * kept[False]


@pytest.mark.parametrize("heard", ["wavlm"], indirect=True)
def test_workers_equal_one(heard):
    config = heard.config(**LEARNED, dtype="float64", epochs=1)
    data = heard.sessions(config)
    (alone,) = run_together(1, config, *data, 1, lambda: heard.end_to_end(config))
    for trainer in run_together(2, config, *data, 1, lambda: heard.end_to_end(config)):
        for key, value in comparable(alone.history)[0].items():
            assert trainer.history[0][key] == pytest.approx(value, abs=FLOAT64), key
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(trainer.tensors()[name], tensor, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("heard", ["wavlm"], indirect=True)
@pytest.mark.parametrize("from_epoch", [1, 2])
def test_going_on_equals_never_having_stopped(heard, tmp_path, from_epoch):
    config = heard.config(**LEARNED, epochs=3, encoder_from_epoch=from_epoch)
    whole = heard.trainer(config)
    list(whole)
    stopped = heard.trainer(config)
    for line in stopped:
        if line["epoch"] == 2:
            break
    save_state(stopped, str(tmp_path), keep=1)
    resumed = heard.trainer(config)
    assert restore_state(resumed, str(tmp_path))
    list(resumed)
    assert comparable(resumed.history) == comparable(whole.history)
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_the_next_item_is_made_while_one_is_in_use():
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number
        raise OSError("the disk is gone")

    coming = ahead(items())
    assert [next(coming) for _ in range(4)] == made == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)
    assert list(ahead(iter([]))) == []


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "features", "encoder", "text"),
    [
        (False, {}, "all", r"train.encoder is 'all', and a feature store holds pooled features.* give --manifest"),
        (True, {}, "frozen", r"--manifest is there to train the encoder; set train.encoder to last_k or all"),
        (False, {"speech_pooling": "attention"}, "frozen", r"features.speech_pooling is 'attention', which is trained"),
        (False, {"speech_layer": "weighted"}, "frozen", r"features.speech_layer is 'weighted', which is trained end"),
        (True, {"speech_layer": "weighted"}, "all", r"the store holds that of layer -1. Extract it with .*=mean"),
    ],
)
def test_settings_that_contradict_each_other(plain, tmp_path, manifest, features, encoder, text):
    config = plain.config(features=features, encoder=encoder)
    with pytest.raises(UsageError, match=text):
        train(plain.store.path, str(tmp_path / "run"), config, manifest=plain.manifest if manifest else None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["speaker_norm", "session_norm"])
def test_what_an_encoder_said_before_it_changed_is_not_compared_with(plain, tmp_path, name):
    config = plain.config().replace({"model": {name: ["prosody", "speech"]}})
    with pytest.raises(UsageError, match=rf"model.{name} names speech, and train.encoder is 'all'"):
        train(plain.store.path, str(tmp_path / "run"), config, manifest=plain.manifest)
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_not_trained_by_those_who_have_no_audio(plain):
    config = plain.config()
    with pytest.raises(UsageError, match=r"train.encoder is 'all', and only jobs/train.py --manifest trains"):
        Trainer(*plain.sessions(config), config)


@pytest.mark.parametrize(
    ("info", "text"),
    [({"settings": {"features": {"speech": "logmel"}}}, "are logmel: there is no encoder"), ({}, "are unknown: there")],
)
def test_a_store_without_an_encoder(plain, info, text):
    store = dataclasses.replace(plain.store, info=info)
    with pytest.raises(UsageError, match=rf"train.encoder is 'all', and the speech features of .* {text} .*WavLM"):
        plain.end_to_end(plain.config(), store)


def test_more_layers_than_there_are(plain):
    with pytest.raises(UsageError, match=r"train.encoder_layers is 4; .* the encoder has 3 layers"):
        plain.end_to_end(plain.config(encoder="last_k", encoder_layers=4))


def test_an_encoder_that_is_no_longer_the_one_of_the_store(tmp_path):
    corpus = Heard(tmp_path)
    write_encoder(Path(corpus.encoder), "wav2vec2", seed=3)
    with pytest.raises(FeatureMismatchError, match=r"made by the encoder [0-9a-f]{12}, and .* is now [0-9a-f]{12}"):
        corpus.end_to_end(corpus.config())


def test_a_manifest_of_something_else(plain, tmp_path):
    lines = Path(plain.manifest).read_text().splitlines(keepends=True)
    other = tmp_path / "manifest.jsonl"
    other.write_text("".join(lines[:-2]))
    with pytest.raises(ReadManifestError, match=rf"lacks 2 of the store's {len(lines)} utterances, such as 's7-"):
        plain.end_to_end(plain.config(), manifest=str(other))


def test_audio_that_has_gone(tmp_path):
    corpus = Heard(tmp_path)
    trainer = corpus.trainer(corpus.config())
    Path(corpus.manifest).with_name("s2.wav").unlink()
    with pytest.raises(ReadManifestError, match=r"features of .*s2.wav from .* s on, .* cannot be read now: missing"):
        next(iter(trainer))
