"""Reading the text of a compiled program.

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

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16}
ITEM_BITS |= {"f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
ITEM_BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\) -> .* \{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{_NAME} = (.*)$")
_KINDS = "|".join(sorted(ITEM_BITS, key=len, reverse=True))
_SHAPE = re.compile(rf"\b({_KINDS})\[([\d,]*)\](\{{[^}}]*\}})?")
_ON_CHIP = re.compile(r"S\([12]\)")  # vectors, and flags of what is under way
_CALLED = re.compile(rf"\b(calls|to_apply|body|condition)={_NAME}")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOTH = re.compile(rf"\b(true_computation|false_computation)={_NAME}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the result, a tuple's one by one
    on_chip: tuple[bool, ...]  # of each shape, whether it lies on a TPU's chip
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def num_bytes(self) -> int:
        """Of the result, as far as it lies in memory and not on the chip."""
        found = zip(self.shapes, self.on_chip, strict=True)
        return sum(0 if on_chip else num_bytes(*shape) for shape, on_chip in found)


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
                    is_root = "ROOT " in line[: found.start(1)]
                    current.append(_parse(found[1], found[2], is_root=is_root))

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often every computation runs; both branches of a condition as if they were taken."""
        found: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: int) -> None:
            found[name] += times
            for instruction in self.computations.get(name, ()):
                factor = self._trips(instruction) if instruction.opcode == "while" else 1
                for called in called_by(instruction):
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
            number_of(instruction)
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
        return number_of(added[0]) if value.opcode == "add" and added else 1


def number_of(instruction: Instruction) -> int:
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


def _parse(name: str, rest: str, *, is_root: bool) -> Instruction:
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
    shapes = tuple((kind, sizes_of(sizes)) for kind, sizes, _ in found)
    return shapes, tuple(bool(_ON_CHIP.search(layout)) for *_, layout in found), end


def _closing(text: str) -> int:
    """Where the bracket closes that was opened just before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def sizes_of(text: str) -> tuple[int, ...]:
    """Of "2,3" 2 and 3."""
    return tuple(int(size) for size in text.split(",") if size)


def num_bytes(kind: str, sizes: tuple[int, ...]) -> int:
    """Of an array of such items."""
    return math.prod(sizes) * ITEM_BITS[kind] // 8


def called_by(instruction: Instruction) -> Iterator[str]:
    """Computations that an instruction runs."""
    for pattern in (_CALLED, _BOTH):
        yield from (name for _, name in pattern.findall(instruction.attributes))
    for names in _BRANCHES.findall(instruction.attributes):
        yield from (name.strip().lstrip("%") for name in names.split(",") if name.strip())
