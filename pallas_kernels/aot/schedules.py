"""Compiling for TPUs that are not here, and reading the schedule of every kernel off the compiler.

Needs libtpu (`pip install xlstm-jax[tpu]`), no TPU. A kernel's scheduled bundles are the cycles of
one step of its grid, before any waiting for memory: a lower bound, good for comparison. Where a
kernel holds an inner loop, its body is counted once.
"""

import atexit
import datetime
import functools
import glob
import importlib.metadata
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import common
from xlstm_jax.plan import topology
from xlstm_jax.sharding import MESH_AXES

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "v7x:2x2x1",
}


KERNEL = r"(?:mlstm|slstm)_(?:forward|backward|decode)"


class Schedule(NamedTuple):
    """One kernel as the compiler has laid it out."""

    bundles: int
    spills: int  # vectors stored for lack of registers
    matrix_share: float  # of the slots of the matrix units, how many are taken
    vector_share: float  # the same of the arithmetic slots


def start(*, schedules: bool = False) -> None:
    """Prepare libtpu, before its first use in a process.

    Args:
        schedules: have it write down how it lays out everything it compiles; takes several times
            as long.
    """
    topology.start_libtpu()
    if schedules:
        options = f"--xla_jf_dump_to={_folder()} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = options


@functools.cache
def _folder() -> str:
    """Where libtpu writes its schedules."""
    folder = tempfile.mkdtemp(prefix="tpu-schedules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def devices(name: str) -> tuple[Any, ...]:
    """Those of hardware such as "v5e:4x4" or, of one host, "h100:1x8".

    Raises:
        RuntimeError: there is no compiler for it here.
    """
    target = topology.find_target(name)
    if target.refusal:
        raise RuntimeError(f"{name}: {target.refusal}")
    return target.devices


def mesh_of(chips: Sequence[Any], fsdp: int = 1, tensor: int = 1) -> Mesh:
    """These devices in their order along the axes of a mesh; data takes what the others leave."""
    sizes = (len(chips) // (fsdp * tensor), fsdp, 1, tensor)
    return Mesh(
        np.asarray(chips).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def compile_for(
    chip: str, fn, *args, mesh: Mesh | None = None, shardings=None, donate: int | None = None
) -> jax.stages.Compiled:
    """`fn` compiled for arguments of these shapes, for one chip or for a mesh of its topology.

    Args:
        chip: a key of `TOPOLOGIES`.
        fn: a pure function.
        args: trees of `jax.ShapeDtypeStruct`.
        mesh: of the chip's devices, of `mesh_of`; None: the first of them alone.
        shardings: for a mesh, a sharding for every array, in a tree like `args`.
        donate: the number of an argument whose memory the results may take.
    """
    if mesh is None:
        mesh = mesh_of(devices(TOPOLOGIES[chip])[:1])
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
    args = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, shardings
    )
    return compile_placed(chip, fn, *args, mesh=mesh, donate=donate)


def compile_placed(
    chip: str, fn, *args, mesh: Mesh, donate: int | None = None
) -> jax.stages.Compiled:
    """As `compile_for`, of shapes that say where they lie."""
    with common.compiled_for(chip), jax.set_mesh(mesh):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def kernels(compiled: jax.stages.Compiled) -> set[str]:
    """The names of our kernels in a program."""
    return {name for line in _calls(compiled) for name in re.findall(KERNEL, line)}


def bytes_accessed(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What each of our kernels reads and writes: its operands and results, each once."""
    found = {}
    for text in _calls(compiled):
        name = re.search(KERNEL, text)
        results, _, rest = text.partition(" custom-call(")
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest, re.DOTALL)
        if name and operands:
            found[name[0]] = _array_bytes(results) + _array_bytes(operands[1])
    return found


def _array_bytes(text: str) -> int:
    """The size of all arrays that a piece of a program's text names, such as `bf16[8,128]`."""
    item = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
    arrays = re.findall(rf"\b({'|'.join(item)})\[([\d,]+)\]", text)
    return sum(item[kind] * math.prod(map(int, sizes.split(","))) for kind, sizes in arrays)


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """A result as JSON, with the versions and the date it belongs to."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    result = {"date": f"{datetime.date.today()}", "versions": versions, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _calls(compiled: jax.stages.Compiled) -> list[str]:
    """The instructions that call kernels; one with metadata takes several lines."""
    instruction = r"^\s*(?:ROOT )?%\S+ = "
    found = re.split(f"(?={instruction})", str(compiled.as_text()), flags=re.MULTILINE)
    return [text for text in found if '"tpu_custom_call"' in text]


def schedules() -> dict[str, Schedule]:
    """Those of our kernels compiled since this was last asked, by name."""
    found = {}
    for path in glob.glob(f"{_folder()}/*schedule-analysis_final_bundles.txt"):
        stem = re.sub(r"-\d+-schedule-analysis_final_bundles\.txt$", "", path)
        match = re.search(r"total scheduled bundles: *(\d+)", _read(path))
        kernel = re.search(KERNEL, os.path.basename(stem))
        utilisation = glob.glob(f"{glob.escape(stem)}-*per-bundle-utilization.txt")
        if match and kernel and utilisation:
            found[kernel[0]] = _schedule(int(match[1]), _read(utilisation[0]))
    for path in glob.glob(f"{_folder()}/*"):
        os.remove(path)
    return found


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
