"""Roles of rows that lack them: from the table of calls, the fixed order of the channels, and the voices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo.data.speakers import unit
from vaemo.pipeline.sources.base import Tools, starts_of_sessions
from vaemo.scoring.calls import Calls
from vaemo.scoring.roles import NOT_KNOWN, RoleRules, cut_by_vaemo
from vaemo.tables import codes, with_column
from vaemo.units import MIXED, UNKNOWN
from vaemo.voices.channels import Voice
from vaemo.voices.roles import Evidence, VoiceRole, of_piece, roles_of_voices


def with_roles(table: pa.Table, rules: RoleRules, calls: Calls | None) -> pa.Table:
    """Fill in the roles that rows with a channel lack, from the calls or the channels' fixed order.

    Where no row says how many channels the recording had (`n_channels`), it had those that its rows name: were the
    last ones silent all along, fewer are found than the calls name, and none of them gets a role.
    """
    cut = cut_by_vaemo(table)
    # A role that extraction filled in (`mixed`) was not declared.
    unnamed = table["role"].is_null().to_numpy() | (cut & pc.is_in(table["role"], pa.array(NOT_KNOWN)).to_numpy())
    # `mixed` in one of several channels is what was heard: they hold the same.
    alike = pc.and_(pc.equal(table["role"], MIXED), pc.greater(table["n_channels"], 1))
    unnamed &= ~alike.fill_null(False).to_numpy()
    if not unnamed.any() or not (cut.any() or calls or rules.channel_roles):
        return table
    channel = table["channel"].cast(pa.int64()).fill_null(-1).to_numpy()
    recording, keys = _recordings_in(table, calls)
    n_channels = np.zeros(len(keys), np.int64)
    np.maximum.at(n_channels, recording, np.maximum(channel + 1, table["n_channels"].fill_null(0).to_numpy()))
    from_calls = calls.roles if calls else {}
    by_recording = [
        rules.of_channels(int(n), from_calls.get(key, ())) if n else () for key, n in zip(keys, n_channels, strict=True)
    ]
    roles = table["role"].to_pylist()
    for row in np.flatnonzero(unnamed):
        roles[row] = _known(by_recording[recording[row]][channel[row]], cut[row]) if channel[row] >= 0 else None
    return with_column(table, "role", pa.array(roles, pa.string()))


def with_voice_roles(table: pa.Table, tools: Tools, rules: RoleRules, calls: Calls | None) -> pa.Table:
    """The roles of voices within a channel; the channel's own role does not apply to them."""
    if table["voice"].null_count == table.num_rows:
        return table
    held = table.select(
        ["channel", "n_channels", "voice", "voice_margin", "start_s", "end_s", "role", "role_by"]
    ).to_pylist()
    margins = table["role_margin"].to_pylist()
    recording, keys = _recordings_in(table, calls)
    for number, key in enumerate(keys):
        places = np.flatnonzero(recording == number)
        rows = [held[place] for place in places]
        if all(row["voice"] is None for row in rows):
            continue
        n_channels = max(max(row["n_channels"] or 0, (row["channel"] or 0) + 1) for row in rows)
        said = rules.of_channels(n_channels, calls.roles.get(key, ()) if calls else ())
        voices = _voices_of(table.take(pa.array(places)), rows, tools)
        roles = roles_of_voices(voices, said, evidence_of(calls, key), tools.prints, tools.config.voices)
        with_voices = {voice.channel for voice in voices}
        for place, row in zip(places, rows, strict=True):
            if row["channel"] not in with_voices:
                continue
            known = roles.get((row["channel"], row["voice"]), VoiceRole(UNKNOWN))
            decided = of_piece(known, row["voice_margin"], tools.config.voices)
            row["role"], row["role_by"], margins[place] = decided.role, decided.by, decided.margin
    for name in ("role", "role_by"):
        table = with_column(table, name, pa.array([row[name] for row in held], pa.string()))
    return with_column(table, "role_margin", pa.array(margins, pa.float32()))


def evidence_of(calls: Calls | None, session_id: str) -> Evidence:
    """The table of calls on the voices of a session."""
    if calls is None:
        return Evidence()
    return Evidence(calls.voice_roles.get(session_id, ()), calls.agent_ids.get(session_id))


def _recordings_in(table: pa.Table, calls: Calls | None) -> tuple[np.ndarray, list[str]]:
    """Which recording each row is of, (rows,), and for each recording the id under which the calls know it."""
    starts, session_ids = starts_of_sessions(table, [table.num_rows])
    session = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, table.num_rows]))
    apart = np.array([bool(calls and calls.has_several(name)) for name in session_ids], bool)
    if "offset_s" in table.column_names:
        apart[session[table["offset_s"].is_valid().to_numpy()]] = True
    if not apart.any():
        return session, session_ids
    path = np.where(apart[session], codes(table["audio_path"]), -1)
    _, first, recording = np.unique(session * (path.max() + 2) + path, return_index=True, return_inverse=True)
    paths = table["audio_path"].take(pa.array(first)).to_pylist()
    of_session = [session_ids[number] for number in session[first]]
    keys = [calls.key_of(name, path) if calls else name for name, path in zip(of_session, paths, strict=True)]
    return recording, keys


def _voices_of(table: pa.Table, rows: Sequence[Mapping[str, Any]], tools: Tools) -> list[Voice]:
    """The voices in a session of a store, their vectors from its speaker stream where persons are known by that."""
    vectors: list[Any] = table["speaker"].to_pylist() if tools.prints else [None] * len(rows)
    found: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        if row["voice"] is not None:
            found.setdefault((row["channel"], row["voice"]), []).append(number)
    voices = []
    for (channel, voice), numbers in sorted(found.items()):
        least = tools.config.voices.min_margin
        own = [
            np.array(vectors[n])
            for n in numbers
            if vectors[n] is not None and (rows[n]["voice_margin"] is None or rows[n]["voice_margin"] >= least)
        ]
        brought = [rows[n]["role"] for n in numbers if rows[n]["role_by"] == "voices_from"]
        speech_s = sum((rows[n]["end_s"] or 0.0) - (rows[n]["start_s"] or 0.0) for n in numbers)
        vector = unit(np.sum(own, axis=0)) if own else None
        voices.append(Voice(channel, voice, speech_s, vector, role=brought[0] if brought else None))
    return voices


def _known(role: str, cut: bool) -> str | None:
    """A missing role is null for an utterance that the data declares: that is research data."""
    return role if cut or role not in NOT_KNOWN else None
