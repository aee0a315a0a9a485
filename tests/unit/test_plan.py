"""Every session is planned once, whatever was finished before, has been added, has changed, or occurs twice."""

import json
import random
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest

from vaemo import files
from vaemo.audio.archive import Stamp, sample_digest
from vaemo.errors import OtherRunError
from vaemo.files import Found
from vaemo.parts.index import Index
from vaemo.parts.shards import read_keys, session_of, tag_keys
from vaemo.pipeline.plan import Again, write_shard
from vaemo.pipeline.plan import plan as plan_index
from vaemo.pipeline.sources import Listing
from vaemo.utterances import Problem


def listing_of(keys, *, changed=(), found=(), weights=None):
    names = [session_of(key) for key in keys]
    return Listing(
        session_ids=names,
        contents=[key.partition("\t")[2] for key in keys],
        weights=weights or [1] * len(keys),
        pack=lambda indices: {"picked": list(indices)},
        still=lambda index, stamps: names[index] not in changed,
        units=[1] * len(keys),
        unit="recordings",
        n_cut=0,
        roles=(),
        files=found,
    )


def plan(listing, keys, folder, target, **options):
    return plan_index(listing, keys, Index.open(folder), target, **options)


def finish(folder, shard, status="ok", size=1):
    """Do what a worker does with a shard."""
    names = json.loads(shard["again"]) or [session_of(key) for key in json.loads(shard["keys"])]
    n = len(names)
    times = {name: pa.array([0.0] * n) for name in ("start_s", "end_s")}
    rows = pa.table({"session_id": names, "utt_id": names, "status": [status] * n, "reason": names, **times})
    rows = rows.append_column("size", pa.array([size] * n))
    stamps = {name: [Stamp(size, 0)] for name in names}
    return write_shard(
        str(folder), shard, rows, stamps, lambda name, part: files.write_parquet_whole(f"{folder}/{name}", part)
    )


def keys_in(folder):
    return [key for entry in Index.open(str(folder)).entries.values() for key in json.loads(entry.keys)]


def rows_of(folder):
    tables = [files.read_parquet(path) for path in files.list_files(folder, ".parquet")]
    return {row["session_id"]: row for row in pa.concat_tables(tables).to_pylist()}


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_kills_and_growth_does_every_session_once(tmp_path, seed):
    rng = random.Random(seed)
    keys = [f"s{i}\td{i}" for i in range(rng.randint(1, 40))]
    for _ in range(6):
        work = plan(listing_of(keys, weights=[rng.randint(1, 5)] * len(keys)), keys, str(tmp_path), 7)
        planned = [key for shard in work.shards for key in json.loads(shard["keys"])]
        assert [keys[index] for shard in work.shards for index in shard["picked"]] == planned
        done = set(keys_in(tmp_path))
        assert (sorted(planned), work.n_sessions) == (sorted(set(keys) - done), len(planned))
        for shard in work.shards[: rng.randint(0, len(work.shards))]:
            finish(tmp_path, shard)
        for _ in range(rng.randint(0, 5)):
            keys.insert(rng.randint(0, len(keys)), f"n{len(keys)}\td")
    for shard in plan(listing_of(keys), keys, str(tmp_path), 7).shards:
        finish(tmp_path, shard)
    assert sorted(keys_in(tmp_path)) == sorted(keys)
    assert not plan(listing_of(keys), keys, str(tmp_path), 7).shards


@pytest.mark.parametrize("seed", range(5))
def test_every_session_is_done_once_whatever_becomes_of_the_index(tmp_path, seed):
    """Deleted, cut short, older than the parts, or ahead of them: parts may be gone that it knows."""
    rng, keys, saved = random.Random(seed), [f"s{i}\td{i}" for i in range(30)], {}
    held = tmp_path / "_index"
    for _ in range(5):
        with Index.open(str(tmp_path)) as index:
            work = plan_index(listing_of(keys), keys, index, 4)
            for shard in work.shards[: rng.randint(0, 4)]:
                entry = finish(tmp_path, shard)
                if rng.random() < 0.7:
                    index.add(entry)
        paths = sorted(held.glob("*.parquet"))
        now = {path: path.read_bytes() for path in paths}
        match rng.randint(0, 3):
            case 0:
                shutil.rmtree(held, ignore_errors=True)
            case 1:
                for path in paths:
                    path.write_bytes(now[path][: rng.randrange(len(now[path]))])
            case 2:
                for path, content in saved.items():
                    path.write_bytes(content)
                for path in now.keys() - saved.keys():
                    path.unlink()
            case 3:
                for path in [path for path in tmp_path.glob("*.parquet") if rng.random() < 0.3]:
                    path.unlink()
        saved = now
        lost = sorted(set(keys) - {key for path in tmp_path.glob("*.parquet") for key in read_keys(str(path))[0]})
        work = plan(listing_of(keys), keys, str(tmp_path), 4)
        assert sorted(key for shard in work.shards for key in json.loads(shard["keys"])) == lost
    for shard in plan(listing_of(keys), keys, str(tmp_path), 4).shards:
        finish(tmp_path, shard)
    assert sorted(keys_in(tmp_path)) == sorted(keys)


def test_what_changed_keeps_its_rows_until_it_is_to_be_done_again(tmp_path):
    keys = ["a", "b", "c"]
    for shard in plan(listing_of(keys), keys, str(tmp_path), 2).shards:
        finish(tmp_path, shard)
    work = plan(listing_of(keys, changed={"b"}), keys, str(tmp_path), 2)
    assert (work.shards, work.changed) == ([], ["b"])
    work = plan(listing_of(keys, changed={"b"}), keys, str(tmp_path), 2, again=Again(changed=True))
    assert ([json.loads(shard["again"]) for shard in work.shards], work.n_again, work.changed) == ([["b"]], 1, [])
    finish(tmp_path, work.shards[0], size=9)
    assert {name: row["size"] for name, row in rows_of(tmp_path).items()} == {"a": 1, "b": 9, "c": 1}
    stamps = {}
    for entry in Index.open(str(tmp_path)).entries.values():
        stamps |= json.loads(entry.stamps)
    assert stamps == {"a": [[1, 0, ""]], "b": [[9, 0, ""]], "c": [[1, 0, ""]]}


def finish_copies(folder, firsts):
    """Do sessions, some of which are left out as copies of others."""
    keys = list(firsts)
    (shard,) = plan(listing_of(keys), keys, str(folder), len(keys)).shards
    times = {name: pa.array([0.0] * len(keys)) for name in ("start_s", "end_s")}
    status = ["duplicate" if first else "ok" for first in firsts.values()]
    said = {"status": status, "reason": keys, "duplicate_of": pa.array(list(firsts.values()), pa.string())}
    rows = pa.table({"session_id": keys, "utt_id": keys, **said, **times})
    stamps = {name: [Stamp(1, 0)] for name in keys}
    write_shard(str(folder), shard, rows, stamps, lambda name, part: files.write_parquet_whole(folder / name, part))


def test_a_copy_of_a_copy_names_the_first(tmp_path):
    audio, out, names = tmp_path / "audio", tmp_path / "out", ["a", "b", "c"]
    audio.mkdir()
    for name in names:
        (audio / name).write_bytes(b"same")
    found = [Found(name, str(audio / name), 4) for name in names]
    finish_copies(out, {"b": None, "a": "b"})
    for path in out.glob("*.parquet"):
        digests = {name: [Stamp(4, 0, sample_digest(str(audio / name), 4))] for name in "ab"}
        files.write_parquet_whole(path, tag_keys(files.read_parquet(path), read_keys(str(path))[0], digests))
    work = plan(listing_of(names, found=found), names, str(out), 9, alike=lambda index: None)
    assert {index: problem.duplicate_of for index, problem in work.listing.problems.items()} == {2: "b"}


def test_a_copy_is_done_once_its_first_has_other_bytes(tmp_path):
    keys = ["a", "b", "c"]
    finish_copies(tmp_path, {"a": None, "b": "a", "c": None})
    for changed, due in (("a", ["a", "b"]), ("c", ["c"])):
        (again,) = plan(listing_of(keys, changed={changed}), keys, str(tmp_path), 3, again=Again(changed=True)).shards
        assert json.loads(again["again"]) == due


def test_what_failed_is_done_again_where_that_is_asked(tmp_path):
    keys = ["a", "b", "c", "d"]
    for shard, status in zip(
        plan(listing_of(keys), keys, str(tmp_path), 1).shards, ("ok", "missing", "silent", "ok"), strict=True
    ):
        finish(tmp_path, shard, status)
    assert not plan(listing_of(keys), keys, str(tmp_path), 1).shards
    (shard,) = plan(listing_of(keys), keys, str(tmp_path), 1, again=Again(failed=True)).shards
    assert json.loads(shard["again"]) == ["b"]
    finish(tmp_path, shard)
    assert rows_of(tmp_path)["b"]["status"] == "ok"


def test_parts_of_before_noted_nothing_to_compare(tmp_path):
    keys = ["a"]
    (shard,) = plan(listing_of(keys), keys, str(tmp_path), 1).shards
    path = tmp_path / shard["name"]
    times = {name: pa.array([0.0]) for name in ("start_s", "end_s")}
    rows = pa.table({"session_id": ["a"], "utt_id": ["a"], "status": ["ok"], "reason": ["a"], **times})
    files.write_parquet_whole(path, rows.replace_schema_metadata({"vaemo.keys": json.dumps(keys)}))
    work = plan(listing_of(keys, changed={"a"}), keys, str(tmp_path), 1)
    assert (work.shards, work.changed, work.unchecked) == ([], [], 1)
    # A session that is listed and not read never has a stamp, whatever version listed it.
    unread = replace(listing_of(keys), problems={0: Problem("not_scored_role", "not in the table of calls")})
    assert plan(unread, keys, str(tmp_path), 1).unchecked == 0


def test_a_session_that_the_table_of_calls_comes_to_name_is_done_again(tmp_path):
    for shard in plan(listing_of(["a\t,?"]), ["a\t,?"], str(tmp_path), 1).shards:
        finish(tmp_path, shard, "not_scored_role")
    (shard,) = plan(listing_of(["a\t,customer"]), ["a\t,customer"], str(tmp_path), 1).shards
    assert (json.loads(shard["again"]), json.loads(shard["keys"])) == (["a"], ["a\t,customer"])
    finish(tmp_path, shard)
    # What was scored stays so, also where the table no longer has it.
    assert not plan(listing_of(["a\t,?"]), ["a\t,?"], str(tmp_path), 1).shards


def test_a_finished_session_whose_utterances_changed_is_refused(tmp_path):
    for shard in plan(listing_of(["a\told"]), ["a\told"], str(tmp_path), 1).shards:
        finish(tmp_path, shard)
    with pytest.raises(OtherRunError, match=r"session 'a' is finished .* have changed since .* Give --changed redo"):
        plan(listing_of(["a\tnew"]), ["a\tnew"], str(tmp_path), 1)
    (shard,) = plan(listing_of(["a\tnew"]), ["a\tnew"], str(tmp_path), 1, again=Again(changed=True)).shards
    finish(tmp_path, shard, size=9)
    assert rows_of(tmp_path)["a"]["size"] == 9
    assert not plan(listing_of(["a\tnew"]), ["a\tnew"], str(tmp_path), 1).shards


def test_a_strangers_part_is_refused(tmp_path):
    files.write_parquet_whole(tmp_path / "part-x.parquet", pa.table({"a": [1]}))
    with pytest.raises(OtherRunError, match="was not written by this job"):
        plan(listing_of(["a"]), ["a"], str(tmp_path), 1)


def test_the_same_bytes_are_done_once_whatever_came_first(tmp_path):
    audio, out = tmp_path / "audio", tmp_path / "out"
    audio.mkdir()
    for name, content in (("b", b"same"), ("c", b"same"), ("d", b"alike"), ("e", b"other"), ("f", b"")):
        (audio / name).write_bytes(content)

    def work(keys):
        found = [Found(key, str(audio / key), (audio / key).stat().st_size) for key in keys]
        return plan(listing_of(keys, found=found), keys, str(out), 9, alike=lambda index: None)

    first = work(["b", "c", "d", "e", "f"])
    assert {index: problem.duplicate_of for index, problem in first.listing.problems.items()} == {1: "b"}
    (shard,) = first.shards
    assert json.loads(shard["problems"])["c"]["status"] == "duplicate"
    finish(out, shard, size=4)
    # A copy that sorts before its original is the twin all the same: the original is done.
    (audio / "a").write_bytes(b"same")
    assert work(["a", "b", "c"]).listing.problems[0].duplicate_of == "b"
