"""vaemo: valence and arousal for every utterance of a conversation, with a memory of the conversation.

The public names load on first use, so that `import vaemo` stays cheap: no torch, transformers or ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "vaemo.config",
    "LiveSession": "vaemo.live",
    "Prediction": "vaemo.stream",
    "SessionRegressor": "vaemo.model.regressor",
    "SessionState": "vaemo.model.state",
    "Stream": "vaemo.stream",
    "VaemoError": "vaemo.errors",
    "evaluate": "vaemo.api",
    "extract": "vaemo.api",
    "score": "vaemo.api",
    "train": "vaemo.api",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vaemo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
