"""Hardware by a name such as "v5e:16x16" or "h100:32x8", described to the compiler without it."""

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import common
from xlstm_jax.config import ConfigError
from xlstm_jax.plan import gpus
from xlstm_jax.plan.chips import GPUS, TPUS, Chip

_TPU_NAMES = {"v7x": "tpu7x"}  # where libtpu's name is another


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips that need not be here."""

    name: str
    chip: Chip  # per device of JAX: half a chip where a chip is two of these
    devices: tuple[Any, ...]
    num_chips: int
    near: int  # devices joined by the fast network

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Within, functions are traced with the kernels of this chip."""
        with common.compiled_for(self.chip.target):
            yield


def find_target(name: str) -> Target:
    """The hardware of a name: for TPUs VERSION:AxB or AxBxC, for GPUs KIND:HOSTSxGPUS.

    Raises:
        ConfigError: the name cannot be read, or its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    sizes = tuple(int(size) for size in shape.split("x")) if _is_shape(shape) else ()
    if kind in TPUS and len(sizes) in (2, 3):
        return _tpus(kind, sizes)
    if kind in GPUS and len(sizes) == 2:
        return _gpus(kind, sizes)
    raise ConfigError(
        f"topology={name!r} must be a kind of chip and a shape, such as v5e:16x16 or v5p:8x8x4 "
        f"({', '.join(TPUS)}), or h100:32x8 for 32 hosts of 8 ({', '.join(GPUS)})."
    )


def _is_shape(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text) is not None


def start_libtpu() -> None:
    """Prepares libtpu for a machine without a TPU, before its first use in a process."""
    os.environ |= {
        # Without a TPU there is nobody to ask and nothing to lock.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _tpus(kind: str, sizes: tuple[int, ...]) -> Target:
    shape = "x".join(map(str, sizes))
    start_libtpu()
    name = f"{_TPU_NAMES.get(kind, kind)}:{shape}"
    devices = _described(f"{kind}:{shape}", "libtpu", platform="tpu", topology_name=name)
    count = math.prod(sizes)
    chip = _per_device(TPUS[kind], len(devices) // count)
    return Target(f"{kind}:{shape}", chip, devices, count, near=len(devices))


def _gpus(kind: str, sizes: tuple[int, ...]) -> Target:
    hosts, each = sizes
    devices = _described(
        f"{kind}:{hosts}x{each}",
        "JAX's CUDA plugin",
        platform="cuda",
        target_config=gpus.target_config(GPUS[kind].device),
        topology=f"1x{hosts}x{each}",
    )
    return Target(f"{kind}:{hosts}x{each}", GPUS[kind], devices, hosts * each, near=each)


@functools.cache
def _described(name: str, package: str, **description: str) -> tuple[Any, ...]:
    try:
        return tuple(topologies.get_topology_desc(**description).devices)
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"topology={name!r} cannot be compiled for here ({reason}); it needs {package}, which "
            "pip install 'xlstm-jax[compile]' brings, and a shape that there is."
        ) from error


def _per_device(chip: Chip, parts: int) -> Chip:
    """A chip that is several devices, by the device."""
    if parts <= 1:
        return chip
    names = ("flops", "memory_rate", "near_rate", "far_rate")
    rates = {name: getattr(chip, name) / parts for name in names}
    return chip._replace(memory=chip.memory // parts, **rates)
