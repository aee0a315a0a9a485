"""Tests test behaviour: those that reach into private names are listed, with the reason."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SMALLER = "a limit is lowered, so that small data reaches it"
FAILURE = "a part is replaced, so that it fails or dies"
PROCESS = "the child process itself is looked at"

REASONS = {
    "announced.py": "Ray's own module",
    "cluster/test_address.py": SMALLER,
    "cluster/test_encoders.py": FAILURE,
    "cluster/test_jobs.py": "the rounds over a lost node, which Ray does not lose on demand",
    "cluster/test_runtime.py": "a start of Ray that fails, without Ray",
    "contract/test_portable.py": "a warning that is printed on other systems only",
    "equivalence/test_past.py": "two ways to the same packed features",
    "faults/test_s3.py": SMALLER,
    "golden/make.py": "the state of a session is chosen to be saved",
    "perf/test_coverage.py": "a correction without its gate, for comparison",
    "perf/test_extract.py": "an encoder that computes nothing, for comparison",
    "perf/test_gpu.py": "the size of the encoder, for the report",
    "perf/test_resume.py": "an index of a million parts is written without the parts",
    "perf/test_scale.py": "the driver's part of the work alone",
    "perf/test_train.py": "the size of the data, for the report",
    "pipeline/test_extract.py": SMALLER,
    "pipeline/test_voices.py": "memory does not grow with the recording",
    "unit/features/test_campplus.py": FAILURE,
    "unit/features/test_isolated.py": FAILURE,
    "unit/features/test_speech.py": "a flag that is read from a file, and changes features by rounding only",
    "unit/test_archive.py": FAILURE,
    "unit/test_audio.py": PROCESS,
    "unit/test_extract.py": SMALLER,
    "unit/test_files.py": "a race between two listings, which cannot be had on demand",
    "unit/test_index.py": SMALLER,
    "unit/test_lease.py": FAILURE,
    "unit/test_spool.py": SMALLER,
    "unit/test_train.py": "one window and one evaluation against the formulas",
    "unit/test_vad.py": "memory does not grow with the recording",
    "unit/trust/test_evaluated.py": "the gate alone, without a folder of scores",
}


def private_uses(source):
    """Private names of other modules and objects that a test file uses or replaces."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vaemo"):
            found |= {alias.name for alias in node.names if re.match(r"_[a-zA-Z]", alias.name)}
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "os", "sys"}):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            found |= {text for text in texts if re.search(r"(^|\.)_[a-zA-Z]", text)}
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_private_names_are_used_for_a_reason(path):
    name = str(path.relative_to(TESTS))
    assert bool(private_uses(path.read_text())) == (name in REASONS), private_uses(path.read_text())


def test_private_uses_are_found():
    assert private_uses("from vaemo.x import _a, b\nc._d\nself._e\nm.setattr(c, '_f', 1)") == {"_a", "_d", "_f"}
