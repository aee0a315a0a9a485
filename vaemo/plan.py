"""What is to be done of a source: what a folder lacks, what is done again, what has changed, what stands there twice.

Both jobs that turn sessions into parts, extraction and scoring, are planned here. A finished session stays as it is
unless somebody asks for it, whatever became of its input since: what has changed is listed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.archive import Stamp, find_twins
from vaemo.errors import OtherRunError
from vaemo.extract import Problem
from vaemo.shards import Part, plan_shards, read_part, read_parts, session_of, tag_part
from vaemo.sources import Listing
from vaemo.units import NOT_FAILED

NOT_NAMED = ",?"
"""Ends the key of a session that the table of calls did not name; once it does, the session is done again."""


@dataclass(frozen=True)
class Again:
    """Which finished sessions are done again.

    Attributes:
        failed: Those that have failed.
        changed: Those whose input has changed since.
    """

    failed: bool = False
    changed: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done.

    Attributes:
        shards: As workers take them: `name` (below the folder), `keys` (of all sessions of the part), `again` (those of
            a finished part that are done again, or empty), and what the listing describes.
        listing: Of the source, with the problems that planning found.
        n_sessions: To be done, those that are done again among them.
        n_units: Likewise, in the listing's unit.
        n_again: Sessions that are done again.
        changed: Sessions that stay as they are although their input has changed, as the folder names them.
        unchecked: Finished sessions of versions that noted nothing to compare.
    """

    shards: Sequence[dict[str, Any]]
    listing: Listing
    n_sessions: int
    n_units: int
    n_again: int
    changed: Sequence[str]
    unchecked: int


def plan(
    listing: Listing,
    keys: Sequence[str],
    out: str,
    target: int,
    *,
    places: Sequence[tuple[str, Sequence[int]]] | None = None,
    again: Again = Again(),
    alike: Callable[[int], Hashable] | None = None,
    extra: Callable[[Sequence[int]], Mapping[str, Any]] = lambda indices: {},
) -> Plan:
    """Compare a source with the folder that is made of it.

    Args:
        listing: Of the source.
        keys: One per session, all different; see `vaemo.shards.Shard`. An id in them may be hashed.
        out: The folder.
        target: Weight at which a shard is full.
        places: Folders below `out` and the sessions that belong there; None is `out` itself.
        again: Which finished sessions are done again.
        alike: Where recordings of the same bytes are done once: what twins must have in common besides.
        extra: What else a worker is told of sessions.

    Raises:
        OtherRunError: if a finished session had other utterances than it has now.
    """
    places = [("", range(len(keys)))] if places is None else places
    parts = {place: read_parts(files.join(out, place) if place else out) for place, _ in places}
    finished: dict[str, tuple[str, Part]] = {}
    for held in parts.values():
        for part in held:
            finished |= {session_of(key): (key, part) for key in part.keys}
    stamps = {name: part.stamps[name] for name, (_, part) in finished.items() if name in part.stamps}
    if alike and listing.files:
        listing = _with_twins(listing, keys, stamps, finished, alike)

    shards: list[dict[str, Any]] = []
    changed: list[str] = []
    n_units = n_sessions = n_again = unchecked = 0
    for place, indices in places:
        missing: list[int] = []
        redone: dict[str, list[int]] = {}
        failed = {part.path: _failed(part) for part in parts[place]} if again.failed else {}
        for index in indices:
            name = session_of(keys[index])
            if name not in finished:
                missing.append(index)
                continue
            before, part = finished[name]
            due = name in failed.get(part.path, ()) or _is_named_now(before, keys[index], out)
            if name not in stamps:
                unchecked += 1
            elif not listing.still(index, stamps[name]):
                if again.changed:
                    due = True
                elif not due:
                    changed.append(name)
            if due:
                redone.setdefault(part.path, []).append(index)
        below = f"{place}/" if place else ""
        todo: list[tuple[str, Sequence[str], Sequence[str], Sequence[int]]] = [
            (f"{below}{shard.name}", shard.keys, (), shard.indices)
            for shard in plan_shards(keys, [min(weight, target) for weight in listing.weights], target, only=missing)
        ]
        for path, picked in redone.items():
            now = {session_of(keys[index]): keys[index] for index in picked}
            kept = tuple(now.get(session_of(key), key) for key in read_part(path).keys)
            todo.append((path[len(out.rstrip("/")) + 1 :], kept, tuple(now), tuple(picked)))
            n_again += len(picked)
        for name, held_keys, redo, chosen in todo:
            described = {"name": name, "keys": json.dumps(held_keys), "again": json.dumps(redo)}
            shards.append({**described, **extra(chosen), **listing.described(chosen)})
            n_sessions += len(chosen)
            n_units += sum(listing.units[index] for index in chosen)
    return Plan(shards, listing, n_sessions, n_units, n_again, changed, unchecked)


def _is_named_now(before: str, now: str, out: str) -> bool:
    """Whether a session is due because the table of calls has come to name it; refused where its content differs."""
    if before == now or now.endswith(NOT_NAMED):
        return False
    if before.endswith(NOT_NAMED):
        return True
    raise OtherRunError(
        f"session '{session_of(now)}' is finished in {out}, but its utterances have changed since. "
        "Give the changed sessions new ids, or another folder."
    )


def _with_twins(
    listing: Listing,
    keys: Sequence[str],
    stamps: Mapping[str, Sequence[Stamp]],
    finished: Mapping[str, Any],
    alike: Callable[[int], Hashable],
) -> Listing:
    """The listing, with recordings of the same bytes as another one as duplicates of that."""
    place = {found.name: index for index, found in enumerate(listing.files)}
    open_ones = [found for index, found in enumerate(listing.files) if index not in listing.problems]

    def known(name: str) -> Stamp | None:
        session = session_of(keys[place[name]])
        if session not in finished:
            return None
        held = stamps.get(session) or [Stamp(0, 0)]
        return held[0]

    twins = find_twins(open_ones, known=known, group=lambda name: alike(place[name]))
    problems = {
        place[name]: Problem("duplicate", f"its bytes are those of '{first}'", first) for name, first in twins.items()
    }
    return replace(listing, problems={**listing.problems, **problems})


def _failed(part: Part) -> frozenset[str]:
    """The sessions of a finished part in which something has failed."""
    rows = files.read_parquet(part.path, ["session_id", "status"])
    failed = pc.invert(pc.is_in(rows["status"], pa.array(NOT_FAILED)))
    return frozenset(rows["session_id"].filter(failed).to_pylist())


def with_held(done: pa.Table, path: str, shard: Mapping[str, Any], stamps: Mapping[str, Sequence[Stamp]]) -> pa.Table:
    """What a part holds: the rows that were done, and those of a finished part that stay, in the order of its keys.

    Args:
        done: Rows of the sessions that the shard describes.
        path: The finished part, where some of it is done again.
        shard: As planned.
        stamps: Of the sessions that were done, by their ids in the keys.
    """
    keys, again = json.loads(shard["keys"]), json.loads(shard["again"])
    if again:
        held = files.read_parquet(path)
        kept = held.filter(pc.invert(pc.is_in(held["session_id"], pa.array(again, pa.string()))))
        done = pa.concat_tables([done, kept.replace_schema_metadata(None)], promote_options="default")
        place = pc.index_in(done["session_id"], value_set=pa.array([session_of(key) for key in keys]))
        done = done.take(pa.array(np.argsort(place.to_numpy(), kind="stable")))
        stamps = {**read_part(path).stamps, **stamps}
    return tag_part(done, keys, stamps)
