"""The progress line counts, gives a rate that leaves out earlier work, and the time left."""

import pytest

from vaemo.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (99, "99 s"), (200, "3 min 20 s"), (5999, "99 min 59 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_line(monkeypatch):
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("vaemo.progress.time.monotonic", lambda: next(clock))
    progress = Progress("extract", 1000, "utterances", done=500, every_s=1e9)
    progress.advance(100, lambda elapsed_s: f"{elapsed_s:.0f} s gone")
    assert progress.line() == "extract: 600 of 1,000 utterances, 10.0/s, 10 s gone, 40 s left"


def test_lines_in_a_log_come_now_and_then(capsys):
    progress = Progress("score", 10, "sessions", every_s=0.0)
    progress.advance(1)
    progress.advance(1, "2 failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("score: 2 of 10 sessions, ")
    assert "2 failed" in lines[1]
    progress.close()
    assert capsys.readouterr().err == "", "the last line is already there"


def test_the_last_line_is_written_where_it_is_new(capsys):
    progress = Progress("score", 2, "sessions", every_s=1e9)
    progress.advance(2)
    progress.close()
    assert capsys.readouterr().err.startswith("score: 2 of 2 sessions, ")
