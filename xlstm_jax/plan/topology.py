"""Hardware by a name such as "v5e:16x16" or "h100:32x8", described to its compiler."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels import common
from pallas_kernels.aot import topologies
from pallas_kernels.hardware import GPUS, TPUS, Gpu, Tpu, per_device
from xlstm_jax.config import ConfigError

CLUSTERS = {name.lower(): name for name, gpu in GPUS.items() if gpu.intra_bandwidth}
"""Kinds of GPUs with the network of a reference system, to their keys in `GPUS`."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for ahead of time."""

    name: str
    chip: Tpu | Gpu  # per device of JAX: half a chip where a chip is two of these
    devices: tuple[Any, ...]  # as the compiler describes them; empty without a compiler
    num_devices: int
    num_chips: int
    intra_size: int  # devices of a slice or host, joined by the fast network
    refusal: str = ""  # why there is no compiler

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Functions traced inside use the kernels of this chip."""
        with common.compiled_for(self.chip.target):
            yield


def find_target(name: str, slices: int = 1) -> Target:
    """The hardware of a name: for TPUs VERSION:AxB or AxBxC, for GPUs KIND:HOSTSxGPUS.

    Args:
        slices: how many such TPUs the network of a data centre joins.

    Raises:
        ConfigError: the name cannot be read, or there are slices of GPUs.
    """
    kind, _, shape = name.partition(":")
    sizes = tuple(int(size) for size in shape.split("x")) if _is_shape(shape) else ()
    if slices < 1 or (slices > 1 and kind in CLUSTERS):
        raise ConfigError(
            f"slices={slices} must be 1, or more of a TPU; GPUs are hosts x GPUs: {kind}:32x8."
        )
    if kind in TPUS and len(sizes) in (2, 3):
        return _tpus(kind, sizes, slices)
    if kind in CLUSTERS and len(sizes) == 2:
        return _gpus(kind, sizes)
    raise ConfigError(
        f"topology={name!r} must be a kind of chip and a shape, such as v5e:16x16 or v5p:8x8x4 "
        f"({', '.join(TPUS)}), or h100:32x8 for 32 hosts of 8 ({', '.join(CLUSTERS)})."
    )


def _is_shape(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text) is not None


def _tpus(kind: str, shape: tuple[int, ...], slices: int) -> Target:
    devices, refusal = _described(topologies.tpu_slices, kind, shape, slices)
    name = f"{kind}:{'x'.join(map(str, shape))}" + (f" in {slices} slices" if slices > 1 else "")
    chips = math.prod(shape)
    intra_size = chips * TPUS[kind].devices
    chip = per_device(TPUS[kind])
    return Target(name, chip, devices, intra_size * slices, chips * slices, intra_size, refusal)


def _gpus(kind: str, sizes: tuple[int, ...]) -> Target:
    hosts, each = sizes
    devices, refusal = _described(topologies.gpu_hosts, CLUSTERS[kind], hosts, each)
    count, gpu = hosts * each, GPUS[CLUSTERS[kind]]
    return Target(f"{kind}:{hosts}x{each}", gpu, devices, count, count, each, refusal)


def _described(describe: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[tuple, str]:
    """The devices, or why there are none."""
    try:
        return describe(*args), ""
    except RuntimeError as error:
        return (), str(error)
