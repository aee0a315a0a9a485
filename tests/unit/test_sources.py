"""What `--input` names is told by what is in it."""

import numpy as np
import pandas as pd
import pytest
import soundfile

from vaemo.config import Config
from vaemo.errors import ReadManifestError, ReadStoreError, UsageError
from vaemo.pipeline.prepare import voices_section
from vaemo.pipeline.sources import ManifestSource, RecordingsSource, StoreSource, open_source

ROWS = {"session_id": ["a", "a", "b"], "utt_id": ["u", "v", "w"], "speech": [[1.0, 2.0]] * 3}
LINES = {name: ROWS[name] for name in ("session_id", "utt_id")} | {"speaker_id": ["p"] * 3, "audio_path": ["a.wav"] * 3}
CALLS = {"session_id": ["a.wav"], "role_ch0": ["customer"], "speaker": ["Ann"]}


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path, **options)
    return path


def opened(path, **options):
    return open_source(str(path), Config(), **options)


def record(folder):
    soundfile.write(folder / "a.wav", np.zeros(1600), 16000)


def test_tables_beside_recordings_do_not_make_a_store(tmp_path):
    write(tmp_path / "calls.parquet", CALLS)
    write(tmp_path / "manifest.parquet", {**LINES, "prosody": ["flat"] * 3})
    record(tmp_path)
    source = opened(tmp_path)
    assert isinstance(source, RecordingsSource)
    assert source.list().session_ids == ["a.wav"]
    record(write(tmp_path / "days" / "date=2026-11-28" / "calls.parquet", CALLS).parent)
    assert isinstance(opened(tmp_path / "days"), RecordingsSource)


def test_a_parquet_file_with_features_makes_a_store(tmp_path):
    write(tmp_path / "s" / "part.parquet", ROWS)
    for path in (tmp_path / "s", tmp_path / "s" / "part.parquet"):
        source = opened(path)
        assert isinstance(source, StoreSource)
        assert source.list().session_ids == ["a", "b"]
    write(tmp_path / "p", {**ROWS, "split": ["train", "train", "dev"]}, partition_cols=["split"])
    assert sorted(opened(tmp_path / "p").list().session_ids) == ["a", "b"]
    with pytest.raises(UsageError, match="--exclude leaves out recordings of a folder"):
        opened(tmp_path / "p", exclude=["*.wav"])


def test_a_parquet_file_without_features_is_a_manifest(tmp_path):
    source = opened(write(tmp_path / "m.parquet", LINES))
    assert isinstance(source, ManifestSource)
    assert source.list().session_ids == ["a", "b"]
    with pytest.raises(ReadManifestError, match=r"calls.parquet, row 1: lacks the key 'utt_id'"):
        opened(write(tmp_path / "calls.parquet", CALLS)).list()


def test_tables_alone_are_a_store_that_lacks_something(tmp_path):
    write(tmp_path / "part.parquet", CALLS)
    with pytest.raises(ReadStoreError, match="lacks the column utt_id; it has session_id, role_ch0"):
        opened(tmp_path)
    # A store's own files beside others: which of them is wrong is said.
    write(tmp_path / "part-2.parquet", ROWS)
    with pytest.raises(ReadStoreError, match=r"part.parquet lacks the column utt_id"):
        opened(tmp_path)


def test_tables_alone_in_a_folder_that_is_not_read_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "part.parquet", CALLS)
    with pytest.raises(ReadStoreError, match=r"only in folders that are not read, such as train/part.parquet"):
        opened(tmp_path)


def test_what_compares_voices_decides_nothing_where_none_are_compared():
    """Its defaults may change, and a folder without voices is still the same run."""
    assert voices_section(Config()) == ()
    for section in ({"mode": "auto"}, {"min_margin": 0.3}):
        assert voices_section(Config().replace({"voices": section})) == ("voices",)
    of_persons = Config().replace({"voices": {"verification": 0.7}})
    assert voices_section(of_persons) == ()
    assert voices_section(of_persons, compared=True) == ("voices",)


def test_recordings_without_turns_are_counted_once(tmp_path):
    record(tmp_path)
    for name in ("b", "c"):
        (tmp_path / f"{name}.wav").write_bytes((tmp_path / "a.wav").read_bytes())
        (tmp_path / f"{name}.rttm").touch()
    (tmp_path / "a.rttm").write_text("SPEAKER a 1 0.5 1 <NA> <NA> customer <NA> <NA>\n")
    listing = opened(tmp_path).list().with_turns(str(tmp_path))
    assert {name: len(turns) for name, turns in listing.turns.items()} == {"a.wav": 1, "b.wav": 0, "c.wav": 0}
    (note,) = (note for note in listing.notes if "--voices-from" in note)
    assert "has no turns in its files of 2 recordings" in note
