"""Instructions of an assembled kernel, loop by loop: what its matrix units and schedulers do.

A count of instructions is not a time: loads, and waits for them, are not in it.
"""

import importlib
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16")


class Loop(NamedTuple):
    """A loop, or all code outside of loops: its own instructions, without those of inner loops."""

    depth: int  # 0: outside of loops
    instructions: int  # of one iteration of one warp
    product_cycles: float  # of one iteration of one warp group


def disassemble(cubin: bytes) -> str:
    """The instructions of the single function in `cubin`, by the disassembler in Triton's wheel."""
    triton = importlib.import_module("triton")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(text: str) -> list[Loop]:
    """The code outside of loops, then every loop in the order of its start.

    A loop is what lies between a label and the last branch back to it. Loops without any other
    branch target that only wait for a barrier count as instructions of their surroundings.
    """
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA `\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            ends[labels[branch[1]]] = i
    spans = sorted((start, end) for start, end in ends.items() if _computes(lines[start:end]))
    result = [Loop(0, 0, 0.0)]
    result += [
        Loop(1 + sum(a < start and end < b for a, b in spans), 0, 0.0) for start, end in spans
    ]
    for i, line in enumerate(lines):
        if match := _INSTRUCTION.match(line):
            inside = [n for n, (start, end) in enumerate(spans, 1) if start <= i <= end]
            n = max(inside, key=lambda n: result[n].depth, default=0)
            loop = result[n]
            result[n] = loop._replace(
                instructions=loop.instructions + 1,
                product_cycles=loop.product_cycles + _cycles(match[1], match[2]),
            )
    return result


def _computes(lines: list[str]) -> bool:
    """Whether a loop does more than to wait."""
    return sum(_INSTRUCTION.match(line) is not None for line in lines) > 16


def _cycles(name: str, operands: str) -> float:
    """Cycles of the matrix units for a product 64 x N x 16 of bfloat16, on Hopper.

    2,048 products and sums per cycle; an operand in shared memory, 64 x 16, is read at 128 bytes
    per cycle beside the other one.
    """
    match = _PRODUCT.match(name)
    if match is None:
        return 0.0
    N = int(match[1])
    left = operands.split(",")[1].strip()
    return N / 2 if left.startswith("R") else max(N / 2, 16 + N / 4)
