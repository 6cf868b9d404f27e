"""Memory traffic: bytes that a device reads and writes while it runs a compiled program."""

import collections
from collections.abc import Iterator, Mapping

from xlstm_jax.plan.hlo import Instruction, Program, called_computations, integer_literal, num_bytes

_CONTROL_FLOW = {"while", "conditional", "call", "async-start"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"}
_FREE |= {"partition-id", "replica-id", "optimization-barrier"} | _CONTROL_FLOW
"""Opcodes that read and write no memory themselves."""


def memory_traffic(program: Program) -> int:
    """Bytes read and written in one execution: operands and results of all unfused instructions.

    Of an operand that is only sliced, the slice counts.
    """
    return sum(count * size for _, count, size in traffic_by_instruction(program))


def traffic_by_instruction(program: Program) -> Iterator[tuple[Instruction, int, int]]:
    """Each unfused instruction, how often it runs, and the bytes it reads and writes each time."""
    fused = set(_fused(program))
    for name, count in program.execution_counts.items():
        if name in fused:
            continue
        by_name = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in by_name.values():
            yield instruction, count, _instruction_bytes(program, instruction, by_name)


def _fused(program: Program) -> Iterator[str]:
    """Names of fused computations, whose intermediate values are not in memory."""
    for instructions in program.computations.values():
        for instruction in instructions:
            if instruction.opcode not in _CONTROL_FLOW:
                yield from called_computations(instruction)


def _instruction_bytes(
    program: Program, instruction: Instruction, by_name: Mapping[str, Instruction]
) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    read = [by_name[name].num_bytes if name in by_name else 0 for name in instruction.operands]
    if opcode in ("dynamic-slice", "gather"):
        return 2 * instruction.num_bytes
    if opcode == "dynamic-update-slice":
        return 2 * read[1]
    if opcode in ("all-gather-start", "collective-permute-start", "copy-start"):
        return instruction.num_bytes  # its result includes its operand
    if opcode == "slice-start":  # reads only the slice, its result before the flag
        on_chip = (instruction.on_chip[0], instruction.on_chip[-2])
        return on_chip.count(False) * num_bytes(*instruction.shapes[-2])
    if opcode != "fusion":
        return sum(read) + instruction.num_bytes
    return _fusion_bytes(program.computations[next(called_computations(instruction))], read)


def _fusion_bytes(fused: list[Instruction], operand_bytes: list[int]) -> int:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in fused:
        for name in instruction.operands:
            users[name].append(instruction)
    by_name = {instruction.name: instruction for instruction in fused}
    parameters = {integer_literal(i): i for i in fused if i.opcode == "parameter"}
    total = 0
    for number, size in enumerate(operand_bytes):
        total += min(size, _bytes_read(parameters[number], users, by_name))
    root = next(instruction for instruction in fused if instruction.is_root)
    for result in [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode in ("bitcast", "copy", "convert") and result.operands:
            result = by_name[result.operands[0]]
        # An update in place writes the updated slice only.
        is_update = result.opcode == "dynamic-update-slice"
        total += by_name[result.operands[1]].num_bytes if is_update else result.num_bytes
    return total


def _bytes_read(
    source: Instruction, users: Mapping[str, list[Instruction]], by_name: Mapping[str, Instruction]
) -> int:
    """Bytes that a fusion reads from one of its operands: all, or the slices that it takes."""
    total = 0
    for user in users[source.name]:
        if user.opcode in ("bitcast", "reshape"):
            total += _bytes_read(user, users, by_name)
        elif user.operands[0] != source.name:
            return source.num_bytes
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice":
            total += by_name[user.operands[1]].num_bytes
        else:
            return source.num_bytes
    return total
