"""Diarisation that others made: read in every format, found by its names, refused where it cannot be meant."""

import json

import pytest

from vaemo.errors import ReadVoicesError
from vaemo.voices.turns import Turn, read_json, read_rttm, read_voices, rttm

TURNS = [Turn(0.5, 2.25, "SPEAKER_00"), Turn(2.0, 3.0, "SPEAKER_01")]


def test_what_is_written_as_rttm_is_read_back():
    assert read_rttm(rttm("call", TURNS), "f") == {"call": TURNS}


def test_other_lines_of_an_rttm_are_passed_over_and_channels_count_from_1():
    lines = ";; comment\nSPKR-INFO a 1 <NA> <NA> <NA> unknown X <NA> <NA>\nSPEAKER a 1 0 1 <NA> <NA> X <NA> <NA>\n"
    assert read_rttm(lines, "f") == {"a": [Turn(0, 1, "X")]}
    assert read_rttm(lines + "SPEAKER a 2 1.5 1 <NA> <NA> Agent <NA>\n", "f") == {
        "a": [Turn(0, 1, "X", None, 0), Turn(1.5, 2.5, "Agent", "agent", 1)]
    }


@pytest.mark.parametrize("behind", ["", " <NA>", " <NA> <NA>", " 0.95", " 1.2e-3 <NA>", " NA -"])
def test_an_rttm_may_have_a_confidence_behind_the_name(behind):
    assert read_rttm(f"SPEAKER a 1 0 1 <NA> <NA> X{behind}", "f") == {"a": [Turn(0, 1, "X")]}


def test_whisperx_words_say_who_speaks_where_they_are_aligned():
    words = [
        {"word": "yes", "start": 0.1, "end": 0.4, "speaker": "A"},
        {"word": "well", "start": 0.5, "end": 0.9, "speaker": "A"},
        {"word": "7"},
        {"word": "no", "start": 1.0, "end": 1.2, "speaker": "B"},
        {"word": "no", "start": 3.0, "end": 3.2, "speaker": "B"},
    ]
    segments = [
        {"start": 0.1, "end": 3.2, "text": "", "speaker": "A", "words": words},
        {"start": 4.0, "end": 5.0, "text": "", "speaker": "B"},
        {"start": 6.0, "end": 7.0, "text": "nobody"},
    ]
    turns = read_json(json.dumps({"segments": segments, "language": "en"}), "f")
    assert turns == [Turn(0.1, 0.9, "A"), Turn(1.0, 1.2, "B"), Turn(3.0, 3.2, "B"), Turn(4.0, 5.0, "B")]


def test_call_analytics_and_contact_lens_bring_roles():
    part = {"BeginOffsetMillis": 500, "EndOffsetMillis": 1500, "Content": "hello"}
    post_call = {"Participants": [{"ParticipantRole": "AGENT"}], "Transcript": [{**part, "ParticipantRole": "AGENT"}]}
    assert read_json(json.dumps(post_call), "f") == [Turn(0.5, 1.5, "AGENT", "agent")]
    lens = {
        "Participants": [{"ParticipantId": "p1", "ParticipantRole": "CUSTOMER"}],
        "Transcript": [{**part, "ParticipantId": "p1"}],
    }
    assert read_json(json.dumps(lens), "f") == [Turn(0.5, 1.5, "p1", "customer")]


def test_transcribe_speaker_labels():
    segments = [{"start_time": "0.5", "end_time": "1.5", "speaker_label": "spk_0", "items": []}]
    held = {"results": {"speaker_labels": {"segments": segments}, "transcripts": []}}
    assert read_json(json.dumps(held), "f") == [Turn(0.5, 1.5, "spk_0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        pytest.param('{"segments": ' + "[" * 100_000 + "]" * 100_000, "its values are nested too deeply", id="deep"),
        ('{"text": "hello"}', "has none of"),
        ('{"segments": [{"start": 0, "end": 1}]}', "names no speaker"),
        ('{"segments": [{"start": 0, "speaker": "A"}]}', "lacks 'end'"),
        ('{"segments": ["A"]}', "is not as it should be"),
        ('{"segments": [{"start": 2, "end": 1, "speaker": "A"}]}', "ends after it begins"),
        ('{"segments": [{"start": -1, "end": 1, "speaker": "A"}]}', "ends after it begins"),
        ('{"segments": [{"start": NaN, "end": 1, "speaker": "A"}]}', "where a time must stand"),
        ('{"Transcript": [{"BeginOffsetMillis": null, "ParticipantRole": "AGENT", "EndOffsetMillis": 1}]}', "a time"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ReadVoicesError, match=message):
        read_json(text, "f")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SPEAKER a 1 0 1", "has 5 fields"),
        ("SPEAKER a 1 8.2 3 <NA> <NA> customer service <NA> <NA>", "blank in a name: .*customer service.*as _"),
        ("SPEAKER a 1 8.2 3 <NA> <NA> customer service <NA>", "blank in a name"),
        ("SPEAKER a 1 8.2 3 <NA> <NA> customer service", "blank in a name"),
        ("SPEAKER call 1 1 0.5 1.5 <NA> <NA> customer <NA> <NA>", "blank in a name"),
        ("SPEAKER call 1 1 0.5 1.5 <NA> <NA> customer <NA>", "blank in a name"),
        ("SPEAKER call 1 1 0.5 1.5 <NA> <NA> customer", "blank in a name"),
        ("SPEAKER call 1 1 0.5 1.5 <NA> <NA> 2 <NA>", "blank in a name"),
        ("SPEAKER a 1 zero 1 <NA> <NA> X <NA> <NA>", "where a time must stand"),
        ("SPEAKER a 1 1 -2 <NA> <NA> X <NA> <NA>", "ends after it begins"),
        ("SPEAKER a 1 1 inf <NA> <NA> X <NA> <NA>", "where a time must stand"),
    ],
)
def test_rttm_that_cannot_be_meant_is_refused(line, message):
    with pytest.raises(ReadVoicesError, match=f"f, line 1 .*{message}|f, line 1.*{message}"):
        read_rttm(line, "f")


JSON = '{"segments": [{"start": 0, "end": 1, "speaker": "A"}]}'
SESSIONS = ["a/x.wav", "b/x.wav", "b/y.2.mp3", "Ü z.wav"]


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("a/x.rttm", 0),
        ("b/x.wav.rttm", 1),
        ("y.2.rttm", 2),
        ("B/Y.2.mp3.rttm", 2),
        ("Ü z.rttm", 3),
    ],
)
def test_a_file_in_a_folder_is_of_the_recording_that_it_is_named_after(tmp_path, name, number):
    folder = write(tmp_path, name, rttm("audio", TURNS))
    assert read_voices(folder, SESSIONS) == {number: tuple(TURNS)}


def test_one_rttm_of_many_recordings(tmp_path):
    write(tmp_path, "all.rttm", rttm("a/x", TURNS) + rttm("Ü z.wav", TURNS[:1]) + rttm("elsewhere", TURNS))
    assert read_voices(str(tmp_path / "all.rttm"), SESSIONS) == {0: tuple(TURNS), 3: (TURNS[0],)}


NOBODY = ["", "\n", ";; nobody speaks\n", "SPEAKER x 1 0 0 <NA> <NA> X <NA> <NA>"]
NOBODY_JSON = ['{"segments": []}', '{"Transcript": []}', '{"results": {"speaker_labels": {"segments": []}}}']


@pytest.mark.parametrize(
    ("name", "text"), [*(("a/x.rttm", text) for text in NOBODY), *(("a/x.json", text) for text in NOBODY_JSON)]
)
def test_a_file_may_say_that_nobody_speaks(tmp_path, name, text):
    folder = write(tmp_path, name, text)
    with pytest.raises(ReadVoicesError, match="has no turn in any of its 1 files"):
        read_voices(folder, SESSIONS)
    write(tmp_path, "y.2.rttm", rttm("audio", TURNS))
    assert read_voices(folder, SESSIONS) == {0: (), 2: tuple(TURNS)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/x.json": ""}, "no JSON"),
        ({"a/x.json": '{"segments": {}}', "b/x.rttm": rttm("u", TURNS)}, "names no speaker"),
        ({"a/x.rttm": "", "a/x.json": JSON}, "two places"),
        ({"q.rttm": "", "r.rttm": ""}, "of none of the 4 recordings"),
        ({"x.rttm": rttm("audio", TURNS)}, "may be 2 recordings"),
        ({"a/x.rttm": rttm("y.2", TURNS)}, "of another recording"),
        ({"a/x.rttm": rttm("u", TURNS), "a/x.json": JSON}, "two places"),
        ({"q.rttm": rttm("r", TURNS)}, "of none of the 4 recordings"),
        ({"q.rttm": "hello"}, "no line SPEAKER"),
        ({"q.txt": "hello"}, "no file named"),
    ],
)
def test_what_is_of_no_recording_or_of_two_is_refused(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(ReadVoicesError, match=message):
        read_voices(str(tmp_path), SESSIONS)


def test_what_is_not_there_or_no_utf_8_is_refused(tmp_path):
    with pytest.raises(ReadVoicesError, match="does not exist"):
        read_voices(str(tmp_path / "no.rttm"), SESSIONS)
    (tmp_path / "x.rttm").write_text(rttm("a/x", TURNS), encoding="utf-16")
    with pytest.raises(ReadVoicesError, match="it is text in UTF-16; save it in UTF-8"):
        read_voices(str(tmp_path), SESSIONS)
