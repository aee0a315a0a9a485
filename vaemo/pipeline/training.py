"""Training as a job does it: on the splits of a store or over folds, once or with several seeds.

Reads a feature store, writes a run folder (`vaemo.training.run_folder`). Each fold and seed is a job of its own
(`vaemo.training.jobs`), run by an executor. A worker that dies takes its training back to the last epoch's state, and a
driver that dies does no more than that either: states lie in the run folders.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.compute as pc

from vaemo import files
from vaemo.ablation.baselines import RIVAL_LABELS, rivals
from vaemo.config import Config
from vaemo.data.splits import Fold
from vaemo.drawing import write_pictures
from vaemo.errors import UsageError
from vaemo.extras import offers
from vaemo.model.checkpoint import HELD_OUT, copy_checkpoint, load_checkpoint
from vaemo.model.checks import used_streams
from vaemo.parts.lease import lease
from vaemo.parts.shards import claim_folder, digest
from vaemo.pipeline.executors import Executor
from vaemo.progress import say
from vaemo.scores import read_utterances
from vaemo.store import FeatureStore
from vaemo.training import run_folder
from vaemo.training.card import write_card
from vaemo.training.curves import draw_curves
from vaemo.training.data import TRAINING_SECTIONS, SplitSessions, TrainingData
from vaemo.training.end_to_end import EndToEnd, check_encoder_settings
from vaemo.training.held_out import score_held_out
from vaemo.training.jobs import Failure, Job, Jobs, Line, Place
from vaemo.training.trackers import Trackers, chosen
from vaemo.training.trainer import Trainer
from vaemo.trust.attach import attach, attach_folds
from vaemo.units import CALIB, SPLITS

MAX_DEATHS = 8
"""How often workers may die before the run gives up; each time training goes on from the last epoch."""

CLEARLY_BETTER = 0.05
"""Dev CCC-avg that an earlier epoch had more of: less is the noise of a few dev speakers."""


@dataclass(frozen=True)
class Trained:
    """What `train` leaves.

    Attributes:
        out: The run folder.
        summary: The results in its `summary.json`.
        checkpoints: Its models, one for each seed, with folds the seeds of the first fold, then of the next.
        held_out: The scores of every held-out row; None without folds.
    """

    out: str
    summary: Mapping[str, Any]
    checkpoints: tuple[str, ...]
    held_out: str | None


def train(
    store: str,
    out: str,
    config: Config,
    executor: Executor,
    *,
    workers: int = 1,
    folds: str | None = None,
    seeds: int = 1,
    manifest: str | None = None,
    speakers: str | None = None,
) -> Trained:
    """Train on a store, or go on with a run that was interrupted.

    Args:
        store: Path or URI of a feature store, on storage that every node sees.
        out: The run folder, likewise; see `vaemo.training.run_folder`. With folds it holds one run per fold and
            `oof`, the scores of every held-out row; with several seeds one run per seed, there or below each fold.
        config: Of the run.
        executor: Where to train.
        workers: Processes that train one model together; divides `train.lanes`.
        folds: `by=fold`, `by=speaker` or `k=N`; None trains on the splits of the store, or on made ones.
        seeds: Trainings of each fold, from `train.seed` on.
        manifest: From which the store was extracted, where its speech encoder is trained too (`train.encoder`).
        speakers: Enrolments, for `features.speaker_aggregation=enrolled`; without a file speakers are enrolled from
            the other sessions of their split, and RUN/speakers.parquet holds the voices for scoring.

    Raises:
        UsageError: if the lanes cannot be shared by the workers, for unknown folds, or for a manifest without an
            encoder to train.
        OtherRunError: if `out` holds a run with other settings or data, or another process is writing it.
        ClusterError: if the cluster has too few CPUs for the workers, a node does not see store or run, or workers
            are lost and find no place again.
        TrainingFailedError: for a mistake that is ours. The other folds and seeds are finished first, here too:
        VaemoError: what `vaemo.data.splits`, `vaemo.data.sessions`, `vaemo.training.trainer` and `.end_to_end` raise.
    """
    if config.train.lanes % workers:
        raise UsageError(
            f"train.lanes is {config.train.lanes}, which {workers} workers cannot share evenly; "
            "give --workers that divide it."
        )
    data = TrainingData.open(store, config, folds, speakers)
    check_encoder_settings(config, manifest, data.store.info)
    data.check_labels()
    fingerprint, facts = _identity(data, manifest, seeds)
    places = _Places.of(out, data, seeds)
    with lease(out):
        claim_folder(out, run_folder.MARKER, fingerprint, facts, inputs=data.store.parts)
        # One training alone writes its summary before its checkpoint is described and calibrated.
        if (summary := run_folder.finished(out)) is not None and summary.get("concluded", True):
            say(f"{out} is finished: {headline(summary)}. Give another --out to train again.")
            return places.trained(summary)
        places.write_inputs(data)
        work = _fitting(data, manifest, fingerprint, seeds)
        needs = [store, files.join(out, run_folder.MARKER), *(path for path in (manifest, speakers) if path)]
        _fit_all(data, places, work, executor, workers, needs)
        summary = _conclude(data, places, manifest, fingerprint)
        summary["concluded"] = True
        files.write_json(files.join(out, run_folder.SUMMARY), summary)
        say(f"done: {headline(summary)}; {places.held_out or files.join(out, run_folder.BEST)}")
        return places.trained(summary)


def _identity(data: TrainingData, manifest: str | None, seeds: int) -> tuple[str, dict[str, Any]]:
    """The fingerprint of a run, and what else its folder says of it."""
    config = data.config
    heard = [EndToEnd.open(data.store, manifest, config).fingerprint] if manifest else []
    several = {"seeds": seeds} if seeds > 1 else {}
    fingerprint = digest(
        config.fingerprint(*TRAINING_SECTIONS),
        config.features.speaker_aggregation,
        data.digest,
        str(data.folds),
        *heard,
        *map(str, several.items()),
    )
    settings = {section: config.to_dict()[section] for section in TRAINING_SECTIONS} | several
    return fingerprint, {"data": data.digest, "folds": data.folds, "settings": settings}


def _fitting(data: TrainingData, manifest: str | None, fingerprint: str, seeds: int) -> Fitting:
    """The work of all jobs of a run."""
    return Fitting(
        data.store,
        manifest,
        run_folder.origin_of(data.store, data.config, data.digest),
        {fold.name: 0 if data.voices_differ else number for number, fold in enumerate(data.parts)},
        f"train-{fingerprint[:12]}",
        seeds > 1,
        chosen(data.config.train.trackers),
    )


@dataclass(frozen=True)
class _Places:
    """Where a run keeps what.

    Attributes:
        out: The run folder.
        folds: By fold its folder; without folds `out`, by the empty name.
        runs: By fold the folders of its trainings, one for each seed.
        held_out: The scores of held-out rows; None without folds.
    """

    out: str
    folds: Mapping[str, str]
    runs: Mapping[str, Sequence[str]]
    held_out: str | None

    @classmethod
    def of(cls, out: str, data: TrainingData, seeds: int) -> _Places:
        """Those of a run on `data`."""
        folds = {fold.name: run_folder.fold_folder(out, fold.name) if data.folds else out for fold in data.parts}
        runs = {name: run_folder.seed_folders(folder, seeds) for name, folder in folds.items()}
        return cls(out, folds, runs, files.join(out, HELD_OUT) if data.folds else None)

    @property
    def checkpoints(self) -> dict[str, list[str]]:
        """By fold those of its trainings."""
        return {fold: [files.join(run, run_folder.BEST) for run in runs] for fold, runs in self.runs.items()}

    def write_inputs(self, data: TrainingData) -> None:
        """What each fold learns from, and the voices that scoring with its model needs."""
        for fold in data.parts:
            files.write_parquet_whole(files.join(self.folds[fold.name], run_folder.USED), data.used(fold))
            if voices := data.voices(fold):
                voices.write(files.join(self.folds[fold.name], run_folder.SPEAKERS))

    def trained(self, summary: Mapping[str, Any]) -> Trained:
        """What is left at the end."""
        return Trained(self.out, summary, tuple(itertools.chain(*self.checkpoints.values())), self.held_out)


def _fit_all(
    data: TrainingData, places: _Places, work: Fitting, executor: Executor, workers: int, needs: Sequence[str]
) -> None:
    """Run the trainings that have not finished; the first that fails is raised once the others have ended."""
    if places.held_out is None:
        _say_split(data)
    elif data.table["split"].null_count < len(data.table):
        say(f"the splits of {data.store.path} are not used, as folds make their own: evaluate {places.held_out}")
    jobs = _jobs(data, places.runs)
    if len(jobs) > 1:
        seeds = len(jobs) // len(data.parts)
        said = [f"{len(data.parts)} folds ({data.folds})"] if data.folds else []
        say(", ".join([*said, *([f"{seeds} seeds"] if seeds > 1 else [])]))
    offers("matplotlib", "pictures")
    failed: list[tuple[Job, Failure]] = []
    left = [job for job in jobs if run_folder.finished(job.out) is None]
    if left:
        executor.train(
            Jobs(
                work=work,
                jobs=left,
                pack=lambda part: data.pack(None if part is None else _named(data, part)),
                ended=lambda job, line, failure: failed.append((job, failure)) if failure else None,
                count=len(left),
                storage=files.join(places.out, "_ray"),
                apart=data.voices_differ,
                needs=needs,
                deaths=MAX_DEATHS,
            ),
            workers=workers,
        )
    for job, failure in failed:
        raise failure.error(job)


def _jobs(data: TrainingData, runs: Mapping[str, Sequence[str]]) -> list[Job]:
    """Every fold with every seed, those of a fold one after the other."""
    jobs: list[Job] = []
    for fold, folders in runs.items():
        for seed, folder in enumerate(folders):
            said = [f"fold {fold}"] if fold else []
            said += [f"seed {seed}"] if len(folders) > 1 else []
            config = data.config.replace({"train": {"seed": data.config.train.seed + seed}})
            jobs.append(Job(len(jobs), ", ".join(said), folder, config, fold, data.digest))
    return jobs


def _named(data: TrainingData, part: str) -> Fold:
    return next(fold for fold in data.parts if fold.name == part)


def _conclude(data: TrainingData, places: _Places, manifest: str | None, fingerprint: str) -> dict[str, Any]:
    """What follows from all trainings: the model of a fold is its first seed's, held-out rows are scored by all."""
    bests = places.checkpoints
    for fold, (first, *others) in bests.items():
        if others:
            best = files.join(places.folds[fold], run_folder.BEST)
            copy_checkpoint(first, best)
            write_card(best)
    models = {fold: [load_checkpoint(best) for best in of_fold] for fold, of_fold in bests.items()}
    if places.held_out is not None:
        summary = score_held_out(data, models, manifest, places.held_out, fingerprint)
        attach_folds(data, models, bests, read_utterances(places.held_out))
        return summary
    (own,), (of_seeds,) = bests.values(), models.values()
    attach(data, of_seeds, own, manifest)
    (folders,) = places.runs.values()
    if len(folders) > 1:
        # The run's model is the first seed's, alone.
        attach(data, of_seeds[:1], [files.join(places.out, run_folder.BEST)], manifest)
    summaries = [run_folder.finished(folder) or {} for folder in folders]
    return _over_seeds(summaries) if len(folders) > 1 else summaries[0]


def _over_seeds(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the deviation of dev CCC, and the summary of each."""
    keys = [key for key in summaries[0] if all(isinstance(each.get(key), (int, float)) for each in summaries)]
    found: dict[str, Any] = {key: float(np.mean([each[key] for each in summaries])) for key in keys}
    found["dev_ccc_avg_sd"] = float(np.std([each["dev_ccc_avg"] for each in summaries], ddof=1))
    return {**found, "seeds": [dict(each) for each in summaries]}


@dataclass(frozen=True)
class Fitting:
    """What a job of training does.

    Attributes:
        store: The feature store, opened.
        manifest: Of it, where the encoder is trained too.
        origin: What all checkpoints say of their origin.
        fold: The number of each part among the packed sessions.
        name: Of the run, for trackers.
        several: Whether there are several seeds.
        trackers: What `train.trackers` means here.
    """

    store: FeatureStore
    manifest: str | None
    origin: Mapping[str, Any]
    fold: Mapping[str, int]
    name: str
    several: bool
    trackers: tuple[str, ...]

    def __call__(self, job: Job, sessions: SplitSessions, place: Place) -> Iterator[Line]:
        """See `vaemo.training.jobs.Work`."""
        config, out, first = job.config, job.out, place.group.rank == 0
        end_to_end = EndToEnd.open(self.store, self.manifest, config) if self.manifest else None
        train, dev = (sessions.split(self.fold[job.part or ""], name) for name in ("train", "dev"))
        trainer = Trainer(
            train, dev, config, group=place.group, device=place.device, end_to_end=end_to_end, say=place.say
        )
        if run_folder.restore_state(trainer, out) and first:
            place.say(f"going on after epoch {len(trainer.history)}")
        to_beat = _say_rivals(train, dev, config, place) if first and not trainer.finished else None
        named = [self.name, *([quote(job.part, safe="")] if job.part else [])]
        name = "-".join([*named, *([f"seed-{config.train.seed}"] if self.several else [])])
        trackers = Trackers(self.trackers if first else (), out, name, config.to_dict(), len(trainer.history))
        for metrics in trainer:
            if first:
                if trainer.improved:
                    run_folder.keep(out, trainer, self.store, self.origin, to_beat)
                run_folder.write_metrics(out, trainer.history)
                trackers.log(metrics)
                place.say(trainer.line())
                run_folder.save_state(trainer, out, config.train.keep_checkpoints)
            # Workers wait for each other here, until the state is whole on the storage.
            yield {"epoch": metrics["epoch"], "finished": False}
        trackers.close()
        # A worker that died after this, before it was heard of, is started once more.
        if first and run_folder.finished(out) is None:
            write_pictures(out, {run_folder.CURVES.removesuffix(".png"): lambda: draw_curves(trainer.history, name)})
            # What belongs to a run of several is concluded with it.
            alone = {} if self.several or job.part else {"concluded": False}
            files.write_json(files.join(out, run_folder.SUMMARY), {**trainer.summary(), **alone})
        yield {"epoch": len(trainer.history), "finished": True}


def headline(summary: Mapping[str, Any]) -> str:
    """A run in a line."""
    if "fold_mean" in summary:
        return (
            f"CCC-avg {summary['fold_mean']['ccc_avg']:.3f} (mean over {len(summary['folds'])} folds), "
            f"{summary['pooled']['ccc_avg']:.3f} pooled"
        )
    if "seeds" in summary:
        mean, sd = summary["dev_ccc_avg"], summary["dev_ccc_avg_sd"]
        return f"dev CCC-avg {mean:.3f} ± {sd:.3f} over {len(summary['seeds'])} seeds"
    kept = f"dev CCC-avg {summary['dev_ccc_avg']:.3f} at epoch {summary['kept_epoch']} of {summary['epochs']}"
    # Runs of older versions do not know their peak.
    peak = summary.get("peak_dev_ccc_avg", summary["dev_ccc_avg"])
    if peak - summary["dev_ccc_avg"] < CLEARLY_BETTER:
        return kept
    return (
        f"{kept} (it was {peak:.3f} at epoch {summary['peak_epoch']}: "
        "the model overfits; try fewer train.epochs, or train.select=best)"
    )


def _say_rivals(train: Any, dev: Any, config: Config, place: Place) -> dict[str, Any] | None:
    """What the cheapest rivals give on the dev split of a job."""
    _, used = used_streams(config.model, {name: x.shape[-1] for name, x in train.features.items()})
    names = config.model.names
    found = rivals(train, dev, list(used), names)
    if found is None:
        place.say(f"ridge regression is left out: train or dev has fewer than {RIVAL_LABELS} labels in a dimension")
        return None
    named = (("ridge on the features", found["ridge"]), ("on them and their causal EMA", found["ridge_ema"]))
    parts = []
    for title, each in named:
        of_target = ", ".join(f"{name} {each[f'dev_ccc_{name}']:.3f}" for name in names)
        parts.append(f"{title} {each['dev_ccc_avg']:.3f} ({of_target})")
    place.say(f"dev CCC to beat: {', '.join(parts)}")
    return found


def _say_split(data: TrainingData) -> None:
    (fold,), usable = data.parts, data.table["status"].to_numpy() == "ok"
    names = [*SPLITS, *([CALIB] if (fold.split == CALIB).any() else [])]
    counts = ", ".join(f"{int(((fold.split == name) & usable).sum()):,} {name}" for name in names)
    made = data.table["split"].null_count == len(data.table)
    how = ["these splits are made: no utterance has one"] if made else []
    if made and pc.all(pc.equal(data.table["speaker_id"], data.table["session_id"])).as_py():
        how.append("sessions are kept apart, and speakers are not known: speaker_id is that of the session")
    say(f"utterances: {counts}" + (f" ({'; '.join(how)})" if how else ""))
    lanes = data.config.train.lanes
    n_train = sum(fold.split[session.rows[0]] == "train" for session in data.labelled)
    if n_train < lanes:
        say(
            f"{n_train} training sessions are fewer than the {lanes} lanes: the others stay idle. "
            "A smaller train.lanes makes more optimiser steps of them."
        )
