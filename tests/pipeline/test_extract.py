import json
import re

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from odd_files import ODD, without_length, write_av, write_odd_files
from processes import memory, watching
from speech_cases import call, overlap

from vaemo import utterances
from vaemo.audio import decoder as decoder_module
from vaemo.audio import recording as audio
from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.data.manifest import COLUMNS, read_manifest
from vaemo.features import load_extractors
from vaemo.parts.tally import Tally, count
from vaemo.pipeline.sources import RecordingsSource, Tools
from vaemo.scoring.roles import RoleRules
from vaemo.store import part_schema
from vaemo.units import STREAMS
from vaemo.utterances import Parties, extract_recording, extract_utterances

CONFIG = Config()


class Loudness:
    """An extractor that is quick to run and easy to check: level, length, and the first sample."""

    name, version, dim, fingerprint, uses_gpu = "loudness", "1", 3, "0" * 16, False

    def __init__(self):
        self.calls = []

    def __call__(self, utterances):
        self.calls.append(len(utterances))
        return np.array([[np.abs(x).mean(), len(x), x[0]] for x in utterances], np.float32).reshape(-1, 3)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    write_odd_files(folder)
    return folder


def manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps({"session_id": "s", "speaker_id": "p", **row}) for row in rows))
    return read_manifest(path)


def test_sixty_odd_files_become_sixty_rows(odd, decoder):
    assert len(ODD) >= 60
    rows = manifest(odd, [{"utt_id": name, "audio_path": name} for name in ODD])
    table = extract_utterances(rows, extractors={"speech": Loudness()}, config=CONFIG, decoder=decoder)
    found = dict(zip(table["utt_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert found == {name: status for name, (_, status) in ODD.items()}
    for row in table.select(["utt_id", "status", "reason", "speech", "bandwidth_hz"]).to_pylist():
        good = row["status"] == "ok"
        assert (row["speech"] is not None) == good, row
        assert (row["reason"] is None) == good, row
        assert (row["bandwidth_hz"] is not None) == good, row


def test_real_extractors_take_every_good_odd_file(odd, decoder):
    good = [name for name, (_, status) in ODD.items() if status == "ok"]
    rows = manifest(odd, [{"utt_id": name, "audio_path": name} for name in good])
    table = extract_utterances(rows, extractors=load_extractors(CONFIG.features), config=CONFIG, decoder=decoder)
    assert set(table["status"].to_pylist()) == {"ok"}
    for stream in STREAMS:
        assert np.isfinite(np.stack(table[stream].to_numpy())).all()


def test_odd_recordings_are_one_row_each_or_hold_what_was_found(odd, decoder):
    for name, (_, status) in ODD.items():
        table = extract_recording(str(odd / name), name, extractors={}, config=CONFIG, decoder=decoder)
        first = table.to_pylist()[0]
        if status in ("ok", "silent", "too_short"):
            # Noise and tones hold no speech.
            assert first["status"] == "silent", (name, first)
        else:
            assert table.num_rows == 1
            assert first["status"] == status, (name, first)
        assert (first["utt_id"], first["start_s"], first["end_s"]) == (f"{name}#c0-00000", None, None)
        assert first["reason"]


def test_a_table_of_reasons_names_counts_and_an_example(odd, decoder, capsys):
    rows = manifest(odd, [{"utt_id": name, "audio_path": name} for name in ODD])
    tally = Tally()
    tally.add(count(extract_utterances(rows, extractors={"speech": Loudness()}, config=CONFIG, decoder=decoder)))
    tally.say("sessions")
    lines = [line for line in capsys.readouterr().out.splitlines() if "without any speech" not in line]
    expected = sum(status == "undecodable" for _, status in ODD.values())
    assert lines[0].split()[:2] == [str(expected), "undecodable"]
    assert any("missing" in line and "gone.wav: there is no such file" in line for line in lines)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    samples, spoken = call(8, seed=11)
    soundfile.write(folder / "a.wav", samples.T, 16000, subtype="PCM_16")
    return folder / "a.wav", spoken


def test_a_recording_becomes_utterances_of_both_channels(recording, decoder):
    path, spoken = recording
    table = extract_recording(
        str(path), "x/a.wav", extractors=load_extractors(CONFIG.features), config=CONFIG, decoder=decoder
    )
    rows = table.to_pylist()
    recall, precision = overlap([(row["channel"], row["start_s"], row["end_s"]) for row in rows], spoken)
    assert recall >= 0.95
    assert precision >= 0.9
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["position"] for row in rows] == list(range(len(rows)))
    assert [row["start_s"] for row in rows] == sorted(row["start_s"] for row in rows)
    for channel in (0, 1):
        mine = [row for row in rows if row["channel"] == channel]
        assert [row["utt_id"] for row in mine] == [f"x/a.wav#c{channel}-{i:05d}" for i in range(len(mine))]
        assert {row["speaker_id"] for row in mine} == {f"x/a.wav#c{channel}"}
    dims = {stream: len(rows[0][stream]) for stream in STREAMS}
    assert table.schema.names[: len(part_schema(dims))] == part_schema(dims).names


FORMATS = {
    "ulaw.wav": lambda path, x: soundfile.write(path, x[::2], 8000, subtype="ULAW"),
    "alaw.wav": lambda path, x: soundfile.write(path, x[::2], 8000, subtype="ALAW"),
    "pcm.wav": lambda path, x: soundfile.write(path, x[::2], 8000, subtype="PCM_16"),
    "pcm24.wav": lambda path, x: soundfile.write(path, x.repeat(3, axis=0), 48000, subtype="PCM_24"),
    "layer3.mp3": lambda path, x: soundfile.write(path, x, 16000),
    "opus.ogg": lambda path, x: soundfile.write(path, x, 16000, format="OGG", subtype="OPUS"),
    "pcm.flac": lambda path, x: soundfile.write(path, x, 16000),
    "aac.m4a": lambda path, x: write_av(path, x, 16000, "aac"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_speech_is_found_in_every_format(decoder, tmp_path, name):
    samples, spoken = call(6, seed=12)
    FORMATS[name](tmp_path / name, samples.T)
    table = extract_recording(
        str(tmp_path / name), name, extractors={"speech": Loudness()}, config=CONFIG, decoder=decoder
    )
    found = [(row["channel"], row["start_s"], row["end_s"]) for row in table.to_pylist()]
    recall, precision = overlap(found, spoken)
    assert recall >= 0.95
    assert precision >= 0.9


def test_a_manifest_with_the_same_times_gives_the_same_features(recording, decoder, tmp_path):
    path, _ = recording
    extractors = load_extractors(CONFIG.features)
    found = extract_recording(str(path), "a", extractors=extractors, config=CONFIG, decoder=decoder)
    keys = ("utt_id", "start_s", "end_s", "channel")
    rows = manifest(tmp_path, [{k: row[k] for k in keys} | {"audio_path": str(path)} for row in found.to_pylist()])
    again = extract_utterances(rows, extractors=extractors, config=CONFIG, decoder=decoder)
    for stream in STREAMS:
        np.testing.assert_array_equal(np.stack(again[stream].to_numpy()), np.stack(found[stream].to_numpy()))


def test_blocks_and_buffers_change_nothing(recording, decoder, monkeypatch):
    path, _ = recording
    tools = {"extractors": {"speech": Loudness()}, "config": CONFIG, "decoder": decoder}
    whole = extract_recording(str(path), "a", **tools)
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 30_000)
    monkeypatch.setattr(utterances, "_BUFFER_S", 5.0)
    extractor = Loudness()
    parts = extract_recording(str(path), "a", **{**tools, "extractors": {"speech": extractor}})
    assert parts.equals(whole)
    assert len(extractor.calls) > 2


def test_roles_are_written_and_skipped_channels_cost_no_features(recording, decoder):
    path, _ = recording
    extractor = Loudness()
    table = extract_recording(
        str(path),
        "a",
        extractors={"speech": extractor},
        config=CONFIG,
        decoder=decoder,
        parties=Parties(
            roles_of=lambda n_channels: ["agent", "customer"][:n_channels], scored=lambda role: role == "customer"
        ),
    )
    rows = table.to_pylist()
    agent = [row for row in rows if row["channel"] == 0]
    assert {(row["role"], row["status"], row["reason"]) for row in agent} == {
        ("agent", "not_scored_role", "role agent is not scored")
    }
    assert all(row["speech"] is None and row["end_s"] > row["start_s"] for row in agent)
    assert {(row["role"], row["status"]) for row in rows if row["channel"] == 1} == {("customer", "ok")}
    assert sum(extractor.calls) == len(rows) - len(agent)


def test_how_many_channels_there_are_is_known_where_one_is_silent(recording, decoder, tmp_path):
    samples, rate = soundfile.read(recording[0])
    channels = {"one": samples.mean(axis=1), "two": samples * [1.0, 0.0], "three": np.pad(samples, ((0, 0), (0, 1)))}
    found = {}
    for name, signal in channels.items():
        soundfile.write(tmp_path / f"{name}.wav", signal, rate)
        path = str(tmp_path / f"{name}.wav")
        table = extract_recording(path, name, extractors={}, config=CONFIG, decoder=decoder)
        found[name] = {(row["channel"], row["n_channels"], row["role"]) for row in table.to_pylist()}
    assert found == {
        "one": {(0, 1, "mixed")},
        "two": {(0, 2, None)},
        "three": {(0, 3, None), (1, 3, None)},
    }


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (
            ("customer", "agent", "customer", "agent"),
            {(0, "customer", "ok"), (1, "agent", "ok"), (2, "customer", "copy"), (3, "agent", "copy")},
        ),
        (
            ("customer", "agent", "agent", "agent"),
            {(0, "mixed", "ok"), (1, "agent", "ok"), (2, "mixed", "ok"), (3, "agent", "copy")},
        ),
        ((None, "agent", None, None), {(channel, "mixed", "ok") for channel in range(4)}),
    ],
)
def test_copied_channels_are_judged_group_by_group(recording, roles, expected, decoder, tmp_path):
    samples, rate = soundfile.read(recording[0])
    path = str(tmp_path / "four.wav")
    soundfile.write(path, np.concatenate([samples, samples], axis=1), rate)
    parties = Parties(roles_of=lambda n: roles)
    table = extract_recording(path, "a", extractors={}, config=CONFIG, decoder=decoder, parties=parties)
    copies = {f"its channel holds the same as channel {channel}, which has the same role" for channel in (0, 1)}
    found = {
        (row["channel"], row["role"], "copy" if row["reason"] in copies else row["status"]) for row in table.to_pylist()
    }
    assert found == expected


def test_a_recording_is_opened_once(recording, monkeypatch):
    opened = []

    class Counting(Decoder):
        def open(self, path, *how):
            opened.append(path)
            return super().open(path, *how)

    with Counting(30.0) as counting:
        rules = RoleRules(channel_roles=("customer", "agent"))
        tools = Tools({"speech": Loudness()}, CONFIG, counting, rules)
        source = RecordingsSource(str(recording[0].parent))
        rows = source.read(
            {"recordings": json.dumps([[recording[0].name, str(recording[0])]])}, tools
        ).table.to_pylist()
    assert opened == [str(recording[0])]
    assert {(row["role"], row["status"]) for row in rows} == {("customer", "ok"), ("agent", "not_scored_role")}


@pytest.mark.parametrize("change", [bytes, without_length], ids=["said", "not said"])
def test_hours_of_silence_in_a_small_file_are_refused_in_little_memory(decoder, tmp_path, change):
    path = tmp_path / "a.flac"
    with soundfile.SoundFile(path, "w", 2000, 1) as file:
        for _ in range(12):
            file.write(np.zeros(3600 * 2000, np.int16))
    path.write_bytes(change(path.read_bytes()))
    assert path.stat().st_size < 1 << 20
    config = CONFIG.replace({"audio": {"max_recording_s": 1200.0}})
    tools = {"extractors": {"speech": Loudness()}, "config": config, "decoder": decoder}
    utterance = manifest(tmp_path, [{"utt_id": "a", "audio_path": str(path)}])
    with watching(memory, every_s=0.05) as seen:
        found, rows = extract_recording(str(path), "a", **tools), extract_utterances(utterance, **tools)
    for table in (found, rows):
        (row,) = table.to_pylist()
        assert (row["status"], row["start_s"]) == ("too_long", None)
        assert re.search(r"it lasts \d+ s or more; (1200|600) s are allowed", row["reason"])
    # All of it would be 2.8 GB at 16 kHz.
    assert max(seen) - seen[0] < 1 << 30


def test_a_recording_with_damage_keeps_what_is_around_it(recording, decoder, tmp_path):
    path, _ = recording
    samples, rate = soundfile.read(path)
    soundfile.write(tmp_path / "a.flac", samples, rate)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40_000] = bytes(40_000)
    (tmp_path / "a.flac").write_bytes(content)
    table = extract_recording(
        str(tmp_path / "a.flac"), "a", extractors={"speech": Loudness()}, config=CONFIG, decoder=decoder
    )
    last = table.to_pylist()[-1]
    assert (last["status"], last["start_s"]) == ("damaged", None)
    assert table["status"].to_pylist().count("ok") >= 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_recording_costs_the_utterance_that_holds_it(recording, decoder, tmp_path, bad):
    samples, rate = soundfile.read(recording[0])
    tools = {"extractors": {"speech": Loudness()}, "config": CONFIG, "decoder": decoder}

    def heard(name):
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
        return extract_recording(str(tmp_path / name), "a", **tools).to_pylist()

    whole = heard("whole.wav")
    first = whole[0]
    samples[round((first["start_s"] + first["end_s"]) / 2 * rate)] = bad
    rows = heard("a.wav")
    assert [row["status"] for row in rows] == ["nan_audio", *["ok"] * (len(whole) - 1), "nan_audio"]
    for row, before in zip(rows[1:-1], whole[1:], strict=True):
        assert (row["start_s"], row["end_s"], row["speech"]) == (before["start_s"], before["end_s"], before["speech"])
    assert (rows[-1]["start_s"], rows[-1]["channel"]) == (None, None)
    assert re.search(r"s of it are NaN or infinite, from \d+\.\d s on", rows[-1]["reason"])
    samples[:] = bad
    assert [row["status"] for row in heard("all.wav")] == ["nan_audio"]


def test_labels_go_to_the_models_range_and_unknown_keys_travel(recording, decoder, tmp_path):
    path, _ = recording
    given = [
        {"utt_id": "a", "start_s": 1.0, "end_s": 2.0, "valence": 1, "arousal": 7, "observed_valence": 4, "note": "x"},
        {"utt_id": "b", "start_s": 2.0, "end_s": 3.0, "valence": None, "arousal": 5.5, "note": "y"},
    ]
    rows = manifest(tmp_path, [row | {"audio_path": str(path)} for row in given])
    config = Config.load("default", ["labels.range=[1, 7]"])
    table = extract_utterances(rows, extractors={"speech": Loudness()}, config=config, decoder=decoder)
    assert table["valence"].to_pylist() == [0.0, None]
    assert table["arousal"].to_pylist() == [1.0, 0.75]
    assert table["observed_valence"].to_pylist() == [0.5, None]
    assert table["note"].to_pylist() == ["x", "y"]
    assert table["audio_path"].to_pylist() == [str(path)] * 2


def test_a_telephone_is_simulated_before_the_features(recording, decoder, tmp_path):
    path, _ = recording
    rows = manifest(tmp_path, [{"utt_id": "a", "start_s": 1.0, "end_s": 4.0, "audio_path": str(path)}])
    config = Config.load("default", ["audio.simulate_telephone=true"])
    extractors = load_extractors(CONFIG.features)
    wide, narrow = (
        extract_utterances(rows, extractors=extractors, config=c, decoder=decoder).to_pylist()[0]
        for c in (CONFIG, config)
    )
    assert wide["bandwidth_hz"] > 6000 > 4500 >= narrow["bandwidth_hz"]
    assert np.abs(np.subtract(wide["speech"], narrow["speech"])).max() > 1


def test_a_file_that_hangs_is_tried_once_for_all_its_rows(recording, tmp_path, monkeypatch):
    path, _ = recording
    program = tmp_path / "hangs.py"
    program.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(decoder_module, "_PROGRAM", program)
    rows = manifest(
        tmp_path,
        [{"utt_id": str(i), "start_s": float(i), "end_s": i + 1.0, "audio_path": str(path)} for i in range(20)],
    )
    with Decoder(0.5) as slow:
        table = extract_utterances(rows, extractors={"speech": Loudness()}, config=CONFIG, decoder=slow)
    assert table["status"].to_pylist() == ["timeout"] * 20


def test_what_an_extractor_cannot_measure_has_a_status(recording, decoder, tmp_path):
    class Picky(Loudness):
        def __call__(self, utterances):
            vectors = super().__call__(utterances)
            vectors[[len(x) < 12000 for x in utterances]] = np.nan
            return vectors

    path, _ = recording
    rows = manifest(
        tmp_path,
        [
            {"utt_id": "short", "start_s": 1.0, "end_s": 1.5, "audio_path": str(path)},
            {"utt_id": "long", "start_s": 1.0, "end_s": 2.5, "audio_path": str(path)},
        ],
    )
    extractors = {"speech": Loudness(), "prosody": Picky()}
    table = extract_utterances(rows, extractors=extractors, config=CONFIG, decoder=decoder)
    assert table["status"].to_pylist() == ["too_short", "ok"]
    assert table["reason"][0].as_py() == "loudness finds nothing to measure in 0.500 s"
    assert table["speech"].is_null().to_pylist() == [True, False]


def test_nothing_in_gives_nothing_out(decoder):
    rows = pa.table({name: pa.nulls(0, type_) for name, type_ in COLUMNS.items()})
    table = extract_utterances(rows, extractors={"speech": Loudness()}, config=CONFIG, decoder=decoder)
    assert table.num_rows == 0
    assert table.schema.field("speech").type == pa.list_(pa.float32(), 3)
