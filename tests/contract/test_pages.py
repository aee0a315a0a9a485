"""What README and docs say is there: links and anchors, paths, commands with their options, settings, the tree."""

import contextlib
import dataclasses
import importlib
import io
import re
import runpy
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import yaml

from vaemo.commands import COMMANDS
from vaemo.config import Config
from vaemo.config.fields import fields_of, fit
from vaemo.errors import ConfigValueError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]

README_BYTES = 12_000
"""What a newcomer reads in one go; what is longer belongs in docs."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
NAMED = "|".join(COMMANDS)
COMMAND = re.compile(rf"(?:jobs/\w+\.py|python -m vaemo[\w.]*(?: [a-z]\w*)?|(?<![\w./-])vaemo (?:{NAMED})\b)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FIELD = re.compile(r"(?<![\w./])([a-z]+)\.(?!(?:py|yaml|json|jsonl|parquet|safetensors)\b)([a-z]\w*)(?:=(\S+))?")
PATH = re.compile(r"(?:jobs|vaemo|tests|tune_spaces|docs)/[\w./-]*|(?:Makefile|LICENSE|cluster\.yaml|\.rayignore)")
NAME = re.compile(r"vaemo(?:\.\w+)+")
SECTIONS = {field.name: type(field.default) for field in dataclasses.fields(Config)}


def without_fences(text):
    return FENCE.sub("", text)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ +(.*?) *$", without_fences(text), re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def broken_links(page, text):
    """The links of a page that lead nowhere in this repository; those to other sites are not followed."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(text if not name else target.read_text())):
            broken.append(link)
    return broken


@cache
def options_of(command):
    """The options that a command explains: `jobs/train.py`, `vaemo train`, or `python -m vaemo.corpora`."""
    script, *arguments = command.removeprefix("python -m ").split()
    shown = io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        mock.patch.object(sys, "argv", [script, *arguments, "--help"]),
        warnings.catch_warnings(action="ignore"),
        contextlib.suppress(SystemExit),
    ):
        if script == "vaemo":
            COMMANDS[arguments[0]](["--help"])
        elif script.startswith("jobs/"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shown.getvalue(), re.M))
    assert options, f"{command} --help explains no option"
    return options | {"--help"}


def jobs():
    return sorted(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))


def said_of_commands(text):
    """(command, options) wherever a page names both: console lines, rows of a table that begin with it, code in prose.

    An option that stands alone may be of any command, which is None.
    """
    lines = []
    for language, block in FENCE.findall(text):
        if language == "console":
            lines += block.replace("\\\n", " ").splitlines()
    codes = []
    for line in without_fences(text).splitlines():
        row = re.match(r"\| (`(?:jobs/|python -m).*?) \| (.*)", line)
        said = CODE.findall(row.group(2) if row else line)
        if row:
            options = [option for code in said if code.startswith("--") for option in OPTION.findall(code)]
            yield tuple(COMMAND.findall(row.group(1))), options
            # What stands with the name of another job is that job's.
            said = [code for code in said if not code.startswith("--")]
        codes += said
    short = {Path(job).stem: job for job in jobs()}
    for code in codes:
        first, *others = code.split(maxsplit=1)
        lines.append(" ".join([short.get(first, first), *others]))
    for line in lines:
        command = COMMAND.search(line)
        said = re.sub(r"\s#.*", "", line[command.end() :] if command else line)
        if command or said.startswith("--"):
            yield (command.group(),) if command else None, OPTION.findall(said)


def unknown_commands(text):
    """Commands that are not there, and options that a command does not take."""
    unknown = []
    for commands, options in said_of_commands(text):
        missing = [name for name in commands or () if not exists(name)]
        if missing:
            unknown += missing
            continue
        known = set().union(*(options_of(command) for command in commands or every_command()))
        unknown += [f"{' '.join(commands or ())} {option}".strip() for option in options if option not in known]
    return unknown


def exists(command):
    """Whether there is a command of that name; modules are found out when they are run."""
    if command.startswith("vaemo "):
        return command.removeprefix("vaemo ") in COMMANDS
    return not command.startswith("jobs/") or (ROOT / command).exists()


@cache
def every_command():
    found = {name for page in PAGES for name in COMMAND.findall(page.read_text())}
    # Prose that begins with the project's name is no command.
    return tuple(sorted({*jobs(), *filter(exists, found)}))


def unknown_settings(text):
    """`section.key`, or `section.key=value`, that the config does not have."""
    spans = CODE.findall(without_fences(text))
    spans += [word for language, block in FENCE.findall(text) if language == "console" for word in block.split()]
    unknown = []
    for section, key, value in (found.groups() for span in spans for found in FIELD.finditer(span)):
        if section not in SECTIONS:
            continue
        if key not in fields_of(SECTIONS[section]):
            unknown.append(f"{section}.{key}")
        elif value:
            try:
                fit(SECTIONS[section], f"{section}.{key}", yaml.safe_load(value))
            except ConfigValueError:
                unknown.append(f"{section}.{key}={value}")
    return unknown


def missing_paths(text):
    """Paths and Python names in code that this repository does not have; folders end in `/` or not."""
    missing = []
    for code in CODE.findall(without_fences(text)):
        for word in code.split():
            if PATH.fullmatch(word) and not (ROOT / word).exists():
                missing.append(word)
            if NAME.fullmatch(word) and not is_name(word):
                missing.append(word)
    return missing


def is_name(dotted):
    """Whether a dotted name is a module, or what a module holds."""
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return bool(module) and is_name(module) and hasattr(importlib.import_module(module), name)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("check", [unknown_commands, unknown_settings, missing_paths], ids=lambda check: check.__name__)
def test_what_a_page_names_is_there(page, check):
    assert check(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "check", "fault"),
    [
        ("`jobs/nothing.py` does it", unknown_commands, "jobs/nothing.py"),
        ("| `jobs/train.py` | `--store`, `--colour` |", unknown_commands, "jobs/train.py --colour"),
        ("| `jobs/train.py` | for `score --personal` |", unknown_commands, None),
        (
            "```console\npython jobs/train.py --store a \\\n    --colour\n```",
            unknown_commands,
            "jobs/train.py --colour",
        ),
        ("`evaluate --personal x`", unknown_commands, "jobs/evaluate.py --personal"),
        ("`python -m vaemo.scores erase --colour`", unknown_commands, "python -m vaemo.scores erase --colour"),
        ("`--colour red`", unknown_commands, "--colour"),
        ("`ray job submit --working-dir .`", unknown_commands, None),
        ("`model.colour`", unknown_settings, "model.colour"),
        ("`--set model.updater=lstm`", unknown_settings, "model.updater=lstm"),
        ("```console\njobs/train.py --set train.colour=1\n```", unknown_settings, "train.colour"),
        ("`model.safetensors`, `jobs/train.py`, `labels.range=[1,7]`, `model.d_c`", unknown_settings, None),
        ("`tests/unit/test_nothing.py`", missing_paths, "tests/unit/test_nothing.py"),
        ("`vaemo.Stream`, `vaemo.scoring.erase.nothing`", missing_paths, "vaemo.scoring.erase.nothing"),
    ],
)
def test_what_is_not_there_is_found_out(text, check, fault):
    assert check(text) == ([fault] if fault else [])


def test_a_link_that_leads_nowhere_is_found_out(tmp_path):
    (tmp_path / "other.md").write_text("# A, b `c`\n```text\n# no heading\n```\n## Twice\n## Twice\n## 自己的语料\n")
    text = (
        "# Here\n[a](other.md#a-b-c) [b](#here) [c](other.md#twice-1) [d](other.md#自己的语料) [e](https://x.org/#y)\n"
        "[f](nothing.md) [g](#there) ![h](other.png) [i](other.md#no-heading)"
    )
    page = tmp_path / "page.md"
    page.write_text(text)
    assert broken_links(page, text) == ["nothing.md", "#there", "other.png", "other.md#no-heading"]


def test_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= README_BYTES
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:] if page.name != "index.md"} <= linked
    assert "](README.md)" in (ROOT / "README.zh.md").read_text()


@pytest.mark.parametrize("job", jobs())
def test_the_page_of_commands_names_every_option_of_a_job(job):
    (row,) = re.findall(rf"^\| [^|]*`{job}`.*", (ROOT / "docs" / "commands.md").read_text(), re.M)
    assert options_of(job) - {"--config", "--set", "--help"} <= set(OPTION.findall(row))


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_readme_tree_is_the_disk(page):
    tree = re.search(r"<!-- tree -->\s*```text\n(.*?)```", page.read_text(), re.S)
    assert tree, "the README has no tree between <!-- tree --> and the next fence"
    named = {line.split()[0].rstrip("/") for line in tree.group(1).splitlines() if line.startswith("    ")}
    package = {
        path.name
        for path in (ROOT / "vaemo").iterdir()
        if path.name not in {"__pycache__", "__init__.py", "__main__.py", "py.typed"} and path.suffix != ".pyc"
    }
    assert named == package
    tops = {line.split()[0].rstrip("/") for line in tree.group(1).splitlines() if not line.startswith("    ")}
    assert all((ROOT / name).exists() for name in tops)


def test_the_readmes_have_the_same_commands_code_and_links():
    commands, links = [], []
    for page in PAGES[:2]:
        text = page.read_text()
        code = [block for language, block in FENCE.findall(text) if language != "text"]
        commands.append([re.sub(r"\s+#.*", "", line) for block in code for line in block.splitlines()])
        links.append(set(re.findall(r"\]\(([^)\s]+)\)", without_fences(text))) - {"README.md", "README.zh.md"})
    assert commands[0] == commands[1]
    assert links[0] == links[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    for target in set(re.findall(r"\bmake ([a-z-]+)", "\n".join(CODE.findall(page.read_text())))):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{page.name} names make {target}"


def test_the_reference_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference.html").read_text()
    for name in ("vaemo.api.extract", "vaemo.Stream.push", "vaemo.testing.linear_world"):
        assert f'id="{name}"' in reference
