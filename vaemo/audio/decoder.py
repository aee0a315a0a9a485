"""The job's side of the decoding process: its death or a time-out is a status and does not end the job.

`decode.py` is the program that runs there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple

import numpy as np

from vaemo.config import Headerless
from vaemo.progress import say
from vaemo.units import SAMPLING_RATES_HZ

_PIPE_BYTES = 1 << 20
_PROGRAM = Path(__file__).with_name("decode.py")


class AudioProblem(Exception):  # noqa: N818 - it becomes a row, not an error
    """Why an utterance or a recording has no samples.

    Attributes:
        status: One of `vaemo.units.STATUSES`.
        reason: What was found, for a person.
        whole: Whether it holds for all utterances of the recording, those already read among them.
    """

    def __init__(self, status: str, reason: str, *, whole: bool = False) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason
        self.whole = whole


@dataclass(frozen=True)
class AudioInfo:
    """What an open file says of itself.

    Attributes:
        sampling_rate: In Hz.
        channels: Of all its tracks together.
        frames: Its length where the header states it.
        duration_s: Its length in seconds, as the header states it, else a guess from its size; None without either.
        floats: Whether its samples are coded as floats, on whatever scale.
    """

    sampling_rate: int
    channels: int
    frames: int | None
    duration_s: float | None
    floats: bool = False


class Lost(NamedTuple):
    """Silence in place of what a file does not hold: frames [start, stop) of channels [first, last).

    `damaged` where something is there that cannot be decoded, else nothing is there: packets are missing.
    """

    start: int
    stop: int
    damaged: bool
    first: int
    last: int


@dataclass(frozen=True)
class Block:
    """What was read.

    Attributes:
        samples: (n, channels), float32.
        lost: What of them the file does not hold.
        broken: Why there is no more behind them, where there should be.
    """

    samples: np.ndarray
    lost: tuple[Lost, ...] = ()
    broken: str | None = None


class Decoder:
    """A child process that decodes; its death or its silence becomes an `AudioProblem`.

    It is started at the first request, serves any number of files, and is started again after it died. One thread
    may use it.

    Args:
        timeout_s: Seconds that one request may take before the child is ended.
    """

    spent_s: ClassVar[float] = 0.0
    """Seconds that this process has waited for its decoders."""

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen | None = None

    def open(self, path: str, headerless: Headerless | None = None) -> AudioInfo:
        """Open a local file.

        Args:
            path: Its path.
            headerless: How it is to be read if it does not say itself how it is coded.

        Raises:
            AudioProblem: missing, unreadable, undecodable or timeout.
        """
        how = headerless and [headerless.codec, headerless.sampling_rate, headerless.channels]
        answer = self._request({"open": path, "headerless": how})
        info = AudioInfo(**answer)
        low, high = SAMPLING_RATES_HZ
        if not low <= info.sampling_rate <= high:
            reason = f"its sampling rate is {info.sampling_rate} Hz; from {low} to {high} Hz is read"
            raise AudioProblem("undecodable", reason)
        return info

    def read(self, start: int, stop: int, channels: int) -> Block:
        """Frames [start, stop) of the open file, fewer where it ends.

        Raises:
            AudioProblem: undecodable or timeout.
        """
        answer = self._request({"read": [start, stop]})
        samples = np.empty((answer["frames"], channels), np.float32)
        if samples.size:
            self._receive(memoryview(samples.data).cast("B"))
        return Block(samples, tuple(Lost(*lost) for lost in answer.get("lost", ())), answer.get("broken"))

    @property
    def alive(self) -> bool:
        """Whether the child runs; false before the first request and after it died."""
        return self._child is not None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._selector.close()
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._child = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, message: dict) -> dict:
        if self._child is None:
            if "open" not in message:
                raise AudioProblem("undecodable", "its decoder was lost")
            self._start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        self._deadline = time.monotonic() + self._timeout_s
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        size = bytearray(4)
        self._receive(memoryview(size))
        line = bytearray(int.from_bytes(size, "little"))
        self._receive(memoryview(line))
        answer = json.loads(line)
        if "status" in answer:
            raise AudioProblem(answer["status"], answer["reason"])
        return answer

    def _start(self) -> None:
        # By its path: the child must not import the packages that this process has loaded.
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        _say_what_is_weaker(sys.platform)
        # Large pipe buffers, where the system supports them, so that data passes in few pieces.
        with contextlib.suppress(OSError, ImportError, AttributeError):
            import fcntl

            fcntl.fcntl(self._child.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[arg-type]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._child.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

    def _receive(self, target: memoryview) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        begun = time.monotonic()
        try:
            while len(target):
                if not self._selector.select(max(self._deadline - time.monotonic(), 0.0)):
                    self.close()
                    raise AudioProblem("timeout", f"decoding took longer than {self._timeout_s:g} s")
                n = self._child.stdout.readinto(target)  # type: ignore[attr-defined]
                if not n:
                    raise self._died()
                target = target[n:]
        finally:
            Decoder.spent_s += time.monotonic() - begun

    def _died(self) -> AudioProblem:
        assert self._child is not None
        code = self._child.wait()
        self.close()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return AudioProblem("undecodable", f"decoding it ended the decoder ({cause})")


@functools.cache
def _say_what_is_weaker(platform: str) -> None:
    """Say once that a decoder's memory has no limit: it has one on Linux alone."""
    if not platform.startswith("linux"):
        say("note: this system does not limit the memory of a decoder; a file made to fill it can stop the job")
