"""Calls of Mosaic GPU kernels: on Hopper GPUs, or interpreted."""

import importlib
import importlib.metadata
from typing import Any

import jax

from pallas_kernels import common

CHIP = "sm_90"
"""The only target: warp group products (wgmma) exist on Hopper alone."""

MIN_JAX = (0, 12)
"""The first version whose interpreter runs warp group products, and thus our tests."""


def refusal() -> str | None:
    """Why Mosaic GPU kernels can neither run on the current device nor be interpreted, or None."""
    version = importlib.metadata.version("jax")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_JAX:
        return f"it needs jax {MIN_JAX[0]}.{MIN_JAX[1]} or newer, got {version}"
    if common.interpreter():
        return None
    if (target := common.target()) is not None:
        return None if target == CHIP else f"it needs a Hopper GPU ({CHIP}), not {target}"
    device = jax.devices()[0]
    if str(getattr(device, "compute_capability", None)) != "9.0":
        return f"it needs a Hopper GPU ({CHIP}), got {device.device_kind!r}"
    return None


def interpreter(interpret: Any) -> Any:
    """The argument `interpret` of `plgpu.kernel` for that of `common.interpreted`."""
    if not interpret:
        return None
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    if isinstance(interpret, plgpu.InterpretGPUParams):
        return interpret
    return plgpu.InterpretGPUParams()
