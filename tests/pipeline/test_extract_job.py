"""The job of extraction, its shards done in this process: what a second run adds, leaves alone, refuses, repeats."""

import pytest
import soundfile
from extract_cases import CONFIG, expected_rows, parts, rows_of, write_corpus, write_rows
from speech_cases import call

import vaemo
from vaemo.config import Config
from vaemo.errors import OtherRunError, ReadManifestError, ReadRecordingsError, TooManyFailuresError
from vaemo.features import load_extractors
from vaemo.pipeline import extraction
from vaemo.utterances import extract_recording


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 10)


def test_recordings_are_extracted_once_and_others_passed_over(tmp_path):
    folder = tmp_path / "calls"
    (folder / "deep").mkdir(parents=True)
    samples, _ = call(4, seed=1)
    soundfile.write(folder / "a.wav", samples.T, 16000)
    soundfile.write(folder / "deep" / "b.FLAC", samples.T, 16000, format="FLAC")
    (folder / "broken.wav").write_text("no audio")
    (folder / "notes.txt").write_text("no recording")
    config = CONFIG.replace({"extract": {"max_failed_fraction": 0.5}})
    vaemo.extract(config=config, out=str(tmp_path / "out"), input=str(folder), executor="process")
    found = rows_of(tmp_path / "out")
    extractors = load_extractors(config.features)
    for name in ("a.wav", "deep/b.FLAC", "broken.wav"):
        table = extract_recording(str(folder / name), name, extractors=extractors, config=config)
        assert table.to_pylist() == [row for row in found.values() if row["session_id"] == name]
    assert {row["session_id"] for row in found.values()} == {"a.wav", "deep/b.FLAC", "broken.wav"}

    before = parts(tmp_path / "out")
    soundfile.write(folder / "c.wav", samples.T, 16000)
    vaemo.extract(config=config, out=str(tmp_path / "out"), input=str(folder), executor="process")
    after = parts(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_a_grown_manifest_adds_its_new_sessions_alone(tmp_path):
    manifest, rows = write_corpus(tmp_path / "c", 7)
    write_rows(tmp_path / "c", rows[:9])
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest), executor="process")
    before = parts(tmp_path / "out")
    write_rows(tmp_path / "c", rows)
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest), executor="process")
    after = parts(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert rows_of(tmp_path / "out") == expected_rows(manifest)

    write_rows(tmp_path / "c", [{**rows[0], "valence": 0.75}, *rows[1:], {**rows[0], "utt_id": "x", "session_id": "x"}])
    with pytest.raises(OtherRunError, match=r"session 's0' is finished in .*, but its utterances have changed"):
        vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest), executor="process")
    vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(manifest), executor="process", changed="redo")
    assert rows_of(tmp_path / "out") == expected_rows(manifest)


def test_another_config_on_the_same_folder_is_refused_with_what_differs(corpus, tmp_path):
    manifest, _ = corpus
    out = str(tmp_path / "out")
    vaemo.extract(config=CONFIG, out=out, manifest=str(manifest), limit=1, executor="process")
    before = parts(out)
    other = CONFIG.replace({"audio": {"simulate_telephone": True}})
    with pytest.raises(OtherRunError, match=r"audio.simulate_telephone was False, is now True"):
        vaemo.extract(config=other, out=out, manifest=str(manifest), executor="process")
    assert parts(out) == before
    # What cannot change a row may change.
    harmless = CONFIG.replace(
        {"extract": {"batch_s": 5.0}, "features": {"opensmile_license": "research", "speaker_aggregation": "enrolled"}}
    )
    vaemo.extract(config=harmless, out=out, manifest=str(manifest), limit=1, executor="process")


def test_a_limit_takes_whole_sessions_and_the_rest_follows(corpus, tmp_path):
    manifest, _ = corpus
    out = tmp_path / "out"
    vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), limit=4, executor="process")
    assert len(rows_of(out)) == 6
    vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), limit=10, executor="process")
    assert len(rows_of(out)) == 12
    vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), executor="process")
    assert rows_of(out) == expected_rows(manifest)


def test_failures_are_rows_then_an_error_then_tried_again(tmp_path, capsys):
    manifest, _rows = write_corpus(tmp_path / "c", 6)
    away = tmp_path / "away.wav"
    (tmp_path / "c" / "2.wav").rename(away)
    out = tmp_path / "out"
    with pytest.raises(TooManyFailuresError, match=r"3 of 18 utterances failed \(16.7%\).*allows 5.0%"):
        vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), executor="process")
    assert "3  missing      such as s2-0: there is no such file" in capsys.readouterr().out
    broken = rows_of(out)
    assert [row["utt_id"] for row in broken.values() if row["status"] == "missing"] == ["s2-0", "s2-1", "s2-2"]
    before = parts(out)

    lenient = CONFIG.replace({"extract": {"max_failed_fraction": 0.2}})
    vaemo.extract(config=lenient, out=str(out), manifest=str(manifest), executor="process")
    assert parts(out) == before

    away.rename(tmp_path / "c" / "2.wav")
    vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), retry_failed=True, executor="process")
    after = parts(out)
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in after) == 1
    assert rows_of(out) == expected_rows(manifest)
    # Its parts still say which sessions they hold.
    vaemo.extract(config=CONFIG, out=str(out), manifest=str(manifest), executor="process")
    assert parts(out) == after


def test_failed_recordings_are_tried_again_whole(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    samples, _ = call(3, seed=2)
    soundfile.write(folder / "a.wav", samples.T, 16000)
    (folder / "b.wav").write_bytes(b"")
    config = CONFIG.replace({"extract": {"max_failed_fraction": 1.0, "shard_recordings": 2}})
    vaemo.extract(config=config, out=str(tmp_path / "out"), input=str(folder), executor="process")
    assert rows_of(tmp_path / "out")["b.wav#c0-00000"]["status"] == "undecodable"
    soundfile.write(folder / "b.wav", samples.T, 16000)
    vaemo.extract(config=config, out=str(tmp_path / "out"), input=str(folder), retry_failed=True, executor="process")
    found = rows_of(tmp_path / "out")
    assert {row["status"] for row in found.values()} == {"ok"}
    assert len({row["session_id"] for row in found.values()}) == 2


def test_input_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(ReadManifestError, match="there is no manifest"):
        vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), manifest=str(tmp_path / "m.jsonl"), executor="process")
    with pytest.raises(ReadRecordingsError, match="does not exist"):
        vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), input=str(tmp_path / "none"), executor="process")
    (tmp_path / "x").mkdir()
    with pytest.raises(
        ReadRecordingsError, match=r"holds no recordings to read: files are taken whose names end .* such as .wav"
    ):
        vaemo.extract(config=CONFIG, out=str(tmp_path / "out"), input=str(tmp_path / "x"), executor="process")
    assert not (tmp_path / "out").exists()


def test_the_licence_of_opensmile_is_asked_for(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extraction, "estimate", lambda *_: None)
    base = Config.load("default")
    vaemo.extract(config=base, out=str(tmp_path / "out"), manifest=str(corpus[0]), dry_run=True, executor="process")
    assert "features.opensmile_license=research (or commercial)" in capsys.readouterr().out
    stated = base.replace({"features": {"opensmile_license": "research"}})
    vaemo.extract(config=stated, out=str(tmp_path / "out"), manifest=str(corpus[0]), dry_run=True, executor="process")
    assert capsys.readouterr().out == ""
