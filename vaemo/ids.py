"""Ids replaced by keyed hashes: who has the key can find a call again, nobody else can.

The key comes from the environment variable VAEMO_ID_KEY and is never stored.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vaemo.errors import UsageError

VARIABLE = "VAEMO_ID_KEY"
FEWEST_CHARACTERS = 16


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
        text = os.environ.get(VARIABLE, "")
        if len(text) < FEWEST_CHARACTERS:
            found = f"holds {len(text)} characters" if text else "is not set"
            raise UsageError(
                f"{purpose} needs a secret key in the environment variable {VARIABLE}, which {found}. "
                f"Give {FEWEST_CHARACTERS} random characters or more, keep them, and never change them."
            )
        return IdKey(text)

    @property
    def check(self) -> str:
        """12 hex digits that tell two keys apart and do not give the key away."""
        return self.hash("vaemo")[:12]

    def hash(self, text: str) -> str:
        """The keyed hash of an id: 24 hex digits (96 bits) of HMAC-SHA256."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:24]

    def scrub(self, message: str) -> str:
        """The message with everything that stands in quotes hashed: messages quote ids."""
        return re.sub(r"'([^']+)'", lambda quoted: f"'{self.hash(quoted[1])}'", message)

    def hide(self, table: pa.Table, names: Sequence[str] = ("utt_id", "speaker_id")) -> pa.Table:
        """Rows with `session_id` and `names` hashed, also where they stand in `reason` or in `audio_path`.

        An id that begins with that of its session, as those that vaemo makes, keeps the rest.
        """
        sessions = table["session_id"].to_pylist()
        hashed = {session: self.hash(session) for session in dict.fromkeys(sessions)}
        columns = {"session_id": [hashed[session] for session in sessions]}
        for name in names:
            columns[name] = [
                None if value is None else self._within(value, session, hashed[session])
                for value, session in zip(table[name].to_pylist(), sessions, strict=True)
            ]
        columns["reason"] = self._reasons(table, columns)
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        return table

    def _within(self, value: str, session: str, hashed: str) -> str:
        if value == session or value.startswith(f"{session}#"):
            return hashed + value[len(session) :]
        return self.hash(value)

    def _reasons(self, table: pa.Table, columns: dict[str, list]) -> list[str | None]:
        reasons = table["reason"].to_pylist()
        told = pc.is_valid(table["reason"]).to_numpy().nonzero()[0]
        for row in told:
            for name in ("audio_path", "utt_id", "session_id", "speaker_id"):
                value = table[name][row].as_py() if name in table.column_names else None
                if value:
                    reasons[row] = reasons[row].replace(value, columns[name if name in columns else "session_id"][row])
        return reasons
