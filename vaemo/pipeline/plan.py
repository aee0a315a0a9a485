"""What is to be done of a source: what a folder lacks, what is done again, what has changed, what occurs twice.

Both jobs that turn sessions into parts, extraction and scoring, are planned here. A finished session stays unchanged
unless that is asked for, even if its input has changed since: what has changed is listed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaemo import files
from vaemo.audio.archive import Stamp, find_twins
from vaemo.errors import OtherRunError
from vaemo.parts.index import Entry, Index
from vaemo.parts.shards import plan_shards, read_keys, session_of, tag_keys
from vaemo.parts.tally import Tally, count
from vaemo.pipeline.sources import Listing
from vaemo.scores import joined
from vaemo.units import NOT_FAILED
from vaemo.utterances import Problem

NOT_NAMED = ",?"
"""Ends the key of a session that the table of calls did not name; once it does, the session is done again."""


@dataclass(frozen=True)
class Again:
    """Which finished sessions to do again.

    Attributes:
        failed: Those that have failed.
        changed: Those whose input has changed since: audio, rows of a manifest, or who speaks.
    """

    failed: bool = False
    changed: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """The work to do.

    Attributes:
        shards: As workers take them: `name` (below the folder), `keys` (of all sessions of the part), `again` (those of
            a finished part that are done again, or empty), and what the listing describes.
        listing: Of the source, with the problems that planning found.
        n_sessions: To be done, those that are done again among them.
        n_units: The same, counted in the listing's unit.
        n_again: Sessions that are done again.
        changed: Sessions that stay as they are although their input has changed, as the folder names them.
        unchecked: Finished sessions of versions that kept no stamps.
    """

    shards: Sequence[dict[str, Any]]
    listing: Listing
    n_sessions: int
    n_units: int
    n_again: int
    changed: Sequence[str]
    unchecked: int

    def tally_of(self, index: Index) -> Tally:
        """What the folder holds already, less the parts that are written again."""
        tally, due = Tally(), {shard["name"] for shard in self.shards}
        for name, entry in index.entries.items():
            if name not in due:
                tally.add(json.loads(entry.counts))
        tally.changed = self.changed
        return tally


def plan(
    listing: Listing,
    keys: Sequence[str],
    index: Index,
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
        keys: One per session, all different; see `vaemo.parts.shards.Shard`. An id in them may be hashed.
        index: Of the folder.
        target: Weight at which a shard is full.
        places: Folders below `out` and the sessions that belong there; None is `out` itself.
        again: Which finished sessions to do again.
        alike: Where recordings of the same bytes are done once: what twins must have in common besides.
        extra: Further facts on sessions for workers.

    Raises:
        OtherRunError: if a finished session had other utterances than it has now, and is not to be done again.
    """
    state = _compare(listing, keys, index, again)
    if alike and listing.files and state.missing:
        listing = _with_twins(listing, keys, index, state, alike)

    weights = [min(weight, target) for weight in listing.weights]
    todo: list[tuple[str, Sequence[str], Sequence[str], Sequence[int]]] = []
    for place, numbers in [("", range(len(keys)))] if places is None else places:
        missing = [number for number in numbers if not state.seen[number]]
        below = f"{place}/" if place else ""
        todo += [
            (f"{below}{shard.name}", shard.keys, (), shard.indices)
            for shard in plan_shards(keys, weights, target, only=missing)
        ]
    for part, picked in state.redone.items():
        now = {session_of(keys[number]): keys[number] for number in picked}
        kept = [now.get(session_of(key), key) for key in json.loads(index.entries[part].keys)]
        todo.append((part, kept, list(now), picked))
    shards = [
        {
            "name": name,
            "keys": json.dumps(held),
            "again": json.dumps(redo),
            **extra(numbers),
            **listing.described(numbers),
        }
        for name, held, redo, numbers in todo
    ]
    chosen = [number for _, _, _, numbers in todo for number in numbers]
    n_units = sum(listing.units[number] for number in chosen)
    n_again = sum(map(len, state.redone.values()))
    return Plan(shards, listing, len(chosen), n_units, n_again, state.changed, state.unchecked)


@dataclass(eq=False)
class _State:
    """The sessions of a source compared with the parts of a folder.

    Attributes:
        seen: Per session, whether a part holds it.
        redone: By part, the sessions in it that are done again.
        changed: Names of sessions that stay although their input has changed.
        unchecked: Sessions without a stamp to compare.
    """

    seen: bytearray
    redone: dict[str, list[int]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    unchecked: int = 0

    @property
    def missing(self) -> bool:
        """Whether any session is in no part."""
        return 0 in self.seen


def _compare(listing: Listing, keys: Sequence[str], index: Index, again: Again) -> _State:
    """Look at every finished session once, part after part: a million of them are not held at a time."""
    state, number_of = _State(bytearray(len(keys))), {session_of(key): number for number, key in enumerate(keys)}
    failed = _failed(index) if again.failed else frozenset()
    other = set[str]()
    for entry in index.entries.values():
        stamps = json.loads(entry.stamps)
        for before in json.loads(entry.keys):
            name = session_of(before)
            number = number_of.get(name)
            if number is None:
                continue
            state.seen[number] = 1
            due = name in failed or _is_due(before, keys[number], index.folder, again)
            if name not in stamps:
                # What is listed and not read has none, and neither has a pipe.
                state.unchecked += not stamps and not due and number not in listing.problems
            elif not listing.still(number, stamps[name]):
                due |= again.changed
                other.add(name)
                if not due:
                    state.changed.append(name)
            if due:
                state.redone.setdefault(entry.name, []).append(number)
    for part, name in _copies_of(other, index) if again.changed and other else ():
        number = number_of.get(name)
        if number is not None and number not in state.redone.get(part, ()):
            state.redone.setdefault(part, []).append(number)
    return state


def _copies_of(firsts: Collection[str], index: Index) -> Iterator[tuple[str, str]]:
    """Parts and sessions in them that were left out for having the bytes of one of these, which now has others."""
    for part, entry in index.entries.items():
        yield from ((part, name) for name, first in _copies_in(entry, index).items() if first in firsts)


def _copies_in(entry: Entry, index: Index) -> dict[str, str]:
    """The sessions of a part that were left out for having the bytes of another, with that one.

    The part is read only if its counts have any.
    """
    if "duplicate" not in json.loads(entry.counts)["statuses"]:
        return {}
    rows = files.read_parquet(files.join(index.folder, entry.name), ["session_id", "duplicate_of"])
    rows = rows.filter(rows["duplicate_of"].is_valid())
    return dict(zip(rows["session_id"].to_pylist(), rows["duplicate_of"].to_pylist(), strict=True))


def _is_due(before: str, now: str, out: str, again: Again) -> bool:
    """Whether a session is due because the table of calls has come to name it, or because its content differs.

    Other content is refused, unless changed sessions are done again.
    """
    if before == now or now.endswith(NOT_NAMED):
        return False
    if before.endswith(NOT_NAMED) or again.changed:
        return True
    raise OtherRunError(
        f"session '{session_of(now)}' is finished in {out}, but its utterances have changed since (times, labels, "
        "speakers, splits), or who speaks in it by the table of calls or by --voices-from. Give --changed redo to do "
        "changed sessions again, or another folder."
    )


def _with_twins(
    listing: Listing, keys: Sequence[str], index: Index, state: _State, alike: Callable[[int], Hashable]
) -> Listing:
    """The listing, with recordings of the same bytes as another one as duplicates of that."""
    files_, seen = listing.files, state.seen
    sizes = {files_[number].size for number in range(len(keys)) if not seen[number]}
    open_ones = [
        number for number, found in enumerate(files_) if found.size in sizes and number not in listing.problems
    ]
    number_of = {session_of(keys[number]): number for number in open_ones}
    known: dict[str, str] = {files_[number].name: "" for number in open_ones if seen[number]}
    copies = set[str]()
    for entry in index.entries.values() if known else ():
        stamps = json.loads(entry.stamps)
        there = number_of.keys() & stamps.keys()
        known |= {files_[number_of[name]].name: stamps[name][0][2] for name in there}
        if there:
            copies |= there & _copies_in(entry, index).keys()
    # A copy has no scores of its own: what comes later is one of the first too.
    open_ones = [number for number in open_ones if session_of(keys[number]) not in copies]
    place = {files_[number].name: number for number in open_ones}
    twins = find_twins([files_[number] for number in open_ones], known=known, group=lambda name: alike(place[name]))
    problems = {
        place[name]: Problem("duplicate", f"its bytes are those of '{first}'", first) for name, first in twins.items()
    }
    return replace(listing, problems={**listing.problems, **problems})


def _failed(index: Index) -> frozenset[str]:
    """The finished sessions in which something has failed."""
    found: set[str] = set()
    for name, entry in index.entries.items():
        if not json.loads(entry.counts)["statuses"].keys() <= set(NOT_FAILED):
            rows = files.read_parquet(files.join(index.folder, name), ["session_id", "status"])
            failed = pc.invert(pc.is_in(rows["status"], pa.array(NOT_FAILED)))
            found |= set(rows["session_id"].filter(failed).to_pylist())
    return frozenset(found)


def n_sessions(shard: Mapping[str, Any]) -> int:
    """How many sessions a shard describes."""
    return len(json.loads(shard["again"]) or json.loads(shard["keys"]))


def write_shard(
    folder: str,
    shard: Mapping[str, Any],
    done: pa.Table,
    stamps: Mapping[str, Sequence[Stamp]],
    write: Callable[[str, pa.Table], None],
) -> Entry:
    """Write the part of a shard: what was done, and what of a finished part stays, in the order of its keys.

    Args:
        folder: Where the parts are.
        shard: As planned.
        done: Rows of the sessions that the shard describes.
        stamps: Of the sessions that were done, by their ids in the keys.
        write: Takes the shard's name and the rows.

    Returns:
        Its index entry.
    """
    keys, again = json.loads(shard["keys"]), json.loads(shard["again"])
    noted: dict[str, Sequence[Sequence[Any]]] = {
        name: [tuple(stamp) for stamp in held] for name, held in stamps.items()
    }
    if again:
        path = files.join(folder, shard["name"])
        held = files.read_parquet(path)
        kept = held.filter(pc.invert(pc.is_in(held["session_id"], pa.array(again, pa.string()))))
        done = joined([done, kept.replace_schema_metadata(None)])
        place = pc.index_in(done["session_id"], value_set=pa.array([session_of(key) for key in keys]))
        done = done.take(pa.array(np.argsort(place.to_numpy(), kind="stable")))
        noted = {**read_keys(path)[1], **noted}
    write(shard["name"], tag_keys(done, keys, noted))
    return Entry.written(folder, shard["name"], keys, noted, count(done))
