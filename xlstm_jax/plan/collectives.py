"""The collectives of a compiled program, and the bytes that each device sends."""

import dataclasses
import math
import re

import numpy as np

from xlstm_jax.plan.hlo import Instruction, Program, num_bytes, parse_sizes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation and how often it runs in one execution of the program."""

    kind: str  # of `COLLECTIVES`
    payload: int  # bytes of each device's operand or result, whichever is larger
    group: tuple[int, ...]  # device ids of the first replica group
    count: int  # executions
    dtype: str  # in the spelling of XLA: "bf16"

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends per execution, with ring algorithms."""
        size = len(self.group)
        if self.kind == "collective-permute":
            return self.payload
        share = (size - 1) / size
        return self.payload * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program) -> list[Collective]:
    """All collectives between two or more devices.

    For TPUs, XLA may split one collective over several fusions with the same channel id, to overlap
    it with other computation or even with a loop. It counts once, with the lowest execution count
    of these fusions.
    """
    by_key: dict[str, Collective] = {}
    for name, count in program.execution_counts.items():
        for instruction in program.computations.get(name, ()):
            key, collective = _parse(program, name, instruction, count)
            if collective and (key not in by_key or count < by_key[key].count):
                by_key[key] = collective
    return list(by_key.values())


def _parse(
    program: Program, computation: str, instruction: Instruction, count: int
) -> tuple[str, Collective | None]:
    """The collective of an instruction, or None, and a key that all its parts share."""
    key = f"{computation} {instruction.name}"
    if instruction.opcode == "send":
        return key, _parse_send(instruction, count)
    kind = instruction.opcode.removesuffix("-start")
    group = _first_group(instruction.attributes) if kind in COLLECTIVES else ()
    if len(group) < 2:
        return key, None
    payload, dtype = _payload(kind, instruction, len(group)), instruction.shapes[0][0]
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    # Only for all-gathers: separate reductions may share a channel id.
    if channel is not None and kind == "all-gather":
        key = f"{channel[0]} {instruction.shapes}"
    if _is_reduce_scatter(program.computations[computation], instruction):
        kind = "reduce-scatter"
    return key, Collective(kind, payload, group, count, dtype)


def _is_reduce_scatter(computation: list[Instruction], instruction: Instruction) -> bool:
    """Whether an all-reduce is fused with the slicing of its result, XLA's form for TPUs."""
    last = computation[-1]
    is_slice = last.opcode == "dynamic-slice" and last.operands[:1] == (instruction.name,)
    return is_slice and instruction.opcode == "all-reduce"


def _payload(kind: str, instruction: Instruction, group_size: int) -> int:
    """The bytes that `Collective.payload` counts."""
    sizes = [num_bytes(*shape) for shape in instruction.shapes]
    if kind == "collective-permute":
        return max(sizes)
    if kind in ("all-gather", "reduce-scatter") and instruction.opcode.endswith("-start"):
        # The result of a -start instruction includes its operands.
        return sum(sizes) * group_size // (group_size + 1)
    return sum(sizes) * (group_size if kind == "reduce-scatter" else 1)


def _parse_send(send: Instruction, count: int) -> Collective | None:
    """A collective between TPU slices, which goes through the hosts: the only use of `send`."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = re.search(r'_xla_megascale_target="\{(.*?)\}x\{(.*?)\}"', send.attributes)
    if kind is None or target is None:
        return None
    slices, chips = (_num_in_ranges(part) for part in target.groups())
    group = tuple(slice_id * chips for slice_id in range(slices))
    name = kind[1].lower().replace("_", "-")
    return Collective(name, num_bytes(*send.shapes[0]), group, count, send.shapes[0][0])


def _num_in_ranges(ranges: str) -> int:
    """The number of integers in inclusive ranges: 5 for "0:3,7"."""
    ends = [part.split(":") for part in ranges.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _first_group(attributes: str) -> tuple[int, ...]:
    """Device ids of the first group of a collective, in any of XLA's notations."""
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if explicit:
        return parse_sizes(explicit[1])
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[^ ,]*\S*?)(?=,? |,$|$)", attributes)
    if iota:
        return tuple(_device_ids(iota[2]).reshape(parse_sizes(iota[1]))[0].tolist())
    mesh = re.search(_MESH_GROUPS, attributes)
    return _first_mesh_group(*mesh.groups()) if mesh else ()


_MESH_GROUPS = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[.*?)\))? \{(.*?)\}"


def _device_ids(text: str) -> np.ndarray:
    """Device ids in iota notation: "[2,4]T(1,0)" is arange(8), reshaped to [2,4] and transposed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    dims = parse_sizes(match[1])
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(parse_sizes(match[2])) if match[2] else ids


def _first_mesh_group(mesh: str, device_ids: str | None, axes: str) -> tuple[int, ...]:
    """The first group along some axes of a mesh such as 'a'=4,'b'=2.

    A sub-axis such as 'a':(2)4 splits axis a into a major part of size 2, the sub-axis of size 4,
    and the rest.
    """
    axis_sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    ids = _device_ids(device_ids) if device_ids else np.arange(math.prod(axis_sizes.values()))
    split: list[tuple[int, bool]] = []  # sub-axes: size, and whether groups run along it
    for name, size in axis_sizes.items():
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", axes)
        if part is None:
            split.append((size, False))
        elif part[1] is None:
            split.append((size, True))
        else:
            major, minor = int(part[1]), int(part[2])
            split += [(major, False), (minor, True), (size // major // minor, False)]
    ids = ids.reshape([size for size, _ in split])
    first = tuple(slice(None) if in_group else 0 for _, in_group in split)
    return tuple(ids[first].ravel().tolist())
