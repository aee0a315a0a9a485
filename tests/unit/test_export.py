"""The exported step against the model's own, in onnxruntime; the example without PyTorch against a stream."""

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import UPDATERS, make_model
from speech_cases import sentence

from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.export import OneStep, export_onnx
from vaemo.features import describe, load_extractors
from vaemo.features.spectral import LogMel, LongTermSpectrum
from vaemo.model.checkpoint import load_checkpoint, save_checkpoint
from vaemo.model.film import FilmDelta
from vaemo.model.streams import Streams
from vaemo.stream import Stream

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

CLOSE = 1e-5
DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


def exported(folder, model, **options):
    """The checkpoint of a model, and a session of its exported step."""
    save_checkpoint(folder / "best", model)
    export_onnx(str(folder / "best"), str(folder / "model.onnx"), **options)
    return load_checkpoint(folder / "best"), onnxruntime.InferenceSession(str(folder / "model.onnx"))


def differs(model, session, lanes, steps, delta=None):
    """The largest difference of a prediction or of the memory over a session, fed with its own memory each."""
    draw = torch.Generator().manual_seed(lanes)
    step, state, worst = OneStep(model, film_delta=delta is not None), model.fresh_state(lanes), 0.0
    given = {name: tensor.numpy() for name, tensor in step.example(lanes).items()}
    names, added = [output.name for output in session.get_outputs()], None
    if delta is not None:
        speaker = torch.arange(lanes) % 4 - 1
        added = FilmDelta(delta, speaker)
        nobody = {name: torch.cat([torch.zeros_like(values[:1]), values]) for name, values in delta.items()}
        given |= {f"film.{name}": values[speaker + 1].numpy() for name, values in nobody.items()}
    for number in range(steps):
        features = {name: 2 * torch.randn(lanes, dim, generator=draw) for name, dim in model.dims.items()}
        for past in model.pasts:
            sums = number * torch.randn(lanes, model.dims[past.partition(".")[2]], generator=draw)
            features[past] = torch.cat([sums, torch.full((lanes, 1), float(number))], -1)
            given |= {f"{past}.sum": sums.numpy(), f"{past}.count": features[past][:, -1].numpy()}
        known = torch.rand(lanes, model.n_fed, generator=draw) < 0.2
        observed = torch.where(known, torch.rand(lanes, model.n_fed, generator=draw), torch.nan)
        with torch.inference_mode():
            prediction, state = model.step(Streams.of(features), state, observed=observed, film_delta=added)
        given |= {name: features[name].numpy() for name in model.dims} | {"observed": observed.numpy()}
        found = dict(zip(names, session.run(None, given), strict=True))
        pairs = [(found[target], prediction[:, place].numpy()) for place, target in enumerate(step.targets)]
        pairs += [(found[f"next.{name}"], getattr(state, name).numpy()) for name in step.fields]
        worst = max(worst, *(float(np.abs(np.subtract(one, two, dtype=np.float64)).max()) for one, two in pairs))
        given |= {f"state.{name}": found[f"next.{name}"] for name in step.fields}
    return worst


def in_float32(name):
    return make_model(*UPDATERS[name], dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.long
def test_a_step_is_the_models_with_pasts_and_deltas(tmp_path):
    checkpoint, session = exported(tmp_path, in_float32("mamba-2-layers"), film_delta=True)
    model = checkpoint.model
    assert model.pasts
    delta = {name: 0.3 * torch.randn(3, *values.shape) for name, values in model.film.state_dict().items()}
    for lanes, steps in ((1, 10), (3, 100), (64, 10)):
        assert differs(model, session, lanes, steps, delta) < CLOSE
    about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about["fingerprint"] == checkpoint.fingerprint
    assert about["targets"] == list(checkpoint.config.model.names)
    assert [value.name for value in session.get_outputs()][: len(about["targets"])] == about["targets"]
    assert {given.name: given.shape for given in session.get_inputs()} == about["inputs"]
    fresh = model.fresh_state(1).tensors()
    assert all((fresh[name.removeprefix("state.")] == value).all() for name, value in about["fresh"].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba-2-layers", "mamba-forgetful", "mamba2", "gru", "none"])
def test_a_session_of_500_utterances_is_the_models(tmp_path, name):
    checkpoint, session = exported(tmp_path, in_float32(name))
    for lanes in (1, 3, 64):
        assert differs(checkpoint.model, session, lanes, 500) < CLOSE


def test_deltas_need_a_film(tmp_path):
    save_checkpoint(tmp_path / "best", in_float32("gru"))
    with pytest.raises(UsageError, match=r"--film-delta needs a model with FiLM; model.film of this one is concat"):
        export_onnx(str(tmp_path / "best"), str(tmp_path / "model.onnx"), film_delta=True)


@pytest.fixture(scope="module")
def without_torch():
    sys.path.insert(0, str(DOCS))
    yield __import__("without_torch")
    sys.path.remove(str(DOCS))


@pytest.mark.parametrize("n", [60_000, 900, 399])
def test_features_in_numpy_are_the_extractors(without_torch, n):
    samples = sentence(1, "en-us+m3")[:n]
    for extractor, numpy in ((LogMel(), without_torch.logmel), (LongTermSpectrum(), without_torch.ltas)):
        (expected,) = extractor([samples])
        np.testing.assert_allclose(numpy(samples), expected, rtol=CLOSE, atol=CLOSE * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"speaker_aggregation": "running_mean"}, {"speaker_aggregation": "utterance"}])
def test_scores_from_samples_without_torch(tmp_path, kept):
    changes = {"features": {"speech": "logmel", "prosody": "none", "speaker": "ltas", **kept}}
    config = Config().replace({**changes, "sessions": {"sequence_by": "session"}})
    extractors = load_extractors(config.features)
    dims = {name: facts["dim"] for name, facts in describe(extractors).items()}
    pasts = {"speaker_norm": ("speech",), "session_norm": ("speech",)}
    model = make_model({"feedback": "model", **pasts}, dims=dims, dtype=torch.float32).eval()
    heard = {
        name: extract([sentence(i, f"en-us+{voice}3") for i in range(3) for voice in "fm"])
        for name, extract in extractors.items()
    }
    model.set_statistics({name: (vectors.mean(0), 3 * vectors.std(0)) for name, vectors in heard.items()}, [0.2, 0.2])
    save_checkpoint(tmp_path / "best", model, config, features=config.features)
    export_onnx(str(tmp_path / "best"), str(tmp_path / "model.onnx"))
    stream, paths, expected = Stream(str(tmp_path / "best")), [], []
    for number in range(6):
        speaker = ("agent", "caller")[number % 2]
        samples = sentence(number % 3, f"en-us+{'fm'[number % 2]}3")[: 16000 * (number + 1) // 2]
        whole = (samples * 32768).clip(-32768, 32767).astype("<i2")
        path = tmp_path / speaker / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", None))
            file.writeframes(whole.tobytes())
        paths.append(str(path))
        scored = stream.push(whole.astype(np.float32) / 32768, 16000, speaker=speaker)
        expected.append((scored.valence, scored.arousal))
    blocked = "import sys; sys.modules['torch'] = sys.modules['vaemo'] = None; import without_torch"
    call = f"{blocked}; without_torch.main(*{[str(tmp_path / 'model.onnx'), *paths]!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, cwd=DOCS)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(line["valence"], line["arousal"]) for line in lines]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 1e-3
