import json
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from vaemo.data.manifest import COLUMNS, read_manifest, write_manifest
from vaemo.errors import ReadManifestError


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
        line("e", "by_line"),
        line("f", "by_line"),
        line("g", "half_timed", position=4),
        line("h", "half_timed", position=2, start_s=9.0),
    ]
    table = read_manifest(written(rows))
    assert table["utt_id"].to_pylist() == ["b", "a", "d", "c", "e", "f", "h", "g"]
    assert table["position"].to_pylist() == [3, 7, 0, 1, 0, 1, 2, 4]


@pytest.mark.parametrize("name", ["position", "start_s"])
def test_a_session_whose_order_is_said_in_part_is_refused(written, name):
    rows = [line("a", "s1"), line("b", "s2", **{name: 1}), line("c", "s2"), line("d", "s2", **{name: 3})]
    with pytest.raises(ReadManifestError, match=rf"line 3: session 's2' has no {name} in this row"):
        read_manifest(written(rows))


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


def test_embedded_audio_is_bytes_of_any_layout(tmp_path):
    path = tmp_path / "m.parquet"
    place = pa.Table.from_pylist([line("a"), line("b")]).drop_columns("audio_path")
    for held in (
        pa.array([b"x", None], pa.large_binary()),
        pa.array([{"bytes": b"x", "path": "x.wav"}, {"bytes": None, "path": "y.wav"}]),
    ):
        pq.write_table(place.append_column("audio", held), path)
        with pytest.raises(ReadManifestError, match="row 2: lacks the key 'audio_path'"):
            read_manifest(path)
        pq.write_table(place.append_column("audio", held).slice(0, 1), path)
        assert read_manifest(path)["audio_path"].to_pylist() == [f"{path}#0"]
    for held in (pa.array(["a.wav", "b.wav"]), pa.array([[0.5], [0.1]]), pa.array([True, False])):
        pq.write_table(place.append_column("audio", held), path)
        with pytest.raises(ReadManifestError, match=r"m.parquet: column audio is .*; it must be the bytes of"):
            read_manifest(path)


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
    rows = [line("ä", valence=1.5, split="train", extra=1), line("b", "t", start_s=1.0, end_s=2.25, extra=None)]
    table = read_manifest(written(rows))
    write_manifest(tmp_path / name, table)
    again = read_manifest(tmp_path / name)
    assert again.select(table.column_names).to_pylist() == table.to_pylist()


BROKEN = {
    "utt_id 'a' is already in line 1": [line("a"), line("b"), line("a")],
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
    "line 2: is a list; one JSON object": [line("a"), "[1]"],
    "line 1: is not JSON": ['[{"utt_id": "a"},'],
    "line 2: is null; one JSON object": [line("a"), "null"],
    "line 1: is null; one JSON object": ["null", line("a")],
    "line 1: is not JSON in UTF-8 .Extra data": [json.dumps(line("a")) + ",", line("b")],
    "line 1: is not JSON in UTF-8 .Extra": [json.dumps(line("a")) + json.dumps(line("b"))],
    "line 2: has the key 'utt_id' twice": ["", '{"utt_id": "a", "utt_id": "b"}'],
    "line 1: has the key 'x' twice": [json.dumps(line("a", call={"x": 1})).replace('"x": 1', '"x": 1, "x": 2')],
    "line 1: holds half a character": [line("a", role="\ud800")],
    "line 1: is not JSON in UTF-8 .its values are nested too deeply.;": [
        '{"extra": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ],
    "line 2: valence is 'high'; it must be a number": [line("a", valence=2), line("b", valence="high")],
    "line 2: valence is '3,5'; it must be a number, its decimals behind a point": [line("a"), line("b", valence="3,5")],
    "line 1: end_s is Infinity; it must be a number from": [line("a", end_s=float("inf"))],
    r"line 1: start_s is 1e\+300; it must be a number from": [line("a", start_s=1e300)],
    r"line 1: start_s is 1700000000000.0; it must be": [line("a", start_s=1_700_000_000_000)],
    r"line 1: valence is -Infinity": [line("a", valence=-float("inf"))],
    "line 1: channel is 1000000.0; it must be a whole number from 0 to 1,023": [line("a", channel=1_000_000)],
    r"line 1: position is 1e\+30; it must be a whole number": [line("a", position=10**30)],
    'line 1: channel is {"a": 1}; it must be': [line("a", channel={"a": 1})],
    "line 1: utt_id is 1.5; it must be text or a whole number": [line(1.5)],
    "line 1: utt_id is true; it must be text": [line(True)],
    r"line 1: utt_id is 'a\\u0000', which holds a NUL": [line("a\0")],
    r"line 1: audio_path is 'a\\u0000.wav', which holds a NUL": [line("a") | {"audio_path": "a\0.wav"}],
    "line 1: channel is 0.5; it must be a whole number": [line("a", channel=0.5)],
    "line 1: start_s is true; it must be a number": [line("a", start_s=True)],
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
    with pytest.raises(ReadManifestError, match=r"row 2: end_s is 1.0"):
        read_manifest(written([line("a", start_s=0.0, end_s=1.0), line("b", start_s=2.0, end_s=1.0)], "m.parquet"))


def test_a_parquet_column_of_another_type_is_refused(written):
    with pytest.raises(ReadManifestError, match="column utt_id is bool; it must be text"):
        read_manifest(written([line(True)], "m.parquet"))
    with pytest.raises(ReadManifestError, match="row 1: channel is 'left'; it must be a whole number"):
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
    (tmp_path / "u.jsonl").write_text(json.dumps(line("a")), encoding="utf-16")
    with pytest.raises(ReadManifestError, match=r"u.jsonl is text in UTF-16; give JSON Lines in UTF-8"):
        read_manifest(tmp_path / "u.jsonl")
    pd.DataFrame([line("a")]).to_pickle(tmp_path / "m.pkl")
    with pytest.raises(ReadManifestError, match=r"m.pkl is a pickle; give JSON Lines"):
        read_manifest(tmp_path / "m.pkl")
    feather.write_feather(pa.Table.from_pylist([line("a")]), str(tmp_path / "f.parquet"))
    with pytest.raises(ReadManifestError, match=r"f.parquet is not a Parquet file .Arrow IPC"):
        read_manifest(tmp_path / "f.parquet")
    (tmp_path / "m.csv").write_text("utt_id,session_id\na,b\n")
    with pytest.raises(ReadManifestError, match=r"m.csv, line 1: is not JSON"):
        read_manifest(tmp_path / "m.csv")


SAME = {
    "whole floats, as pandas writes ints with gaps": [line("a", channel=0.0, position=1.0), line("b", position=2.0)],
    "whole numbers as ids": [line(7, 12, speaker_id=3), line(8, 12, speaker_id=3)],
    "ids that are numbers and text": [line(7, 12), line("x", "12")],
    "whole floats as ids": [line("a", 12.0, fold=1.0), line("b", 12.0, fold=None)],
    "numbers as text": [line("a", valence="3.5", channel="1", end_s=" 2e1 "), line("b", valence="", channel="0")],
    "empty text": [line("a", role="", split="", fold=""), line("b", role="agent", split="dev", fold="x")],
}


@pytest.mark.parametrize("what", SAME)
def test_json_lines_and_parquet_mean_the_same(written, what):
    rows = SAME[what]
    expected = read_manifest(written(rows))
    # One line that Arrow's own reader does not take sends all of them the exact way.
    exact = read_manifest(written([*rows, line("z", "z", far=10**30)]))
    assert exact.slice(0, 2).select(expected.column_names).to_pylist() == expected.to_pylist()
    if what != "ids that are numbers and text":
        assert read_manifest(written(rows, "m.parquet")).to_pylist() == expected.to_pylist()
    ids = [
        str(int(value) if isinstance(value, float) else value) for value in (rows[0]["utt_id"], rows[0]["session_id"])
    ]
    assert [expected["utt_id"][0].as_py(), expected["session_id"][0].as_py()] == ids
    assert [field.type for field in expected.schema] == list(COLUMNS.values())


def test_what_pandas_writes_is_read(tmp_path):
    frame = pd.DataFrame([line(3, 7, channel=0, split="dev"), line(4, 8, split=None)])
    assert frame["channel"].dtype == float
    frame.to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    frame.astype({"split": "category"}).to_parquet(tmp_path / "m.parquet")
    for name in ("m.jsonl", "m.parquet"):
        table = read_manifest(tmp_path / name)
        assert table.select(["utt_id", "session_id", "channel", "split"]).to_pylist() == [
            {"utt_id": "3", "session_id": "7", "channel": 0, "split": "dev"},
            {"utt_id": "4", "session_id": "8", "channel": None, "split": None},
        ]


def test_other_columns_travel_whatever_they_hold(written, tmp_path):
    held = {
        "mixed": [1, "x", None, {"a": [1.5]}, True],
        "date": ["2026-01-01", "2026-01-02", None, "x", ""],
        "large": [12345678901234567890, 1, None, 2, 3],
        "empty": [{}, {}, None, {}, {}],
        "nested": [{"at": "2026-01-01"}, None, {"at": None}, {"at": "x"}, {}],
        "number": [1, 2.5, None, -1, 0],
    }
    rows = [line(str(n), **{name: values[n] for name, values in held.items()}) for n in range(5)]
    for these in (rows, [{**row, "mixed": None} for row in rows]):
        table = read_manifest(written(these))
        assert table["date"].to_pylist() == held["date"]
        assert table["number"].to_pylist() == held["number"]
        assert table["large"].to_pylist() == ["12345678901234567890", "1", None, "2", "3"]
        assert table["empty"].to_pylist() == ["{}", "{}", None, "{}", "{}"]
        assert table["nested"].to_pylist() == [{"at": "2026-01-01"}, None, {"at": None}, {"at": "x"}, {"at": None}]
        write_manifest(tmp_path / "w.parquet", table)
        assert read_manifest(tmp_path / "w.parquet").to_pylist() == table.to_pylist()
    assert read_manifest(written(rows))["mixed"].to_pylist() == ["1", "x", None, '{"a": [1.5]}', "true"]


def test_columns_that_are_named_as_a_stream_are_left_to_extraction(written):
    rows = [line("a", speaker="Ann", prosody=[1.0], call=1)]
    for name in ("m.jsonl", "m.parquet"):
        assert read_manifest(written(rows, name)).column_names == [*COLUMNS, "call"]


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n \n\t\n"])
def test_lines_may_end_in_any_way_and_are_counted_as_editors_do(tmp_path, end):
    path = tmp_path / "m.jsonl"
    path.write_bytes(end.join(json.dumps(line(name)).encode() for name in "abc"))
    assert read_manifest(path)["utt_id"].to_pylist() == ["a", "b", "c"]
    path.write_bytes(path.read_bytes().replace(b'"c"', b'"a"'))
    number = 1 + 2 * len(end.splitlines())
    with pytest.raises(ReadManifestError, match=rf"line {number}: utt_id 'a' is already in line 1"):
        read_manifest(path)


def test_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(
        b"\n".join([json.dumps(line("a")).encode(), json.dumps(line("b", role="?")).encode().replace(b"?", b"\xe4")])
    )
    with pytest.raises(ReadManifestError, match="line 2: is not JSON in UTF-8"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(ReadManifestError, match="it is not packed by gzip, as its name says"):
        read_manifest(tmp_path / "m.jsonl.gz")
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xe4"]).buffers())
    table = pa.Table.from_pylist([line("a"), line("b")]).append_column("role", wrong)
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(ReadManifestError, match=r"row 2: role is .*xe4', which is not UTF-8"):
        read_manifest(tmp_path / "m.parquet")


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
    with pytest.raises(ReadManifestError, match=r"row 2: audio_path leads to .*b.wav'"):
        read_manifest(path, root=str(tmp_path / "in"))
    rows[1]["audio_path"] = f"{tmp_path}/other.parquet#0"
    with pytest.raises(ReadManifestError, match=r"row 2: audio_path leads to .*other.parquet#0'"):
        read_manifest(written(rows, "m.parquet"), root=str(tmp_path / "in"))
    assert read_manifest(written(rows[:1], "m.parquet"), root=str(tmp_path / "in")).num_rows == 1
