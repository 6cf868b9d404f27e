"""Sharding rules: tables from logical axes to mesh axes, and the rules in use."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote

Rules = Mapping[str, tuple[str, ...]]

LOGICAL_AXES = ("batch", "time", "embed", "inner", "mlp", "heads", "vocab", "layers")
"""embed: the model width, as a dimension of parameters; inner: heads x head size; mlp: feed-forward
width; layers: the leading axis of stacked blocks."""

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
"""Every table has all logical axes; () means replicated. `MeshConfig` tries them in this order."""

DEFAULT_RULES: Rules = {**RULES["fsdp_tensor"], "time": ("seq",)}
"""Rules outside of `use_rules`: they use every axis of `MESH_AXES`."""

# A context variable and not a global: threads may trace under different rules.
_in_use: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


def get_rules(name: str) -> Rules:
    """The rules with this name; raises ConfigError if there are none."""
    if name not in RULES:
        raise ConfigError(f"rules={quote(name)} is not known; use one of: {', '.join(RULES)}.")
    return RULES[name]


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Within the context, activations are sharded by these rules, on the axes of the active mesh.

    The rules are read while a function is traced. Enter the context inside the jitted function, as
    `TrainProgram` does: a function that is already compiled does not see a change of rules.
    """
    token = _in_use.set(rules)
    try:
        yield
    finally:
        _in_use.reset(token)


def rules_in_use() -> Rules:
    """The rules of the innermost `use_rules`, or `DEFAULT_RULES`."""
    return _in_use.get()
