"""The model card: what it says, from the files of a checkpoint alone."""

import json

import pytest
import yaml

from vaemo.config import Config
from vaemo.errors import ReadCheckpointError
from vaemo.training.card import card_of, write_card

METRICS = {"epoch": 7, "dev_ccc_valence": 0.612, "dev_ccc_arousal": 0.701, "dev_ccc_avg": 0.6566}
METRICS |= {"dev_within_ccc_valence": 0.412, "dev_within_ccc_arousal": 0.501, "dev_within_ccc_avg": 0.4566}
PROVENANCE = {
    "version": "0.1.0",
    "seed": 3,
    "data_fingerprint": "d" * 64,
    "native_range": [1, 7],
    "roles": ["customer"],
    "sequence_by": "session",
    "fingerprint": "f" * 64,
}
POOLED = {"n": 1234, "n_sessions": 56} | {
    f"{metric}_{name}": 0.5
    for metric in ("ccc", "within_ccc", "rmse", "pearson")
    for name in ("valence", "arousal", "avg")
}
EVALUATION = {
    "split": "test",
    "variance": "biased",
    "pooled": {
        **POOLED,
        "ci95": {name: [0.4, 0.6] for name in POOLED if name.startswith(("ccc", "within_ccc", "rmse"))},
    },
}


def write_checkpoint(folder, provenance=PROVENANCE):
    folder.mkdir()
    (folder / "config.yaml").write_text(Config().to_yaml())
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return str(folder)


def test_the_card_says_what_the_model_is_and_how_good(tmp_path):
    folder = write_checkpoint(tmp_path / "best")
    write_card(folder, EVALUATION)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "| CCC, test | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in card
    assert "| CCC within sessions, test | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in card
    assert "| CCC within sessions, dev | 0.412 | 0.501 | 0.457 |" in card
    assert "| Pearson's r, test | 0.500 | 0.500 | 0.500 |" in card
    assert "| CCC, dev | 0.612 | 0.701 | 0.657 |" in card
    assert "1,234 utterances of 56 sessions" in card
    assert PROVENANCE["data_fingerprint"] in card
    assert PROVENANCE["fingerprint"] in card
    assert "the corpus's own range is [1, 7]" in card
    assert "roles trained on: customer" in card
    assert "Art. 5(1)(f)" in card
    assert "Annex III" in card
    assert "openSMILE (audEERING)" in card
    assert "declared use: not declared" in card
    assert "synthetic" not in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings == Config().to_dict()


def test_without_an_evaluation_the_development_set_speaks():
    card = card_of(Config().to_dict(), METRICS, PROVENANCE)
    assert "CCC, dev" in card
    assert "CCC, test" not in card


def test_numbers_of_an_older_version_are_shown_as_they_are():
    """Neither its metrics nor its evaluations know of CCC within sessions."""
    metrics = {name: value for name, value in METRICS.items() if "within" not in name}
    pooled = {name: value for name, value in EVALUATION["pooled"].items() if "within" not in name}
    card = card_of(Config().to_dict(), metrics, PROVENANCE, {**EVALUATION, "pooled": pooled})
    assert "| CCC, test | 0.500" in card
    assert "CCC within sessions" not in card


def test_what_the_development_set_decided_is_said():
    card = card_of(Config().replace({"train": {"select": "best"}}).to_dict(), METRICS, PROVENANCE)
    assert "| CCC, dev (the model was chosen by it) | 0.612" in card


def test_streams_that_the_store_lacked_are_not_claimed():
    config = Config().to_dict()
    assert "speaker: `film`; prosody: yes" in card_of(config, METRICS, PROVENANCE)
    assert "speaker: none; prosody: no" in card_of(config, METRICS, PROVENANCE | {"streams": ["speech"]})


def test_synthetic_speech_is_said_first():
    card = card_of(Config().to_dict(), METRICS, {**PROVENANCE, "synthetic": True})
    assert card.index("Trained on synthetic speech") < card.index("## Model")


def test_licences_follow_the_extractors():
    features = {"speech": "microsoft/wavlm-base", "prosody": "praat", "speaker": "none"}
    card = card_of(Config().replace({"features": features}).to_dict(), METRICS, PROVENANCE)
    assert "- speech: `microsoft/wavlm-base`: a pretrained encoder: its own licence applies" in card
    assert "- prosody: `praat`: Praat through parselmouth, GPL-3.0" in card
    assert "- speaker:" not in card
    unknown = {name: section for name, section in Config().to_dict().items() if name != "features"}
    assert "unknown: the store does not say which extractors made it" in card_of(unknown, METRICS, PROVENANCE)


def test_an_encoder_of_its_own_is_named_by_where_it_comes_from():
    config = Config().replace({"features": {"speech": "./encoder"}}).to_dict()
    origin = {"encoder": {"name": "microsoft/wavlm-base", "trained": "last 2 layers"}}
    card = card_of(config, METRICS, {**PROVENANCE, **origin})
    assert "- speech: `microsoft/wavlm-base`: a pretrained encoder: its own licence applies" in card
    assert "trained further with this model (last 2 layers)" in card


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "provenance.json"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "best")
    (tmp_path / "best" / name).unlink()
    with pytest.raises(ReadCheckpointError, match=f"is not a whole checkpoint: .*{name}"):
        write_card(folder)
    (tmp_path / "best" / name).write_text("{")
    with pytest.raises(ReadCheckpointError, match="is not a whole checkpoint: "):
        write_card(folder)


def test_the_card_says_what_is_compared_and_how_speech_comes_in():
    settings = Config.load("default", ["model.speech_mlp=after_film", "model.speaker_norm_weight=3"]).to_dict()
    facts = {**PROVENANCE, "compared_with_past": ["speaker.prosody", "session.prosody"]}
    card = card_of(settings, METRICS, facts)
    assert "a network on speech (`after_film`)" in card
    assert "- compared with the past of the session: prosody with the speaker's, prosody with the session's (w" in card
    assert "(weight of the training mean 3 utterances)" in card
    older = {name: value for name, value in settings["model"].items() if "speech" not in name and "norm" not in name}
    card = card_of({**settings, "model": older}, METRICS, PROVENANCE).partition("## Law")[0]
    assert "network on speech" not in card
    assert "past" not in card
