"""Configs load strictly, say what is wrong, and hash what matters."""

import dataclasses

import pytest

import vaemo.config.config
from vaemo.config import PRESETS, TOGETHER, Config, LabelConfig, ModelConfig, settled
from vaemo.config.fields import option
from vaemo.errors import ConfigValueError, UnknownConfigKeyError, UsageError

FIELDS = [
    (section.name, field)
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), section.name))
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load(name):
    assert isinstance(Config.load(name), Config)


def test_default_preset_is_the_dataclasses():
    assert Config.load("default") == Config()


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_every_field_is_documented_and_classified(section, field):
    assert field.metadata["doc"]
    assert isinstance(field.metadata["runtime"], bool)


def test_fields_that_are_checked_together_exist():
    assert {name for names in TOGETHER for name in names} <= {f"{section}.{field.name}" for section, field in FIELDS}


def test_round_trip_through_yaml(tmp_path):
    config = Config.load("seed", ["labels.range=[1, 7]", "model.film=off", "score.channel_roles=[agent, customer]"])
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert Config.load(path) == config
    assert Config.from_dict(config.to_dict()) == config


def test_explained_it_is_the_same_config_and_says_what_every_field_means(tmp_path):
    config = Config.load("seed", ["labels.range=[1, 7]", "model.film=off", "score.channel_roles=[agent, customer]"])
    path = tmp_path / "run.yaml"
    path.write_text(config.explained())
    assert Config.load(path) == config
    told = " ".join(path.read_text().replace("#", " ").split())
    for _, field in FIELDS:
        assert " ".join(field.metadata["doc"].split()) in told
    assert "(a number from 0 to 0.999) alpha: 0.8" in told
    assert '(one of mamba, mamba2, gru, none) updater: "mamba"' in told


def test_overrides_are_converted_to_the_field_type():
    config = Config.load("default", ["train.lr=1e-4", "model.film=off", "model.alpha_arousal=null", "train.epochs=3"])
    assert (config.train.lr, config.model.film, config.model.alpha_arousal, config.train.epochs) == (
        1e-4,
        "off",
        None,
        3,
    )


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "model.alhpa=1",
            UnknownConfigKeyError,
            r"'model\.alhpa'\. Did you mean model\.alpha\? Allowed: model\.updater",
        ),
        ("train.alpha=0.9", UnknownConfigKeyError, r"Did you mean model\.alpha\?"),
        ("modle.alpha=1", UnknownConfigKeyError, r"section 'modle'\. Did you mean model\?"),
        ("model.alpha=2", ConfigValueError, r"model\.alpha is 2; it must be at most 0\.999"),
        ("train.lanes=0", ConfigValueError, r"train\.lanes is 0; it must be at least 1"),
        ("train.lanes=true", ConfigValueError, r"train\.lanes is True; allowed is a whole number"),
        ("train.lr=.nan", ConfigValueError, r"train\.lr is nan; allowed is a number"),
        ("model.updater=lstm", ConfigValueError, r"'lstm'; allowed is one of mamba, mamba2, gru, none"),
        ("labels.range=[1, 7, 9]", ConfigValueError, r"allowed is a list of 2 numbers or a mapping of names, to"),
        ("labels.range=[7, 1]", ConfigValueError, r"labels\.range is \[7\.0, 1\.0\]; give the lowest and the highest"),
        ("model.speaker_norm=prosody", ConfigValueError, r"allowed is a list of any of speech, prosody"),
        (
            "model.session_norm=[speaker]",
            ConfigValueError,
            r"\['speaker'\]; allowed is a list of any of speech, prosody",
        ),
        ("model.speaker_norm_weight=-1", ConfigValueError, r"speaker_norm_weight is -1; it must be at least 0"),
        ("train.trackers=wandb", ConfigValueError, r"'wandb'; allowed is a list of texts"),
        ("model.label_range=[0, 2]", ConfigValueError, r"allowed are \[0, 1\] and \[-1, 1\]"),
        ("train.sampling_hold_fraction=0.9", ConfigValueError, r"together they may be 1 at most"),
        ("train.encoder_from_epoch=30", ConfigValueError, r"of train\.epochs 30: the encoder would never be trained"),
        ("alpha=0.9", ConfigValueError, r"give section\.key=value"),
        ("model.alpha", ConfigValueError, r"give section\.key=value"),
        ("model.alpha=[", ConfigValueError, r"is not a YAML value"),
        ("train.epochs=010", ConfigValueError, r"train\.epochs is '010'; allowed is a whole number"),
        ("train.window=1:30", ConfigValueError, r"train\.window is '1:30'; allowed is a whole number"),
        ("train.epochs=0x10", ConfigValueError, r"train\.epochs is '0x10'; allowed is a whole number"),
        ("train.lr=010", ConfigValueError, r"train\.lr is '010'; allowed is a number"),
        ("train.lr=1:30", ConfigValueError, r"train\.lr is '1:30'; allowed is a number"),
        ("train.lr=1,5", ConfigValueError, r"train\.lr is '1,5'; allowed is a number"),
        ("train.lr=infinity", ConfigValueError, r"train\.lr is 'infinity'; allowed is a number"),
        ("train.clip=1e999", ConfigValueError, r"train\.clip is '1e999'; allowed is a number"),
        ("model.prosody=2", ConfigValueError, r"model\.prosody is 2; allowed is true or false"),
        ("model.prosody=maybe", ConfigValueError, r"model\.prosody is 'maybe'; allowed is true or false"),
        ("features.speech=123", ConfigValueError, r"features\.speech is 123; allowed is text\. Put it in quotes"),
        ("train.window={a: 1, a: 2}", ConfigValueError, r"not a YAML value \(line 1: 'a' occurs twice"),
        ("updater.headdim=48", ConfigValueError, r"headdim is 48, .* updater\.d_model = 256\. Choose a divisor"),
        ("lr=0.1", ConfigValueError, r"give section\.key=value, such as --set train\.lr=0\.1\."),
        ("train.learning_rate=1", UnknownConfigKeyError, r"Did you mean train\.lr\? Allowed"),
        ("train.momentum=1", UnknownConfigKeyError, r"'train\.momentum'\. Allowed"),
        ("training.lr=1", UnknownConfigKeyError, r"section 'training'\. Did you mean train\?"),
        ("training.learning_rate=1", UnknownConfigKeyError, r"section 'training'\. Did you mean train\.lr\?"),
    ],
)
def test_bad_overrides_say_what_is_allowed(override, error, message):
    overrides = [override]
    if "hold_fraction" in override:
        overrides.append("train.sampling_end_fraction=0.2")
    if "encoder" in override:
        overrides.append("train.encoder=all")
    if "headdim" in override:
        overrides.append("model.updater=mamba2")
    with pytest.raises(error, match=message):
        Config.load("default", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "needs sections"),
        ("model: 3\n", "takes fields such as model"),
        ("a: [\n", "is not YAML"),
        ("train: {lr: 0.1}\nmodel: {}\ntrain: {epochs: 3}\n", "line 3: 'train' occurs twice, first on line 1"),
        ("train:\n  lr: 0.1\n  lr: 0.2\n", "line 3: 'lr' occurs twice, first on line 2"),
        ("train:\n  lr: 0.1\n  epochs: 010\n", r"bad\.yaml', line 3: train\.epochs is '010'; allowed is a whole num"),
        ("train:\n\n  window: 1:30\n", r"bad\.yaml', line 3: train\.window is '1:30'; allowed is a whole number"),
        ("model:\n  alpha: 3\n", r"bad\.yaml', line 2: model\.alpha is 3; it must be at most"),
        ("model:\n  alhpa: 3\n", r"bad\.yaml', line 2: unknown config key .* Did you mean model\.alpha\?"),
        ("\ntrain: {sampling_hold_fraction: 0.9}\n", r"bad\.yaml', line 2: train\.sampling_hold.* may be 1 at most"),
        (
            "train.lr: 0.001\n",
            r"line 1: unknown .*'train\.lr'\. A field belongs inside its section: train: {lr: 0\.001}\.",
        ),
        ("train.learning_rate: 1\n", r"A field belongs inside its section: train: {lr: 1}\."),
        ("dropout: 0.2\n", r"A field belongs inside its section: model: {dropout: 0\.2}\."),
        ("optimizer: {learning_rate: 0.2}\n", r"unknown config section 'optimizer'\. Did you mean train\.lr\?"),
        ("labels: {range: &a [" + ", ".join(["1"] * 500) + "]}", r"\[1, 1, .{,300}\.\.\.; allowed is a list of 2"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as refusal:
        Config.load(path)
    assert "\n" not in str(refusal.value)


def test_what_a_file_says_counts_with_what_is_changed_in_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {updater: mamba2, film: off, prosody: yes}\nupdater: {headdim: 48}\ntrain: {lr: 1e-3}\n")
    with pytest.raises(ConfigValueError, match="headdim is 48, which does not divide"):
        Config.load(path)
    config = Config.load(path, ["updater.d_model=32", "updater.d_model=96", "model.prosody=off"])
    assert (config.updater.headdim, config.updater.d_model) == (48, 96)
    assert (config.model.film, config.model.prosody, config.train.lr) == ("off", False, 1e-3)
    with pytest.raises(ConfigValueError, match=r"^updater\.headdim is 0; it must be at least 1"):
        Config.load(path, ["updater.headdim=0"])


def test_texts_that_look_like_something_else_stay_text(tmp_path):
    revisions = ["0123456", "12e4567", "1:30", "2024-01-01", "no", "0x10", "null"]
    for revision in revisions:
        config = Config().replace({"features": {"speech_revision": revision}})
        for text in (config.to_yaml(), config.explained()):
            (tmp_path / "run.yaml").write_text(text)
            assert Config.load(tmp_path / "run.yaml") == config
    for revision in revisions[:-1]:
        assert Config.load("default", [f"features.speech_revision={revision}"]).features.speech_revision == revision


def test_a_section_that_is_a_number_is_unknown():
    with pytest.raises(UnknownConfigKeyError, match=r"unknown config section '1'\. Allowed: audio, vad"):
        Config().replace({1: {}})


def test_missing_file_names_the_presets():
    with pytest.raises(ConfigValueError, match="one of the presets default, seed"):
        Config.load("/nowhere/run.yaml")


def test_fingerprint_follows_results_only():
    config = Config()
    assert config.replace({"extract": {"batch_s": 5.0}}).fingerprint() == config.fingerprint()
    changed = config.replace({"model": {"d_c": 32}})
    assert changed.fingerprint() != config.fingerprint()
    assert changed.fingerprint("features") == config.fingerprint("features")


def with_section(patch, name, field, older=object):
    """A config with one more field in a section, which may be new itself."""
    section = dataclasses.make_dataclass(name.title(), [field], bases=(older,), frozen=True)
    config = dataclasses.make_dataclass("Config", [(name, section, section())], bases=(Config,), frozen=True)
    patch.setitem(vaemo.config.config.SECTIONS, name, section)
    patch.setattr(vaemo.config.config, "Config", config)
    return config


@pytest.fixture
def younger_field(monkeypatch):
    """A field that files of today lack: its default differs from what was so before it existed."""
    field = ("hum_norm", tuple[str, ...], option(("prosody",), "Streams.", before=()))
    return with_section(monkeypatch, "model", field, ModelConfig)


def test_a_younger_field_is_absent_from_saved_configs(younger_field, tmp_path):
    saved = Config().to_dict()
    assert "hum_norm" not in saved["model"]
    loaded = younger_field.from_dict(saved)
    assert loaded.model.hum_norm == ()
    assert loaded.fingerprint() == Config().fingerprint()
    assert younger_field().model.hum_norm == ("prosody",)
    assert younger_field().fingerprint() != Config().fingerprint()

    path = tmp_path / "config.yaml"
    path.write_text(Config().to_yaml())
    assert younger_field.load(path).model.hum_norm == ()
    path.write_text("model: {alpha: 0.9}\n")
    assert younger_field.load(path).model.hum_norm == ("prosody",)
    path.write_text(younger_field().to_yaml())
    assert younger_field.load(path) == younger_field()


@pytest.mark.parametrize(("name", "older"), [("labels", LabelConfig), ("calibrate", object)])
def test_a_section_of_one_field_or_none_was_saved_beside_others(monkeypatch, tmp_path, name, older):
    saved = Config().to_yaml()
    config = with_section(monkeypatch, name, ("later", str, option("as now", "Younger.", before="as then")), older)
    path = tmp_path / "config.yaml"
    for text, means in (
        (saved, "as then"),
        ("labels: {range: [1, 7]}\n", "as now"),
        ("labels: {range: [1, 7]}\nsessions: {sequence_by: speaker}\n", "as now"),
        (config().to_yaml(), "as now"),
        (saved + f"{name}: {{later: as now}}\n" if older is object else "", "as now"),
    ):
        path.write_text(text)
        assert getattr(config.load(path), name).later == means


def test_settings_of_another_version_compare_without_what_decides_nothing(younger_field):
    then = {"data": "d", "run": {"model": {"alpha": 0.5, "scan": "auto"}}, "sessions": 84}
    filled = settled(then)
    model = filled["run"].pop("model")
    assert filled == {"data": "d", "run": {}, "sessions": 84}
    assert (model["alpha"], model["hum_norm"]) == (0.5, [])
    assert "scan" not in model
    now = settled({"run": {"model": {"alpha": 0.5, "hum_norm": ["prosody"], "unknown": 1}}})
    assert (now["run"]["model"]["hum_norm"], now["run"]["model"]["unknown"]) == (["prosody"], 1)
