"""Workers of Ray Train that compute one result together: start, retries, and errors that end all of them.

A worker that ends by itself leaves the others waiting for its gradients for ever. With several workers, an error of one
is recorded on the cluster and raised: Ray ends them all and starts again, and the new ones return the recorded error.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray.train
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from vaemo.errors import ClusterError, VaemoError, carried, raise_carried

PLACE_TRY_S = 60.0
"""Seconds after which a group without resources on the cluster is tried again, up to its patience."""

POLL_S = "0.3"
"""Interval at which the controller polls, for which a report waits; Ray's 2 s exceed an epoch of a small corpus."""


def run_group(
    work: Callable[[Any], Mapping[str, Any]],
    given: Any,
    *,
    workers: int,
    gpus: float,
    name: str,
    storage: str,
    max_failures: int,
    patience_s: float,
    callbacks: Sequence[Any] = (),
) -> Mapping[str, Any]:
    """What the first worker returned.

    Args:
        work: What every worker does, within Ray Train's context; after a failure all of them start it again.
        given: Its argument.
        workers: How many there are, a CPU for each.
        gpus: GPUs of each; below 1 they share one.
        name: Of the run.
        storage: Where Ray keeps its records of it, a path or URI that every node sees.
        max_failures: How often workers may die before the run gives up.
        patience_s: How long they may wait for resources.
        callbacks: Of Ray Train.

    Raises:
        VaemoError: what a worker raised.
        ControllerError: Ray's, if the workers waited too long for resources.
        WorkerGroupError: Ray's, where workers died too often, or failed with an internal error.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(PLACE_TRY_S)
    # A process that warns workers of preemption; not needed, because every epoch is saved.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    mistake = f"vaemo/{name}-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _work,  # type: ignore[arg-type]  # its value comes back in the result
        train_loop_config={"work": work, "given": given, "mistake": mistake},
        torch_config=TorchConfig(backend="nccl" if gpus >= 1 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            use_gpu=gpus > 0,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=int(patience_s / PLACE_TRY_S),  # type: ignore[call-arg]  # of Train V2's
            ),
            callbacks=list(callbacks),
        ),
    )
    try:
        ended: Any = trainer.fit().return_value  # type: ignore[attr-defined]  # of Train V2's Result
    finally:
        _internal_kv_del(mistake.encode())
    raise_carried(ended)
    return ended


def _work(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The work of every worker; an error is returned as a value, because Ray would retry it."""
    key = config["mistake"].encode()
    if (noted := _internal_kv_get(key)) is not None:
        return json.loads(noted)
    try:
        return config["work"](config["given"])
    except (VaemoError, OSError) as error:
        mistake = carried(error)
        if mistake["error"] == ClusterError.__name__ and isinstance(error, OSError):
            # A lost connection, which Ray restores.
            raise
        if ray.train.get_context().get_world_size() > 1:
            _internal_kv_put(key, json.dumps(mistake).encode())
            raise
        return mistake
