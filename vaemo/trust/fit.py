"""The fit of a model to an archive: a table at the end of scoring, and `_fit.json` in the folder of scores.

Reads the scores' sessions, one row per call and role; a call beyond is one that is more unusual than 95 % of those that
the model was calibrated with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files, scores
from vaemo.trust.beside import MOST_GROUPS, OF_CUSTOMERS, SCORED_OR_UNFIT
from vaemo.trust.judge import Judge
from vaemo.trust.novelty import BEYOND
from vaemo.trust.rows import floats

FIT = "_fit.json"

WARNED_SHARE = 0.2
"""Share of calls beyond, above which scoring ends with a warning; where the data fit it is 0.05."""

EXAMPLES = 10

_TOLD_APART = OF_CUSTOMERS - {"role", "split", "fold", "status", "position", "duration_s", "novelty_of"}
"""Columns that would show if the gate drops a group of people, or of lines."""


def fit_of(out: str, judge: Judge) -> dict[str, Any] | None:
    """How a folder of scores fits what its model was trained on; None where no call has a novelty.

    Returns:
        `n_calls`, `beyond` (the share of calls beyond), `expected` (where the data fit), `measured_on`; `differs_in`:
        of the calls beyond, how many differ most in each stream or sound; `by_role`: share beyond and number of calls;
        `most` and `least`: session ids of the most and least unusual calls; `unfit`: by role, the share of utterances
        without a score for it; `unfit_by`: likewise by every column of the scores that tells customers or calls apart.
    """
    assert judge.novelty
    sessions = scores.read_sessions(out)
    if "novelty" not in sessions.column_names:
        return None
    sessions = sessions.filter(pc.is_valid(sessions["novelty"]))
    if not sessions.num_rows:
        return None
    novelty = floats(sessions, "novelty")
    beyond = novelty > BEYOND
    order, ids = np.argsort(-novelty, kind="stable"), sessions["session_id"].to_pylist()
    roles, differs = sessions["role"].to_pylist(), sessions["novelty_of"].to_pylist()
    counts = Counter(name for name, is_beyond in zip(differs, beyond, strict=True) if is_beyond)
    by_role = {}
    for role in sorted(set(roles), key=str):
        mine = np.array([each == role for each in roles])
        by_role[str(role)] = {"n_calls": int(mine.sum()), "beyond": float(beyond[mine].mean())}
    return {
        "n_calls": len(ids),
        "beyond": float(beyond.mean()),
        "expected": judge.novelty.expected,
        "measured_on": "dev" if judge.novelty.from_dev else "calib",
        "n_groups": judge.novelty.n_groups,
        "differs_in": dict(counts.most_common()),
        "by_role": by_role,
        "most": [ids[number] for number in order[:EXAMPLES]],
        "least": [ids[number] for number in order[::-1][:EXAMPLES]],
        **_unfit(out, judge.max_novelty < 1),
    }


def write_fit(out: str, judge: Judge) -> list[str]:
    """Write `_fit.json`, and return the table as lines, the last one a warning where the model hardly fits."""
    found = fit_of(out, judge)
    if found is None:
        return []
    files.write_json(files.join(out, FIT), found)
    measured = "held-out sessions" if found["measured_on"] == "calib" else "the split dev (no calib is there)"
    lines = [
        f"fit: {100 * found['beyond']:.1f} % of {found['n_calls']:,} calls are more unusual than 95 % of {measured}; "
        f"{100 * found['expected']:.0f} % are expected where the model fits."
    ]
    n_beyond = sum(found["differs_in"].values())
    for name, n in found["differs_in"].items():
        lines.append(f"  {n:>10,}  differ most in {name} ({100 * n / n_beyond:.0f} %)")
    if len(found["by_role"]) > 1:
        lines += [f"  {100 * each['beyond']:>9.1f} % of role {role}" for role, each in found["by_role"].items()]
    for name, shares in {"role": found["unfit"], **found["unfit_by"]}.items():
        for value, share in sorted(shares.items(), key=lambda item: -item[1]):
            lines.append(f"  {100 * share:>9.1f} % of the utterances of {name} {value} are unfit (score.max_novelty)")
    if found["beyond"] > max(WARNED_SHARE, 2 * found["expected"]):
        lines.append(
            f"warning: the model hardly knows such calls, such as '{found['most'][0]}'. Errors and coverage measured "
            "elsewhere do not hold here: label some calls and run jobs/calibrate.py."
        )
    return lines


def _unfit(out: str, asked: bool) -> dict[str, Any]:
    """Shares of utterances that are unfit, of those that are scored or unfit, by role and by further columns."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for part in scores.scan_utterances(out) if asked else ():
        rows = part.filter(pc.is_in(part["status"], pa.array(SCORED_OR_UNFIT)))
        for name in ("role", *_TOLD_APART.intersection(rows.column_names)):
            for item in rows.group_by([name, "status"]).aggregate([([], "count_all")]).to_pylist():
                counts[name][str(item[name])][item["status"]] += item["count_all"]
    shares = {
        name: {value: n["unfit"] / n.total() for value, n in sorted(of_column.items())}
        for name, of_column in counts.items()
        if name == "role" or 1 < len(of_column) <= MOST_GROUPS
    }
    return {"unfit": shares.pop("role", {}), "unfit_by": dict(sorted(shares.items()))}
