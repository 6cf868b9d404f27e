"""Reading a compiled program: what its devices exchange, and what they move to and from memory.

The text of a program names computations, some of which stand for the body of a loop, a branch, or
what was fused. Everything is counted as often as it runs: a collective in the body of a loop of 32
steps 32 times.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16}
ITEM_BITS |= {"f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
ITEM_BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\) -> .* \{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{_NAME} = (.*)$")
_KINDS = "|".join(sorted(ITEM_BITS, key=len, reverse=True))
_SHAPE = re.compile(rf"\b({_KINDS})\[([\d,]*)\](\{{[^}}]*\}})?")
_CALLED = re.compile(rf"\b(calls|to_apply|body|condition)={_NAME}")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOTH = re.compile(rf"\b(true_computation|false_computation)={_NAME}")

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"}
FREE |= {
    "while",
    "conditional",
    "call",
    "async-start",
    "partition-id",
    "replica-id",
    "optimization-barrier",
}
"""Instructions that move nothing themselves."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the result, a tuple's one by one
    on_chip: tuple[bool, ...]  # of each shape, whether it lies in a TPU's VMEM
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def num_bytes(self) -> int:
        """Of the result, as far as it lies in memory and not on the chip."""
        found = zip(self.shapes, self.on_chip, strict=True)
        return sum(0 if on_chip else _bytes(*shape) for shape, on_chip in found)


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


class Program:
    """A compiled program by its text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in _whole_lines(text):
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                current = None
            elif current is not None:
                found = _INSTRUCTION.match(line)
                if found:
                    current.append(_parse(found[1], found[2], "ROOT " in line[: found.start(1)]))

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often every computation runs; both branches of a condition as if they were taken."""
        found: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: int) -> None:
            found[name] += times
            for instruction in self.computations.get(name, ()):
                factor = self._trips(instruction) if instruction.opcode == "while" else 1
                for called in _called(instruction):
                    visit(called, times * factor)

        visit(self.entry, 1)
        return dict(found)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or as its counter goes from 0 to a bound."""
        said = _TRIPS.search(loop.attributes)
        if said:
            return int(said[1])
        called = {kind: name for kind, name in _CALLED.findall(loop.attributes)}
        condition = self.computations.get(called.get("condition", ""), [])
        bounds = [
            _number(instruction)
            for instruction in condition
            if instruction.opcode == "constant" and instruction.shapes[0][0] in ("s32", "u32")
        ]
        counters = [_index(i) for i in condition if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            raise ValueError(f"the loop {loop.name} does not say how often it runs")
        return -(-bounds[0] // self._step(called["body"], counters[0]))

    def _step(self, body: str, counter: int) -> int:
        """What a loop adds to its counter; a step may be several of the loop that was written."""
        own = {instruction.name: instruction for instruction in self.computations[body]}
        value = own[self.computations[body][-1].operands[counter]]
        added = [own[name] for name in value.operands if own[name].opcode == "constant"]
        return _number(added[0]) if value.opcode == "add" and added else 1

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Every exchange between two devices or more.

        TPUs spread one over several fusions, which have its channel in common: other work goes on
        meanwhile, a whole loop maybe, and it runs as often as the fusion that runs least.
        """
        found: dict[str, Collective] = {}
        for name, times in self.times.items():
            for instruction in self.computations.get(name, ()):
                if instruction.opcode == "send":
                    found |= _between_slices(f"{name} {instruction.name}", instruction, times)
                kind = instruction.opcode.removesuffix("-start")
                group = _group(instruction.attributes) if kind in COLLECTIVES else ()
                if len(group) > 1:
                    payload = _payload(kind, instruction, len(group))
                    dtype = instruction.shapes[0][0]
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                    # Sums over devices may have the same one without being the same.
                    key = f"{name} {instruction.name}"
                    if channel is not None and kind == "all-gather":
                        key = f"{channel[0]} {instruction.shapes}"
                    if self._is_scattered(name, instruction):
                        kind = "reduce-scatter"
                    if key not in found or times < found[key].times:
                        found[key] = Collective(kind, payload, group, times, dtype)
        return list(found.values())

    def _is_scattered(self, computation: str, instruction: Instruction) -> bool:
        """Whether a sum is one with the slice of it that a device keeps, as TPUs write it."""
        last = self.computations[computation][-1]
        is_slice = last.opcode == "dynamic-slice" and last.operands[:1] == (instruction.name,)
        return is_slice and instruction.opcode == "all-reduce"

    @functools.cached_property
    def memory_traffic(self) -> int:
        """Bytes that one device reads and writes in its memory: operands and results of whatever
        is not fused with others, slices as far as they are read."""
        fused = set(self._fused())
        total = 0
        for name, times in self.times.items():
            if name in fused:
                continue
            own = {instruction.name: instruction for instruction in self.computations[name]}
            total += times * sum(self._traffic(instruction, own) for instruction in own.values())
        return total

    def _fused(self) -> Iterator[str]:
        """Computations that are part of an instruction: nothing inside of them is in memory."""
        for instructions in self.computations.values():
            for instruction in instructions:
                if instruction.opcode not in ("while", "conditional", "call", "async-start"):
                    yield from _called(instruction)

    def _traffic(self, instruction: Instruction, own: dict[str, Instruction]) -> int:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return 0
        read = [own[name].num_bytes if name in own else 0 for name in instruction.operands]
        if opcode == "dynamic-slice" or opcode == "gather":
            return 2 * instruction.num_bytes
        if opcode == "dynamic-update-slice":
            return 2 * read[1]
        if opcode in ("all-gather-start", "collective-permute-start"):
            return instruction.num_bytes  # its result names what it reads as well
        if opcode != "fusion":
            return sum(read) + instruction.num_bytes
        return self._fusion_traffic(instruction, read)

    def _fusion_traffic(self, fusion: Instruction, read: list[int]) -> int:
        called = next(_called(fusion))
        inside = self.computations[called]
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inside:
            for name in instruction.operands:
                users[name].append(instruction)
        by_name = {instruction.name: instruction for instruction in inside}
        parameters = {_number(i): i for i in inside if i.opcode == "parameter"}
        total, updated = 0, 0
        for number, size in enumerate(read):
            total += min(size, _read_of(parameters[number], users, by_name))
        root = next(instruction for instruction in inside if instruction.is_root)
        for result in [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]:
            while result.opcode in ("bitcast", "copy", "convert") and result.operands:
                result = by_name[result.operands[0]]
            is_update = result.opcode == "dynamic-update-slice"
            updated += by_name[result.operands[1]].num_bytes if is_update else result.num_bytes
        return total + updated


def _read_of(source: Instruction, users: dict[str, list[Instruction]], by_name) -> int:
    """Bytes that a fusion reads of one of its operands."""
    total = 0
    for user in users[source.name]:
        if user.opcode in ("bitcast", "reshape"):
            total += _read_of(user, users, by_name)
        elif (
            user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name
        ):
            total += user.num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            total += by_name[user.operands[1]].num_bytes
        else:
            return source.num_bytes
    return total


def _number(instruction: Instruction) -> int:
    """Of a parameter its place, of a constant its value."""
    return int(instruction.attributes.split(")")[0])


def _index(instruction: Instruction) -> int:
    """Which part of a tuple this is."""
    found = re.search(r"index=(\d+)", instruction.attributes)
    assert found is not None
    return int(found[1])


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of a program; an instruction whose metadata has line breaks is one line again."""
    held = ""
    for line in text.splitlines():
        begins = _INSTRUCTION.match(line) or _COMPUTATION.match(line) or line in ("", "}")
        if _INSTRUCTION.match(held) and not begins:
            held += line
            continue
        yield held
        held = line
    yield held


def _parse(name: str, rest: str, is_root: bool) -> Instruction:
    kinds, on_chip, end = _result(rest)
    match = re.match(r"\s*([\w\-]+)\(", rest[end:])
    assert match is not None, rest[:200]
    arguments = rest[end + match.end() :]
    closing = _closing(arguments)
    names = tuple(re.findall(r"%([\w.\-]+)", arguments[:closing]))
    is_data = match[1] in ("parameter", "constant")
    attributes = arguments if is_data else arguments[closing:]
    operands = () if is_data else names
    return Instruction(name, match[1], kinds, on_chip, operands, attributes, is_root)


def _result(rest: str) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[bool, ...], int]:
    """The shapes that an instruction begins with, which are on the chip, and where they end."""
    end = _closing(rest[1:]) + 2 if rest.startswith("(") else len(rest.split(" ", 1)[0])
    found = _SHAPE.findall(rest[:end])
    shapes = tuple((kind, _sizes(sizes)) for kind, sizes, _ in found)
    return shapes, tuple("S(1)" in layout for *_, layout in found), end


def _closing(text: str) -> int:
    """Where the bracket closes that was opened just before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bytes(kind: str, sizes: tuple[int, ...]) -> int:
    return math.prod(sizes) * ITEM_BITS[kind] // 8


def _called(instruction: Instruction) -> Iterator[str]:
    """Computations that an instruction runs."""
    for pattern in (_CALLED, _BOTH):
        yield from (name for _, name in pattern.findall(instruction.attributes))
    for names in _BRANCHES.findall(instruction.attributes):
        yield from (name.strip().lstrip("%") for name in names.split(",") if name.strip())


def _payload(kind: str, instruction: Instruction, count: int) -> int:
    """Bytes that a collective is about, as `Collective.payload` counts them."""
    sizes = [_bytes(*shape) for shape in instruction.shapes]
    started = instruction.opcode.endswith("-start")
    if kind == "collective-permute":
        return max(sizes)
    if kind == "all-gather":
        # A start returns what it was given as well.
        return sum(sizes) * count // (count + 1) if started else sum(sizes)
    if kind == "reduce-scatter":
        return sum(sizes) * count // (count + 1) if started else sum(sizes) * count
    return sum(sizes)


def _between_slices(key: str, send: Instruction, times: int) -> dict[str, Collective]:
    """What a TPU hands to its host, for those of other slices; nothing else is sent this way."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = re.search(r'_xla_megascale_target="\{(.*?)\}x\{(.*?)\}"', send.attributes)
    if kind is None or target is None:
        return {}
    slices, chips = (_counted(part) for part in target.groups())
    group = tuple(number * chips for number in range(slices))
    name = kind[1].lower().replace("_", "-")
    return {key: Collective(name, _bytes(*send.shapes[0]), group, times, send.shapes[0][0])}


def _counted(ranges: str) -> int:
    """How many numbers "0:3,7" stands for: five."""
    ends = [part.split(":") for part in ranges.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group that a collective joins."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return _sizes(listed[1])
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2]))
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[^ ,]*\S*?)(?=,? |,$|$)", attributes)
    if counted:
        return tuple(_numbers(counted[2]).reshape(_sizes(counted[1]))[0].tolist())
    meshed = re.search(_MESH_GROUPS, attributes)
    return _along_axes(*meshed.groups()) if meshed else ()


_MESH_GROUPS = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[.*?)\))? \{(.*?)\}"


def _numbers(text: str) -> np.ndarray:
    """Numbers of devices as "[2,4]T(1,0)": those of [2,4] in order, its axes in another one."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    dims = _sizes(match[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(_sizes(match[2])) if match[2] else numbers


def _along_axes(mesh: str, ids: str | None, axes: str) -> tuple[int, ...]:
    """The first group of a mesh such as 'a'=4,'b'=2 whose groups lie along some axes of it.

    Part of an axis is 'a':(2)4, which stands for 4 pieces within each of the first 2.
    """
    lengths = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    numbers = _numbers(ids) if ids else np.arange(math.prod(lengths.values()))
    split: list[
        tuple[int, bool]
    ] = []  # length of each piece of an axis, and whether groups join it
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
