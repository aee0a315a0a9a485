"""Training on Ray Train: workers that each take their lanes, one checkpoint an epoch, folds side by side.

The distributed form of `vaemo.training.trainer`. Every worker reads the store itself. A worker that dies takes the
group back to the last epoch's checkpoint; a driver that dies does no more than that either, for the run's name
follows from its fingerprint, and Ray Train finds the checkpoints of a name again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from vaemo import files, scores
from vaemo.cluster.console import Console, tell
from vaemo.cluster.runtime import connect
from vaemo.config import Config
from vaemo.errors import ClusterError, UsageError, VaemoError, revive
from vaemo.metrics import Moments
from vaemo.model.checkpoint import load_checkpoint
from vaemo.progress import say
from vaemo.sessions import Session, label_scale, read_sessions
from vaemo.shards import claim_folder, digest
from vaemo.speakers import aggregate_speakers
from vaemo.splits import Fold, make_folds, plain_split
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.curves import draw_curves
from vaemo.training.group import Group, ProcessGroup
from vaemo.training.replay import replay
from vaemo.training.trackers import Trackers
from vaemo.training.trainer import Trainer, check_labels
from vaemo.units import DIMENSIONS, SPLITS, LabelScale
from vaemo.windows import PackedSessions

MAX_FAILURES = 8
"""How often workers may die before the run gives up; each time training goes on from the last epoch."""

POLL_S = "0.3"
"""A report at an epoch's end waits for the controller to look; Ray's 2 s are longer than an epoch of a small corpus."""

_LIGHT = [
    "session_id", "utt_id", "speaker_id", "channel", "role", "position", "split", "fold", "start_s", "end_s",
    "valence", "arousal", "status", "reason",
]  # fmt: skip


def train(store: str, out: str, config: Config, *, workers: int = 1, folds: str | None = None) -> dict[str, Any]:
    """Train on a store, or go on with a run that was interrupted, and return its summary.

    Args:
        store: Path or URI of a feature store, on storage that every node sees.
        out: The run folder, likewise; see `vaemo.training.run_folder`. With folds it holds one run per fold and
            `oof`, the scores of every held-out row.
        config: Of the run.
        workers: Processes that train one model together; divides `train.lanes`.
        folds: `by=fold`, `by=speaker` or `k=N`; None trains on the splits of the store, or on made ones.

    Raises:
        UsageError: if the lanes cannot be shared by the workers, or for unknown folds.
        OtherRunError: if `out` holds a run with other settings or data.
        ClusterError: if the cluster has too few CPUs for the workers.
        VaemoError: what `vaemo.splits`, `vaemo.sessions` and `vaemo.training.trainer` raise.
    """
    if config.train.lanes % workers:
        raise UsageError(
            f"train.lanes is {config.train.lanes}, which {workers} workers cannot share evenly; "
            "give --workers that divide it."
        )
    if config.train.encoder != "frozen":
        raise UsageError(
            f"train.encoder is '{config.train.encoder}'; a feature store holds pooled features, not speech, so only "
            "'frozen' can be trained on it."
        )
    opened = FeatureStore.open(store)
    _check_aggregation(opened, config)
    table = opened.read(_LIGHT)
    usable = table["status"].to_numpy() == "ok"
    parts = make_folds(table, folds, config.splits) if folds else [plain_split(table, config.splits)]
    labelled = read_sessions(opened, config, streams=())
    for fold in parts:
        for name in ("train", "dev"):
            chosen = [session for session in labelled if fold.split[session.rows[0]] == name]
            check_labels(chosen, name, LabelScale(*config.model.label_range))
    data = digest(
        *(digest(*map(str, table[name].to_pylist())) for name in _LIGHT),
        str(sorted(opened.dims.items())),
        str(opened.info.get("extractors")),
    )
    sections = ("model", "updater", "train", "sessions", "splits", "labels")
    fingerprint = digest(config.fingerprint(*sections), config.features.speaker_aggregation, data, str(folds))
    settings = {section: config.to_dict()[section] for section in sections}
    claim_folder(out, run_folder.MARKER, fingerprint, {"data": data, "folds": folds, "settings": settings})
    if (summary := run_folder.finished(out)) is not None:
        say(f"{out} is finished: {_headline(summary)}. Give another --out to train again.")
        return summary

    connect()
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < workers:
        raise ClusterError(f"--workers {workers} need {workers} CPUs; the Ray cluster has {cpus}.")
    job = {"store": store, "config": config.to_dict(), "workers": workers, "data": data, "folds": folds}
    with Console() as console:
        job["lines"] = console.lines
        if not folds:
            _say_split(parts[0], usable, labelled, config)
            job |= {"out": out, "fold": "", "name": f"train-{fingerprint[:12]}", "storage": files.join(out, "_ray")}
            summary = _fit(job)
        else:
            say(f"{len(parts)} folds ({folds}), {max(1, cpus // workers)} at a time")
            _fit_folds(job, parts, out, fingerprint, max(1, cpus // workers))
            summary = _score_held_out(job, parts, table, out, fingerprint)
    files.write_json(files.join(out, run_folder.SUMMARY), summary)
    say(f"done: {_headline(summary)}; {files.join(out, run_folder.BEST if not folds else 'oof')}")
    return summary


def _fit(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run of Ray Train, from its last checkpoint on; the summary of the run."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    gpus = ray.cluster_resources().get("GPU", 0) >= job["workers"]
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # its value comes back in the result
        train_loop_config=dict(job),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=job["workers"], resources_per_worker={"CPU": 1}, use_gpu=gpus),
        run_config=RunConfig(
            name=job["name"],
            storage_path=job["storage"],
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=Config.from_dict(job["config"]).train.keep_checkpoints),
        ),
    )
    ended: Any = trainer.fit().return_value  # type: ignore[attr-defined]  # of Train V2's Result
    if "error" in ended:
        raise revive(ended["error"], ended["message"])
    return ended


def _train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every worker of a run does; a VaemoError is carried home as a value, since Ray would retry it."""
    try:
        return _train(job)
    except VaemoError as error:
        return {"error": type(error).__name__, "message": str(error)}


def _train(job: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, out = Config.from_dict(job["config"]), job["out"]

    def talk(text: str) -> None:
        tell(job["lines"], f"fold {job['fold']}, {text}" if job["fold"] else text)

    group = ProcessGroup() if torch.distributed.is_initialized() else Group()
    store = FeatureStore.open(job["store"])
    fold = _folds_of(store, config, job["folds"], job["fold"])
    sessions = _sessions(store, config, fold.split)
    device = ray.train.torch.get_device()
    trainer = Trainer(
        [session for session in sessions if session.split == "train"],
        [session for session in sessions if session.split == "dev"],
        config,
        group=group,
        device=device,
        say=talk,
    )
    del sessions
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            run_folder.restore_state(trainer, folder)
        if group.rank == 0:
            talk(f"going on after epoch {len(trainer.history)}")
    first = group.rank == 0
    trackers = Trackers(config.train.trackers if first else (), out, job["name"], job["config"], len(trainer.history))
    provenance = run_folder.provenance_of(store, config, job["data"], trainer.model, device.type)
    for metrics in trainer:
        saved = None
        with tempfile.TemporaryDirectory() as folder:
            if first:
                if trainer.improved:
                    run_folder.keep(out, trainer.kept, config, store, metrics, provenance)
                run_folder.write_metrics(out, trainer.history)
                trackers.log(metrics)
                talk(trainer.line())
                run_folder.save_state(trainer, folder)
                saved = Checkpoint.from_directory(folder)
            # Every worker waits here; the checkpoint is whole on the storage before anyone goes on.
            ray.train.report({"epoch": metrics["epoch"]}, checkpoint=saved)
    trackers.close()
    if first:
        files.write_whole(files.join(out, run_folder.CURVES), draw_curves(trainer.history, job["name"]))
    return trainer.summary()


def _folds_of(store: FeatureStore, config: Config, folds: str | None, name: str) -> Fold:
    table = store.read(["session_id", "speaker_id", "split", "fold"])
    if not folds:
        return plain_split(table, config.splits)
    return next(fold for fold in make_folds(table, folds, config.splits) if fold.name == name)


def _fit_folds(job: Mapping[str, Any], folds: Sequence[Fold], out: str, fingerprint: str, at_once: int) -> None:
    """All folds, several at a time, each a run of its own; those that are finished are left alone."""
    waiting = [
        {
            **job,
            "out": _fold_folder(out, fold.name),
            "fold": fold.name,
            "name": f"train-{fingerprint[:12]}-{quote(fold.name, safe='')}",
            "storage": files.join(out, "_ray"),
        }
        for fold in folds
    ]
    waiting = [fold for fold in waiting if run_folder.finished(fold["out"]) is None]
    running: list[ray.ObjectRef] = []
    # The tasks only wait for their run, so they reserve nothing; how many run together is decided here.
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit_fold)
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(fit.remote(waiting.pop(0)))
        (done,), running = ray.wait(running)
        ended = ray.get(done)
        if "error" in ended:
            raise revive(ended["error"], ended["message"])


def _fit_fold(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        summary = _fit(job)
    except VaemoError as error:
        return {"error": type(error).__name__, "message": str(error)}
    files.write_json(files.join(job["out"], run_folder.SUMMARY), summary)
    return summary


def _check_aggregation(store: FeatureStore, config: Config) -> None:
    """Refuse an aggregation of speaker embeddings that scoring could not repeat."""
    how = config.features.speaker_aggregation
    if how == "enrolled":
        raise UsageError(
            "features.speaker_aggregation is 'enrolled', which training cannot do yet; take utterance or running_mean."
        )
    if how != "utterance" and "features" not in store.info.get("settings", {}):
        raise UsageError(
            f"features.speaker_aggregation is '{how}', but {store.path} does not say what its features are, so that "
            "scoring would not know of it. Train on a store of jobs/extract.py, or take utterance."
        )


def _sessions(store: FeatureStore, config: Config, split: np.ndarray | None = None) -> list[Session]:
    """All sessions of a store, their speaker embeddings as the config wants them."""
    return aggregate_speakers(read_sessions(store, config, split=split), config.features.speaker_aggregation)


def _score_held_out(
    job: Mapping[str, Any], folds: Sequence[Fold], table: pa.Table, out: str, fingerprint: str
) -> dict[str, Any]:
    """RUN/oof, each row scored by the model that did not see it; CCC and RMSE over folds and pooled."""
    config = Config.from_dict(job["config"])
    store = FeatureStore.open(job["store"])
    sessions = _sessions(store, config)
    labels = np.full((len(table), 2), np.nan)
    for session in sessions:
        labels[session.rows] = session.labels
    predictions = np.full((len(table), 2), np.nan)
    per_fold = {}
    for fold in folds:
        tested = [session for session in sessions if fold.held_out[session.rows].any()]
        packed = PackedSessions.of(tested, dtype=getattr(torch, config.train.dtype))
        known = packed.observed if not packed.observed.isnan().all() else None
        model = load_checkpoint(files.join(_fold_folder(out, fold.name), run_folder.BEST)).model
        found = replay(model, packed, window=config.train.window, observed=known).prediction
        rows = np.concatenate([session.rows for session in tested])
        mine = fold.held_out[rows]
        predictions[rows[mine]] = found[mine]
        per_fold[fold.name] = _measures(Moments.of(predictions[fold.held_out], labels[fold.held_out]))
    folder = files.join(out, "oof")
    columns = {name: table[name] for name in _LIGHT if name not in DIMENSIONS}
    columns |= {name: pa.array(predictions[:, n], pa.float32(), from_pandas=True) for n, name in enumerate(DIMENSIONS)}
    names, split = np.full(len(table), None, object), np.full(len(table), None, object)
    for fold in folds:
        names[fold.held_out], split[fold.held_out] = fold.name, "test"
    columns |= {
        "split": pa.array(split, pa.string()),
        "fold": pa.array(names, pa.string()),
        "run_id": pa.array([fingerprint[:12]] * len(table)),
    }
    scale = label_scale(store, config)
    files.write_json(
        files.join(folder, scores.PROVENANCE),
        {
            "fingerprint": fingerprint,
            "label_range": list(config.model.label_range),
            "native_range": store.info.get("native_range") or [scale.low, scale.high],
            "held_out": job["folds"],
        },
    )
    scores.write_part(folder, f"part-{fingerprint[:16]}.parquet", pa.table(columns), config.score)
    fold_mean = {
        key: float(np.mean([measures[key] for measures in per_fold.values()])) for key in next(iter(per_fold.values()))
    }
    return {"fold_mean": fold_mean, "pooled": _measures(Moments.of(predictions, labels)), "folds": per_fold}


def _measures(moments: Moments) -> dict[str, float]:
    found = {f"ccc_{name}": float(moments.ccc()[number]) for number, name in enumerate(DIMENSIONS)}
    found["ccc_avg"] = float(moments.ccc().mean())
    return found | {f"rmse_{name}": float(moments.rmse()[number]) for number, name in enumerate(DIMENSIONS)}


def _fold_folder(out: str, fold: str) -> str:
    return files.join(out, f"fold-{quote(fold, safe='')}")


def _headline(summary: Mapping[str, Any]) -> str:
    if "fold_mean" in summary:
        return (
            f"CCC-avg {summary['fold_mean']['ccc_avg']:.3f} (mean over {len(summary['folds'])} folds), "
            f"{summary['pooled']['ccc_avg']:.3f} pooled"
        )
    return f"dev CCC-avg {summary['dev_ccc_avg']:.3f} at epoch {summary['kept_epoch']} of {summary['epochs']}"


def _say_split(fold: Fold, usable: np.ndarray, sessions: Sequence[Session], config: Config) -> None:
    counts = ", ".join(f"{int(((fold.split == name) & usable).sum()):,} {name}" for name in SPLITS)
    say(f"utterances: {counts}")
    n_train = sum(fold.split[session.rows[0]] == "train" for session in sessions)
    if n_train < config.train.lanes:
        say(
            f"{n_train} training sessions are fewer than the {config.train.lanes} lanes: the others stay idle. "
            "A smaller train.lanes makes more optimiser steps of them."
        )
