"""Ids replaced by keyed hashes: only the owner of the key can find a call again.

The key comes from the environment variable VAEMO_ID_KEY and is never stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from collections.abc import Iterator

import pyarrow as pa

from vaemo.errors import UsageError, VaemoError, rendered, revive
from vaemo.tables import with_column

KEY_VARIABLE = "VAEMO_ID_KEY"
FEWEST_CHARACTERS = 16


@contextlib.contextmanager
def hidden_errors(key: IdKey | None) -> Iterator[None]:
    """Errors raised inside are raised with the ids and paths they name hashed; as they are without a key."""
    try:
        yield
    except VaemoError as error:
        if key is None:
            raise
        hidden = revive(type(error).__name__, rendered(error.message, key.hash))
        vars(hidden).update(vars(error))
        raise hidden from None


class IdKey:
    """The key, and what it makes of ids.

    Args:
        text: The key.
    """

    def __init__(self, text: str) -> None:
        self._key = text.encode()

    @staticmethod
    def from_environment(purpose: str) -> IdKey:
        """The key of VAEMO_ID_KEY.

        Args:
            purpose: What needs it, for the message.

        Raises:
            UsageError: if it is not set, or too short to be one.
        """
        text = os.environ.get(KEY_VARIABLE, "")
        if len(text) < FEWEST_CHARACTERS:
            found = f"holds {len(text)} characters" if text else "is not set"
            raise UsageError(
                f"{purpose} needs a secret key in the environment variable {KEY_VARIABLE}, which {found}. "
                f"Give {FEWEST_CHARACTERS} random characters or more, keep them, and never change them."
            )
        return IdKey(text)

    @property
    def check(self) -> str:
        """12 hex digits that identify the key without revealing it."""
        return self.hash("vaemo")[:12]

    def hash(self, text: str) -> str:
        """The keyed hash of an id: 24 hex digits (96 bits) of HMAC-SHA256."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:24]

    def hide(self, scored: pa.Table, audio_paths: pa.ChunkedArray | None = None) -> pa.Table:
        """Scored utterances with all ids hashed, also those in `reason`.

        An id that begins with that of its session, as those that vaemo makes, keeps the rest.

        Args:
            scored: Rows of `vaemo.scores.UTTERANCE_SCHEMA`.
            audio_paths: Of the same rows, where there are: reasons name files.
        """
        names = ("session_id", "utt_id", "speaker_id")
        shown = {name: scored[name].to_pylist() for name in names}
        sessions = {session: self.hash(session) for session in dict.fromkeys(shown["session_id"])}
        hidden = {
            name: [
                None if value is None else self._within(value, session, sessions[session])
                for value, session in zip(values, shown["session_id"], strict=True)
            ]
            for name, values in shown.items()
        }
        twins = "duplicate_of" in scored.column_names
        firsts = scored["duplicate_of"].to_pylist() if twins else [None] * len(scored)
        if twins:
            hidden["duplicate_of"] = [None if first is None else self.hash(first) for first in firsts]
        if "audio_path" in scored.column_names:
            places = scored["audio_path"].to_pylist()
            hidden["audio_path"] = [None if place is None else self.hash(place) for place in places]
        reasons = scored["reason"].to_pylist()
        for row, reason in enumerate(reasons):
            if reason is not None:
                path = audio_paths[row].as_py() if audio_paths is not None else None
                told = [(path, hidden["session_id"][row])] if path else []
                told += [(firsts[row], hidden["duplicate_of"][row])] if twins else []
                told += [(shown[name][row], hidden[name][row]) for name in ("utt_id", "speaker_id", "session_id")]
                for value, hashed in told:
                    reason = reason.replace(value, hashed) if value else reason
                reasons[row] = reason
        for name, values in {**hidden, "reason": reasons}.items():
            scored = with_column(scored, name, pa.array(values, pa.string()))
        return scored

    def _within(self, value: str, session: str, hashed: str) -> str:
        if value == session or value.startswith(f"{session}#"):
            return hashed + value[len(session) :]
        return self.hash(value)
