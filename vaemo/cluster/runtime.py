"""Ray for all jobs: connection, pool sizes from the cluster's resources, and execution of shards."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError

from vaemo.audio.decoder import Decoder
from vaemo.cluster.address import LOCAL, find_cluster, temporary_folder
from vaemo.cluster.attempts import Attempts
from vaemo.cluster.metrics import Seconds
from vaemo.cluster.nodes import capacity, check_visible, driver_node
from vaemo.data.spool import is_here
from vaemo.errors import ClusterError, StorageError, VaemoError, carried, mistake_of, raise_carried
from vaemo.features.watch import may_end_process
from vaemo.progress import say

NO_PROGRESS_S = 900.0
"""A job without progress for this many seconds is ended: Ray would wait for half an hour, or for ever."""

MAX_ATTEMPTS = 5
"""A shard whose worker has died this often ends the job: Ray would retry it for ever."""

CAREFUL_AFTER = 2
"""After this many deaths of its worker a shard is processed with its extractors in a separate process."""

SILENCE_S = 30.0
"""Seconds of silence after which a line says that Ray is being waited for."""

_LOGGERS = {
    "ray": logging.ERROR,
    "ray.data": logging.CRITICAL,
    "ray.tune": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.CRITICAL,
}
_DATA = ("enable_progress_bars", "print_on_execution_start", "execution_no_progress_timeout_s")
"""Fields of Ray Data's context that are set."""

_NUMBER = "_shard"
_SAID = 300


@contextlib.contextmanager
def restored_settings() -> Iterator[None]:
    """Restore environment variables, log levels and warning filters at the end of the block."""
    environment, data = dict(os.environ), _data_context()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    shown = {name: getattr(data, name) for name in _DATA}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in shown.items():
            setattr(data, name, value)


def _data_context() -> DataContext:
    """Ray Data's settings; making them, Ray warns of fields of its own that will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return DataContext.get_current()


def connect() -> None:
    """Attach to the cluster that RAY_ADDRESS names, or start Ray on this machine; once per process.

    The number of CPUs is never passed: inside a submitted job Ray refuses it, elsewhere the machine knows best.

    Raises:
        UsageError: if RAY_ADDRESS is no address, or Ray's temporary folder is too long.
        ClusterError: if nothing answers at RAY_ADDRESS, or Ray does not start.
        StorageError: if Ray's temporary folder is full or cannot be written.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One footer reader instead of Ray's 32 actors a read.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    # Ray's messages about its internals; errors that end a job are raised anyway.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if not ray.is_initialized():
        _init(find_cluster())
    context = _data_context()
    for name, value in zip(_DATA, (False, False, NO_PROGRESS_S), strict=True):
        setattr(context, name, value)


def _init(address: str | None) -> None:
    """`ray.init`, with a line while it waits: it is silent for minutes if the address is no complete cluster."""
    here = address == LOCAL
    what = "Ray to start on this machine" if here else f"the Ray cluster at {address or 'this machine'}"
    folder = temporary_folder() if here else None
    silence = threading.Event()

    def speak() -> None:
        while not silence.wait(SILENCE_S):
            say(f"waiting for {what}")

    threading.Thread(target=speak, daemon=True).start()
    try:
        # A Ray that is started for this job alone needs no dashboard, whose processes take seconds to start.
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
        with _without_log_level():
            ray.init(address, _temp_dir=folder, **quiet)
    except Exception as error:  # Ray raises errors of many types: of sockets, versions, missing nodes
        if isinstance(error, OSError) and isinstance(mistake := mistake_of(error), StorageError):
            raise mistake from None
        raise ClusterError(
            f"waited for {what}, and it failed: {' '.join(str(error).split())[:_SAID]}. "
            + ("Look at the machine's memory and processes." if here else "Run the job on a node of that cluster.")
        ) from error
    finally:
        silence.set()


@contextlib.contextmanager
def _without_log_level() -> Iterator[None]:
    """Drop the line in which Ray's native part prints its log level; there is no setting for it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, open(os.dup(2), "wb") as terminal:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal.fileno(), 2)
            held.seek(0)
            terminal.writelines(line for line in held if b"Set ray log level" not in line)


@dataclass(frozen=True)
class Pool:
    """Workers of one kind.

    Attributes:
        workers: As many as fit the nodes that are there, at least one.
        most: As many as fit once the autoscaler has done all it may.
        cpus: CPUs that each of them reserves.
        gpus: GPU share that each of them reserves.
    """

    workers: int
    most: int
    cpus: float
    gpus: float


def fit_pool(*, gpus: float = 0.0) -> Pool:
    """As many workers as the cluster has CPUs (or GPU shares), which leave one CPU free on every node.

    Ray Data's own tasks each need a whole CPU, on one node; a pool that holds them all never ends.

    Args:
        gpus: Share of a GPU that a worker needs; 0 for work on CPUs.

    Raises:
        ClusterError: if the cluster neither has nor can start a node with a CPU, or with the GPU share.
    """
    kinds = capacity()
    if gpus:
        slots = [(kind, math.floor(kind.resources.get("GPU", 0) / gpus)) for kind in kinds]
        refusal = f"a worker needs {gpus:g} GPU, and no node of the Ray cluster has that many."
    else:
        slots = [(kind, kind.cpus) for kind in kinds]
        refusal = (
            "no node of the Ray cluster has a CPU to work with. Start a worker node, or one here with "
            "`ray start --head`."
        )
    slots = [(kind, n) for kind, n in slots if n]
    if not slots:
        raise ClusterError(refusal)
    now = sum(kind.count * n for kind, n in slots if kind.alive)
    most = sum(kind.count * n for kind, n in slots)
    share = 0.0 if gpus else min((n - 1) / n for _, n in slots)
    return Pool(max(now, 1), most, math.floor(share * 100) / 100, gpus)


def run_shards(
    worker: Callable[..., Any],
    worker_args: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    *,
    needs: Iterable[str] = (),
) -> Iterator[dict[str, Any]]:
    """Run a worker over every shard on the cluster and yield what it returns, in the order of completion.

    Args:
        worker: A class; each actor makes one object of it (models are loaded there), and calls that with a shard.
            The call writes the shard's file itself and returns a dict of counts, fit for JSON.
        worker_args: Keyword arguments of the class.
        shards: Flat dicts of numbers, texts and bytes: light descriptions of work; a `name` is used in messages. One
            that has ended its worker `CAREFUL_AFTER` times comes to the next with `careful`, which is true.
        needs: Paths that every worker reads or writes; see `vaemo.cluster.nodes.check_visible`.

    Raises:
        ClusterError: if a node does not see what it needs, nothing moved for `NO_PROGRESS_S`, or a shard has ended its
            worker `MAX_ATTEMPTS` times.
        StorageError: if a worker could not read or write.
        VaemoError: what a worker raised first.
    """
    if not shards:
        return
    pool = fit_pool()
    check_visible(needs)
    attempts: Any = ray.remote(num_cpus=0)(Attempts).options(scheduling_strategy=driver_node()).remote()
    numbered = [{**shard, _NUMBER: number} for number, shard in enumerate(shards)]
    made_of = {"worker": worker, "worker_args": dict(worker_args), "attempts": attempts, "most": MAX_ATTEMPTS}
    dataset = ray.data.from_items(numbered, override_num_blocks=len(shards)).map(
        _ShardWorker,  # type: ignore[arg-type]  # Ray takes classes of callables too
        fn_constructor_kwargs=made_of,
        compute=ActorPoolStrategy(min_size=min(pool.workers, len(shards)), max_size=min(pool.most, len(shards))),
        num_cpus=pool.cpus,
    )
    try:
        for row in dataset.iter_rows():
            raise_carried(row)
            yield json.loads(row["message"])
    except ExecutionTimeoutError as error:
        raise ClusterError(
            f"nothing moved on the cluster for {NO_PROGRESS_S:g} s: too few free CPUs, no GPU, or a worker that hangs. "
            "What is finished is kept; run the same command again to do the rest."
        ) from error
    finally:
        ray.kill(attempts)


class _ShardWorker:
    """Creates the worker at its first shard, and returns a VaemoError as a row, without Ray's wrapping."""

    def __init__(self, worker: type, worker_args: Mapping[str, Any], attempts: Any, most: int) -> None:
        # Ray starts another one in its place.
        may_end_process()
        self._make = lambda: worker(**worker_args)
        self._worker: Any = None
        self._attempts, self._most = attempts, most
        self._spent = Seconds("vaemo_worker_seconds", "Seconds that workers have decoded and computed.")
        self._decoding = Seconds("vaemo_decoding_seconds", "Seconds of these that workers have waited for decoders.")

    def __call__(self, shard: dict[str, Any]) -> Mapping[str, str | None]:
        number = shard.pop(_NUMBER)
        attempt = ray.get(self._attempts.begin.remote(number))
        try:
            if attempt > self._most:
                raise ClusterError(
                    f"part {shard.get('name', number)} has ended its worker {self._most} times: out of memory, or "
                    "something in it crashes the process. What is finished is kept. Run the same command again; if it "
                    "ends here once more, leave out what is in this part."
                )
            self._worker = self._worker or self._make()
            careful = {"careful": True} if attempt > CAREFUL_AFTER else {}
            begun, decoded_s = time.monotonic(), Decoder.spent_s
            message = json.dumps(self._worker({**self._with_rows(shard), **careful}))
            self._spent.add(time.monotonic() - begun)
            self._decoding.add(Decoder.spent_s - decoded_s)
            return {"error": None, "message": message}
        except (VaemoError, OSError) as error:
            return carried(error)

    def _with_rows(self, shard: Mapping[str, Any]) -> Mapping[str, Any]:
        """The shard, with data that exists on the driver's node only."""
        if "spooled" not in shard or is_here(shard["spooled"]):
            return shard
        return {**shard, "rows": ray.get(self._attempts.rows.remote(shard["spooled"]))}
