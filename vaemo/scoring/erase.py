"""Erasing calls from scores, feature stores, runs, enrolments, reports and personal deltas; a tombstone is kept.

`python -m vaemo.scores erase --session ID --scores SCORES`, and whatever else holds a trace. The tombstone is a keyed
hash of the id (`VAEMO_ID_KEY`), which later runs honour: the call is not scored again. After a kill, run the command
again.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from safetensors.torch import load, save

from vaemo import files
from vaemo.errors import OtherRunError, UsageError, named
from vaemo.parts.index import FOLDER, forget
from vaemo.parts.lease import lease
from vaemo.parts.shards import Stamps, read_keys, session_of, tag_keys
from vaemo.personalize import DELTAS, SPEAKERS, USED
from vaemo.scores import PROVENANCE, SESSIONS, UTTERANCES, read_provenance, read_sessions
from vaemo.scoring.calls import DATE, days_of
from vaemo.scoring.ids import IdKey
from vaemo.store import INFO
from vaemo.summary import SUMMARY
from vaemo.training.jobs import FAILURE
from vaemo.trust.fit import FIT

TOMBSTONES = "_erased.json"

_OF_RECORDING = r"#c\d+(v\d+)?(f\d+)?$"
"""What `vaemo.utterances` adds to the id of a session for a speaker of it: channel, voice, recording."""


@dataclass(frozen=True)
class Tombstones:
    """What was erased from a folder.

    Attributes:
        hashes: Keyed hashes of the sessions' ids.
        key_check: Identifies the key that made them.
    """

    hashes: frozenset[str] = frozenset()
    key_check: str = ""
    folder: str = field(default="", compare=False)

    @staticmethod
    def read(folder: str) -> Tombstones:
        """The tombstones of a folder of scores or a store; none where there are none."""
        path = files.join(folder, TOMBSTONES)
        if not files.exists(path):
            return Tombstones(folder=folder)
        held = files.read_json(path)
        return Tombstones(frozenset(held["sessions"]), held["key_check"], folder)

    def add(self, key: IdKey, hashes: Iterable[str]) -> None:
        """Leave tombstones in the folder.

        Raises:
            OtherRunError: if the others were made with another key.
        """
        self._check(key)
        held = {"key_check": key.check, "sessions": sorted({*self.hashes, *hashes})}
        files.write_json(files.join(self.folder, TOMBSTONES), held)

    def erased(self, session_ids: Sequence[str]) -> list[int]:
        """Which of `session_ids` are erased, bool.

        Raises:
            UsageError: if there are tombstones and no key to read them.
            OtherRunError: if the key is another.
        """
        if not self.hashes:
            return []
        key = IdKey.from_environment(f"{files.join(self.folder, TOMBSTONES)}, which says what was erased,")
        self._check(key)
        return [index for index, session_id in enumerate(session_ids) if key.hash(session_id) in self.hashes]

    def _check(self, key: IdKey) -> None:
        if self.key_check and key.check != self.key_check:
            raise OtherRunError(
                f"{files.join(self.folder, TOMBSTONES)} was written with another key than VAEMO_ID_KEY holds now; "
                "give the earlier key, or what was erased would come back."
            )


class _Erased:
    """The sessions to erase, under all names that a folder uses for them: their ids, or keyed hashes of these.

    Attributes:
        names: All their known names, ids and hashes.
        hashes: Keyed hashes of all of them; tombstones.
        found: Of these, those of which a table had rows.
    """

    def __init__(self, key: IdKey) -> None:
        self._key = key
        self.names: set[str] = set()
        self.hashes: set[str] = set()
        self.found: set[str] = set()

    def add(self, found: Iterable[str], *, hashed: bool = False) -> None:
        """Take further ids, or hashes of ids."""
        found = set(found)
        self.hashes |= found if hashed else set(map(self._key.hash, found))
        self.names |= found | self.hashes

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.hashes or self._key.hash(session_id) in self.hashes

    def rows(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which rows of a column of ids to erase, bool."""
        column = column.cast(pa.string())
        gone = [name for name in column.unique().to_pylist() if name is not None and name in self]
        # Of what is erased by its date, hidden scores know the hash alone.
        self.names |= set(gone)
        self.found |= {name if name in self.hashes else self._key.hash(name) for name in gone}
        return pc.is_in(column, value_set=pa.array(gone, pa.string()))


def erase_sessions(
    session_ids: Iterable[str],
    key: IdKey,
    *,
    scores: str,
    before: str | None = None,
    stores: Sequence[str] = (),
    runs: Sequence[str] = (),
    speakers: Sequence[str] = (),
    reports: Sequence[str] = (),
    personal: Sequence[str] = (),
) -> tuple[dict[str, int], list[str], list[str]]:
    """Erase calls everywhere.

    Tombstones are written first, so that what a kill leaves behind stays away too. Reports are removed whole, to be
    made again; personal deltas that learned from a call are removed. A checkpoint that was trained on one keeps
    its weights and is named.

    Args:
        session_ids: As they were before they were hashed.
        key: Of VAEMO_ID_KEY.
        scores: The folder of scores.
        before: All calls that the scores date before this day (`2026-11-23`) go too.
        stores: Feature stores.
        runs: Folders that trainings, sweeps and ablations wrote.
        speakers: Files of enrolments.
        reports: Folders that jobs/report.py wrote.
        personal: Folders that jobs/personalize.py wrote.

    Returns:
        removed: Rows removed from the `utterances` and `sessions` of the scores, from the `stores`, the `runs` and the
            `enrolments`; `reports` and `deltas` removed.
        trained: Folders of checkpoints that were trained on what was erased.
        missing: Of `session_ids`, those that no row was of.

    Raises:
        UsageError: if a folder holds something else than it should: a tombstone in it would be all that is done.
        UsageError: if `before` is given, and the scores have no dates, or one that is no day such as `2026-11-23`.
        OtherRunError: if the tombstones that are there were made with another key, or a run is writing the scores or a
            store: it has planned the calls already, and would bring them back.
    """
    _check_kinds(scores, stores, runs)
    with contextlib.ExitStack() as leases:
        for folder in dict.fromkeys((scores, *stores)):
            leases.enter_context(lease(folder))
        erased, session_ids = _Erased(key), list(session_ids)
        erased.add(session_ids)
        # Where ids are hidden the rows know a call by its hash alone.
        hidden = (read_provenance(scores).get("settings") or {}).get("id_key") is not None
        if before is not None:
            erased.add(_dated_before(scores, before), hashed=hidden)
        for folder in (scores, *stores):
            erased.add(_twins(folder, erased), hashed=hidden and folder == scores)
        if erased.hashes:
            for folder in (scores, *stores):
                Tombstones.read(folder).add(key, erased.hashes)
        removed = {kind: _erase_rows(files.join(scores, kind), erased) for kind in (UTTERANCES, SESSIONS)}
        removed["stores"] = sum(_erase_rows(store, erased) for store in stores)
        trained = [checkpoint for run in runs for checkpoint in _trained_on(run, erased)]
        removed["runs"] = sum(_erase_rows(run, erased) for run in runs)
        removed["enrolments"] = sum(_erase_in(path, erased) for path in speakers)
        removed["reports"] = sum(_erase_report(report) for report in reports) if erased.hashes else 0
        removed["deltas"] = sum(_erase_deltas(folder, erased) for folder in personal)
        for folder in (scores, *stores, *runs, *personal):
            _erase_error(folder, erased)
        _erase_examples(scores, erased)
    return removed, trained, [name for name in session_ids if key.hash(name) not in erased.found]


def _check_kinds(scores: str, stores: Sequence[str], runs: Sequence[str]) -> None:
    """Raise UsageError for a folder that cannot hold the rows of calls."""
    kinds = [
        (scores, "scores", any(files.exists(files.join(scores, name)) for name in (PROVENANCE, UTTERANCES, SESSIONS))),
        *((store, "features", files.exists(files.join(store, INFO)) or _has_utterances(store)) for store in stores),
        *((run, "run", files.exists(files.join(run, SUMMARY)) or bool(_tables(run))) for run in runs),
    ]
    for folder, kind, holds in kinds:
        if not holds and _has_others(folder):
            raise UsageError(f"{folder} holds no {kind}, so nothing was erased. Correct the path.")


def _has_others(folder: str) -> bool:
    """Whether a folder has files that no job keeps in an output folder before its first part."""
    found = files.walk(folder) if files.exists(folder) else ()
    return any(one.name != SUMMARY and not one.name.startswith("_") for one in found)


def _has_utterances(folder: str) -> bool:
    """Whether a table in a folder has rows of utterances, as a store of any program has."""
    return any({"session_id", "utt_id"} <= set(files.read_parquet_schema(path).names) for path in _tables(folder))


def _dated_before(scores: str, day: str) -> list[str]:
    """Ids of the sessions whose date lies before a day, as the scores have them."""
    sessions = read_sessions(scores)
    if DATE not in sessions.column_names:
        raise UsageError(
            f"{scores} has no column {DATE}, so that --before tells nothing: no table of calls dated them."
        )
    days, strange = days_of(sessions[DATE])
    if strange is not None:
        raise UsageError(
            f"{scores}: the {DATE} of the call {named(sessions['session_id'][strange].as_py())} is "
            f"'{sessions[DATE][strange].as_py()}', not a day such as 2026-11-23, so that --before tells nothing. "
            "Nothing was erased: name the calls with --sessions FILE."
        )
    earlier = pc.less(days, day)
    return sessions["session_id"].filter(pc.fill_null(earlier, False)).unique().to_pylist()


def _twins(folder: str, erased: _Erased) -> list[str]:
    """Other names under which a folder lists the recordings of these sessions: those of the same bytes."""
    pairs = list[tuple[str, str]]()
    for path in _tables(folder):
        if "duplicate_of" in files.read_parquet_schema(path).names:
            table = files.read_parquet(path, ["session_id", "duplicate_of"])
            table = table.filter(table["duplicate_of"].is_valid())
            pairs += zip(table["session_id"].to_pylist(), table["duplicate_of"].to_pylist(), strict=True)
    known, named = {name for pair in pairs for name in pair if name in erased}, set[str]()
    while known != named:
        # A copy that came later may name another copy, not the first.
        named = set(known)
        known |= {name for pair in pairs if named.intersection(pair) for name in pair}
    return sorted(known)


def _tables(folder: str) -> list[str]:
    """The Parquet files of a folder and below, also where names begin with `_`; the index follows from them."""
    return [path for path in _below(folder, ".parquet") if posixpath.basename(posixpath.dirname(path)) != FOLDER]


def _below(folder: str, suffix: str) -> list[str]:
    """The files of a folder and below that end so."""
    found = files.walk(folder) if files.exists(folder) else ()
    return sorted(one.path for one in found if one.name.endswith(suffix) and one.problem is None)


def _erase_rows(folder: str, erased: _Erased) -> int:
    """Rewrite the tables that hold the sessions, in the rows and in the keys that say what is finished."""
    removed = sum(_erase_in(path, erased) for path in _tables(folder))
    indices = {posixpath.dirname(path) for path in _below(folder, ".parquet")}
    for index in sorted(path for path in indices if posixpath.basename(path) == FOLDER):
        forget(posixpath.dirname(index), erased.names)
    return removed


def _erase_in(path: str, erased: _Erased) -> int:
    names = files.read_parquet_schema(path).names
    # An enrolment without a session may be of a call's own speaker, who has its id.
    id_column = next((name for name in ("session_id", "speaker_id") if name in names), None)
    if id_column is None:
        return 0
    ids = files.read_parquet(path, [id_column])[id_column]
    if id_column == "speaker_id":
        ids = pc.replace_substring_regex(ids.cast(pa.string()), _OF_RECORDING, "")
    gone = erased.rows(ids)
    n = pc.sum(gone).as_py() or 0
    keys: list[str] | None = None
    stamps: Stamps = {}
    with contextlib.suppress(OtherRunError):  # files not written in shards have no keys
        keys, stamps = read_keys(path)
    # Parts of older versions have stamps of sessions whose rows are elsewhere.
    kept = {name: held for name, held in stamps.items() if name not in erased}
    if n or len(kept) < len(stamps):
        rest = files.read_parquet(path).filter(pc.invert(gone))
        if keys is not None:
            rest = tag_keys(rest, [key for key in keys if session_of(key) not in erased], kept)
        files.write_parquet_whole(path, rest)
    return n


def _trained_on(run: str, erased: _Erased) -> list[str]:
    """Checkpoints below a folder that learned from a session, or were chosen by it."""
    trained = []
    for path in _tables(run):
        folder, name = posixpath.split(path)
        if name == USED and pc.any(erased.rows(files.read_parquet(path, ["session_id"])["session_id"])).as_py():
            best = files.join(folder, "best")
            trained.append(best if files.exists(best) else folder)
    return trained


def _erase_examples(scores: str, erased: _Erased) -> None:
    """Remove the sessions from the examples of how the model fits."""
    path = files.join(scores, FIT)
    if files.exists(path):
        told = files.read_json(path)
        kept = {key: [name for name in told[key] if name not in erased] for key in ("most", "least") if key in told}
        files.write_json(path, {**told, **kept})


def _erase_error(folder: str, erased: _Erased) -> None:
    """Remove a job's error message, and the traceback of a failed one, if it names a session."""
    for path in _below(folder, FAILURE):
        if any(name.encode() in files.read_bytes(path) for name in erased.names):
            files.delete(path)
    for path in _below(folder, SUMMARY):
        told = files.read_json(path)
        if any(name in str(told.get("error", "")) for name in erased.names):
            files.write_json(path, {key: value for key, value in told.items() if key != "error"})


def _erase_report(folder: str) -> int:
    pages = files.list_files(folder, "index.html") + files.list_files(files.join(folder, "pictures"), ".png")
    for page in pages:
        files.delete(page)
    return int(bool(pages))


def _erase_deltas(folder: str, erased: _Erased) -> int:
    """Remove the deltas of the speakers that were learned from the sessions."""
    used = files.read_parquet(files.join(folder, USED))
    speakers = used.filter(erased.rows(used["session_id"]))["speaker_id"].unique()
    if not len(speakers):
        return 0
    path, gone = files.join(folder, DELTAS), set(speakers.to_pylist())
    content = files.read_bytes(path)
    tensors = {name: tensor for name, tensor in load(content).items() if name.rpartition("/")[0] not in gone}
    files.write_whole(path, save(tensors, metadata=files.safetensors_metadata(content)))
    for name in (SPEAKERS, USED):
        table = files.read_parquet(files.join(folder, name))
        files.write_parquet_whole(
            files.join(folder, name), table.filter(pc.invert(pc.is_in(table["speaker_id"], speakers)))
        )
    return len(speakers)
