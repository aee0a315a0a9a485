"""A store from anyone is read to the full contract, or refused with the file and the row."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.errors import ReadStoreError
from vaemo.store import FeatureStore, part_schema, store_info, write_part

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
    folder.mkdir(exist_ok=True)
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
        ({"utt_id": ["u0"] * 6}, "utt_id 'u0' stands there more than once"),
        ({"utt_id": ["u0", None, "u2", "u3", "u4", "u5"]}, "row 1 has no utt_id"),
        ({"status": ["broken"] * 6}, "status 'broken' is unknown; allowed are ok, too_short"),
        ({"speech": ["x"] * 6}, "column speech is string; it must be a list of float32"),
        ({"speech": [[1.0] * 4] * 5 + [[1.0] * 3]}, "'u5' has a speech vector of 3 numbers, others have 4"),
        ({"speech": [[1.0] * 4] * 5 + [None]}, "'u5' has status ok but no speech vector"),
        ({"valence": ["high"] * 6}, "column valence is string; it must be float"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ReadStoreError, match=message):
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


def test_no_store(tmp_path):
    with pytest.raises(ReadStoreError, match="none does not exist; a feature store is a folder"):
        FeatureStore.open(str(tmp_path / "none"))
    with pytest.raises(ReadStoreError, match="holds no Parquet files"):
        FeatureStore.open(str(tmp_path))


def test_not_parquet(tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ReadStoreError, match="is not a Parquet file"):
        FeatureStore.open(str(tmp_path))


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
