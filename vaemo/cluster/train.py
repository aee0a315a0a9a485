"""Training on Ray Train: workers that each take their lanes, one checkpoint an epoch, folds side by side.

The distributed form of `vaemo.training.trainer`. The driver reads the store and puts its sessions, packed, into Ray's
object store: every node holds them once, and its workers read them there. A worker that dies takes the group back to
the last epoch's state, and a driver that dies does no more than that either: states lie in the run folder
(`vaemo.training.run_folder`). Ray's checkpoints are not used: it keeps their list in a file that it writes in place,
and a run whose driver died while it did so could not go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError

from vaemo import files
from vaemo.ablation.baselines import RIVAL_LABELS, rivals
from vaemo.cluster.console import Console, tell
from vaemo.cluster.group import run_group
from vaemo.cluster.nodes import check_visible, driver_node, total
from vaemo.cluster.runtime import NO_PROGRESS_S, connect
from vaemo.config import Config
from vaemo.drawing import write_pictures
from vaemo.errors import ClusterError, UsageError, VaemoError, carried, raise_carried
from vaemo.extras import offers
from vaemo.model.checkpoint import load_checkpoint
from vaemo.model.checks import used_streams
from vaemo.parts.shards import claim_folder, digest
from vaemo.progress import say
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.curves import draw_curves
from vaemo.training.data import SECTIONS, SplitSessions, TrainingData
from vaemo.training.end_to_end import EndToEnd, check_encoder_settings
from vaemo.training.group import Group, ProcessGroup
from vaemo.training.held_out import score_held_out
from vaemo.training.trackers import Trackers, chosen
from vaemo.training.trainer import Trainer
from vaemo.units import SPLITS

MAX_FAILURES = 8
"""How often workers may die before the run gives up; each time training goes on from the last epoch."""

CLEARLY_BETTER = 0.05
"""Dev CCC-avg that an earlier epoch had more of: less is the noise of a few dev speakers."""


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
    facts = {"data": data.digest, "folds": folds, "settings": settings}
    claim_folder(out, run_folder.MARKER, fingerprint, facts, inputs=data.store.parts)
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
    job["trackers"] = chosen(config.train.trackers)
    offers("matplotlib", "pictures")
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
            job["rivals"] = _say_rivals(job["sessions"], 0, config)
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
    """One run of Ray Train, from its last state on; the summary of the run."""
    try:
        return dict(
            run_group(
                _train,
                dict(job),
                workers=job["workers"],
                gpus=1.0 if total("GPU") >= job["workers"] else 0.0,
                name=job["name"],
                storage=job["storage"],
                max_failures=MAX_FAILURES,
                patience_s=NO_PROGRESS_S,
            )
        )
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
    if run_folder.restore_state(trainer, out) and group.rank == 0:
        talk(f"going on after epoch {len(trainer.history)}")
    first = group.rank == 0
    trackers = Trackers(job["trackers"] if first else (), out, job["name"], job["config"], len(trainer.history))
    provenance = run_folder.provenance_of(job["origin"], config, trainer.model, device.type)
    for metrics in trainer:
        if first:
            if trainer.improved:
                encoder = trainer.kept_encoder()
                found = job["rivals"], trainer.errors
                run_folder.keep(out, trainer.kept, config, store, metrics, provenance, encoder, *found)
            run_folder.write_metrics(out, trainer.history)
            trackers.log(metrics)
            talk(trainer.line())
            run_folder.save_state(trainer, out, config.train.keep_checkpoints)
        # Every worker waits here, until the state is whole on the storage.
        ray.train.report({"epoch": metrics["epoch"]})
    trackers.close()
    if first:
        name = run_folder.CURVES.removesuffix(".png")
        write_pictures(out, {name: lambda: draw_curves(trainer.history, job["name"])})
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
        found = _say_rivals(sessions, part, data.config, f"fold {fold.name}, ")
        yield {**job, **place, "sessions": sessions, "part": part, "rivals": found}


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


def _say_rivals(held: ray.ObjectRef, part: int, config: Config, where: str = "") -> dict[str, Any] | None:
    """What the cheapest rivals give on the dev split of a fold, printed; the sessions are read where Ray holds them."""
    sessions: SplitSessions = ray.get(held)
    train, dev = (sessions.split(part, name) for name in ("train", "dev"))
    _, used = used_streams(config.model, {name: x.shape[-1] for name, x in train.features.items()})
    names = config.model.names
    found = rivals(train, dev, list(used), names)
    if found is None:
        say(f"{where}ridge regression is left out: train or dev has fewer than {RIVAL_LABELS} labels in a dimension")
        return None
    named = (("ridge on the features", found["ridge"]), ("on them and their causal EMA", found["ridge_ema"]))
    parts = []
    for title, each in named:
        of_target = ", ".join(f"{name} {each[f'dev_ccc_{name}']:.3f}" for name in names)
        parts.append(f"{title} {each['dev_ccc_avg']:.3f} ({of_target})")
    say(f"{where}dev CCC to beat: {', '.join(parts)}")
    return found


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
