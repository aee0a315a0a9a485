"""Settings of Sphinx: `make docs` builds the pages and the reference of the public names, and fails on any warning."""

import re
from pathlib import Path

import vaemo

project, author, release = "vaemo", "The vaemo developers", vaemo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
html_theme = "alabaster"
html_show_sourcelink = False
# Fields of a dataclass are described in its docstring and listed as attributes, too.
suppress_warnings = ["ref.duplicate", "autosectionlabel.*"]

_REPOSITORY = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^]]*)\]\((\.\./[^)#\s]+|[^)#\s]+/)(#[^)\s]*)?\)")


def _without_links_to_the_checkout(app, docname, source):
    """Pages link to files of the checkout, which are no pages here: their names stay, as text."""

    def plain(link):
        target = (_REPOSITORY / "docs" / link.group(2)).resolve()
        return link.group(1) if target.exists() and not target.is_relative_to(_REPOSITORY / "docs") else link.group(0)

    source[0] = _OUTSIDE.sub(plain, source[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _without_links_to_the_checkout)
