"""What benchmarks share: options, times and their statistics, facts about the machine, results."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from xlstm_jax.config import ConfigError

MATRIX_SIZE = 2048
"""Rows and columns of the float32 matrices whose product gives the machine's rate."""

PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "numpy")
STEPS_IN_TURN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of every benchmark."""

    out: pathlib.Path | None = None  # where results go, as JSON; None: they are only printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedArguments(Arguments):
    """Options of every benchmark that takes times."""

    repeats: int = 30  # times of each kind

    def __post_init__(self):
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}; 30 is usual.")


def run(main: Callable[[Any], int], arguments: type[Arguments], description: str | None) -> None:
    """Runs a benchmark with the options of the command line; exits with 2 if one is invalid."""
    try:
        sys.exit(main(tyro.cli(arguments, description=description)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write(path: pathlib.Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, with_header=True) -> str:
    """Rows of cells in Markdown."""
    lines = [header, ["---"] * len(header), *rows] if with_header else rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def in_turns(
    sides: Mapping[str, Callable[[int], list[float]]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side, a few at a time: a busy moment hits all sides.

    Args:
        sides: by name, what takes a number of times.
        repeats: times of each.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for done in range(0, repeats, STEPS_IN_TURN):
        for name, take in sides.items():
            times[name] += take(min(STEPS_IN_TURN, repeats - done))
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum: single times of a shared machine mean little."""
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


def product_rate(times: Sequence[float]) -> float:
    """FLOP/s of the fastest of several products of size `MATRIX_SIZE`."""
    return 2 * MATRIX_SIZE**3 / min(times)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a compiled program needs besides its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None  # XLA for CPUs always has one
    return analysis.temp_size_in_bytes


def peak_bytes() -> int | None:
    """Peak memory of the first device so far; None where the allocator does not count it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    return {
        "processor": _first_of("/proc/cpuinfo", "model name") or platform.machine(),
        "family": _first_of("/proc/cpuinfo", "cpu family"),
        "cores": os.cpu_count(),
        "memory": _first_of("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "c_library": " ".join(platform.libc_ver()),
        "devices": [device.device_kind for device in jax.devices()],
    }


@functools.cache
def driver() -> dict[str, str]:
    """What the driver reports of the first GPU: its version and clocks; empty without one."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, map(str.strip, found.splitlines()[0].split(",")), strict=True))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python, and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def about(benchmark: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What a result begins with: which benchmark, when, on what, with which versions."""
    facts = {"machine": machine(), "versions": versions(packages)}
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
