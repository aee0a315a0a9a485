"""Nothing that comes from elsewhere is run: no pickle, no code of a model's author, no shell, no YAML with objects."""

import ast
import pickle
from pathlib import Path

import pytest
from model_cases import make_model

from vaemo import files
from vaemo.data.manifest import read_manifest
from vaemo.errors import ReadCheckpointError, VaemoError
from vaemo.model.checkpoint import load_checkpoint, save_checkpoint
from vaemo.model.state import SessionState
from vaemo.personalize import Personal
from vaemo.scoring.calls import read_calls
from vaemo.store import FeatureStore

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "vaemo").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])

PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
SAFE_PICKLE_NAMES = {"UnpicklingError"}
ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# YAML is read by `vaemo.config.strict_yaml` alone, whose loader makes plain values.
NEVER = {"eval", "exec", "compile", "os.system", "os.popen"}
NEVER |= {f"yaml.{name}load{all_}" for name in ("", "safe_", "unsafe_", "full_") for all_ in ("", "_all")}
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}


def dangers(source):
    """The calls and imports of a module that could run what somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found += [f"from {node.module} import {alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            found += [f"import {a.name} as {a.asname}" for a in node.names if a.name in PICKLES and a.asname]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PICKLES:
            found += [ast.unparse(node)] if node.attr not in SAFE_PICKLE_NAMES else []
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {item.arg: getattr(item.value, "value", item.value) for item in node.keywords}
            if name in NEVER:
                found.append(name)
            if name in ONLY_WITH and given.get(ONLY_WITH[name][0]) is not ONLY_WITH[name][1]:
                found.append(f"{name} without {ONLY_WITH[name][0]}={ONLY_WITH[name][1]}")
            found += [f"{name}({key}=...)" for key in NEVER_TRUE & given.keys() if given[key] is not False]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "from cloudpickle import loads",
        "import joblib as safe",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.safe_load(text)",
        "eval(text)",
    ],
)
def test_a_line_that_would_is_found(line):
    assert dangers(line)


def test_pickled_weights_are_loaded_by_one_module_alone():
    """In a process of its own: no worker loads what PyTorch pickled, but weights that are known by their digest."""
    loading = {
        path.relative_to(ROOT).as_posix(): path.read_text() for path in SOURCES if "torch.load(" in path.read_text()
    }
    known = loading.pop("vaemo/features/campplus.py")
    assert list(loading) == ["vaemo/features/convert.py"]
    assert known.index("!= _SHA256") < known.index("torch.load(")
    assert "weights_only=True" in known


def test_safetensors_are_written_by_one_function_alone():
    """Whole or not at all, with what the disk says: `safetensors.torch.save_file` does neither."""
    assert [path.name for path in SOURCES if "save_file(" in path.read_text()] == []


def test_every_remote_model_says_that_its_code_is_not_trusted():
    """Where a library can run a model's own code, the refusal stands in ours, whatever its default is."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("transformers.Auto", "AutoModel")):
                assert "trust_remote_code" in {item.arg for item in node.keywords}, f"{path}: {ast.unparse(node)}"


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def sprung(tmp_path):
    """The file that a trap leaves behind, and the trap; the trap is shown to work."""
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Trap(proof)))
    assert proof.exists()
    sprung = tmp_path / "sprung"
    return sprung, pickle.dumps(Trap(sprung))


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "metrics.json", "provenance.json"])
def test_a_checkpoint_with_a_pickle_in_it_is_refused(tmp_path, sprung, name):
    save_checkpoint(tmp_path / "best", make_model())
    (tmp_path / "best" / name).write_bytes(sprung[1])
    with pytest.raises(ReadCheckpointError):
        load_checkpoint(tmp_path / "best")
    assert not sprung[0].exists()


def test_a_checkpoint_of_pickles_alone_is_refused(tmp_path, sprung):
    for name in ("pytorch_model.bin", "model.pt", "checkpoint.ckpt"):
        files.write_whole(tmp_path / "best" / name, sprung[1])
    with pytest.raises(ReadCheckpointError, match="is not a whole checkpoint"):
        load_checkpoint(tmp_path / "best")
    assert not sprung[0].exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path"])
def test_a_checkpoint_whose_config_asks_for_objects_is_refused(tmp_path, sprung, tag):
    save_checkpoint(tmp_path / "best", make_model())
    config = tmp_path / "best" / "config.yaml"
    config.write_text(config.read_text() + f"\nrun: {tag} ['{sprung[0]}']\n")
    with pytest.raises(ReadCheckpointError, match="could not determine a constructor"):
        load_checkpoint(tmp_path / "best")
    assert not sprung[0].exists()


LOADERS = {
    "state.safetensors": SessionState.load,
    "deltas.safetensors": lambda path: Personal.load(str(path.parent), fingerprint="x"),
    "part-0.parquet": lambda path: FeatureStore.open(str(path.parent)),
    "calls.parquet": lambda path: read_calls(str(path), "source"),
    "m.parquet": lambda path: read_manifest(str(path)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_states_deltas_and_tables_are_never_unpickled(tmp_path, sprung, name):
    path = tmp_path / "foreign" / name
    files.write_whole(path, sprung[1])
    with pytest.raises(VaemoError):
        LOADERS[name](path)
    assert not sprung[0].exists()
