import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vaemo.errors import FeatureMismatchError, ReadStoreError
from vaemo.sessions import assemble_sessions
from vaemo.speakers import aggregate_speakers, read_enrolments, running_means, write_enrolments

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
    with pytest.raises(FeatureMismatchError, match=r"speaker .y. speaks in session .[bc]. alone of split"):
        aggregate_speakers(
            sessions([("a", "train", ["x", "y"]), ("b", "dev", ["y"]), ("c", "train", ["x", "y"])]), "enrolled"
        )


def test_enrolments_are_written_read_and_used(tmp_path):
    path = str(tmp_path / "speakers.parquet")
    write_enrolments(path, sessions(LAYOUT[:2], seed=1))
    enrolments = read_enrolments(path)
    assert set(enrolments) == {"x", "y"}
    for session in aggregate_speakers(sessions(LAYOUT), "enrolled", enrolments):
        expected = np.stack([enrolments[speaker] for speaker in session.speaker_ids])
        np.testing.assert_array_equal(session.streams["speaker"], expected)
        np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, atol=CLOSE)


def test_enrolments_that_do_not_fit_are_refused(tmp_path):
    given = sessions(LAYOUT)
    with pytest.raises(FeatureMismatchError, match="speaker 'y' of session 'a' has no enrolment"):
        aggregate_speakers(given, "enrolled", {"x": np.ones(4)})
    with pytest.raises(FeatureMismatchError, match=r"enrolment of speaker 'x' has 3 numbers, .* have 4"):
        aggregate_speakers(given, "enrolled", {"x": np.ones(3), "y": np.ones(4)})
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"speaker_id": ["x"]}), path)
    with pytest.raises(ReadStoreError, match="lacks the column speaker; enrolments have"):
        read_enrolments(str(path))
    pq.write_table(pa.table({"speaker_id": ["x", "x"], "speaker": [[1.0], [2.0]]}), path)
    with pytest.raises(ReadStoreError, match="speaker 'x' stands there more than once"):
        read_enrolments(str(path))


def test_utterances_and_stores_without_the_stream_are_left_alone():
    given = sessions(LAYOUT)
    assert aggregate_speakers(given, "utterance") == given
    without = [dataclasses.replace(s, streams={"speech": s.streams["speech"]}) for s in given]
    assert aggregate_speakers(without, "enrolled") == without
