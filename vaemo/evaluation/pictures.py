"""Pictures of scores, and of scores against labels, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaemo.drawing import GREY, colours_of, figure, to_png
from vaemo.units import DIMENSIONS, LabelScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vaemo.model.settling import ErrorByPosition

_BINS = 10
_PLACES = 20
_SPEAKERS = ("#1f7a99", "#b4479a", "#5a8a1f", "#8a5cd1", "#b8860b", "#707a8a")


def calibration(
    prediction: np.ndarray, label: np.ndarray, scale: LabelScale, names: Sequence[str] = DIMENSIONS
) -> bytes:
    """Mean label against mean prediction in tenths of the predictions, with the labels' spread.

    Args:
        prediction: (n, K).
        label: (n, K), NaN = not labelled.
        scale: Both axes' range.
        names: The targets, K.
    """
    colours = colours_of(names)
    with figure(4.5 * len(names), 4.8, len(names)) as (drawn, axes):
        # Square axes: the plain constrained layout would cut their titles.
        drawn.set_layout_engine("compressed")
        for k, (name, axis) in enumerate(zip(names, axes, strict=True)):
            known = ~np.isnan(label[:, k])
            x, y = prediction[known, k], label[known, k]
            axis.plot([scale.low, scale.high], [scale.low, scale.high], color=GREY, linewidth=1, linestyle="--")
            axis.scatter(x, y, s=6, color=colours[name], alpha=min(0.35, 300 / max(len(x), 1)), linewidth=0)
            parts = [part for part in np.array_split(np.argsort(x, kind="stable"), _BINS) if len(part)]
            axis.errorbar(
                [x[part].mean() for part in parts],
                [y[part].mean() for part in parts],
                [y[part].std() for part in parts],
                color=colours[name],
                marker="o",
                capsize=3,
            )
            axis.set(xlim=(scale.low, scale.high), ylim=(scale.low, scale.high), aspect="equal")
            axis.set(title=name.capitalize(), xlabel="predicted", ylabel="label")
        return to_png(drawn)


def error_over_session(
    prediction: np.ndarray, label: np.ndarray, at: np.ndarray, unit: str, names: Sequence[str] = DIMENSIONS
) -> bytes:
    """Root mean squared error against how far the session has come, with two standard errors.

    Args:
        prediction: (n, K).
        label: (n, K), NaN = not labelled.
        at: (n,) how far.
        unit: What `at` is counted in, as the axis says it.
        names: The targets, K.
    """
    colours = colours_of(names)
    with figure(8, 3.8) as (drawn, (axis,)):
        for k, name in enumerate(names):
            _error_curve(axis, at, prediction[:, k] - label[:, k], label=name, color=colours[name])
        axis.set(title="Error over the session", xlabel=unit, ylabel="RMSE", ylim=(0, None))
        axis.legend()
        return to_png(drawn)


def error_by_position(errors: ErrorByPosition) -> bytes:
    """Root mean squared error against the position in the session: of all of it, and less each session's mean error."""
    colours = colours_of(errors.names)
    with figure(8, 3.8) as (drawn, (axis,)):
        for k, name in enumerate(errors.names):
            some = errors.n[:, k] > 0
            for of, label, style in ((errors.mse, name, "-"), (errors.within_mse, f"{name}, within sessions", ":")):
                at, root = errors.starts[some] + 1, np.sqrt(of[some, k])
                axis.plot(at, root, color=colours[name], marker="o", markersize=4, linestyle=style, label=label)
        axis.set(title="Error by position", xlabel="utterance of the session, from", ylabel="RMSE", ylim=(0, None))
        axis.set_xscale("log")
        heard = errors.starts[errors.n.any(axis=1)] + 1
        axis.set_xticks(heard, labels=[str(start) for start in heard])
        axis.minorticks_off()
        axis.legend()
        return to_png(drawn)


def label_fed(
    fed: np.ndarray,
    free: np.ndarray,
    label: np.ndarray,
    at: np.ndarray,
    unit: str,
    names: Sequence[str] = DIMENSIONS,
) -> bytes:
    """`error_over_session` twice in each picture: with the labels of the past fed, and running free.

    Args:
        fed: Predictions, (n, K).
        free: Predictions, (n, K).
        label: (n, K), NaN = not labelled.
        at: (n,) how far the session has come.
        unit: What `at` is counted in.
        names: The targets, K.
    """
    colours = colours_of(names)
    with figure(5.5 * len(names), 3.8, len(names)) as (drawn, axes):
        for k, (name, axis) in enumerate(zip(names, axes, strict=True)):
            _error_curve(axis, at, free[:, k] - label[:, k], label="running free", color=colours[name])
            _error_curve(axis, at, fed[:, k] - label[:, k], label="labels fed", color=GREY, linestyle="--")
            axis.set(title=f"Error of {name} over the session", xlabel=unit, ylabel="RMSE", ylim=(0, None))
            axis.legend()
        return to_png(drawn)


def distributions(histogram: np.ndarray, scale: LabelScale, names: Sequence[str] = DIMENSIONS) -> bytes:
    """How many utterances have which score.

    Args:
        histogram: (K, bins) counts over equal parts of the range.
        scale: The range.
        names: The targets, K.
    """
    colours = colours_of(names)
    edges = np.linspace(scale.low, scale.high, histogram.shape[1] + 1)
    with figure(4.5 * len(names), 3.2, len(names)) as (drawn, axes):
        for name, counts, axis in zip(names, histogram, axes, strict=True):
            axis.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=colours[name])
            axis.set(title=name.capitalize(), xlabel="score", ylabel="utterances", xlim=(scale.low, scale.high))
            axis.grid(visible=False, axis="x")
        return to_png(drawn)


def plane(counts: np.ndarray, scale: LabelScale, names: Sequence[str] = DIMENSIONS) -> bytes:
    """The plane of two targets, darker where more utterances are.

    Args:
        counts: (cells, cells), the second target upwards in rows, the first in columns.
        scale: Both axes' range.
        names: The two, valence and arousal by default.
    """
    with figure(4.8, 4.4) as (drawn, (axis,)):
        extent = (scale.low, scale.high, scale.low, scale.high)
        axis.imshow(np.sqrt(counts), origin="lower", extent=extent, cmap="Blues", aspect="equal")
        axis.axhline(scale.middle, color=GREY, linewidth=0.8)
        axis.axvline(scale.middle, color=GREY, linewidth=0.8)
        axis.grid(visible=False)
        axis.set(title=f"{names[0].capitalize()}-{names[1]} plane", xlabel=names[0], ylabel=names[1])
        return to_png(drawn)


def call(title: str, curve: Mapping[str, Any], scale: LabelScale, names: Sequence[str] = DIMENSIONS) -> bytes:
    """The targets of one call over time, who speaks by colour, the lowest score ringed, labels dotted.

    Args:
        title: What to call it.
        curve: As `vaemo.report.overview.curves` gives it.
        scale: The range of the scores.
        names: The targets.
    """
    with figure(6 * len(names), 3.6, len(names)) as (drawn, axes):
        at = np.add(curve["start"], curve["end"]) / 2 / (60 if curve["timed"] else 1)
        speaks = np.array(curve["speaks"])
        for name, axis in zip(names, axes, strict=True):
            values = np.array(curve[name], np.float64)
            known = np.isfinite(values)
            for index, who in enumerate(curve["who"]):
                own = known & (speaks == index)
                if own.any():
                    colour = _SPEAKERS[index % len(_SPEAKERS)]
                    axis.plot(at[own], values[own], color=colour, linewidth=1.4, marker="o", markersize=4, label=who)
            if f"label_{name}" in curve:
                label = np.array(curve[f"label_{name}"], np.float64)
                axis.plot(at, label, color=GREY, linewidth=1.4, linestyle=":", label="label")
            if (lowest := curve["lowest"][name]) is not None:
                axis.plot(
                    at[lowest], values[lowest], "o", color="black", markersize=11, fillstyle="none", clip_on=False
                )
            axis.set(title=name.capitalize(), ylim=(scale.low, scale.high))
            axis.set_xlabel("minutes" if curve["timed"] else "utterance")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn.suptitle(title, x=0.01, ha="left", fontsize=10)
        return to_png(drawn)


def _error_curve(axis: Axes, at: np.ndarray, error: np.ndarray, **style: Any) -> None:
    """Root mean square of errors (NaN = unknown) in ranges of `at` that hold about as many utterances each."""
    known = ~np.isnan(error)
    if not known.any():
        return
    squared, at = error[known] ** 2, at[known]
    parts = np.searchsorted(np.quantile(at, np.linspace(0, 1, _PLACES + 1)[1:-1]), at, side="left")
    middle, mean, half_width = [], [], []
    for part in np.unique(parts):
        inside = squared[parts == part]
        middle.append(at[parts == part].mean())
        mean.append(np.sqrt(inside.mean()))
        # The delta method takes the error of a mean to that of its root: half of it, of which two are shown.
        half_width.append(inside.std() / np.sqrt(len(inside)) / max(mean[-1], 1e-12))
    lower, upper = np.subtract(mean, half_width), np.add(mean, half_width)
    axis.plot(middle, mean, marker="o", markersize=4, **style)
    axis.fill_between(middle, lower, upper, color=style["color"], alpha=0.15, linewidth=0)
