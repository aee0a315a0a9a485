"""A call is erased: from scores, feature stores, reports and personal deltas; what stays is a tombstone.

`python -m vaemo.scores erase --session ID --scores SCORES [--store STORE] [--report DIR] [--personal DIR]`. The
tombstone is a keyed hash of the id (`VAEMO_ID_KEY`), which later runs honour: the call is not scored again. Killed in
the middle, the command is given again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from safetensors.torch import load, save

from vaemo import cli, files
from vaemo.errors import OtherRunError, UsageError
from vaemo.parts.index import forget
from vaemo.parts.shards import read_keys, session_of, tag_keys
from vaemo.personalize import DELTAS, SPEAKERS, USED
from vaemo.progress import say
from vaemo.scores import read_provenance
from vaemo.scoring.ids import IdKey

PROG = "python -m vaemo.scores"
TOMBSTONES = "_erased.json"


@dataclass(frozen=True)
class Tombstones:
    """What was erased from a folder.

    Attributes:
        hashes: Keyed hashes of the sessions' ids.
        key_check: Tells the key that made them.
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
        """Where in `session_ids` erased ones stand.

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
                "give the key of then, or what was erased would come back."
            )


def erase_session(
    session_id: str,
    key: IdKey,
    *,
    scores: str,
    stores: Sequence[str] = (),
    reports: Sequence[str] = (),
    personal: Sequence[str] = (),
) -> dict[str, int]:
    """Erase a call everywhere.

    Tombstones are written first, so that a run that starts meanwhile leaves the call out. Reports are removed whole,
    to be made anew; of personal deltas those go that learned from the call.

    Args:
        session_id: As it was before it was hashed.
        key: Of VAEMO_ID_KEY.
        scores: The folder of scores.
        stores: Feature stores.
        reports: Folders that jobs/report.py wrote.
        personal: Folders that jobs/personalize.py wrote.

    Returns:
        Rows removed from the `utterances` and `sessions` of the scores and from the `stores`; `reports` and `deltas`
        removed.
    """
    names, tombstones = [session_id, key.hash(session_id)], {key.hash(session_id)}
    hidden = (read_provenance(scores).get("settings") or {}).get("id_key") is not None
    for folder in (scores, *stores):
        for twin in _twins(folder, names):
            # Where ids are hidden the rows know a twin by its hash alone, which is its tombstone too.
            names += [twin] if hidden and folder == scores else [twin, key.hash(twin)]
            tombstones.add(names[-1])
    for folder in (scores, *stores):
        Tombstones.read(folder).add(key, tombstones)
    removed = {kind: _erase_rows(files.join(scores, kind), names) for kind in ("utterances", "sessions")}
    removed["stores"] = sum(_erase_rows(store, names) for store in stores)
    removed["reports"] = sum(_erase_report(report) for report in reports)
    removed["deltas"] = sum(_erase_deltas(folder, names) for folder in personal)
    return removed


def _twins(folder: str, names: Sequence[str]) -> list[str]:
    """Other names under which a folder lists the recording of a session: those of the same bytes."""
    known, pairs = set(names), list[tuple[str, str]]()
    for path in files.list_files(folder, ".parquet", recursive=True):
        if "duplicate_of" in files.read_parquet_schema(path).names:
            table = files.read_parquet(path, ["session_id", "duplicate_of"])
            table = table.filter(table["duplicate_of"].is_valid())
            pairs += zip(table["session_id"].to_pylist(), table["duplicate_of"].to_pylist(), strict=True)
    firsts = known | {first for twin, first in pairs if twin in known}
    twins = {twin for twin, first in pairs if first in firsts}
    return sorted((firsts | twins) - known)


def _erase_rows(folder: str, names: Sequence[str]) -> int:
    """Rewrite the parts that hold the session, in the rows and in the keys that say what is finished."""
    removed = 0
    for path in files.list_files(folder, ".parquet", recursive=True):
        table = files.read_parquet(path)
        gone = pc.is_in(table["session_id"], pa.array(names)).to_numpy()
        if not gone.any():
            continue
        rest = table.filter(pa.array(~gone))
        with contextlib.suppress(OtherRunError):  # a store that somebody wrote by hand has no keys
            keys, stamps = read_keys(path)
            kept = {name: held for name, held in stamps.items() if name not in names}
            rest = tag_keys(rest, [key for key in keys if session_of(key) not in names], kept)
        files.write_parquet_whole(path, rest)
        removed += int(gone.sum())
    forget(folder, names)
    return removed


def _erase_report(folder: str) -> int:
    pages = files.list_files(folder, "index.html") + files.list_files(files.join(folder, "pictures"), ".png")
    for page in pages:
        files.delete(page)
    return int(bool(pages))


def _erase_deltas(folder: str, names: Sequence[str]) -> int:
    """Remove the deltas of the speakers that were learned from the session."""
    used = files.read_parquet(files.join(folder, USED))
    learned = pc.is_in(used["session_id"], pa.array(names))
    speakers = used.filter(learned)["speaker_id"].unique()
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


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """The command `python -m vaemo.scores erase`."""
    parser = cli.Parser(prog=prog or PROG, description="Look after a folder of scores.")
    erase = parser.add_subparsers(required=True).add_parser("erase", help="remove a call and leave a tombstone")
    erase.add_argument("--session", required=True, action="append", metavar="ID", help="the call; may be repeated")
    erase.add_argument("--scores", required=True, metavar="SCORES", help="the folder of scores")
    for name, what in (("store", "feature store"), ("report", "report"), ("personal", "folder of personal deltas")):
        erase.add_argument(f"--{name}", action="append", default=[], metavar="DIR", help=f"a {what}; may be repeated")
    args = parser.parse_args(argv)
    key = IdKey.from_environment("the tombstone of an erased call")
    for folder in (args.scores, *args.store, *args.report, *args.personal):
        if not files.exists(folder):
            raise UsageError(f"{folder} does not exist, so that nothing was erased anywhere. Mend the command.")
    for session_id in args.session:
        removed = erase_session(
            session_id, key, scores=args.scores, stores=args.store, reports=args.report, personal=args.personal
        )
        say(f"{session_id}: " + ", ".join(f"{count} from {kind}" for kind, count in removed.items()))
        if not removed["utterances"] + removed["stores"]:
            say(f"warning: no row is of a call '{session_id}'. Its tombstones stay: should it come, it is left out.")


if __name__ == "__main__":
    cli.run(main, PROG)
