"""Registers, spills, shared memory and PTX of Mosaic GPU kernels, as reported by ptxas.

Mosaic writes them to a folder while XLA compiles for a described GPU.
"""

import contextlib
import importlib
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pallas_kernels import mosaic
from pallas_kernels.aot import compiler, sass

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
        violations = [_read(path) for path in pathlib.Path(folder).glob("*.ptx")]
    return sorted(violations)


def disassemble(kernel: Resources) -> str:
    """The instructions of a kernel, assembled by the newer ptxas of Triton's wheel."""
    triton = importlib.import_module("triton")
    ptxas = pathlib.Path(triton.knobs.nvidia.nvdisasm.path).parent / "ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        command = [str(ptxas), f"-arch={mosaic.CHIP}a", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return sass.disassemble(target.read_bytes())


def unawaited_products(ptx: str) -> list[str]:
    """Instructions that release or overwrite what a product of warp groups may still read.

    They follow a product, on some path through the kernel, without a wait between. The interpreter
    computes products at once, so that it does not notice a missing wait.
    """
    wait = r"wgmma\.wait_group\.sync\.aligned\s+0"
    return _find(
        ptx, "wgmma.mma_async", wait, r"mbarrier\.arrive|st\.shared|cp\.async\.bulk\.tensor"
    )


def unfenced_products(ptx: str) -> list[str]:
    """Products, and copies out of shared memory, of what threads have stored in it before.

    They follow a store, on some path through the kernel, without a fence between.
    """
    use = r"wgmma\.mma_async|cp\.async\.bulk\.tensor\S*\.global\.shared"
    return _find(ptx, _STORE, r"fence\.proxy\.async", use)


_STORE = r"st\.shared|stmatrix"


def _find(ptx: str, begin: str, end: str, use: str) -> list[str]:
    """The lines that match `use` after `begin` without an `end`, on some path through a kernel."""
    blocks = _blocks(ptx)
    is_pending = dict.fromkeys(blocks, False)  # at the start of a block, on some path
    violations: dict[str, None] = {}
    queue = list(blocks)
    while queue:
        name = queue.pop()
        pending, lines, targets = is_pending[name], *blocks[name]
        for line in lines:
            if pending and re.search(use, line):
                violations[line.strip()] = None
            if re.search(begin, line):
                pending = True
            elif re.search(end, line):
                pending = False
        for target in targets:
            if pending and not is_pending[target]:
                is_pending[target] = True
                queue.append(target)
    return list(violations)


def _blocks(ptx: str) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> lines and successors of the basic blocks of a kernel."""
    blocks: dict[str, tuple[list[str], list[str]]] = {"start": ([], [])}
    name, falls_through = "start", True
    for line in ptx.splitlines():
        if label := re.match(r"(\$L__BB\w+):", line):
            if falls_through:
                blocks[name][1].append(label[1])
            name, falls_through = label[1], True
            blocks[name] = ([], [])
        blocks[name][0].append(line)
        if branch := re.search(r"\bbra(\.uni)?\s+(\$L__BB\w+)", line):
            blocks[name][1].append(branch[2])
            falls_through = branch[1] is None
    return blocks


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
