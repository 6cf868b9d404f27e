"""Choosing how an op is computed: a named way runs or raises, only "auto" falls through."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call while tracing: all that a choice may depend on."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: jnp.dtype
    platform: str  # "cpu", "gpu" or "tpu"
    chunk_size: int | None = None
    named: bool = False  # the implementation was asked for by its name


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op, and why it cannot serve a call (None: it can)."""

    fn: Callable[..., tuple[jax.Array, Any]]
    unsupported: Callable[[Call], str | None] = lambda call: None


def choose(op: str, table: Mapping[str, Implementation], name: str, call: Call) -> Implementation:
    """The named implementation, or for "auto" the first of the table that can serve `call`.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: none asked for can serve the call; says why, for each.
    """
    if name != "auto" and name not in table:
        known = ", ".join(table)
        raise ValueError(
            f"implementation={name!r} of {op} is not known; use 'auto' or one of: {known}."
        )
    call = dataclasses.replace(call, named=name != "auto")
    refusals = []
    for candidate in table if name == "auto" else (name,):
        reason = table[candidate].unsupported(call)
        if reason is None:
            return table[candidate]
        refusals.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"{op} cannot serve {call}: " + "; ".join(refusals) + ".")


def refusals(table: Mapping[str, Implementation], call: Call) -> dict[str, str | None]:
    """For every implementation of a table, None or the sentence why it cannot serve `call`."""
    return {name: entry.unsupported(call) for name, entry in table.items()}


def refuses_kernel(backend: str, call: Call) -> str | None:
    """Why no kernel of the backend, "tpu" or "triton", supports a call of any size, or None."""
    from pallas_kernels import common, gpu

    platform = "tpu" if backend == "tpu" else "gpu"
    is_interpreted = call.named and common.interpreter()
    if call.platform != platform and not is_interpreted:
        return f"it runs on a {platform.upper()}, not on {call.platform!r}"
    dtype_refusal = common.refused_dtype(call.dtype)
    if backend == "tpu":
        return dtype_refusal
    if is_interpreted:
        return gpu.interpreter_refusal() or dtype_refusal
    return dtype_refusal or gpu.refusal()


def platform() -> str:
    """The platform a computation traced now will run on: that of `jax.default_device`, where set.

    That inputs were put elsewhere is not known while tracing.
    """
    from pallas_kernels import common, hardware

    if common.target() is not None:
        return "gpu" if common.target() in hardware.ARCHITECTURES else "tpu"
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
