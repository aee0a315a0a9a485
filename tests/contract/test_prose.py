"""Docstrings, messages and pages are in plain English: phrases that had to be translated stay out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
MODULES = sorted((ROOT / "vaemo").rglob("*.py"))

RIDDLES = {
    r"\bmend(s|ed)?\b": "correct, repair",
    r"\bfor want of\b": "for lack of, without",
    r"\bby heart\b": "overfitting",
    r"\b[Nn]obody (says|names|is told)\b": "is not given",
    r"\bis no name\b": "was not given",
    r"\bgone on with\b": "continued",
    r": Likewise\.": "say what it is",
    r'^\s*"""Likewise': "say what it is",
    r"\bas if it would again\b": "carefully, in a process of its own",
    r"\bhears (it|them|him|her)\b": "encodes, decodes, scores",
    r"\bof (a|the|this) trade\b": "of the field",
    r"\bwhosoever\b|\bthereof\b|\btherein\b": "who, of it, in it",
    r"\banew\b": "again",
    r"\b[Nn]obody\b|\b[Ss]omebody\b": "name the actor, or use the passive: unknown, not given, unused",
    r"\bto be told\b|\bis told of\b": "reported, called with",
    r"\bcannot be meant\b": "is invalid",
    r"\bas ever\b": "as before, unaffected",
    r"\bone's own\b": "your own",
    r"\bgoes first\b": "takes precedence",
    r"\btravels? along\b": "is kept, is copied",
    r"\bsays nothing of\b": "has no, does not describe",
    r"\bstands? (there|twice|in two)\b": "is there, occurs twice, is in two",
    r"\bput (it|them|the \w+) right\b": "correct",
    r"\bgive or take\b|\bof then\b|\bof before\b": "earlier, previous",
    r"\bworth its keep\b": "useful",
    r"\bat its door\b": "on input",
    r"^\s*\"\"\"What (becomes|became|comes) ": "name the result",
    r"\ba look at\b": "with the result in view, after checking",
    r"\bnone of its own\b": "no",
    r"\bthan need be\b": "than necessary",
    r"\bbehind the end\b": "after the end",
    r"\bhanded on\b": "transferred, redistributed",
}
"""Pattern, and what to write in its place."""


def riddles(text):
    return [
        f"{number}: {found.group().strip()!r}; write: {instead}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in RIDDLES.items()
        for found in re.finditer(pattern, line)
    ]


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_riddles(path):
    if path.name != "README.zh.md":
        assert riddles(path.read_text()) == []


def test_a_riddle_is_found():
    assert riddles('"""Likewise."""\nmend it\nrecommended, in the meantime') == [
        '1: \'"""Likewise\'; write: say what it is',
        "2: 'mend'; write: correct, repair",
    ]
