"""A watchdog for extractors that hang: it kills their process, which is then handled as a crash.

Only processes that are restarted by another are watched: cluster workers, encoders, child processes. It uses
faulthandler's C thread, which works even while native code holds Python's lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import time
from collections.abc import Iterator

EXIT_CODE = 1
"""Exit code of a process that the watchdog killed."""

_STDERR = 2
_SHARE = 0.1
"""Share of the limit after which the watchdog is reset: resetting it for every utterance would be slower."""

_expendable = False
_limit_s: float | None = None
_set_at = 0.0


def may_end_process() -> None:
    """Allow the watchdog to kill this process, which another one replaces."""
    global _expendable
    _expendable = True


@contextlib.contextmanager
def watched(limit_s: float) -> Iterator[None]:
    """Watch extractors in the block, if this process may be killed.

    Args:
        limit_s: Seconds that an utterance, or a batch of an encoder, may take.
    """
    global _limit_s, _set_at
    if not _expendable:
        yield
        return
    _limit_s, _set_at = limit_s, 0.0
    try:
        yield
    finally:
        _limit_s = None
        faulthandler.cancel_dump_traceback_later()


def begin_utterance() -> None:
    """Called by extractors before each utterance or batch: restart the time limit."""
    global _set_at
    if _limit_s is not None and time.monotonic() - _set_at > _SHARE * _limit_s:
        faulthandler.dump_traceback_later(_limit_s, exit=True, file=_STDERR)
        _set_at = time.monotonic()


def has_hung(code: int, elapsed_s: float, limit_s: float) -> bool:
    """Whether the watchdog killed a process, by its exit code and working time in seconds."""
    return code == EXIT_CODE and elapsed_s >= (1 - _SHARE) * limit_s
