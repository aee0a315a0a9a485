"""Splits and folds: sessions and speakers on one side only, shares about as asked, mistakes named."""

import numpy as np
import pyarrow as pa
import pytest

from vaemo.config import SplitConfig
from vaemo.data.splits import make_folds, plain_split
from vaemo.errors import SplitError, UsageError

SLACK = 0.1
"""Shares are met as far as whole groups of 100 among 1000 utterances allow."""


def corpus(split=None, fold=None):
    """Ten recording sessions of two speakers, five sessions of twenty utterances each."""
    random = np.random.default_rng(0)
    session = np.repeat(np.arange(50), 20)
    speaker = session // 5 * 2 + random.integers(0, 2, 1000)
    n = len(session)
    return pa.table(
        {
            "session_id": [f"s{i:02d}" for i in session],
            "speaker_id": [f"p{i:02d}" for i in speaker],
            "split": pa.array(split if split is not None else [None] * n, pa.string()),
            "fold": pa.array(fold if fold is not None else [f"f{i // 10}" for i in session], pa.string()),
        }
    )


def sides(table, split, column):
    names = np.array(table[column].to_pylist())
    return {side: set(names[split == side]) for side in ("train", "dev", "test")}


@pytest.mark.parametrize("column", ["session_id", "speaker_id"])
def test_made_splits_are_disjoint(column):
    table = corpus()
    fold = plain_split(table, SplitConfig())
    found = sides(table, fold.split, column)
    assert not found["train"] & found["dev"]
    assert not found["train"] & found["test"]
    assert not found["dev"] & found["test"]
    assert np.mean(fold.split == "test") == pytest.approx(0.2, abs=SLACK)
    assert np.mean(fold.split == "dev") == pytest.approx(0.15, abs=SLACK)
    assert (fold.held_out == (fold.split == "test")).all()


@pytest.mark.parametrize("other", ["Ann ", "ANN", "Ann\u0301"])
def test_speakers_in_two_splits_under_one_name_are_noted(capsys, other):
    split = pa.array(["train", "train", "dev", "dev"])
    ids = {"session_id": list("abcd"), "fold": ["1", "2", "3", "4"]}

    def said(speakers, split=split, how=None, **settings):
        table = pa.table({**ids, "speaker_id": speakers, "split": split})
        config = SplitConfig(**settings)
        make_folds(table, how, config) if how else plain_split(table, config)
        return capsys.readouterr().out

    name = "an\u0144" if "\u0301" in other else "ann"
    assert said([name, "b", "c", other]) == (
        "1 speaker(s) may be in more than one split under names that differ only in case, blanks or Unicode form, such "
        f"as '{other}' and '{name}'. If they are one person, write the name in one way.\n"
    )
    assert f"'{other}' and '{name}'" in said([name, "b", "c", other], how="by=fold")
    # On one side, in one group of sessions, or allowed.
    assert said([name, other, "b", "c"]) == ""
    assert said([name, "b", "c", other], allow_speaker_overlap=True) == ""
    assert said([name, "b", "c", "ann b"]) == ""


def test_made_splits_follow_the_seed():
    first, again, other = (plain_split(corpus(), SplitConfig(seed=seed)).split for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_splits_of_the_store_are_kept():
    given = np.where(np.arange(1000) < 700, "train", "dev").astype(object)
    given[900:] = None
    assert plain_split(corpus(split=given), SplitConfig()).split.tolist() == given.tolist()


@pytest.mark.parametrize(("how", "n"), [("by=fold", 5), ("by=speaker", 20), ("k=4", 4)])
def test_folds_hold_out_every_row_once(how, n):
    table = corpus()
    folds = make_folds(table, how, SplitConfig())
    assert len(folds) == n
    assert (sum(fold.held_out.astype(int) for fold in folds) == 1).all()
    for fold in folds:
        assert (fold.split[fold.held_out] == "test").all()
        for column in ("session_id", "speaker_id"):
            names = np.array(table[column].to_pylist())
            held_out = set(names[fold.held_out])
            assert not held_out & set(names[(fold.split == "train") | (fold.split == "dev")])
        found = sides(table, fold.split, "speaker_id")
        assert not found["train"] & found["dev"]


def test_every_split_gets_something_when_groups_are_few():
    table = corpus().slice(0, 300)
    split = plain_split(table, SplitConfig()).split
    assert {side: int((split == side).sum()) for side in ("train", "dev", "test")} == dict.fromkeys(
        ("train", "dev", "test"), 100
    )


def test_overlap_is_refused_and_named():
    given = np.array(["train"] * 500 + ["dev"] * 500, object)
    given[0] = "dev"
    with pytest.raises(SplitError, match=r"1 session\(s\) are in more than one split: 's00'"):
        plain_split(corpus(split=given), SplitConfig())
    given[0:20] = "dev"
    with pytest.raises(SplitError, match=r"2 speaker\(s\) are in more than one split: 'p00', 'p01'.*allow_speaker"):
        plain_split(corpus(split=given), SplitConfig())
    allowed = plain_split(corpus(split=given), SplitConfig(allow_speaker_overlap=True))
    assert allowed.split[0] == "dev"


def test_a_row_without_a_split_has_that_of_its_session():
    whole = plain_split(corpus(), SplitConfig()).split
    table = corpus(split=whole)
    sparse = np.full(1000, None, object)
    last = np.unique(table["session_id"].to_numpy()[::-1], return_index=True)[1]
    sparse[999 - last] = whole[999 - last]
    assert plain_split(corpus(split=sparse), SplitConfig()).split.tolist() == whole.tolist()
    sparse[table["session_id"].to_numpy() == "s00"] = None
    assert set(plain_split(corpus(split=sparse), SplitConfig()).split[table["session_id"].to_numpy() == "s00"]) == {
        None
    }


def test_a_speaker_without_splits_may_be_in_sessions_of_all():
    given = np.array(["train"] * 500 + ["dev"] * 500, object)
    speakers = np.array(corpus()["speaker_id"].to_pylist(), object)
    given[::20], speakers[::20] = None, "agent"
    table = corpus(split=given).set_column(1, "speaker_id", pa.array(speakers))
    assert plain_split(table, SplitConfig()).split.tolist() == ["train"] * 500 + ["dev"] * 500


def test_overlapping_speakers_can_be_allowed_when_splits_are_made():
    lonely = corpus().set_column(1, "speaker_id", pa.array(["agent"] * 1000))
    with pytest.raises(SplitError, match=r"no utterance is left for dev.*1 such groups"):
        plain_split(lonely, SplitConfig())
    made = plain_split(lonely, SplitConfig(allow_speaker_overlap=True))
    assert not set.intersection(*sides(lonely, made.split, "session_id").values())


def test_unknown_split_names():
    with pytest.raises(SplitError, match="holds 'valid'; allowed are train, dev, test, calib"):
        plain_split(corpus(split=["valid"] * 1000), SplitConfig())


@pytest.mark.parametrize(("name", "given"), [("dev", "train"), ("train", "dev")])
def test_empty_splits(name, given):
    with pytest.raises(SplitError, match=f"no utterance is in {name}"):
        plain_split(corpus(split=[given] * 1000), SplitConfig())


def test_nothing_left_to_train_on():
    with pytest.raises(SplitError, match="nothing is left"):
        plain_split(corpus(), SplitConfig(dev_fraction=0.5, test_fraction=0.5))


@pytest.mark.parametrize("how", ["k=1", "k=x", "by=day", "5"])
def test_unknown_folds(how):
    with pytest.raises(UsageError, match=f"--folds {how}: give by=fold, by=speaker, or k=N"):
        make_folds(corpus(), how, SplitConfig())


def test_empty_fold_column():
    with pytest.raises(SplitError, match="the column 'fold' has 0 values"):
        make_folds(corpus(fold=[None] * 1000), "by=fold", SplitConfig())


def test_more_folds_than_groups():
    with pytest.raises(SplitError, match=r"fold '\d' of --folds k=4 would hold 0 of 300"):
        make_folds(corpus().slice(0, 300), "k=4", SplitConfig())
