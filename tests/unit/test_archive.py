"""What lies in a folder of recordings is listed once, under a name that can be written, with what is wrong with it."""

import gzip
import os
import socket
import time

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo import files
from vaemo.audio.archive import Stamp, is_still, is_table_of_paths, list_recordings
from vaemo.config import AudioConfig
from vaemo.errors import ReadRecordingsError
from vaemo.files import Found


def make(folder, *names, content=b"x"):
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def names_in(folder, **options):
    return [found.name for found in list_recordings(str(folder), **options).recordings]


def problems_in(folder, **options):
    return {found.name: found.problem for found in list_recordings(str(folder), **options).recordings if found.problem}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (b"Gespr\xe4ch.wav", r"Gespr\xe4ch.wav"),
        (b"deep\xff/a.wav", r"deep\xff/a.wav"),
        (b"tab\there.wav", r"tab\x09here.wav"),
        (b"new\nline.wav", r"new\x0aline.wav"),
        ("Gespräch 1 #2?%41.WAV".encode(), "Gespräch 1 #2?%41.WAV"),
        (b"back\\slash.wav", "back\\slash.wav"),
    ],
)
def test_any_name_is_written_and_found_again(tmp_path, name, written):
    make(tmp_path, b"plain.wav", name)
    assert names_in(tmp_path) == sorted(["plain.wav", written])
    (found,) = [found for found in list_recordings(str(tmp_path)).recordings if found.name == written]
    written.encode()
    assert os.path.samefile(os.fsencode(found.path), os.path.join(os.fsencode(tmp_path), name))
    assert Stamp.of(found.path) == Stamp(1, found.mtime_ns, Stamp.of(str(tmp_path / "plain.wav")).digest)


def test_two_files_never_share_a_name(tmp_path):
    make(tmp_path, b"a\xe4.wav", rb"a\xe4.wav")
    assert len(set(names_in(tmp_path))) == 2


def test_names_with_an_underscore_are_recordings_and_hidden_ones_are_not(tmp_path):
    make(tmp_path, "_a.wav", "_deep/b.wav", ".c.wav", ".deep/d.wav", "e.wav.part")
    assert names_in(tmp_path) == ["_a.wav", "_deep/b.wav"]


def test_what_is_passed_over_is_counted_by_suffix(tmp_path):
    make(tmp_path, "a.WAV", "b.txt", "c.TXT", "d.json", "README")
    (note,) = list_recordings(str(tmp_path)).notes
    assert note == ("passed over 4 files whose names do not end as a recording's: 2 .txt, 1 .json, 1 without a suffix")


def test_headerless_files_are_read_as_said_or_passed_over(tmp_path):
    make(tmp_path, "a.raw", "b.ulaw")
    assert names_in(tmp_path) == ["b.ulaw"]
    assert names_in(tmp_path, audio=AudioConfig(headerless="mulaw:8000")) == ["a.raw", "b.ulaw"]


def test_what_no_decoder_reads_is_a_row_with_its_reason(tmp_path):
    make(tmp_path, "a.wav", "b.nmf", "c.wav.gpg")
    assert {name: status for name, (status, _) in problems_in(tmp_path).items()} == {
        "b.nmf": "undecodable",
        "c.wav.gpg": "undecodable",
    }
    assert "NICE" in problems_in(tmp_path)["b.nmf"][1]
    assert "encrypted (OpenPGP" in problems_in(tmp_path)["c.wav.gpg"][1]


def test_links_are_followed_and_loops_are_cut(tmp_path):
    make(tmp_path / "archive", "a/b.wav", "z.wav")
    make(tmp_path / "elsewhere", "c.wav")
    archive = tmp_path / "archive"
    (archive / "a" / "up").symlink_to(archive)
    (archive / "a" / "again").symlink_to(archive / "a")
    (archive / "0-first").symlink_to(archive / "a")
    (archive / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(archive)
    assert names_in(archive) == ["a/b.wav", "outside/c.wav", "z.wav"]


def test_what_cannot_be_opened_is_a_row(tmp_path, monkeypatch):
    make(tmp_path, "a.wav", "locked/b.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "me.wav").symlink_to(tmp_path / "me.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.wav"))
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        found = problems_in(tmp_path)
    assert {name: status for name, (status, _) in found.items()} == {
        "gone.wav": "missing",
        "locked/": "unreadable",
        "me.wav": "unreadable",
        "pipe.wav": "unreadable",
        "socket.wav": "unreadable",
    }
    assert found["locked/"][1] == "the folder cannot be listed: permission denied"
    assert str(tmp_path) not in str(found)


def test_files_are_left_out_by_name_and_by_path(tmp_path):
    make(tmp_path, "a.wav", "Redacted/a.wav", "deep/Redacted/b.wav", "c_redacted_2020.wav")
    listed = list_recordings(str(tmp_path), exclude=["*Redacted/*", "*_redacted_*"])
    assert [found.name for found in listed.recordings] == ["a.wav"]
    assert listed.notes == ["left out 3 files that --exclude names"]
    assert names_in(tmp_path, exclude=["a.wav"]) == ["c_redacted_2020.wav", "deep/Redacted/b.wav"]


def test_young_files_wait(tmp_path):
    make(tmp_path, "old.wav", "new.wav")
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "old.wav", (an_hour_ago, an_hour_ago))
    assert names_in(tmp_path) == ["new.wav", "old.wav"]
    listed = list_recordings(str(tmp_path), min_age_s=60.0)
    assert [found.name for found in listed.recordings] == ["old.wav"]
    assert listed.notes == ["1 files are younger than 60 s (extract.min_age_s) and wait for the next run"]


def test_an_archive_without_recordings_says_what_is_there(tmp_path):
    make(tmp_path, "a.txt")
    with pytest.raises(ReadRecordingsError, match=r"holds no recordings to read: passed over 1 files .*: 1 \.txt\."):
        list_recordings(str(tmp_path))
    with pytest.raises(ReadRecordingsError, match="does not exist"):
        list_recordings(str(tmp_path / "none"))


def test_a_stamp_tells_a_change_by_size_then_time_then_bytes(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(bytes(range(256)) * 2000)
    stamp = Stamp.of(str(path))

    def still():
        about = path.stat()
        return is_still(str(path), about.st_size, about.st_mtime_ns, stamp)

    assert still()
    os.utime(path, ns=(5, 5))
    assert still()
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        os.utime(path, ns=(6, 6))
        assert not still()
    path.write_bytes(content + b"more")
    os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    assert not still()
    assert Stamp.of(str(tmp_path / "gone.wav")) is None


NAMES = ["a b.wav", "a#1.wav", "a?x=1.wav", "a%41.wav", "100%.wav", "ä.wav", "[x].wav"]


@pytest.mark.parametrize("boto", [True, False])
def test_names_in_a_bucket_are_taken_as_they_are(bucket, boto, monkeypatch):
    if not boto:
        monkeypatch.setattr(files, "_walk_s3", lambda uri: None)
    for name in NAMES:
        files.write_whole(f"{bucket}/in/{name}", b"hello")
    files.write_whole(f"{bucket}/in/.hidden.wav", b"hello")
    found = list_recordings(f"{bucket}/in").recordings
    assert [item.name for item in found] == sorted(NAMES)
    for item in found:
        assert (item.size, files.read_bytes(item.path)) == (5, b"hello")
        assert is_still(item.path, item.size, item.mtime_ns, Stamp.of(item.path))


def test_what_lies_in_an_archive_tier_is_known_from_the_listing(bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key, tier in (("warm", "STANDARD"), ("cold", "GLACIER"), ("deep", "DEEP_ARCHIVE"), ("instant", "GLACIER_IR")):
        client.put_object(Bucket=name, Key=f"in/{key}.wav", Body=b"x", StorageClass=tier)
    found = problems_in(f"{bucket}/in")
    assert {name: status for name, (status, _) in found.items()} == {"cold.wav": "archived", "deep.wav": "archived"}
    assert found["cold.wav"][1] == "it lies in the archive tier GLACIER; restore it, then run with --retry-failed"


def test_a_restored_object_is_read():
    assert files.archived("GLACIER", {"IsRestoreInProgress": True})[1].startswith(
        "it lies in the archive tier GLACIER; restore it, which is under way"
    )
    assert files.archived("GLACIER", {"RestoreExpiryDate": "2026-12-01"}) is None
    assert files.archived(None, {}) is None


def write_table(path, text):
    path.write_text(text)
    return str(path)


def test_a_table_of_paths_is_taken_instead_of_a_folder(tmp_path):
    table = write_table(tmp_path / "calls.csv", "session_id,path,size\n007,in/a.wav,10\n,s3://b/c d.mp3,\n")
    listed = list_recordings(table)
    assert listed.recordings == [
        Found("007", f"{tmp_path}/in/a.wav", 10),
        Found("s3://b/c d.mp3", "s3://b/c d.mp3"),
    ]
    parquet = str(tmp_path / "calls.parquet")
    pq.write_table(pa.table({"path": ["/x/a.flac", "b.txt", "c.nmf"], "session_id": [1, 2, 3]}), parquet)
    listed = list_recordings(parquet)
    assert [(item.name, item.path) for item in listed.recordings] == [
        *(("1", "/x/a.flac"), ("2", f"{tmp_path}/b.txt"), ("3", f"{tmp_path}/c.nmf"))
    ]
    assert "NICE" in listed.recordings[2].problem[1]
    assert not listed.notes
    assert is_table_of_paths(table)
    assert is_table_of_paths(parquet)
    assert not is_table_of_paths(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("calls.csv", "Session_ID; Path ;Size;;\n007;in/a.wav;10;;\n1e5;in/b.wav;;;\n"),
        ("calls.TSV", "\ufeffSESSION_ID\tPATH\tSIZE\r\n007\tin/a.wav\t10\r\n1e5\tin/b.wav\t\r\n"),
    ],
)
def test_a_table_of_paths_is_met_as_spreadsheets_write_it(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = [Found("007", f"{tmp_path}/in/a.wav", 10), Found("1e5", f"{tmp_path}/in/b.wav")]
    assert list_recordings(str(tmp_path / name)).recordings == found
    assert is_table_of_paths(str(tmp_path / name))
    # pandas writes whole numbers, of which some are missing, as floats.
    table = pa.table({"Path": ["in/a.wav", "in/b.wav"], "session_id": ["007", "1e5"], "SIZE": [10.0, float("nan")]})
    pq.write_table(table, tmp_path / "calls.parquet")
    assert list_recordings(str(tmp_path / "calls.parquet")).recordings == found


def test_every_row_of_a_table_of_paths_is_a_recording(tmp_path):
    text = "session_id,path\n a ,st.wav\n,mono.wav \n, m/RE0123\n,x/call.1\n,raw.pcm\n,.hidden.wav\n,notes.txt\n"
    listed = list_recordings(write_table(tmp_path / "calls.csv", text))
    names = [".hidden.wav", "a", "m/RE0123", "mono.wav", "notes.txt", "raw.pcm", "x/call.1"]
    assert [item.name for item in listed.recordings] == names
    assert {item.path for item in listed.recordings} == {f"{tmp_path}/{name}" for name in {*names, "st.wav"} - {"a"}}
    assert not listed.notes
    keys = write_table(tmp_path / "keys.csv", "bucket,key\nb ,c d.mp3 \n b,RE1\n")
    assert [item.path for item in list_recordings(keys).recordings] == ["s3://b/RE1", "s3://b/c d.mp3"]


def test_ids_that_look_like_nothing_are_kept(tmp_path):
    listed = list_recordings(write_table(tmp_path / "calls.csv", "session_id,path\nNA,a.wav\nnull,b.wav\n,nan.wav\n"))
    assert [item.name for item in listed.recordings] == ["NA", "nan.wav", "null"]


def test_a_key_of_another_kind_leaves_the_path(tmp_path):
    table = write_table(tmp_path / "calls.csv", "key,path\n17,a.wav\n")
    assert list_recordings(table).recordings == [Found("a.wav", f"{tmp_path}/a.wav")]


@pytest.mark.parametrize("packed", [False, True])
def test_an_inventory_of_s3_is_one(tmp_path, packed):
    times = ("2026-11-23T10:00:00.000Z", "2026-11-23T10:00:01.000Z")
    text = f'"calls","2026/a%20b%2Bc.wav","123","{times[0]}"\n"calls","2026/d.wav","7","{times[1]}"\n'
    path = tmp_path / ("inventory.csv.gz" if packed else "inventory.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    first, second = list_recordings(str(path)).recordings
    assert (first.name, first.path, first.size) == ("2026/a b+c.wav", "s3://calls/2026/a b+c.wav", 123)
    assert second.mtime_ns - first.mtime_ns == 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,size\na.wav,1\n,2\n", "row 2: it names no recording"),
        ("path\na.wav\na.wav\n", "row 2: 'a.wav' is already there"),
        ("session_id,path\nx,a.wav\nx,b.wav\n", "row 2: 'x' is already there"),
        ("path\na.wav\n./a.wav\n", r"row 2: '\./a\.wav' is the recording of row 1, 'a\.wav'"),
        ("session_id,path\nx,/d/a.wav\ny,file:///d/b/../a.wav\n", "is the recording of row 1.* drop one of them"),
        ("key\na.wav\n", "row 1: it has a key and no bucket. Give both"),
        ("bucket,key\nb,a.wav\n ,b.wav\n", "row 2: it has a key and no bucket"),
        ("path,size\na.wav,3\nb.wav,12 kB\n", "row 2: size is '12 kB'; give a whole number of bytes"),
        ("path,size\na.wav,-1\n", "row 1: size is -1"),
        ("path,Path\na.wav,b.wav\n", "has two columns 'path'"),
        ("file\na.wav\n", "has neither 'path' nor 'key'; it has file"),
        ("file,agent\na.wav,ann\n", "has neither 'path' nor 'key'; it has file, agent. Name the column"),
        ("utt_id,audio_path\nu,a.wav\n", "It is a manifest of utterances: extract takes it as --manifest"),
        ('path\n"a.wav\n', "cannot be read|names no recording|holds no recordings"),
        ('path\nb.wav\n"a.wav\nc.wav', "cannot be read: a quote is not closed"),
        ("", "cannot be read"),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ReadRecordingsError, match=message) as refused:
        list_recordings(write_table(tmp_path / "calls.csv", text))
    assert "\n" not in str(refused.value)


def test_a_single_recording_is_no_table(tmp_path):
    make(tmp_path, "a.wav")
    with pytest.raises(ReadRecordingsError, match=r"a\.wav is a single file\. Give the folder that it lies in"):
        list_recordings(str(tmp_path / "a.wav"))
