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
    devices: tuple[Any, ...]  # as the compiler knows them; none where it cannot be asked
    num_devices: int
    num_chips: int
    near: int  # devices joined by the fast network
    refusal: str = ""  # why the compiler cannot be asked

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Within, functions are traced with the kernels of this chip."""
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
    if slices < 1 or (slices > 1 and kind in GPUS):
        raise ConfigError(
            f"slices={slices} must be 1, or more of a TPU; GPUs are hosts x GPUs: {kind}:32x8."
        )
    if kind in TPUS and len(sizes) in (2, 3):
        return _tpus(kind, sizes, slices)
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


def _tpus(kind: str, sizes: tuple[int, ...], slices: int) -> Target:
    shape = "x".join(map(str, sizes))
    start_libtpu()
    description: dict[str, Any] = {"topology_name": f"{_TPU_NAMES.get(kind, kind)}:{shape}"}
    if slices > 1:
        description["num_slices"] = slices
    devices, refusal = _described("libtpu", "tpu", **description)
    chip, each = _per_device(TPUS[kind]), math.prod(sizes)
    name = f"{kind}:{shape}" + (f" in {slices} slices" if slices > 1 else "")
    near, chips = each * TPUS[kind].parts, each * slices
    return Target(name, chip, devices, near * slices, chips, near, refusal)


def _gpus(kind: str, sizes: tuple[int, ...]) -> Target:
    hosts, each = sizes
    description = gpus.target_config(GPUS[kind].device)
    devices, refusal = _described(
        "JAX's CUDA plugin", "cuda", target_config=description, topology=f"1x{hosts}x{each}"
    )
    count = hosts * each
    return Target(f"{kind}:{hosts}x{each}", GPUS[kind], devices, count, count, each, refusal)


@functools.cache
def _described(package: str, platform: str, **description: Any) -> tuple[tuple[Any, ...], str]:
    """The devices, or why there are none."""
    try:
        return tuple(topologies.get_topology_desc(platform=platform, **description).devices), ""
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        return (), (
            f"it cannot be compiled for here ({reason}); that needs {package}, which "
            "pip install 'xlstm-jax[compile]' brings, and a shape that there is"
        )


def _per_device(chip: Chip) -> Chip:
    names = ("flops", "memory_rate", "near_rate", "far_rate")
    rates = {name: getattr(chip, name) / chip.parts for name in names}
    return chip._replace(memory=chip.memory // chip.parts, **rates)
