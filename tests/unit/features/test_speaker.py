import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from tiny_models import SPEAKERS, write_speaker_model

from vaemo.errors import ExtractorError
from vaemo.features import Extractor
from vaemo.features.base import fingerprint_of
from vaemo.features.speaker import SpeakerEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    return {kind: write_speaker_model(folder / kind, kind) for kind in SPEAKERS}


def noise(*seconds):
    rng = np.random.default_rng(0)
    return [rng.normal(size=int(s * 16000)).astype(np.float32) * 0.1 for s in seconds]


@pytest.mark.parametrize("kind", SPEAKERS)
def test_vectors_have_unit_length_and_depend_on_their_utterance_alone(models, kind):
    encoder = SpeakerEncoder(str(models[kind]))
    assert isinstance(encoder, Extractor)
    assert encoder.dim == SPEAKERS[kind][1]
    utterances = noise(0.1, 0.7, 3.0, 65.0)
    together = encoder(utterances)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([encoder([samples]) for samples in utterances]), together)
    assert np.abs(together[1] - together[2]).max() > 1e-3


@pytest.mark.parametrize("kind", SPEAKERS)
def test_vectors_are_those_of_speechbrain(models, kind):
    from hyperpyyaml import load_hyperpyyaml

    parts = load_hyperpyyaml((models[kind] / "hyperparams.yaml").read_text())
    parts["embedding_model"].load_state_dict(load_file(models[kind] / "embedding_model.safetensors"))
    model = parts["embedding_model"].eval()
    samples = noise(2.0)[0]
    with torch.no_grad():
        features = parts["mean_var_norm"](parts["compute_features"](torch.from_numpy(samples)[None]), torch.ones(1))
        expected = model(features, torch.ones(1)).reshape(-1).numpy()
    found = SpeakerEncoder(str(models[kind]))([samples])[0]
    # SpeechBrain's x-vectors carry noise of 1e-5 in their statistics.
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-3)


def test_the_callers_random_numbers_are_left_alone(models):
    encoder = SpeakerEncoder(str(models["xvector"]))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    encoder(noise(0.5))
    torch.testing.assert_close(torch.rand(3), expected)


def test_too_little_is_nan(models):
    assert np.isnan(SpeakerEncoder(str(models["ecapa"]))(noise(0.05))).all()


def test_the_fingerprint_follows_weights_and_settings(models, tmp_path):
    base = SpeakerEncoder(str(models["ecapa"])).fingerprint
    assert SpeakerEncoder(str(write_speaker_model(tmp_path / "same", "ecapa"))).fingerprint == base
    assert SpeakerEncoder(str(write_speaker_model(tmp_path / "other", "ecapa", seed=1))).fingerprint != base


def test_a_published_pickle_gives_the_same_and_is_not_unpickled_here(models, tmp_path, monkeypatch):
    folder = write_speaker_model(tmp_path / "published", "ecapa", published=True)
    monkeypatch.setattr(torch, "load", None)
    utterances = noise(0.7, 1.3)
    expected = SpeakerEncoder(str(models["ecapa"]))
    found = SpeakerEncoder(str(folder))
    np.testing.assert_array_equal(found(utterances), expected(utterances))
    # That of the file as it stands: stores that were made with it stay as they are.
    weights = hashlib.sha256((folder / "embedding_model.ckpt").read_bytes()).hexdigest()
    settings = (folder / "hyperparams.yaml").read_text()
    assert found.fingerprint == fingerprint_of(settings=settings, weights=weights) != expected.fingerprint


@pytest.mark.parametrize(
    "tag",
    ["!apply:os.system", "!new:os.popen", "!name:subprocess.run", "!module:os", "!include:other.yaml",
     "!new:speechbrain.utils.superpowers.run_shell", "!!python/object/apply:os.system"],
)  # fmt: skip
def test_a_checkpoint_cannot_bring_code(models, tmp_path, tag):
    folder = write_speaker_model(tmp_path / "evil", "ecapa")
    text = (folder / "hyperparams.yaml").read_text()
    (folder / "hyperparams.yaml").write_text(f"{text}\nextra: {tag} ['touch {tmp_path}/ran']\n")
    with pytest.raises(ExtractorError, match=r"only layers of SpeechBrain and torch.nn are built"):
        SpeakerEncoder(str(folder))
    assert not (tmp_path / "ran").exists()


def test_pickled_code_in_weights_is_refused(tmp_path):
    folder = write_speaker_model(tmp_path / "evil", "ecapa", published=True)
    torch.save({"weight": _Evil()}, folder / "embedding_model.ckpt")
    with pytest.raises(ExtractorError, match="does not hold this encoder's weights, and nothing else"):
        SpeakerEncoder(str(folder))


class _Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_what_is_no_encoder_is_refused(tmp_path):
    folder = write_speaker_model(tmp_path / "a", "ecapa")
    with pytest.raises(ExtractorError, match=r"features.speaker is 'no/where', and no model can be loaded"):
        SpeakerEncoder("no/where")
    text = (folder / "hyperparams.yaml").read_text()
    (folder / "hyperparams.yaml").write_text(text.replace("sample_rate: 16000", "sample_rate: 8000"))
    with pytest.raises(ExtractorError, match="was made for 8000 Hz"):
        SpeakerEncoder(str(folder))
    (folder / "hyperparams.yaml").write_text(text.replace("norm_type: sentence", "norm_type: global"))
    with pytest.raises(ExtractorError, match="normalises by 'global'"):
        SpeakerEncoder(str(folder))
    (folder / "hyperparams.yaml").write_text("sample_rate: 16000\n")
    with pytest.raises(ExtractorError, match="has no 'compute_features'"):
        SpeakerEncoder(str(folder))
    (folder / "embedding_model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ExtractorError, match=r"which has no embedding_model.ckpt.*`python -m vaemo.features.convert .*a --out FOLDER`"
    ):
        SpeakerEncoder(str(folder))
    (folder / "hyperparams.yaml").unlink()
    with pytest.raises(ExtractorError, match=r"which has no hyperparams.yaml"):
        SpeakerEncoder(str(folder))
    folder = write_speaker_model(tmp_path / "b", "ecapa")
    (folder / "hyperparams.yaml").write_bytes(b"n_mels: \xe9")
    with pytest.raises(ExtractorError, match=r"b/hyperparams.yaml is not UTF-8 text"):
        SpeakerEncoder(str(folder))
    write_speaker_model(tmp_path / "b", "ecapa")
    for content in (b"version https://git-lfs.github.com/spec/v1", save({"x": torch.zeros(1)})):
        (folder / "embedding_model.safetensors").write_bytes(content)
        with pytest.raises(ExtractorError, match=r"embedding_model.safetensors does not hold this encoder's weights"):
            SpeakerEncoder(str(folder))
