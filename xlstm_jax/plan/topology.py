"""Compilation targets by name, such as "v5e:16x16" or "h100:32x8"."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from pallas_kernels import common
from pallas_kernels.aot import topologies
from pallas_kernels.hardware import GPUS, TPUS, Gpu, Tpu, per_device
from xlstm_jax.config import ConfigError

CLUSTERS = {name.lower(): name for name, gpu in GPUS.items() if gpu.intra_bandwidth}
"""Name in a topology -> key in `GPUS`, for the GPUs whose network bandwidth is known."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for ahead of time; none of it needs to be attached."""

    name: str
    chip: Tpu | Gpu  # of one JAX device: half a chip where a chip has two devices
    devices: tuple[Any, ...]  # descriptions for the compiler; empty without one
    num_devices: int
    num_chips: int
    intra_size: int  # devices of a TPU slice or GPU host, which the fast network joins
    refusal: str = ""  # why the compiler is not available

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Context in which traced functions use the kernels of this chip."""
        return common.compiled_for(self.chip.target)


def find_target(name: str, slices: int = 1) -> Target:
    """The target of a name: VERSION:AxB or VERSION:AxBxC for TPUs, KIND:HOSTSxGPUS for GPUs.

    Args:
        slices: number of TPU slices of this topology, joined by the data-center network.

    Raises:
        ConfigError: the name or the number of slices is invalid.
    """
    kind, _, shape = name.partition(":")
    is_shape = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape)
    sizes = tuple(int(size) for size in shape.split("x")) if is_shape else ()
    if slices < 1:
        raise ConfigError(f"slices must be at least 1, got {slices}; leave it out for one slice.")
    if slices > 1 and kind in CLUSTERS:
        raise ConfigError(
            f"slices must be 1 for GPUs, got {slices}; give the hosts in the topology: {kind}:32x8."
        )
    if kind in TPUS and len(sizes) in (2, 3):
        return _tpus(kind, sizes, slices)
    if kind in CLUSTERS and len(sizes) == 2:
        return _gpus(kind, sizes)
    raise ConfigError(
        f"topology={name!r} must be a chip and a shape, such as v5e:16x16 or v5p:8x8x4 "
        f"({', '.join(TPUS)}), or h100:32x8 for 32 hosts of 8 ({', '.join(CLUSTERS)})."
    )


def _tpus(kind: str, shape: tuple[int, ...], slices: int) -> Target:
    devices, refusal = _describe(topologies.tpu_slices, kind, shape, slices)
    name = f"{kind}:{'x'.join(map(str, shape))}" + (f" in {slices} slices" if slices > 1 else "")
    chips = math.prod(shape)
    intra_size = chips * TPUS[kind].devices
    chip = per_device(TPUS[kind])
    return Target(name, chip, devices, intra_size * slices, chips * slices, intra_size, refusal)


def _gpus(kind: str, sizes: tuple[int, ...]) -> Target:
    hosts, gpus_per_host = sizes
    devices, refusal = _describe(topologies.gpu_hosts, CLUSTERS[kind], hosts, gpus_per_host)
    count, gpu = hosts * gpus_per_host, GPUS[CLUSTERS[kind]]
    name = f"{kind}:{hosts}x{gpus_per_host}"
    return Target(name, gpu, devices, count, count, gpus_per_host, refusal)


def _describe(describe: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[tuple, str]:
    """Device descriptions, or the reason why the compiler is not available."""
    try:
        return describe(*args), ""
    except RuntimeError as error:
        return (), str(error)
