"""Extractors in a child process: a crash of native code on an utterance kills the child and not this process.

It takes seconds to start and loads its own weights, so it is used only for parts that have killed a worker. The process
that decodes (`vaemo.audio.decoder`) is separate: it starts without this package, passes samples as bytes and is ended
from outside when its time is over. This one loads what this package loads, and its watchdog runs inside it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from vaemo.config import Config
from vaemo.features.base import Extractor, ExtractorHung, ExtractorLost, StandIn
from vaemo.features.load import load_extractor
from vaemo.features.watch import has_hung, may_end_process, watched


@contextlib.contextmanager
def isolated(
    extractors: Mapping[str, Extractor], config: Config, *, careful: bool = True
) -> Iterator[Mapping[str, Extractor]]:
    """The same extractors, computing in one child process as long as the context is open.

    Args:
        extractors: By stream; those that compute elsewhere already stay as they are.
        config: What they were loaded from; sections features and extract.
        careful: False leaves all of them as they are.
    """
    if not careful:
        yield extractors
        return
    child = _Child(config)

    def in_child(stream: str, extractor: Extractor) -> StandIn:
        return StandIn.of(extractor, lambda utterances: functools.partial(child.compute, stream, utterances))

    try:
        yield {
            stream: extractor if isinstance(extractor, StandIn) else in_child(stream, extractor)
            for stream, extractor in extractors.items()
        }
    finally:
        child.close()


class _Child:
    """The process; it starts at the first request, and again at the next one after it has died."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: SpawnProcess | None = None
        self._pipe: Connection

    def compute(self, stream: str, utterances: Sequence[np.ndarray]) -> np.ndarray:
        """The vectors of utterances.

        Raises:
            ExtractorLost: if the child has died, or was ended since an utterance took too long (`ExtractorHung`).
            Exception: what the extractor raised.
        """
        process = self._process or self._start()
        begun, limit_s = time.monotonic(), self._config.extract.features_timeout_s
        try:
            self._pipe.send((stream, utterances))
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join()
            code = process.exitcode or 0
            self.close()
            if has_hung(code, time.monotonic() - begun, limit_s):
                raise ExtractorHung(f"{limit_s:g} s") from None
            raise ExtractorLost(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None

    def _start(self) -> SpawnProcess:
        # A fork would inherit locks of threads that do not exist in it.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._config), daemon=True)
        self._process.start()
        # Closing the last other copy of the child's end makes its death an end of file here.
        theirs.close()
        return self._process


def _serve(pipe: Connection, config: Config) -> None:
    """Answer requests until the other end is closed."""
    extractors: dict[str, Extractor] = {}
    may_end_process()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            stream, utterances = pipe.recv()
            try:
                if stream not in extractors:
                    extractors[stream] = load_extractor(stream, config.features, batch_s=config.extract.batch_s)
                with watched(config.extract.features_timeout_s):
                    answer: Any = extractors[stream](utterances)
            except Exception as error:
                # Errors are raised as they would be without the child.
                answer = error
            pipe.send(answer)
