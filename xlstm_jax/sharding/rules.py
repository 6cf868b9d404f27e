"""Tables from the name of an axis to the axes of the mesh that cut it, and the one in use."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from xlstm_jax.config import ConfigError

Rules = Mapping[str, tuple[str, ...]]
RulesName = Literal["data", "fsdp", "fsdp_tensor", "fsdp_seq"]

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

assert tuple(RULES) == get_args(RulesName)

EVERYTHING: Rules = {**RULES["fsdp_tensor"], "time": ("seq",)}
"""What cuts activations where no table is in use: every axis that a mesh may have."""

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
    """Within, activations are cut by this table, as far as the active mesh has its axes.

    It counts while a function is traced: enter it inside of what is compiled, as the train step
    does, or a program compiled before goes on as it was.
    """
    token = _in_use.set(rules)
    try:
        yield
    finally:
        _in_use.reset(token)


def rules_in_use() -> Rules:
    """The table of the innermost `use_rules`, or `EVERYTHING`."""
    return _in_use.get()
