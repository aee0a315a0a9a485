"""Emo-DB from a fake tree of names as distributed; and from the corpus itself where it lies beside the repository."""

from collections import Counter
from pathlib import Path

import pytest

from vaemo.corpora import load_corpus
from vaemo.corpora.__main__ import main
from vaemo.corpora.emodb import EMOTIONS
from vaemo.data.manifest import read_manifest
from vaemo.errors import ReadCorpusError

REAL = Path(__file__).resolve().parents[4] / "shared" / "emodb"
NAMES = ("03a01Fa.wav", "03a01Nc.wav", "16b10Td.wav", "03a01Wa.wav", "16a01Lb.wav", "08a02Ac.wav", "08b01Ea.wav")


def tree(root, names=NAMES):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).write_bytes(b"")
    return root


@pytest.mark.parametrize("folder", ["wav", "."])
def test_a_name_says_who_speaks_and_how(tmp_path, folder):
    tree(tmp_path / folder, [*NAMES, "._03a01Fa.wav", "README.md", "erklaerung.txt"])
    corpus = load_corpus("emodb", tmp_path)
    rows = {row["utt_id"]: row for row in corpus.rows}
    assert len(corpus.rows) == len(NAMES)
    joy = rows["03a01Fa"]
    assert (joy["valence"], joy["arousal"], joy["dominance"], joy["emotion"]) == (0.90, 0.80, 0.70, "joy")
    assert (joy["speaker_id"], joy["session_id"], joy["sentence"], joy["take"]) == ("03", "03", "a01", "a")
    assert (joy["gender"], joy["age"]) == ("male", 31)
    assert joy["audio_path"] == str(tmp_path / folder / "03a01Fa.wav")
    # The letter is that of the German word.
    assert {name[5]: rows[name]["emotion"] for name in rows} == {
        "F": "joy", "N": "neutral", "T": "sadness", "W": "anger", "L": "boredom", "A": "fear", "E": "disgust",
    }  # fmt: skip
    assert [row["position"] for row in corpus.rows] == [0, 1, 2, 0, 1, 0, 1]
    assert [row["utt_id"] for row in corpus.rows if row["speaker_id"] == "03"] == ["03a01Fa", "03a01Nc", "03a01Wa"]
    assert corpus.label_range == (0.0, 1.0)


def test_flac_is_read_as_wav_is(tmp_path):
    by_kind = [
        load_corpus("emodb", tree(tmp_path / kind, [name.replace("wav", kind) for name in NAMES])).table()
        for kind in ("wav", "flac", "WAV")
    ]
    assert by_kind[0].drop_columns("audio_path") == by_kind[1].drop_columns("audio_path")
    assert by_kind[0].drop_columns("audio_path") == by_kind[2].drop_columns("audio_path")


def test_the_manifest_is_written_and_checked(tmp_path, capsys):
    main(["emodb", str(tree(tmp_path / "emodb")), "--out", str(tmp_path / "m.jsonl")])
    said = capsys.readouterr().out
    assert "7 utterances (7 labelled), 3 sessions, 3 speakers" in said
    assert "not ratings" in said
    assert "--set labels.range=[0,1]" in said
    table = read_manifest(tmp_path / "m.jsonl", label_range=(0, 1))
    assert table["age"].to_pylist() == [31, 31, 31, 34, 34, 31, 31]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("03a01Xa.wav", r"03a01Xa.wav has the emotion 'X'; those of emodb are W \(anger\), L \(boredom\)"),
        ("07a01Fa.wav", r"07a01Fa.wav is of the speaker '07'; those of emodb are 03, 08"),
        ("03a01F.wav", "03a01F.wav is not named as clips of emodb are, such as 03a01Fa.wav"),
        ("03A01FA.wav", "is not named as clips of emodb are"),
        ("03a01Fa-2.flac", "is not named as clips of emodb are"),
        ("song.flac", "is not named as clips of emodb are"),
        ("03a01Fa.flac", "holds 03a01Fa twice"),
    ],
)
def test_a_clip_that_says_something_else_is_refused(tmp_path, name, match):
    with pytest.raises(ReadCorpusError, match=match):
        load_corpus("emodb", tree(tmp_path, [*NAMES, name]))


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(ReadCorpusError, match="holds no utterance of emodb"):
        load_corpus("emodb", tmp_path)


def test_the_corpus_itself():
    if not REAL.is_dir():
        pytest.skip("Emo-DB does not lie beside the repository, in ../shared/emodb")
    rows = load_corpus("emodb", REAL).rows
    assert len(rows) == 535
    assert len({row["speaker_id"] for row in rows}) == 10
    # Numbers of clips per emotion as the corpus's authors give them.
    counts = {"anger": 127, "boredom": 81, "disgust": 46, "fear": 69, "joy": 71, "sadness": 62, "neutral": 79}
    assert Counter(row["emotion"] for row in rows) == counts
    assert {name for name, *_ in EMOTIONS.values()} == set(counts)
