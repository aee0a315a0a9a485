"""Writes are whole or not at all, listings leave bookkeeping out."""

import os

import pyarrow as pa
import pytest

from vaemo import files


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.json"
    files.write_json(path, {"kept": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"lost": 2})
    assert files.read_json(path) == {"kept": 1}
    assert os.listdir(path.parent) == ["a.json"]


def test_listing_leaves_hidden_files_out(tmp_path):
    for name in (
        "b.parquet",
        "a.parquet",
        "_vaemo.json",
        ".a.parquet.tmp",
        "notes.txt",
        "deep/c.parquet",
        "_d/e.parquet",
    ):
        files.write_whole(tmp_path / name, b"x")
    assert files.list_files(tmp_path, ".parquet") == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]
    assert files.list_files(tmp_path, ".parquet", recursive=True)[-1] == f"{tmp_path}/deep/c.parquet"
    assert files.list_files(tmp_path / "absent") == []


def test_parquet_round_trip_through_every_kind_of_path(tmp_path):
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    for folder in (str(tmp_path), f"file://{tmp_path}/uri", "memory://bucket"):
        path = files.join(folder, "t.parquet")
        files.write_parquet_whole(path, table)
        assert files.exists(path)
        assert files.read_parquet(path).equals(table)
        assert files.read_parquet(path, ["b"]).column_names == ["b"]
        assert files.read_parquet_schema(path).names == ["a", "b"]
        assert files.list_files(folder, ".parquet") == [path]


def test_missing_file_raises_as_open_does(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "none")
    assert not files.exists(tmp_path / "none")
