"""Every session is planned once, whatever was finished before and whatever has been added since."""

import random

import pyarrow as pa
import pytest

from vaemo import files
from vaemo.errors import OtherRunError
from vaemo.shards import claim_folder, plan_missing, plan_shards, read_keys, tag_keys


def finish(folder, shard):
    files.write_parquet_whole(f"{folder}/{shard.name}", tag_keys(pa.table({"key": list(shard.keys)}), shard))


def finished_keys(folder):
    return sorted(key for path in files.list_files(folder, ".parquet") for key in read_keys(path))


def test_plan_fills_shards_and_keeps_order():
    keys = [f"s{i}" for i in range(7)]
    shards = plan_shards(keys, [1, 1, 5, 1, 1, 1, 1], 3)
    assert [shard.indices for shard in shards] == [(0, 1), (2,), (3, 4, 5), (6,)]
    assert [key for shard in shards for key in shard.keys] == keys
    assert len({shard.name for shard in shards}) == 4
    assert plan_shards([], [], 3) == []


def test_names_follow_from_content():
    assert plan_shards(["a", "b"], [1, 1], 9)[0].name == plan_shards(["a", "b"], [2, 2], 9)[0].name
    assert plan_shards(["a", "b"], [1, 1], 9)[0].name != plan_shards(["b", "a"], [1, 1], 9)[0].name


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_kills_and_growth_does_every_session_once(tmp_path, seed):
    rng = random.Random(seed)
    keys = [f"s{i}\td{i}" for i in range(rng.randint(1, 40))]
    for _ in range(6):
        weights = [rng.randint(1, 5)] * len(keys)
        missing, n_done = plan_missing(str(tmp_path), keys, weights, 7)
        assert n_done + sum(len(shard.keys) for shard in missing) == len(keys)
        assert [keys[i] for shard in missing for i in shard.indices] == [k for shard in missing for k in shard.keys]
        for shard in missing[: rng.randint(0, len(missing))]:
            finish(tmp_path, shard)
        for _ in range(rng.randint(0, 5)):
            keys.insert(rng.randint(0, len(keys)), f"n{len(keys)}\td")
    for shard in plan_missing(str(tmp_path), keys, [1] * len(keys), 7)[0]:
        finish(tmp_path, shard)
    assert finished_keys(tmp_path) == sorted(keys)
    assert plan_missing(str(tmp_path), keys, [1] * len(keys), 7) == ([], len(keys))


def test_redo_plans_finished_parts_again(tmp_path):
    keys = ["a", "b", "c"]
    shards = plan_shards(keys, [1] * 3, 1)
    for shard in shards:
        finish(tmp_path, shard)
    missing, n_done = plan_missing(str(tmp_path), keys, [1] * 3, 1, redo=[shards[1].name])
    assert ([shard.keys for shard in missing], n_done) == ([("b",)], 2)


def test_a_finished_session_that_changed_is_refused(tmp_path):
    finish(tmp_path, plan_shards(["a\told", "b\tx"], [1, 1], 9)[0])
    with pytest.raises(OtherRunError, match=r"session 'a' is finished .* have changed since"):
        plan_missing(str(tmp_path), ["a\tnew", "b\tx"], [1, 1], 9)


def test_a_strangers_part_is_refused(tmp_path):
    files.write_parquet_whole(tmp_path / "part-x.parquet", pa.table({"a": [1]}))
    with pytest.raises(OtherRunError, match="was not written by this job"):
        plan_missing(str(tmp_path), ["a"], [1], 9)


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = str(tmp_path / "out")
    claim_folder(folder, "_run.json", "f1", {"settings": {"model": {"alpha": 0.8, "d_c": 64}}})
    claim_folder(folder, "_run.json", "f1", {"settings": {}})
    with pytest.raises(OtherRunError, match=r"model\.alpha was 0\.8, is now 0\.9"):
        claim_folder(folder, "_run.json", "f2", {"settings": {"model": {"alpha": 0.9, "d_c": 64}}})
    files.write_whole(tmp_path / "other" / "notes.txt", b"mine")
    with pytest.raises(OtherRunError, match=r"holds 1 files \(notes\.txt, \.\.\.\) but no _run\.json"):
        claim_folder(str(tmp_path / "other"), "_run.json", "f1", {})
