"""Reading the schedule of every TPU kernel that libtpu compiles.

A kernel's scheduled bundles are the cycles of one step of its grid, before any waiting for memory:
a lower bound, good for comparison. The body of an inner loop is counted once.
"""

import atexit
import functools
import glob
import os
import re
import shutil
import tempfile
from typing import NamedTuple

from pallas_kernels.aot import topologies
from pallas_kernels.aot.compiler import KERNEL


class Schedule(NamedTuple):
    """One kernel as the compiler has laid it out."""

    bundles: int
    spills: int  # vector registers spilled
    matrix_share: float  # of the slots of the matrix units, how many are taken
    vector_share: float  # the same of the arithmetic slots


def start() -> None:
    """Have libtpu dump the schedule of everything it compiles; before its first use in a process.

    Compiling then takes several times as long.
    """
    options = f"--xla_jf_dump_to={_folder()} --xla_jf_dump_llo_text=true"
    with topologies.libtpu_environment(LIBTPU_INIT_ARGS=options):
        topologies.tpu_slices("v5e", (2, 2))


@functools.cache
def _folder() -> str:
    """Where libtpu writes its schedules."""
    folder = tempfile.mkdtemp(prefix="tpu-schedules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read() -> dict[str, Schedule]:
    """Those of our kernels compiled since the last call, by name; the dumps are removed."""
    schedules = {}
    for path in glob.glob(f"{_folder()}/*schedule-analysis_final_bundles.txt"):
        stem = re.sub(r"-\d+-schedule-analysis_final_bundles\.txt$", "", path)
        match = re.search(r"total scheduled bundles: *(\d+)", _read(path))
        kernel = re.search(KERNEL, os.path.basename(stem))
        utilization = glob.glob(f"{glob.escape(stem)}-*per-bundle-utilization.txt")
        if match and kernel and utilization:
            schedules[kernel[0]] = _schedule(int(match[1]), _read(utilization[0]))
    for path in glob.glob(f"{_folder()}/*"):
        os.remove(path)
    return schedules


def _schedule(bundles: int, table: str) -> Schedule:
    """From the compiler's table: a line of slot names, one of their capacities, one per bundle."""
    lines = table.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    used = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
    share = lambda slot: used[slot] / capacity[slot] / len(rows)  # noqa: E731
    return Schedule(bundles, used["VSTORE:SPILL"], share("MXU"), share("VALU"))


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
