"""The ablation table as a picture: CCC of every variant, and its difference from the full model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaemo.ablation.table import Row
from vaemo.drawing import GREY, MARKED, PLAIN, figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.05
"""A corrected p below this is drawn in the second colour."""

_ABSENT = "mean"
"""Its CCC is 0, and an axis that reaches so far shows no difference between the others."""


def ablation(rows: Sequence[Row]) -> bytes:
    """A PNG: left CCC-avg with its interval and every seed, right the difference from the full model.

    Args:
        rows: As `summarise` gives them; variants without a result are left out, and the mean of the labels.
    """
    shown = [row for row in rows if row["n_seeds"] and row["variant"] != _ABSENT]
    with figure(11, 1.2 + 0.34 * len(shown), 2) as (drawn, (value, difference)):
        places = range(len(shown))
        for place, row in zip(places, shown, strict=True):
            value.plot(row["ccc_avg_seeds"], [place] * row["n_seeds"], "|", color=GREY, markersize=11)
            _bar(value, place, row, "ccc_avg", PLAIN)
            if row["difference_avg"] is not None:
                clear = row["p_holm"] is not None and row["p_holm"] < LEVEL
                _bar(difference, place, row, "difference_avg", MARKED if clear else PLAIN)
        for axis in (value, difference):
            axis.set(yticks=places, ylim=(len(shown) - 0.4, -0.6))
        value.set_yticklabels([row["title"] for row in shown])
        difference.set_yticklabels([])
        difference.axvline(0, color=GREY, linewidth=1)
        value.set(title="CCC average", xlabel="mean over seeds, 95 % interval over sessions; | each seed")
        difference.set(title="Less the full model", xlabel=f"paired, 95 % interval; orange: p < {LEVEL:g} after Holm")
        return to_png(drawn)


def _bar(axis: Axes, place: int, row: Row, name: str, colour: str) -> None:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low is not None and high is not None:
        axis.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axis.plot([row[name]], [place], "o", color=colour, markersize=6)
