"""Times, their statistics, and what has to be known about the machine they were taken on."""

import datetime
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MATRIX_SIZE = 2048
"""Rows and columns of the float32 matrices whose product gives the machine's rate."""


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """How long each of `repeats` calls takes until its result is there."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and extremes: single times of a shared machine mean little."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {
        "median_seconds": float(median),
        "quartiles_seconds": [float(low), float(high)],
        "fastest_seconds": float(np.min(times)),
        "repeats": len(times),
    }


def matrix_product(size: int) -> Callable[[], jax.Array]:
    """A compiled product of two float32 matrices, ready to be timed: 2 * size^3 FLOPs."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    product = jax.jit(jnp.dot).lower(a, b).compile()
    jax.block_until_ready(product(a, b))
    return lambda: product(a, b)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a compiled program needs besides its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None  # XLA for CPUs always has one
    return analysis.temp_size_in_bytes


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    return {
        "processor": _first_of("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory": _first_of("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "c_library": " ".join(platform.libc_ver()),
        "devices": [device.device_kind for device in jax.devices()],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide how fast a step is."""
    packages = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def about(benchmark: str) -> dict[str, Any]:
    """What a result begins with: which benchmark, when, on what, with which versions."""
    facts = {"machine": machine(), "versions": versions()}
    return {"benchmark": benchmark, **settings(), **facts}


def settings() -> dict[str, str]:
    """When, and with which flags of XLA."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return {"date": now, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _first_of(path: str, name: str) -> str | None:
    """The value of the first line `name : value` of a file of the kernel's."""
    file = pathlib.Path(path)
    if not file.exists():
        return None
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)
