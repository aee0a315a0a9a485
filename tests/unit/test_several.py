"""Which recordings are one session: in what order they follow, and what a table may not say of them."""

import json

import numpy as np
import pyarrow as pa
import pytest

from vaemo.audio.several import lies_at
from vaemo.errors import ReadManifestError
from vaemo.files import Found
from vaemo.parts.tally import Tally, count
from vaemo.pipeline.sources import RecordingsSource
from vaemo.scoring.calls import read_calls


def read(folder, rows, **options):
    path = folder / "calls.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_calls(str(path), **options)


@pytest.mark.parametrize(
    ("further", "order"),
    [
        ([{}, {}, {}], "abc"),
        ([{"date": "2026-11-24T08:00"}, {"date": "2026-11-23T10:05"}, {"date": "2026-11-23T10:04"}], "cba"),
        ([{"date": None}, {"date": "2026-11-23"}, {"date": "2026-11-23"}], "bca"),
        ([{"offset_s": 9, "date": "2026-11-22"}, {"offset_s": "3.5"}, {"offset_s": 0}], "cba"),
    ],
)
def test_recordings_follow_by_offset_then_date_then_row(tmp_path, further, order):
    rows = [{"session_id": "s", "path": f"{name}.wav", **more} for name, more in zip("abc", further, strict=True)]
    calls = read(tmp_path, [*rows, {"session_id": "t", "path": "t.wav"}], root="/calls")
    assert "".join(member.path[0] for member in calls.members["s"]) == order
    assert sorted(calls.session_ids) == ["s", "t"]
    assert calls.travel == (["date"] if "date" in further[0] else [])


def test_every_recording_has_its_roles_and_the_session_those_of_the_first(tmp_path):
    rows = [
        {"session_id": "s", "path": "x/a.wav", "role_ch0": "customer", "agent_id": "Ann", "process": "yes"},
        {"session_id": "s", "path": "/calls/a.wav", "role_ch0": "agent", "agent_id": "Bob", "process": "no"},
        {"session_id": "t", "path": "c.wav", "role_ch0": "mixed", "agent_id": None, "process": "no"},
    ]
    calls = read(tmp_path, rows, root="/calls")
    # The longest fitting name is meant: `a.wav` is the end of another path too.
    keys = [calls.key_of("s", path) for path in ("/old/x/a.wav", "a.wav", "/old/a.wav", "b.wav", None)]
    assert [calls.roles[key] for key in keys] == [(role,) for role in ("customer", "agent", "agent", *["customer"] * 2)]
    assert [calls.agent_ids[key] for key in keys[:2]] == ["Ann", "Bob"]
    assert calls.withheld(["s", "t"]).tolist() == [True, True]
    assert calls.take(["t", "s"]).rows["agent_id"].to_pylist() == [None, "Ann"]
    assert len(calls.of_recordings(["t", "s"])) == 2
    assert (calls.keys_of("t"), len(calls.keys_of("s"))) == (["t"], 2)
    assert lies_at("/x/./y\\a.wav", "y/a.wav")
    assert not lies_at("/x/ya.wav", "a.wav")


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"path": "a.wav"}, {"path": "./a.wav"}, r"row 2: the recording './a.wav' stands in row 1 already"),
        ({"path": "a.wav"}, {}, r"row 2: the session 's' has several rows, and no path in this one"),
        ({"path": "a.wav", "offset_s": 1}, {"path": "b.wav"}, r"row 2: .* no offset_s in this one"),
        ({"path": "a.wav", "offset_s": -0.5}, {"path": "b.wav"}, r"row 1: offset_s is -0.5; it counts seconds"),
        ({"path": "a.wav", "offset_s": "late"}, {"path": "b.wav"}, r"row 1: offset_s is 'late'; it must be a number"),
        ({"path": "a.wav", "offset_s": float("nan")}, {"path": "b.wav", "offset_s": 1}, r"row 1: .* no offset_s in"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, one, other, message):
    with pytest.raises(ReadManifestError, match=message):
        read(tmp_path, [{"session_id": "s", **one}, {"session_id": "s", **other}])


@pytest.mark.parametrize("last", [[("t", "b.wav"), ("t", "c.wav")], [("t", "b.wav")]])
def test_a_recording_of_two_sessions_is_refused(tmp_path, last):
    rows = [{"session_id": s, "path": p} for s, p in [("s", "a.wav"), ("s", "b.wav"), *last]]
    with pytest.raises(ReadManifestError, match=r"row 3: the recording 'b.wav' stands in row 2 already, .* 's'"):
        read(tmp_path, rows)


def test_a_listing_puts_together_what_is_there(tmp_path):
    def listed(rows, names=("a.wav", "sub/b.wav", "c.wav"), **options):
        found = [Found(name, f"/calls/{name}", 100, 1) for name in names]
        listing = RecordingsSource("/calls", listed=found, **options).list(read(tmp_path, rows))
        several = {
            listing.session_ids[index]: [(part.name, part.problem and part.problem[0]) for part in parts]
            for index, parts in listing.several.items()
        }
        return listing.session_ids, several

    rows = [{"session_id": "s", "path": path} for path in ("c.wav", "sub\\b.wav", "gone.wav")]
    together = {"s": [("c.wav", None), ("sub/b.wav", None), ("gone.wav", "missing")]}
    assert listed(rows) == (["a.wav", "s"], together)
    # A call of which nothing is there is another folder's; one recording may have another name than its file.
    assert listed(rows, ("a.wav",)) == (["a.wav"], {})
    assert listed([{"session_id": "t", "path": "a.wav"}], ("a.wav",)) == (["t"], {"t": [("a.wav", None)]})
    assert listed([{"session_id": "a.wav", "path": "c.wav"}])[0] == ["a.wav", "c.wav", "sub/b.wav"]
    assert listed(rows, exclude=("gone*",)) == (["a.wav", "s"], together)
    assert listed(rows, (*["c.wav", "sub/b.wav"], "gone.wav"), exclude=("gone*",))[1] == {"s": together["s"][:2]}
    with pytest.raises(ReadManifestError, match=r"'a.wav' is a recording below /calls, and by the table a session"):
        listed([{"session_id": "a.wav", "path": path} for path in ("c.wav", "sub/b.wav")])
    for other, path in (("t", "./c.wav"), ("c.wav", "c.wav"), ("t", "/calls/c.wav")):
        with pytest.raises(ReadManifestError, match=f"'c.wav' is of the session 's' and of the session '{other}'"):
            listed([{"session_id": "s", "path": "c.wav"}, {"session_id": other, "path": path}])


def test_overlaps_are_counted_with_the_part():
    rows = pa.table(
        {
            "session_id": ["s", "s", "t", "t", "u"],
            "utt_id": list("abcde"),
            "status": ["ok"] * 5,
            "reason": pa.nulls(5, pa.string()),
            "start_s": [0.0, 0.0, 0.0, None, 0.0],
            "end_s": [5.0, 1.0, 4.0, None, 9.0],
            "audio_path": ["1", "2", "1", "2", None],
            "offset_s": pa.array([0.0, 3.0, 0.0, 1.0, None]),
        }
    )
    counts = json.loads(json.dumps(count(rows)))
    assert counts["overlaps"] == [1, "s", 2.0]
    assert "overlaps" not in count(rows.filter(np.array([False, True, True, True, True])))
    tally = Tally()
    for _ in range(2):
        tally.add(counts)
    assert (tally.overlaps, tally.overlapping) == (2, ("s", 2.0))
