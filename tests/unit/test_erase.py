"""A call is erased from everything that holds a trace of it: every file is searched afterwards."""

import gzip
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from score_rows import make_utterances

from vaemo import files, scores
from vaemo.config import ScoreConfig
from vaemo.errors import UsageError
from vaemo.parts.index import Index
from vaemo.parts.shards import tag_keys
from vaemo.scoring import tend
from vaemo.scoring.erase import Tombstones
from vaemo.scoring.ids import KEY_VARIABLE, IdKey
from vaemo.trust.fit import FIT

KEY = "correct horse battery"
GONE = ("call-2", "call-5")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def write_scores(out, *, hide=False):
    """Seven calls of as many days, in two parts."""
    everything = make_utterances()
    everything = everything.append_column(
        "date", pc.binary_join_element_wise("2026-11-2", pc.utf8_slice_codeunits(everything["session_id"], 5), "")
    )
    key = IdKey(KEY)
    files.write_json(f"{out}/{scores.PROVENANCE}", {"settings": {"id_key": key.check if hide else None}})
    with Index.open(f"{out}/utterances"):
        for number, names in enumerate((range(4), range(4, 7))):
            ids = [f"call-{name}" for name in names]
            rows = everything.filter(pc.is_in(everything["session_id"], pa.array(ids)))
            shown = [key.hash(name) if hide else name for name in ids]
            # Older versions noted sessions of the same part of a store, whose rows are in another part of the scores.
            stamps = {key.hash(name) if hide else name: [[1]] for name in (ids[0], "call-1", "call-2")}
            tagged = tag_keys(key.hide(rows) if hide else rows, [f"{name}\tx" for name in shown], stamps)
            scores.write_part(str(out), f"part-{number}.parquet", tagged, ScoreConfig(), ["date"])
    Index.open(f"{out}/utterances").close()
    files.write_json(f"{out}/summary.json", {"exit_code": 1, "error": "session 'call-5' has been changed"})


def write_run(run):
    """A training with folds: of the first fold the checkpoint has seen both calls, of the other none."""
    write_scores(run / "oof")
    for fold, seen in (("fold-0", [*GONE, "call-1"]), ("fold-1", ["call-1"])):
        (run / fold / "best").mkdir(parents=True)
        table = pa.table({"session_id": seen, "utt_id": [f"{name}#0" for name in seen], "split": ["train"] * len(seen)})
        files.write_parquet_whole(f"{run}/{fold}/used.parquet", table)
        voices = pa.table({"session_id": seen, "speaker_id": seen, "speaker": [[1.0, 2.0]] * len(seen)})
        files.write_parquet_whole(f"{run}/{fold}/speakers.parquet", voices)
        files.write_parquet_whole(f"{run}/{fold}/_state/rows.parquet", table)
        files.write_whole(f"{run}/{fold}/failure.txt", f"VaemoError: session '{seen[0]}' has no voice".encode())


def everything_in(folder):
    """The bytes of every file, and what is in the tables, with their names."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path] = path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path, partitioning=None)
                found[path] += (str(table.to_pylist()) + str(table.schema.metadata)).encode()
    return found


@pytest.mark.parametrize("by", ["session", "sessions", "table", "packed", "before"])
@pytest.mark.parametrize("hide", [False, True], ids=["plain", "hidden"])
def test_no_file_names_an_erased_call(tmp_path, capsys, by, hide):
    world = tmp_path / "world"
    write_scores(world / "scores", hide=hide)
    shown = scores.read_utterances(f"{world}/scores")["session_id"].unique().to_pylist()
    files.write_json(f"{world}/scores/{FIT}", {"n_calls": 7, "most": shown, "least": shown[::-1]})
    write_run(world / "run")
    write_scores(world / "store")
    speakers = ["call-2", "call-2#c0", "call-2#c1v0f2", "agent", "call-6#c0"]
    enrolled = pa.table({"speaker_id": speakers, "speaker": [[1.0]] * len(speakers)})
    files.write_parquet_whole(f"{world}/speakers.parquet", enrolled)
    (tmp_path / "ids.txt").write_text("call-2\n\n call-5 \n")
    (tmp_path / "ids.csv").write_text("session_id\ncall-2\ncall-5\n")
    (tmp_path / "ids.tsv.gz").write_bytes(gzip.compress(b"session_id\tqueue\ncall-2\ta\ncall-5\tb\n"))
    gone = GONE if by != "before" else ("call-0", "call-1", "call-2")
    named = {
        "session": ["--session", "call-2", "--session", "call-5"],
        "sessions": ["--sessions", str(tmp_path / "ids.txt")],
        "table": ["--sessions", str(tmp_path / "ids.csv")],
        "packed": ["--sessions", str(tmp_path / "ids.tsv.gz")],
        "before": ["--before", "2026-11-23"],
    }[by]
    places = [
        "--store",
        f"{world}/store",
        "--run",
        f"{world}/run",
        "--speakers",
        f"{world}/speakers.parquet",
    ]
    tend.main(["erase", *named, "--scores", f"{world}/scores", *places])
    told = capsys.readouterr().out
    assert f"{world}/run/fold-0/best was trained on what was erased" in told
    assert (f"{world}/run/fold-1/best was trained" in told) == (by == "before")
    hashes = [IdKey(KEY).hash(name) for name in gone]
    for path, content in everything_in(world).items():
        assert not any(name.encode() in content for name in gone), path
        if path.name != "_erased.json":
            assert not any(name.encode() in content for name in hashes), path
    assert Tombstones.read(f"{world}/scores").hashes == set(hashes)
    kept = scores.read_utterances(f"{world}/scores")["session_id"].unique().to_pylist()
    assert len(kept) == 7 - len(gone)
    assert len(files.read_json(f"{world}/scores/{FIT}")["most"]) == 7 - len(gone)
    assert pq.read_table(f"{world}/speakers.parquet")["speaker_id"].to_pylist() == ["agent", "call-6#c0"]
    entries = Index.open(f"{world}/scores/utterances").entries.values()
    assert sum(len(json.loads(entry.keys)) for entry in entries) == 7 - len(gone)


def test_nothing_is_erased_by_an_unclear_command(tmp_path):
    write_scores(tmp_path / "scores")
    before = everything_in(tmp_path)
    with pytest.raises(UsageError, match="no call is named"):
        tend.main(["erase", "--scores", f"{tmp_path}/scores"])
    with pytest.raises(SystemExit):
        tend.main(["erase", "--scores", f"{tmp_path}/scores", "--before", "last week"])
    undated = scores.read_utterances(f"{tmp_path}/scores").drop_columns(["date"])
    files.write_json(f"{tmp_path}/undated/{scores.PROVENANCE}", {})
    scores.write_part(f"{tmp_path}/undated", "part-0.parquet", undated, ScoreConfig())
    with pytest.raises(UsageError, match="has no column date"):
        tend.main(["erase", "--scores", f"{tmp_path}/undated", "--before", "2026-11-23"])
    german = undated.append_column("date", pa.array(["24.10.2026"] * len(undated)))
    files.write_json(f"{tmp_path}/german/{scores.PROVENANCE}", {})
    scores.write_part(f"{tmp_path}/german", "part-0.parquet", german, ScoreConfig(), ["date"])
    with pytest.raises(UsageError, match=r"the date of the call 'call-\d' is '24\.10\.2026', not a day such as"):
        tend.main(["erase", "--scores", f"{tmp_path}/german", "--before", "2026-11-23", "--session", "call-1"])
    assert scores.read_utterances(f"{tmp_path}/german").num_rows == len(german)
    assert not Tombstones.read(f"{tmp_path}/german").hashes
    assert {path: content for path, content in everything_in(tmp_path).items() if path in before} == before


def test_all_copies_of_an_erased_call_go_with_it_whichever_they_name(tmp_path):
    for number, pairs in enumerate(([("b", None)], [("a", "b")], [("c", "a"), ("x", None), ("z", "y")])):
        ids, firsts = (pa.array(column, pa.string()) for column in zip(*pairs, strict=True))
        table = pa.table({"session_id": ids, "duplicate_of": firsts})
        files.write_parquet_whole(f"{tmp_path}/utterances/part-{number}.parquet", table)
    tend.main(["erase", "--session", "b", "--scores", str(tmp_path)])
    assert Tombstones.read(str(tmp_path)).hashes == {IdKey(KEY).hash(name) for name in "abc"}
    rest = [pq.read_table(path)["session_id"].to_pylist() for path in sorted(tmp_path.rglob("*.parquet"))]
    assert rest == [[], [], ["x", "z"]]


@pytest.mark.parametrize(("option", "kind"), [("--scores", "scores"), ("--store", "features"), ("--run", "run")])
def test_a_folder_of_something_else_is_left_alone(tmp_path, option, kind):
    write_scores(tmp_path / "scores")
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "call-2.wav").write_bytes(b"RIFF")
    if kind != "run":
        files.write_parquet_whole(f"{tmp_path}/calls/calls.parquet", pa.table({"session_id": ["call-2"]}))
    before = everything_in(tmp_path)
    given = {"--scores": f"{tmp_path}/scores", option: f"{tmp_path}/calls"}
    with pytest.raises(UsageError, match=f"calls holds no {kind}, so nothing was erased"):
        tend.main(["erase", "--session", "call-2", *(text for pair in given.items() for text in pair)])
    assert everything_in(tmp_path) == before
