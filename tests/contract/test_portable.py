"""Nothing that only one system or only a newer Python has: see `requires-python` and the page on installing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vaemo.audio import decoder

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("vaemo", "jobs", "docs") for path in (ROOT / room).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST = tuple(int(part) for part in re.search(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups())

OF_ONE_SYSTEM = {
    *("crypt", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios"),
    *("tty", "msvcrt", "winreg", "winsound", "_winapi"),
}
"""Modules of the standard library that some system lacks."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_oldest_python_parses_it_and_every_system_imports_it(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST)
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not OF_ONE_SYSTEM & {name.split(".")[0] for name in names}


def test_every_python_that_is_declared_is_allowed_and_the_oldest_is_declared():
    declared = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3" in text]
    assert tuple(map(int, declared[0].split("."))) == OLDEST
    assert declared == sorted(declared, key=lambda text: int(text.split(".")[1]))


def test_a_decoder_runs_where_memory_cannot_be_limited(capsys):
    program = f"""
import sys
sys.modules["resource"] = None
sys.path.insert(0, {str(ROOT)!r})
from vaemo.audio import decode
decode.limit_memory()
print("no limit")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "no limit\n", done.stderr
    for _ in range(2):
        decoder._say_what_is_weaker("darwin")
        decoder._say_what_is_weaker("linux")
    assert capsys.readouterr().out.count("does not limit the memory") == 1
