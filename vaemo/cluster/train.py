"""Training on Ray Train: workers that each take their lanes, one checkpoint an epoch, folds side by side.

The distributed form of `vaemo.training.trainer`. The driver reads the store and puts its sessions, packed, into Ray's
object store: every node holds them once, and its workers read them there. A worker that dies takes the group back to
the last epoch's checkpoint; a driver that dies does no more than that either, for the run's name follows from its
fingerprint, and Ray Train finds the checkpoints of a name again.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from vaemo import files
from vaemo.cluster.console import Console, tell
from vaemo.cluster.nodes import check_visible, driver_node, total
from vaemo.cluster.runtime import NO_PROGRESS_S, connect
from vaemo.config import Config
from vaemo.errors import ClusterError, UsageError, VaemoError, carried, raise_carried
from vaemo.model.checkpoint import load_checkpoint
from vaemo.progress import say
from vaemo.shards import claim_folder, digest
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.curves import draw_curves
from vaemo.training.data import SECTIONS, SplitSessions, TrainingData
from vaemo.training.end_to_end import EndToEnd, check_encoder_settings
from vaemo.training.group import Group, ProcessGroup
from vaemo.training.held_out import score_held_out
from vaemo.training.trackers import Trackers
from vaemo.training.trainer import Trainer
from vaemo.units import SPLITS

MAX_FAILURES = 8
"""How often workers may die before the run gives up; each time training goes on from the last epoch."""

PLACE_TRY_S = 60.0
"""A group of workers that has not found its place on the cluster by then is tried once more, up to `NO_PROGRESS_S`."""

CLEARLY_BETTER = 0.05
"""Dev CCC-avg that an earlier epoch had more of: less is the noise of a few dev speakers."""

POLL_S = "0.3"
"""A report at an epoch's end waits for the controller to look; Ray's 2 s are longer than an epoch of a small corpus."""


def train(
    store: str,
    out: str,
    config: Config,
    *,
    workers: int = 1,
    folds: str | None = None,
    manifest: str | None = None,
    speakers: str | None = None,
) -> dict[str, Any]:
    """Train on a store, or go on with a run that was interrupted, and return its summary.

    Args:
        store: Path or URI of a feature store, on storage that every node sees.
        out: The run folder, likewise; see `vaemo.training.run_folder`. With folds it holds one run per fold and
            `oof`, the scores of every held-out row.
        config: Of the run.
        workers: Processes that train one model together; divides `train.lanes`.
        folds: `by=fold`, `by=speaker` or `k=N`; None trains on the splits of the store, or on made ones.
        manifest: From which the store was extracted, where its speech encoder is trained too (`train.encoder`).
        speakers: Enrolments, for `features.speaker_aggregation=enrolled`; without a file speakers are enrolled from
            the other sessions of their split, and RUN/speakers.parquet holds the voices for scoring.

    Raises:
        UsageError: if the lanes cannot be shared by the workers, for unknown folds, or for a manifest without an
            encoder to train.
        OtherRunError: if `out` holds a run with other settings or data.
        ClusterError: if the cluster has too few CPUs for the workers, a node does not see store or run, or workers
            are lost and find no place again.
        VaemoError: what `vaemo.splits`, `vaemo.sessions`, `vaemo.training.trainer` and `.end_to_end` raise.
    """
    if config.train.lanes % workers:
        raise UsageError(
            f"train.lanes is {config.train.lanes}, which {workers} workers cannot share evenly; "
            "give --workers that divide it."
        )
    data = TrainingData.open(store, config, folds, speakers)
    check_encoder_settings(config, manifest, data.store.info)
    data.check_labels()
    heard = [EndToEnd.open(data.store, manifest, config).fingerprint] if manifest else []
    aggregation = config.features.speaker_aggregation
    fingerprint = digest(config.fingerprint(*SECTIONS), aggregation, data.digest, str(folds), *heard)
    settings = {section: config.to_dict()[section] for section in SECTIONS}
    claim_folder(out, run_folder.MARKER, fingerprint, {"data": data.digest, "folds": folds, "settings": settings})
    if (summary := run_folder.finished(out)) is not None:
        say(f"{out} is finished: {_headline(summary)}. Give another --out to train again.")
        return summary

    connect()
    inputs = [path for path in (manifest, speakers) if path]
    check_visible([store, files.join(out, run_folder.MARKER), *inputs])
    cpus = int(total("CPU"))
    if cpus < workers:
        raise ClusterError(f"--workers {workers} need {workers} CPUs; the Ray cluster has {cpus}.")
    job: dict[str, Any] = {"store": data.store, "manifest": manifest, "config": config.to_dict(), "workers": workers}
    job["origin"] = run_folder.origin_of(data.store, config, data.digest)
    for fold in data.parts:
        folder = _fold_folder(out, fold.name) if folds else out
        files.write_parquet_whole(files.join(folder, run_folder.USED), data.used(fold))
        if voices := data.voices(fold):
            voices.write(files.join(folder, run_folder.SPEAKERS))
    with Console() as console:
        job["lines"] = console.lines
        if not folds:
            _say_split(data)
            job |= {"out": out, "fold": "", "name": f"train-{fingerprint[:12]}", "storage": files.join(out, "_ray")}
            job |= {"sessions": ray.put(data.pack()), "part": 0}
            summary = _fit(job)
        else:
            say(f"{len(data.parts)} folds ({folds}), {max(1, cpus // workers)} at a time")
            _fit_folds(job, data, out, fingerprint, max(1, cpus // workers))
            models = {
                fold.name: load_checkpoint(files.join(_fold_folder(out, fold.name), run_folder.BEST))
                for fold in data.parts
            }
            summary = score_held_out(data, models, manifest, files.join(out, "oof"), fingerprint)
    files.write_json(files.join(out, run_folder.SUMMARY), summary)
    say(f"done: {_headline(summary)}; {files.join(out, run_folder.BEST if not folds else 'oof')}")
    return summary


def _fit(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run of Ray Train, from its last checkpoint on; the summary of the run."""
    gpus = total("GPU") >= job["workers"]
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # its value comes back in the result
        train_loop_config=dict(job),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=job["workers"], resources_per_worker={"CPU": 1}, use_gpu=gpus),
        run_config=RunConfig(
            name=job["name"],
            storage_path=job["storage"],
            failure_config=failure_config(MAX_FAILURES, NO_PROGRESS_S),
            checkpoint_config=CheckpointConfig(num_to_keep=Config.from_dict(job["config"]).train.keep_checkpoints),
        ),
    )
    try:
        ended: Any = trainer.fit().return_value  # type: ignore[attr-defined]  # of Train V2's Result
    except ControllerError as error:
        raise ClusterError(
            f"{job['workers']} workers found no place on the cluster for {NO_PROGRESS_S:g} s: a node was lost and none "
            "came in its place, or other jobs hold the CPUs. Run the same command again, with fewer --workers if the "
            "cluster stays smaller: it goes on from the last epoch."
        ) from error
    except WorkerGroupError as error:
        if not all(isinstance(failure, RayActorError) for failure in error.worker_failures.values()):
            raise
        raise ClusterError(
            f"training workers have died {MAX_FAILURES + 1} times: out of memory, or nodes that come and go. Run the "
            "same command again: it goes on from the last epoch."
        ) from error
    raise_carried(ended)
    return ended


def failure_config(deaths: int, patience_s: float) -> FailureConfig:
    """How Ray Train takes losses; sets what of that it reads from the environment.

    Args:
        deaths: How often workers may die before the run gives up.
        patience_s: How long they may find no place on the cluster.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(PLACE_TRY_S)
    return FailureConfig(
        max_failures=deaths,
        controller_failure_limit=int(patience_s / PLACE_TRY_S),  # type: ignore[call-arg]  # of Train V2's
    )


def _train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every worker of a run does; a VaemoError is carried home as a value, since Ray would retry it."""
    try:
        return _train(job)
    except VaemoError as error:
        return carried(error)


def _train(job: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, out = Config.from_dict(job["config"]), job["out"]

    def talk(text: str) -> None:
        tell(job["lines"], f"fold {job['fold']}, {text}" if job["fold"] else text)

    group = ProcessGroup() if torch.distributed.is_initialized() else Group()
    store: FeatureStore = job["store"]
    end_to_end = EndToEnd.open(store, job["manifest"], config) if job["manifest"] else None
    sessions: SplitSessions = ray.get(job["sessions"])
    train, dev = (sessions.split(job["part"], name) for name in ("train", "dev"))
    device = ray.train.torch.get_device()
    trainer = Trainer(train, dev, config, group=group, device=device, end_to_end=end_to_end, say=talk)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            run_folder.restore_state(trainer, folder)
        if group.rank == 0:
            talk(f"going on after epoch {len(trainer.history)}")
    first = group.rank == 0
    trackers = Trackers(config.train.trackers if first else (), out, job["name"], job["config"], len(trainer.history))
    provenance = run_folder.provenance_of(job["origin"], config, trainer.model, device.type)
    for metrics in trainer:
        saved = None
        with tempfile.TemporaryDirectory() as folder:
            if first:
                if trainer.improved:
                    encoder = trainer.kept_encoder()
                    run_folder.keep(out, trainer.kept, config, store, metrics, provenance, encoder)
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


def _fit_folds(job: Mapping[str, Any], data: TrainingData, out: str, fingerprint: str, at_once: int) -> None:
    """All folds, several at a time, each a run of its own; those that are finished are left alone."""
    waiting = _fold_jobs(job, data, out, fingerprint)
    # The tasks only wait for their run, so they reserve nothing; how many run together is decided here.
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit_fold).options(scheduling_strategy=driver_node())
    running = [fit.remote(fold_job) for fold_job in itertools.islice(waiting, at_once)]
    while running:
        (done,), running = ray.wait(running)
        raise_carried(ray.get(done))
        running += [fit.remote(fold_job) for fold_job in itertools.islice(waiting, 1)]


def _fold_jobs(job: Mapping[str, Any], data: TrainingData, out: str, fingerprint: str) -> Iterator[dict[str, Any]]:
    """The folds that are left, each made when it is asked for: where voices differ its sessions are its own."""
    shared = None
    for part, fold in enumerate(data.parts):
        folder = _fold_folder(out, fold.name)
        if run_folder.finished(folder) is not None:
            continue
        if data.voices_differ:
            sessions, part = ray.put(data.pack(fold)), 0
        else:
            sessions = shared = shared or ray.put(data.pack())
        name = f"train-{fingerprint[:12]}-{quote(fold.name, safe='')}"
        place = {"out": folder, "fold": fold.name, "name": name, "storage": files.join(out, "_ray")}
        yield {**job, **place, "sessions": sessions, "part": part}


def _fit_fold(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        summary = _fit(job)
    except VaemoError as error:
        return carried(error)
    files.write_json(files.join(job["out"], run_folder.SUMMARY), summary)
    return summary


def _fold_folder(out: str, fold: str) -> str:
    return files.join(out, f"fold-{quote(fold, safe='')}")


def _headline(summary: Mapping[str, Any]) -> str:
    if "fold_mean" in summary:
        return (
            f"CCC-avg {summary['fold_mean']['ccc_avg']:.3f} (mean over {len(summary['folds'])} folds), "
            f"{summary['pooled']['ccc_avg']:.3f} pooled"
        )
    kept = f"dev CCC-avg {summary['dev_ccc_avg']:.3f} at epoch {summary['kept_epoch']} of {summary['epochs']}"
    # Runs of older versions do not know their peak.
    peak = summary.get("peak_dev_ccc_avg", summary["dev_ccc_avg"])
    if peak - summary["dev_ccc_avg"] < CLEARLY_BETTER:
        return kept
    return (
        f"{kept} (it was {peak:.3f} at epoch {summary['peak_epoch']}: more is learnt by heart "
        "than helps; try fewer train.epochs, or train.select=best)"
    )


def _say_split(data: TrainingData) -> None:
    (fold,), usable = data.parts, data.table["status"].to_numpy() == "ok"
    counts = ", ".join(f"{int(((fold.split == name) & usable).sum()):,} {name}" for name in SPLITS)
    say(f"utterances: {counts}")
    lanes = data.config.train.lanes
    n_train = sum(fold.split[session.rows[0]] == "train" for session in data.labelled)
    if n_train < lanes:
        say(
            f"{n_train} training sessions are fewer than the {lanes} lanes: the others stay idle. "
            "A smaller train.lanes makes more optimiser steps of them."
        )
