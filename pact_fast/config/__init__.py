"""Settings of a run: the schema, and reading it from recipes, YAML files and the command line. Imports no torch.

schema         every setting, with its type, default and description
load           reads a recipe or YAML file with overrides; settings_file: YAML in bounded time and memory
data_source    names of data files and of datasets of the Hugging Face Hub
filters        top-p, top-k and min-p
changes        settings that a resumed run may change
secrets        refuses keys and passwords among settings
docs           generates docs/configuration.md
"""

from pact_fast.config.data_source import HubDataset, expand_pattern, source_names
from pact_fast.config.load import known_keys, load_config, parse_config, recipes, section_of
from pact_fast.config.schema import (
    AlgorithmConfig,
    AnchorConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    EnvConfig,
    LoraConfig,
    ModelConfig,
    PretrainConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    SFTConfig,
    TraceConfig,
    TrainerConfig,
)

__all__ = [
    "AlgorithmConfig",
    "AnchorConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EnvConfig",
    "HubDataset",
    "LoraConfig",
    "ModelConfig",
    "PretrainConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "Section",
    "TraceConfig",
    "TrainerConfig",
    "expand_pattern",
    "known_keys",
    "load_config",
    "parse_config",
    "recipes",
    "section_of",
    "source_names",
]
