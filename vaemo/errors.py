"""Errors that the user can correct, one class per cause.

Every message says what was found, where, what is allowed and what to do. A job prints the message alone,
without a traceback, and ends with the class's `exit_code`: 2 for wrong usage, 1 for everything else.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from typing import Any

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around an id or a path in a message: characters for private use, which occur in no id."""


def named(value: object) -> str:
    """An id or a path as a field of a message: it is rendered by `VaemoError`, in quotes, or hashed."""
    text = str(value).replace(_OPEN, "").replace(_CLOSE, "")
    return f"{_OPEN}{text}{_CLOSE}"


def rendered(message: str, name: Callable[[str], str] = str) -> str:
    """A message with its fields in quotes, each as `name` gives it."""
    return re.sub(f"{_OPEN}(.*?){_CLOSE}", lambda field: f"'{name(field[1])}'", message, flags=re.DOTALL)


def cause(error: Exception) -> str:
    """Why a file cannot be read, in one line; in words of its own where a library speaks of its inner workings."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        utf16 = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        line = error.object.count(b"\n", 0, error.start) + 1
        found = "it is text in UTF-16" if utf16 else f"byte {error.start + 1} of it, in line {line}, is not UTF-8"
        return f"{found}; save it in UTF-8"
    if "invalid UTF8" in text:
        return "it is not UTF-8; save it in UTF-8"
    if "incorrect header check" in text:
        return "it is not packed by gzip, as its name says; rename it, or pack it"
    return text


class VaemoError(Exception):
    """A mistake that the user can correct; any other exception is a bug in vaemo.

    A message names ids and paths by `named`.

    Example:
        >>> import vaemo
        >>> try:
        ...     vaemo.extract(manifest="missing.jsonl", out="features", executor="process")
        ... except vaemo.VaemoError as error:
        ...     print(type(error).__name__, error.exit_code)
        ReadManifestError 1
    """

    exit_code = 1

    @property
    def message(self) -> str:
        """The message with its fields, for `rendered`."""
        return super().__str__()

    def __str__(self) -> str:
        return rendered(self.message)


class UsageError(VaemoError):
    """The command line or the config asks for something that is not supported."""

    exit_code = 2


class UnknownConfigKeyError(UsageError):
    """A config names a section or a field that does not exist."""


class ConfigValueError(UsageError):
    """A config field holds a value of the wrong type or outside its range."""


class RolesError(UsageError):
    """The roles of speakers are unknown, or may not be scored."""


class ColumnError(VaemoError):
    """A column of a table, or one of its rows, holds an invalid value.

    Attributes:
        text: What is wrong, and what is allowed.
        row: From 0; None where it is the whole column.
    """

    def __init__(self, text: str, row: int | None = None):
        super().__init__(text if row is None else f"row {row + 1}: {text}")
        self.text, self.row = text, row


class ReadManifestError(VaemoError):
    """A manifest is missing, empty, or one of its lines cannot be used."""


class ReadRecordingsError(VaemoError):
    """A folder of recordings is missing or holds none."""


class ReadVoicesError(VaemoError):
    """Diarisation that others made, or a file of enrolled voices, cannot be used."""


class ReadCorpusError(VaemoError):
    """A corpus's folder is not laid out as that corpus is distributed."""


class ReadStoreError(VaemoError):
    """A feature store is missing, empty, or does not follow the contract."""


class ReadScoresError(VaemoError):
    """A score folder is missing, empty, or does not follow the contract."""


class ReadCheckpointError(VaemoError):
    """A checkpoint folder is missing, incomplete, or not one of ours."""


class LabelError(VaemoError):
    """Labels are absent where they are needed, constant, or outside the declared range."""


class SplitError(VaemoError):
    """A session or a speaker is in two splits, or a required split is empty."""


class FeatureMismatchError(VaemoError):
    """Features do not fit the model: a stream or a dimension is not the one it was made for."""


class NonFiniteFeatureError(VaemoError):
    """A feature holds NaN or an infinity.

    Attributes:
        stream: The stream.
        lane: Lane in the chunk, from which the caller can find the utterance.
        step: Step in the lane.
    """

    def __init__(self, stream: str, lane: int, step: int, utterance: str = ""):
        self.stream, self.lane, self.step = stream, lane, step
        where = f"utterance {named(utterance)}" if utterance else f"lane {lane}, step {step}"
        super().__init__(
            f"{stream} of {where} holds NaN or infinity. Correct the row, or give it another status than ok."
        )


class ShapeError(VaemoError):
    """Tensors disagree on lanes, steps, width or dtype."""


class StateMismatchError(VaemoError):
    """A session state belongs to another model, or is not whole."""


class ExtractorError(VaemoError):
    """An extractor cannot be loaded or does not do what its contract says."""


class OtherRunError(VaemoError):
    """An output folder holds the results of a run with another fingerprint."""


class ClusterError(VaemoError):
    """The cluster is too small for the job, its nodes do not see the same data, or it made no progress for too long."""


class StorageError(VaemoError):
    """A disk or an object store cannot be read or written: it is full, refuses access, or does not answer."""

    @classmethod
    def of(cls, error: OSError, path: str = "") -> StorageError:
        """The error for an OSError; `path` is added if the system's message does not name it."""
        said = " ".join(str(error).split())
        return cls(
            f"storage failed{f' at {path}' if path and path not in said else ''}: {said}. No file is half written. "
            "Correct the cause and run the same command again to do the rest."
        )


class TooManyFailuresError(VaemoError):
    """More utterances failed than the config allows; every one of them is listed in the output.

    Attributes:
        counts: Counts of all outcomes, for summary.json.
    """

    def __init__(self, message: str, counts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.counts = dict(counts or {})


class SweepFailedError(VaemoError):
    """No trial of a sweep ran to its end."""


class TrainingFailedError(VaemoError):
    """A training ended with an internal error; its folder holds the traceback."""


class DivergedError(VaemoError):
    """Training produced a loss that is not a finite number."""


def _numbers(names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names.split())


_OF_FILES = _numbers(
    "EACCES EBUSY EDQUOT EEXIST EFBIG EIO EISDIR ELOOP EMFILE EMLINK ENAMETOOLONG ENFILE ENODEV ENOENT ENOSPC ENOTDIR "
    "ENOTEMPTY ENXIO EPERM EROFS ESTALE ETXTBSY EXDEV"
)
_OF_CONNECTIONS = _numbers("EADDRINUSE EADDRNOTAVAIL EHOSTDOWN EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH ENOTCONN")
_READERS = frozenset({"pyarrow", "fsspec", "s3fs", "gcsfs", "adlfs"})
"""Libraries whose OSErrors are errors of storage, whatever their type."""


def mistake_of(error: VaemoError | OSError) -> VaemoError | None:
    """The error to report to the user, such as a failed disk, object store or connection; None for a bug."""
    if isinstance(error, VaemoError):
        return error
    trace, raised_in = error.__traceback__, set()
    while trace is not None:
        raised_in.add(str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0])
        trace = trace.tb_next
    if raised_in & _READERS or error.filename is not None or error.errno in _OF_FILES:
        return StorageError.of(error)
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _OF_CONNECTIONS:
        said = " ".join(str(error).split()) or type(error).__name__
        return ClusterError(
            f"a connection to another process or machine failed: {said}. What is finished is kept; run the same "
            "command again to do the rest."
        )
    return None


def carried(error: VaemoError | OSError) -> dict[str, str]:
    """An error as a plain value for another process: Ray neither wraps it nor retries because of it."""
    mistake = mistake_of(error)
    if mistake is None:
        raise error
    return {"error": type(mistake).__name__, "message": mistake.message}


def raise_carried(answer: Mapping[str, Any]) -> None:
    """Raise the error in the answer of another process, if it holds one."""
    if answer.get("error") is not None:
        raise revive(answer["error"], answer["message"])


def revive(name: str, message: str) -> VaemoError:
    """The error that was raised in another process, from its class's name and its message."""
    kind = globals()[name]
    error = kind.__new__(kind, message)
    Exception.__init__(error, message)
    return error
