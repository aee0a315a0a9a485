"""Make a report: `index.html` and `pictures/`, from scores, labels where there are, and audio beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

import vaemo
from vaemo import files, scores
from vaemo.audio.archive import shown
from vaemo.config import Config
from vaemo.drawing import colours_of, write_pictures
from vaemo.errors import ReadScoresError
from vaemo.evaluation import pictures
from vaemo.evaluation.evaluate import measure
from vaemo.evaluation.pairs import choose_split, read_labels, read_pairs
from vaemo.report.overview import (
    MIN_SCORED,
    Overview,
    calls_table,
    choose_calls,
    curves,
    of_call,
    over_time,
    unscored_calls,
)
from vaemo.report.page import build_report
from vaemo.targets import session_names, utterance_names
from vaemo.trust.calibration import OWN_CALLS
from vaemo.trust.fit import FIT, WARNED_SHARE

TOP = 500
"""Calls that are drawn where there are more of them."""

ENDS, SHOWN = ("most", "least"), 7
"""The calls that are listed of those that fit least and best."""

PICTURES = 12
"""Calls that are drawn as PNG too: those with the lowest mean valence."""

_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".webm")


def write_report(
    scored: str,
    out: str,
    config: Config,
    *,
    labels: str | None = None,
    audio: str | None = None,
    top: int = TOP,
) -> dict[str, int]:
    """Write `OUT/index.html` and `OUT/pictures/*.png`.

    Args:
        scored: The folder of scores.
        out: Where to write.
        config: `score` for what counts as low; `labels` and `evaluate` where labels are given.
        labels: A store or a manifest; its labels are drawn beside the scores, and the agreement is given.
        audio: The folder of recordings; the page links the files, relative where it can, and plays utterances.
        top: Calls drawn in full; the overview counts all of them.

    Returns:
        `calls`, `drawn` and `with_audio`: how many there are.

    Raises:
        ReadScoresError: if there are no scores, or none of the calls has a recording in `audio`.
        LabelError: if labels are given and none of them belongs to these scores.
    """
    sessions = scores.read_sessions(scored)
    overview = Overview.of(scored)
    # A part of sessions is written before that of their utterances.
    whole = sessions.filter(pc.is_in(sessions["session_id"], pa.array(overview.session_ids, pa.string())))
    n_left_out = pc.count_distinct(sessions["session_id"]).as_py() - pc.count_distinct(whole["session_id"]).as_py()
    sessions = whole
    names, targets = overview.names, scores.read_targets(scored)
    fit = _fit_of(scored, sessions)
    listened = {call["session_id"] for end in ENDS for call in fit[end]} if fit else set()
    drawn = choose_calls(sessions, top, names, listened)
    utterances = scores.read_utterances(scored, sessions=drawn)
    known = read_labels(labels, config, overview.scale, targets)[0] if labels is not None else None
    drawn_curves = curves(utterances, known, names)
    recordings = {session: curve.pop("recordings", None) for session, curve in drawn_curves.items()}
    links = _audio_links(drawn, recordings, audio, out) if audio is not None else {}
    calls = calls_table(sessions, drawn, targets)
    page: dict[str, Any] = {
        "version": vaemo.__version__,
        "notices": _notices(scores.read_provenance(scored), fit, n_left_out),
        "fit": fit,
        "n_calls": len(sessions["session_id"].unique()),
        "n_drawn": len(drawn),
        "targets": colours_of(names),
        "session_targets": list(session_names(targets)),
        "of_calls": overview.of_calls,
        "low_at": config.score.low_of(utterance_names(targets)),
        "min_scored": MIN_SCORED,
        "half_life_s": config.score.end_half_life_s,
        "overview": overview.to_plain(),
        "over_time": over_time(sessions, names=names),
        "agreement": _agreement(scored, labels, config) if labels is not None else None,
        "calls": calls,
        "unscored": unscored_calls(sessions),
        "curves": drawn_curves,
        "audio": links,
    }
    files.write_whole(files.join(out, "index.html"), build_report(page))
    _draw(out, overview, calls, drawn_curves)
    return {"calls": page["n_calls"], "drawn": len(drawn), "with_audio": len(links)}


def _fit_of(scored: str, sessions: pa.Table) -> dict[str, Any] | None:
    """What scoring found of the fit, and of the calls that fit least and best what is known; None where nothing."""
    if not files.exists(path := files.join(scored, FIT)) or "novelty" not in sessions.column_names:
        return None
    fit = files.read_json(path)
    # A call has a row for each role, and those that are not scored have no novelty. Calls may have been erased since.
    sessions = sessions.filter(pc.is_valid(sessions["novelty"])).sort_by("novelty")
    rows = list(enumerate(sessions["session_id"].to_pylist()))
    last = {"most": {name: row for row, name in rows}, "least": {name: row for row, name in reversed(rows)}}
    columns, known = ("session_id", "novelty", "novelty_of"), {}
    for end, row in last.items():
        calls = [session for session in dict.fromkeys(fit[end]) if session in row][:SHOWN]
        known[end] = sessions.select(columns).take(pa.array([row[name] for name in calls], pa.int64())).to_pylist()
    return {"beyond": fit["beyond"], "expected": fit["expected"], **known}


def _notices(provenance: Mapping[str, Any], fit: Mapping[str, Any] | None, n_left_out: int) -> list[dict[str, str]]:
    """Notices that come before any number: synthetic training data, who was scored, on what ground, what is missing."""
    notices = []
    if provenance.get("synthetic"):
        notices.append(
            {
                "kind": "warning",
                "text": "The model was trained on synthetic speech. Its scores of real people mean nothing.",
            }
        )
    trust = provenance.get("trust") or {}
    if trust.get("coverage"):
        where = "on labelled calls of this archive" if trust["calibrated_on"] == OWN_CALLS else "on the training corpus"
        notices.append(
            {
                "kind": "note",
                "text": f"Bands hold {100 * trust['coverage']:g} % of annotators' labels, measured {where} "
                f"({trust['n_groups']} groups of calls), over random utterances of new calls, not within every call.",
            }
        )
    if fit:
        notices.append(
            {
                "kind": "warning" if fit["beyond"] > WARNED_SHARE else "note",
                "text": f"{100 * fit['beyond']:.0f} % of the calls are more unusual than 95 % of those that the model "
                f"was measured on; {100 * fit['expected']:.0f} % are expected where the model fits.",
            }
        )
    if n_left_out:
        notices.append(
            {
                "kind": "note",
                "text": f"{n_left_out:,} calls are left out, because their utterances are not in the folder. A job is "
                "writing them, or it was stopped: run it again.",
            }
        )
    if provenance.get("notice"):
        notices.append({"kind": "warning", "text": provenance["notice"]})
    if provenance.get("agents_exception"):
        reference = provenance.get("agents_exception_reference")
        notices.append(
            {
                "kind": "warning",
                "text": f"Employees were scored under the exception '{provenance['agents_exception']}' "
                f"(reference: {reference}).",
            }
        )
    return notices


def _agreement(scored: str, labels: str, config: Config) -> dict[str, Any]:
    """The metrics of the split used for evaluation."""
    split, pairs = choose_split(read_pairs(scored, labels, config), None)
    return {"split": split, **measure(pairs, config)}


def _audio_links(
    drawn: Sequence[str], recordings: Mapping[str, Sequence[str] | None], audio: str, out: str
) -> dict[str, str | list[str | None] | None]:
    """Where the page finds the recordings of a call: the file of its id below the folder, with or without a suffix.

    Of a call in several recordings the scores name the files, wherever the folder lies now: a list, None for one that
    is not there.
    """
    there = {shown(found.name): found.path for found in files.walk(audio)}
    links: dict[str, str | list[str | None] | None] = {}
    for session in drawn:
        several = recordings.get(session)
        names = [_ends_of(path) for path in several] if several else [[session + suffix for suffix in _SUFFIXES]]
        paths = [next((there[name] for name in some if name in there), None) for some in names]
        if any(paths):
            found = [path if path is None or files.is_uri(path) else _local_link(path, out) for path in paths]
            links[session] = found if several else found[0]
    if drawn and not links:
        raise ReadScoresError(
            f"none of the {len(drawn):,} calls has a recording in {audio}: a call such as '{drawn[0]}' would be the "
            "file of that name, with or without a suffix such as .wav. Give the folder that was scored."
        )
    return links


def _ends_of(path: str) -> list[str]:
    """A path, and what is left of it below each of its folders."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _local_link(path: str, out: str) -> str:
    if files.is_uri(out):
        return Path(path).resolve().as_uri()
    return quote(os.fsencode(os.path.relpath(path, out)))


def _draw(out: str, overview: Overview, calls: Mapping[str, list[Any]], drawn: Mapping[str, Mapping[str, Any]]) -> None:
    means = zip(calls[of_call(overview.names[0], calls)], calls["session_id"], strict=True)
    lowest = [session for mean, session in sorted(pair for pair in means if pair[0] is not None)]
    first = list(dict.fromkeys(lowest))[:PICTURES]
    draw = {
        "distributions": partial(pictures.distributions, overview.histogram, overview.scale, overview.names),
        **(
            {}
            if overview.plane is None
            else {"plane": partial(pictures.plane, overview.plane, overview.scale, overview.names)}
        ),
        **{
            f"call-{number:02d}": partial(pictures.call, session, drawn[session], overview.scale, overview.names)
            for number, session in enumerate(first, 1)
        },
    }
    write_pictures(files.join(out, "pictures"), draw)
