"""The configuration: `schema` is the typed tree, `load` reads and writes it, `derived` is the arithmetic that follows from it.

Importing this package loads pydantic and nothing heavier; `load` brings the YAML library with it.
"""

from fst_fast.config.fast import FastConfig
from fst_fast.config.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    SlowConfig,
    StageConfig,
    TrackConfig,
    VerifyConfig,
)
from fst_fast.config.section import Section

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "FastConfig",
    "LoraConfig",
    "ModelConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "SlowConfig",
    "StageConfig",
    "TrackConfig",
    "VerifyConfig",
]
