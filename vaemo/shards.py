"""Exactly once: sessions are planned into shards, finished shards are found again, and the rest is done.

A shard's file name follows from what it holds, a file appears whole or not at all, and a session that stands in a
finished file is never planned again. So a job that was killed anywhere, run again, ends as if it had not been; and a
folder may grow. What may not change within a folder is what decides results: `claim_folder` guards it.
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
from vaemo.config import settled
from vaemo.errors import OtherRunError

_KEYS = b"vaemo.keys"


@dataclass(frozen=True)
class Shard:
    """Whole sessions that are done together and end in one file.

    Attributes:
        name: File name, `part-` and 16 hex digits of the keys, `.parquet`.
        keys: One per session: what must be the same for its result to be the same, such as the session's id and a
            digest of its utterances.
        indices: Where its sessions stand in the sequence that was planned.
    """

    name: str
    keys: tuple[str, ...]
    indices: tuple[int, ...]


def plan_shards(keys: Sequence[str], weights: Sequence[int], target: int) -> list[Shard]:
    """Consecutive sessions in shards of about `target` weight; a heavier session has a shard of its own.

    Args:
        keys: One per session, all different.
        weights: One per session: its utterances, or 1.
        target: Weight at which a shard is full.
    """
    return _plan(range(len(keys)), keys, weights, target)


def plan_missing(
    folder: str, keys: Sequence[str], weights: Sequence[int], target: int, *, redo: Iterable[str] = ()
) -> tuple[list[Shard], int]:
    """The shards that a folder still lacks.

    Args:
        folder: Where the parts are.
        keys: As for `plan_shards`; a key is `session_id`, or `session_id` + tab + digest of its content.
        weights: As for `plan_shards`.
        target: As for `plan_shards`.
        redo: Names of finished parts that are to be written again.

    Returns:
        shards: What is to be done; their indices point into `keys`.
        n_done: How many of the sessions are finished.

    Raises:
        OtherRunError: if a finished session had other content than it has now.
    """
    finished = {path.rsplit("/", 1)[-1]: path for path in files.list_files(folder, ".parquet")}
    for name in redo:
        finished.pop(name, None)
    shards = plan_shards(keys, weights, target)
    if finished.keys() <= {shard.name for shard in shards}:
        missing = [shard for shard in shards if shard.name not in finished]
        return missing, len(keys) - sum(len(shard.keys) for shard in missing)

    # The list of sessions has changed since (an archive grew): plan what stands in no finished part.
    with ThreadPoolExecutor(8) as pool:
        done = {key for keys_ in pool.map(read_keys, finished.values()) for key in keys_}
    digests = dict(_split_key(key) for key in done)
    left = []
    for index, key in enumerate(keys):
        session_id, digest = _split_key(key)
        if session_id not in digests:
            left.append(index)
        elif digests[session_id] != digest:
            raise OtherRunError(
                f"session '{session_id}' is finished in {folder}, but its utterances have changed since. "
                "Give the changed sessions new ids, or another folder."
            )
    return _plan(left, keys, weights, target), len(keys) - len(left)


def tag_keys(table: pa.Table, shard: Shard) -> pa.Table:
    """The table with its shard's keys in the file's metadata, where `plan_missing` finds them."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _KEYS: json.dumps(shard.keys)})


def read_keys(path: str) -> list[str]:
    """The keys of the sessions in a finished part."""
    metadata = files.read_parquet_schema(path).metadata or {}
    if _KEYS not in metadata:
        raise OtherRunError(f"{path} was not written by this job; give an output folder of its own.")
    return json.loads(metadata[_KEYS])


def claim_folder(folder: str, marker: str, fingerprint: str, content: Mapping[str, Any]) -> None:
    """Make a folder this run's own, or find that it is already.

    Args:
        folder: The output folder; made if it is not there.
        marker: The JSON file in it that says whose it is.
        fingerprint: Of everything that can change results.
        content: What else the marker holds; `settings` (nested dicts) is what a refusal compares.

    Raises:
        OtherRunError: if the folder holds another run, or files and no marker.
    """
    path = files.join(folder, marker)
    if not files.exists(path):
        strangers = files.list_files(folder)
        if strangers:
            raise OtherRunError(
                f"{folder} holds {len(strangers)} files ({strangers[0].rsplit('/', 1)[-1]}, ...) but no {marker}: "
                "it is not an output folder of this job. Give an empty or a new one."
            )
        files.write_json(path, {"fingerprint": fingerprint, **content})
        return
    held = files.read_json(path)
    if held.get("fingerprint") == fingerprint:
        return
    differences = list(_differences(settled(held.get("settings", {})), settled(content.get("settings", {}))))
    raise OtherRunError(
        f"{folder} holds a run with other settings: {'; '.join(differences[:5]) or 'another fingerprint'}. "
        "Give another folder, or the settings of that run."
    )


def digest(*texts: str) -> str:
    """64 hex digits that follow from the texts and their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _plan(indices: Sequence[int], keys: Sequence[str], weights: Sequence[int], target: int) -> list[Shard]:
    shards: list[Shard] = []
    held: list[int] = []
    filled = 0
    for index in indices:
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


def _split_key(key: str) -> tuple[str, str]:
    session_id, _, content = key.partition("\t")
    return session_id, content


def _differences(held: Any, wanted: Any, name: str = "") -> Iterable[str]:
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(held.keys() | wanted.keys()):
            yield from _differences(held.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif held != wanted:
        yield f"{name} was {held!r}, is now {wanted!r}"
