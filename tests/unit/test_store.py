"""A store from anyone is read to the full contract, or refused with the file and the row."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.errors import ReadStoreError
from vaemo.store import FeatureStore, is_store, part_schema, store_info, write_part

DIM = 4


def rows(n=6, **columns):
    rng = np.random.default_rng(0)
    base = {
        "session_id": ["a", "b"] * (n // 2),
        "utt_id": [f"u{i}" for i in range(n)],
        "speech": list(rng.standard_normal((n, DIM)).astype("float32")),
    }
    return {**base, **columns}


def write(folder, columns, name="part-0.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return str(folder)


def test_minimal_store_gets_the_defaults(tmp_path):
    table = FeatureStore.open(write(tmp_path / "s", rows())).read()
    assert table.schema.equals(part_schema({"speech": DIM}))
    assert table["session_id"].to_pylist() == ["a"] * 3 + ["b"] * 3
    assert table["position"].to_pylist() == [0, 1, 2] * 2
    assert table["speaker_id"].to_pylist() == table["session_id"].to_pylist()
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["valence"].null_count == 6


def test_values_survive_reordering(tmp_path):
    columns = rows(position=[9, 2, 8, 1, 7, 0], valence=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table = FeatureStore.open(write(tmp_path / "s", columns)).read()
    assert table["utt_id"].to_pylist() == ["u4", "u2", "u0", "u5", "u3", "u1"]
    assert table["valence"].to_pylist() == pytest.approx([0.5, 0.3, 0.1, 0.6, 0.4, 0.2])
    order = [int(utt_id[1:]) for utt_id in table["utt_id"].to_pylist()]
    np.testing.assert_array_equal(np.stack(table["speech"].to_pylist()), np.stack(columns["speech"])[order])


def test_pandas_store_with_nan_labels_and_float64_features(tmp_path):
    columns = rows(valence=[np.nan, 0.5, 0.5, 0.5, 0.5, 0.5], start_s=np.arange(6.0), end_s=np.arange(6.0) + 0.5)
    columns["speech"] = [list(map(float, vector)) for vector in columns["speech"]]
    (tmp_path / "s").mkdir()
    pd.DataFrame(columns).to_parquet(tmp_path / "s" / "part-0.parquet")
    table = FeatureStore.open(str(tmp_path / "s")).read()
    assert table["valence"].to_pylist()[0] is None
    assert table["duration_s"].to_pylist() == [0.5] * 6
    assert table.schema.field("speech").type == pa.list_(pa.float32(), DIM)


def test_columns_that_may_be_meant_otherwise_are_noted(tmp_path, capsys):
    FeatureStore.open(
        write(tmp_path / "s", rows(Split=["train"] * 6, split=["dev"] * 6, start_s=[0.0] * 6, start=[0] * 6))
    )
    assert capsys.readouterr().out == ""
    FeatureStore.open(write(tmp_path / "s", rows(Split=["train"] * 6, gender=["f"] * 6)))
    assert capsys.readouterr().out == f"{tmp_path}/s has columns that are not read: 'Split' (is split meant?).\n"


def test_streams_are_read_only_where_asked_for(tmp_path):
    store = FeatureStore.open(write(tmp_path / "s", rows()))
    assert store.read(["session_id", "position"]).column_names == ["session_id", "position"]
    assert store.dims == {"speech": DIM}


def test_parts_are_read_in_order(tmp_path):
    columns = rows()
    write(tmp_path / "s", rows(utt_id=[f"v{i}" for i in range(6)], session_id=["c"] * 6), "part-1.parquet")
    store = FeatureStore.open(write(tmp_path / "s", columns))
    assert store.read(["session_id"])["session_id"].unique().to_pylist() == ["a", "b", "c"]
    assert store.read(["session_id"], store.parts[1:])["session_id"].unique().to_pylist() == ["c"]


def test_a_failed_row_may_lack_its_features(tmp_path):
    columns = rows(status=["ok", "silent", "ok", None, "ok", "ok"])
    columns["speech"][1] = None
    table = FeatureStore.open(write(tmp_path / "s", columns)).read()
    assert table["speech"].null_count == 1
    assert table["status"].to_pylist().count("ok") == 5


def test_written_parts_are_read_back_equal(tmp_path):
    table = FeatureStore.open(write(tmp_path / "s", rows())).read()
    write_part(str(tmp_path / "t"), "part-0.parquet", table)
    assert FeatureStore.open(str(tmp_path / "t")).read().equals(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"utt_id": ["u0"] * 6}, r"utt_id 'u0' occurs more than once in .*part-0.parquet"),
        ({"utt_id": ["u0", None, "u2", "u3", "u4", "u5"]}, "row 2, utterance null: it has no utt_id"),
        ({"session_id": ["a", "a", "", "a", "a", "a"]}, "row 3, utterance 'u2': it has no session_id"),
        ({"status": ["ok"] * 5 + ["broken"]}, "row 6, .*status 'broken' is unknown; allowed are ok, too_short"),
        ({"speech": ["x"] * 6}, "column speech is string; it must be lists of numbers"),
        ({"speech": [[1.0] * 4] * 5 + [[1.0] * 3]}, "'u5': the speech vector has 3 numbers, others have 4"),
        ({"speech": [[1.0] * 4] * 5 + [None]}, "row 6, utterance 'u5': it has status ok but no speech vector"),
        ({"valence": ["high"] * 6}, "row 1, utterance 'u0': valence is 'high'; it must be a number"),
        ({"start_s": [0.0, np.inf, 0, 0, 0, 0]}, "row 2, utterance 'u1': start_s is Infinity"),
        ({"position": [0, 0, None, 1, 2, 2]}, "row 3, utterance 'u2': session 'a' has no position in this row"),
        ({"start_s": [0, None, 1, 2, 3, 4]}, "row 2, utterance 'u1': session 'b' has no start_s in this row"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ReadStoreError, match=rf"part-0.parquet.*{message}|{message}"):
        FeatureStore.open(write(tmp_path / "s", rows(**change))).read()


def test_missing_columns_are_named(tmp_path):
    columns = rows()
    del columns["utt_id"]
    with pytest.raises(ReadStoreError, match="lacks the column utt_id; it has session_id, speech"):
        FeatureStore.open(write(tmp_path / "s", columns))
    columns = rows()
    del columns["speech"]
    with pytest.raises(ReadStoreError, match="none of the feature columns speech, prosody, speaker"):
        FeatureStore.open(write(tmp_path / "t", columns))


def other(n, **columns):
    """Rows of another file: sessions and utterances that the first one lacks."""
    return rows(session_id=["c", "d"] * 3, utt_id=[f"{n}-{i}" for i in range(6)], **columns)


PROSODY = [[float(i)] * 2 for i in range(6)]


@pytest.mark.parametrize("names", [("part-0.parquet", "part-1.parquet"), ("part-1.parquet", "part-0.parquet")])
def test_a_stream_is_in_all_files_or_in_none(tmp_path, names):
    folder = tmp_path / "s"
    write(folder, rows(prosody=PROSODY), names[0])
    write(folder, other(1), names[1])
    with pytest.raises(ReadStoreError, match=rf"{names[1]} lacks the column prosody, which .*{names[0]} has"):
        FeatureStore.open(str(folder))
    # Where nothing has features nothing can lack one.
    write(folder, other(1, status=["silent"] * 5 + ["missing"], speech=pa.nulls(6)), names[1])
    store = FeatureStore.open(str(folder))
    assert store.dims == {"speech": DIM, "prosody": 2}
    table = store.read()
    assert (table["prosody"].null_count, table["speech"].null_count) == (6, 6)
    failed = table["session_id"].to_numpy() >= "c"
    np.testing.assert_array_equal(failed, table["status"].to_numpy() != "ok")
    write(folder, other(1, status=["silent"] * 5 + [None]), names[1])
    with pytest.raises(ReadStoreError, match="lacks the column prosody"):
        FeatureStore.open(str(folder))


def test_columns_with_defaults_may_be_missing_and_of_other_types(tmp_path):
    folder = tmp_path / "s"
    write(folder, rows(valence=[1, 0, 1, 0, 1, 0], position=[2.0, 1, 1, 2, 0, 0], fold=[1] * 6))
    strings = other(1, arousal=np.full(6, 0.25), fold=["x"] * 6)
    write(folder, {**strings, "utt_id": pa.array(strings["utt_id"], pa.string_view())}, "part-1.parquet")
    numbered = rows(session_id=[7] * 6, utt_id=np.arange(6), fold=pa.array([1.0, np.nan, 1, 1, 1, 1]))
    write(folder, numbered, "part-2.parquet")
    store = FeatureStore.open(str(folder))
    assert store.columns == {"session_id", "utt_id", "speech", "valence", "position", "fold", "arousal"}
    table = store.read()
    assert table.schema.equals(part_schema({"speech": DIM}))
    assert table["valence"].to_pylist()[:3] == [1.0, 1.0, 1.0]
    assert table["valence"].null_count == 12
    assert table["arousal"].to_pylist()[6:12] == [0.25] * 6
    assert table["position"].to_pylist() == [0, 1, 2] * 4 + [0, 1, 2, 3, 4, 5]
    assert table["session_id"].to_pylist()[12:] == ["7"] * 6
    assert table["utt_id"].to_pylist()[12:] == list("012345")
    assert table["fold"].to_pylist()[:13] == ["1"] * 6 + ["x"] * 6 + ["1"]


def test_order_is_position_else_time_else_rows(tmp_path):
    start_s = [5.0, 1.0, 3.0, 0.0, 4.0, 2.0]
    table = FeatureStore.open(write(tmp_path / "s", rows(start_s=start_s))).read()
    assert table["utt_id"].to_pylist() == ["u2", "u4", "u0", "u3", "u1", "u5"]
    assert table["position"].to_pylist() == [0, 1, 2] * 2
    columns = rows(start_s=start_s, position=[0, 0, 1, 1, 2, 2])
    table = FeatureStore.open(write(tmp_path / "t", columns)).read()
    assert table["utt_id"].to_pylist() == ["u0", "u2", "u4", "u1", "u3", "u5"]


def test_parts_without_rows_or_vectors_are_read(tmp_path):
    folder = tmp_path / "s"
    write(folder, pa.table(rows()).slice(0, 0).to_pydict(), "part-0.parquet")
    failed = {"status": ["silent"] * 6}
    pd.DataFrame(other(1, **failed) | {"speech": [None] * 6}).to_parquet(folder / "part-1.parquet")
    assert pq.read_schema(folder / "part-1.parquet").field("speech").type == pa.null()
    write(folder, rows(), "part-2.parquet")
    store = FeatureStore.open(str(folder))
    assert store.dims == {"speech": DIM}
    table = store.read()
    assert (len(table), table["speech"].null_count) == (12, 6)
    # A store in which nothing has features holds labels and reasons all the same.
    (folder / "part-2.parquet").unlink()
    store = FeatureStore.open(str(folder))
    assert store.dims == {}
    assert store.read(["status"])["status"].to_pylist() == ["silent"] * 6


@pytest.mark.parametrize(("change", "what"), [({"utt_id": "x"}, "session 'b'"), ({"session_id": "x"}, "utt_id 'u1'")])
def test_what_stands_in_two_files_is_refused_with_both(tmp_path, change, what):
    folder = tmp_path / "s"
    write(folder, rows(), "one.parquet")
    changed = {name: [f"{value}{n}" for n in range(6)] for name, value in change.items()}
    write(folder, pa.table(rows(**changed)).slice(1, 1).to_pydict(), "two.parquet")
    store = FeatureStore.open(str(folder))
    with pytest.raises(ReadStoreError, match=rf"{what} occurs in .*one.parquet and in .*two.parquet"):
        store.read(["valence"])
    assert len(store.read(["valence"], store.parts[:1])) == 6


@pytest.mark.parametrize("keys", [["split"], ["fold", "split"]])
def test_a_partitioned_data_set_is_a_store(tmp_path, keys):
    columns = rows(session_id=list("abcdef"), split=["train", "train", "dev", "dev", "test", None], fold=[1, 2] * 3)
    folder = tmp_path / "s"
    pd.DataFrame({**columns, "role": ["a b/c"] * 6}).to_parquet(folder, partition_cols=[*keys, "role"])
    for name in ("_SUCCESS", "_metadata", "_common_metadata", ".hidden.parquet"):
        (folder / name).write_bytes(b"")
    (folder / "backup").mkdir()
    write(folder / "backup", columns)
    table = FeatureStore.open(str(folder)).read().sort_by("utt_id")
    for name in ("session_id", "split", "fold", "role"):
        wanted = ["a b/c"] * 6 if name == "role" else [value and str(value) for value in columns[name]]
        assert table[name].to_pylist() == wanted
    np.testing.assert_array_equal(np.stack(table["speech"].to_pylist()), np.stack(columns["speech"]))
    assert is_store(str(folder))


def test_features_in_other_folders_are_not_passed_over_in_silence(tmp_path, capsys):
    folder = tmp_path / "s"
    for name in ("train", "dev"):
        write(folder / name, rows())
    with pytest.raises(
        ReadStoreError, match=r"only in folders that are not read, such as (train|dev)/part-0.parquet: give"
    ):
        FeatureStore.open(str(folder))
    write(folder, rows())
    assert len(FeatureStore.open(str(folder)).read()) == 6
    assert re.fullmatch(
        r".*/s: (train|dev)/part-0.parquet is not read, though it has features: .* rename (train|dev), .*\n",
        capsys.readouterr().out,
    )


def test_what_is_no_part_of_a_store_is_not_noted(tmp_path, capsys):
    folder = tmp_path / "s"
    write(folder, rows())
    write(folder / "_old", rows())
    write(folder / "role=agent", rows(session_id=["c"] * 6, utt_id=list("abcdef")))
    # What vaemo writes: scores, voices, and another store.
    write(folder / "scores" / "utterances", {"session_id": ["a"], "utt_id": ["u0"], "valence": [0.5]})
    write(folder / "run", {"session_id": ["a"], "speaker_id": ["p"], "speaker": [[0.5, 0.5]]}, "speakers.parquet")
    write(folder / "other", rows())
    (folder / "other" / "_vaemo.json").write_text("{}")
    assert len(FeatureStore.open(str(folder)).read()) == 12
    assert capsys.readouterr().out == ""


def test_a_column_and_the_name_of_its_folder_agree(tmp_path):
    folder = tmp_path / "s" / "split=test" / "channel=1"
    write(folder, rows(split=["test", None] * 3, channel=[1] * 6))
    store = FeatureStore.open(str(tmp_path / "s"))
    assert store.read(["split"])["split"].to_pylist() == ["test"] * 6
    write(folder, rows(split=["test", "train", *["dev"] * 4], channel=[1] * 6))
    with pytest.raises(
        ReadStoreError, match=r"row 2, utterance 'u1': split is 'train' in a folder .* named split=test; move"
    ):
        store.read(["split"])


def test_ids_and_places_may_be_the_names_of_folders(tmp_path):
    columns = rows(start_s=[2.0, 1, 1, 2, 0, 0], channel=[0, 1] * 3)
    columns["session_id"] = ["007", "8"] * 3
    pd.DataFrame(columns).to_parquet(tmp_path / "s", partition_cols=["session_id", "channel"])
    table = FeatureStore.open(str(tmp_path / "s")).read(["session_id", "channel", "utt_id"])
    assert table["session_id"].to_pylist() == ["007"] * 3 + ["8"] * 3
    assert table["channel"].to_pylist() == [0] * 3 + [1] * 3
    assert table["utt_id"].to_pylist() == ["u4", "u2", "u0", "u5", "u1", "u3"]


def test_one_file_is_a_store(tmp_path):
    write(tmp_path / "s", rows())
    path = str(tmp_path / "s" / "part-0.parquet")
    store = FeatureStore.open(path)
    assert (store.parts, store.info) == ((path,), {})
    assert store.read().equals(FeatureStore.open(str(tmp_path / "s")).read())
    assert is_store(path)


def test_files_of_other_names_are_parts(tmp_path):
    for name in ("a.PARQUET", "b.pq", "c.snappy.parquet"):
        write(tmp_path / "s", rows(), name)
        assert [path.rpartition("/")[2] for path in FeatureStore.open(str(tmp_path / "s")).parts] == [name]
        (tmp_path / "s" / name).unlink()
    write(tmp_path / "s", rows(), "000000_0")
    (tmp_path / "s" / "README").write_text("features")
    assert len(FeatureStore.open(str(tmp_path / "s")).read()) == 6


def test_what_is_a_store_is_told_by_its_columns(tmp_path):
    calls = {"session_id": ["a"], "role_ch0": ["customer"], "speaker": ["Ann"]}
    write(tmp_path / "calls", calls, "calls.parquet")
    manifest = {"session_id": ["a"], "utt_id": ["u"], "speaker_id": ["p"], "audio_path": ["a.wav"], "speaker": ["Ann"]}
    write(tmp_path / "calls", manifest, "manifest.parquet")
    (tmp_path / "calls" / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "calls" / "a.wav").write_bytes(b"RIFF")
    for path in ("calls", "calls/calls.parquet", "calls/manifest.parquet", "calls/a.wav", "none"):
        assert not is_store(str(tmp_path / path))
    write(tmp_path / "calls", rows(speech=pa.nulls(6)))
    assert is_store(str(tmp_path / "calls"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "_vaemo.json").write_text("{}")
    assert is_store(str(tmp_path / "begun"))


def test_another_folder_of_vaemo_is_named(tmp_path):
    scores, run = tmp_path / "scores", tmp_path / "run"
    write(scores / "utterances", {"session_id": ["a"], "utt_id": ["u0"]})
    (scores / "_provenance.json").write_text("{}")
    write(run, {"session_id": ["a"], "utt_id": ["u0"], "split": ["train"]}, "used.parquet")
    (run / "_run.json").write_text("{}")
    (run / "best").mkdir()
    (run / "best" / "model.safetensors").write_bytes(b"")
    (run / "best" / "metrics.json").write_text("{}")
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "metrics.json").write_text("{}")
    for path, what in (
        (scores, "holds scores"),
        (run, "is a run of training"),
        (run / "best", "is a checkpoint"),
        (tmp_path / "numbers", "holds an evaluation"),
    ):
        with pytest.raises(ReadStoreError, match=rf"{path} {what}; a feature store is a folder"):
            FeatureStore.open(str(path))
    write(tmp_path / "store", rows())
    with pytest.raises(ReadStoreError, match=r"not read, such as store/part-0.parquet: give that folder"):
        FeatureStore.open(str(tmp_path))


def test_no_store(tmp_path):
    with pytest.raises(ReadStoreError, match="none does not exist; a feature store is a folder"):
        FeatureStore.open(str(tmp_path / "none"))
    with pytest.raises(ReadStoreError, match="holds no Parquet files; a feature store"):
        FeatureStore.open(str(tmp_path))
    pd.DataFrame(rows()).to_pickle(tmp_path / "part-0.pkl")
    with pytest.raises(ReadStoreError, match=r"no Parquet files, but part-0.pkl: write it with .*to_parquet"):
        FeatureStore.open(str(tmp_path))
    with pytest.raises(ReadStoreError, match=r"part-0.pkl is not a Parquet file .a pickle"):
        FeatureStore.open(str(tmp_path / "part-0.pkl"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"no", "is not a Parquet file"),
        (lambda content: content[:-60] + content[-30:], "is a damaged Parquet file"),
        (lambda content: content[:4] + bytes(200) + content[204:], "is a damaged Parquet file"),
    ],
)
def test_a_file_that_is_no_parquet_or_damaged_is_named(tmp_path, damage, message):
    path = tmp_path / "s" / "part-0.parquet"
    write(path.parent, rows())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ReadStoreError, match=rf"part-0.parquet {message} .*; remove it or write it again"):
        FeatureStore.open(str(path.parent)).read()


def test_a_store_says_who_made_its_streams(tmp_path):
    folder = write(tmp_path / "s", rows())
    assert FeatureStore.open(folder).fingerprints == {}
    info = store_info({"speech": {"name": "logmel", "fingerprint": "ab"}, "prosody": {}}, (0, 1), None, {})
    (tmp_path / "s" / "_vaemo.json").write_text(json.dumps(info))
    assert FeatureStore.open(folder).fingerprints == {"speech": "ab", "prosody": None}


def test_another_schema_version_is_refused(tmp_path):
    folder = write(tmp_path / "s", rows())
    info = store_info({}, (0, 1), (1, 7), {})
    (tmp_path / "s" / "_vaemo.json").write_text(json.dumps(info))
    assert FeatureStore.open(folder).info["native_range"] == [1, 7]
    (tmp_path / "s" / "_vaemo.json").write_text(json.dumps({**info, "schema_version": 99}))
    with pytest.raises(ReadStoreError, match="schema_version 99; this vaemo reads 1"):
        FeatureStore.open(folder)
