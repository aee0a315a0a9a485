"""Features that a checkpoint was not trained on are refused."""

import pytest

from vaemo.config import ModelConfig, UpdaterConfig
from vaemo.errors import FeatureMismatchError
from vaemo.model.regressor import SessionRegressor
from vaemo.scoring.compatibility import check_compatible


@pytest.fixture
def model():
    return SessionRegressor(ModelConfig(d_c=8), UpdaterConfig(d_model=16), {"speech": 6})


@pytest.mark.parametrize(
    ("dims", "made_by", "message"),
    [
        ({"prosody": 88}, {}, "the store X has no stream 'speech'"),
        ({"speech": 7}, {}, "'speech' of the store X has 7 numbers; the checkpoint was made for 6"),
        ({"speech": 6}, {"speech": "bbbb"}, "made by the extractor bbbb; the checkpoint was trained on features of aa"),
    ],
)
def test_features_of_others_are_refused(model, dims, made_by, message):
    with pytest.raises(FeatureMismatchError, match=message):
        check_compatible(model, {"speech": "aaaa"}, dims, made_by, "the store X")


def test_features_of_unknown_origin_are_taken(model):
    check_compatible(model, {"speech": "aaaa"}, {"speech": 6, "prosody": 3}, {}, "the store X")
    check_compatible(model, {}, {"speech": 6}, {"speech": "bbbb"}, "the store X")
