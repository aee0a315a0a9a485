"""RECOLA, SEWA and MSP-Conversation from fake trees: traces become labels of the utterances that are found."""

import re

import numpy as np
import pytest
import soundfile
from speech_cases import call, overlap

from vaemo.corpora import load_corpus
from vaemo.corpora.traces import Trace, gold, label_utterances
from vaemo.errors import ReadCorpusError, UsageError

# Traces are written with six digits and sampled every 40 or 100 ms.
LABEL = 0.01


def valence_at(time_s):
    return 0.6 * np.sin(time_s / 5)


def arousal_at(time_s):
    return 0.5 * np.cos(time_s / 7)


def mean_of(function, start_s, end_s):
    return function(np.linspace(start_s, end_s, 2000)).mean()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    samples, spoken = call(6, seed=21)
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    soundfile.write(path, samples.sum(axis=0), 16000)
    return path, [(0, start_s, end_s) for _, start_s, end_s in spoken]


def check(rows, spoken, lag_s, scale=1.0, offset_s=0.0):
    found = [(0, row["start_s"], row["end_s"]) for row in rows]
    recall, precision = overlap(found, spoken, 1)
    assert recall > 0.9
    assert precision > 0.85
    for row in rows:
        start_s, end_s = row["start_s"] + lag_s - offset_s, row["end_s"] + lag_s - offset_s
        assert row["valence"] == pytest.approx(scale * mean_of(valence_at, start_s, end_s), abs=scale * LABEL)
        assert row["arousal"] == pytest.approx(scale * mean_of(arousal_at, start_s, end_s), abs=scale * LABEL)


def test_a_label_is_the_mean_behind_the_lag_and_null_where_nothing_is():
    trace = Trace(np.arange(0, 10, 0.1), np.arange(0, 10, 0.1))
    rows = list(label_utterances([(1.0, 2.0), (7.5, 8.5), (9.0, 9.5)], {"valence": trace}, 2.0))
    assert rows[0]["valence"] == pytest.approx(3.45)
    # Half of it is annotated.
    assert rows[1]["valence"] == pytest.approx(9.7)
    assert rows[2]["valence"] is None


def test_gold_is_the_mean_of_who_annotates_at_the_time():
    early = Trace(np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0]))
    late = Trace(np.array([1.0, 3.5]), np.array([3.0, 3.0]))
    trace = gold([early, late])
    assert trace.mean(0.0, 0.9) == pytest.approx(1.0)
    assert trace.mean(1.1, 1.9) == pytest.approx(2.0)
    assert trace.mean(2.1, 3.4) == pytest.approx(3.0)


def write_avec(root, recording, name, change=lambda text: text):
    for dimension, function in (("valence", valence_at), ("arousal", arousal_at)):
        folder = root / "ratings_gold_standard" / dimension
        folder.mkdir(parents=True, exist_ok=True)
        header = "@relation GOLDSTANDARD\n\n@attribute Instance_name string\n@attribute frameTime numeric\n"
        times = np.arange(0, 60, 0.04)
        lines = "".join(f"'{name}',{t:.2f},{function(t):.6f}\n" for t in times)
        (folder / f"{name}.arff").write_text(f"{header}@attribute GoldStandard numeric\n\n@data\n{lines}")
    (root / "recordings_audio").mkdir(exist_ok=True)
    (root / "recordings_audio" / f"{name}.wav").symlink_to(recording[0])


def test_recola_in_avecs_layout(tmp_path, recording):
    write_avec(tmp_path, recording, "train_1")
    write_avec(tmp_path, recording, "dev_3")
    corpus = load_corpus("recola", tmp_path)
    assert {(row["session_id"], row["split"]) for row in corpus.rows} == {("train_1", "train"), ("dev_3", "dev")}
    check([row for row in corpus.rows if row["session_id"] == "dev_3"], recording[1], 2.0)
    other = load_corpus("recola", tmp_path, label_lag_s=4.0)
    check([row for row in other.rows if row["session_id"] == "dev_3"], recording[1], 4.0)


def test_recola_in_its_public_layout_has_names_with_blanks(tmp_path, recording):
    rng = np.random.default_rng(0)
    raters = ["FM1 ", "FM2 ", "FM3 ", "FF1 ", "FF2 ", "FF3"]
    for dimension, function in (("valence", valence_at), ("arousal", arousal_at)):
        folder = tmp_path / "RECOLA-Annotation" / "emotional_behaviour" / dimension
        folder.mkdir(parents=True)
        offsets = rng.normal(scale=0.2, size=6)
        offsets -= offsets.mean()
        lines = [";".join(["time", *raters])]
        lines += [";".join([f"{t:.2f}", *(f"{function(t) + o:.6f}" for o in offsets)]) for t in np.arange(0, 60, 0.04)]
        (folder / "P19.csv").write_text("\n".join(lines))
    (tmp_path / "RECOLA-Audio").mkdir()
    (tmp_path / "RECOLA-Audio" / "P19.wav").symlink_to(recording[0])
    corpus = load_corpus("recola", tmp_path)
    check(corpus.rows, recording[1], 2.0)
    assert {row["split"] for row in corpus.rows} == {None}


def test_recola_has_unlabelled_utterances_of_avecs_test_and_counts_other_audio_without_ratings(tmp_path, recording):
    write_avec(tmp_path, recording, "train_1")
    for name in ("test_2", "dev_3"):
        (tmp_path / "recordings_audio" / f"{name}.wav").symlink_to(recording[0])
    corpus = load_corpus("recola", tmp_path)
    assert {(row["session_id"], row["split"]) for row in corpus.rows} == {("train_1", "train"), ("test_2", "test")}
    assert {row.get("valence") for row in corpus.rows if row["split"] == "test"} == {None}
    assert "1 recordings have no ratings and are left out" in corpus.notes


@pytest.mark.parametrize(("name", "recorded"), [("recola", "train_1"), ("sewa", "Train_DE_01")])
def test_two_files_of_one_recording_are_refused_and_other_audio_is_not(tmp_path, recording, name, recorded):
    {"recola": write_avec, "sewa": write_sewa}[name](tmp_path, recording, recorded)
    for folder in ("denoised", "also"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "noise.wav").symlink_to(recording[0])
    n = len(load_corpus(name, tmp_path).rows)
    assert n > 0
    (tmp_path / "denoised" / f"{recorded}.wav").symlink_to(recording[0])
    with pytest.raises(ReadCorpusError, match=rf"holds {recorded}.wav twice, .*{recorded}.wav and .*; keep one"):
        load_corpus(name, tmp_path)


@pytest.mark.parametrize("lag_s", [float("nan"), float("inf"), -1.0])
def test_a_lag_is_a_number_of_seconds(tmp_path, lag_s):
    with pytest.raises(UsageError, match=rf"the lag of the labels is {lag_s:g} s; give a number of seconds"):
        load_corpus("sewa", tmp_path, label_lag_s=lag_s)


def test_files_that_macos_leaves_in_a_corpus_are_not_read(tmp_path, recording):
    write_avec(tmp_path / "a", recording, "train_1")
    write_raters(tmp_path / "b", recording, lambda text: text)
    write_sewa(tmp_path / "c", recording, "Train_DE_01")
    for folder, name in (("a", "recola"), ("b", "recola"), ("c", "sewa")):
        n = len(load_corpus(name, tmp_path / folder).rows)
        for path in [each for each in (tmp_path / folder).rglob("*") if each.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
            path.with_name(".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
        assert len(load_corpus(name, tmp_path / folder).rows) == n > 0


def test_recola_needs_audio_and_both_dimensions(tmp_path, recording):
    write_avec(tmp_path, recording, "train_1")
    (tmp_path / "recordings_audio" / "train_1.wav").unlink()
    with pytest.raises(ReadCorpusError, match=r"has ratings of train_1 and no train_1.wav"):
        load_corpus("recola", tmp_path)
    (tmp_path / "recordings_audio" / "train_1.wav").write_text("no audio")
    (tmp_path / "ratings_gold_standard" / "arousal" / "train_1.arff").unlink()
    with pytest.raises(ReadCorpusError, match="has no ratings of train_1, the other dimension has"):
        load_corpus("recola", tmp_path)
    write_avec(tmp_path / "b", recording, "train_1")
    (tmp_path / "b" / "recordings_audio" / "train_1.wav").unlink()
    (tmp_path / "b" / "recordings_audio" / "train_1.wav").write_text("no audio")
    with pytest.raises(ReadCorpusError, match="the corpus needs this recording"):
        load_corpus("recola", tmp_path / "b")


def write_sewa(root, recording, *names):
    (root / "labels").mkdir(parents=True)
    (root / "audio").mkdir()
    for name in names:
        (root / "audio" / f"{name}.wav").symlink_to(recording[0])
        if name.startswith("Test"):
            continue
        lines = [f"'{name}';{t:.6f};{arousal_at(t):.6f};{valence_at(t):.6f};0.0" for t in np.arange(0, 60, 0.1)]
        (root / "labels" / f"{name}.csv").write_text("name;timestamp;arousal;valence;liking\n" + "\n".join(lines))


def test_sewa_has_splits_cultures_and_hidden_test_labels(tmp_path, recording):
    write_sewa(tmp_path, recording, "Train_DE_01", "Devel_HU_02", "Test_CN_70")
    rows = load_corpus("sewa", tmp_path).rows
    assert {(row["session_id"], row["split"], row["fold"]) for row in rows} == {
        ("Train_DE_01", "train", "DE"),
        ("Devel_HU_02", "dev", "HU"),
        ("Test_CN_70", "test", "CN"),
    }
    check([row for row in rows if row["split"] == "dev"], recording[1], 2.0)
    assert {row.get("valence") for row in rows if row["split"] == "test"} == {None}
    (tmp_path / "audio" / "Train_DE_01.wav").unlink()
    with pytest.raises(ReadCorpusError, match=r"has labels of Train_DE_01 and no Train_DE_01.wav"):
        load_corpus("sewa", tmp_path)


COMMAS = "'-?[0-9]+,[0-9]+' is no number; one is needed, its decimals behind a point"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (r",(\S+)$", r",\1,0", "has 4 cells for 3 attributes"),
        (r"\.", ",", "has 5 cells for 3 attributes"),
        (r",[^,]*$", ",", "'' is no number"),
        (r",[^,]*$", ",?", "'.' is no number"),
        (r",[^,]*$", ",12.5", "'12.5' is not between -1 and 1"),
        (r",", ";", "has 1 cells for 3 attributes"),
    ],
)
def test_a_gold_trace_that_cannot_be_read_is_refused(tmp_path, recording, old, new, text):
    write_avec(tmp_path, recording, "train_1")
    path = tmp_path / "ratings_gold_standard" / "valence" / "train_1.arff"
    lines = path.read_text().splitlines()
    lines[9] = re.sub(old, new, lines[9])
    path.write_text("\n".join(lines))
    with pytest.raises(ReadCorpusError, match=rf"train_1.arff, line 10: .*{text}"):
        load_corpus("recola", tmp_path)


def test_a_gold_trace_of_another_form_is_refused(tmp_path, recording):
    write_avec(tmp_path, recording, "train_1")
    path = tmp_path / "ratings_gold_standard" / "valence" / "train_1.arff"
    text = path.read_text()
    path.write_text(text.replace("@data", "data"))
    with pytest.raises(ReadCorpusError, match=r"train_1.arff has no @data"):
        load_corpus("recola", tmp_path)
    path.write_text(text.partition("@data")[0] + "@data\n")
    with pytest.raises(ReadCorpusError, match=r"train_1.arff has no line of time and value"):
        load_corpus("recola", tmp_path)
    # Thousands of a second behind a point: 1.000 for 1,000.
    path.write_text(text.replace("'train_1',1.00,", "'train_1',1000.00,"))
    with pytest.raises(ReadCorpusError, match=r"train_1.arff: time goes back from 1000 to 1.04"):
        load_corpus("recola", tmp_path)


def write_raters(root, recording, change):
    for dimension in ("valence", "arousal"):
        folder = root / "RECOLA-Annotation" / "emotional_behaviour" / dimension
        folder.mkdir(parents=True)
        lines = ["time;FM1 ;FF3", *(f"{t:.2f};{valence_at(t):.4f};{arousal_at(t):.4f}" for t in np.arange(0, 60, 0.04))]
        (folder / "P19.csv").write_text(change("\n".join(lines)))
    (root / "P19.wav").symlink_to(recording[0])
    return root


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        (r"0\.04;(0)\.", r"0.04;\1,", 3, COMMAS),
        (r"\.", ",", 2, COMMAS),
        (r"\n0\.04;[^;]*;", "\n0.04;;", 3, "'' is no number"),
        (r"\n0\.04;[^;]*;", "\n0.04;", 3, "has 2 cells, the first line has 3"),
        (r"\n0\.04;[^;]*;", "\n0.04;n/a;", 3, "'n/a' is no number"),
        (r";", ",", 1, "there is no column time in 'time,FM1 ,FF3'"),
    ],
)
def test_raters_that_cannot_be_read_are_refused(tmp_path, recording, old, new, line, text):
    root = write_raters(tmp_path, recording, lambda written: re.sub(old, new, written))
    with pytest.raises(ReadCorpusError, match=rf"P19.csv, line {line}: .*{text}"):
        load_corpus("recola", root)


def test_raters_with_semicolons_at_the_end_of_lines_are_read(tmp_path, recording):
    plain = load_corpus("recola", write_raters(tmp_path / "a", recording, lambda text: text)).rows
    ended = load_corpus("recola", write_raters(tmp_path / "b", recording, lambda text: text.replace("\n", ";\n"))).rows
    assert [row["valence"] for row in ended] == [row["valence"] for row in plain]
    assert plain[0]["valence"] is not None


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        (r"(\d)\.(\d)", r"\1,\2", 2, COMMAS),
        (r"(Train_DE_01';0\.1\d*;)[^;]*", r"\1", 3, "'' is no number"),
        (r"(Train_DE_01';0\.1\d*;)", r"\g<1>x;", 3, "has 6 cells, the first line has 5"),
        (r";", ",", 1, "there is no column timestamp"),
        ("arousal", "Arousal", 1, "there is no column arousal"),
    ],
)
def test_a_sewa_file_that_cannot_be_read_is_refused(tmp_path, recording, old, new, line, text):
    (tmp_path / "labels").mkdir()
    (tmp_path / "Train_DE_01.wav").symlink_to(recording[0])
    lines = [f"'Train_DE_01';{t:.6f};{arousal_at(t):.6f};{valence_at(t):.6f};0.0" for t in np.arange(0, 60, 0.1)]
    written = "name;timestamp;arousal;valence;liking\n" + "\n".join(lines)
    (tmp_path / "labels" / "Train_DE_01.csv").write_text(re.sub(old, new, written))
    with pytest.raises(ReadCorpusError, match=rf"Train_DE_01.csv, line {line}: .*{text}"):
        load_corpus("sewa", tmp_path)
    (tmp_path / "labels" / "Train_DE_01.csv").unlink()
    with pytest.raises(ReadCorpusError, match=r"there is no .*Train_DE_01.csv; every recording of train and devel"):
        load_corpus("sewa", tmp_path)


@pytest.fixture
def conversation(tmp_path, recording):
    """Two annotated parts of a conversation that begins 100 s into its podcast, and one that nobody annotated."""
    (tmp_path / "Audio" / "Audio").mkdir(parents=True)
    (tmp_path / "Audio" / "Audio" / "MSP-Conversation_0047.wav").symlink_to(recording[0])
    (tmp_path / "Time_Labels").mkdir()
    (tmp_path / "Time_Labels" / "conversations.txt").write_text("MSP-Conversation_0047;100.0;150.0\n")
    parts = {"MSP-Conversation_0047_1": (100.0, 112.0), "MSP-Conversation_0047_2": (112.0, 130.0)}
    lines = [f"{part};{start};{end}" for part, (start, end) in parts.items()]
    (tmp_path / "Time_Labels" / "conversation_parts.txt").write_text(
        "\n".join([*reversed(lines), "MSP-Conversation_0047_3;130;150"])
    )
    (tmp_path / "partitions.txt").write_text("MSP-Conversation_0001;Train\nMSP-Conversation_0047;Validation\n")
    rng = np.random.default_rng(0)
    for dimension, function in (("Valence", valence_at), ("Arousal", arousal_at), ("Dominance", arousal_at)):
        (tmp_path / "Annotations" / dimension).mkdir(parents=True)
        for part, (start_s, end_s) in parts.items():
            for annotator, offset in (("001", 7.0), ("002", -7.0)):
                time_s = np.sort(rng.uniform(0, end_s - start_s + 5, 800))
                time_s[0] = 0.0
                header = ["metadata,,"] * (9 if annotator == "001" else 11)
                values = [f"{t:.4f},{100 * function(t) + offset:.3f}" for t in time_s]
                path = tmp_path / "Annotations" / dimension / f"{part}_{annotator}.csv"
                path.write_text("\n".join([*header, "Time,Annotations", *values]))
    return tmp_path


def test_msp_conversation_counts_time_from_the_conversation_and_its_parts(conversation, recording):
    corpus = load_corpus("msp-conversation", conversation)
    assert corpus.label_range == (-100.0, 100.0)
    assert {(row["session_id"], row["split"]) for row in corpus.rows} == {("MSP-Conversation_0047", "dev")}
    first = [row for row in corpus.rows if row["utt_id"].startswith("MSP-Conversation_0047_1-")]
    second = [row for row in corpus.rows if row["utt_id"].startswith("MSP-Conversation_0047_2-")]
    assert first
    assert second
    check(first, [span for span in recording[1] if span[2] <= 12.0], 2.0, 100.0)
    check(second, [span for span in recording[1] if span[1] >= 12.0 and span[2] <= 30.0], 2.0, 100.0, offset_s=12.0)
    # Here dominance is annotated as arousal is.
    assert any(row["dominance"] is not None for row in first)
    for row in (*first, *second):
        assert row["dominance"] == (None if row["arousal"] is None else pytest.approx(row["arousal"], abs=5))
    assert "1 parts have no annotation and are left out" in corpus.notes


@pytest.mark.parametrize(("border_s", "said"), [(109.8, None), (112.0, "1 utterances across the border of a part")])
def test_msp_conversation_counts_what_is_said_across_the_border_of_a_part(conversation, border_s, said):
    lines = f"MSP-Conversation_0047_1;100;{border_s}\nMSP-Conversation_0047_2;{border_s};124.2\n"
    (conversation / "Time_Labels" / "conversation_parts.txt").write_text(lines)
    notes = [note for note in load_corpus("msp-conversation", conversation).notes if "across" in note]
    assert notes == ([f"{said} are left out"] if said else [])


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (-1, "99,5,12,5", "'99,5,12,5' is no time and value"),
        (-1, "99,5;12,5", "'99,5;12,5' is no time and value"),
        (-1, "99.5;12.5", "'99.5;12.5' is no time and value"),
        (-1, "99.5,", "'99.5,' is no time and value"),
        (-1, "99.5,N/A", "'N/A' is no number"),
        (-1, "99.5,1250", "'1250' is not between -100 and 100"),
        (10, "0.01,", "'0.01,' is no time and value"),
        (10, "nobody,here", "'nobody' is no number"),
    ],
)
def test_an_msp_conversation_line_that_cannot_be_read_is_refused(conversation, line, text, message):
    path = conversation / "Annotations" / "Valence" / "MSP-Conversation_0047_1_001.csv"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines))
    number = 1 + line % len(lines)
    with pytest.raises(ReadCorpusError, match=rf"MSP-Conversation_0047_1_001.csv, line {number}: {message}"):
        load_corpus("msp-conversation", conversation)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Time_Labels/conversations.txt", "MSP-Conversation_0047;100,0;150,0", "line 1: '100,0' is no number"),
        ("Time_Labels/conversations.txt", "MSP-Conversation_0047 100 150", "line 1: .* has not 3 fields"),
        ("Time_Labels/conversations.txt", "MSP-Conversation_0048;1;2", "does not name MSP-Conversation_0047"),
        ("partitions.txt", "MSP-Conversation_0001;Train", "does not name MSP-Conversation_0047"),
        ("partitions.txt", "MSP-Conversation_0047;Held", "line 1: the split is 'Held'; known are Train, Validation"),
        ("partitions.txt", "MSP-Conversation_0047,Train", "line 1: .* has not 2 fields"),
    ],
)
def test_times_and_splits_that_cannot_be_read_are_refused(conversation, file, text, message):
    (conversation / file).write_text(text)
    with pytest.raises(ReadCorpusError, match=rf"{file}.*{message}"):
        load_corpus("msp-conversation", conversation)


def test_a_part_that_is_annotated_in_one_dimension_keeps_that_label(conversation):
    for path in (conversation / "Annotations" / "Arousal").glob("*_0047_1_*"):
        path.unlink()
    corpus = load_corpus("msp-conversation", conversation)
    half = [row for row in corpus.rows if row["utt_id"].startswith("MSP-Conversation_0047_1-")]
    assert {row.get("arousal") for row in half} == {None}
    assert all(row["valence"] is not None for row in half)
    assert "1 parts are annotated in one dimension alone" in corpus.notes


def test_msp_conversation_needs_audio_and_values(conversation):
    (conversation / "partitions.txt").rename(conversation / "splits.txt")
    with pytest.raises(ReadCorpusError, match=r"not laid out as msp-conversation .*FileNotFoundError.*partitions"):
        load_corpus("msp-conversation", conversation)
    (conversation / "splits.txt").rename(conversation / "partitions.txt")
    path = conversation / "Annotations" / "Valence" / "MSP-Conversation_0047_1_001.csv"
    path.write_text("metadata,,\n" * 9)
    with pytest.raises(ReadCorpusError, match="has no line of time and value"):
        load_corpus("msp-conversation", conversation)
    path.unlink()
    (conversation / "Audio" / "Audio" / "MSP-Conversation_0047.wav").unlink()
    with pytest.raises(ReadCorpusError, match="has annotations of MSP-Conversation_0047_1 and no"):
        load_corpus("msp-conversation", conversation)
