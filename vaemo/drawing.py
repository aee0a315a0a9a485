"""Drawing of pictures: one style, PNG bytes, no window system, no global state of matplotlib."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vaemo import files
from vaemo.extras import offers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"valence": "#2a7f9e", "arousal": "#d9662b"}
"""Distinguishable for the colour-blind; the web pages use the same."""

_FURTHER = ("#5a8a1f", "#8a5cd1", "#b8860b", "#b4479a", "#1f4e9a")


def colours_of(targets: Sequence[str]) -> dict[str, str]:
    """A colour for each target; those beyond valence and arousal take the rest of the palette in turn."""
    others = itertools.cycle(_FURTHER)
    return {name: COLOURS.get(name) or next(others) for name in targets}


PLAIN, MARKED, GREY = COLOURS["valence"], COLOURS["arousal"], "#8a8f98"
"""Colours not for a target: the content, highlights, and the background."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#b9bec7",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e7e9ed",
    "legend.frameon": False,
}


@contextmanager
def figure(width_in: float, height_in: float, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the house style with axes side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width_in, height_in), layout="constrained")
        yield made, list(made.subplots(1, columns, squeeze=False)[0])


def to_png(drawn: Figure) -> bytes:
    """The picture as the content of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write_pictures(folder: str, draw: Mapping[str, Callable[[], bytes]]) -> dict[str, bytes]:
    """Draw pictures and write each as FOLDER/NAME.png; without matplotlib, print one line and draw none.

    Args:
        folder: Path or URI.
        draw: By name, what gives the content of the file.

    Returns:
        What was written, by name.
    """
    if not offers("matplotlib", "pictures"):
        return {}
    drawn = {name: make() for name, make in draw.items()}
    for name, png in drawn.items():
        files.write_whole(files.join(folder, f"{name}.png"), png)
    return drawn
