"""The page: data and assets put into one HTML file that loads nothing else, but audio beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

STYLES = ("report.css",)
SCRIPTS = ("draw.js", "overview.js", "calls.js", "call.js", "main.js")


def build_page(data: Mapping[str, Any]) -> bytes:
    """The page as UTF-8. `data` must be plain; its text is shown as text, never as markup."""
    assets = resources.files("vaemo.report") / "assets"
    page = (assets / "page.html").read_text(encoding="utf-8")
    # `<` never ends the script element early, and U+2028/9 are written as escapes by json.
    inline = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "@STYLE@": "\n".join((assets / name).read_text(encoding="utf-8") for name in STYLES),
        "@SCRIPT@": "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "@DATA@": inline,
    }
    head, *rest = page.split("@")
    # One pass, so that a marker within data is left alone.
    text = head
    for index in range(0, len(rest) - 1, 2):
        text += parts[f"@{rest[index]}@"] + rest[index + 1]
    return text.encode()
