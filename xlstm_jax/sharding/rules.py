"""Tables from the name of an axis to the axes of the mesh that cut it."""

from collections.abc import Mapping

from xlstm_jax.config import ConfigError

Rules = Mapping[str, tuple[str, ...]]

RULES: dict[str, Rules] = {
    "data": {
        "batch": ("data",),
        "time": (),
        "embed": (),
        "inner": (),
        "mlp": (),
        "heads": (),
        "vocab": (),
        "layers": (),
    },
    "fsdp": {
        "batch": ("data", "fsdp"),
        "time": (),
        "embed": ("fsdp",),
        "inner": (),
        "mlp": (),
        "heads": (),
        "vocab": ("fsdp",),
        "layers": (),
    },
    "fsdp_tensor": {
        "batch": ("data", "fsdp"),
        "time": (),
        "embed": ("fsdp",),
        "inner": ("tensor",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "vocab": ("tensor", "fsdp"),
        "layers": (),
    },
    "fsdp_seq": {
        "batch": ("data", "fsdp"),
        "time": ("seq",),
        "embed": ("fsdp",),
        "inner": (),
        "mlp": (),
        "heads": (),
        "vocab": ("fsdp",),
        "layers": (),
    },
}
"""Every table says where every axis goes; () is nowhere: each device holds it whole."""


def get_rules(name: str) -> Rules:
    """The table of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"rules={name!r} is not known; use one of: {', '.join(RULES)}.")
    return RULES[name]
