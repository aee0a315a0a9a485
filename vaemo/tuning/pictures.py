"""Pictures of a sweep as PNG bytes: its history, the good points, and the effect of each field alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaemo.drawing import GREY, MARKED, PLAIN, figure, to_png
from vaemo.tuning.space import Parameter, Space
from vaemo.tuning.sweep import DONE, FAILED, STOPPED, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_LOW = 0.25
"""Results below this quantile share the darkest colour: a few collapsed trials would take up the whole scale."""


def history(records: Sequence[Record]) -> bytes:
    """Dev CCC of every trial in the order of the trials, and the best so far.

    Args:
        records: At least one of them ran to its end.
    """
    from matplotlib.ticker import MaxNLocator

    records = sorted(records, key=lambda record: record.number)
    done, stopped, failed = ([r for r in records if r.status == status] for status in (DONE, STOPPED, FAILED))
    with figure(9, 3.8) as (drawn, (axis,)):
        best = np.maximum.accumulate([_value(record) for record in done])
        numbers = [*(record.number for record in done), records[-1].number]
        axis.step(numbers, [*best, best[-1]], where="post", color=MARKED, linewidth=1.6, label="best so far")
        for shown, face, label in ((done, PLAIN, "ran to its end"), (stopped, "none", "ended early")):
            if shown:
                x, y = [record.number for record in shown], [_value(record) for record in shown]
                axis.scatter(x, y, s=26, facecolor=face, edgecolor=PLAIN, label=label, zorder=3)
        if failed:
            low = [axis.get_ylim()[0]] * len(failed)
            axis.scatter([r.number for r in failed], low, marker="x", color="black", label="failed", clip_on=False)
        axis.set(title="Course of the sweep", xlabel="trial (0 is the config itself)", ylabel="dev CCC")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return to_png(drawn)


def parallel_coordinates(space: Space, records: Sequence[Record]) -> bytes:
    """Every trial that ran to its end as a line through its values to its dev CCC; the better, the brighter.

    A field that was not searched in a trial lies below its axis.

    Args:
        space: What was searched.
        records: At least one of them ran to its end.
    """
    import matplotlib

    done = sorted((record for record in records if record.status == DONE), key=_value)
    values = np.array([_value(record) for record in done])
    low = float(np.quantile(values, _SHOWN_LOW)) if len(values) > 1 else values[0] - 1
    norm = matplotlib.colors.Normalize(min(low, values[-1] - 1e-9), values[-1])
    colours = matplotlib.colormaps["viridis"]
    places = list(range(len(space.parameters) + 1))
    with figure(max(7, 1.9 * len(places)), 4.6) as (drawn, (axis,)):
        for record, value in zip(done, values, strict=True):
            heights = [_height(p, record.point[p.name]) if p.name in record.point else -0.08 for p in space.parameters]
            last = (value - values[0]) / max(values[-1] - values[0], 1e-9)
            axis.plot(places, [*heights, last], color=colours(norm(value)), linewidth=1.3, alpha=0.85)
        for place, parameter in enumerate(space.parameters):
            axis.axvline(place, color=GREY, linewidth=1)
            for height, text in _ticks(parameter):
                _write(axis, place, height, text)
        axis.axvline(places[-1], color=GREY, linewidth=1)
        _write(axis, places[-1], 0.0, f"{values[0]:.3f}")
        _write(axis, places[-1], 1.0, f"{values[-1]:.3f}")
        axis.set_xticks(places, [_label(name) for name in (*space.names, "dev CCC")], fontsize=9)
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.spines["bottom"].set_visible(False)
        axis.set(title="Trials", ylim=(-0.12, 1.06), xlim=(-0.15, places[-1] + 0.35))
        shades = matplotlib.cm.ScalarMappable(norm, colours)
        bar = drawn.colorbar(shades, ax=axis, pad=0.01, fraction=0.03, extend="min")
        bar.set_label("dev CCC", fontsize=9)
        return to_png(drawn)


def slices(space: Space, records: Sequence[Record], importance: Mapping[str, float | None]) -> bytes:
    """Dev CCC against each field alone, over the trials in which it was searched; the best trial is marked.

    Args:
        space: What was searched.
        records: At least one of them ran to its end.
        importance: See `vaemo.tuning.search.importance`.
    """
    done = [record for record in records if record.status == DONE]
    best = max(done, key=_value)
    with figure(max(5, 2.7 * len(space.parameters)), 3.4, len(space.parameters)) as (drawn, axes):
        for parameter, axis in zip(space.parameters, axes, strict=True):
            mine = [record for record in done if parameter.name in record.point]
            _place(axis, parameter)
            for shown, colour, size in ((mine, PLAIN, 24), ([r for r in mine if r is best], MARKED, 60)):
                x = [_position(parameter, record.point[parameter.name]) for record in shown]
                axis.scatter(x, [_value(record) for record in shown], s=size, color=colour, linewidth=0, zorder=3)
            share = importance[parameter.name]
            axis.set_title(parameter.name, fontsize=9)
            axis.set_xlabel("too few trials to say" if share is None else f"importance {share:.0%}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.sharey(axes[0])
        axes[0].set_ylabel("dev CCC")
        return to_png(drawn)


def _write(axis: Axes, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")


def _value(record: Record) -> float:
    assert record.value is not None
    return record.value


def _label(name: str) -> str:
    """The field in two lines, so that labels do not overlap."""
    return name.replace(".", ".\n", 1)


def _position(parameter: Parameter, value: Any) -> float:
    """The position of a value on its axis; a value outside the choices, which the config may have, is before them."""
    if parameter.kind != "choice":
        return float(value)
    return float(parameter.values.index(value)) if value in parameter.values else -1.0


def _place(axis: Axes, parameter: Parameter) -> None:
    if parameter.kind == "choice":
        places = range(len(parameter.values))
        axis.set_xticks(places, [str(value) for value in parameter.values], rotation=30, ha="right")
        axis.set_xlim(-0.5, len(parameter.values) - 0.5)
        return
    low, high = parameter.values
    if parameter.kind == "loguniform":
        axis.set_xscale("log")
        axis.set_xlim(low / 1.1, high * 1.1)
        axis.xaxis.set_minor_formatter("")
    else:
        margin = 0.04 * (high - low)
        axis.set_xlim(low - margin, high + margin)


def _height(parameter: Parameter, value: Any) -> float:
    """The position of a value between the least and the greatest, 0 to 1."""
    if parameter.kind == "choice":
        return max(_position(parameter, value), 0.0) / max(len(parameter.values) - 1, 1)
    low, high = parameter.values
    if parameter.kind == "loguniform":
        low, high, value = np.log([low, high, max(value, 1e-300)])
    return float(np.clip((value - low) / (high - low), 0, 1))


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    if parameter.kind == "choice":
        return [(_height(parameter, value), str(value)) for value in parameter.values]
    return [(height, f"{value:g}") for height, value in zip((0.0, 1.0), parameter.values, strict=True)]
