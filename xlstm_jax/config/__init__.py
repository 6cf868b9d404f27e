"""Configs: checks, conversion to JSON and back, comparison, and loading from files of users."""

from xlstm_jax.config.compare import differences, fingerprint, flatten
from xlstm_jax.config.fields import (
    DEMANDS,
    FLOAT32_MAX,
    FLOAT32_MIN,
    IMPORTS,
    MAX_BITS,
    MAX_INT,
    as_type,
    check_fields,
    check_range,
    did_you_mean,
    from_dict,
    to_dict,
)
from xlstm_jax.config.files import (
    CACHE_DIR,
    cache_dir,
    parse_json,
    read_json,
    user_path,
)
from xlstm_jax.config.load import call_function, load_config
from xlstm_jax.config.user_code import import_module, with_imports
from xlstm_jax.errors import ConfigError

__all__ = [
    "CACHE_DIR",
    "DEMANDS",
    "FLOAT32_MAX",
    "FLOAT32_MIN",
    "IMPORTS",
    "MAX_BITS",
    "MAX_INT",
    "ConfigError",
    "as_type",
    "cache_dir",
    "call_function",
    "check_fields",
    "check_range",
    "did_you_mean",
    "differences",
    "fingerprint",
    "flatten",
    "from_dict",
    "import_module",
    "load_config",
    "parse_json",
    "read_json",
    "to_dict",
    "user_path",
    "with_imports",
]
