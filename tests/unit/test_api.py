"""Arguments of the functions that the command line would refuse are refused before anything is written."""

import pytest

import vaemo
from vaemo.errors import UsageError


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (vaemo.train, {"store": "s", "seeds": 0}, "seeds is 0; give a whole number of at least 1"),
        (vaemo.train, {"store": "s", "workers": -1}, "workers is -1; give a whole number"),
        (vaemo.train, {"store": "s", "set": "train.epochs=1"}, r"set is 'train\.epochs=1'; give a list"),
        (vaemo.extract, {"input": "i", "limit": 0}, "limit is 0; give a whole number"),
        (vaemo.extract, {"input": "i", "exclude": "*.wav"}, r"exclude is '\*\.wav'; give a list"),
        (vaemo.score, {"input": "i", "checkpoint": "c", "limit": "2"}, "limit is '2'; give a whole number"),
        (vaemo.score, {"input": "i", "checkpoint": []}, "checkpoint is an empty list"),
        (vaemo.evaluate, {"scores": "s", "labels": "l", "by": "split"}, "by is 'split'; give a list"),
    ],
)
def test_a_wrong_argument_leaves_nothing_behind(tmp_path, monkeypatch, call, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        call(out="out", **arguments)
    assert not list(tmp_path.iterdir())
