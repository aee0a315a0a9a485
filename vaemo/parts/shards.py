"""Exactly once: sessions are planned into shards, finished shards are recognised, and the rest is done.

A shard's file name follows from what it holds, a file appears whole or not at all, and a session in a finished file is
never planned again. So a killed job, run again, ends with the same result; and a folder may grow. Settings that affect
results may not change within a folder: `claim_folder` ensures it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vaemo import files
from vaemo.audio.archive import Stamp
from vaemo.config import settled
from vaemo.errors import OtherRunError

_KEYS, _STAMPS = b"vaemo.keys", b"vaemo.stamps"


Stamps = Mapping[str, Sequence[Sequence[Any]]]
"""By session, the fields of a `Stamp` for each of its inputs; empty where an older version noted none."""


@dataclass(frozen=True)
class Shard:
    """Whole sessions that are done together and end in one file.

    Attributes:
        name: File name, `part-` and 16 hex digits of the keys, `.parquet`.
        keys: One per session: what must be the same for its result to be the same, such as the session's id and a
            digest of its utterances.
        indices: Positions of its sessions in the planned sequence.
    """

    name: str
    keys: tuple[str, ...]
    indices: tuple[int, ...]


def read_keys(path: str) -> tuple[list[str], Stamps]:
    """The keys of the sessions in a finished part, and the stamps of their inputs; reads its footer alone.

    Raises:
        OtherRunError: if it was not written by a job.
    """
    metadata = files.read_parquet_schema(path).metadata or {}
    if _KEYS not in metadata:
        raise OtherRunError(f"{path} was not written by this job; give an output folder of its own.")
    return json.loads(metadata[_KEYS]), json.loads(metadata.get(_STAMPS, b"{}"))


def tag_keys(table: pa.Table, keys: Sequence[str], stamps: Stamps) -> pa.Table:
    """The table with keys and stamps in the file's metadata, where `read_keys` finds them."""
    about = {_KEYS: json.dumps(keys), _STAMPS: json.dumps(stamps)}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **about})


def key_of(session_id: str, content: str) -> str:
    """The key of a session: its id, and behind a tab what may not change once it is finished, if anything."""
    content = content.replace("\t", " ")
    return f"{session_id}\t{content}" if content or "\t" in session_id else session_id


def session_of(key: str) -> str:
    """The session's id in a key."""
    return key.rpartition("\t")[0] or key


def plan_shards(
    keys: Sequence[str], weights: Sequence[int], target: int, *, only: Sequence[int] | None = None
) -> list[Shard]:
    """Consecutive sessions in shards of about `target` weight; a heavier session has a shard of its own.

    Args:
        keys: One per session, all different.
        weights: One per session: its utterances, or 1.
        target: Weight at which a shard is full.
        only: Positions in `keys` of the sessions to plan; None is all.
    """
    shards: list[Shard] = []
    held: list[int] = []
    filled = 0
    for index in range(len(keys)) if only is None else only:
        if held and filled + weights[index] > target:
            shards.append(_shard(held, keys))
            held, filled = [], 0
        held.append(index)
        filled += weights[index]
    if held:
        shards.append(_shard(held, keys))
    return shards


def _shard(indices: Sequence[int], keys: Sequence[str]) -> Shard:
    held = tuple(keys[index] for index in indices)
    return Shard(f"part-{digest(*held)[:16]}.parquet", held, tuple(indices))


def claim_folder(
    folder: str, marker: str, fingerprint: str, content: Mapping[str, Any], *, inputs: Sequence[str] = ()
) -> None:
    """Claim a folder for this run, or verify that it is this run's.

    Args:
        folder: The output folder; made if it is not there.
        marker: The JSON file in it that identifies the run.
        fingerprint: Of everything that can change results.
        content: What else the marker holds. A refusal compares `settings` (nested dicts), and `data`, a digest.
        inputs: Files whose content the run depends on beyond that digest; they may not change until it is finished.

    Raises:
        OtherRunError: if the folder holds another run, files and no marker, or a run on inputs that have changed.
    """
    path = files.join(folder, marker)
    if not files.exists(path):
        strangers = [name for name in files.list_files(folder) if not name.endswith("/summary.json")]
        if strangers:
            raise OtherRunError(
                f"{folder} holds {len(strangers)} files ({strangers[0].rsplit('/', 1)[-1]}, ...) but no {marker}: "
                "it is not an output folder of this job. Give an empty or a new one."
            )
        about = {"inputs": {name: tuple(stamp) for name, stamp in _stamps(inputs)}} if inputs else {}
        files.write_json(path, {"fingerprint": fingerprint, **content, **about})
        return
    held = files.read_json(path)
    if held.get("fingerprint") != fingerprint:
        differences = list(_differences(settled(held.get("settings", {})), settled(content.get("settings", {}))))
        if not differences and held.get("data") != content.get("data"):
            raise OtherRunError(
                f"{folder} holds a run on other data: ids, labels, splits or feature dimensions differ from those of "
                "now. Give another folder, or the data of that run."
            )
        raise OtherRunError(
            f"{folder} holds a run with other settings: {'; '.join(differences[:5]) or 'another fingerprint'}. "
            "Give another folder, or the settings of that run."
        )
    before = {name: Stamp(*stamp) for name, stamp in held.get("inputs", {}).items()}
    for name, stamp in _stamps(inputs):
        if name in before and not before[name].same(stamp):
            raise OtherRunError(
                f"{folder} holds a run on other data: {name} has changed since the run began (it had "
                f"{before[name].size:,} bytes, and has {stamp.size:,}). Give another folder, or the data of that run."
            )


def _stamps(paths: Sequence[str]) -> list[tuple[str, Stamp]]:
    """Stamps of the files that can be read, by their names without the folder."""
    with ThreadPoolExecutor(8) as pool:
        found = zip(paths, pool.map(Stamp.of, paths), strict=True)
        return [(path.rsplit("/", 1)[-1], stamp) for path, stamp in found if stamp]


def digest(*texts: str) -> str:
    """64 hex digits that follow from the texts and their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _differences(held: Any, wanted: Any, name: str = "") -> Iterable[str]:
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(held.keys() | wanted.keys()):
            yield from _differences(held.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif held != wanted:
        yield f"{name} was {held!r}, is now {wanted!r}"
