"""What the devices of a compiled program exchange."""

import dataclasses
import math
import re

import numpy as np

from xlstm_jax.plan.hlo import Instruction, Program, num_bytes, sizes_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices, as often as it runs."""

    kind: str  # of `COLLECTIVES`
    payload: int  # bytes of what every device ends up with, or gives where that is more
    group: tuple[int, ...]  # numbers of devices of the first group that exchanges
    times: int
    dtype: str

    @property
    def sent(self) -> float:
        """Bytes that every device sends in one run, around a ring."""
        count = len(self.group)
        if self.kind == "collective-permute":
            return self.payload
        share = (count - 1) / count
        return self.payload * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program) -> list[Collective]:
    """Every exchange between two devices or more.

    TPUs spread one over several fusions, which have its channel in common: other work goes on
    meanwhile, a whole loop maybe, and it runs as often as the fusion that runs least.
    """
    found: dict[str, Collective] = {}
    for name, times in program.times.items():
        for instruction in program.computations.get(name, ()):
            key, collective = _exchange(program, name, instruction, times)
            if collective and (key not in found or times < found[key].times):
                found[key] = collective
    return list(found.values())


def _exchange(
    program: Program, computation: str, instruction: Instruction, times: int
) -> tuple[str, Collective | None]:
    """What an instruction exchanges, and what others that are part of the same have in common."""
    key = f"{computation} {instruction.name}"
    if instruction.opcode == "send":
        return key, _between_slices(instruction, times)
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction.attributes) if kind in COLLECTIVES else ()
    if len(group) < 2:
        return key, None
    payload, dtype = _payload(kind, instruction, len(group)), instruction.shapes[0][0]
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    # Sums over devices may have the same one without being the same.
    if channel is not None and kind == "all-gather":
        key = f"{channel[0]} {instruction.shapes}"
    if _is_scattered(program.computations[computation], instruction):
        kind = "reduce-scatter"
    return key, Collective(kind, payload, group, times, dtype)


def _is_scattered(computation: list[Instruction], instruction: Instruction) -> bool:
    """Whether a sum is one with the slice of it that a device keeps, as TPUs write it."""
    last = computation[-1]
    is_slice = last.opcode == "dynamic-slice" and last.operands[:1] == (instruction.name,)
    return is_slice and instruction.opcode == "all-reduce"


def _payload(kind: str, instruction: Instruction, count: int) -> int:
    """Bytes that a collective is about, as `Collective.payload` counts them."""
    sizes = [num_bytes(*shape) for shape in instruction.shapes]
    started = instruction.opcode.endswith("-start")
    if kind == "collective-permute":
        return max(sizes)
    if kind == "all-gather":
        # A start returns what it was given as well.
        return sum(sizes) * count // (count + 1) if started else sum(sizes)
    if kind == "reduce-scatter":
        return sum(sizes) * count // (count + 1) if started else sum(sizes) * count
    return sum(sizes)


def _between_slices(send: Instruction, times: int) -> Collective | None:
    """What a TPU hands to its host, for those of other slices; nothing else is sent this way."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = re.search(r'_xla_megascale_target="\{(.*?)\}x\{(.*?)\}"', send.attributes)
    if kind is None or target is None:
        return None
    slices, chips = (_counted(part) for part in target.groups())
    group = tuple(number * chips for number in range(slices))
    name = kind[1].lower().replace("_", "-")
    return Collective(name, num_bytes(*send.shapes[0]), group, times, send.shapes[0][0])


def _counted(ranges: str) -> int:
    """How many numbers "0:3,7" stands for: five."""
    ends = [part.split(":") for part in ranges.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group that a collective joins."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return sizes_of(listed[1])
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2]))
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[^ ,]*\S*?)(?=,? |,$|$)", attributes)
    if counted:
        return tuple(_numbers(counted[2]).reshape(sizes_of(counted[1]))[0].tolist())
    meshed = re.search(_MESH_GROUPS, attributes)
    return _along_axes(*meshed.groups()) if meshed else ()


_MESH_GROUPS = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[.*?)\))? \{(.*?)\}"


def _numbers(text: str) -> np.ndarray:
    """Numbers of devices as "[2,4]T(1,0)": those of [2,4] in order, its axes in another one."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    dims = sizes_of(match[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(sizes_of(match[2])) if match[2] else numbers


def _along_axes(mesh: str, ids: str | None, axes: str) -> tuple[int, ...]:
    """The first group of a mesh such as 'a'=4,'b'=2 whose groups lie along some axes of it.

    Part of an axis is 'a':(2)4, which stands for 4 pieces within each of the first 2.
    """
    lengths = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    numbers = _numbers(ids) if ids else np.arange(math.prod(lengths.values()))
    split: list[tuple[int, bool]] = []  # pieces of axes: how long, and whether groups join them
    for name, length in lengths.items():
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", axes)
        if part is None:
            split.append((length, False))
        elif part[1] is None:
            split.append((length, True))
        else:
            before, size = int(part[1]), int(part[2])
            split += [(before, False), (size, True), (length // before // size, False)]
    numbers = numbers.reshape([length for length, _ in split])
    first = tuple(slice(None) if joined else 0 for _, joined in split)
    return tuple(numbers[first].ravel().tolist())
