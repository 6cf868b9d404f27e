"""Registers, spills, shared memory and PTX of Mosaic GPU kernels, as reported by ptxas.

Mosaic writes them to a folder while XLA compiles for a described GPU.
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pallas_kernels.aot import compiler

_FOLDER = "MOSAIC_GPU_DUMP_TO"
"""Environment variable with the folder that Mosaic writes to."""


class Resources(NamedTuple):
    """Resource usage of one assembled kernel."""

    name: str  # of the call
    registers: int  # per thread at the start; warp groups then exchange some
    spills: int  # bytes of register spills per thread
    shared_bytes: int  # shared memory of a program, without barriers
    ptx: str


def resources(chip: str, fn: Callable[..., Any], *args: Any) -> list[Resources]:
    """Resources of every distinct Mosaic GPU kernel of `fn` on `chip`, sorted by name.

    Args:
        chip: a key of `hardware.ARCHITECTURES`.
        fn: a pure function; a gradient function includes its forward pass.
        args: trees of `jax.ShapeDtypeStruct`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _dumping_to(folder):
            compiler.compile_for(chip, fn, *args)
        found = [_read(path) for path in pathlib.Path(folder).glob("*.ptx")]
    return sorted(found)


def unawaited_products(ptx: str) -> list[str]:
    """Instructions that use, or release, what a product of warp groups may still read or write.

    The interpreter computes products at once, so that a missing wait does not show there.
    """
    found, is_pending = [], False
    for line in ptx.splitlines():
        if "wgmma.mma_async" in line:
            is_pending = True
        elif re.search(r"wgmma\.wait_group\.sync\.aligned\s+0", line):
            is_pending = False
        elif is_pending and re.search(r"mbarrier\.arrive|st\.shared|cp\.async\.bulk", line):
            found.append(line.strip())
    return found


@contextlib.contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[_FOLDER]
        if before is not None:
            os.environ[_FOLDER] = before


def _read(ptx: pathlib.Path) -> Resources:
    name = re.sub(r"_\d+$", "", ptx.stem)
    usage = ptx.with_suffix(".ptxas").read_text()
    registers = re.search(r"Used (\d+) registers", usage)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    # Another part of the compiler writes these, with other numbers.
    (shared,) = {
        match[1]
        for path in ptx.parent.glob(f"{name}_*.resources.txt")
        if (match := re.search(r"smem_scratch_bytes=(\d+)", path.read_text()))
    }
    assert registers is not None and spills
    return Resources(
        name=name,
        registers=int(registers[1]),
        spills=max(int(count) for pair in spills for count in pair),
        shared_bytes=int(shared),
        ptx=ptx.read_text(),
    )
