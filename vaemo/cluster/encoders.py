"""A separate encoder stage where there are GPUs: one encoder per GPU, shared by the workers of a job.

Workers decode and compute prosody on CPUs, any node's, and send the speech that they have gathered to an encoder, which
holds the only copy of the weights on its GPU. Without GPUs there is no stage: every worker loads its own encoders.

It is not a stage of Ray Data. A second actor pool would need CPUs beside the first, and a cluster whose CPUs are all
held by pools makes no progress; the whole block of utterances of a dead encoder would be retried for ever;
and the samples would pass through Ray Data's blocks, where a worker now sends them straight to an encoder.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from vaemo.cluster.metrics import Seconds
from vaemo.cluster.nodes import driver_node, total
from vaemo.config import Config
from vaemo.errors import ClusterError, ExtractorError, VaemoError, carried, raise_carried
from vaemo.features import Extractor, ExtractorHung, ExtractorLost, StandIn, load_extractor
from vaemo.features.watch import EXIT_CODE, has_hung, may_end_process, watched

_ATTEMPTS = 2
"""A batch that has killed this many encoders is returned; one death may be the machine's fault."""

_DIED, _HUNG = f"{_ATTEMPTS} encoders died", "hung"


@contextlib.contextmanager
def encoder_stage(extractors: Mapping[str, Extractor], config: Config, most: int) -> Iterator[dict[str, Extractor]]:
    """Start an encoder for each GPU that the cluster has or may start, and end them with the context.

    They reserve no CPU, so that they never wait for one. Encoders join as their GPUs become available.

    Args:
        extractors: By stream.
        config: What they were loaded from; sections features and extract.
        most: Number of parts: more encoders would have nothing to do.

    Returns:
        A stand-in for each extractor that uses a GPU, for workers' `load_extractors`; none where there is no GPU.
    """
    using = {stream: extractor for stream, extractor in extractors.items() if extractor.uses_gpu}
    n = min(int(total("GPU")), most) if using else 0
    if not n:
        yield {}
        return
    limit_s = config.extract.features_timeout_s
    encoder = ray.remote(num_cpus=0, num_gpus=1, max_restarts=-1)(_Encoder)
    encoders: list[Any] = [encoder.remote(config.to_dict()) for _ in range(n)]
    dispatcher: Any = (
        ray.remote(num_cpus=0)(_Dispatcher).options(scheduling_strategy=driver_node()).remote(encoders, limit_s)
    )
    try:
        yield {
            stream: StandIn.of(extractor, _Sender(dispatcher, stream, limit_s)) for stream, extractor in using.items()
        }
    finally:
        for actor in (dispatcher, *encoders):
            ray.kill(actor)


@dataclass(frozen=True)
class _Sender:
    """Sends a worker's utterances to an encoder; see `StandIn.begin`."""

    dispatcher: Any
    stream: str
    limit_s: float

    def __call__(self, utterances: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        # As a separate object, the speech goes to the encoder directly and not through the dispatcher.
        speech = ray.put(list(utterances))
        node = ray.get_runtime_context().get_node_id()
        return functools.partial(_receive, self.dispatcher.encode.remote(self.stream, [speech], node), self.limit_s)


def _receive(answer: Any, limit_s: float) -> np.ndarray:
    try:
        vectors = ray.get(answer)
    except RayActorError as error:
        raise ClusterError(
            "the actor that hands speech to the encoders has died on the job's own node, where memory may be short. "
            "What is finished is kept; run the same command again to do the rest."
        ) from error
    if isinstance(vectors, str):
        raise ExtractorHung(f"{limit_s:g} s") if vectors == _HUNG else ExtractorLost(vectors)
    if isinstance(vectors, dict):
        raise_carried(vectors)
    return vectors


class _Dispatcher:
    """Gives speech to encoders as they come free, those on the sender's node first.

    An encoder has one batch at a time, so that its death concerns no other batch. It gets work once it has answered:
    encoders that are still starting are not waited for.

    Args:
        encoders: Actors of `_Encoder`.
        limit_s: Seconds after which its own watchdog kills one of them.
    """

    def __init__(self, encoders: Sequence[Any], limit_s: float) -> None:
        self._away = list(encoders)
        self._free: list[tuple[Any, str]] = []
        self._limit_s = limit_s
        self._changed = asyncio.Condition()
        self._asking: set[asyncio.Task] = set()

    async def encode(self, stream: str, speech: Sequence[Any], node: str) -> Any:
        """An encoder's answer; if `_ATTEMPTS` of them have died on it, the reason as text.

        Args:
            stream: Which extractor.
            speech: A reference to utterances, wrapped so that they are not fetched here.
            node: Where they are.
        """
        hung = 0
        for _ in range(_ATTEMPTS):
            encoder, begun = await self._take(node), time.monotonic()
            try:
                return await encoder.encode.remote(stream, speech[0])
            except RayActorError:
                hung += has_hung(EXIT_CODE, time.monotonic() - begun, self._limit_s)
            finally:
                self._away.append(encoder)
                self._call_back()
        return _HUNG if hung == _ATTEMPTS else _DIED

    async def _take(self, node: str) -> Any:
        self._call_back()
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            near = (place for place, (_, where) in enumerate(self._free) if where == node)
            return self._free.pop(next(near, 0))[0]

    def _call_back(self) -> None:
        """Ask absent encoders for an answer, without waiting for it."""
        while self._away:
            task = asyncio.create_task(self._welcome(self._away.pop()))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _welcome(self, encoder: Any) -> None:
        # Answers once the encoder runs, after any number of restarts.
        where = await encoder.node.options(max_task_retries=-1).remote()
        async with self._changed:
            self._free.append((encoder, where))
            self._changed.notify()


class _Encoder:
    """The extractors that use a GPU, loaded when they are first asked for.

    Args:
        config: As `Config.to_dict` gives it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        may_end_process()
        self._config = Config.from_dict(config)
        self._extractors: dict[str, Extractor] = {}
        self._spent = Seconds("vaemo_encoding_seconds", "Seconds that encoders have computed.")

    def node(self) -> str:
        """Where it runs."""
        return ray.get_runtime_context().get_node_id()

    def encode(self, stream: str, utterances: Sequence[np.ndarray]) -> np.ndarray | dict[str, str]:
        """Vectors of utterances; for an error, the value that `raise_carried` raises."""
        try:
            # Arrays from Ray's memory are read-only, which torch does not accept.
            extractor = self._extractor(stream)
            begun = time.monotonic()
            with watched(self._config.extract.features_timeout_s):
                vectors = extractor([samples.copy() for samples in utterances])
            self._spent.add(time.monotonic() - begun)
            return vectors
        except torch.OutOfMemoryError as error:
            short = str(error).partition(".")[0]
            return carried(
                ExtractorError(
                    f"features.{stream} with extract.batch_s={self._config.extract.batch_s:g} needs more memory than "
                    f"the GPU has ({short}). Lower it, or end what else uses the GPU, and run the same command again."
                )
            )
        except (VaemoError, OSError) as error:
            return carried(error)

    def _extractor(self, stream: str) -> Extractor:
        if stream not in self._extractors:
            batch_s = self._config.extract.batch_s
            self._extractors[stream] = load_extractor(stream, self._config.features, batch_s=batch_s)
        return self._extractors[stream]
