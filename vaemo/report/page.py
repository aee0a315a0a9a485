"""HTML pages: data, style and scripts put into one file that opens from disk and loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCRIPTS = ("draw.js", "overview.js", "calls.js", "call.js", "main.js")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; @SOURCES@">
<title>@TITLE@</title>
<link rel="icon" href="data:,">
<style>
@STYLE@
</style>
</head>
<body>
@BODY@</body>
</html>
"""


def build_report(data: Mapping[str, Any]) -> bytes:
    """The page of a report as UTF-8; of all else it may only play audio, beside it or where a link leads.

    Args:
        data: Plain; its text is shown as text, never as markup.
    """
    # Text that holds `</script>` must not end the element.
    inline = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body = _fill(_asset("report.html"), SCRIPT="\n".join(map(_asset, SCRIPTS)), DATA=inline)
    sources = "script-src 'unsafe-inline'; img-src data:; media-src file: http: https: blob: data:"
    return build_page("vaemo report", body, sources=sources)


def build_page(title: str, body: str, *, sources: str = "img-src data:") -> bytes:
    """A page in the style of the report, as UTF-8.

    Args:
        title: Of the window.
        body: Markup.
        sources: What the page may load beside its style, as a content security policy says it.
    """
    return _fill(_PAGE, SOURCES=sources, TITLE=title, STYLE=_asset("report.css"), BODY=body).encode()


def _fill(template: str, **parts: str) -> str:
    """The template with every `@NAME@` replaced, in one pass, so that a marker within a part is left alone."""
    return re.sub(f"@({'|'.join(parts)})@", lambda marker: parts[marker[1]], template)


def _asset(name: str) -> str:
    return (resources.files("vaemo.report") / "assets" / name).read_text(encoding="utf-8")
