"""The table of calls: read from every format, refused where it is ambiguous."""

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from vaemo.errors import ReadManifestError
from vaemo.scoring.calls import read_calls

ROWS = [
    {"session_id": "a.wav", "role_ch0": "agent", "role_ch1": "customer", "date": "2026-11-23", "queue": "billing"},
    {"session_id": "b.wav", "role_ch0": "", "role_ch1": None, "date": "2026-11-24", "queue": None},
]


def write(folder, kind, rows=ROWS):
    path = str(folder / f"calls.{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        (folder / f"calls.{kind}").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same(tmp_path, kind):
    calls = read_calls(write(tmp_path, kind))
    assert calls.travel == ["date", "queue"]
    assert calls.roles == {"a.wav": ("agent", "customer"), "b.wav": (None, None)}
    assert calls.has_roles
    assert calls.rows["date"].to_pylist() == ["2026-11-23", "2026-11-24"]


@pytest.mark.parametrize("path", ["sub/a.wav", "/rec/sub/a.wav"])
def test_paths_may_be_whole_or_relative_to_the_folder(tmp_path, path):
    calls = read_calls(write(tmp_path, "jsonl", [{"path": path, "role_ch1": "customer"}]), "/rec/")
    assert calls.roles == {"sub/a.wav": (None, "customer")}
    assert calls.travel == []


def test_rows_are_taken_in_order_and_null_where_there_is_none(tmp_path):
    taken = read_calls(write(tmp_path, "jsonl")).take(["c.wav", "a.wav"])
    assert taken.rows["session_id"].to_pylist() == ["c.wav", "a.wav"]
    assert taken.rows["queue"].to_pylist() == [None, "billing"]
    assert taken.contains(["a.wav", "x"]).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_numbers_of_channels_may_have_leading_zeros(tmp_path, kind):
    row = {"session_id": "a", "role_ch00": "agent", "role_ch01": "customer", "role_v00": "customer"}
    calls = read_calls(write(tmp_path, kind, [row]))
    assert (calls.roles, calls.voice_roles) == ({"a": ("agent", "customer")}, {"a": ("customer",)})
    with pytest.raises(ReadManifestError, match="has two columns 'role_ch0'"):
        read_calls(write(tmp_path, kind, [{"role_ch0": "customer", **row}]))


def test_a_table_may_have_no_roles(tmp_path):
    calls = read_calls(write(tmp_path, "jsonl", [{"session_id": "a", "date": "2026-11-23T10:00:00"}]))
    assert not calls.has_roles
    assert calls.rows["date"].to_pylist() == ["2026-11-23"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"call": "a"}], "has neither session_id nor path; it has call"),
        ([{"session_id": "a"}, {"session_id": None}], "has a row without session_id"),
        ([{"session_id": "a"}, {"session_id": "a"}], "names the call 'a' more than once"),
        (
            [{"session_id": "a", "role_ch99999999": "agent"}],
            "has a column role_ch99999999; channels and voices are counted",
        ),
        ([{"session_id": "a", "valence": 0.5}], "has a column valence, which the scores have too"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, rows, message):
    with pytest.raises(ReadManifestError, match=message):
        read_calls(write(tmp_path, "jsonl", rows))


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "jsonl", "parquet"])
def test_names_of_columns_are_met_in_any_case(tmp_path, kind):
    path = tmp_path / f"calls.{kind}"
    if kind == "jsonl":
        # The number that changes into text, and `false`, as programs write them.
        path.write_text('{"Path": "1e5", "ROLE_CH0": "Customer", "n": 1}\n{"Path": "b", "Process": false, "n": "x"}\n')
    elif kind == "parquet":
        columns = {"Path": ["1e5", "b"], "ROLE_CH0": ["Customer", None], "Process": [None, False]}
        pq.write_table(pa.table(columns), path)
    else:
        mark = ";" if kind == "txt" else "\t" if kind == "tsv" else ","
        path.write_text("Path, ROLE_CH0 ,Process,,\n1e5,Customer,,,\nb,,FALSE,,\n".replace(",", mark))
    calls = read_calls(str(path))
    assert calls.roles == {"1e5": ("Customer",), "b": (None,)}
    assert calls.withheld(["1e5", "b"]).tolist() == [False, True]
    assert calls.travel == (["n"] if kind == "jsonl" else [])


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_what_cannot_be_read_is_refused(tmp_path, kind):
    with pytest.raises(ReadManifestError, match="cannot be read as Parquet, CSV or JSON Lines"):
        read_calls(str(tmp_path / f"none.{kind}"))
    (tmp_path / f"bad.{kind}").write_bytes(b"\xff\x00{")
    with pytest.raises(ReadManifestError, match="cannot be read"):
        read_calls(str(tmp_path / f"bad.{kind}"))
    if kind != "parquet":
        (tmp_path / f"excel.{kind}").write_text("path,role_ch0\na,agent\n", encoding="utf-16")
        with pytest.raises(ReadManifestError, match="it is text in UTF-16; save it as CSV in UTF-8"):
            read_calls(str(tmp_path / f"excel.{kind}"))
    if kind == "jsonl":
        (tmp_path / "deep.jsonl").write_text('{"session_id": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
        with pytest.raises(ReadManifestError, match="its values are nested too deeply"):
            read_calls(str(tmp_path / "deep.jsonl"))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    "date",
    ["23.11.2026", "11/23/2026", "20261123", 46349, "2026-11-31", "2026-11", "2026-11-23 late", "../../../e", "#N/A"],
)
def test_a_date_that_is_no_day_is_refused(tmp_path, kind, date):
    rows = [{"session_id": "a", "date": None}, {"session_id": "b", "date": date}]
    with pytest.raises(ReadManifestError, match=rf"row 2: date of the call 'b' is .*{date}.*such as 2026-11-23"):
        read_calls(write(tmp_path, kind, rows))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_days_may_have_times_behind_them_and_be_missing(tmp_path, kind):
    dates = [None, "", " ", "2026-11-23", "2026-11-23T00:30:00+02:00", "2026-11-23 23:59", " 2026-11-23 10:00:00.123Z "]
    rows = [{"session_id": str(number), "date": date} for number, date in enumerate(dates)]
    assert read_calls(write(tmp_path, kind, rows)).rows["date"].to_pylist() == [None] * 3 + ["2026-11-23"] * 4


def test_days_of_other_types_are_read(tmp_path):
    when = datetime.datetime(2026, 11, 23, 10)
    for value in (when, when.date(), when.replace(tzinfo=datetime.UTC)):
        path = write(tmp_path, "parquet", [{"session_id": "a", "date": value}])
        assert read_calls(path).rows["date"].to_pylist() == ["2026-11-23"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("said", ["#N/A", "NA", "N/A", "null", "NULL", "nan", "NaN"])
@pytest.mark.parametrize("other", ["", "true"])
def test_what_process_says_is_never_taken_for_nothing(tmp_path, kind, said, other):
    path = write(tmp_path, kind, [{"session_id": "a", "process": other}, {"session_id": "b", "process": said}])
    with pytest.raises(ReadManifestError, match=f"column process says '{said.lower()}'"):
        read_calls(path)


def test_text_that_looks_as_if_it_were_missing_is_copied(tmp_path):
    (tmp_path / "calls.csv").write_text("path,agent_id,country,csat,queue\nNA,7,NA,4,\nnull,NA,,N/A,\n")
    calls = read_calls(str(tmp_path / "calls.csv"))
    assert calls.agent_ids == {"NA": "7", "null": "NA"}
    assert calls.rows["country"].to_pylist() == ["NA", ""]
    assert calls.rows["csat"].to_pylist() == [4, None]
    assert calls.rows["queue"].null_count == 2


def test_a_table_is_read_without_threads_that_outlive_the_reading(tmp_path, monkeypatch):
    """A command that ends while such a thread holds the content is aborted."""
    threads = []
    read = pyarrow.csv.read_csv
    monkeypatch.setattr(
        pyarrow.csv,
        "read_csv",
        lambda *args, **how: threads.append(how["read_options"].use_threads) or read(*args, **how),
    )
    read_calls(write(tmp_path, "csv"))
    assert threads
    assert not any(threads)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_packed_table_is_read(tmp_path, kind):
    packed = tmp_path / f"calls.{kind}.gz"
    packed.write_bytes(gzip.compress(Path(write(tmp_path, kind)).read_bytes()))
    assert read_calls(str(packed)).roles == {"a.wav": ("agent", "customer"), "b.wav": (None, None)}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("cp1252", "byte [0-9]+ of it, in line 2, is not UTF-8; save it in UTF-8"),
        ("utf-16-le", "it is text in UTF-16; save it as CSV in UTF-8"),
        ("utf-16-be", "it is text in UTF-16; save it as CSV in UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_what_to_do(tmp_path, kind, encoding, message):
    rows = {
        "csv": "path,role_ch0\nGespr\u00e4ch.wav,agent\n",
        "jsonl": '{"path": "a"}\n{"path": "Gespr\u00e4ch.wav"}\n',
    }
    (tmp_path / f"calls.{kind}").write_text(rows[kind], encoding=encoding)
    with pytest.raises(ReadManifestError, match=message):
        read_calls(str(tmp_path / f"calls.{kind}"))


@pytest.mark.parametrize(
    ("text", "line"), [('[\n{"path": "a"}\n]', 1), ('[{"path": "a"}]', 1), ('{"path": "a"}\n"b"', 2)]
)
def test_what_is_not_one_object_a_line_is_refused(tmp_path, text, line):
    (tmp_path / "calls.json").write_text(text)
    with pytest.raises(ReadManifestError, match=f"line {line} is not one JSON object; write one a line"):
        read_calls(str(tmp_path / "calls.json"))
