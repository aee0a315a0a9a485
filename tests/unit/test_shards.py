"""Sessions make shards, a folder belongs to one run, and a run to its data."""

import os

import pytest

from vaemo import files
from vaemo.errors import OtherRunError
from vaemo.parts.shards import claim_folder, key_of, plan_shards, session_of


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


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = str(tmp_path / "out")
    claim_folder(folder, "_run.json", "f1", {"settings": {"model": {"alpha": 0.8, "d_c": 64}}})
    claim_folder(folder, "_run.json", "f1", {"settings": {}})
    with pytest.raises(OtherRunError, match=r"model\.alpha was 0\.8, is now 0\.9"):
        claim_folder(folder, "_run.json", "f2", {"settings": {"model": {"alpha": 0.9, "d_c": 64}}})
    files.write_whole(tmp_path / "other" / "notes.txt", b"mine")
    with pytest.raises(OtherRunError, match=r"holds 1 files \(notes\.txt, \.\.\.\) but no _run\.json"):
        claim_folder(str(tmp_path / "other"), "_run.json", "f1", {})


def test_summary_of_a_job_is_no_stranger(tmp_path):
    files.write_json(tmp_path / "summary.json", {"exit_code": 1})
    claim_folder(str(tmp_path), "_run.json", "f1", {})


def test_other_data_are_told_from_other_settings(tmp_path):
    folder = str(tmp_path)
    claim_folder(folder, "_run.json", "f1", {"data": "d1", "settings": {"train": {"lr": 1}}})
    with pytest.raises(OtherRunError, match="holds a run on other data: ids, labels, splits"):
        claim_folder(folder, "_run.json", "f2", {"data": "d2", "settings": {"train": {"lr": 1}}})


def test_a_run_goes_on_with_the_files_that_it_began_with(tmp_path):
    folder, part = str(tmp_path / "run"), tmp_path / "part-0.parquet"
    part.write_bytes(b"a" * 300_000)
    claim_folder(folder, "_run.json", "f1", {}, inputs=[str(part)])
    # A copy or a restore changes the time alone, another disk the folder.
    os.utime(part, ns=(1, 1))
    claim_folder(folder, "_run.json", "f1", {}, inputs=[str(part)])
    part.write_bytes(b"a" * 150_000 + b"b" * 150_000)
    with pytest.raises(OtherRunError, match=r"other data: part-0\.parquet has changed since the run began"):
        claim_folder(folder, "_run.json", "f1", {}, inputs=[str(part)])


def test_a_run_of_before_has_no_note_of_its_files(tmp_path):
    claim_folder(str(tmp_path), "_run.json", "f1", {})
    claim_folder(str(tmp_path), "_run.json", "f1", {}, inputs=[str(tmp_path / "_run.json")])


@pytest.mark.parametrize("content", ["", "0123", "0123,customer,an\tagent"])
@pytest.mark.parametrize("session_id", ["call.wav", "a\tb.wav", "a\t"])
def test_a_key_gives_its_session_back_whatever_its_name_holds(session_id, content):
    assert session_of(key_of(session_id, content)) == session_id
