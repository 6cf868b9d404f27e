"""Topologies of TPU slices and GPU hosts, for ahead-of-time compilation.

libtpu reads its environment variables while it loads, at the first topology of a process. They are
set for that time only: afterwards `os.environ` is unchanged.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.hardware import GPUS, Gpu

_LIBTPU_NAMES = {"v7x": "tpu7x"}  # where libtpu uses another name

_WITHOUT_A_TPU = {
    # No metadata server to query, and no device to lock.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def libtpu_environment(**variables: str) -> Iterator[None]:
    """Temporarily sets `variables` and what libtpu needs on a machine without a TPU."""
    previous = {name: os.environ.get(name) for name in (*_WITHOUT_A_TPU, *variables)}
    os.environ |= _WITHOUT_A_TPU | variables
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def tpu_slices(chip: str, shape: tuple[int, ...], slices: int = 1) -> tuple[Any, ...]:
    """The devices of TPU slices, as described by libtpu.

    Args:
        chip: a key of `hardware.TPUS`.
        shape: chips along the axes of a slice.
        slices: number of slices, connected by the data-center network.

    Raises:
        RuntimeError: libtpu is not installed, or it does not support this shape.
    """
    name = f"{_LIBTPU_NAMES.get(chip, chip)}:{'x'.join(map(str, shape))}"
    multislice = {"num_slices": slices} if slices > 1 else {}
    with libtpu_environment():
        return _describe("libtpu", "tpu", topology_name=name, **multislice)


def gpu_hosts(name: str, hosts: int, gpus: int) -> tuple[Any, ...]:
    """The devices of `hosts` with `gpus` each, as described by XLA.

    Args:
        name: a key of `hardware.GPUS`.

    Raises:
        RuntimeError: JAX's CUDA plugin is not installed.
    """
    target = target_config(name)
    return _describe(
        "JAX's CUDA plugin (without a GPU, under JAX_PLATFORMS=cpu)",
        "cuda",
        target_config=target,
        topology=f"1x{hosts}x{gpus}",
    )


@functools.cache
def _describe(package: str, platform: str, **description: Any) -> tuple[Any, ...]:
    try:
        return tuple(topologies.get_topology_desc(platform=platform, **description).devices)
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise RuntimeError(
            f"cannot compile for this topology ({reason}); it must be a supported shape, and "
            f"{package} must be installed: pip install 'xlstm-jax[compile]'"
        ) from error


def target_config(name: str) -> str:
    """XLA's target configuration of a GPU, in protobuf text format."""
    gpu: Gpu = GPUS[name]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.shared_kib << 10,
        "shared_memory_per_block_optin": gpu.shared_bytes,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.float32_lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(gpu.hbm_bandwidth),
        "l2_cache_size": gpu.l2_mib << 20,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.hbm_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    info = " ".join(f"{key}: {value}" for key, value in fields.items())
    major, minor = divmod(gpu.capability, 10)
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        "runtime_version { major: 12 minor: 8 patch: 0 } "
        f'device_description_str: "NVIDIA {name}"'
    )
