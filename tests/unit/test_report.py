"""The report: its numbers, its page, and what it must never show; how it looks is seen in a browser."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vaemo import files, scores
from vaemo.config import Config, ModelConfig, ScoreConfig
from vaemo.errors import ReadScoresError
from vaemo.report.overview import BINS, MIN_SCORED, Overview, calls_table, choose_calls, curves, over_time
from vaemo.report.page import build_report
from vaemo.report.write import write_report
from vaemo.tables import with_column
from vaemo.targets import Target
from vaemo.units import LabelScale


def make_scores(n_sessions=6, n=8, seed=0, **extra):
    """Customers scored, agents not; one utterance in ten silent; a recording that cannot be read."""
    rng = np.random.default_rng(seed)
    rows = []
    for session in range(n_sessions):
        level = rng.uniform(0.2, 0.8)
        for i in range(n):
            role = "agent" if i % 4 == 0 else "customer"
            status = "not_scored_role" if role == "agent" else "silent" if rng.random() < 0.1 else "ok"
            value = np.clip(level + rng.normal(0, 0.1, 2), 0, 1) if status == "ok" else (None, None)
            rows.append(
                {
                    "session_id": f"call-{session:03d}.wav",
                    "utt_id": f"call-{session:03d}.wav#c0-{i:05d}",
                    "speaker_id": "Jane Doe" if role == "agent" else f"caller-{session}",
                    "role": role,
                    "channel": int(role == "agent"),
                    "position": i,
                    "start_s": 3.0 * i,
                    "end_s": 3.0 * i + 2,
                    "valence": value[0],
                    "arousal": value[1],
                    "status": status,
                    "reason": "no sample above -60 dB" if status == "silent" else None,
                    "agent_name": "Jane Doe",
                    "date": f"2026-0{1 + session % 3}-11",
                }
                | extra
            )
    rows.append(
        {
            "session_id": "broken.wav",
            "utt_id": "broken.wav#c0-00000",
            "status": "undecodable",
            "reason": "</script><b>no RIFF header",
            "agent_name": "Jane Doe",
            "date": "2026-01-11",
        }
    )
    return scores.conform(pa.Table.from_pylist(rows))


def write(folder, table, provenance=None):
    ids = table["session_id"].unique().to_pylist()
    for number, part in enumerate((ids[: len(ids) // 2], ids[len(ids) // 2 :])):
        rows = table.filter(pa.compute.is_in(table["session_id"], pa.array(part)))
        scores.write_part(str(folder), f"part-{number}.parquet", rows, ScoreConfig(), ["agent_name", "date"])
    files.write_json(Path(folder) / scores.PROVENANCE, {"label_range": [0, 1], **(provenance or {})})
    return str(folder)


@pytest.fixture
def scored(tmp_path):
    return write(tmp_path / "scores", make_scores())


@pytest.fixture
def no_drawing(monkeypatch):
    for name in ("distributions", "plane", "call"):
        monkeypatch.setattr(f"vaemo.report.write.pictures.{name}", lambda *_, name=name: name.encode())


def data_of(page):
    """What the page's scripts read."""
    text = Path(page).read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_overview_counts_every_utterance(scored):
    table = make_scores()
    overview = Overview.of(scored)
    plain = overview.to_plain()
    valence = np.array([v for v in table["valence"].to_pylist() if v is not None])
    arousal = np.array([v for v in table["arousal"].to_pylist() if v is not None])
    assert plain["n_scored"] == len(valence)
    assert plain["mean"] == {
        "valence": pytest.approx(valence.mean(), abs=1e-4),
        "arousal": pytest.approx(arousal.mean(), abs=1e-4),
    }
    expected, _, _ = np.histogram2d(arousal, valence, bins=BINS, range=[[0, 1], [0, 1]])
    np.testing.assert_array_equal(plain["plane"], expected)
    np.testing.assert_array_equal(plain["histogram"]["valence"], expected.sum(axis=0))
    np.testing.assert_array_equal(plain["histogram"]["arousal"], expected.sum(axis=1))
    statuses = table["status"].to_pylist()
    assert plain["speech_s"] == 2.0 * len(valence)
    assert plain["n_not_scored_role"] == statuses.count("not_scored_role")
    assert {f["status"]: f["n"] for f in plain["failures"]} == {
        "silent": statuses.count("silent"),
        "undecodable": 1,
    }


def test_the_ends_of_the_range_are_counted():
    overview = Overview(LabelScale(-1, 1))
    ends = {"session_id": ["a"] * 3, "utt_id": list("abc"), "valence": [-1.0, 0, 1], "arousal": [1.0, 1, -1]}
    overview.add(scores.conform(pa.table(ends)))
    assert overview.histogram[0].nonzero()[0].tolist() == [0, BINS // 2, BINS - 1]
    assert overview.histogram[1, -1] == 2


def test_few_calls_are_all_drawn_and_of_many_the_first_of_each_ranking():
    table = make_scores(n_sessions=40, n=12)
    sessions = scores.summarise_sessions(table, ScoreConfig())
    assert choose_calls(sessions, 100) == sessions["session_id"].unique().to_pylist()
    chosen = choose_calls(sessions, 8)
    assert len(chosen) == len(set(chosen)) == 8
    rows = [row for row in sessions.to_pylist() if row["valence_mean"] is not None]
    firsts = {
        min(rows, key=lambda row: row["valence_mean"])["session_id"],
        min(rows, key=lambda row: row["valence_end_weighted"])["session_id"],
        max(rows, key=lambda row: row["arousal_mean"])["session_id"],
        min((row for row in rows if row["n_scored"] >= MIN_SCORED), key=lambda row: row["valence_slope_per_min"])[
            "session_id"
        ],
    }
    assert firsts <= set(chosen)
    assert set(calls_table(sessions, chosen)["session_id"]) == set(chosen)


def test_calls_over_time_are_gathered_by_day_then_month():
    table = make_scores(n_sessions=6)
    sessions = scores.summarise_sessions(table, ScoreConfig(), ["date"])
    days = over_time(sessions)
    assert [(day["period"], day["n"]) for day in days] == [("2026-01-11", 2), ("2026-02-11", 2), ("2026-03-11", 2)]
    january = [
        row["valence_mean"]
        for row in sessions.to_pylist()
        if row["date"] == "2026-01-11" and row["valence_mean"] is not None
    ]
    assert days[0]["valence"] == pytest.approx(np.mean(january), abs=1e-4)
    assert [month["period"] for month in over_time(sessions, most=2)] == ["2026"]
    assert over_time(scores.summarise_sessions(table, ScoreConfig())) == []


def test_curves_are_in_order_of_time_and_carry_labels():
    table = make_scores(n_sessions=1)
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    labels = pa.table(
        {
            "session_id": ["call-000.wav"] * 2,
            "utt_id": ["call-000.wav#c0-00001", "call-000.wav#c0-00003"],
            "valence": [0.25, 0.5],
            "arousal": [None, 0.75],
        }
    )
    curve = curves(shuffled, labels)["call-000.wav"]
    assert curve["start"] == sorted(curve["start"])
    assert curve["timed"]
    assert curve["who"] == ["customer", "agent"]
    assert curve["label_valence"][1] == 0.25
    assert curve["label_arousal"][1] is None
    assert curve["label_arousal"][3] == 0.75
    first = table.to_pylist()[1]
    assert curve["valence"][1] == pytest.approx(first["valence"], abs=1e-4)


def test_times_of_a_clock_are_shown_from_the_start_of_the_session():
    plain = curves(make_scores(n_sessions=1), None)["call-000.wav"]
    rows = [
        {**row, **{name: row[name] + 1_764_000_000.5 for name in ("start_s", "end_s")}}
        for row in make_scores(n_sessions=1).to_pylist()[:8]
    ]
    curve = curves(scores.conform(pa.Table.from_pylist(rows)), None)["call-000.wav"]
    assert (plain["from_s"], curve["from_s"]) == (0.0, 1_764_000_000.5)
    assert curve == {**plain, "from_s": curve["from_s"]}
    # A recording's own times are those of its player, however late somebody speaks.
    rows = [{**row, "start_s": row["start_s"] + 7000, "end_s": row["end_s"] + 7000} for row in rows]
    late = [{**row, "start_s": row["start_s"] % 1e6, "end_s": row["end_s"] % 1e6} for row in rows]
    assert curves(scores.conform(pa.Table.from_pylist(late)), None)["call-000.wav"]["start"][0] == late[0]["start_s"]


def test_several_models_give_a_deviation():
    table = make_scores(n_sessions=1)
    spread = pa.array([0.05] * table.num_rows, pa.float32())
    curve = curves(table.append_column("valence_sd", spread), None)["call-000.wav"]
    assert curve["valence_sd"] == [0.05] * 8
    assert "arousal_sd" not in curve


def test_without_times_a_curve_goes_by_place():
    table = make_scores(n_sessions=1, start_s=None, end_s=None, role=None, speaker_id=None, channel=1)
    curve = curves(table, None)["call-000.wav"]
    assert not curve["timed"]
    assert curve["start"] == curve["end"] == list(range(1, 9))
    assert curve["who"] == ["channel 1"]


def test_the_page_is_whole_and_loads_nothing(tmp_path, scored, no_drawing):
    counts = write_report(scored, str(tmp_path / "out"), Config())
    assert counts == {"calls": 7, "drawn": 7, "with_audio": 0}
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for marker in ("@STYLE@", "@SCRIPT@", "@DATA@"):
        assert marker not in text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert "default-src 'none'" in text
    # A reason that closes the script element stays text.
    assert "</script><b>" not in text
    data = data_of(tmp_path / "out" / "index.html")
    assert data["overview"]["failures"][-1]["reasons"] == ["</script><b>no RIFF header"]
    assert data["n_calls"] == data["n_drawn"] == 7
    assert set(data["curves"]) == set(data["calls"]["session_id"])
    pictures = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert pictures == {"distributions.png", "plane.png", *(f"call-{n:02d}.png" for n in range(1, 7))}


def test_markers_within_data_are_left_alone():
    page = build_report({"text": "@SCRIPT@ @DATA@ @STYLE@"}).decode()
    assert '{"text":"@SCRIPT@ @DATA@ @STYLE@"}' in page


def test_employees_are_not_named(tmp_path, scored, no_drawing):
    """Neither the column of the table of calls nor the speaker of an agent's channel reaches the page."""
    write_report(scored, str(tmp_path / "out"), Config())
    assert "Jane Doe" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_what_must_be_known_first_stands_on_the_page(tmp_path, no_drawing):
    provenance = {
        "synthetic": True,
        "notice": "All channels were scored without known roles: employees may be included.",
        "agents_exception": "safety",
        "agents_exception_reference": "DPO 12/26",
    }
    scored = write(tmp_path / "scores", make_scores(), provenance)
    write_report(scored, str(tmp_path / "out"), Config())
    texts = [notice["text"] for notice in data_of(tmp_path / "out" / "index.html")["notices"]]
    assert len(texts) == 3
    assert "synthetic" in texts[0]
    assert texts[1] == provenance["notice"]
    assert "exception 'safety' (reference: DPO 12/26)" in texts[2]


def test_labels_give_the_agreement(tmp_path, scored, no_drawing):
    table = make_scores()
    lines = [
        {name: row[name] for name in ("session_id", "utt_id", "speaker_id")}
        | {"audio_path": "a.wav", "valence": row["valence"], "arousal": row["arousal"], "split": "test"}
        for row in table.to_pylist()
        if row["valence"] is not None
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    write_report(scored, str(tmp_path / "out"), Config(), labels=str(path))
    data = data_of(tmp_path / "out" / "index.html")
    assert data["agreement"]["ccc_avg"] == pytest.approx(1.0, abs=1e-6)
    assert data["agreement"]["split"] == "test"
    curve = data["curves"]["call-001.wav"]
    assert curve["label_valence"] == curve["valence"]


def test_recordings_are_linked_relative_to_the_page(tmp_path, scored, no_drawing):
    audio = tmp_path / "my audio"
    audio.mkdir()
    (audio / "call-000.wav").write_bytes(b"")
    (audio / "call-001.wav.flac").write_bytes(b"")
    counts = write_report(scored, str(tmp_path / "out"), Config(), audio=str(audio))
    assert counts["with_audio"] == 2
    links = data_of(tmp_path / "out" / "index.html")["audio"]
    assert links == {
        "call-000.wav": "../my%20audio/call-000.wav",
        "call-001.wav": "../my%20audio/call-001.wav.flac",
    }


def test_a_call_in_several_recordings_is_drawn_and_played_in_its_own_time(tmp_path, no_drawing):
    rows = make_scores(n_sessions=1).to_pylist()[:4]
    places = [("/old/a/1.wav", 0.0), ("/old/b/2.wav", 50.0), ("/old/b/2.wav", 50.0), ("/old/3.wav", 90.0)]
    for number, (row, (path, offset_s)) in enumerate(zip(rows, places, strict=True)):
        row |= {"start_s": 2.0 * number, "end_s": 2.0 * number + 1, "audio_path": path, "offset_s": offset_s}
    table = scores.conform(pa.Table.from_pylist(rows[::-1]))
    assert scores.summarise_sessions(table, ScoreConfig())["valence_min_at_s"].to_pylist()[0] in {0.0, 52.0, 54.0, 96.0}
    scores.write_part(str(tmp_path / "scores"), "part-0.parquet", table, ScoreConfig())
    for name in ("a/1.wav", "2.wav"):
        (tmp_path / "audio" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "audio" / name).touch()
    write_report(str(tmp_path / "scores"), str(tmp_path / "out"), Config(), audio=str(tmp_path / "audio"))
    data = data_of(tmp_path / "out" / "index.html")
    (curve,), (links,) = data["curves"].values(), data["audio"].values()
    assert curve["start"] == [0.0, 52.0, 54.0, 96.0]
    assert (curve["recording"], curve["offset"]) == ([0, 1, 1, 2], [0.0, 50.0, 50.0, 90.0])
    assert links == ["../audio/a/1.wav", "../audio/2.wav", None]


def test_a_folder_without_the_recordings_is_refused(tmp_path, scored, no_drawing):
    (tmp_path / "audio").mkdir()
    with pytest.raises(ReadScoresError, match=r"none of the 7 calls has a recording in .*'call-000\.wav' would be"):
        write_report(scored, str(tmp_path / "out"), Config(), audio=str(tmp_path / "audio"))


def test_of_many_calls_only_the_first_are_drawn_and_all_are_counted(tmp_path, no_drawing):
    table = make_scores(n_sessions=60)
    scored = write(tmp_path / "scores", table)
    counts = write_report(scored, str(tmp_path / "out"), Config(), top=10)
    assert counts["calls"] == 61
    assert counts["drawn"] == 10
    data = data_of(tmp_path / "out" / "index.html")
    assert len(data["curves"]) == 10
    assert set(data["calls"]["session_id"]) == set(data["curves"])
    scored_rows = sum(value is not None for value in table["valence"].to_pylist())
    assert data["overview"]["n_scored"] == scored_rows


def test_calls_where_nothing_is_scored_make_a_report(tmp_path):
    """With real drawing: empty distributions must not break it."""
    table = make_scores(n_sessions=2, valence=None, arousal=None, status="silent")
    scored = write(tmp_path / "scores", table)
    write_report(scored, str(tmp_path / "out"), Config())
    assert data_of(tmp_path / "out" / "index.html")["overview"]["mean"] == {"valence": None, "arousal": None}


def test_voices_of_one_role_stay_apart_and_calls_without_evidence_are_listed(tmp_path, no_drawing):
    heard = make_scores(n_sessions=1)
    voices = make_scores(n_sessions=3, role="unknown", status="not_scored_role", valence=None, arousal=None, channel=0)
    rows = [row for row in voices.to_pylist() if row["session_id"] > "call-000.wav"]
    for number, row in enumerate(rows):
        row["voice"] = number % 2
    table = scores.conform(pa.Table.from_pylist([*heard.to_pylist(), *(r for r in rows if r["position"] is not None)]))
    write_report(write(tmp_path / "scores", table), str(tmp_path / "out"), Config())
    data = data_of(tmp_path / "out" / "index.html")
    assert data["unscored"] == {"n": 2, "session_id": ["call-001.wav", "call-002.wav"]}
    assert data["curves"]["call-001.wav"]["who"] == ["unknown, voice 0", "unknown, voice 1"]
    assert "customer" in data["curves"]["call-000.wav"]["who"]


def test_pictures_are_drawn(tmp_path):
    from vaemo.evaluation import pictures

    curve = curves(make_scores(n_sessions=1), None)["call-000.wav"]
    overview = Overview.of(write(tmp_path / "scores", make_scores()))
    for png in (
        pictures.distributions(overview.histogram, overview.scale),
        pictures.plane(overview.plane, overview.scale),
        pictures.call("call", curve, overview.scale),
    ):
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000


@pytest.mark.long
def test_a_report_shows_the_targets_that_were_scored(tmp_path):
    """Any names, and one of the whole call; nothing of valence where none was scored."""
    targets = ("effort", "dominance", "ease", Target("csat", "session"))
    table, random = make_scores(n_sessions=3).drop_columns(["valence", "arousal"]), np.random.default_rng(0)
    scored = table["status"].to_numpy(zero_copy_only=False) == "ok"
    for name in ("effort", "dominance", "ease", "csat"):
        table = table.append_column(name, pa.array(random.uniform(0, 1, len(table)), pa.float32(), mask=~scored))
    folder = tmp_path / "scores"
    scores.write_part(str(folder), "part-0.parquet", table, ScoreConfig(), targets=targets)
    files.write_json(folder / scores.PROVENANCE, scores.targets_said(ModelConfig(targets=targets)))
    config = Config().replace({"score": {"low": {"effort": 0.25}}})
    assert write_report(str(folder), str(tmp_path / "out"), config)["calls"] > 2
    data = data_of(tmp_path / "out" / "index.html")
    assert list(data["targets"]) == ["effort", "dominance", "ease"]
    assert len(set(data["targets"].values())) == 3
    assert data["low_at"] == {"effort": 0.25, "dominance": 0.4, "ease": 0.4}
    assert data["session_targets"] == ["csat"]
    assert len(data["calls"]["csat"]) == len(data["calls"]["effort_mean"])
    planes = data["overview"]["planes"]
    assert set(planes) == {f"{a},{b}" for a in data["targets"] for b in data["targets"] if a != b}
    assert np.array_equal(planes["ease,effort"], np.transpose(planes["effort,ease"]))
    assert np.sum(planes["effort,ease"]) == data["overview"]["n_scored"] == scored.sum()
    assert (tmp_path / "out" / "pictures" / "plane.png").exists()


def test_scores_of_whole_calls_alone_are_counted_and_ranked(tmp_path, no_drawing):
    rows = make_scores(n_sessions=5).drop_columns(["valence", "arousal"])
    last = [n for n in range(rows.num_rows) if n % 8 == 7 and rows["status"][n].as_py() == "ok"]
    said = [None] * rows.num_rows
    for place, n in enumerate(last):
        said[n] = 0.9 - 0.05 * place
    targets = (Target("csat", "session"),)
    rows = rows.append_column("csat", pa.array(said, pa.float32()))
    scores.write_part(str(tmp_path / "s"), "part-0.parquet", rows, ScoreConfig(), targets=targets)
    provenance = {"targets": [{"name": "csat", "level": "session"}]}
    files.write_json(str(tmp_path / "s" / scores.PROVENANCE), provenance)
    counts = write_report(str(tmp_path / "s"), str(tmp_path / "out"), Config(), top=2)
    data = data_of(tmp_path / "out" / "index.html")
    overview = data["overview"]
    assert counts["drawn"] == 2
    assert data["of_calls"]
    assert list(data["targets"]) == ["csat"]
    assert overview["n_scored"] == len(last) == sum(overview["histogram"]["csat"])
    assert overview["mean"]["csat"] == pytest.approx(np.mean([value for value in said if value is not None]), abs=1e-4)
    assert min(data["calls"]["csat"]) == pytest.approx(min(value for value in said if value is not None))


def test_calls_that_fit_least_and_best_are_drawn_and_listed(tmp_path, no_drawing):
    table = make_scores(n_sessions=12)
    out = str(tmp_path / "s")

    def judged(utterances, sessions):
        values = pa.array(np.linspace(0, 1, sessions.num_rows), pa.float32())
        known = sessions.append_column("novelty", values).append_column(
            "novelty_of", pa.array(["speech"] * len(values))
        )
        # The agent's row of a call follows the customer's.
        nothing = [pa.nulls(len(values), known[name].type) for name in ("novelty", "novelty_of")]
        agents = with_column(with_column(known, "novelty", nothing[0]), "novelty_of", nothing[1])
        return pa.concat_tables([known, agents]).sort_by("session_id")

    scores.write_part(out, "part-0.parquet", table, ScoreConfig(), further=judged)
    files.write_json(files.join(out, scores.PROVENANCE), {"label_range": [0, 1]})
    fit = {"beyond": 0.4, "expected": 0.05, "most": ["call-011.wav", "erased.wav"], "least": ["call-000.wav"]}
    files.write_json(files.join(out, "_fit.json"), fit)
    write_report(out, str(tmp_path / "out"), Config(), top=1)
    data = data_of(tmp_path / "out" / "index.html")
    assert [call["session_id"] for call in data["fit"]["most"]] == ["call-011.wav"]
    of_call = scores.read_sessions(out).filter(pc.equal(scores.read_sessions(out)["session_id"], "call-011.wav"))
    assert data["fit"]["most"][0]["novelty"] == pytest.approx(pc.max(of_call["novelty"]).as_py(), abs=1e-3)
    assert (data["fit"]["least"][0]["novelty"], data["fit"]["least"][0]["novelty_of"]) == (0, "speech")
    assert {"call-000.wav", "call-011.wav"} <= set(data["curves"])
    (notice,) = data["notices"]
    assert notice["kind"] == "warning"
    assert notice["text"].startswith("40 % of the calls are more unusual")


def test_calls_whose_utterances_are_not_written_yet_are_left_out(tmp_path, no_drawing):
    folder = write(tmp_path / "scores", make_scores())
    later = make_scores(n_sessions=9).filter(pc.greater(make_scores(n_sessions=9)["session_id"], "call-005.wav"))
    later = later.filter(pc.starts_with(later["session_id"], "call"))
    scores.write_part(folder, "part-9.parquet", later, ScoreConfig(), ["agent_name", "date"])
    Path(folder, "utterances", "part-9.parquet").unlink()
    assert write_report(folder, str(tmp_path / "out"), Config()) == {"calls": 7, "drawn": 7, "with_audio": 0}
    page = data_of(tmp_path / "out" / "index.html")
    assert "3 calls are left out" in str(page["notices"])
    assert "call-006.wav" not in str(page)


def test_scores_of_which_everything_is_erased_make_a_report(tmp_path):
    table = make_scores()
    folder = write(tmp_path / "scores", table)
    ids = table["session_id"].unique().to_pylist()
    for path in Path(folder).rglob("part-*.parquet"):
        rest = files.read_parquet(str(path)).slice(0, 0)
        novel = {"novelty": pa.array([], pa.float32()), "novelty_of": pa.array([], pa.string())}
        for name, column in novel.items() if path.parent.name == "sessions" else ():
            rest = with_column(rest, name, column) if name in rest.column_names else rest.append_column(name, column)
        files.write_parquet_whole(str(path), rest)
    fit = {"n_calls": 7, "beyond": 0.0, "expected": 0.05, "most": ids, "least": ids[::-1]}
    files.write_json(f"{folder}/_fit.json", fit)
    (tmp_path / "audio").mkdir()
    counts = write_report(folder, str(tmp_path / "out"), Config(), audio=str(tmp_path / "audio"))
    assert counts == {"calls": 0, "drawn": 0, "with_audio": 0}
    assert data_of(tmp_path / "out" / "index.html")["fit"]["most"] == []
