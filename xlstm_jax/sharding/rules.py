"""Sharding rules: tables from logical axes to mesh axes, and the rules in use."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import jax

from xlstm_jax.errors import ArgumentError, ConfigError, quote

Rules = Mapping[str, tuple[str, ...]]
PartialRules = Mapping[str, str | Sequence[str]]
"""Logical axis -> the mesh axis or axes that shard it. Absent logical axes are replicated."""

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
"""() and an absent logical axis mean replicated. `MeshConfig` tries the tables in this order."""

DEFAULT_RULES: Rules = {**RULES["fsdp_tensor"], "time": ("seq",)}
"""Rules outside of `use_rules`: they use every axis of `MESH_AXES`."""

# Part of the key of jit's cache, and local to a thread. The value is hashable: items of the rules,
# and the replicated mesh axes.
_in_use = jax.make_user_context((tuple(DEFAULT_RULES.items()), ()))


def get_rules(name: str) -> Rules:
    """The rules with this name, with all logical axes; raises ConfigError for an unknown name."""
    if name not in RULES:
        raise ConfigError(f"rules={quote(name)} is not known; use one of: {', '.join(RULES)}.")
    return complete(RULES[name])


def complete(rules: PartialRules) -> Rules:
    """Rules with all logical axes and with tuples as values; absent axes are replicated.

    Raises:
        ArgumentError: an axis is not a logical one, or a value is not a name or several.
    """
    if not isinstance(rules, Mapping):
        raise ArgumentError(
            "rules must be a table from logical to mesh axes or the name of one, got "
            f"{quote(rules)}."
        )
    table = dict(_REPLICATED)
    for name, axes in rules.items():
        if name not in table:
            known = ", ".join(LOGICAL_AXES)
            raise ArgumentError(f"rules have no logical axis {quote(name)}; use some of: {known}.")
        axes = (axes,) if isinstance(axes, str) else axes
        if not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
            raise ArgumentError(
                f"rules[{quote(name)}] must be a mesh axis or a tuple of them, got {quote(axes)}."
            )
        table[name] = tuple(axes)
    return table


@contextlib.contextmanager
def use_rules(rules: str | PartialRules, *, replicated: Sequence[str] = ()) -> Iterator[None]:
    """Within the context, activations are sharded by these rules, on the axes of the active mesh.

    They are part of the key of jit's cache: a function called under other rules is traced again.

    Args:
        rules: logical axis -> the mesh axis or axes that shard it, or the name of a table in
            `RULES`. A logical axis that is left out is replicated.
        replicated: mesh axes over which all arrays are replicated, such as pipeline stages.

    Raises:
        ValueError: a logical axis or a table that does not exist.
    """
    table = get_rules(rules) if isinstance(rules, str) else complete(rules)
    replicated = (replicated,) if isinstance(replicated, str) else tuple(replicated)
    with _in_use((tuple(table.items()), replicated)):
        yield


def rules_in_use() -> Rules:
    """The rules of the innermost `use_rules`, or `DEFAULT_RULES`."""
    return dict(_in_use.value[0])


def check_mesh_axes(sizes: Mapping[str, int]) -> None:
    """Raises ArgumentError for an axis with several devices that the rules in use do not name.

    All devices along it would compute the same.
    """
    rules, replicated = dict(_in_use.value[0]), _in_use.value[1]
    named = {axis for axes in rules.values() for axis in axes}
    unknown = [
        name
        for name, size in sizes.items()
        if size > 1 and name not in named and name not in replicated
    ]
    if unknown:
        raise ArgumentError(
            f"no sharding rule names the mesh axis {quote(unknown[0])} of size "
            f"{sizes[unknown[0]]}, so its devices would all compute the same; map it, for example "
            f"with {_example(rules, sizes, unknown)}."
        )


def _example(rules: Rules, sizes: Mapping[str, int], unknown: Sequence[str]) -> str:
    """A call of `use_rules` that maps unknown mesh axes: to the batch, then to features."""
    table = {name: tuple(axis for axis in axes if axis in sizes) for name, axes in rules.items()}
    table = {name: axes[0] if len(axes) == 1 else axes for name, axes in table.items() if axes}
    rest = list(unknown)
    for names in (("batch",), ("heads", "inner", "mlp", "vocab")):
        if rest and not any(name in table for name in names):
            table |= dict.fromkeys(names, rest.pop(0))
    return f"use_rules({table}{f', replicated={tuple(rest)}' if rest else ''})"
