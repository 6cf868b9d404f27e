"""Reads the schedules of the TPU kernels that libtpu compiles.

The scheduled bundles of a kernel are the cycles of one grid step without memory stalls: a lower
bound, useful for comparisons. The body of an inner loop is counted once.
"""

import atexit
import functools
import glob
import pathlib
import re
import shutil
import tempfile
from typing import NamedTuple

from pallas_kernels.aot import topologies
from pallas_kernels.aot.compiler import KERNEL


class Schedule(NamedTuple):
    """Schedule of one kernel."""

    bundles: int
    spills: int  # stores of spilled vector registers
    matrix_share: float  # utilization of the MXU slots, 0 to 1
    vector_share: float  # utilization of the vector ALU slots, 0 to 1


def start() -> None:
    """Makes libtpu dump the schedule of every kernel; call before its first use in a process.

    Compilation then takes several times as long.
    """
    options = f"--xla_jf_dump_to={_folder()} --xla_jf_dump_llo_text=true"
    with topologies.libtpu_environment(LIBTPU_INIT_ARGS=options):
        topologies.tpu_slices("v5e", (2, 2))


@functools.cache
def _folder() -> str:
    """The temporary directory that libtpu dumps schedules to."""
    folder = tempfile.mkdtemp(prefix="tpu-schedules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read() -> dict[str, Schedule]:
    """Schedules of our kernels compiled since the last call, by name; deletes the dumps."""
    schedules = {}
    folder = pathlib.Path(_folder())
    for path in folder.glob("*schedule-analysis_final_bundles.txt"):
        stem = re.sub(r"-\d+-schedule-analysis_final_bundles\.txt$", "", path.name)
        match = re.search(r"total scheduled bundles: *(\d+)", path.read_text(encoding="utf-8"))
        kernel = re.search(KERNEL, stem)
        tables = list(folder.glob(f"{glob.escape(stem)}-*per-bundle-utilization.txt"))
        if match and kernel and tables:
            schedules[kernel[0]] = _schedule(int(match[1]), tables[0].read_text(encoding="utf-8"))
    for path in folder.iterdir():
        path.unlink()
    return schedules


def _schedule(bundles: int, table: str) -> Schedule:
    """Parses libtpu's utilization table: slot names, their capacities, then one line per bundle."""
    lines = table.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    slots = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    used = dict(zip(names, map(sum, zip(*slots, strict=True)), strict=True))
    share = lambda slot: used[slot] / capacity[slot] / len(slots)  # noqa: E731
    return Schedule(bundles, used["VSTORE:SPILL"], share("MXU"), share("VALU"))
