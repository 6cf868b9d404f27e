"""Tables from a logical axis to the axes of the mesh it is sharded over, and the one in use."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from xlstm_jax.config import ConfigError

Rules = Mapping[str, tuple[str, ...]]

LOGICAL_AXES = ("batch", "time", "embed", "inner", "mlp", "heads", "vocab", "layers")
"""embed: model width, where a parameter reads it; inner: heads x head size; mlp: feed-forward."""

_REPLICATED: Rules = dict.fromkeys(LOGICAL_AXES, ())
_FSDP: Rules = {**_REPLICATED, "batch": ("data", "fsdp"), "embed": ("fsdp",), "vocab": ("fsdp",)}

RULES: dict[str, Rules] = {
    "data": {**_REPLICATED, "batch": ("data",)},
    "fsdp": _FSDP,
    "fsdp_tensor": {
        **_FSDP,
        "inner": ("tensor",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "vocab": ("tensor", "fsdp"),
    },
    "fsdp_seq": {**_FSDP, "time": ("seq",)},
}
"""Every table has every logical axis; () means that it is replicated."""

EVERYTHING: Rules = {**RULES["fsdp_tensor"], "time": ("seq",)}
"""For activations where no table is in use: every axis that a mesh may have."""

_in_use: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=EVERYTHING)


def get_rules(name: str) -> Rules:
    """The table of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"rules={name!r} is not known; use one of: {', '.join(RULES)}.")
    return RULES[name]


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Within, activations are sharded by this table, as far as the active mesh has its axes.

    It counts while a function is traced: enter it inside of what is compiled, as the training
    program does, or a program compiled before stays as it was.
    """
    token = _in_use.set(rules)
    try:
        yield
    finally:
        _in_use.reset(token)


def rules_in_use() -> Rules:
    """The table of the innermost `use_rules`, or `EVERYTHING`."""
    return _in_use.get()
