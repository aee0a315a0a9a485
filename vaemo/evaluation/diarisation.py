"""Evaluation of diarisation: scores against a reference of who speaks when, by `pyannote.metrics`.

Diarisation error rate (missed speech, false alarm and confusion, over the reference's speech; overlap is scored) at
collars of 0 and 0.25 s on either side of a boundary, and Jaccard error rate. Reads scores and RTTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vaemo import files
from vaemo.errors import ReadVoicesError, UsageError
from vaemo.extras import remedy, version_of
from vaemo.scores import read_utterances
from vaemo.voices.turns import read_voices

COLLARS_S = (0.0, 0.25)
_PARTS = {"missed": "missed detection", "false_alarm": "false alarm", "confusion": "confusion", "total_s": "total"}


def evaluate_voices(scores: str, reference: str, out: str) -> dict[str, Any]:
    """Error rates over all calls that the reference names, and of each; written to `OUT/diarisation.json`.

    Args:
        scores: A folder of scores; utterances without a voice are speech of their channel.
        reference: RTTM, or whatever else `--voices-from` takes: a file or a folder.
        out: Folder.

    Raises:
        UsageError: if pyannote.metrics is not installed.
        ReadScoresError: as `read_utterances`.
        ReadVoicesError: as `read_voices`.
    """
    if version_of("pyannote.metrics") is None:
        raise UsageError(f"--rttm needs pyannote.metrics, which is not installed: {remedy('pyannote.metrics')}.")
    rows = read_utterances(scores, ["session_id", "speaker_id", "start_s", "end_s"]).to_pylist()
    spoken: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        turns = spoken.setdefault(row["session_id"], [])
        if row["start_s"] is not None:
            turns.append((row["start_s"], row["end_s"], row["speaker_id"]))
    session_ids = list(spoken)
    truth = read_voices(reference, session_ids, "--rttm")
    if not truth:
        raise ReadVoicesError(f"{scores} holds no call; there is nothing to compare with {reference}.")
    pairs = [
        (session_ids[number], [(turn.start_s, turn.end_s, turn.speaker) for turn in turns], spoken[session_ids[number]])
        for number, turns in sorted(truth.items())
    ]
    result = error_rates(pairs)
    files.write_json(files.join(out, "diarisation.json"), result)
    return result


def error_rates(
    pairs: Sequence[tuple[str, Sequence[tuple[float, float, str]], Sequence[tuple[float, float, str]]]],
) -> dict[str, Any]:
    """Error rates of calls.

    Args:
        pairs: Per call its name, then who speaks when (start_s, end_s, name): as it is, and as it was found.

    Returns:
        `collar_0.00_s` and `collar_0.25_s`, each with `der` and its parts as shares of the reference's speech
        (`total_s`); `jer`; `n_calls`, `n_voices_right`; and `calls` with `der` (0.25 s) and how many voices there are.
    """
    from pyannote.core import Annotation, Segment, Timeline
    from pyannote.metrics.diarization import DiarizationErrorRate, JaccardErrorRate

    def annotation(turns: Sequence[tuple[float, float, str]]) -> Any:
        held = Annotation()
        for number, (start_s, end_s, who) in enumerate(turns):
            held[Segment(start_s, end_s), number] = who
        return held

    # Its collar is the whole width around a boundary.
    metrics = {collar: DiarizationErrorRate(collar=2 * collar) for collar in COLLARS_S}
    jaccard, calls = JaccardErrorRate(), []
    for name, truth, found in pairs:
        reference, hypothesis = annotation(truth), annotation(found)
        whole = Timeline([Segment(0.0, max((end_s for _, end_s, _ in (*truth, *found)), default=0.0))])
        rates = {collar: metric(reference, hypothesis, uem=whole) for collar, metric in metrics.items()}
        jaccard(reference, hypothesis, uem=whole)
        n = len({who for *_, who in truth}), len({who for *_, who in found})
        calls.append({"session_id": name, "der": rates[COLLARS_S[-1]], "n_voices": n[0], "n_voices_found": n[1]})
    result: dict[str, Any] = {}
    for collar, metric in metrics.items():
        held: Any = metric[:]  # type: ignore[index]  # its stubs know names alone
        parts = {name: float(held[key]) for name, key in _PARTS.items()}
        total = parts.pop("total_s") or 1.0
        shares = {name: value / total for name, value in parts.items()}
        result[f"collar_{collar:.2f}_s"] = {"der": float(abs(metric)), **shares, "total_s": total}
    right = sum(call["n_voices"] == call["n_voices_found"] for call in calls)
    return {**result, "jer": float(abs(jaccard)), "n_calls": len(calls), "n_voices_right": right, "calls": calls}


def table_of(result: dict[str, Any]) -> str:
    """The result as lines."""
    lines = [f"{'':12}{'DER':>8}{'missed':>9}{'false':>8}{'confused':>10}"]
    for collar in COLLARS_S:
        held = result[f"collar_{collar:.2f}_s"]
        shares = (held["der"], held["missed"], held["false_alarm"], held["confusion"])
        cells = [f"{100 * share:.1f} %" for share in shares]
        lines.append(f"collar {collar:.2f}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (9, 9, 8, 10), strict=True)))
    right = f"voices counted right in {result['n_voices_right']} of {result['n_calls']} calls"
    return "\n".join([*lines, f"JER {100 * result['jer']:.1f} %; {right}"])
