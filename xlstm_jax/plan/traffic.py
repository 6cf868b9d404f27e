"""What one device of a compiled program reads and writes in its memory."""

import collections
from collections.abc import Iterator, Mapping

from xlstm_jax.plan.hlo import Instruction, Program, called_by, num_bytes, number_of

_RUNS_OTHERS = {"while", "conditional", "call", "async-start"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"}
_FREE |= {"partition-id", "replica-id", "optimization-barrier"} | _RUNS_OTHERS
"""Instructions that move nothing themselves."""


def memory_traffic(program: Program) -> int:
    """Bytes read and written in one run: operands and results of whatever is not fused with others,
    slices as far as they are read."""
    fused = set(_fused(program))
    total = 0
    for name, times in program.times.items():
        if name in fused:
            continue
        own = {instruction.name: instruction for instruction in program.computations[name]}
        total += times * sum(_moved(program, instruction, own) for instruction in own.values())
    return total


def _fused(program: Program) -> Iterator[str]:
    """Computations that are part of an instruction: nothing inside of them is in memory."""
    for instructions in program.computations.values():
        for instruction in instructions:
            if instruction.opcode not in _RUNS_OTHERS:
                yield from called_by(instruction)


def _moved(program: Program, instruction: Instruction, own: Mapping[str, Instruction]) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    read = [own[name].num_bytes if name in own else 0 for name in instruction.operands]
    if opcode in ("dynamic-slice", "gather"):
        return 2 * instruction.num_bytes
    if opcode == "dynamic-update-slice":
        return 2 * read[1]
    if opcode in ("all-gather-start", "collective-permute-start", "copy-start"):
        return instruction.num_bytes  # its result names what it reads as well
    if opcode == "slice-start":  # so does this one's, of which a part is read
        sides = (instruction.on_chip[0], instruction.on_chip[-2])
        return sides.count(False) * num_bytes(*instruction.shapes[-2])
    if opcode != "fusion":
        return sum(read) + instruction.num_bytes
    return _moved_by_fusion(program.computations[next(called_by(instruction))], read)


def _moved_by_fusion(inside: list[Instruction], read: list[int]) -> int:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in inside:
        for name in instruction.operands:
            users[name].append(instruction)
    by_name = {instruction.name: instruction for instruction in inside}
    parameters = {number_of(i): i for i in inside if i.opcode == "parameter"}
    total = 0
    for number, size in enumerate(read):
        total += min(size, _read_of(parameters[number], users, by_name))
    root = next(instruction for instruction in inside if instruction.is_root)
    for result in [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode in ("bitcast", "copy", "convert") and result.operands:
            result = by_name[result.operands[0]]
        is_update = result.opcode == "dynamic-update-slice"
        total += by_name[result.operands[1]].num_bytes if is_update else result.num_bytes
    return total


def _read_of(
    source: Instruction,
    users: Mapping[str, list[Instruction]],
    by_name: Mapping[str, Instruction],
) -> int:
    """Bytes that a fusion reads of one of its operands."""
    total = 0
    for user in users[source.name]:
        if user.opcode in ("bitcast", "reshape"):
            total += _read_of(user, users, by_name)
        elif user.operands[0] != source.name:
            return source.num_bytes
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice":
            total += by_name[user.operands[1]].num_bytes
        else:
            return source.num_bytes
    return total
