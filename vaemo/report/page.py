"""The page: data and assets put into one HTML file that loads nothing else, but audio beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

STYLES = ("report.css",)
SCRIPTS = ("draw.js", "overview.js", "calls.js", "call.js", "main.js")


def build_page(data: Mapping[str, Any]) -> bytes:
    """The page as UTF-8. `data` must be plain; its text is shown as text, never as markup."""
    assets = resources.files("vaemo.report") / "assets"
    page = (assets / "page.html").read_text(encoding="utf-8")
    # Text that holds `</script>` must not end the element.
    inline = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "STYLE": "\n".join((assets / name).read_text(encoding="utf-8") for name in STYLES),
        "SCRIPT": "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": inline,
    }
    # In one pass, so that a marker within the data is left alone.
    return re.sub("@(STYLE|SCRIPT|DATA)@", lambda marker: parts[marker[1]], page).encode()
