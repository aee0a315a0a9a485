"""The tree keeps its promises: who imports whom, what is heavy, how thin the jobs are."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vaemo.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vaemo"
JOBS = sorted((ROOT / "jobs").glob("*.py"))

RANKS = (
    {"errors", "units"},
    {"targets", "config", "metrics", "progress", "extras"},
    {"files", "cli", "summary", "tables", "drawing"},
    {"store", "model"},
    {"data"},
    {"audio"},
    {"features", "parts"},
    {"voices", "scores"},
    {"utterances", "corpora"},
    {"training"},
    {"trust", "scoring", "personalize", "evaluation", "report", "ablation", "tuning"},
    {"stream", "live", "pipeline", "export"},
    {"cluster"},
    {"api"},
    {"demo"},
    {"commands", "__main__"},
)
"""The data's order. A module imports from its own row and those above it, never from below."""

HEAVY = {"torch", "torchaudio", "transformers", "speechbrain", "opensmile", "silero_vad", "av", "ray", "matplotlib"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The first name under `vaemo`: a module, or the package that holds it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rank_of(name):
    ranks = [rank for rank, names in enumerate(RANKS) if name in names]
    assert ranks, f"vaemo.{name} has no rank: give it a row in RANKS"
    return ranks[0]


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "vaemo":
                yield from (f"vaemo.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path == PACKAGE / "__init__.py" or room(path) in {"testing", "presets"}:
        return
    for name in imports(path):
        if name.startswith("vaemo."):
            imported = name.split(".")[1]
            assert imported != "testing", f"{path.name} imports vaemo.testing"
            if not imported.startswith("_"):
                assert rank_of(imported) <= rank_of(room(path)), f"{path.name} imports {name}, which stands below it"
        if name.split(".")[0] == "ray":
            assert room(path) == "cluster", f"{path.name} imports ray; only vaemo.cluster may"
        if room(path) == "model" and name.startswith("vaemo."):
            allowed = {"model", "errors", "units", "config"}
            more = {"checkpoint.py": {"files"}, "state.py": {"files"}}
            allowed |= more.get(path.name, set())
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


LAZY = {
    "vaemo.api": "the package is as light as its config until something is asked of it",
    "vaemo.commands": "a command loads what it needs: `--help` of all takes no second",
    "vaemo.audio.decode": "the process that decodes loads FFmpeg, in `vaemo.audio.frames`, for files that need it",
    "vaemo.cluster.attempts": "a process of its own counts, which takes little memory unless rows are asked of it",
    "vaemo.cluster.executor": "Ray Tune takes a second to import, which extraction and scoring do not need",
    "vaemo.pipeline.executors": "training needs torch, which extraction of some features does not",
    "vaemo.features.load": "an extractor is imported when a config asks for it: each has packages of its own",
    "vaemo.model.regressor": "two methods are short for functions of `vaemo.model.checkpoint`, which loads regressors",
    "vaemo.model.feedback": "for types alone: its functions are parts of the regressor",
    "vaemo.scoring.table": "for types alone: personal deltas are trained with what stands here",
    "vaemo.stream": "for types alone: personal deltas are trained, which a stream does not do",
    "vaemo.evaluation.pictures": "only one of the pictures needs it",
}
"""Modules that import others of vaemo inside a function, or for types alone; and why."""

PACKAGES = {
    "av": "the process that decodes opens most files without it, and starts faster",
    "soundfile": "likewise",
    "boto3": "an extra",
    "botocore": "comes with it",
    "espeakng_loader": "an extra",
    "fcntl": "is not there on every system",
    "fsspec": "for storage that pyarrow does not know",
    "huggingface_hub": "an extra",
    "matplotlib": "takes a second to import",
    "onnx": "an extra",
    "opensmile": "an extra",
    "optuna": "an extra",
    "parselmouth": "an extra",
    "pyannote": "an extra",
    "resource": "is not there on every system",
    "sklearn": "takes a second to import",
    "torch": "takes seconds to import",
    "transformers": "an extra, and takes seconds to import",
}
"""What is not vaemo's and may be imported where it is used; and why."""


def eager(body):
    """The imports that run when a module is imported, those in its `if` and `try` among them."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from eager([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With):
            yield from eager(
                [*node.body, *(line for handler in getattr(node, "handlers", ()) for line in handler.body)]
            )


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def imported():
    """By module: what it imports when it is imported itself, and what it imports later or for types alone."""
    known = {dotted(path): ast.parse(path.read_text()) for path in modules()}

    def names(node):
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        # `from package import module` names a module, `from module import thing` does not.
        return [whole if (whole := f"{node.module}.{alias.name}") in known else node.module for alias in node.names]

    found = {}
    for module, tree in known.items():
        first = list(eager(tree.body))
        later = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in first]
        found[module] = tuple({name for node in nodes for name in names(node)} - {module} for nodes in (first, later))
    return found


def circle(graph):
    """Modules of which each imports the next, and the last the first; empty where there are none."""
    done = set()

    def walk(module, above):
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(other, [*above, module]) for other in sorted(graph.get(module, ())))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in sorted(graph))), [])


def test_no_module_imports_itself_by_way_of_others(imported):
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []
    assert circle({module: first for module, (first, _) in imported.items()}) == []


def test_what_is_imported_late_has_a_reason(imported):
    ours, others = set(), set()
    for module, (_, later) in imported.items():
        ours |= {module} if any(name.startswith("vaemo.") for name in later) else set()
        others |= {name.partition(".")[0] for name in later} - {"vaemo"}
    assert ours - {"vaemo.testing"} == set(LAZY)
    assert others == set(PACKAGES)


@pytest.mark.parametrize(
    "name", ["vaemo", "vaemo.config", "vaemo.cli", "vaemo.files", "vaemo.store", "vaemo.data.manifest"]
)
def test_cold_import_is_light(name):
    code = f"import sys, {name}\nprint(*[module for module in {sorted(HEAVY)!r} if module in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_public_names_load():
    import vaemo

    for name in vaemo.__all__:
        assert getattr(vaemo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vaemo.nothing


def vaemo_command(*arguments):
    return subprocess.run([sys.executable, "-m", "vaemo", *arguments], capture_output=True, text=True)


def test_every_job_is_a_command_and_every_command_explains_itself(capsys):
    assert {path.stem for path in JOBS} <= COMMANDS.keys()
    listed = dict(re.findall(r"^  (\w+) +(\S.*)", vaemo_command("--help").stdout, re.M))
    assert listed.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            command(["--help"], f"vaemo {name}")
        assert capsys.readouterr().out.startswith(f"usage: vaemo {name} ")


def test_help_loads_nothing_heavy():
    code = f"""
import sys
from vaemo.commands import COMMANDS
try:
    COMMANDS[sys.argv[1]](["--help"])
finally:
    print("loaded:", *(module for module in {sorted(HEAVY)!r} if module in sys.modules))
"""
    for name in ("extract", "train", "score", "evaluate"):
        shown = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert shown.stdout.endswith("\nloaded:\n"), shown.stdout


def test_a_command_is_refused_in_one_line():
    unknown = vaemo_command("tran")
    assert unknown.stderr.endswith("Did you mean train?\n")
    for refused, prog in ((unknown, "vaemo"), (vaemo_command("train", "--nonsense"), "vaemo train")):
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith(f"{prog}: ")


def test_a_command_and_its_job_are_the_same():
    changed = ["--set", "model.d_c=7"]
    job = subprocess.run([sys.executable, ROOT / "jobs" / "config.py", *changed], capture_output=True, text=True)
    assert vaemo_command("config", *changed).stdout == job.stdout
    assert "d_c: 7" in job.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs_are_thin_and_executable(path):
    assert len(path.read_text().splitlines()) <= 10
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs_are_their_commands(path, capsys):
    assert f'commands.run("{path.stem}")' in path.read_text()
    with pytest.raises(SystemExit):
        COMMANDS[path.stem](["--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M))
    assert options >= {"--config", "--set"}


def conflict_markers(folder, *options):
    """Lines of text files that begin as a merge leaves them where two sides changed the same place."""
    command = ["git", "grep", "-nIE", *options, "^(<{7} |>{7} )"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode < 2, done.stderr
    return done.stdout.splitlines()


def test_no_merge_was_left_half_done(tmp_path):
    assert conflict_markers(ROOT) == []
    (tmp_path / "a.md").write_text("\n".join(["<" * 7 + " HEAD", "=" * 7, ">" * 7 + " other", "> " + "<" * 7 + " a"]))
    found = conflict_markers(tmp_path, "--no-index")
    assert found == [f"a.md:1:{'<' * 7} HEAD", f"a.md:3:{'>' * 7} other"]
