"""Every setting of a run: frozen dataclasses, loaded strictly, fingerprinted.

A config comes from a preset (`default`, `seed`) or a YAML file, then `section.key=value` overrides. Unknown keys,
wrong types and values out of range are refused with what is allowed. `fingerprint` hashes the fields that can
change results; fields marked `runtime` cannot and stay out of it.
"""

from vaemo.config.config import (
    PRESETS,
    Config,
    decides,
    fitting,
    nearest,
    settled,
)
from vaemo.config.sections import (
    HEADERLESS_CODECS,
    TOGETHER,
    AudioConfig,
    EvaluateConfig,
    ExtractConfig,
    FeatureConfig,
    Headerless,
    LabelConfig,
    ModelConfig,
    PersonalizeConfig,
    ScoreConfig,
    SessionConfig,
    SplitConfig,
    TrainConfig,
    UpdaterConfig,
    VadConfig,
    VoicesConfig,
)

__all__ = [
    "HEADERLESS_CODECS",
    "PRESETS",
    "TOGETHER",
    "AudioConfig",
    "Config",
    "EvaluateConfig",
    "ExtractConfig",
    "FeatureConfig",
    "Headerless",
    "LabelConfig",
    "ModelConfig",
    "PersonalizeConfig",
    "ScoreConfig",
    "SessionConfig",
    "SplitConfig",
    "TrainConfig",
    "UpdaterConfig",
    "VadConfig",
    "VoicesConfig",
    "decides",
    "fitting",
    "nearest",
    "settled",
]
