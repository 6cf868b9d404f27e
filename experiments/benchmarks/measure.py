"""Shared by all benchmarks: options, timing and statistics, machine and versions, result files."""

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
"""Size of the float32 matrices whose product gives the matrix-product rate of the machine."""

PACKAGES = ("xlstm-jax", "jax", "jaxlib", "flax", "optax", "numpy")
CALLS_PER_ROUND = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of every benchmark."""

    out: pathlib.Path | None = None  # JSON file of the result; None: print only


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedArguments(Arguments):
    """Options of every benchmark that measures time."""

    repeats: int = 30  # timed calls of each kind

    def __post_init__(self):
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}; 30 is usual.")


def run(main: Callable[[Any], int], arguments: type, description: str | None) -> None:
    """Runs a script with command-line options.

    Errors are one line: exit code 2 for an invalid option, 4 for a full disk and other errors of
    the machine.
    """
    try:
        sys.exit(main(tyro.cli(arguments, description=description)))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 4)


def write(path: pathlib.Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON; does nothing if `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")  # a full disk leaves an older result intact
    draft.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a result file; in older files their key is `rows`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["records"] if "records" in result else result["rows"]


def table(header: Sequence[str], body: Sequence[Sequence[str]], *, with_header=True) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body] if with_header else body
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())  # dispatch is asynchronous
        times.append(time.perf_counter() - start)
    return times


def interleaved(
    timers: Mapping[str, Callable[[int], list[float]]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls by each timer, alternating, so that other load affects all alike.

    Args:
        timers: by name, functions that time a number of calls, such as a partial of `seconds`.
        repeats: number of calls by each timer.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for done in range(0, repeats, CALLS_PER_ROUND):
        for name, timer in timers.items():
            times[name] += timer(min(CALLS_PER_ROUND, repeats - done))
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum; single times on a shared machine are too noisy."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {
        "median_seconds": float(median),
        "quartiles_seconds": [float(low), float(high)],
        "fastest_seconds": float(np.min(times)),
        "repeats": len(times),
    }


def matrix_product(size: int) -> Callable[[], jax.Array]:
    """A compiled product of two float32 matrices, to be timed: 2 * size^3 FLOPs."""
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
    assert analysis is not None  # XLA reports one on CPUs
    return analysis.temp_size_in_bytes


def peak_bytes() -> int | None:
    """Peak memory of the first device so far; None if its allocator does not report it."""
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
    """Name, driver version, clocks and power limit of the first GPU; empty without a GPU."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, map(str.strip, output.splitlines()[0].split(",")), strict=True))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the `packages` that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def run_info(benchmark: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Head of a result: name of the benchmark, date, XLA flags, machine and versions."""
    environment = {"machine": machine(), "versions": versions(packages)}
    return {"benchmark": benchmark, **date_and_flags(), **environment}


def date_and_flags() -> dict[str, str]:
    """Current date and time, and the value of XLA_FLAGS."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return {"date": now, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _first_of(path: str, name: str) -> str | None:
    """The value of the first line `name : value` of a file in /proc."""
    file = pathlib.Path(path)
    if not file.exists():
        return None
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)
