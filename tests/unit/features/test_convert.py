"""Pickled weights become safetensors in another process, once; what holds more than tensors is refused there."""

import argparse
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from tiny_models import write_speaker_model, write_speech_model

from vaemo.config import FeatureConfig
from vaemo.errors import ExtractorError, OtherRunError, UsageError
from vaemo.features import convert
from vaemo.features.speaker import SpeakerEncoder
from vaemo.features.speech import SpeechEncoder

NOISE = [np.random.default_rng(0).normal(size=16_000).astype(np.float32) * 0.1]


class Touch:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(folder, kind="wavlm"):
    """A speech encoder as famous ones are published: pickled, with the names of weights of then."""
    folder = write_speech_model(folder, kind)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    conv = "encoder.pos_conv_embed.conv"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        weights[f"{conv}.{old}"] = weights.pop(f"{conv}.parametrizations.weight.{new}")
    return folder, weights


@pytest.fixture
def here(monkeypatch):
    """Converts in this process, to spare the seconds of another's start."""

    def read_tensors(path, name):
        out = io.BytesIO()
        convert.write_tensors(str(path), out)
        yield out.getvalue()

    monkeypatch.setattr(convert, "read_tensors", read_tensors)


def test_a_published_encoder_is_refused_with_the_command_that_turns_it(tmp_path, monkeypatch, capsys):
    folder, weights = pickled(tmp_path / "published")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        ExtractorError, match=rf"has no model.safetensors.*`python -m vaemo.features.convert {folder} --out FOLDER`"
    ):
        SpeechEncoder(FeatureConfig(speech=str(folder)))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", None)  # not here, but in a process of its own
        convert.main([str(folder), "--out", str(tmp_path / "out")])
    assert f"model.safetensors in {tmp_path}/out" in capsys.readouterr().out
    original = SpeechEncoder(FeatureConfig(speech=str(write_speech_model(tmp_path / "same", "wavlm"))))
    found = SpeechEncoder(FeatureConfig(speech=str(tmp_path / "out")))
    np.testing.assert_array_equal(found(NOISE), original(NOISE))
    record = json.loads((tmp_path / "out" / "_converted.json").read_text())
    assert record["source"] == str(folder)
    assert record["read"] == {
        "pytorch_model.bin": hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    }
    assert record["written"] == {
        "model.safetensors": hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    }


def test_a_speaker_encoder(tmp_path, here):
    folder = write_speaker_model(tmp_path / "published", "ecapa", published=True)
    convert.convert(str(folder), str(tmp_path / "out"))
    expected = SpeakerEncoder(str(write_speaker_model(tmp_path / "same", "ecapa")))
    np.testing.assert_array_equal(SpeakerEncoder(str(tmp_path / "out"))(NOISE), expected(NOISE))


def test_parts_stay_parts(tmp_path, here):
    folder, weights = pickled(tmp_path / "published", "hubert")
    names = sorted(weights)
    parts = [names[::2], names[1::2]]
    files = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert.convert(str(folder), str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    original = SpeechEncoder(FeatureConfig(speech=str(write_speech_model(tmp_path / "same", "hubert"))))
    np.testing.assert_array_equal(SpeechEncoder(FeatureConfig(speech=str(tmp_path / "out")))(NOISE), original(NOISE))

    (folder / files[1]).unlink()
    with pytest.raises(ExtractorError, match=rf"has no {files[1]}, which its pytorch_model.bin.index.json names"):
        convert.convert(str(folder), str(tmp_path / "other"))
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        (folder / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(ExtractorError, match="does not say which files hold the weights"):
            convert.convert(str(folder), str(tmp_path / "other"))
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../same/model.bin"}}')
    with pytest.raises(ExtractorError, match=r"has no \.\./same/model\.bin"):
        convert.convert(str(folder), str(tmp_path / "other"))


def test_tensors_that_share_memory_or_lie_under_a_name(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    shared = {"a": whole, "b": whole, "row": whole[1], "turned": whole.T, "half": whole.half(), "none": whole[:0]}
    shared |= {"number": torch.tensor(3), "flag": torch.tensor([True]), "trained": torch.nn.Parameter(whole.bfloat16())}
    for held in (shared, {"state_dict": shared, "epoch": 3}, {"model": shared}):
        for zipped in (True, False):
            torch.save(held, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
            out = io.BytesIO()
            convert.write_tensors(str(tmp_path / "x.bin"), out)
            found = load(out.getvalue())
            assert found.keys() == shared.keys()
            for name, tensor in shared.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": Touch("{ran}")}, r"it holds more than tensors \(posix.mkdir\), which might be a program"),
        ({"a": torch.zeros(2), "args": argparse.Namespace(x=1)}, r"more than tensors \(argparse.Namespace\)"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' in it is int, no tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' in it is no plain tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' in it is no plain tensor"),
        ({}, "it holds dict, no named tensors"),
        (torch.zeros(2), "it holds Tensor, no named tensors"),
        (b"", r"it is damaged, or no file of PyTorch \(EOFError\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is damaged, or no file of PyTorch"),
        (b"PK\x03\x04 cut short", "it is damaged, or no file of PyTorch"),
        (torch.nn.Linear(2, 2), r"it is a program \(TorchScript\), not weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.torch.jit")
def test_what_is_not_weights_alone_is_refused(tmp_path, content, says):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, torch.nn.Module):
        torch.jit.script(content).save(path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=says):
        convert.write_tensors(str(path), io.BytesIO())


@pytest.mark.long
def test_a_pickle_that_runs_something_is_refused_in_one_line(tmp_path):
    path = tmp_path / "evil" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"a": Touch(tmp_path / "ran")}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").rmdir()
    with pytest.raises(
        ExtractorError, match=r"/pytorch_model.bin is not converted: it holds more than tensors \(posix"
    ) as no:
        convert.convert(str(path.parent), str(tmp_path / "out"))
    assert "\n" not in str(no.value)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_process_that_dies_of_a_file_is_one_line(tmp_path, monkeypatch):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(dies))
    with pytest.raises(
        ExtractorError, match=r"it is not converted: reading it ends the process that does, by signal 11"
    ):
        list(convert.read_tensors(tmp_path / "x", "it"))


def test_a_folder_that_holds_something_else(tmp_path, here, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(ExtractorError, match=r"a has no weights; give a folder with pytorch_model.bin"):
        convert.convert(str(folder), str(tmp_path / "out"))
    for name in ("training_args.bin", "optimizer.pt", "mine.pt"):
        torch.save({"w": torch.ones(3)}, folder / name)
    first = convert.convert(str(folder), str(tmp_path / "out"))
    assert list(first["written"]) == ["mine.safetensors"]
    # Done: nothing is read again.
    with monkeypatch.context() as patched:
        patched.setattr(convert, "read_tensors", None)
        assert convert.convert(str(folder), str(tmp_path / "out")) == first
    torch.save({"w": torch.zeros(3)}, folder / "mine.pt")
    with pytest.raises(OtherRunError, match=r"out was made of other weights \(.*a\); give a new folder"):
        convert.convert(str(folder), str(tmp_path / "out"))
    shutil.copy(folder / "mine.pt", folder / "other.pt")
    with pytest.raises(ExtractorError, match=r"several files that may be its weights \(mine.pt, other.pt\)"):
        convert.convert(str(folder), str(tmp_path / "new"))
    (folder / "other.pt").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").touch()
    with pytest.raises(OtherRunError, match="full holds other files"):
        convert.convert(str(folder), str(tmp_path / "full"))
    (folder / "model.safetensors").touch()
    with pytest.raises(UsageError, match="holds safetensors already; give it itself"):
        convert.convert(str(folder), str(tmp_path / "new"))


def test_a_name_that_the_hub_does_not_have(tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra encoders is not installed")
    with pytest.raises(ExtractorError, match="'no/where' is no folder, and nothing can be loaded from the hub"):
        convert.convert("no/where", str(tmp_path / "new"))


def test_a_conversion_that_was_killed_is_done_again(tmp_path, here, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    with monkeypatch.context() as patched:
        patched.setattr(convert.files, "write_whole", _interrupted(convert.files.write_whole))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(folder), str(tmp_path / "out"))
    assert convert.convert(str(folder), str(tmp_path / "out"))["finished"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.ones(3))


def _interrupted(write_whole):
    def write(path, content):
        if str(path).endswith(".safetensors"):
            raise KeyboardInterrupt
        write_whole(path, content)

    return write
