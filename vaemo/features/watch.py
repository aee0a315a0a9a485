"""A watch over extractors that hang: it ends their process, as a crash would, and what follows a crash follows.

Only a process that somebody else starts again is watched: a worker of a cluster, an encoder, a child. The watch is
faulthandler's, a thread of C, so that it acts also where native code holds Python's lock; nobody waits for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import time
from collections.abc import Iterator

EXIT_CODE = 1
"""Of a process that the watch has ended."""

_STDERR = 2
_SHARE = 0.1
"""The watch is set anew when so much of the limit is over: for every utterance that would cost more than it does."""

_expendable = False
_limit_s: float | None = None
_set_at = 0.0


def may_end_process() -> None:
    """Say of this process that it may be ended: another one is started in its place."""
    global _expendable
    _expendable = True


@contextlib.contextmanager
def watched(limit_s: float) -> Iterator[None]:
    """Watch extractors in the block; nothing where this process may not be ended.

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
    """Extractors say so before each utterance or batch: from here on the limit counts."""
    global _set_at
    if _limit_s is not None and time.monotonic() - _set_at > _SHARE * _limit_s:
        faulthandler.dump_traceback_later(_limit_s, exit=True, file=_STDERR)
        _set_at = time.monotonic()


def has_hung(code: int, elapsed_s: float, limit_s: float) -> bool:
    """Whether the watch has ended a process, by its exit code and the seconds that it was at work."""
    return code == EXIT_CODE and elapsed_s >= (1 - _SHARE) * limit_s
