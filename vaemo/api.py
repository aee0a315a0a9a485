"""The jobs as functions: `vaemo.extract`, `vaemo.train`, `vaemo.score`, `vaemo.evaluate`.

Their keyword arguments are the options of the commands. Paths may be relative. `config` is what `--config` takes, or a
`Config`; `set` is what `--set` takes, repeated. Each leaves `summary.json` in its output folder, as the commands do.

`executor` selects where the work runs: `ray`, on the cluster in RAY_ADDRESS or a Ray started on this machine, or
    `process`, in this process, one part after the other. On Ray, the environment variables, log levels and warning
    filters that vaemo sets are restored on return. Ray itself stays connected until `ray.shutdown()`, keeps its folder
    below /tmp/ray, and the environment variables of its own processes.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from vaemo import cli
from vaemo.config import Config
from vaemo.errors import UsageError
from vaemo.pipeline.executors import Executor, InProcess
from vaemo.pipeline.outcome import Outcome
from vaemo.pipeline.plan import Again
from vaemo.summary import summary

if TYPE_CHECKING:
    from vaemo.pipeline.training import Trained

Where = Literal["ray", "process"]
AnyPath = str | os.PathLike[str]


def extract(
    *,
    out: AnyPath,
    manifest: AnyPath | None = None,
    input: AnyPath | None = None,
    config: Config | AnyPath = "default",
    set: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
    retry_failed: bool = False,
    changed: Literal["keep", "redo"] = "keep",
    voices_from: AnyPath | None = None,
    calls: AnyPath | None = None,
    executor: Where | Executor = "ray",
) -> Outcome:
    """Extract the utterances of a manifest, or of recordings, into a feature store; run again, it does what is missing.

    Args:
        out: The store's folder.
        manifest: The utterances, JSON Lines or Parquet; or
        input: a folder of recordings, in which utterances are found.
        config: Sections audio, vad, features, labels and extract.
        set: Changes of the config, such as `["features.speech=logmel"]`.
        exclude: Patterns of names of recordings to leave out.
        limit: Only the first utterances (whole sessions) or recordings, at least 1.
        dry_run: Print what would be done and how long it would take; write nothing.
        retry_failed: Retry what failed in an earlier run.
        changed: What to do with finished sessions whose input has changed since: list them, or do them again.
        voices_from: Who speaks when in the recordings: RTTM, or JSON of WhisperX or Amazon Transcribe; file or folder.
        calls: Table of calls: which recordings are one session, and which may not be processed.
        executor: `ray`, `process`, or an `Executor`.

    Returns:
        Counts of all outcomes in the store.

    Raises:
        UsageError: if there is not one of `manifest` and `input`, or an argument has an invalid value.
        TooManyFailuresError: if more than `extract.max_failed_fraction` has failed.
        VaemoError: for any other problem with the input, the settings, the store or the cluster.

    Example:
        >>> settings = ["features.speech=logmel", "features.prosody=none"]
        >>> outcome = vaemo.extract(manifest="calls.jsonl", out="store", set=settings, executor="process")
        >>> outcome.utterances, outcome.failed_fraction
        ({'ok': 12}, 0.0)
    """
    from vaemo.data.sessions import label_ranges
    from vaemo.pipeline import extraction
    from vaemo.pipeline.sources import ManifestSource, RecordingsSource, Source

    if (manifest is None) == (input is None):
        raise UsageError("give one of manifest and input: which utterances, or a folder of recordings to find them in.")
    settings, store, left_out = _config(config, set), _path(out), _texts("exclude", exclude)
    limit = None if limit is None else _count("limit", limit)
    with summary(store, "extract", dry_run=dry_run) as facts, _executor(executor) as where:
        if manifest is not None:
            native = {name: (held.scale.low, held.scale.high) for name, held in label_ranges(settings).items()}
            source: Source = ManifestSource(_path(manifest), settings.extract.root, native, settings.model.targets)
        else:
            folder = _path(input or "")
            source = RecordingsSource(folder, settings.audio, left_out, settings.extract.min_age_s)
        again = _again(retry_failed, changed)
        tally = extraction.extract(
            source,
            store,
            settings,
            where,
            limit=limit,
            dry_run=dry_run,
            again=again,
            voices_from=_path(voices_from),
            calls=_path(calls),
        )
        facts |= tally.to_dict()
    return Outcome.of(store, tally)


def score(
    *,
    input: AnyPath,
    checkpoint: AnyPath | Sequence[AnyPath],
    out: AnyPath,
    calls: AnyPath | None = None,
    personal: AnyPath | None = None,
    speakers: AnyPath | None = None,
    roles_unknown: bool = False,
    config: Config | AnyPath = "default",
    set: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
    retry_failed: bool = False,
    changed: Literal["keep", "redo"] = "keep",
    voices_from: AnyPath | None = None,
    executor: Where | Executor = "ray",
) -> Outcome:
    """Score whole sessions of a store, a manifest or a folder of recordings; run again, it does what is missing.

    Args:
        input: The store, the manifest or the folder.
        checkpoint: A folder, or several, which give mean and deviation; a run folder stands for all its seeds.
        out: The folder of scores; `vaemo.scores` reads it.
        calls: Table of calls: who speaks on which channel, and which recordings are one session.
        personal: Folder of personal deltas that `jobs/personalize.py` wrote.
        speakers: File of enrolments: `speaker_id`, `speaker`.
        roles_unknown: Score all channels, possibly including employees; for evaluation.
        config: Sections score, sessions, audio, vad and extract.
        set: Changes of the config, such as `["score.channel_roles=[customer,agent]"]`.
        exclude: Patterns of names of recordings to leave out.
        limit: Only the first sessions or recordings, at least 1.
        dry_run: Print what would be done; write nothing.
        retry_failed: Retry what failed in an earlier run.
        changed: What to do with finished sessions whose input has changed since: list them, or do them again.
        voices_from: Who speaks when in the recordings: RTTM, or JSON of WhisperX or Amazon Transcribe; file or folder.
        executor: `ray`, `process`, or an `Executor`.

    Returns:
        Counts of all outcomes in the folder of scores.

    Raises:
        RolesError: if recordings are to be scored and no roles are given.
        TooManyFailuresError: if more than `score.max_failed_fraction` has failed.
        VaemoError: for any other problem with the input, the checkpoints, the settings or the cluster.

    Example:
        >>> outcome = vaemo.score(input="store", checkpoint="run/best", out="scores", executor="process")
        >>> outcome.sessions["all"], outcome.utterances
        (6, {'ok': 12})
    """
    from vaemo.model.checkpoint import checkpoints_in
    from vaemo.pipeline import scoring
    from vaemo.pipeline.prepare import Request

    several = [checkpoint] if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    if not several:
        raise UsageError("checkpoint is an empty list; give the folder of at least one checkpoint.")
    request = Request(
        _path(input),
        tuple(each for path in several for each in checkpoints_in(_path(path))),
        _path(out),
        calls=_path(calls),
        personal=_path(personal),
        speakers=_path(speakers),
        roles_unknown=roles_unknown,
        limit=None if limit is None else _count("limit", limit),
        dry_run=dry_run,
        exclude=_texts("exclude", exclude),
        again=_again(retry_failed, changed),
        voices_from=_path(voices_from),
    )
    settings = _config(config, set)
    with summary(request.out, "score", dry_run=dry_run) as facts, _executor(executor) as where:
        tally = scoring.score(request, settings, where)
        facts |= tally.to_dict()
    return Outcome.of(request.out, tally)


def train(
    *,
    store: AnyPath,
    out: AnyPath,
    workers: int = 1,
    folds: str | None = None,
    seeds: int = 1,
    manifest: AnyPath | None = None,
    speakers: AnyPath | None = None,
    config: Config | AnyPath = "default",
    set: Sequence[str] = (),
    executor: Where | Executor = "ray",
) -> Trained:
    """Train a session model on a feature store, or resume an interrupted run.

    Args:
        store: The feature store, with labels.
        out: The run folder; `out/best` is the checkpoint.
        workers: Processes that train one model together; divides `train.lanes`. One in this process.
        folds: `by=fold`, `by=speaker` or `k=N`: hold out one part at a time; None trains on the splits.
        seeds: Trainings, from `train.seed` on: an ensemble.
        manifest: From which the store was extracted, to train its speech encoder too (`train.encoder`).
        speakers: File of enrolments: `speaker_id`, `speaker`.
        config: All sections that affect a training.
        set: Changes of the config, such as `["train.epochs=5"]`.
        executor: `ray`, `process`, or an `Executor`.

    Returns:
        The run folder, its results, and its checkpoints.

    Raises:
        OtherRunError: if `out` holds a run with other settings or data, or another process is writing it.
        VaemoError: for any other problem with the store, the settings or the cluster.

    Example:
        >>> settings = ["train.epochs=1", "train.lanes=4"]
        >>> trained = vaemo.train(store="store", out="run", set=settings, executor="process")
        >>> trained.summary["epochs"], [os.path.basename(path) for path in trained.checkpoints]
        (1, ['best'])
    """
    from vaemo.pipeline import training

    settings, run = _config(config, set), _path(out)
    workers, seeds = _count("workers", workers), _count("seeds", seeds)
    with summary(run, "train"), _executor(executor) as where:
        return training.train(
            _path(store),
            run,
            settings,
            where,
            workers=workers,
            folds=folds,
            seeds=seeds,
            manifest=_path(manifest),
            speakers=_path(speakers),
        )


def evaluate(
    *,
    scores: AnyPath,
    labels: AnyPath,
    out: AnyPath,
    split: str | None = None,
    exclude: AnyPath | None = None,
    compare: AnyPath | None = None,
    checkpoint: AnyPath | None = None,
    card: AnyPath | None = None,
    by: Sequence[str] = (),
    config: Config | AnyPath = "default",
    set: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Compare scores with labels: CCC, RMSE, Pearson's r and MAE with intervals, by group.

    Args:
        scores: A folder of scores.
        labels: A feature store or a manifest.
        out: Where `metrics.json`, `groups.parquet` and pictures go.
        split: Only this split; None is `test` where any row has it, else all rows, with a warning.
        exclude: Parquet file of utterances to leave out.
        compare: Other scores of the same utterances, compared in pairs.
        checkpoint: Replayed on the store with labels fed, too.
        card: Checkpoint to whose model card the result is added.
        by: Columns of the labels or the scores by which results are grouped and compared.
        config: Sections evaluate and labels.
        set: Changes of the config.

    Returns:
        The content of `metrics.json`.

    Raises:
        VaemoError: if scores or labels cannot be read, or have nothing in common.

    Example:
        >>> settings = ["evaluate.bootstrap=0"]
        >>> result = vaemo.evaluate(scores="scores", labels="store", out="evaluation", set=settings)
        >>> result["pooled"]["n"], -1 <= result["pooled"]["ccc_valence"] <= 1
        (2, True)
    """
    from vaemo.evaluation import evaluate as evaluation
    from vaemo.training.card import write_card

    settings, folder, by = _config(config, set), _path(out), _texts("by", by)
    with summary(folder, "evaluate"):
        result = evaluation.evaluate(
            _path(scores),
            _path(labels),
            folder,
            settings,
            split=split,
            exclude=_path(exclude),
            compare=_path(compare),
            checkpoint=_path(checkpoint),
            by=by,
        )
        if card is not None:
            write_card(_path(card), result)
    return result


@contextlib.contextmanager
def _executor(executor: Where | Executor) -> Iterator[Executor]:
    """The executor of a name, its settings in force until the block ends."""
    if not isinstance(executor, str):
        yield executor
    elif executor == "process":
        yield InProcess()
    elif executor == "ray":
        # Ray takes seconds to import, and is not needed here otherwise.
        from vaemo.cluster.executor import OnRay
        from vaemo.cluster.runtime import restored_settings

        with restored_settings():
            yield OnRay()
    else:
        raise UsageError(f"executor is '{executor}'; allowed are 'ray' and 'process'.")


def _again(retry_failed: bool, changed: str) -> Again:
    if changed not in ("keep", "redo"):
        raise UsageError(f"changed is '{changed}'; allowed are 'keep' and 'redo'.")
    return Again(failed=retry_failed, changed=changed == "redo")


def _count(name: str, value: int) -> int:
    """A number of things, at least 1."""
    try:
        if operator.index(value) >= 1:
            return operator.index(value)
    except TypeError:
        pass
    raise UsageError(f"{name} is {value!r}; give a whole number of at least 1.")


def _texts(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Several texts; one alone would be taken for its letters."""
    if isinstance(values, str):
        raise UsageError(f"{name} is '{values}'; give a list, such as ['{values}'].")
    return tuple(values)


def _config(config: Config | AnyPath, changes: Sequence[str]) -> Config:
    changes = _texts("set", changes)
    if not isinstance(config, Config):
        return Config.load(os.fspath(config), changes)
    return config.override(changes)


@overload
def _path(path: AnyPath) -> str: ...


@overload
def _path(path: AnyPath | None) -> str | None: ...


def _path(path: AnyPath | None) -> str | None:
    """Absolute, or a URI."""
    return None if path is None else cli.data_path(os.fspath(path))
