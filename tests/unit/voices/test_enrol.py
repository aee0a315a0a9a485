"""Who is enrolled from a folder, and what of it is refused before a recording is read."""

import datetime

import pytest

from vaemo.errors import ReadRecordingsError, ReadVoicesError
from vaemo.voices import enrol

REACHED = "'.*ann/a.wav' cannot be used"
"""The error of the first recording, which is empty."""


def run(folder, names, *options):
    for name in names:
        place = folder / "in" / name
        (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            place.touch()
    enrol.main([str(folder / "in"), "--out", str(folder / "voices.parquet"), *options])


def test_a_folder_without_recordings_is_named(tmp_path, capsys):
    with pytest.raises(ReadVoicesError, match=REACHED):
        run(tmp_path, ["ann/a.wav", "ann/b.wav", "bob.wav", "cy/notes.txt", "dee/", ".git/"])
    expected = "warning: folders without recordings, from which no person is enrolled: cy, dee\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["ann/a.wav", "ann.wav"], ReadVoicesError, r"holds 'ann.wav' and 'ann', both of the person 'ann'\. Put"),
        (["ann.flac", "ann.wav"], ReadVoicesError, "holds 'ann.flac' and 'ann.wav', both of the person 'ann'"),
        (["ann/notes.txt"], ReadRecordingsError, "holds no recordings to read"),
        (["ann/"], ReadRecordingsError, "holds no recordings to read"),
    ],
)
def test_folders_of_no_person_or_of_two_sources_are_refused(tmp_path, names, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, names)


def test_the_last_day_of_use_is_not_past(tmp_path, capsys):
    today = datetime.date.today()
    with pytest.raises(ReadVoicesError, match=REACHED):
        run(tmp_path, ["ann/a.wav"], "--expires", str(today))
    with pytest.raises(SystemExit):
        run(tmp_path, [], "--expires", str(today - datetime.timedelta(1)))
    assert "is past; give today or a later day" in capsys.readouterr().err
