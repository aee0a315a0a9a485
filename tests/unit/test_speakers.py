import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.data.sessions import assemble_sessions
from vaemo.data.speakers import Enrolments, aggregate_speakers, note_unnamed_speakers, running_means, sums_before
from vaemo.errors import FeatureMismatchError, ReadStoreError
from vaemo.store import FeatureStore

# Sums of float32 vectors in another order.
CLOSE = 1e-6


def sessions(layout, *, sequence_by="session", dim=4, seed=0):
    """Sessions of random unit vectors; `layout` is (session, split, speakers in order)."""
    rng = np.random.default_rng(seed)
    rows = []
    for session_id, split, speakers in layout:
        for index, speaker in enumerate(speakers):
            vector = rng.normal(size=dim)
            rows.append(
                {
                    "session_id": session_id,
                    "utt_id": f"{session_id}-{index}",
                    "speaker_id": speaker,
                    "split": split,
                    "position": index,
                    "speech": [1.0],
                    "speaker": (vector / np.linalg.norm(vector)).tolist(),
                }
            )
    types = [("speech", pa.list_(pa.float32(), 1)), ("speaker", pa.list_(pa.float32(), dim))]
    table = pa.Table.from_pylist(rows)
    for name, type_ in types:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(type_))
    return assemble_sessions(table, sequence_by=sequence_by)


LAYOUT = [
    ("a", "train", ["x", "y", "x", "y"]),
    ("b", "train", ["x", "y", "y"]),
    ("c", "dev", ["x", "x"]),
    ("d", "dev", ["x"]),
]


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_a_running_mean_knows_the_past_of_its_own_speaker():
    given = sessions(LAYOUT)
    for session, mean in zip(given, aggregate_speakers(given, "running_mean"), strict=True):
        raw = session.streams["speaker"]
        for step, speaker in enumerate(session.speaker_ids):
            past = [raw[i] for i in range(step + 1) if session.speaker_ids[i] == speaker]
            np.testing.assert_allclose(mean.streams["speaker"][step], unit(np.mean(past, axis=0)), atol=CLOSE)
        np.testing.assert_array_equal(mean.streams["speech"], session.streams["speech"])


def test_a_running_mean_does_not_see_what_comes():
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    speakers = np.array(list("xyxyxx"), object)
    changed = vectors.copy()
    changed[4:] += 5
    np.testing.assert_array_equal(running_means(vectors, speakers)[:4], running_means(changed, speakers)[:4])


@pytest.mark.parametrize("sequence_by", ["session", "speaker"])
def test_an_enrolment_comes_from_the_other_sessions_of_the_split(sequence_by):
    given = sessions(LAYOUT, sequence_by=sequence_by)
    raw = {}
    for session in given:
        for speaker, vector in zip(session.speaker_ids, session.streams["speaker"], strict=True):
            raw.setdefault((session.split, session.session_id, speaker), []).append(vector)
    for session in aggregate_speakers(given, "enrolled"):
        for speaker, vector in zip(session.speaker_ids, session.streams["speaker"], strict=True):
            others = [
                v
                for (split, name, who), vectors in raw.items()
                if split == session.split and who == speaker and name != session.session_id
                for v in vectors
            ]
            np.testing.assert_allclose(vector, unit(np.sum(others, axis=0)), atol=CLOSE)


def test_enrolling_from_nothing_is_refused():
    alone = [("a", "train", ["x", "y"]), ("b", "dev", ["y"]), ("c", "train", ["x", "y"])]
    with pytest.raises(FeatureMismatchError, match="speaker 'y' of session 'b' is enrolled from no other session"):
        aggregate_speakers(sessions(alone), "enrolled")


def test_enrolments_that_were_heard_elsewhere_serve_every_session(tmp_path):
    path = str(tmp_path / "speakers.parquet")
    vectors = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    pq.write_table(pa.table({"speaker_id": ["x", "y"], "speaker": list(vectors)}), path)
    for session in aggregate_speakers(sessions(LAYOUT), "enrolled", Enrolments.read(path)):
        expected = np.stack([unit(vectors["xy".index(speaker)]) for speaker in session.speaker_ids])
        np.testing.assert_allclose(session.streams["speaker"], expected, atol=CLOSE)


@pytest.mark.parametrize("sequence_by", ["session", "speaker"])
def test_written_enrolments_leave_out_the_session_itself_and_other_splits(tmp_path, sequence_by):
    path, given = str(tmp_path / "speakers.parquet"), sessions(LAYOUT, sequence_by=sequence_by)
    Enrolments.of_sessions(given).write(path)
    held = Enrolments.read(path)
    assert held.fingerprint == Enrolments.of_sessions(given).fingerprint
    assert held.fingerprint != Enrolments.of_sessions(given[1:]).fingerprint
    expected = aggregate_speakers(given, "enrolled")
    for session, wanted in zip(given, expected, strict=True):
        # As a worker sees it, which has not the other sessions.
        (alone,) = aggregate_speakers([session], "enrolled", held)
        np.testing.assert_array_equal(alone.streams["speaker"], wanted.streams["speaker"])
    unsplit = dataclasses.replace(given[0], session_id="new", split=None)
    both = [v for s in given for v, who in zip(s.streams["speaker"], s.speaker_ids, strict=True) if who == "x"]
    enrolled = held.enrol(unsplit).streams["speaker"][unsplit.speaker_ids == "x"]
    np.testing.assert_allclose(enrolled, np.tile(unit(np.sum(both, axis=0)), (len(enrolled), 1)), atol=CLOSE)


def enrolments(vectors, speaker_ids="xy"):
    ids = np.array(list(speaker_ids), object)
    nobody = np.full(len(ids), None, object)
    return Enrolments(ids, nobody, nobody, np.array(vectors, np.float32))


def test_enrolments_that_do_not_fit_are_refused():
    given = sessions(LAYOUT)
    with pytest.raises(FeatureMismatchError, match=r"speaker 'y' of session 'a' has no enrolment\. Enrol every"):
        aggregate_speakers(given, "enrolled", enrolments(np.ones((1, 4)), "x"))
    with pytest.raises(FeatureMismatchError, match=r"enrolments have 3 numbers, the speaker embeddings of .* 4"):
        aggregate_speakers(given, "enrolled", enrolments(np.ones((2, 3))))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"speaker_id": ["x"]}, "lacks the column speaker; enrolments have"),
        ({"speaker_id": ["x", "x"], "speaker": [[1.0], [2.0]]}, "speaker 'x' has several rows without a session_id"),
        ({"speaker_id": ["x"], "speaker": ["loud"]}, "column speaker is string; it must be lists of numbers"),
        ({"speaker_id": ["x", "y"], "speaker": [[1.0, 2.0], [2.0]]}, "row 2: the speaker vector has 1 numbers, others"),
        ({"speaker_id": ["x", "y"], "speaker": [[1.0], None]}, "the enrolment of speaker 'y' is missing, or"),
        ({"speaker_id": ["x", "y"], "speaker": [[1.0], [np.nan]]}, "of speaker 'y' is .* a number that is not finite"),
    ],
)
def test_files_that_hold_no_enrolments_are_refused(tmp_path, columns, message):
    path = str(tmp_path / "s.parquet")
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ReadStoreError, match=message):
        Enrolments.read(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ReadStoreError, match=r"the enrolments .*none.parquet cannot be read .* with speaker_id and sp"):
        Enrolments.read(str(tmp_path / "none.parquet"))


def test_utterances_and_stores_without_the_stream_are_left_alone():
    given = sessions(LAYOUT)
    assert aggregate_speakers(given, "utterance") == given
    without = [dataclasses.replace(s, streams={"speech": s.streams["speech"]}) for s in given]
    assert aggregate_speakers(without, "enrolled") == without


def test_a_store_that_names_no_speakers_is_said_once(tmp_path, capsys):
    rows = {"session_id": ["a", "a", "b"], "utt_id": ["1", "2", "3"], "prosody": [[1.0], [2.0], [3.0]]}
    stores = {}
    for name, more in (
        ("without", {}),
        ("null", {"speaker_id": pa.nulls(3, pa.string())}),
        ("named", {"speaker_id": ["x", "y", "x"]}),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({**rows, **more}), tmp_path / name / "part-0.parquet")
        stores[name] = FeatureStore.open(str(tmp_path / name))
    for name in ("without", "null"):
        note_unnamed_speakers(stores[name], ["speaker.prosody", "speaker.speech", "session.prosody"])
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1
        assert "has no speaker_id but the session's: model.speaker_norm takes each session for one speaker" in said[0]
    note_unnamed_speakers(stores["named"], ["speaker.prosody"])
    note_unnamed_speakers(stores["without"], ["session.prosody"])
    assert capsys.readouterr().out == ""


def test_sums_before_are_those_of_the_group_alone():
    random = np.random.default_rng(0)
    vectors, groups = random.normal(1000, 1, (40, 3)).astype(np.float32), random.integers(0, 3, 40)
    found = sums_before(vectors, groups)
    for step, group in enumerate(groups):
        past = vectors[:step][groups[:step] == group].astype(np.float64)
        np.testing.assert_allclose(found[step], [*past.sum(axis=0), len(past)], rtol=1e-14)
    assert sums_before(vectors[:0], groups[:0]).shape == (0, 4)
