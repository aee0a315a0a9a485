import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, write_speech_model

from vaemo import files
from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError, UsageError
from vaemo.features import Extractor
from vaemo.features.speech import SpeechEncoder
from vaemo.features.speech_network import POOLING, AttentionPooling

# float32 through three layers; the contract.
INVARIANT = 1e-5
SECONDS = (0.1, 0.35, 0.8, 1.9, 3.0, 5.5, 7.0, 12.0, 20.0)


def encoder_of(folder, *, batch_s=60.0, **fields):
    return SpeechEncoder(FeatureConfig(speech=str(folder), **fields), batch_s=batch_s)


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
    encoder = encoder_of(models[kind], batch_s=60.0)
    assert isinstance(encoder, Extractor)
    alone = np.concatenate([encoder([samples]) for samples in utterances])
    assert alone.shape == (len(utterances), encoder.dim)
    assert relative(encoder(utterances), alone) < INVARIANT
    shuffled = np.random.default_rng(1).permutation(len(utterances))
    small = encoder_of(models[kind], batch_s=21.0)
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
    found = encoder_of(models[kind], speech_layer=layer)(utterances)
    assert relative(found, np.stack(expected)) < INVARIANT


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_layers_is_that_of_their_means(models, utterances, kind):
    layers = [encoder_of(models[kind], speech_layer=layer)(utterances) for layer in (0, 1, 2, -1)]
    assert relative(encoder_of(models[kind], speech_layer="mean")(utterances), np.mean(layers, axis=0)) < INVARIANT


def trained_pooling(folder, model, *, layer, pooling, seed=0):
    """The model in another folder, with a pooling beside it that was not trained but is no plain mean either."""
    network = encoder_of(model).network(layer=layer, pooling=pooling)
    torch.manual_seed(seed)
    for parameter in network.pooling_parameters().values():
        torch.nn.init.normal_(parameter, std=2.0)
    return keep(folder, encoder_of(model), network)


def keep(folder, encoder, network):
    """What a checkpoint would hold of a network, in a folder."""
    held, _ = encoder.kept(network, encoder.config)
    for name, content in held.items():
        files.write_whole(folder / name, content)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_over_layers_and_frames(models, utterances, kind, tmp_path):
    folder = trained_pooling(tmp_path / "tuned", models[kind], layer="weighted", pooling="attention")
    encoder = encoder_of(folder, speech_layer="weighted", speech_pooling="attention")
    found = encoder(utterances)
    assert relative(np.concatenate([encoder([samples]) for samples in utterances]), found) < INVARIANT

    pooling = load_file(f"{folder}/{POOLING}")
    plain = encoder_of(models[kind]).network()
    for samples, vector in zip(utterances, found, strict=True):
        states = []
        for layer in (0, 1, 2, 3):
            network = encoder_of(models[kind]).network(layer=layer)
            # Frames of the layer, before any pooling: attention that is handed them gives them back.
            network.attention = lambda hidden, valid: hidden
            states.append(network([torch.from_numpy(encoder.prepared(samples))])[0])
        hidden = torch.einsum("n,nfh->fh", pooling["layer_scores"].softmax(0), torch.stack(states))
        inner = torch.tanh(hidden @ pooling["attention.hidden.weight"].T + pooling["attention.hidden.bias"])
        weights = (inner @ pooling["attention.score.weight"][0]).softmax(0)
        assert relative(vector, (weights @ hidden).numpy()) < INVARIANT
    assert plain.pooling_parameters() == {}


def test_attention_ignores_padding_and_begins_as_the_mean():
    torch.manual_seed(0)
    attention, hidden = AttentionPooling(6), torch.randn(2, 5, 6)
    valid = torch.arange(5) < torch.tensor([[5], [3]])
    torch.testing.assert_close(attention(hidden, valid)[1], hidden[1, :3].mean(0))
    torch.nn.init.normal_(attention.score.weight)
    changed = hidden.clone()
    changed[1, 3:] = 1e3
    assert torch.equal(attention(changed, valid), attention(hidden, valid))
    assert not torch.allclose(attention(hidden, valid)[1], hidden[1, :3].mean(0))


def test_what_is_saved_is_the_same_encoder(models, utterances, tmp_path):
    for layer in (1, -1):
        encoder = encoder_of(models["wav2vec2"], speech_layer=layer)
        network = encoder.network()
        with torch.no_grad():
            network.encoder.feature_projection.projection.weight *= 1.5
        saved = keep(tmp_path / "saved", encoder, network)
        assert encoder_of(saved, speech_layer=layer).fingerprint == encoder.kept(network, encoder.config)[1]
        found = encoder_of(saved, speech_layer=layer)(utterances)
        with torch.no_grad():
            assert relative(found, encoder.embed(utterances, network).numpy()) < INVARIANT
        # All layers are there, those too that this one does not use.
        assert relative(encoder_of(tmp_path / "saved", speech_layer=2)(utterances), found) > 0.01
        assert not (tmp_path / "saved" / POOLING).exists()


def test_a_folder_at_a_uri_is_the_same_encoder(models, utterances, tmp_path):
    folder = trained_pooling(tmp_path / "tuned", models["hubert"], layer=None, pooling="attention")
    for path in files.list_files(folder):
        files.write_whole(files.join("memory://bucket/run/encoder", path.rpartition("/")[2]), files.read_bytes(path))
    local, remote = (encoder_of(where, speech_pooling="attention") for where in (folder, "memory://bucket/run/encoder"))
    assert remote.fingerprint == local.fingerprint
    assert np.array_equal(remote(utterances[:3]), local(utterances[:3]))


def test_long_utterances_are_cut_with_overlap_and_pooled_by_duration(models, utterances):
    encoder = encoder_of(models["wavlm"], max_utterance_s=5.0)
    parts = list(encoder.cut(utterances[-1]))
    assert {len(part) for part in parts} == {int(4.8 * 16000)}
    assert sum(map(len, parts)) - 4 * 16000 == len(utterances[-1])
    whole = encoder([utterances[-1]])[0]
    pooled = np.mean([encoder_of(models["wavlm"])([part])[0] for part in parts], axis=0)
    assert relative(whole, pooled) < INVARIANT


def test_parts_of_every_length_cover_the_utterance(models):
    encoder = encoder_of(models["wavlm"], max_utterance_s=3.0)
    for n in np.random.default_rng(2).integers(48_001, 400_000, 50):
        samples = np.arange(n, dtype=np.float32)
        parts = list(encoder.cut(samples))
        assert parts[0][0] == 0
        assert parts[-1][-1] == n - 1
        assert max(map(len, parts)) <= 48_000
        assert all(a[-1] >= b[0] for a, b in itertools.pairwise(parts))


def test_batches_hold_at_most_their_seconds_padding_included(models, utterances):
    encoder = encoder_of(models["wavlm"], batch_s=25.0)
    batches = list(encoder.batches(list(enumerate(utterances))))
    assert sorted(row for batch in batches for row, _ in batch) == list(range(len(utterances)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(part) for _, part in batch) <= 25.0 * 16000


def test_less_than_a_frame_is_nan(models, utterances):
    found = encoder_of(models["hubert"])([utterances[0][:399], utterances[0]])
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    assert encoder_of(models["hubert"])([]).shape == (0, 32)


def test_the_fingerprint_follows_what_vectors_depend_on(models, tmp_path):
    base = encoder_of(models["wavlm"])
    assert encoder_of(models["wavlm"], batch_s=7.0).fingerprint == base.fingerprint
    moved = write_speech_model(tmp_path / "moved", "wavlm")
    assert encoder_of(moved).fingerprint == base.fingerprint
    others = [
        encoder_of(models["wavlm"], speech_layer=1),
        encoder_of(models["wavlm"], max_utterance_s=9.0),
        encoder_of(write_speech_model(tmp_path / "other", "wavlm", seed=1)),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_fingerprint_follows_files_that_are_replaced_and_pooling(models, tmp_path):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    before = encoder_of(folder).fingerprint
    write_speech_model(folder, "wavlm", seed=5)
    assert encoder_of(folder).fingerprint != before
    pooled = [trained_pooling(tmp_path / f"p{n}", folder, layer=None, pooling="attention", seed=n) for n in (0, 1)]
    first, second = (encoder_of(each, speech_pooling="attention").fingerprint for each in pooled)
    assert len({first, second, encoder_of(folder).fingerprint}) == 3


@pytest.mark.parametrize(
    ("layer", "pooling", "asked", "text"),
    [
        (None, None, {"speech_pooling": "attention"}, r"speech_pooling is 'attention', which .* was not trained with"),
        (None, None, {"speech_layer": "weighted"}, r"speech_layer is 'weighted', which .* was not trained with"),
        (None, "attention", {}, r"was trained with features.speech_pooling 'attention', and the config says 'mean'"),
        ("weighted", None, {}, r"was trained with features.speech_layer 'weighted', and the config says '-1'"),
    ],
)
def test_a_pooling_that_was_trained_and_no_other(models, tmp_path, layer, pooling, asked, text):
    folder = trained_pooling(tmp_path / "a", models["wavlm"], layer=layer, pooling=pooling)
    with pytest.raises(ExtractorError, match=text):
        encoder_of(folder, **asked)


def test_a_pooling_of_another_encoder_or_none(models, tmp_path):
    folder = trained_pooling(tmp_path / "a", models["wavlm"], layer=None, pooling="attention")
    held = load_file(f"{folder}/{POOLING}")
    save_file({**held, "attention.hidden.weight": torch.zeros(128, 7)}, f"{folder}/{POOLING}")
    with pytest.raises(ExtractorError, match=r"attention.hidden.weight of shape \(128, 7\), .* takes \(128, 32\)"):
        encoder_of(folder, speech_pooling="attention").network()
    (tmp_path / "a" / POOLING).write_bytes(b"x")
    with pytest.raises(ExtractorError, match=r"pooling.safetensors cannot be read"):
        encoder_of(folder, speech_pooling="attention")


def test_more_layers_than_are_computed_cannot_be_trained(models):
    network = encoder_of(models["wav2vec2"]).network(layer=2)
    assert len(network.trainable(2)) == 2 * 16
    with pytest.raises(UsageError, match=r"train.encoder_layers is 3; up to features.speech_layer the encoder has 2"):
        network.trainable(3)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(models, utterances, monkeypatch):
    # Without the code generator, which is the compiler's own affair and takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    encoder = encoder_of(models["wavlm"], speech_layer="mean")
    network = encoder.network()
    network.compile_layers()
    for some in (utterances[:4], utterances[2:5]):
        with torch.no_grad():
            assert relative(encoder.embed(some, network).numpy(), encoder(some)) < INVARIANT


@pytest.mark.gpu
def test_arithmetic_on_a_gpu(models, utterances):
    """fp16 keeps 11 bits of a number, bf16 8: through three layers, some of them are lost."""
    exact = encoder_of(models["wavlm"], speech_precision="fp32")(utterances)
    for precision, bound in (("fp16", 0.01), ("bf16", 0.05)):
        found = encoder_of(models["wavlm"], speech_precision=precision)(utterances)
        assert 0 < relative(found, exact) < bound
        compiled = encoder_of(models["wavlm"], speech_precision=precision, speech_compile=True)(utterances)
        assert relative(compiled, found) < bound


def test_what_is_no_encoder_is_refused(models, tmp_path):
    with pytest.raises(ExtractorError, match=r"features.speech is 'no/where', and no model can be loaded"):
        encoder_of("no/where")
    with pytest.raises(ExtractorError, match=r"speech_layer is 9, and .* has 3 layers; give 0 to 3"):
        encoder_of(models["wavlm"], speech_layer=9)
    folder = write_speech_model(tmp_path / "run" / "checkpoint-500", "wavlm")
    with pytest.raises(ExtractorError, match=r"no model can be loaded .* There is one in .*run/checkpoint-500\. Give"):
        encoder_of(tmp_path / "run")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ExtractorError, match=r"has no preprocessor_config.json, nor a processor_config.json that says"):
        encoder_of(folder)
    for text in ('{"processor_class": "Wav2Vec2Processor"}', '{"feature_extractor": null}'):
        (folder / "processor_config.json").write_text(text)
        with pytest.raises(ExtractorError, match=r"has no preprocessor_config.json, nor a processor_config.json that"):
            encoder_of(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "and no model can be loaded from there"),
        ("config.json", b"[]", "and no model can be loaded from there"),
        ("config.json", b'{"model_type": "wavlm", "hidden_size": "many"}', "and no model can be loaded from there"),
        ("preprocessor_config.json", b"{", "/preprocessor_config.json is not JSON .*; copy the folder again"),
        ("preprocessor_config.json", b"[]", "/preprocessor_config.json holds list, no settings"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "the weights of .* cannot be read"),
        ("model.safetensors", b"", "the weights of .* cannot be read"),
    ],
)
def test_a_file_that_is_damaged_is_named(tmp_path, name, content, says):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    (folder / name).write_bytes(content)
    with pytest.raises(ExtractorError, match=says) as refusal:
        encoder_of(folder)([np.zeros(16000, np.float32)])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_says_what_a_feature_extractor_said(models, tmp_path, kind):
    """Since transformers 5 a processor is saved as one file, which holds what its feature extractor does."""
    import transformers

    folder = tmp_path / "a"
    shutil.copytree(models[kind], folder)
    heard = transformers.AutoFeatureExtractor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json")
    transformers.Wav2Vec2Processor(heard, tokenizer).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    assert encoder_of(folder).fingerprint == encoder_of(models[kind]).fingerprint
    # A checkpoint holds it as a feature extractor's.
    kept = keep(tmp_path / "kept", encoder_of(folder), encoder_of(folder).network())
    assert encoder_of(kept)._normalize == heard.do_normalize


def in_parts(folder, model, below=""):
    """The encoder with its weights in three files."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / below).mkdir(exist_ok=True)
    places = {name: f"{below}model-{1 + n % 3:05d}-of-00003.safetensors" for n, name in enumerate(sorted(weights))}
    for part in set(places.values()):
        held = {name: weights[name] for name in weights if places[name] == part}
        save_file(held, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder, sorted(set(places.values()))


@pytest.mark.parametrize("below", ["", "parts/"])
def test_weights_in_parts(models, utterances, tmp_path, below):
    folder, parts = in_parts(tmp_path / "a", models["wavlm"], below)
    encoder = encoder_of(folder)
    assert np.array_equal(encoder(utterances[:2]), encoder_of(models["wavlm"])(utterances[:2]))
    for path in files.list_files(folder, recursive=True):
        files.write_whole(files.join("memory://parts", path[len(str(folder)) + 1 :]), files.read_bytes(path))
    assert encoder_of("memory://parts").fingerprint == encoder.fingerprint
    weights = load_file(folder / parts[1])
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / parts[1], metadata={"format": "pt"})
    assert encoder_of(folder).fingerprint != encoder.fingerprint
    (folder / parts[1]).unlink()
    with pytest.raises(
        ExtractorError, match=rf"has no {parts[1]} \(no such file\), which its model.safetensors.index.json"
    ):
        encoder_of(folder)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "/b"}}'],
)
def test_an_index_that_names_nothing_of_the_folder(models, tmp_path, index):
    folder, _ = in_parts(tmp_path / "a", models["wavlm"])
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        ExtractorError, match=r"a/model.safetensors.index.json (is not|holds|does not say).*; copy the fold"
    ):
        encoder_of(folder)


def test_other_models_and_other_rates_are_refused(tmp_path):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "sampling_rate": 8000}))
    with pytest.raises(ExtractorError, match="was made for 8000 Hz"):
        encoder_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ExtractorError, match="a model of type bert; wavlm, wav2vec2, hubert are offered"):
        encoder_of(folder)


def test_weights_that_are_not_whole_are_refused(tmp_path):
    folder = write_speech_model(tmp_path / "a", "hubert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExtractorError, match=r"has no weights for encoder.layers.1.attention.k_proj.weight"):
        encoder_of(folder)([np.zeros(16000, np.float32)])


def test_remote_code_is_never_run(tmp_path):
    folder = write_speech_model(tmp_path / "a", "wavlm")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n")
    with pytest.raises(ExtractorError, match="no model can be loaded from there"):
        encoder_of(folder)
    assert not (folder / "ran").exists()
