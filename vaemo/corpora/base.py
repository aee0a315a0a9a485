"""What every corpus reader returns, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from vaemo.errors import ReadCorpusError
from vaemo.manifest import COLUMNS
from vaemo.units import DIMENSIONS

NAMES = ("emodb", "iemocap", "msp-conversation", "msp-improv", "msp-podcast", "recola", "sewa")

LABEL_LAG_S = 2.0
"""Annotators who follow a recording with a joystick are about so late."""


@dataclass(frozen=True)
class Corpus:
    """The utterances of a corpus.

    Attributes:
        rows: Manifest rows; labels on the native scale, `audio_path` absolute.
        label_range: The native scale: what `labels.range` must say.
        notes: What the reader had to decide, with counts, for a person.
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
        ReadCorpusError: if there is no such reader, or the folder is not laid out as that corpus is.
    """
    if name not in NAMES:
        raise ReadCorpusError(f"no reader for the corpus '{name}'; there are {', '.join(NAMES)}.")
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


def clip_labels(rows: Iterable[dict[str, Any]], label_range: tuple[float, float]) -> list[str]:
    """Bring labels outside the range to its edge, in place; a note that counts them, if there are any."""
    low, high = label_range
    n_clipped = 0
    for row in rows:
        for name in DIMENSIONS:
            value = row.get(name)
            if value is not None and not low <= value <= high:
                row[name] = min(max(value, low), high)
                n_clipped += 1
    return [f"{n_clipped} labels outside [{low:g}, {high:g}] were clipped to it"] if n_clipped else []


def find_one(root: Path, *candidates: str, what: str) -> Path:
    """The first of several names that a release may use.

    Raises:
        ReadCorpusError: if none is there.
    """
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise ReadCorpusError(f"{root} has no {what}: none of {', '.join(candidates)} is there.")
