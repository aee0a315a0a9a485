import numpy as np
import pytest
from tiny_models import write_speaker_model, write_speech_model

from vaemo.config import Config, FeatureConfig
from vaemo.errors import ExtractorError
from vaemo.features import StandIn, describe, load_extractors, with_absolute_folders


def test_the_defaults_need_no_weights():
    extractors = load_extractors(FeatureConfig())
    assert {stream: extractor.name for stream, extractor in extractors.items()} == {
        "speech": "logmel",
        "prosody": "egemaps",
        "speaker": "ltas",
    }
    described = describe(extractors)
    assert described["prosody"]["dim"] == 88
    assert all(set(item) == {"name", "version", "dim", "fingerprint"} for item in described.values())


def test_models_in_folders_are_loaded_by_their_path(tmp_path):
    config = FeatureConfig(
        speech=str(write_speech_model(tmp_path / "s", "wavlm")),
        prosody="none",
        speaker=str(write_speaker_model(tmp_path / "p", "ecapa")),
        speech_layer=2,
    )
    extractors = load_extractors(config, batch_s=10.0)
    assert list(extractors) == ["speech", "speaker"]
    samples = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    assert {stream: extractor([samples]).shape for stream, extractor in extractors.items()} == {
        "speech": (1, 32),
        "speaker": (1, 12),
    }


def test_workers_find_a_folder_that_was_given_relative_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("encoder", "logmel", "egemaps"):
        (tmp_path / name).mkdir()
    for given, found in {
        "encoder": str(tmp_path / "encoder"),
        "logmel": "logmel",
        "org/hub-model": "org/hub-model",
    }.items():
        config = with_absolute_folders(Config.load("default", [f"features.speech={given}"]))
        assert (config.features.speech, config.features.prosody) == (found, "egemaps")


def test_an_extractor_that_is_there_already_is_not_loaded():
    config = FeatureConfig(speech="/nowhere")
    ready = StandIn("wavlm", "1", 768, "0" * 16, True, begin=lambda utterances: lambda: np.ones((len(utterances), 768)))
    extractors = load_extractors(config, ready={"speech": ready})
    assert list(extractors) == ["speech", "prosody", "speaker"]
    assert extractors["speech"] is ready
    assert ready([np.zeros(160, np.float32)]).shape == (1, 768)
    assert describe({"speech": StandIn.of(ready, ready.begin)}) == describe({"speech": ready})


def test_what_is_not_offered_is_refused():
    with pytest.raises(ExtractorError, match=r"features.prosody is 'opensmile'; allowed are egemaps, gemaps, compare"):
        load_extractors(FeatureConfig(prosody="opensmile"))
    with pytest.raises(ExtractorError, match="all `none`; at least one stream is needed"):
        load_extractors(FeatureConfig(speech="none", prosody="none", speaker="none"))
