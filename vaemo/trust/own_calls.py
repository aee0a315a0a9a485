"""Calibration on a user's own labelled calls: intervals, corrections of bias and spread, and their benefit.

Reads a folder of scores and labels for some of its calls; writes the checkpoint once more, with `calibration.json`.
Nothing is trained. Corrections are kept only where cross-validation over groups of calls says that they help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files, scores
from vaemo.config import Config
from vaemo.errors import LabelError, UsageError, named
from vaemo.evaluation.pairs import read_labels, row_keys, used_rows
from vaemo.metrics import Moments
from vaemo.model.checkpoint import copy_checkpoint, load_checkpoint
from vaemo.progress import say
from vaemo.tables import with_column
from vaemo.targets import utterance_names
from vaemo.training.card import write_card
from vaemo.training.run_folder import USED
from vaemo.trust import conformal
from vaemo.trust.calibration import CALIB_SPLIT, HELD_OUT, OWN_CALLS, Calibration, Correction, calibrate
from vaemo.trust.novelty import NOVELTY
from vaemo.trust.rows import floats, utterance_rows
from vaemo.units import CALIB, LabelScale

FOLDS = 10
SLOPES = (0.2, 5.0)
_FEWEST = 10
"""Least groups to learn a correction from."""


def calibrate_calls(
    scored: str, labels: str, checkpoints: Sequence[str], out: str, config: Config
) -> tuple[Calibration, tuple[str, ...]]:
    """Calibrate checkpoints on labelled sessions of their scores, and write them once more.

    Sessions of the split `calib` are taken where there are any, the scale of the error being learned on `dev`; else
    held-out rows of folds; else all labelled sessions outside of `train` and `dev`, and then corrections are learned.
    What RUN/used.parquet beside a checkpoint lists as `train` or `dev` is left out, whatever split the scores name.

    Args:
        scored: The folder of scores that these checkpoints made.
        labels: A store or a manifest.
        checkpoints: One, or several that were scored together.
        out: The folder of the calibrated checkpoint; of several it holds `0`, `1`, ...
        config: `labels`, and `score.coverage` for the reported widths.

    Returns:
        The calibration, and the folders written.

    Raises:
        UsageError: if the scores are of other checkpoints, or corrected already.
        LabelError: if no labelled session may be calibrated on.
    """
    scale, native = scores.read_scales(scored)
    loaded = [load_checkpoint(path) for path in checkpoints]
    provenance = scores.read_provenance(scored)
    _check_made_by(provenance, scored, [each.fingerprint for each in loaded])
    targets = scores.read_targets(scored)
    known, _ = read_labels(labels, config, scale, targets, native)
    names = [name for name in utterance_names(targets) if name in known.column_names]
    table = _labelled(scored, known, names)
    held_out = bool(provenance.get("held_out"))
    used = np.zeros(table.num_rows, bool) if held_out else _used(table, checkpoints)
    made_on, table, dev = _choose(table, used, held_out, labels)
    earlier = next(filter(None, map(Calibration.read, checkpoints)), None)
    corrections: dict[str, Any] = {}
    worth: dict[str, Any] = {}
    if made_on == OWN_CALLS:
        corrections, table, worth = _corrected(table, scale, config.score.coverage, names)
    together = tuple(sorted(each.fingerprint for each in loaded))
    scales_of = earlier if earlier and earlier.checkpoints == together else None
    folders = (out,) if len(checkpoints) == 1 else tuple(files.join(out, str(n)) for n in range(len(checkpoints)))
    written = [
        each.fingerprint if path == folder else copy_checkpoint(path, folder)
        for each, path, folder in zip(loaded, checkpoints, folders, strict=True)
    ]
    calibration = calibrate(
        table, dev, written, made_on, scale, scales_of=scales_of, correction=corrections, names=names
    )
    calibration = dataclasses.replace(calibration, worth=worth)
    for path, folder in zip(checkpoints, folders, strict=True):
        calibration.write(folder)
        if path != folder and files.exists(files.join(path, NOVELTY)):
            files.write_whole(files.join(folder, NOVELTY), files.read_bytes(files.join(path, NOVELTY)))
        write_card(folder)
    return calibration, folders


def suggest_calls(scored: str, n: int, seed: int = 0) -> list[str]:
    """Calls to label: spread over novelty and scores, each call with the same chance.

    Calls are put in order of how unusual they are, then of their mean valence and arousal, and every k-th is taken
    from a random start on. So the calls are spread, and still a random sample of the archive, as intervals need it.

    Args:
        scored: The folder of scores.
        n: How many.
        seed: Of the start.
    """
    names = utterance_names(scores.read_targets(scored))
    sessions = scores.read_sessions(scored)
    sessions = sessions.filter(pc.greater(sessions["n_scored"], 0))
    first = np.unique(sessions["session_id"].to_numpy(zero_copy_only=False).astype(str), return_index=True)[1]
    sessions = sessions.take(pa.array(np.sort(first)))
    if sessions.num_rows <= n:
        return sessions["session_id"].to_pylist()
    bands = [
        _band(floats(sessions, "novelty"), 4),
        *(_band(floats(sessions, f"{name}_mean"), 4) for name in names),
    ]
    order = np.lexsort((np.random.default_rng(seed).random(sessions.num_rows), *bands[::-1]))
    step = sessions.num_rows / n
    start = np.random.default_rng(seed + 1).random() * step
    return sessions["session_id"].take(pa.array(order[(start + step * np.arange(n)).astype(int)])).to_pylist()


def table_of(calibration: Calibration, coverage: float) -> str:
    """What a person reads of a calibration, as lines."""
    lines = [calibration.says(coverage)]
    for name, worth in calibration.worth.items():
        correction = calibration.correction.get(name)
        kept = f"score -> {correction.offset:+.3f} {correction.slope:+.3f} * score" if correction else "none helps"
        lines.append(
            f"{name}: correction {kept}; by cross-validation over {worth['n_groups']} groups: "
            f"bias {worth['bias'][0]:+.3f} -> {worth['bias'][1]:+.3f}, "
            f"RMSE {worth['rmse'][0]:.3f} -> {worth['rmse'][1]:.3f}, CCC {worth['ccc'][0]:.3f} -> {worth['ccc'][1]:.3f}"
            + (f", covered {100 * worth['covered']:.1f} %" if worth["covered"] is not None else "")
        )
    return "\n".join(lines)


def _check_made_by(provenance: Mapping[str, Any], scored: str, fingerprints: Sequence[str]) -> None:
    made_by = [each["fingerprint"] for each in provenance.get("checkpoints", [])]
    if provenance.get("held_out") and not made_by:
        raise UsageError(
            f"{scored} holds scores of held-out folds and does not say which models made them, as older versions did "
            "not. The checkpoints of its folds were calibrated on them when they were trained: score with all of them."
        )
    if made_by and sorted(made_by) != sorted(fingerprints):
        raise UsageError(
            f"{scored} was scored by the checkpoints {', '.join(name[:12] for name in made_by)}, and those given are "
            f"{', '.join(name[:12] for name in fingerprints)}. Give the checkpoints that made the scores."
        )
    if (provenance.get("trust") or {}).get("corrected"):
        raise UsageError(
            f"the scores of {scored} are corrected already, by a calibration on other calls. Score with the checkpoint "
            "as it was trained, and calibrate those scores."
        )


def _labelled(scored: str, known: pa.Table, names: Sequence[str]) -> pa.Table:
    """The scores of all sessions that have labels, in session order, with `label_NAME`."""
    table = scores.read_utterances(scored, sessions=known["session_id"].unique().to_pylist())
    if not table.num_rows:
        raise LabelError(
            f"no labelled session is among those of {scored}; give the labels that belong to these scores."
        )
    row = pc.index_in(row_keys(table), value_set=row_keys(known))
    if row.null_count == len(row):
        raise LabelError(
            f"none of the {known.num_rows:,} labelled utterances is among those of {scored}: their ids are such as "
            f"{named(known['utt_id'][0].as_py())}, here {named(table['utt_id'][0].as_py())}. Give the labels that "
            "belong to these scores."
        )
    for name in names:
        table = table.append_column(f"label_{name}", known[name].combine_chunks().take(row))
    return table


def _used(table: pa.Table, checkpoints: Sequence[str]) -> np.ndarray:
    """Which rows the checkpoints were trained on or chosen by, as far as files beside them tell."""
    used = np.zeros(table.num_rows, bool)
    for checkpoint in checkpoints:
        rows = used_rows(table, checkpoint)
        if rows is not None:
            used |= rows
        elif table["split"].null_count == table.num_rows:
            say(
                f"warning: nothing tells which calls {checkpoint} was trained on: the scores name no split, and there "
                f"is no {USED} beside it. Intervals hold only if it was trained on none of the labelled calls."
            )
    return used


def _choose(table: pa.Table, used: np.ndarray, held_out: bool, labels: str) -> tuple[str, pa.Table, pa.Table | None]:
    """What is calibrated on, its rows, and those that the scale of the error is learned on."""
    split = table["split"].to_numpy(zero_copy_only=False).astype(object)
    if held_out:
        return HELD_OUT, table, None
    wanted = ~np.isin(split, ("train", "dev"))
    calib = wanted & (split == CALIB)
    made_on = CALIB_SPLIT if (calib & ~used).any() else OWN_CALLS
    wanted = calib if made_on == CALIB_SPLIT else wanted
    if not (wanted & ~used).any():
        raise LabelError(
            f"all labelled sessions of {labels} are in train or dev, by the split of the scores or by {USED} beside "
            "the checkpoint: the model knows them, and its errors there say nothing. Label other calls, or keep a "
            "split calib (splits.calib_fraction)."
        )
    if n_used := int((wanted & used).sum()):
        say(f"left out: {n_used:,} utterances that {USED} beside the checkpoint lists as train or dev")
    chosen = table.filter(pa.array(wanted & ~used))
    return made_on, chosen, table.filter(pa.array(split == "dev")) if made_on == CALIB_SPLIT else None


def _corrected(
    table: pa.Table, scale: LabelScale, coverage: float, names: Sequence[str]
) -> tuple[dict[str, Correction], pa.Table, dict[str, Any]]:
    """The corrections that help, the scores corrected by what other groups say, and what it is worth."""
    rows = utterance_rows(table, names)
    fold = np.random.default_rng(0).permutation(int(rows.group.max(initial=-1)) + 1)[rows.group] % FOLDS
    corrections: dict[str, Any] = {}
    worth: dict[str, Any] = {}
    for name in names:
        score, label = rows.prediction[name], rows.label[name]
        known = np.isfinite(score) & np.isfinite(label)
        if not known.any():
            continue
        n_groups, chosen, best = len(np.unique(rows.group[known])), score, _mse(score, label, rows.group)
        if n_groups >= _FEWEST:
            for slopes in (False, True):
                tried = np.full(len(score), np.nan)
                for number in range(FOLDS):
                    others, mine = known & (fold != number), fold == number
                    if others.any():
                        tried[mine] = _fit(score[others], label[others], rows.group[others], slopes)(score[mine], scale)
                if (mse := _mse(tried, label, rows.group)) < best:
                    best, chosen = mse, tried
                    corrections[name] = _fit(score[known], label[known], rows.group[known], slopes)
        worth[name] = {
            "n_groups": n_groups,
            "bias": [float((each - label)[known].mean()) for each in (score, chosen)],
            "rmse": [float(np.sqrt(((each - label)[known] ** 2).mean())) for each in (score, chosen)],
            "ccc": [float(Moments.of(each[known, None], label[known, None]).ccc()[0]) for each in (score, chosen)],
            "covered": _covered(np.abs(chosen - label), rows.group, fold, coverage),
        }
        if chosen is not score:
            table = with_column(table, name, pa.array(chosen, pa.float32(), from_pandas=True))
    return corrections, table, worth


def _fit(score: np.ndarray, label: np.ndarray, group: np.ndarray, slopes: bool) -> Correction:
    """Least squares with every group counting the same."""
    weight = conformal.weights(group)
    weight /= weight.sum()
    x, y = weight @ score, weight @ label
    variance = weight @ (score - x) ** 2
    slope = float(np.clip(weight @ ((score - x) * (label - y)) / variance, *SLOPES)) if slopes and variance > 0 else 1.0
    return Correction(float(y - slope * x), slope)


def _mse(score: np.ndarray, label: np.ndarray, group: np.ndarray) -> float:
    known = np.isfinite(score) & np.isfinite(label)
    weight = conformal.weights(group[known])
    return float(weight @ (score - label)[known] ** 2 / weight.sum())


def _covered(residual: np.ndarray, group: np.ndarray, fold: np.ndarray, coverage: float) -> float | None:
    """The share of labels inside intervals calibrated on other groups, each group counting the same."""
    inside = np.full(len(residual), np.nan)
    for number in range(FOLDS):
        others, mine = fold != number, (fold == number) & np.isfinite(residual)
        reach = conformal.quantiles(residual[others], group[others], np.array([coverage]))[0]
        if mine.any() and not np.isfinite(reach):
            return None
        inside[mine] = residual[mine] <= reach
    known = np.isfinite(inside)
    weight = conformal.weights(group[known])
    return float(weight @ inside[known] / weight.sum())


def _band(values: np.ndarray, n: int) -> np.ndarray:
    """Which of n equal parts of its distribution each value lies in; 0 where it is not known."""
    known = np.isfinite(values)
    if not known.any():
        return np.zeros(len(values), np.int64)
    edges = np.quantile(values[known], np.linspace(0, 1, n + 1)[1:-1])
    return np.where(known, np.searchsorted(edges, values, side="right"), 0)
