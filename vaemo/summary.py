"""`summary.json`: what every job leaves in its output folder, for schedulers and for people.

Holds the exit code, the seconds that the job took, what became of everything it was given, and, of a training, a sweep
or the demo, the results.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from vaemo import files
from vaemo.errors import OtherRunError, UsageError, VaemoError, mistake_of

SUMMARY = "summary.json"

_FACTS = ("job", "exit_code", "seconds", "error", "utterances", "sessions", "failed_fraction", "audio_s")
"""Keys that any job may write; the others are results."""


_INTERRUPTED = "it was interrupted; run the same command again to do the rest"


@contextlib.contextmanager
def summary(out: str, job: str | None = None, *, dry_run: bool = False) -> Iterator[dict[str, Any]]:
    """Write `OUT/summary.json` at the end of the block, whatever ends it.

    Nothing is written where there is no output folder, or it belongs to another run.

    Args:
        out: The output folder.
        job: What is being done; None is the name of the script.
        dry_run: Write nothing.

    Yields:
        What it is to hold beside the exit code and the seconds.

    Raises:
        UsageError: if the output folder is a file.
        StorageError, ClusterError: in the place of an OSError of a disk, an object store or a connection.
    """
    if not files.is_uri(out) and os.path.isfile(out):
        raise UsageError(f"--out {out} is a file; give a folder, an empty or a new one.")
    start = time.monotonic()
    facts: dict[str, Any] = {"job": job or os.path.basename(sys.argv[0]).removesuffix(".py")}
    code, ours = 0, not dry_run
    try:
        yield facts
    except BaseException as error:
        mistake = mistake_of(error) if isinstance(error, OSError) else None
        shown = mistake or error
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(shown, "exit_code", 1)
        untold = _INTERRUPTED if code == 130 else type(shown).__name__
        facts |= {"error": " ".join(str(shown).split()) or untold, **getattr(shown, "counts", {})}
        ours &= not isinstance(error, (OtherRunError, UsageError))
        if mistake is not None:
            raise mistake from error
        raise
    finally:
        facts |= {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}
        with contextlib.suppress(VaemoError, OSError):
            if ours and files.exists(out):
                files.write_json(files.join(out, SUMMARY), {**facts, **results(out)})


def results(out: str) -> dict[str, Any]:
    """What `OUT/summary.json` holds of results; empty where there are none yet."""
    path = files.join(out, SUMMARY)
    held = files.read_json(path) if files.exists(path) else {}
    return {name: value for name, value in held.items() if name not in _FACTS}
