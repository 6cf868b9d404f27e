"""Selection of an op's implementation: a named one runs or raises; only "auto" falls through."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.ops import verdicts
from xlstm_jax.typing import Size


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call, known at trace time; the selection depends on nothing else."""

    B: Size
    T: Size
    H: int
    K: int
    V: int
    dtype: jnp.dtype
    platform: str  # "cpu", "gpu" or "tpu"
    chunk_size: int | None = None
    named: bool = False  # the caller requested the implementation by name
    check_vma: bool = False  # within a caller's `shard_map` that checks over which axes arrays vary
    uses: frozenset[str] = frozenset()  # optional arguments that affect the result, of some ops


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an op; `unsupported` returns why it cannot run a call, or None."""

    fn: Callable[..., tuple[jax.Array, Any]]
    unsupported: Callable[[Call], str | None] = lambda call: None
    zeros_as_none: bool = False  # `fn` takes None for the initial state, zeros, and makes no array


def choose(op: str, table: Mapping[str, Implementation], name: str, call: Call) -> Implementation:
    """The named implementation, or for "auto" the first in the table that supports `call`.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: no requested implementation supports the call; gives each reason.
    """
    if name != "auto" and name not in table:
        known = ", ".join(table)
        raise ArgumentError(
            f"implementation={name!r} of {op} is not known; use 'auto' or one of: {known}."
        )
    call = dataclasses.replace(call, named=name != "auto")
    refusals = []
    for candidate in table if name == "auto" else (name,):
        reason = table[candidate].unsupported(call)
        if reason is None and not call.named:
            reason = verdicts.refusal(op, candidate)
        if reason is None:
            return table[candidate]
        refusals.append(f"{candidate}: {reason}")
    raise UnsupportedError(
        f"no requested implementation of {op} supports {call}: " + "; ".join(refusals) + "."
    )


def refusals(table: Mapping[str, Implementation], call: Call) -> dict[str, str | None]:
    """For every implementation in a table, None or the reason why it does not support `call`."""
    return {name: entry.unsupported(call) for name, entry in table.items()}


def symbolic_refusal(call: Call, axes: str) -> str | None:
    """Why an implementation that needs these sizes ("BT") as numbers cannot run the call, or None.

    `jax.export` traces with symbolic sizes.
    """
    for axis in axes:
        if not isinstance(size := getattr(call, axis), int):
            names = {"B": "batch size", "T": "sequence length"}
            return f"{axis}={size} is symbolic; export one program per {names[axis]}"
    return None


def kernel_refusal(backend: str, call: Call) -> str | None:
    """Why the kernels of a backend, a function of `backends`, do not support the call, or None.

    Platform, dtype and environment are checked, sizes are not, unless they are symbolic.
    """
    from pallas_kernels import common, gpu, mosaic

    if (reason := symbolic_refusal(call, "BT")) is not None:
        return reason

    platform = "tpu" if backend == "tpu" else "gpu"
    # Interpreted kernels run on any platform, but slowly, so "auto" does not select them.
    is_interpreted = call.named and common.interpreter()
    if call.platform != platform and not is_interpreted:
        return f"it runs on a {platform.upper()}, not on {call.platform!r}"
    if call.check_vma:
        return "kernels do not declare how results vary; pass check_vma=False to `jax.shard_map`"
    dtype_refusal = common.dtype_refusal(call.dtype)
    if backend == "tpu":
        return dtype_refusal
    if backend == "mosaic_gpu":
        return dtype_refusal or mosaic.refusal()
    if is_interpreted:
        return gpu.interpreter_refusal() or dtype_refusal
    return dtype_refusal or gpu.refusal()


def platform() -> str:
    """The platform of the computation being traced: "cpu", "gpu" or "tpu".

    The ahead-of-time target takes precedence over `jax.default_device`, which takes precedence over
    the default backend. The devices of committed inputs are unknown at trace time.
    """
    from pallas_kernels import common, hardware

    if common.target() is not None:
        return "gpu" if common.target() in hardware.ARCHITECTURES else "tpu"
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
