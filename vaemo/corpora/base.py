"""The interface of corpus readers, their lookup by name, and their shared parsing of text, cells and numbers.

A reader never treats an unreadable value as "no label": a file that was saved again with decimal commas, other
separators or shifted columns is refused, with its name, the line and the text.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from vaemo.data.manifest import COLUMNS
from vaemo.errors import ReadCorpusError, UsageError
from vaemo.units import DIMENSIONS

NAMES = ("emodb", "iemocap", "msp-conversation", "msp-improv", "msp-podcast", "recola", "sewa")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST = 1e9
_AS_IT_IS = "Give the file as it is distributed."

LABEL_LAG_S = 2.0
"""Usual delay of annotators who follow a recording with a joystick."""


@dataclass(frozen=True)
class Corpus:
    """The utterances of a corpus.

    Attributes:
        rows: Manifest rows; labels on the native scale, `audio_path` absolute.
        label_range: The native scale, for `labels.range`.
        notes: Decisions of the reader, with counts, as text.
    """

    rows: Sequence[Mapping[str, Any]]
    label_range: tuple[float, float]
    notes: Sequence[str] = field(default_factory=list)

    def table(self) -> pa.Table:
        """The rows as a manifest, columns of the contract first."""
        others = {key: None for row in self.rows for key in row if key not in COLUMNS}
        columns = {name: pa.array([row.get(name) for row in self.rows], type_) for name, type_ in COLUMNS.items()}
        return pa.table({**columns, **{name: [row.get(name) for row in self.rows] for name in others}})


def load_corpus(name: str, root: str | Path, *, label_lag_s: float = LABEL_LAG_S) -> Corpus:
    """Read a corpus.

    Args:
        name: One of `NAMES`.
        root: Its folder, as distributed.
        label_lag_s: Seconds by which continuous annotations are late; for corpora with traces.

    Raises:
        UsageError: if the lag is negative or no number.
        ReadCorpusError: if there is no such reader, or the folder is not laid out as that corpus is.
    """
    if name not in NAMES:
        raise ReadCorpusError(f"no reader for the corpus '{name}'; there are {', '.join(NAMES)}.")
    if not 0 <= label_lag_s < math.inf:
        raise UsageError(f"the lag of the labels is {label_lag_s:g} s; give a number of seconds that is 0 or more.")
    if not Path(root).is_dir():
        raise ReadCorpusError(f"{root} is not a folder; give the folder of {name} as it is distributed.")
    read = import_module(f"vaemo.corpora.{name.replace('-', '_')}").read
    try:
        corpus = read(Path(root).absolute(), label_lag_s)
    except (OSError, LookupError, ValueError) as error:
        raise ReadCorpusError(
            f"{root} is not laid out as {name} is distributed, or a file in it is damaged: "
            f"{type(error).__name__}, {' '.join(str(error).split())}."
        ) from error
    if not corpus.rows:
        raise ReadCorpusError(f"{root} holds no utterance of {name}; give the folder as it is distributed.")
    return corpus


def visible(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted, without names that begin with a dot: macOS keeps its own files beside those of the corpus."""
    return sorted(path for path in paths if not path.name.startswith("."))


def numbered_lines(path: Path, encoding: str = "utf-8-sig") -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, each behind its place: `FILE, line N`.

    Raises:
        ReadCorpusError: if it is not text in that encoding.
    """
    content = path.read_bytes()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = content[error.start : error.start + 20]
        raise ReadCorpusError(f"{path}, line {line}: {str(found)[1:]} is not text in {encoding}. {_AS_IT_IS}") from None
    return [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_cells(path: Path, delimiter: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table below a line of names, each behind its place; blanks around names and cells are dropped.

    Args:
        path: Of the file.
        delimiter: Between cells.
        needed: Columns that it must have.

    Raises:
        ReadCorpusError: if a column is missing, or a row has more or fewer cells than there are names.
    """
    numbered = numbered_lines(path)
    rows = csv.reader((line for _, line in numbered), delimiter=delimiter)
    names: list[str] | None = None
    try:
        for cells in rows:
            place, line = numbered[rows.line_num - 1]
            cells = [cell.strip() for cell in cells]
            if names is None:
                names = cells[: max((n for n, cell in enumerate(cells, 1) if cell), default=0)]
                missing = [name for name in needed if name not in names]
                if missing:
                    raise ReadCorpusError(f"{place}: there is no column {missing[0]} in '{_cut(line)}'. {_AS_IT_IS}")
            elif len(cells) >= len(names) and not any(cells[len(names) :]):
                yield place, dict(zip(names, cells, strict=False))
            else:
                found = f"'{_cut(line)}' has {len(cells)} cells, the first line has {len(names)}"
                raise ReadCorpusError(f"{place}: {found}. {_AS_IT_IS}")
    except csv.Error as error:
        raise ReadCorpusError(f"{numbered[rows.line_num - 1][0]}: {error}. {_AS_IT_IS}") from None


def number(text: Any, place: str, label_range: tuple[float, float] | None = None) -> float:
    """The number that a cell holds.

    Args:
        text: As the file has it; JSON may hold numbers.
        place: File and line, for the message.
        label_range: Of a label; an eighth of it beyond either end is allowed, which `clip_labels` brings back.

    Raises:
        ReadCorpusError: if it is no number with a decimal point, or no label of that range.
    """
    written = str(text).strip()
    if isinstance(text, bool) or not _NUMBER.fullmatch(written):
        hint = ", its decimals behind a point" if "," in written else ""
        raise ReadCorpusError(f"{place}: '{_cut(written)}' is no number; one is needed{hint}. {_AS_IT_IS}")
    value = float(written)
    low, high = label_range or (-_LARGEST, _LARGEST)
    slack = (high - low) / 8
    if not low - slack <= value <= high + slack:
        raise ReadCorpusError(f"{place}: '{_cut(written)}' is not between {low:g} and {high:g}. {_AS_IT_IS}")
    return value


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def clip_labels(rows: Iterable[dict[str, Any]], label_range: tuple[float, float]) -> list[str]:
    """Bring labels outside the range to its edge, in place; a note that counts them, if there are any."""
    low, high = label_range
    n_clipped = 0
    for row in rows:
        for name in (*DIMENSIONS, "dominance"):
            value = row.get(name)
            if value is not None and not low <= value <= high:
                row[name] = min(max(value, low), high)
                n_clipped += 1
    return [f"{n_clipped} labels outside [{low:g}, {high:g}] were clipped to it"] if n_clipped else []


def rater_facts(ratings: Mapping[str, Sequence[float]]) -> dict[str, float | int | None]:
    """Statistics of single ratings: `NAME_raters`, and from two on `NAME_rater_sd`, their deviation (n - 1).

    Args:
        ratings: By target.
    """
    facts: dict[str, float | int | None] = {}
    for name, values in ratings.items():
        facts[f"{name}_raters"] = len(values) or None
        facts[f"{name}_rater_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return facts


def find_one(root: Path, *candidates: str, what: str) -> Path:
    """The first of several names that a release may use.

    Raises:
        ReadCorpusError: if none is there.
    """
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise ReadCorpusError(f"{root} has no {what}: none of {', '.join(candidates)} is there.")
