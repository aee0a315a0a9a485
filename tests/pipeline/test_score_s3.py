"""Recordings in a bucket are scored into a bucket, in two runs as in one."""

from scoring_cases import assert_close, make_audio_checkpoint, rows_of, run, write_calls

from vaemo import files

ORDER = {"channel_roles": ["customer", "agent"]}


def test_recordings_and_scores_may_lie_in_a_bucket(bucket, tmp_path, monkeypatch):
    names, _ = write_calls(tmp_path / "in" / "2026", utterances=2)
    checkpoint = make_audio_checkpoint(tmp_path / "checkpoint")
    for name in names:
        files.write_whole(f"{bucket}/in/2026/{name}", (tmp_path / "in" / "2026" / name).read_bytes())
    for limit in (1, None):
        run(f"{bucket}/in", checkpoint, f"{bucket}/scores", score=ORDER, limit=limit)
    assert len(files.list_files(f"{bucket}/scores/utterances")) == 2
    local = run(tmp_path / "in", checkpoint, tmp_path / "out", score=ORDER)
    assert_close(rows_of(f"{bucket}/scores"), local)
