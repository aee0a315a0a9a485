"""The course of a training run as a picture: loss, dev CCC, and what warns of collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaemo.drawing import GREY, colours_of, figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLACK = "#222222"


def draw_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> bytes:
    """A PNG of a run's metrics lines: training loss and p, dev CCC, and the three signs of collapse.

    Args:
        history: Lines of metrics.jsonl; at least one.
        title: Above the picture.
    """
    epochs = [line["epoch"] for line in history]

    def plot(axes: Axes, key: str, **style: Any) -> None:
        values = [line.get(key) for line in history]
        if any(value is not None for value in values):
            axes.plot(epochs, [float("nan") if value is None else value for value in values], **style)

    prefix = "dev_rmse_"
    names = [key.removeprefix(prefix) for key in history[-1] if key.startswith(prefix)]
    colours = {**colours_of(names), "avg": BLACK}
    with figure(13, 3.6, columns=3) as (drawn, (loss, dev, signs)):
        plot(loss, "train_loss", color=BLACK, label="training loss")
        plot(loss, "p", color=GREY, linestyle=":", label="p (labels fed)")
        for name in (*names, "avg"):
            plot(dev, f"dev_ccc_{name}", color=colours[name], label=name, linewidth=2 if name == "avg" else 1)
        for name in names:
            plot(signs, f"prediction_sd_{name}", color=colours[name], label=f"spread of {name}")
            plot(signs, f"feedback_gain_{name}", color=colours[name], linestyle="--", label=f"feedback gain, {name}")
        plot(signs, "gap_ccc_avg", color=BLACK, label="CCC, label-fed less free-running")
        for axes, heading in ((loss, "training"), (dev, "dev CCC, running free"), (signs, "signs of collapse")):
            axes.set_title(heading)
            axes.set_xlabel("epoch")
            axes.legend(fontsize=8)
            if len(epochs) < 12:
                axes.set_xticks(epochs)
        if title:
            drawn.suptitle(title, fontsize=11)
        return to_png(drawn)
