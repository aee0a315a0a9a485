"""Vectors that another process computes: gathered buffer by buffer, and utterance by utterance where that one dies."""

import pytest
from extract_cases import CONFIG, write_corpus

from vaemo import utterances
from vaemo.audio.acoustics import sound_of
from vaemo.data.manifest import read_manifest
from vaemo.errors import ExtractorError
from vaemo.features import ExtractorHung, ExtractorLost, StandIn, load_extractors
from vaemo.utterances import extract_utterances

N = 18


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_manifest(write_corpus(tmp_path_factory.mktemp("c"), N // 3)[0])


class Elsewhere:
    """Begins work in another process, as far as one can tell: which of the utterances are lost is said by their number.

    Attributes:
        heard: How many utterances there were so far.
        course: What happened: `begin` and `end` of buffers, with their size, and `heard`.
    """

    def __init__(self, extractor, lost=(), how=None):
        self._extractor, self._lost, self._how = extractor, lost, how or ExtractorLost("SIGSEGV")
        self._numbers = {}
        self.heard, self.course = 0, []

    def hear(self, samples):
        self.heard += 1
        return sound_of(samples)

    def __call__(self, utterances):
        for samples in utterances:
            self._numbers.setdefault(samples.tobytes(), len(self._numbers))
        self.course.append(("begin", len(utterances), self.heard))
        return lambda: self._end(utterances)

    def _end(self, utterances):
        self.course.append(("end", len(utterances), self.heard))
        if any(self._numbers[samples.tobytes()] in self._lost for samples in utterances):
            raise self._how
        return self._extractor(utterances)


def extracted(rows, monkeypatch, lost=(), buffer_s=600.0, how=None):
    """The table with speech computed elsewhere, and the course of that."""
    monkeypatch.setattr(utterances, "_BUFFER_S", buffer_s)
    extractors = load_extractors(CONFIG.features)
    elsewhere = Elsewhere(extractors["speech"], lost, how)
    monkeypatch.setattr(utterances, "sound_of", elsewhere.hear)
    extractors["speech"] = StandIn.of(extractors["speech"], elsewhere)
    return extract_utterances(rows, extractors=extractors, config=CONFIG), elsewhere.course


def plain(rows):
    return extract_utterances(rows, extractors=load_extractors(CONFIG.features), config=CONFIG)


def test_one_buffer_is_under_way_while_the_next_is_filled(rows, monkeypatch):
    # Utterances of 0.3 s: five fill a buffer of 1.4 s.
    table, course = extracted(rows, monkeypatch, buffer_s=1.4)
    assert table.equals(plain(rows))
    assert course == [
        *(("begin", 5, 5), ("end", 5, 10), ("begin", 5, 10), ("end", 5, 15), ("begin", 5, 15), ("end", 5, 18)),
        *(("begin", 3, 18), ("end", 3, 18)),
    ]


def test_the_utterance_that_ends_the_process_fails_and_no_other(rows, monkeypatch):
    table, course = extracted(rows, monkeypatch, lost=(0, 11))
    expected = plain(rows).to_pylist()
    for number, (row, wanted) in enumerate(zip(table.to_pylist(), expected, strict=True)):
        if number in (0, 11):
            assert (row["status"], row["speech"], row["speaker"]) == ("undecodable", None, None)
            assert row["reason"] == "logmel ended its process on it (SIGSEGV)"
        else:
            assert row == wanted
    assert [n for what, n, _ in course if what == "end"] == [N] + N * [1]


def test_an_utterance_that_takes_too_long_is_a_timeout(rows, monkeypatch):
    table, _ = extracted(rows, monkeypatch, lost=(3,), how=ExtractorHung("180 s"))
    assert table["status"].to_pylist() == ["ok"] * 3 + ["timeout"] + ["ok"] * (N - 4)
    assert table["reason"][3].as_py() == "logmel took longer than 180 s for it"


def test_an_extractor_that_ends_its_process_on_everything_is_not_blamed_on_the_speech(rows, monkeypatch):
    with pytest.raises(ExtractorError, match=r"logmel ended its process on each of 5 utterances alone \(SIGSEGV\): it"):
        extracted(rows, monkeypatch, lost=range(5))
    few = rows.slice(0, 3)
    table, _ = extracted(few, monkeypatch, lost=range(3))
    assert table["status"].to_pylist() == ["undecodable"] * 3
