"""The results of a sweep: best.yaml, best/, summary.json, pictures, and one self-contained HTML page."""

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
from vaemo.tuning.held_out import HeldOut, told
from vaemo.tuning.search import importance
from vaemo.tuning.space import Space
from vaemo.tuning.sweep import BEST_CONFIG, DONE, FAILED, STOPPED, SUMMARY, Record, Sweep
from vaemo.tuning.trial import METRIC

_BODY = """<header class="top"><span class="brand">vaemo</span><p class="subtitle">{subtitle}</p></header>
<main>
<div class="tiles">{tiles}</div>
<div class="grid">{cards}</div>
</main>
<footer>vaemo {version}. Dev results chose the best trial, so they flatter it. {held_out}.</footer>
"""


def write_summary(sweep: Sweep, space: Space, held_out: HeldOut | None = None) -> dict[str, Any]:
    """Write the results of a sweep, and return the content of summary.json.

    Args:
        sweep: Its trials have all ended.
        space: What was searched.
        held_out: The held-out sessions for the winner.

    Raises:
        SweepFailedError: if no trial ran to its end.
    """
    best = sweep.keep_best()
    records = [record for _, record in sorted(sweep.records.items())]
    shares = importance(space, [(r.point, r.value) for r in records if r.status == DONE and r.value is not None])
    judged = held_out.judge(best) if held_out else None
    summary = {
        "trials": len(records),
        **{status: Counter(record.status for record in records)[status] for status in (DONE, STOPPED, FAILED)},
        "best": {"trial_id": best.trial_id, "point": best.point, **best.metrics},
        "importance": shares,
        "held_out": judged,
    }
    draw = {
        "history": partial(pictures.history, records),
        "parallel_coordinates": partial(pictures.parallel_coordinates, space, records),
        "slices": partial(pictures.slices, space, records, shares),
    }
    drawn = write_pictures(files.join(sweep.out, "pictures"), draw)
    files.write_whole(files.join(sweep.out, "index.html"), sweep_page(space, records, best, shares, drawn, judged))
    files.write_json(files.join(sweep.out, SUMMARY), summary)
    return summary


def sweep_page(
    space: Space,
    records: Sequence[Record],
    best: Record,
    shares: Mapping[str, float | None],
    drawn: Mapping[str, bytes],
    judged: Mapping[str, Any] | None = None,
) -> bytes:
    """The page as UTF-8, pictures inside.

    Args:
        space: What was searched.
        records: All trials.
        best: One of them.
        shares: Importance of each field.
        drawn: PNG pictures `history`, `parallel_coordinates`, `slices`, or none.
        judged: What `HeldOut.judge` found.
    """
    default = next((record for record in records if record.number == 0), None)
    counts = Counter(record.status for record in records)
    tiles = [
        _tile(_ccc(best), "best dev CCC", f"trial {best.trial_id}"),
        _tile(_ccc(default), "the config itself", "trial 0000"),
        _tile(f"{counts[DONE]}", "trials ran to their end", f"{counts[STOPPED]} ended early, {counts[FAILED]} failed"),
        _tile(f"{best.metrics['step']:,}", "optimiser steps", f"in {best.config['train']['epochs']} epochs"),
    ]
    if judged:
        default_was = f", the config itself {_held(judged['default'])}" if judged["default"] else ""
        looks = f"; winner {judged['looks']} looked at" if judged["looks"] > 1 else ""
        tiles.insert(1, _tile(_held(judged["best"]), "the best trial, held out", f"CCC{default_was}{looks}"))
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
        held_out=escape(told(judged) if judged else "Nothing was held out"),
    )
    return build_page("vaemo sweep", body)


_NOTE = (
    "How differently a field is spread over the best trials and over all (PED-ANOVA of Optuna; shares sum to 100 %). "
    "A search draws more where results are good, so read the order, not the digits."
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


def _held(of: Mapping[str, Any]) -> str:
    value = of["avg"]["value"]
    return "-" if value is None else f"{value:.3f}"


def _ccc(record: Record | None) -> str:
    return "-" if record is None or record.value is None else f"{record.value:.3f}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
