"""A SpeechBrain file is read as SpeechBrain reads it, or refused with its line; nothing that it names is run."""

import pytest
import torch

from vaemo.errors import ExtractorError
from vaemo.features.hyperparams import Hyperparams


def read(text, key="x"):
    return Hyperparams(text, "somebody/hyperparams.yaml").get(key)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x: 80", 80),
        ("x: 1e-3", 0.001),
        ("x: False", False),
        ("x: null", None),
        ("x: '80'", "80"),
        ("x: no", "no"),
        ("x: (1, 2.5)", (1, 2.5)),
        ("x: ()", ()),
        ("x: (a", "(a"),
        ("x: !tuple (3, 4)", (3, 4)),
        ("x: [1, [a, 2]]", [1, ["a", 2]]),
        ("y: 80\nx: !ref <y>", 80),
        ("x: !ref <z>\nz: !ref <y>\ny: [1, 2]", [1, 2]),
        ("y: {z: {w: 7}}\nx: !ref <y[z][w]>", 7),
        ("y: !ref <z>\nz: {w: 7}\nx: !copy <y[w]>", 7),
        ("y: 80\nx: !ref <y> * 2 + 1", 161),
        ("y: 80\nx: !ref <y> // 3", 26),
        ("y: a/b\nx: !ref <y>/model.ckpt", "a/b/model.ckpt"),
        ("y: 9\nx: !ref <y> ** <y> ** <y>", "9 ** 9 ** 9"),
        ("y: 0\nx: !ref 1 / <y>", "1 / 0"),
        ("y: &a {z: 1}\nx: *a", {"z": 1}),
    ],
)
def test_values(text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


def test_layers_are_built_once_and_only_when_asked_for():
    text = """
        activation: !name:torch.nn.LeakyReLU
            negative_slope: 0.2
        layer: !new:torch.nn.Linear [3, 4]
        same: !ref <layer>
        other: !copy <layer>
        many: {first: !ref <layer>}
        broken: !new:torch.nn.Linear {in_features: many}
    """
    said = Hyperparams(text, "somebody/hyperparams.yaml")
    assert isinstance(said.get("layer"), torch.nn.Linear)
    assert said.get("same") is said.get("layer") is said.get("many")["first"]
    assert isinstance(said.get("other"), torch.nn.Linear)
    assert said.get("other") is not said.get("layer")
    assert said.get("activation")().negative_slope == 0.2
    assert said.get("absent", 3) == 3
    with pytest.raises(ExtractorError, match=r"yaml, line 8: torch.nn.Linear cannot be made of these values: "):
        said.get("broken")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("- a", "does not hold names and values"),
        ("just text", "does not hold names and values"),
        ("a: 1\nx: !PLACEHOLDER", "line 2: a !PLACEHOLDER stands where a value should"),
        ("a: 1\nx: !ref <b>", "line 2: '<b>' refers to nothing in this file"),
        ("a: {c: 1}\nx:\n- !ref <a[b]>", r"line 3: '<a\[b\]>' refers to nothing"),
        ("a: 1\nx: !ref <a>/<b>", "line 2: '<b>' refers to nothing"),
        ("x: !copy <b>", "line 1: '<b>' refers to nothing"),
        ("x: !ref <y>\ny: !ref <x>", "line 1: '<[xy]>' refers to itself"),
        ("x: !ref <y>/a\ny: !ref <x>/b", "line 1: it is a part of itself"),
        ("x: &a !new:torch.nn.Sequential [*a]", "an alias is inside its own anchor"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: 'c' occurs twice, first on line 2"),
        ("[a]: 1", "line 1: a name is no plain text"),
        ("!ref <a>: 1\na: [2]", "line 1: a name is no plain text"),
        ("x: !ref [a]", "line 1: !ref takes a text"),
        ("x: !!int many", "line 1: .*'many' is not what its tag says"),
        ("x: !!seq many", "line 1: "),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' occurs twice, first on line 1"),
        ("a:\n\tb: 1", "is not YAML that can be read: line 2"),
        ("a: [", "is not YAML that can be read: line 1"),
        ("a: 1\n---\nb: 1", "is not YAML that can be read: line 2"),
        ("x: !new:torch.nn.Nothing", "line 1: there is no layer torch.nn.Nothing"),
        ("x: !new:torch.nn..Linear", "line 1: there is no layer torch.nn..Linear"),
        ("x: !new:torch.nn.Linear.__class__", "line 1: there is no layer torch.nn.Linear.__class__"),
        ("x: !new:torch.nn.functional.relu", "line 1: there is no layer torch.nn.functional.relu"),
        ("x: !new:torch.nn.Linear {}", "line 1: torch.nn.Linear cannot be made of these values"),
        ("x: !tuple (1, [2])", r"line 1: '\(1, \[2\]\)' is no tuple of plain values"),
        ("x: !tuple 3", "line 1: '3' is no tuple of plain values"),
        ("x: (1, [2)", r"line 1: '\(1, \[2\)' is no tuple of plain values"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, says):
    with pytest.raises(ExtractorError, match=rf"^somebody/hyperparams.yaml.*{says}") as refusal:
        read(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        # HyperPyYAML takes a text in brackets for a tuple, and reads what is in it as YAML that makes any object.
        "x: (!!python/object/apply:pathlib.Path.touch [{path}])",
        "x: !tuple '(!!python/object/apply:pathlib.Path.touch [{path}])'",
        "x: !apply:pathlib.Path.touch [{path}]",
        "x: !<!apply:pathlib.Path.touch> [{path}]",
        "%TAG !e! !apply:pathlib.\n---\nx: !e!Path.touch [{path}]",
        "x: !appl%79:pathlib.Path.touch [{path}]",
        "x: !applyref:pathlib.Path.touch [{path}]",
        "x: !!python/object/apply:pathlib.Path.touch [{path}]",
        "x: !new:subprocess.Popen [[touch, {path}]]",
        "x: !include:{path}",
        "x: !module:os",
        # What a module of PyTorch or SpeechBrain imports is not its own.
        "x: !new:torch.nn.functional.torch.utils.data.Dataset",
        "x: !new:torch.nn.modules.module.OrderedDict [[[a, 1]]]",
        "x: !name:torch.nn.modules.module.signature",
        "x: !new:speechbrain.nnet.CNN.logging.FileHandler [{path}]",
        "x: !new:speechbrain.utils.parameter_transfer.Pretrainer",
        "x: !new:speechbrain.lobes.models.huggingface_transformers.whisper.Whisper [somebody/pickle, {path}]",
        "y: !new:torch.nn.Linear [1, 1]\nx: !ref <y.forward>",
    ],
)
def test_nothing_that_it_names_is_run_or_handed_out(text, tmp_path):
    path = tmp_path / "ran"
    with pytest.raises(ExtractorError):
        read(text.format(path=path))
    assert not path.exists()
