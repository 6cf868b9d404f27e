"""Selection of an op's implementation: a named one runs or raises; only "auto" falls through."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call, known at trace time; the selection depends on nothing else."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: jnp.dtype
    platform: str  # "cpu", "gpu" or "tpu"
    chunk_size: int | None = None
    named: bool = False  # the caller requested the implementation by name


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an op; `unsupported` gives the reason against a call, or None."""

    fn: Callable[..., tuple[jax.Array, Any]]
    unsupported: Callable[[Call], str | None] = lambda call: None


def choose(op: str, table: Mapping[str, Implementation], name: str, call: Call) -> Implementation:
    """The named implementation, or for "auto" the first of the table that supports `call`.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: no requested implementation supports the call; gives each reason.
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
    raise NotImplementedError(
        f"no requested implementation of {op} supports {call}: " + "; ".join(refusals) + "."
    )


def refusals(table: Mapping[str, Implementation], call: Call) -> dict[str, str | None]:
    """For every implementation of a table, None or the reason why it does not support `call`."""
    return {name: entry.unsupported(call) for name, entry in table.items()}


def kernel_refusal(backend: str, call: Call) -> str | None:
    """Why no kernel of the backend ("tpu" or "triton") supports the call, whatever its sizes.

    None: kernels may support it, and the sizes decide.
    """
    from pallas_kernels import common, gpu

    platform = "tpu" if backend == "tpu" else "gpu"
    # Interpreted kernels run on any platform, but slowly: only for a caller who names them.
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
    """The platform of the computation that is being traced: "cpu", "gpu" or "tpu".

    It is that of the ahead-of-time target, else of `jax.default_device`, else the default backend.
    Where inputs are committed is unknown at trace time.
    """
    from pallas_kernels import common, hardware

    if common.target() is not None:
        return "gpu" if common.target() in hardware.ARCHITECTURES else "tpu"
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
