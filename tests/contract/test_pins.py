"""jobs/constraints.txt pins what pyproject.toml names, to the versions with which these tests run.

The light set (`make test-light`) has the same pins but for torch, and lacks what other extras bring.
"""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_CUDA_HERE = "causal-conv1d"
"""Needs a CUDA compiler to install, so that no version of it was tested."""


def requirements():
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    return [item for item in map(Requirement, texts) if item.name not in (NO_CUDA_HERE, "vaemo")]


def pins():
    lines = (ROOT / "jobs" / "constraints.txt").read_text().splitlines()
    named = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in named}


def installed(name):
    """The version that is installed, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


LIGHT = installed("speechbrain") is None
LIGHT_TORCH = re.search(r"^LIGHT_TORCH := (\S+)", (ROOT / "Makefile").read_text(), re.M).group(1)


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert pins().keys() == {canonicalize_name(item.name) for item in requirements()}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_pin_is_allowed_and_what_is_installed(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert pin in requirement.specifier
    if LIGHT and installed(requirement.name) is None:
        pytest.skip("the light set lacks it")
    expected = LIGHT_TORCH if LIGHT and requirement.name == "torch" else pin
    assert installed(requirement.name).partition("+")[0] == expected


def test_the_extras_are_those_that_messages_and_all_name():
    extras = PROJECT["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == extras.keys() - {"all", "cuda", "dev", "mamba-kernels"}
    assert extras["cuda"] == ["vaemo[mamba-kernels]"]
    assert LIGHT_TORCH in next(item.specifier for item in requirements() if item.name == "torch")


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    # mamba-ssm is there for its plain PyTorch parts alone, without what its CUDA kernels need.
    conflicts = [line for line in done.stdout.splitlines() if not line.startswith(("mamba-ssm ", "No broken"))]
    assert conflicts == []


def test_everything_that_installs_uses_the_pins():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^PIP := .*install.* --constraint jobs/constraints.txt", text, re.M)
    installs = re.findall(r"^.*-m pip install.*", text, re.M)
    assert len(installs) == 3
    assert all(re.search(r"--constraint \S+(/constraints\.txt|PINS\))", line) for line in installs)
    for stamp in (r"\$\(STAMP\)", r"\$\(DEMO\)", r"\$\(LIGHT\)/.installed-demo"):
        assert re.search(rf"^{stamp}:.*jobs/constraints.txt", text, re.M)
