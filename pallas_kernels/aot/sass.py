"""Instructions of an assembled kernel, loop by loop: what its matrix units and schedulers do.

Instruction counts are not times: they exclude loads and waits for them.
"""

import importlib
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_LEAVES = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(BRA\S* `|EXIT|RET)")
"""A jump or an exit without a condition."""

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

    Loops that only wait for a barrier count as instructions of the surrounding code.
    """
    blocks = _blocks(text)
    bodies = _natural_loops([block.successors for block in blocks])
    bodies = [body for body in bodies if sum(len(blocks[b].instructions) for b in body) > 16]
    result = [Loop(0, 0, 0.0), *(Loop(sum(x <= y for y in bodies), 0, 0.0) for x in bodies)]
    for number, block in enumerate(blocks):
        inside = [n for n, body in enumerate(bodies, 1) if number in body]
        n = max(inside, key=lambda n: result[n].depth, default=0)
        result[n] = result[n]._replace(
            instructions=result[n].instructions + len(block.instructions),
            product_cycles=result[n].product_cycles
            + sum(_cycles(name, operands) for name, operands in block.instructions),
        )
    return result


class _Block(NamedTuple):
    """Instructions that run one after the other."""

    instructions: list[tuple[str, str]]  # name and operands
    successors: list[int]


def _blocks(text: str) -> list[_Block]:
    """The basic blocks in the order of the text, of which the first is the start."""
    pieces: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in text.splitlines():
        if label := _LABEL.match(line):
            pieces.append((label[1], []))
        elif _INSTRUCTION.match(line):
            pieces[-1][1].append(line)
            if re.search(r"\b(BRA|EXIT|RET)\b", line):
                pieces.append((None, []))
    numbers = {label: n for n, (label, _) in enumerate(pieces) if label is not None}
    blocks = []
    for number, (_, lines) in enumerate(pieces):
        targets = re.findall(r"\bBRA\S*\s.*`\((\.L_\w+)\)", lines[-1]) if lines else []
        successors = [numbers[target] for target in targets if target in numbers]
        ends = bool(lines) and _LEAVES.match(lines[-1]) is not None
        if not ends and number + 1 < len(pieces):
            successors.append(number + 1)
        matches = filter(None, map(_INSTRUCTION.match, lines))
        blocks.append(_Block([(match[1], match[2]) for match in matches], successors))
    return blocks


def _natural_loops(successors: list[list[int]]) -> list[set[int]]:
    """The bodies of the loops of a flow graph: one for each block that is jumped back to."""
    everything = set(range(len(successors)))
    before: list[set[int]] = [set() for _ in successors]
    reached, queue = {0}, [0]
    while queue:
        source = queue.pop()
        for target in successors[source]:
            before[target].add(source)
            if target not in reached:
                reached.add(target)
                queue.append(target)
    # Blocks on every path from the start to a block.
    dominators = [{0}, *(set(everything) for _ in successors[1:])]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            paths = [dominators[source] for source in before[block]]
            new = {block} | (set.intersection(*paths) if paths else set())
            changed |= new != dominators[block]
            dominators[block] = new
    bodies: dict[int, set[int]] = {}
    for source, targets in enumerate(successors):
        for header in set(targets) & dominators[source]:
            body, queue = bodies.setdefault(header, {header}), [source]
            while queue:
                block = queue.pop()
                if block not in body:
                    body.add(block)
                    queue += before[block]
    return [bodies[header] for header in sorted(bodies)]


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
