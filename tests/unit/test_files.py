"""Writes are whole or not at all, listings leave bookkeeping out."""

import errno
import io
import os

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load, save

from vaemo import files
from vaemo.errors import StorageError, UsageError


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.json"
    files.write_json(path, {"kept": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=r"storage failed at .*/a.json: disk full. No file is half written"):
        files.write_json(path, {"lost": 2})
    assert files.read_json(path) == {"kept": 1}
    assert os.listdir(path.parent) == ["a.json"]


def test_names_that_are_no_utf8_are_listed(tmp_path):
    (tmp_path / "k=1").mkdir()
    for folder in (tmp_path, tmp_path / "k=1"):
        with open(os.fsencode(folder) + b"/\xe4.wav", "wb"):
            pass
    assert len(files.list_files(tmp_path, recursive=True)) == len(files.list_partitioned(tmp_path)) == 2


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


def test_a_folder_made_while_it_is_listed_is_listed(tmp_path):
    folder = tmp_path / "folder"

    class Filesystem(pafs.LocalFileSystem):
        def get_file_info(self, selector):
            if not folder.exists():
                files.write_whole(folder / "a.parquet", b"x")
                raise FileNotFoundError(f"Cannot list directory '{folder}'")  # pyarrow's words
            return super().get_file_info(selector)

    (info,) = files._infos(Filesystem(), pafs.FileSelector(str(folder), allow_not_found=True))
    assert info.base_name == "a.parquet"


def test_what_is_no_folder_is_refused(tmp_path):
    files.write_whole(tmp_path / "a.wav", b"x")
    with pytest.raises(UsageError, match=r"a\.wav is a file; a folder is needed"):
        files.list_files(tmp_path / "a.wav")


def test_a_uri_that_nothing_reads_is_refused():
    with pytest.raises(UsageError, match=r"'s4://bucket/a' cannot be reached \(Protocol not known: s4\); give a path"):
        files.exists("s4://bucket/a")


def test_json_that_is_damaged_is_refused(tmp_path):
    files.write_whole(tmp_path / "a.json", b'{"kept": ')
    with pytest.raises(StorageError, match=r"a\.json is not JSON \(Expecting value.*Restore the original file"):
        files.read_json(tmp_path / "a.json")


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


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    whole = torch.arange(-6, 6).reshape(3, 4)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    kinds += (torch.int8, torch.uint8, torch.bool)
    tensors = {str(kind): whole.to(kind) for kind in kinds}
    tensors |= {"turned": whole.T, "row": whole[1], "empty": whole[:0], "number": torch.tensor(2.5), "ü": torch.ones(1)}
    tensors["trained"] = torch.nn.Parameter(torch.ones(2))
    for folder in (str(tmp_path), "memory://tensors"):
        path = files.join(folder, "deep", "a.safetensors")
        files.write_safetensors(path, tensors, {"said": "ä\n"})
        content = files.read_bytes(path)
        found = load(content)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert files.safetensors_metadata(content) == {"said": "ä\n"}
    assert files.safetensors_metadata(save({"a": torch.ones(1)})) == {}


def test_tensors_too_many_for_the_disk_leave_nothing(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, piece):
            raise OSError(errno.ENOSPC, "No space left on device")

    files.write_safetensors(tmp_path / "a", {"a": torch.zeros(1)})
    monkeypatch.setattr("builtins.open", lambda path, mode: Full())
    with pytest.raises(StorageError, match=rf"storage failed at {tmp_path}/a: .*No space left on device"):
        files.write_safetensors(tmp_path / "a", {"a": torch.ones(1)})
    monkeypatch.undo()
    assert torch.equal(load(files.read_bytes(tmp_path / "a"))["a"], torch.zeros(1))


@pytest.mark.parametrize(
    ("path", "below"),
    [
        ("{root}/a.wav", True),
        ("{root}/deep/../a.wav", True),
        ("file://{root}/a.wav", True),
        ("{root}/inside", True),
        ("{root}/../other/a.wav", False),
        ("{root}/outside", False),
        ("file://{root}/../other/a.wav", False),
        ("{root}", False),
        ("{root}-2/a.wav", False),
        ("s3://bucket/a.wav", False),
    ],
)
def test_what_lies_below_a_folder(tmp_path, path, below):
    root = tmp_path / "root"
    (tmp_path / "other").mkdir()
    (root / "deep").mkdir(parents=True)
    (root / "inside").symlink_to(root / "deep")
    (root / "outside").symlink_to(tmp_path / "other" / "a.wav")
    assert files.lies_below(path.format(root=root), root) == below


@pytest.mark.parametrize(
    ("path", "below"),
    [
        ("s3://bucket/in/a.wav", True),
        ("s3://bucket/in/../a.wav", False),
        ("s3://bucket/in/a.wav?endpoint_override=elsewhere", False),
        ("s3://bucket/in/a.wav#b", False),
        ("s3://bucket/in/a::file:///etc/passwd", False),
        ("s3://bucket/inside/a.wav", False),
        ("/in/a.wav", False),
    ],
)
def test_what_lies_below_a_prefix(path, below):
    assert files.lies_below(path, "s3://bucket/in/") == below


def test_missing_file_raises_as_open_does(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "none")
    assert not files.exists(tmp_path / "none")


def test_deleting(tmp_path):
    files.write_whole(tmp_path / "a", b"x")
    files.delete(tmp_path / "a")
    assert not files.exists(tmp_path / "a")
    with pytest.raises(StorageError, match=r"storage failed.*/a"):
        files.delete(tmp_path / "a")
