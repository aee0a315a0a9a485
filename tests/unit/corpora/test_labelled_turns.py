"""IEMOCAP, MSP-IMPROV and MSP-Podcast from fake trees that hold the traps other loaders fall into."""

import json
import re

import numpy as np
import pytest
import soundfile

from vaemo.config import Config
from vaemo.corpora import load_corpus
from vaemo.corpora.__main__ import main
from vaemo.data.manifest import read_manifest
from vaemo.errors import ReadCorpusError, ReadManifestError
from vaemo.features import load_extractors
from vaemo.utterances import extract_utterances


def by_id(corpus):
    rows = {row["utt_id"]: row for row in corpus.rows}
    assert len(rows) == len(corpus.rows)
    return rows


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=8000), 16000)


IEMOCAP_DIALOG = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[12.8000 - 14.0000]\t{0}_M000\tang\t[0.5000, 5.5000, 4.0000]
C-E2:\tAnger;\t()
A-M1:\tval 1; act 5; dom  4;\t()

[6.2901 - 8.2357]\t{0}_F000\tneu\t[2.5000, 3.0000, 2.0000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t(caf\xe9)

[8.2357 - 9.0000]\t{0}_F001\txxx\t[4.0000, 2.0000, 1.0000]
"""


@pytest.fixture
def iemocap(tmp_path):
    root = tmp_path / "IEMOCAP_full_release"
    for session, dialogs in (("1", ["Ses01F_impro01", "Ses01M_script01_1"]), ("5", ["Ses05M_impro02"])):
        folder = root / f"Session{session}" / "dialog" / "EmoEvaluation"
        (folder / "Categorical").mkdir(parents=True)
        (folder / "Categorical" / "Ses01F_impro01_e1_cat.txt").write_text("[1 - 2]\tno")
        for dialog in dialogs:
            (folder / f"{dialog}.txt").write_text(IEMOCAP_DIALOG.format(dialog), encoding="latin-1")
            (folder / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")
            for turn in ("M000", "F000", "F001"):
                sound(root / f"Session{session}" / "sentences" / "wav" / dialog / f"{dialog}_{turn}.wav")
    return tmp_path


def test_iemocap_turns_are_ordered_and_belong_to_who_speaks(iemocap):
    corpus = load_corpus("iemocap", iemocap)
    rows = by_id(corpus)
    assert len(rows) == 9
    turns = [row["utt_id"][-4:] for row in corpus.rows if row["session_id"] == "Ses01F_impro01"]
    assert turns == ["F000", "F001", "M000"]
    # The markers were worn by the woman in Ses01F: no word of who speaks.
    assert rows["Ses01F_impro01_M000"]["speaker_id"] == "Ses01_M"
    assert rows["Ses01M_script01_1_F000"]["speaker_id"] == "Ses01_F"
    assert {row["speaker_id"] for row in rows.values()} == {"Ses01_F", "Ses01_M", "Ses05_F", "Ses05_M"}
    assert {(row["session_id"][:5], row["fold"]) for row in rows.values()} == {("Ses01", "1"), ("Ses05", "5")}


def test_iemocap_labels_are_valence_then_arousal_clipped_and_counted(iemocap):
    corpus = load_corpus("iemocap", iemocap)
    row = by_id(corpus)["Ses01F_impro01_F000"]
    assert (row["valence"], row["arousal"]) == (2.5, 3.0)
    beyond = by_id(corpus)["Ses01F_impro01_M000"]
    assert (beyond["valence"], beyond["arousal"]) == (1.0, 5.0)
    assert (row["dominance"], beyond["dominance"]) == (2.0, 4.0)
    assert corpus.notes == ["6 labels outside [1, 5] were clipped to it"]
    assert corpus.label_range == (1.0, 5.0)


def test_iemocap_raters_are_others_than_the_actors(iemocap):
    path = iemocap / "IEMOCAP_full_release" / "Session5" / "dialog" / "EmoEvaluation" / "Ses05M_impro02.txt"
    more = "A-E2:\tval 5; act 4; dom  ;\t()\nA-E4:\tval 4; act 3; dom  3;\t()\nA-F1:\tval 1; act 1; dom  1;\t()\n\n"
    changed(path, ("(caf\xe9)\n", f"(caf\xe9)\n{more}"), encoding="latin-1")
    rows = by_id(load_corpus("iemocap", iemocap))
    rated = rows["Ses05M_impro02_F000"]
    assert [rated[f"{name}_raters"] for name in ("valence", "arousal", "dominance")] == [3, 3, 2]
    assert [rated[f"{name}_rater_sd"] for name in ("valence", "arousal", "dominance")] == pytest.approx(
        [1, 1, 0.5**0.5]
    )
    alone, himself = rows["Ses01F_impro01_F000"], rows["Ses05M_impro02_M000"]
    assert (alone["valence_raters"], alone["valence_rater_sd"]) == (1, None)
    assert (himself["valence_raters"], himself["valence_rater_sd"]) == (None, None)


def test_iemocap_is_written_checked_and_extracted(iemocap, tmp_path, capsys):
    out = tmp_path / "m.jsonl"
    main(["iemocap", str(iemocap), "--out", str(out)])
    said = capsys.readouterr().out
    assert "9 utterances (9 labelled), 3 sessions, 4 speakers" in said
    assert "fold: 1 6, 5 3" in said
    assert "--set labels.range=[1,5]" in said
    table = read_manifest(out, label_range=(1, 5))
    config = Config.load("default", ["labels.range=[1, 5]", "features.prosody=none"])
    store = extract_utterances(table, extractors=load_extractors(config.features), config=config)
    # Turns are files of their own: their time in the dialog must not cut them.
    assert set(store["status"].to_pylist()) == {"ok"}
    assert store["duration_s"].to_pylist() == [0.5] * 9
    assert min(store["valence"].to_pylist()) == 0.0


IMPROV = """UTD-IMPROV-S01A-F01-S-FM01.avi; N; A:1.000000; V:3.500000; D:4.000000; N:4.200000;
WORKER0001; neutral; none; A:1; V:3;

UTD-IMPROV-S01A-M01-S-FM02.avi; A; A:4.500000; V:1.500000; D:3.000000; N:NaN;
UTD-IMPROV-S01A-F02-P-MF01.avi; H; A:3.000000; V:5.000000; D:3.000000; N:4.000000;
"""


@pytest.mark.parametrize(("name", "audio"), [("Evalution.txt", "Audio"), ("Evaluation.txt", ".")])
def test_msp_improv_turns_arousal_round_and_finds_the_audio(tmp_path, name, audio):
    (tmp_path / name).write_text(IMPROV)
    sound(tmp_path / audio / "session1" / "S01A" / "S" / "MSP-IMPROV-S01A-F01-S-FM01.wav")
    rows = by_id(load_corpus("msp-improv", tmp_path))
    first = rows["MSP-IMPROV-S01A-F01-S-FM01"]
    # 1 was "very active".
    assert (first["valence"], first["arousal"]) == (3.5, 5.0)
    # Dominance was asked from weak to strong.
    assert first["dominance"] == 4.0
    assert (first["session_id"], first["speaker_id"], first["fold"]) == ("session1-S01A-S", "F01", "1")
    assert soundfile.info(first["audio_path"]).frames == 8000
    assert rows["MSP-IMPROV-S01A-M01-S-FM02"]["arousal"] == 1.5
    assert rows["MSP-IMPROV-S01A-M01-S-FM02"]["session_id"] == first["session_id"]
    assert rows["MSP-IMPROV-S01A-F02-P-MF01"]["fold"] == "2"


PODCAST = [
    ("MSP-PODCAST_0001_0139.wav", "N", 2.4, 4.0, "30", "Train"),
    ("MSP-PODCAST_0001_0008.wav", "H", 6.0, 5.0, "30", "Train"),
    ("MSP-PODCAST_0001_0200.wav", "H", 6.0, 5.0, "Unknown", "Development"),
    ("MSP-PODCAST_0002_0001.wav", "X", 7.2, 1.0, "31", "Test1"),
    ("MSP-PODCAST_0003_0001.wav", "", "", "", "Unknown", "Test3"),
]
PODCAST_HEADER = ("FileName", "EmoClass", "EmoAct", "EmoVal", "SpkrID", "Split_Set")


@pytest.mark.parametrize(
    ("labels", "file", "audio", "dev"),
    [
        ("Labels", "labels_consensus.csv", "Audios", "Development"),
        ("Labels", "labels_concensus.csv", "Audios", "Validation"),
        ("label", "labels_concensus.json", "Audio", "Validation"),
    ],
)
def test_msp_podcast_in_all_its_spellings(tmp_path, labels, file, audio, dev):
    lines = [[dev if cell == "Development" else cell for cell in line] for line in PODCAST]
    (tmp_path / labels).mkdir()
    (tmp_path / audio).mkdir()
    if file.endswith("json"):
        entries = {line[0]: dict(zip(PODCAST_HEADER[1:], line[1:], strict=True)) for line in lines}
        (tmp_path / labels / file).write_text(json.dumps(entries))
    else:
        text = "\n".join(",".join(map(str, line)) for line in [PODCAST_HEADER, *lines])
        (tmp_path / labels / file).write_text(text)
    corpus = load_corpus("msp-podcast", tmp_path)
    rows = by_id(corpus)
    assert [row["split"] for row in rows.values()].count("train") == 2
    first = rows["MSP-PODCAST_0001_0139"]
    assert (first["valence"], first["arousal"], first["speaker_id"]) == (4.0, 2.4, "30")
    train = [row["utt_id"] for row in corpus.rows if row["session_id"] == first["session_id"]]
    assert train == ["MSP-PODCAST_0001_0008", "MSP-PODCAST_0001_0139"]
    held_out = rows["MSP-PODCAST_0001_0200"]
    assert (held_out["split"], held_out["split_set"], held_out["speaker_id"]) == (
        "dev",
        dev,
        "unknown-MSP-PODCAST_0001",
    )
    assert held_out["session_id"] != first["session_id"]
    hidden = rows["MSP-PODCAST_0003_0001"]
    assert (hidden["valence"], hidden["split"]) == (None, "test")
    assert rows["MSP-PODCAST_0002_0001"]["arousal"] == 7.0
    assert "2 turns have no known speaker; each podcast's count as one" in corpus.notes
    assert first["audio_path"].endswith(f"{audio}/MSP-PODCAST_0001_0139.wav")


def changed(path, *replaced, encoding="utf-8"):
    """Save a file again with other text in it, as programs do."""
    text = path.read_text(encoding=encoding)
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding=encoding)


IEMOCAP_TURN = "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 3.0000, 2.0000]"
IMPROV_TURN = "UTD-IMPROV-S01A-M01-S-FM02.avi; A; A:4.500000; V:1.500000;"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[2.5000, 3.0000, 2.0000]", "[2,5000, 3,0000, 2,0000]", "'2,5000' is no number; one is needed, its decimals"),
        ("[2.5000, 3.0000, 2.0000]", "[2,5000; 3,0000; 2,0000]", "is no line of a turn"),
        ("2.5000", "NaN", "'NaN' is no number"),
        ("2.5000", "", "is no line of a turn"),
        ("2.5000", "25000", "'25000' is not between 1 and 5"),
        ("[6.2901 - 8.2357]", "[6,2901 - 8,2357]", "'6,2901' is no number"),
        ("[6.2901 - 8.2357]\t", "[6.2901 - 8.2357];", "is no line of a turn"),
        ("\tneu\t", "\t", "is no line of a turn"),
        ("[6.2901", '"[6.2901', "is no line of a turn"),
    ],
)
def test_an_iemocap_line_that_cannot_be_read_is_refused(iemocap, old, new, text):
    path = iemocap / "IEMOCAP_full_release/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    changed(path, (IEMOCAP_TURN, IEMOCAP_TURN.replace(old, new)), encoding="latin-1")
    with pytest.raises(ReadCorpusError, match=rf"Ses01F_impro01.txt, line 7: .*{re.escape(text)}"):
        load_corpus("iemocap", iemocap)


def test_an_iemocap_file_without_turns_is_refused(iemocap):
    path = iemocap / "IEMOCAP_full_release/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    path.write_text(path.read_text(encoding="latin-1"), encoding="utf-16")
    with pytest.raises(ReadCorpusError, match=r"Ses01F_impro01.txt has no line of a turn"):
        load_corpus("iemocap", iemocap)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("A:4.500000", "A:4,500000", "'4,500000' is no number; one is needed, its decimals behind a point"),
        ("V:1.500000", "V:NaN", "'NaN' is no number"),
        ("V:1.500000", "V:", "is no line of a turn"),
        ("V:1.500000", "V: ", "'' is no number"),
        ("V:1.500000", "V:15.0", "'15.0' is not between 1 and 5"),
        ("; A; ", "; ", "is no line of a turn"),
        (";", ",", "is no line of a turn"),
        ("UTD", '"UTD', "is no line of a turn"),
    ],
)
def test_an_msp_improv_line_that_cannot_be_read_is_refused(tmp_path, old, new, text):
    (tmp_path / "Evalution.txt").write_text(IMPROV.replace(IMPROV_TURN, IMPROV_TURN.replace(old, new)))
    with pytest.raises(ReadCorpusError, match=rf"Evalution.txt, line 4: .*{re.escape(text)}"):
        load_corpus("msp-improv", tmp_path)


def write_podcast(root, change=lambda text: text, encoding="utf-8"):
    (root / "Labels").mkdir(parents=True)
    (root / "Audios").mkdir()
    text = "\n".join(",".join(map(str, line)) for line in [PODCAST_HEADER, *PODCAST])
    (root / "Labels" / "labels_consensus.csv").write_text(change(text), encoding=encoding)
    return root


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("N,2.4,4.0", 'N,"2,4","4,0"', 2, "'4,0' is no number; one is needed, its decimals behind a point"),
        ("N,2.4,4.0", "N,,4.0", 2, "'' is no number"),
        ("N,2.4,4.0", "N,2.4,N/A", 2, "'N/A' is no number"),
        ("N,2.4,4.0", "N,2.4,nan", 2, "'nan' is no number"),
        ("N,2.4,4.0", "N,2.4,4.000.0", 2, "'4.000.0' is no number"),
        ("N,2.4,4.0", "N,2.4,40", 2, "'40' is not between 1 and 7"),
        ("N,2.4,4.0", "2.4,4.0", 2, "has 5 cells, the first line has 6"),
        ("N,2.4,4.0", "N,2,4,4,0", 2, "has 8 cells, the first line has 6"),
        (",", ";", 1, "there is no column FileName in 'FileName;EmoClass"),
        (",", "\t", 1, "there is no column FileName in"),
        ("EmoVal", "Valence", 1, "there is no column EmoVal"),
        ("_0008.wav", "_0139.wav", 3, "MSP-PODCAST_0001_0139.wav occurs twice"),
        ("_0008.wav", "_8a.wav", 3, "'8a' is no number"),
        (",,,Unknown,Test3", ',"4,5",,Unknown,Test3', 6, "'4,5' is no number"),
    ],
)
def test_an_msp_podcast_cell_that_cannot_be_read_is_refused(tmp_path, old, new, line, text):
    root = write_podcast(tmp_path, lambda written: written.replace(old, new))
    with pytest.raises(ReadCorpusError, match=rf"labels_consensus.csv, line {line}: .*{re.escape(text)}"):
        load_corpus("msp-podcast", root)


RATINGS = """MSP-PODCAST_0001_0139.wav; N; A:2.400000; V:4.000000; D:2.800000;
WORKER00000001; Other-confused; Concerned,Confused; A:3.000000; V:3.000000; D:4.000000;
WORKER00000002; Neutral; Neutral; A:2.000000; V:5.000000; D:2.000000;
WORKER00000003; Neutral; Neutral; A:1.000000; V:4.000000; D:NaN;

MSP-PODCAST_0001_0008.wav; H; A:6.000000; V:5.000000; D:6.500000;
WORKER00000001; Happy; Happy; A:6.000000; V:5.000000; D:6.000000;
"""


def test_msp_podcast_dominance_by_its_name_and_what_single_raters_said(tmp_path):
    """The column stands where a release puts it: files and models of this corpus differ in the order."""
    root = write_podcast(tmp_path)
    lines = (root / "Labels" / "labels_consensus.csv").read_text().splitlines()
    dominance = ["EmoDom", "2.8", "6.5", "6.5", "1", ""]
    text = "\n".join(f"{line.replace(',', f',{cell},', 1)}" for line, cell in zip(lines, dominance, strict=True))
    (root / "Labels" / "labels_consensus.csv").write_text(text)
    (root / "Labels" / "labels.txt").write_text(RATINGS)
    rows = by_id(load_corpus("msp-podcast", root))
    first, second = rows["MSP-PODCAST_0001_0139"], rows["MSP-PODCAST_0001_0008"]
    assert [first[name] for name in ("valence", "arousal", "dominance")] == [4.0, 2.4, 2.8]
    assert rows["MSP-PODCAST_0003_0001"]["dominance"] is None
    assert [first[f"{name}_raters"] for name in ("valence", "arousal", "dominance")] == [3, 3, 2]
    assert [first[f"{name}_rater_sd"] for name in ("valence", "arousal", "dominance")] == pytest.approx([1, 1, 2**0.5])
    assert (second["valence_raters"], second["valence_rater_sd"]) == (1, None)
    assert "valence_raters" not in rows["MSP-PODCAST_0002_0001"]


def test_what_msp_podcast_keeps_to_itself_stays_unlabelled(tmp_path):
    for number, absent in enumerate(("", "NaN", "N/A", "nan")):
        root = write_podcast(tmp_path / str(number), lambda text, absent=absent: text.replace(",,,", f",,{absent},"))
        hidden = by_id(load_corpus("msp-podcast", root))["MSP-PODCAST_0003_0001"]
        assert (hidden["valence"], hidden["arousal"]) == (None, None)


@pytest.mark.parametrize("absent", ["unknown", "NaN", "N/A", ""])
def test_msp_podcast_turns_without_a_speaker_are_not_one_speaker(tmp_path, absent):
    root = write_podcast(tmp_path, lambda text: text.replace("Unknown", absent))
    corpus = load_corpus("msp-podcast", root)
    assert by_id(corpus)["MSP-PODCAST_0001_0200"]["speaker_id"] == "unknown-MSP-PODCAST_0001"
    assert "2 turns have no known speaker; each podcast's count as one" in corpus.notes


def test_msp_podcast_of_other_encodings_and_endings(tmp_path):
    plain = load_corpus("msp-podcast", write_podcast(tmp_path / "a")).rows
    for number, (change, encoding) in enumerate(
        [(lambda text: text, "utf-8-sig"), (lambda text: text.replace("\n", ",,\r\n"), "utf-8")]
    ):
        root = write_podcast(tmp_path / f"b{number}", change, encoding)
        assert [row["valence"] for row in load_corpus("msp-podcast", root).rows] == [row["valence"] for row in plain]
    with pytest.raises(ReadCorpusError, match=r"labels_consensus.csv, line 1: .*xff.* is not text in utf-8"):
        load_corpus("msp-podcast", write_podcast(tmp_path / "c", encoding="utf-16"))
    with pytest.raises(ReadCorpusError, match=r"line 2: .*xe4.* is not text in utf-8"):
        load_corpus("msp-podcast", write_podcast(tmp_path / "d", lambda text: text.replace(",N,", ",ä,"), "latin-1"))


def test_msp_podcast_as_json_is_as_strict(tmp_path):
    write_podcast(tmp_path)
    (tmp_path / "Labels" / "labels_consensus.csv").unlink()
    path = tmp_path / "Labels" / "labels_consensus.json"
    entry = {"EmoAct": 2.4, "EmoVal": "4,0", "SpkrID": 30, "Split_Set": "Train"}
    for value, text in (("4,0", "'4,0' is no number"), (None, "'None' is no number"), ([4], "is no number")):
        path.write_text(json.dumps({"a_1.wav": entry | {"EmoVal": value}}))
        with pytest.raises(ReadCorpusError, match=rf"labels_consensus.json, a_1.wav: .*{text}"):
            load_corpus("msp-podcast", tmp_path)
    path.write_text('{"a_1.wav": {"EmoAct": 1}}')
    with pytest.raises(ReadCorpusError, match=r"a_1.wav: there is no EmoVal"):
        load_corpus("msp-podcast", tmp_path)
    path.write_text('{"a_1.wav": {},')
    with pytest.raises(ReadCorpusError, match=r"labels_consensus.json is not JSON with an object for each file"):
        load_corpus("msp-podcast", tmp_path)


def test_what_is_not_that_corpus_is_refused(tmp_path, iemocap):
    with pytest.raises(ReadCorpusError, match="no reader for the corpus 'meld'; there are emodb, iemocap"):
        load_corpus("meld", tmp_path)
    with pytest.raises(ReadCorpusError, match="is not a folder"):
        load_corpus("iemocap", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadCorpusError, match="holds no utterance of iemocap"):
        load_corpus("iemocap", tmp_path / "empty")
    with pytest.raises(ReadCorpusError, match=r"has no file of evaluations: none of Evalution.txt, Evaluation.txt"):
        load_corpus("msp-improv", tmp_path / "empty")
    (tmp_path / "p" / "Labels").mkdir(parents=True)
    (tmp_path / "p" / "Audios").mkdir()
    (tmp_path / "p" / "Labels" / "labels_consensus.csv").write_text("FileName,EmoAct,EmoVal\na_1.wav,1,1\n")
    with pytest.raises(ReadCorpusError, match=r"labels_consensus.csv, line 1: there is no column SpkrID in"):
        load_corpus("msp-podcast", tmp_path / "p")
    text = "FileName,EmoAct,EmoVal,SpkrID,Split_Set\na_1.wav,1,1,2,Test9\n"
    (tmp_path / "p" / "Labels" / "labels_consensus.csv").write_text(text)
    with pytest.raises(ReadCorpusError, match=r"line 2: a_1.wav is in the split 'Test9'"):
        load_corpus("msp-podcast", tmp_path / "p")


def test_the_native_range_is_needed_to_read_the_manifest(iemocap, tmp_path):
    main(["iemocap", str(iemocap), "--out", str(tmp_path / "m.parquet")])
    with pytest.raises(ReadManifestError, match=r"outside the range \[0, 1\]"):
        read_manifest(tmp_path / "m.parquet", label_range=(0, 1))
