"""What a run learns from, with speakers who are enrolled."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vaemo import files
from vaemo.config import Config
from vaemo.data.speakers import Enrolments, running_means, unit
from vaemo.errors import LabelError, OtherRunError, ReadStoreError, SplitError, UsageError
from vaemo.pipeline import ablation, training
from vaemo.store import SCHEMA_VERSION, FeatureStore
from vaemo.tables import with_column
from vaemo.training.data import TrainingData

SESSIONS = 24
SPEAKERS = ["x", "y", "x", "y"]
CLOSE = 1e-6
"""Sums of a few float32 vectors, in another order."""


def write_store(path, *, settings=True, fold=None):
    """Sessions for train and for dev, half each, in which the same two voices speak in turn."""
    rng = np.random.default_rng(0)
    n = SESSIONS * len(SPEAKERS)
    session = np.repeat(np.arange(SESSIONS), len(SPEAKERS))
    rows = {
        "session_id": [f"s{number}" for number in session],
        "utt_id": [f"u{number}" for number in range(n)],
        "speaker_id": SPEAKERS * SESSIONS,
        "split": ["train" if number < SESSIONS // 2 else "dev" for number in session],
        "valence": rng.uniform(size=n).astype(np.float32),
        "arousal": rng.uniform(size=n).astype(np.float32),
        "speech": list(rng.normal(size=(n, 5)).astype(np.float32)),
        "speaker": list(rng.normal(size=(n, 3)).astype(np.float32)),
    }
    if fold:
        rows["fold"] = [fold[number] for number in session]
    files.write_parquet_whole(files.join(path, "part-0.parquet"), pa.table(rows))
    if settings:
        files.write_json(
            files.join(path, "_vaemo.json"), {"schema_version": SCHEMA_VERSION, "settings": {"features": {}}}
        )
    return np.array(rows["speaker"])


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def config(*overrides):
    return Config.load("default", ["splits.allow_speaker_overlap=true", *overrides])


def enrolled(*overrides):
    return config("features.speaker_aggregation=enrolled", *overrides)


def voice(raw, speaker, sessions):
    return unit(raw.reshape(SESSIONS, len(SPEAKERS), 3)[sessions][:, np.array(SPEAKERS) == speaker].sum((0, 1)))


def test_speakers_are_enrolled_from_the_other_sessions_of_their_split(store):
    raw = write_store(store)
    data = TrainingData.open(store, enrolled())
    for number, session in enumerate(data.sessions(data.parts[0])):
        others = [
            other for other in range(SESSIONS) if other != number and 2 * other // SESSIONS == 2 * number // SESSIONS
        ]
        for speaker, vector in zip(session.speaker_ids, session.streams["speaker"], strict=True):
            np.testing.assert_allclose(vector, voice(raw, speaker, others), atol=CLOSE)


def test_a_folds_voices_do_not_cross_its_splits(store):
    raw = write_store(store, fold=sorted("abc" * 8))
    data = TrainingData.open(store, enrolled(), folds="by=fold")
    assert [fold.name for fold in data.parts] == ["a", "b", "c"]
    for fold in data.parts:
        for number, session in enumerate(data.sessions(fold)):
            others = [o for o in range(SESSIONS) if o != number and fold.split[4 * o] == fold.split[4 * number]]
            for speaker, vector in zip(session.speaker_ids, session.streams["speaker"], strict=True):
                np.testing.assert_allclose(vector, voice(raw, speaker, others), atol=CLOSE)


def test_the_voices_that_are_written_enrol_alike_in_scoring(store, tmp_path):
    write_store(store)
    data = TrainingData.open(store, enrolled())
    path = str(tmp_path / "speakers.parquet")
    data.voices(data.parts[0]).write(path)
    again = TrainingData.open(store, enrolled(), speakers=path)
    for one, other in zip(data.sessions(data.parts[0]), again.sessions(again.parts[0]), strict=True):
        np.testing.assert_allclose(one.streams["speaker"], other.streams["speaker"], atol=CLOSE)
    assert again.voices(again.parts[0]) is again.enrolments
    assert data.digest != again.digest
    plain = TrainingData.open(store, config())
    assert plain.voices(plain.parts[0]) is None


def test_what_a_model_is_calibrated_on_is_used_too(store):
    write_store(store)
    table = FeatureStore.open(store).read()
    split = {"s0": "calib", "s1": "test"}
    values = [
        split.get(name, own) for name, own in zip(*(table[c].to_pylist() for c in ("session_id", "split")), strict=True)
    ]
    files.write_parquet_whole(files.join(store, "part-0.parquet"), with_column(table, "split", pa.array(values)))
    data = TrainingData.open(store, config())
    used = data.used(data.parts[0])
    assert set(used["split"].to_pylist()) == {"train", "dev", "calib"}
    assert len(used) == len(table) - len(SPEAKERS)


def test_voices_that_nothing_asks_for_are_refused(store, tmp_path):
    write_store(store)
    path = str(tmp_path / "speakers.parquet")
    Enrolments.of_sessions(TrainingData.open(store, config()).read()).write(path)
    with pytest.raises(UsageError, match="speaker_aggregation is utterance; enrolments need enrolled"):
        TrainingData.open(store, config(), speakers=path)


@pytest.mark.parametrize("how", ["enrolled", "running_mean"])
def test_what_scoring_could_not_repeat_is_refused(store, how):
    write_store(store, settings=False)
    with pytest.raises(
        UsageError, match=f"speaker_aggregation is '{how}', but .* does not record what its features are"
    ):
        TrainingData.open(store, config(f"features.speaker_aggregation={how}"))


def change_column(store, name, change):
    table = FeatureStore.open(store).read()
    changed = change(table[name]).combine_chunks()
    table = table.set_column(table.column_names.index(name), name, changed)
    files.write_parquet_whole(files.join(store, "part-0.parquet"), table)


def test_all_that_is_trained_on_is_listed_as_used(store):
    write_store(store)
    whole = TrainingData.open(store, config())
    context = np.arange(SESSIONS * len(SPEAKERS)) % len(SPEAKERS) == 0
    for name in ("valence", "arousal"):
        change_column(store, name, lambda column: pc.if_else(context, None, column))
    change_column(store, "split", lambda column: pc.if_else(context, None, column))
    data = TrainingData.open(store, config())
    assert data.parts[0].split.tolist() == whole.parts[0].split.tolist()
    assert data.used(data.parts[0]).equals(whole.used(whole.parts[0]))
    assert [session.split for session in data.sessions(data.parts[0])] == ["train"] * 12 + ["dev"] * 12


def test_a_labelled_utterance_without_the_split_of_its_session_is_refused(store):
    write_store(store)
    change_column(store, "split", lambda column: pc.if_else(np.arange(len(column)) == 5, None, column))
    with pytest.raises(SplitError, match=r"1 labelled utterances have no split.* 'u5' of session 's1', which is in tr"):
        TrainingData.open(store, config())


def test_labels_that_are_missing_are_refused(store):
    write_store(store)
    change_column(store, "arousal", lambda column: pa.chunked_array([pa.nulls(len(column), pa.float32())]))
    with pytest.raises(LabelError, match="arousal"):
        TrainingData.open(store, config()).check_labels()


def test_a_session_in_two_files_is_refused(store):
    write_store(store)
    table = files.read_parquet(files.join(store, "part-0.parquet"))
    copy = table.slice(0, 1).set_column(1, "utt_id", pa.array(["again"]))
    files.write_parquet_whole(files.join(store, "copy.parquet"), copy)
    with pytest.raises(ReadStoreError, match=r"session 's0' occurs in .*copy.parquet and in .*part-0.parquet"):
        TrainingData.open(store, config())


def test_files_of_one_store_may_differ_in_types_and_labels(store, tmp_path):
    write_store(store)
    table = files.read_parquet(files.join(store, "part-0.parquet"))
    half = len(table) // 2
    mixed = str(tmp_path / "mixed")
    files.write_parquet_whole(files.join(mixed, "a.parquet"), table.slice(0, half))
    second = table.slice(half).to_pandas()
    second["valence"] = second["valence"].astype(float)
    second["speech"] = [vector.astype(float) for vector in second["speech"]]
    second.astype({"split": "category"}).to_parquet(f"{mixed}/b.parquet")
    one, other = (TrainingData.open(path, config()) for path in (store, mixed))
    assert one.digest == other.digest
    for first, same in zip(one.read(), other.read(), strict=True):
        np.testing.assert_array_equal(first.labels, same.labels)
        np.testing.assert_array_equal(first.streams["speech"], same.streams["speech"])


def test_one_set_of_sessions_cannot_serve_folds_of_enrolled_speakers(store):
    write_store(store, fold=sorted("abc" * 8))
    assert len(TrainingData.open(store, enrolled()).pack().sessions.lengths) == SESSIONS
    with pytest.raises(UsageError, match="voices differ from fold to fold"):
        TrainingData.open(store, enrolled(), folds="by=fold").pack()


def test_what_is_packed_is_what_is_trained_on(store):
    write_store(store, fold=sorted("abc" * 8))
    data = TrainingData.open(store, config(), folds="by=fold")
    packed = data.pack()
    assert len(packed.sessions.lengths) == SESSIONS
    for number, fold in enumerate(data.parts):
        for name in ("train", "dev"):
            wanted = [session for session in data.sessions(fold) if session.split == name]
            found = packed.split(number, name)
            assert found.session_ids == [session.session_id for session in wanted]
            np.testing.assert_array_equal(
                found.gathered().features.speech, np.concatenate([session.streams["speech"] for session in wanted])
            )
            np.testing.assert_array_equal(found.labels, np.concatenate([session.labels for session in wanted]))
            assert found.features.speech.data_ptr() == packed.sessions.features.speech.data_ptr(), "copied"
    one = data.pack(data.parts[0])
    assert len(one.splits) == 1
    assert set(one.splits[0]) == {"train", "dev"}


class CaughtError(Exception):
    """Carries the jobs that an executor was to run."""


class Catching:
    def train(self, jobs, **options):
        raise CaughtError(jobs)


def caught(act, *given, **options):
    with pytest.raises(CaughtError) as error:
        act(*given, Catching(), **options)
    return error.value.args[0]


def test_folds_share_their_sessions_unless_voices_differ(store, tmp_path):
    write_store(store, fold=sorted("abc" * 8))
    for number, settings in enumerate((config(), enrolled())):
        out = str(tmp_path / f"run{number}")
        caught(training.train, store, out, settings, folds="by=fold")
        files.write_json(files.join(out, "fold-b", "seed-0", "summary.json"), {"epoch": 2})
        files.write_json(files.join(out, "fold-b", "summary.json"), {"epoch": 2})
        jobs = caught(training.train, store, out, settings, folds="by=fold")
        assert [(job.part, job.out, job.config.train.seed) for job in jobs.jobs] == [
            ("a", f"{out}/fold-a", 0), ("c", f"{out}/fold-c", 0),
        ]  # fmt: skip
        data = TrainingData.open(store, settings, folds="by=fold")
        for job, fold in zip(jobs.jobs, (data.parts[0], data.parts[2]), strict=True):
            assert jobs.part(job) == (job.part if number else None)
            sessions = jobs.pack(jobs.part(job))
            for name in ("train", "dev"):
                heard = [session.streams["speaker"] for session in data.sessions(fold) if session.split == name]
                found = sessions.split(jobs.work.fold[job.part], name).gathered().features.speaker
                np.testing.assert_array_equal(found, np.concatenate(heard))


MADE = "these splits are made: no utterance has one"


@pytest.mark.parametrize(
    ("without", "how"),
    [
        (["fold"], ""),
        (["split"], f" ({MADE})"),
        (
            ["split", "speaker_id"],
            f" ({MADE}; sessions are kept apart, and speakers are not known: speaker_id is that of the session)",
        ),
    ],
)
def test_splits_that_are_made_are_said(store, tmp_path, capsys, without, how):
    write_store(store, fold=sorted("abc" * 8))
    part = files.join(store, "part-0.parquet")
    files.write_parquet_whole(part, files.read_parquet(part).drop_columns(without))
    caught(training.train, store, str(tmp_path / "run"), config())
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("utterances: "))
    assert said.endswith(f" test{how}")


def test_seeds_are_jobs_of_their_own_below_each_fold(store, tmp_path):
    write_store(store, fold=sorted("abc" * 8))
    out = str(tmp_path / "run")
    jobs = caught(training.train, store, out, config("train.seed=5"), folds="by=fold", seeds=2)
    assert [(job.part, job.out.removeprefix(out), job.config.train.seed) for job in jobs.jobs] == [
        (fold, f"/fold-{fold}/seed-{seed}", 5 + seed) for fold in "abc" for seed in range(2)
    ]
    assert {job.data for job in jobs.jobs} == {TrainingData.open(store, config(), folds="by=fold").digest}
    with pytest.raises(OtherRunError, match=r"seeds was 2, is now 3"):
        caught(training.train, store, out, config("train.seed=5"), folds="by=fold", seeds=3)


def test_a_grid_hears_in_each_fold_what_its_splits_may_hear(store, tmp_path):
    raw = write_store(store, fold=sorted("abc" * 8))
    settings = config("features.speaker_aggregation=running_mean")
    jobs = caught(ablation.ablate, store, str(tmp_path / "means"), settings, folds="k=2")
    (part,) = {jobs.part(job) for job in jobs.jobs}
    by_session = raw.reshape(SESSIONS, len(SPEAKERS), 3)
    expected = [running_means(vectors, np.array(SPEAKERS)) for vectors in by_session]
    np.testing.assert_array_equal(jobs.pack(part).features.speaker, np.concatenate(expected))

    jobs = caught(ablation.ablate, store, str(tmp_path / "enrolled"), enrolled(), folds="by=fold")
    data = TrainingData.open(store, enrolled(), folds="by=fold")
    assert {jobs.part(job) for job in jobs.jobs} == {fold.name for fold in data.parts}
    for fold in data.parts:
        expected = [session.streams["speaker"] for session in data.sessions(fold)]
        np.testing.assert_array_equal(jobs.pack(fold.name).features.speaker, np.concatenate(expected))


def test_the_past_is_packed_once_for_all_folds_and_only_what_the_model_takes(store, capsys):
    write_store(store, fold=sorted("abc" * 8))
    data = TrainingData.open(store, config("model.speaker_norm=[speech, prosody]"), folds="by=fold")
    # There is no prosody to compare; and who speaks is named.
    assert list(data.pack().sessions.features.past) == ["speaker.speech"]
    assert capsys.readouterr().out == ""
    assert data.pack().split(0, "train").features.past.keys() == {"speaker.speech"}
    assert TrainingData.open(store, config()).pack().sessions.features.past == {}
