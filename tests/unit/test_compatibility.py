"""Features that a checkpoint was not trained on are refused."""

from types import SimpleNamespace

import pytest

from vaemo.config import Config, ModelConfig, UpdaterConfig
from vaemo.errors import FeatureMismatchError
from vaemo.model.regressor import SessionRegressor
from vaemo.scoring.compatibility import check_compatible, note_other_band


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


@pytest.mark.parametrize(
    ("made", "trained", "said"), [(False, True, "true"), (True, False, "false"), (True, True, None)]
)
def test_recordings_heard_in_another_band_are_noted(capsys, made, trained, said):
    config = Config().replace({"audio": {"simulate_telephone": trained}})
    checkpoint = SimpleNamespace(features=config.features, config=config)
    store = SimpleNamespace(path="X", info={"settings": {"audio": {"simulate_telephone": made}}})
    note_other_band(checkpoint, store)
    note_other_band(checkpoint, SimpleNamespace(path="X", info={}))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == (said is not None)
    assert not said or f"Extract them with --set audio.simulate_telephone={said}" in told[0]
