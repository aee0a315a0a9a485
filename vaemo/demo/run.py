"""The demonstration: everything vaemo does, on speech that it makes, in minutes.

OUT/corpus        the labelled sessions, and two-channel recordings of other speakers
OUT/store         features of the sessions; OUT/test-store those of the test sessions alone
OUT/run           the trained model (run/best); OUT/baselines: other seeds, and the same without memory
OUT/scores        of the test sessions and of the recordings
OUT/evaluation    against the labels of the test sessions, compared with the model without memory
OUT/report        of the recordings; OUT/report-test of the test sessions
OUT/summary.json  the table that is printed at the end
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from vaemo import files, scores
from vaemo.cluster.executor import OnRay
from vaemo.config import Config
from vaemo.data.manifest import read_manifest
from vaemo.demo.corpus import make_corpus, make_recordings
from vaemo.evaluation.evaluate import evaluate, measure, table_of
from vaemo.evaluation.pairs import read_pairs
from vaemo.metrics import ccc, rmse
from vaemo.parts.shards import claim_folder, digest
from vaemo.pipeline.extraction import extract
from vaemo.pipeline.prepare import Request
from vaemo.pipeline.scoring import score
from vaemo.pipeline.sources import ManifestSource
from vaemo.pipeline.training import train
from vaemo.progress import duration, say
from vaemo.report.write import write_report
from vaemo.store import INFO, FeatureStore, write_part
from vaemo.training.card import write_card
from vaemo.units import DIMENSIONS

SESSIONS = 84
SEEDS = (0, 1, 2)
MODELS: Mapping[str, dict[str, dict[str, Any]]] = {
    "vaemo": {},
    "no-memory": {"model": {"updater": "none", "speaker_norm": [], "session_norm": []}},
}
"""The models compared: the full model, and the same without a memory."""

TABLE_METRICS = ("ccc_valence", "ccc_arousal", "ccc_avg", "rmse_avg")
STEPS = 6


def run_demo(out: str, config: Config) -> dict[str, Any]:
    """Make speech, extract, train, score, evaluate and report; finished steps of an earlier run are kept.

    Args:
        out: The folder for all of it, local.
        config: Of every stage.

    Returns:
        The content of `summary.json`: per model the mean and the deviation of CCC over the seeds, and how much of the
        recordings' speech was found.

    Raises:
        OtherRunError: if `out` holds something else, or a demonstration with other settings.
    """
    start = time.monotonic()
    # The calls come from telephones, so the model is trained on telephone bandwidth.
    config = config.replace({"audio": {"simulate_telephone": True}, "features": {"opensmile_license": "research"}})
    settings = {"config": config.to_dict(), "sessions": SESSIONS, "seeds": list(SEEDS)}
    claim_folder(out, "_demo.json", digest(config.fingerprint(), str(SESSIONS), str(SEEDS)), {"settings": settings})
    _speak(out)
    _extract(out, config)
    _train(out, config)
    _score(out, config)
    summary = _evaluate(out, config)
    _report(out, config)
    say(f"\n{summary_table(summary)}\n")
    say(f"Done in {duration(time.monotonic() - start)}. Look at:")
    for name, what in (
        ("report/index.html", "the telephone calls, with their sound"),
        ("report-test/index.html", "the test sessions, with their labels"),
        ("evaluation/metrics.json", "the evaluation; pictures beside it"),
        ("run/best", "the model, with its card"),
    ):
        say(f"  {files.join(out, name):<50} {what}")
    return summary


def _speak(out: str) -> None:
    _step(1, "speak a labelled corpus and telephone calls")
    # Each of the two writes its list last.
    if not files.exists(_manifest(out)):
        make_corpus(files.join(out, "corpus"), n_sessions=SESSIONS)
    if not files.exists(files.join(out, "corpus", "calls.jsonl")):
        make_recordings(files.join(out, "corpus"))


def _extract(out: str, config: Config) -> None:
    _step(2, "extract features")
    store = files.join(out, "store")
    extract(ManifestSource(_manifest(out)), store, config, OnRay(), about={"synthetic": True})
    # The test sessions alone, so that nothing else is scored.
    opened = FeatureStore.open(store)
    table = opened.read()
    write_part(files.join(out, "test-store"), "part-test.parquet", table.filter(pc.equal(table["split"], "test")))
    files.write_json(files.join(out, "test-store", INFO), dict(opened.info))


def _train(out: str, config: Config) -> None:
    _step(3, f"train with and without memory, {len(SEEDS)} seeds each")
    for model, changes in MODELS.items():
        for seed in SEEDS:
            say(f"train {model}, seed {seed}")
            changed = config.replace({**changes, "train": {"seed": seed}})
            train(files.join(out, "store"), _run_of(out, model, seed), changed, OnRay())


def _score(out: str, config: Config) -> None:
    _step(4, "score the test sessions and the recordings")
    for model in MODELS:
        for seed in SEEDS:
            best = files.join(_run_of(out, model, seed), "best")
            score(Request(files.join(out, "test-store"), (best,), _scores_of(out, model, seed)), config, OnRay())
    corpus, best = files.join(out, "corpus"), files.join(out, "run", "best")
    request = Request(
        files.join(corpus, "recordings"),
        (best,),
        files.join(out, "scores", "recordings"),
        calls=files.join(corpus, "calls.jsonl"),
    )
    score(request, config, OnRay())


def _evaluate(out: str, config: Config) -> dict[str, Any]:
    """Evaluate, put the result into the model's card, and return the summary."""
    _step(5, "evaluate against the labels")
    labels = files.join(out, "test-store")
    first, second = (_scores_of(out, model, SEEDS[0]) for model in MODELS)
    result = evaluate(first, labels, files.join(out, "evaluation"), config, compare=second)
    say(table_of(result))
    write_card(files.join(out, "run", "best"), result)
    summary = {**_summarise(out, config), "compare": result["compare"]["ccc_avg"]}
    files.write_json(files.join(out, "summary.json"), summary)
    return summary


def _report(out: str, config: Config) -> None:
    _step(6, "report")
    corpus, recordings = files.join(out, "corpus"), files.join(out, "scores", "recordings")
    write_report(recordings, files.join(out, "report"), config, audio=files.join(corpus, "recordings"))
    write_report(
        _scores_of(out, "vaemo", SEEDS[0]),
        files.join(out, "report-test"),
        config,
        labels=files.join(out, "test-store"),
        audio=files.join(corpus, "audio"),
    )


def speech_found(truth: pa.Table, utterances: pa.Table, grid_s: float = 0.01) -> tuple[float, float]:
    """How well utterances found in recordings match who really speaks when.

    Args:
        truth: `session_id`, `channel`, `start_s`, `end_s` of all speech.
        utterances: The same columns, of what was found.
        grid_s: Resolution.

    Returns:
        found: The share of the speech that was found.
        speech: The share of what was found that is speech.
    """
    both = real = heard = 0
    keys = {(row["session_id"], row["channel"]) for row in truth.to_pylist()}
    for session, channel in sorted(keys):
        marks = []
        for table in (truth, utterances):
            own = table.filter((pc.field("session_id") == session) & (pc.field("channel") == channel))
            end = max((row["end_s"] for row in own.to_pylist()), default=0.0)
            mark = np.zeros(int(end / grid_s) + 1, bool)
            for row in own.to_pylist():
                mark[int(row["start_s"] / grid_s) : int(row["end_s"] / grid_s)] = True
            marks.append(mark)
        shorter = min(map(len, marks))
        both += int((marks[0][:shorter] & marks[1][:shorter]).sum())
        real, heard = real + int(marks[0].sum()), heard + int(marks[1].sum())
    return both / max(real, 1), both / max(heard, 1)


def recordings_ccc(truth: pa.Table, utterances: pa.Table) -> np.ndarray:
    """CCC, (2,), of utterances found in recordings against how those feel who speak most of the time meanwhile.

    Args:
        truth: `session_id`, `channel`, `start_s`, `end_s`, `valence`, `arousal` of all speech.
        utterances: The same columns, of what was found and scored; null scores are left out.
    """
    spoken = truth.to_pylist()
    pairs = []
    for row in utterances.filter(pc.is_valid(utterances["valence"])).to_pylist():
        overlaps = [
            (min(row["end_s"], other["end_s"]) - max(row["start_s"], other["start_s"]), index)
            for index, other in enumerate(spoken)
            if (other["session_id"], other["channel"]) == (row["session_id"], row["channel"])
        ]
        overlap_s, index = max(overlaps, default=(0.0, -1))
        if overlap_s > 0:
            pairs.append([[row[name], spoken[index][name]] for name in DIMENSIONS])
    prediction, label = np.moveaxis(np.array(pairs, np.float64).reshape(-1, 2, 2), -1, 0)
    return ccc(prediction, label)


def _step(number: int, what: str) -> None:
    say(f"\n[{number} of {STEPS}] {what}")


def _manifest(out: str) -> str:
    return files.join(out, "corpus", "manifest.jsonl")


def _run_of(out: str, model: str, seed: int) -> str:
    if (model, seed) == ("vaemo", SEEDS[0]):
        return files.join(out, "run")
    return files.join(out, "baselines", f"{model}-seed-{seed}")


def _scores_of(out: str, model: str, seed: int) -> str:
    return files.join(out, "scores", f"test-{model}-seed-{seed}")


def _summarise(out: str, config: Config) -> dict[str, Any]:
    """CCC of every model and seed on the test sessions, and the speech found in the recordings."""
    quick = config.replace({"evaluate": {"bootstrap": 0}})
    models: dict[str, dict[str, list[float]]] = {}
    for model in MODELS:
        pairs = (read_pairs(_scores_of(out, model, seed), files.join(out, "test-store"), quick) for seed in SEEDS)
        measured = [measure(each, quick) for each in pairs]
        models[model] = {name: [each[name] for each in measured] for name in TABLE_METRICS}
    models["mean"] = mean_predictor(_manifest(out))
    columns = ["session_id", "channel", "start_s", "end_s", *DIMENSIONS]
    found = scores.read_utterances(files.join(out, "scores", "recordings"), columns)
    found = found.filter(pc.is_valid(found["start_s"]))
    truth = pyarrow.json.read_json(files.join(out, "corpus", "truth.jsonl")).select(columns)
    share_found, share_speech = speech_found(truth, found)
    return {
        "seeds": list(SEEDS),
        "models": models,
        "speech_found": share_found,
        "found_is_speech": share_speech,
        "recordings_ccc": dict(zip(DIMENSIONS, map(float, recordings_ccc(truth, found)), strict=True)),
    }


def mean_predictor(manifest: str) -> dict[str, list[float]]:
    """The metrics of predicting the training labels' mean for every utterance of the test sessions."""
    table = read_manifest(manifest)
    splits = {name: table.filter(pc.equal(table["split"], name)) for name in ("train", "test")}
    train_labels, label = (np.stack([rows[name].to_numpy() for name in DIMENSIONS], axis=1) for rows in splits.values())
    prediction = np.broadcast_to(train_labels.mean(axis=0), label.shape)
    valence, arousal = map(float, ccc(prediction, label))
    values = (valence, arousal, (valence + arousal) / 2, float(rmse(prediction, label).mean()))
    return {name: [value] for name, value in zip(TABLE_METRICS, values, strict=True)}


def summary_table(summary: Mapping[str, Any]) -> str:
    """The table of models, and what was found in the recordings, as lines of text."""
    titles = {"vaemo": "vaemo", "no-memory": "the same without memory", "mean": "mean of the training labels"}
    n_seeds = len(summary["seeds"])
    lines = [
        f"Test sessions, speakers not in training; mean and deviation over {n_seeds} seeds:",
        "",
        f"{'':<30}{'CCC valence':<18}{'CCC arousal':<18}{'CCC average':<18}RMSE",
    ]
    for model, values in summary["models"].items():
        cells = (_mean_and_deviation(values[name]) for name in TABLE_METRICS)
        lines.append(f"{titles[model]:<30}" + "".join(f"{cell:<18}" for cell in cells).rstrip())
    compared = summary["compare"]
    low, high = compared["ci95"]
    recordings = summary["recordings_ccc"]
    lines += [
        "",
        f"Memory adds {compared['difference']:.3f} to the average CCC of seed {summary['seeds'][0]} "
        f"(95 % interval {low:.3f} to {high:.3f}, sessions resampled).",
        f"In the recordings {summary['speech_found']:.0%} of the speech was found, "
        f"{summary['found_is_speech']:.0%} of what was found is speech, and the customers' CCC is "
        f"{recordings['valence']:.3f} (valence) and {recordings['arousal']:.3f} (arousal).",
    ]
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float]) -> str:
    text = f"{np.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.3f}"
