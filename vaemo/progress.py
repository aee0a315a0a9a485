"""One line that says how far a job is: rewritten on a terminal, printed now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def say(text: str) -> None:
    """Print a line at once, also through a pipe."""
    print(text, flush=True)


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s` or `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Counts what is done and shows it with the rate and the time left.

    Args:
        what: The job, the first word of the line.
        total: How many units there are in all; unknown is 0.
        unit: Plural of what is counted.
        done: How many were finished before; they do not count towards the rate.
        every_s: Seconds between two lines where the output is not a terminal.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, every_s: float = 10.0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._before = done
        self._every_s = 0.2 if sys.stderr.isatty() else every_s
        self._start = self._shown = time.monotonic()
        self._last = -1
        self._detail: Callable[[float], str] = lambda elapsed_s: ""

    def advance(self, n: int, detail: Callable[[float], str] | str = "") -> None:
        """Count `n` more; `detail` is shown behind, a text or a function of the seconds since the start."""
        self._done += n
        self._detail = detail if callable(detail) else lambda elapsed_s: detail
        if time.monotonic() - self._shown >= self._every_s:
            self.show()

    def show(self) -> None:
        """Write the line now."""
        self._shown, self._last = time.monotonic(), self._done
        sys.stderr.write(f"\r\x1b[K{self.line()}" if sys.stderr.isatty() else f"{self.line()}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Write the last line, unless it is already shown."""
        if self._last != self._done:
            self.show()
        if sys.stderr.isatty():
            sys.stderr.write("\n")

    def line(self) -> str:
        """What is shown: done, total, rate, detail, time left."""
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / elapsed_s
        parts = [f"{self._what}: {self._done:,}" + (f" of {self._total:,}" if self._total else "") + f" {self._unit}"]
        parts.append(f"{rate:,.1f}/s")
        if detail := self._detail(elapsed_s):
            parts.append(detail)
        if rate and self._total > self._done:
            parts.append(f"{duration((self._total - self._done) / rate)} left")
        return ", ".join(parts)
