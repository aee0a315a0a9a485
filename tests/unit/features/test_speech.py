import itertools
import json

import numpy as np
import pytest
import torch
from tiny_models import KINDS, write_speech_model

from vaemo.errors import ExtractorError
from vaemo.features import Extractor
from vaemo.features.speech import SpeechEncoder

# float32 through three layers; the contract.
INVARIANT = 1e-5
SECONDS = (0.1, 0.35, 0.8, 1.9, 3.0, 5.5, 7.0, 12.0, 20.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    return {kind: str(write_speech_model(folder / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def utterances():
    rng = np.random.default_rng(0)
    # Each at another level and offset, which a normalisation over padding or over the batch would mix.
    return [
        (rng.normal(size=int(s * 16000)) * rng.uniform(0.02, 0.3) + rng.uniform(-0.1, 0.1)).astype(np.float32)
        for s in SECONDS
    ]


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_same_alone_and_in_any_batch(models, utterances, kind):
    encoder = SpeechEncoder(models[kind], batch_s=60.0)
    assert isinstance(encoder, Extractor)
    alone = np.concatenate([encoder([samples]) for samples in utterances])
    assert alone.shape == (len(utterances), encoder.dim)
    assert relative(encoder(utterances), alone) < INVARIANT
    shuffled = np.random.default_rng(1).permutation(len(utterances))
    small = SpeechEncoder(models[kind], batch_s=21.0)
    assert relative(small([utterances[i] for i in shuffled]), alone[shuffled]) < INVARIANT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_vectors_are_the_means_of_the_layers_that_transformers_computes(models, utterances, kind, layer):
    import transformers

    model = transformers.AutoModel.from_pretrained(models[kind]).eval()
    prepare = transformers.AutoFeatureExtractor.from_pretrained(models[kind])
    expected = []
    for samples in utterances:
        values = prepare(samples, sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            result = model(values, output_hidden_states=True)
        hidden = result.last_hidden_state if layer == -1 else result.hidden_states[layer]
        expected.append(hidden[0].mean(0).numpy())
    found = SpeechEncoder(models[kind], layer=layer)(utterances)
    assert relative(found, np.stack(expected)) < INVARIANT


def test_long_utterances_are_cut_with_overlap_and_pooled_by_duration(models, utterances):
    encoder = SpeechEncoder(models["wavlm"], max_utterance_s=5.0)
    parts = list(encoder._cut(utterances[-1]))
    assert {len(part) for part in parts} == {int(4.8 * 16000)}
    assert sum(map(len, parts)) - 4 * 16000 == len(utterances[-1])
    whole = encoder([utterances[-1]])[0]
    pooled = np.mean([SpeechEncoder(models["wavlm"])([part])[0] for part in parts], axis=0)
    assert relative(whole, pooled) < INVARIANT


def test_parts_of_every_length_cover_the_utterance(models):
    encoder = SpeechEncoder(models["wavlm"], max_utterance_s=3.0)
    for n in np.random.default_rng(2).integers(48_001, 400_000, 50):
        samples = np.arange(n, dtype=np.float32)
        parts = list(encoder._cut(samples))
        assert parts[0][0] == 0
        assert parts[-1][-1] == n - 1
        assert max(map(len, parts)) <= 48_000
        assert all(a[-1] >= b[0] for a, b in itertools.pairwise(parts))


def test_batches_hold_at_most_their_seconds_padding_included(models, utterances):
    encoder = SpeechEncoder(models["wavlm"], batch_s=25.0)
    batches = list(encoder._batches(list(enumerate(utterances))))
    assert sorted(row for batch in batches for row, _ in batch) == list(range(len(utterances)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(part) for _, part in batch) <= 25.0 * 16000


def test_less_than_a_frame_is_nan(models, utterances):
    found = SpeechEncoder(models["hubert"])([utterances[0][:399], utterances[0]])
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    assert SpeechEncoder(models["hubert"])([]).shape == (0, 32)


def test_the_fingerprint_follows_what_vectors_depend_on(models, tmp_path):
    base = SpeechEncoder(models["wavlm"])
    assert SpeechEncoder(models["wavlm"], batch_s=7.0).fingerprint == base.fingerprint
    moved = write_speech_model(tmp_path / "moved", "wavlm")
    assert SpeechEncoder(str(moved)).fingerprint == base.fingerprint
    others = [
        SpeechEncoder(models["wavlm"], layer=1),
        SpeechEncoder(models["wavlm"], max_utterance_s=9.0),
        SpeechEncoder(str(write_speech_model(tmp_path / "other", "wavlm", seed=1))),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_what_is_no_encoder_is_refused(models, tmp_path):
    with pytest.raises(ExtractorError, match=r"features.speech is 'no/where', and no model can be loaded"):
        SpeechEncoder("no/where")
    with pytest.raises(ExtractorError, match=r"speech_layer is 9, and .* has 3 layers; give 0 to 3"):
        SpeechEncoder(models["wavlm"], layer=9)
    folder = write_speech_model(tmp_path / "a", "wavlm")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ExtractorError, match=r"has no model.safetensors"):
        SpeechEncoder(str(folder))
    folder = write_speech_model(tmp_path / "b", "wavlm")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ExtractorError, match=r"has no preprocessor_config.json"):
        SpeechEncoder(str(folder))


def test_other_models_and_other_rates_are_refused(tmp_path):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "sampling_rate": 8000}))
    with pytest.raises(ExtractorError, match="was made for 8000 Hz"):
        SpeechEncoder(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ExtractorError, match="a model of type bert; wavlm, wav2vec2, hubert are offered"):
        SpeechEncoder(str(folder))


def test_weights_that_are_not_whole_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_speech_model(tmp_path / "a", "hubert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExtractorError, match=r"has no weights for encoder.layers.1.attention.k_proj.weight"):
        SpeechEncoder(str(folder))([np.zeros(16000, np.float32)])


def test_remote_code_is_never_run(tmp_path):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n")
    with pytest.raises(ExtractorError, match="no model can be loaded from there"):
        SpeechEncoder(str(folder))
    assert not (folder / "ran").exists()
