"""What follows from all trials: best.yaml, best/, summary.json, pictures, and one HTML page that loads nothing."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import vaemo
from vaemo import files
from vaemo.drawing import write_pictures
from vaemo.report.page import build_page
from vaemo.tuning import pictures
from vaemo.tuning.space import Space
from vaemo.tuning.sweep import BEST_CONFIG, DONE, FAILED, STOPPED, SUMMARY, Record, Sweep, importance
from vaemo.tuning.trial import METRIC

_BODY = """<header class="top"><span class="brand">vaemo</span><p class="subtitle">{subtitle}</p></header>
<main>
<div class="tiles">{tiles}</div>
<div class="grid">{cards}</div>
</main>
<footer>vaemo {version}. Dev results chose the best trial, so they flatter it; judge it on the test split.</footer>
"""


def write_summary(sweep: Sweep, space: Space) -> dict[str, Any]:
    """Write what follows from the trials of a sweep, and return the content of summary.json.

    Args:
        sweep: Its trials have all ended.
        space: What was searched.

    Raises:
        SweepFailedError: if no trial ran to its end.
    """
    best = sweep.keep_best()
    records = [record for _, record in sorted(sweep.records.items())]
    shares = importance(space, records)
    summary = {
        "trials": len(records),
        **{status: Counter(record.status for record in records)[status] for status in (DONE, STOPPED, FAILED)},
        "best": {"trial_id": best.trial_id, "point": best.point, **best.metrics},
        "importance": shares,
    }
    draw = {
        "history": partial(pictures.history, records),
        "parallel_coordinates": partial(pictures.parallel_coordinates, space, records),
        "slices": partial(pictures.slices, space, records, shares),
    }
    drawn = write_pictures(files.join(sweep.out, "pictures"), draw)
    files.write_whole(files.join(sweep.out, "index.html"), sweep_page(space, records, best, shares, drawn))
    files.write_json(files.join(sweep.out, SUMMARY), summary)
    return summary


def sweep_page(
    space: Space,
    records: Sequence[Record],
    best: Record,
    shares: Mapping[str, float | None],
    drawn: Mapping[str, bytes],
) -> bytes:
    """The page as UTF-8, pictures inside.

    Args:
        space: What was searched.
        records: All trials.
        best: One of them.
        shares: Importance of each field.
        drawn: PNG pictures `history`, `parallel_coordinates`, `slices`, or none.
    """
    default = next((record for record in records if record.number == 0), None)
    counts = Counter(record.status for record in records)
    tiles = [
        _tile(_ccc(best), "best dev CCC", f"trial {best.trial_id}"),
        _tile(_ccc(default), "the config itself", "trial 0000"),
        _tile(f"{counts[DONE]}", "trials ran to their end", f"{counts[STOPPED]} ended early, {counts[FAILED]} failed"),
        _tile(f"{best.metrics['step']:,}", "optimiser steps", f"in {best.config['train']['epochs']} epochs"),
    ]
    images = {name: base64.b64encode(picture).decode() for name, picture in drawn.items()}
    cards = [
        _card("Best values", f"{BEST_CONFIG} is the whole config; jobs/train.py --config takes it.", _values(best), 5),
        _card("Importance", _NOTE, _importance(space, shares), 7),
        *(
            _card("", "", f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{image}">', 12)
            for name, image in images.items()
        ),
        _card("All trials", "The best first.", _table(space, records, best), 12),
    ]
    body = _BODY.format(
        subtitle=f"sweep over {escape(', '.join(space.names))}",
        tiles="".join(tiles),
        cards="".join(cards),
        version=vaemo.__version__,
    )
    return build_page("vaemo sweep", body)


_NOTE = (
    "Share of the differences between trials that a field explains by itself (Kruskal-Wallis eta squared, ranks; "
    "0 for a field without effect). A search draws more where results are good, so read the order, not the digits."
)


def _tile(figure: str, what: str, more: str) -> str:
    return (
        f'<div class="card tile"><div class="figure">{escape(figure)}</div><div class="what">{escape(what)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def _card(title: str, note: str, content: str, span: int) -> str:
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card span-{span}">{heading}{note}{content}</section>'


def _values(best: Record) -> str:
    rows = "".join(
        f'<tr><td class="left">{escape(name)}</td><td>{escape(_text(value))}</td></tr>'
        for name, value in best.point.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _importance(space: Space, shares: Mapping[str, float | None]) -> str:
    ordered = sorted(space.names, key=lambda name: -(shares[name] or 0.0))
    rows = "".join(
        f'<tr><td class="left">{escape(name)}</td><td class="left" style="width:45%">'
        f'<span class="bar" style="width:{100 * (shares[name] or 0):.0f}%"></span></td>'
        f"<td>{'too few trials' if shares[name] is None else format(shares[name], '.0%')}</td></tr>"
        for name in ordered
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _table(space: Space, records: Sequence[Record], best: Record) -> str:
    prefix = "dev_rmse_"
    names = [name.removeprefix(prefix) for name in best.metrics if name.startswith(prefix)]
    heads = ["trial", "status", "dev CCC", *names, *(f"RMSE {name}" for name in names), "steps", *space.names]
    metrics = (METRIC, *(f"dev_ccc_{name}" for name in names), *(f"{prefix}{name}" for name in names))
    rows = []
    for record in sorted(records, key=lambda record: (record.value is None, -(record.value or 0.0), record.number)):
        cells = [record.trial_id, record.status if record.error is None else f"failed: {record.error}"]
        cells += [_text(record.metrics.get(name)) for name in metrics]
        cells += [_text(record.metrics.get("step")), *(_text(record.point.get(name)) for name in space.names)]
        marked = ' class="best"' if record is best else ""
        left = ' class="left"'
        rows.append(
            f"<tr{marked}>"
            + "".join(f"<td{left if n < 2 else ''}>{escape(cell)}</td>" for n, cell in enumerate(cells))
            + "</tr>"
        )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _ccc(record: Record | None) -> str:
    return "-" if record is None or record.value is None else f"{record.value:.3f}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
