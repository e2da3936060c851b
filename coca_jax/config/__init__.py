"""Configuration: an editable ConfigDict at the edge, frozen dataclasses inside.

`keys.py` is the single list of what can be configured. A recipe in `configs/` starts from `default()` and changes what
it means to change; the command line changes more (`--config.optimizer.peak_lr=1e-3`); `from_config_dict` freezes the
result and `check` refuses what cannot run, in one line that names the key, the value and what would work.
"""

from coca_jax.config.keys import (
    Bridge,
    Checkpoint,
    Config,
    ConfigError,
    Data,
    Evaluate,
    Guard,
    Head,
    ImageEncoder,
    Init,
    Lora,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Pooler,
    TextDecoder,
)
from coca_jax.config.listing import list_keys
from coca_jax.config.mesh import dcn_shape, mesh_shape
from coca_jax.config.reading import check_key, default, from_config_dict, get, to_json
from coca_jax.config.rules import REMAT, check, check_model, flash_keys

__all__ = [
    "REMAT",
    "Bridge",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Data",
    "Evaluate",
    "Guard",
    "Head",
    "ImageEncoder",
    "Init",
    "Lora",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "Pooler",
    "TextDecoder",
    "check",
    "check_key",
    "check_model",
    "dcn_shape",
    "default",
    "flash_keys",
    "from_config_dict",
    "get",
    "list_keys",
    "mesh_shape",
    "to_json",
]
