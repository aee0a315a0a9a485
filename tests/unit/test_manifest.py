import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.errors import ReadManifestError
from vaemo.manifest import COLUMNS, read_manifest, write_manifest


def line(utt_id, session_id="s", **others):
    return {"utt_id": utt_id, "session_id": session_id, "speaker_id": "p", "audio_path": "a.wav", **others}


@pytest.fixture
def written(tmp_path):
    def write(rows, name="m.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_columns_are_typed_and_absent_ones_null(written, name):
    table = read_manifest(written([line("a", valence=3, start_s=1, end_s=2, channel=1, fold=4)], name))
    assert table.column_names == list(COLUMNS)
    assert {field.name: field.type for field in table.schema} == COLUMNS
    row = table.to_pylist()[0]
    assert (row["valence"], row["start_s"], row["channel"], row["fold"]) == (3.0, 1.0, 1, "4")
    assert row["arousal"] is None
    assert row["role"] is None


def test_unknown_keys_travel_along(written):
    rows = [line("a", call={"queue": "x"}, when="2026-01-01"), line("b", call={"queue": "y"}, when="2026-01-02")]
    table = read_manifest(written(rows))
    assert table["call"].to_pylist() == [{"queue": "x"}, {"queue": "y"}]


def test_ids_that_look_like_dates_stay_text(written):
    table = read_manifest(written([line("2026-01-01", "2026-01-02 10:00:00")]))
    assert table["utt_id"].to_pylist() == ["2026-01-01"]
    assert table["session_id"].to_pylist() == ["2026-01-02 10:00:00"]


def test_sessions_are_brought_together_in_order_of_their_first_line(written):
    table = read_manifest(written([line("a", "s1"), line("b", "s2"), line("c", "s1"), line("d", "s2")]))
    assert table["utt_id"].to_pylist() == ["a", "c", "b", "d"]
    assert table["position"].to_pylist() == [0, 1, 0, 1]


def test_order_in_a_session_is_position_then_start_then_lines(written):
    rows = [
        line("a", "by_position", position=7, start_s=0.0),
        line("b", "by_position", position=3, start_s=9.0),
        line("c", "by_start", start_s=5.0),
        line("d", "by_start", start_s=2.0),
        line("e", "by_line", start_s=5.0),
        line("f", "by_line"),
        line("g", "half_positioned", position=4, start_s=2.0),
        line("h", "half_positioned", start_s=1.0),
    ]
    table = read_manifest(written(rows))
    assert table["utt_id"].to_pylist() == ["b", "a", "d", "c", "e", "f", "h", "g"]
    assert table["position"].to_pylist() == [3, 7, 0, 1, 0, 1, 0, 1]


def test_order_agrees_with_a_plain_sort(written):
    rng = np.random.default_rng(0)
    rows = [
        line(f"u{i}", f"s{rng.integers(20)}", start_s=float(rng.integers(30)), end_s=float(40 + i)) for i in range(500)
    ]
    first = {}
    for row in rows:
        first.setdefault(row["session_id"], len(first))
    expected = sorted(rows, key=lambda row: (first[row["session_id"]], row["start_s"]))
    assert read_manifest(written(rows))["utt_id"].to_pylist() == [row["utt_id"] for row in expected]


def test_relative_paths_belong_to_the_manifest(written, tmp_path):
    paths = ["x/a.wav", "/abs/b.wav", "s3://bucket/c.wav", "file:///d.wav"]
    table = read_manifest(written([line(str(i)) | {"audio_path": path} for i, path in enumerate(paths)]))
    assert table["audio_path"].to_pylist() == [str(tmp_path / "x/a.wav"), *paths[1:]]


def test_relative_paths_of_a_remote_manifest_keep_its_address(written):
    path = written([line("a")])
    table = read_manifest(f"file://{path}")
    assert table["audio_path"].to_pylist() == [f"file://{path.parent}/a.wav"]


def test_embedded_audio_is_pointed_to_and_not_read(tmp_path):
    path = tmp_path / "m.parquet"
    rows = [line("a") | {"audio": b"x" * 10}, line("b") | {"audio": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    table = read_manifest(path)
    assert table["audio_path"].to_pylist() == [f"{path}#0", str(tmp_path / "a.wav")]
    assert "audio" not in table.column_names


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_nan_is_no_label(written, name):
    path = written([line("a", valence=float("nan"), arousal=2.0)], name)
    assert read_manifest(path, label_range=(1, 5))["valence"].to_pylist() == [None]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line("a")).encode() + b"\r\n\r\n" + json.dumps(line("b")).encode())
    assert read_manifest(path).num_rows == 2


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_what_is_written_is_read_again(written, tmp_path, name):
    rows = [line("ä", valence=1.5, split="train", extra=1), line("b", start_s=1.0, end_s=2.25, extra=None)]
    table = read_manifest(written(rows))
    write_manifest(tmp_path / name, table)
    again = read_manifest(tmp_path / name)
    assert again.select(table.column_names).to_pylist() == table.to_pylist()


BROKEN = {
    "utt_id 'a' already stands in line 1": [line("a"), line("b"), line("a")],
    "line 3: utt_id": [line("a"), line("b"), line("a")],
    "line 2: lacks the key 'speaker_id'": [line("a"), dict.fromkeys(("utt_id", "session_id", "audio_path"), "x")],
    "line 1: lacks the key 'utt_id'": [line("")],
    "line 2: end_s is 1.0, not after start_s, which is 2.0": [line("a"), line("b", start_s=2.0, end_s=1.0)],
    "line 1: end_s is 0.0, not after start_s, which is 0.0": [line("a", end_s=0.0)],
    "line 1: start_s is -1.0": [line("a", start_s=-1.0)],
    "line 1: channel is -1": [line("a", channel=-1)],
    "line 1: split is 'Test1'": [line("a", split="Test1")],
    r"line 2: valence is 7.5, outside the range \[1, 7\]": [line("a", valence=7.0), line("b", valence=7.5)],
    "line 1: observed_arousal is 0.0, outside": [line("a", observed_arousal=0.0)],
    "line 2: is not JSON in UTF-8": [line("a"), '{"utt_id": '],
    "line 2: is list; one JSON object": [line("a"), "[1]"],
    'line 2: valence is "high"; it must be a number': [line("a", valence=2), line("b", valence="high")],
    "line 1: utt_id is 7; it must be text": [line(7)],
    "line 1: channel is 0.5; it must be a whole number": [line("a", channel=0.5)],
    "line 1: start_s is true; it must be a number": [line("a", start_s=True)],
    "each key of one type": [line("a", extra=1), line("b", extra="x")],
    "is empty; it needs one utterance a line": ["", " "],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_mistake_is_one_error_that_names_the_line(written, message):
    with pytest.raises(ReadManifestError, match=message):
        read_manifest(written(BROKEN[message]), label_range=(1, 7))


def test_line_numbers_count_blank_lines(written):
    with pytest.raises(ReadManifestError, match="line 3: lacks the key 'session_id'"):
        read_manifest(written([line("a"), "", json.dumps({"utt_id": "b"})]))


def test_a_mistake_in_parquet_names_the_row(written):
    with pytest.raises(ReadManifestError, match=r"row 1: end_s is 1.0"):
        read_manifest(written([line("a", start_s=0.0, end_s=1.0), line("b", start_s=2.0, end_s=1.0)], "m.parquet"))


def test_a_parquet_column_of_another_type_is_refused(written):
    with pytest.raises(ReadManifestError, match="column utt_id is int64; it must be text"):
        read_manifest(written([line(7)], "m.parquet"))
    with pytest.raises(ReadManifestError, match="column channel must be a whole number"):
        read_manifest(written([line("a", channel="left")], "m.parquet"))


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(ReadManifestError, match="there is no manifest"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ReadManifestError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ReadManifestError, match="is not a Parquet file"):
        read_manifest(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist([line("a")]).slice(0, 0), tmp_path / "e.parquet")
    with pytest.raises(ReadManifestError, match="is empty"):
        read_manifest(tmp_path / "e.parquet")


def test_reading_does_not_loop_over_rows(tmp_path):
    n = 200_000
    index = np.arange(n)
    table = pa.table(
        {
            "utt_id": [f"u{i}" for i in index],
            "session_id": [f"s{i}" for i in index // 20],
            "speaker_id": [f"p{i % 7}" for i in index],
            "audio_path": [f"x/{i // 20}.wav" for i in index],
            "start_s": (index % 20).astype(float),
            "end_s": (index % 20) + 0.9,
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    start = time.process_time()
    assert read_manifest(tmp_path / "m.parquet").num_rows == n
    # A fifth of a million; a loop over rows in Python takes ten times as long.
    assert time.process_time() - start < 3.0


def test_audio_outside_the_root_is_refused_with_its_line(written, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "leads_out.wav").symlink_to("/etc/passwd")
    inside = [line("a", audio_path="in/a.wav"), line("b", audio_path=f"{tmp_path}/in/../in/b.wav")]
    root = str(tmp_path / "in")
    assert read_manifest(written(inside), root=root).num_rows == 2
    for path in ("a.wav", "in/../a.wav", "/etc/passwd", "file:///etc/passwd", "in/leads_out.wav", "s3://b/in/a.wav"):
        rows = [*inside, line("c", audio_path=path)]
        with pytest.raises(ReadManifestError, match=r"m.jsonl, line 3: audio_path leads to .*, outside extract.root,"):
            read_manifest(written(rows), root=root)
        assert read_manifest(written(rows)).num_rows == 3


def test_what_a_manifest_holds_lies_inside_any_root(written, tmp_path):
    rows = [line("a", audio=b"sound") | {"audio_path": None}, line("b", audio=None) | {"audio_path": "b.wav"}]
    path = written(rows, "m.parquet")
    with pytest.raises(ReadManifestError, match=r"row 1: audio_path leads to .*b.wav'"):
        read_manifest(path, root=str(tmp_path / "in"))
    rows[1]["audio_path"] = f"{tmp_path}/other.parquet#0"
    with pytest.raises(ReadManifestError, match=r"row 1: audio_path leads to .*other.parquet#0'"):
        read_manifest(written(rows, "m.parquet"), root=str(tmp_path / "in"))
    assert read_manifest(written(rows[:1], "m.parquet"), root=str(tmp_path / "in")).num_rows == 1
