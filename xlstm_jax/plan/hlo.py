"""Parses the HLO text of a compiled program.

The text consists of named computations: the entry, and the bodies of loops, branches and fusions.
Each has an execution count: a collective in the body of a loop of 32 steps runs 32 times.
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
_DTYPES = "|".join(sorted(ITEM_BITS, key=len, reverse=True))
_SHAPE = re.compile(rf"\b({_DTYPES})\[([\d,]*)\](\{{[^}}]*\}})?")
_ON_CHIP = re.compile(r"S\([12]\)")  # TPU memory spaces: vector memory, and flags of pending copies
_CALLED = re.compile(rf"\b(calls|to_apply|body|condition|(?:true|false)_computation)={_NAME}")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and sizes of each result array
    on_chip: tuple[bool, ...]  # of each array, whether it is in a TPU's on-chip memory
    operands: tuple[str, ...]
    attributes: str  # the text after the operands; of parameters and constants, the value too
    is_root: bool

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of the result in main memory (HBM), without what is in on-chip memory."""
        shapes = zip(self.shapes, self.on_chip, strict=True)
        return sum(0 if on_chip else num_bytes(*shape) for shape, on_chip in shapes)


class Program:
    """A compiled program, parsed from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in _joined_lines(text):
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                current = None
            elif current is not None:
                match = _INSTRUCTION.match(line)
                if match:
                    is_root = "ROOT " in line[: match.start(1)]
                    current.append(_parse(match[1], match[2], is_root=is_root))

    @functools.cached_property
    def execution_counts(self) -> dict[str, int]:
        """How often each computation runs; both branches of a conditional count as taken."""
        counts: collections.Counter[str] = collections.Counter()

        def visit(name: str, count: int) -> None:
            counts[name] += count
            for instruction in self.computations.get(name, ()):
                trips = self._trip_count(instruction) if instruction.opcode == "while" else 1
                for called in called_computations(instruction):
                    visit(called, count * trips)

        visit(self.entry, 1)
        return dict(counts)

    def _trip_count(self, loop: Instruction) -> int:
        """The trip count that XLA annotates, or that of a counter from 0 to a constant bound."""
        annotation = _TRIPS.search(loop.attributes)
        if annotation:
            return int(annotation[1])
        called = {kind: name for kind, name in _CALLED.findall(loop.attributes)}
        condition = self.computations.get(called.get("condition", ""), [])
        bounds = [
            integer_literal(instruction)
            for instruction in condition
            if instruction.opcode == "constant" and instruction.shapes[0][0] in ("s32", "u32")
        ]
        counters = [_tuple_index(i) for i in condition if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            raise ValueError(
                f"loop {loop.name!r} must have a known trip count or a condition that compares "
                "one counter with one integer constant."
            )
        return -(-bounds[0] // self._increment(called["body"], counters[0]))

    def _increment(self, body: str, counter: int) -> int:
        """The increment of a loop counter; above 1 where XLA unrolled the loop."""
        by_name = {instruction.name: instruction for instruction in self.computations[body]}
        value = by_name[self.computations[body][-1].operands[counter]]
        constants = [by_name[x] for x in value.operands if by_name[x].opcode == "constant"]
        return integer_literal(constants[0]) if value.opcode == "add" and constants else 1


def integer_literal(instruction: Instruction) -> int:
    """The integer in parentheses: the index of a parameter, or the value of a constant."""
    return int(instruction.attributes.split(")")[0])


def _tuple_index(instruction: Instruction) -> int:
    """The index of a get-tuple-element instruction."""
    match = re.search(r"index=(\d+)", instruction.attributes)
    assert match is not None
    return int(match[1])


def _joined_lines(text: str) -> Iterator[str]:
    """Lines of a program, with instructions of several lines joined to one."""
    pending = ""
    for line in text.splitlines():
        is_start = _INSTRUCTION.match(line) or _COMPUTATION.match(line) or line in ("", "}")
        if _INSTRUCTION.match(pending) and not is_start:
            pending += line
            continue
        yield pending
        pending = line
    yield pending


def _parse(name: str, rest: str, *, is_root: bool) -> Instruction:
    shapes, on_chip, end = _parse_result(rest)
    match = re.match(r"\s*([\w\-]+)\(", rest[end:])
    assert match is not None, rest[:200]
    arguments = rest[end + match.end() :]
    closing = _closing_parenthesis(arguments)
    names = tuple(re.findall(r"%([\w.\-]+)", arguments[:closing]))
    is_data = match[1] in ("parameter", "constant")
    attributes = arguments if is_data else arguments[closing:]
    operands = () if is_data else names
    return Instruction(name, match[1], shapes, on_chip, operands, attributes, is_root)


def _parse_result(
    rest: str,
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[bool, ...], int]:
    """The result's shapes, whether each is in on-chip memory, and where their text ends."""
    end = _closing_parenthesis(rest[1:]) + 2 if rest.startswith("(") else len(rest.split(" ", 1)[0])
    parts = _SHAPE.findall(rest[:end])
    shapes = tuple((dtype, parse_sizes(sizes)) for dtype, sizes, _ in parts)
    return shapes, tuple(bool(_ON_CHIP.search(layout)) for *_, layout in parts), end


def _closing_parenthesis(text: str) -> int:
    """Index of the parenthesis that closes one opened just before `text`."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    return len(text)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parses comma-separated integers: (2, 3) from "2,3"."""
    return tuple(int(size) for size in text.split(",") if size)


def num_bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    """Bytes of an array of this dtype and shape."""
    return math.prod(sizes) * ITEM_BITS[dtype] // 8


def called_computations(instruction: Instruction) -> Iterator[str]:
    """Names of the computations that an instruction calls."""
    yield from (name for _, name in _CALLED.findall(instruction.attributes))
    for names in _BRANCHES.findall(instruction.attributes):
        yield from (name.strip().lstrip("%") for name in names.split(",") if name.strip())
