"""Modeled time of the mLSTM on an H200 for long sequences with few heads, with segments or without.

    .venv-compile/bin/python experiments/benchmarks/sequence_split.py
    .venv-compile/bin/python experiments/benchmarks/sequence_split.py --out RESULT.json

A model, not a measurement; no GPU is needed. The call is compiled for sm_90 without a split,
and in the largest power of two of segments for which the programs of `states` fit the chip at once.
The time of a launch is the largest of its bounds:

- `states`, `dstates`: iterations of a program, one after the other, and bytes from the L2 cache;
- the other kernels: matrix units, schedulers and L2 cache, by `gpu_cycles`;
- XLA's launches: bytes of operands and results, and a fixed time each. XLA selects the algorithm of
  a product on a GPU by timing; here it is the default.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_cycles, measure
from pallas_kernels.aot import compiler, resources
from pallas_kernels.hardware import GPUS
from xlstm_jax import ops
from xlstm_jax.ops.mlstm import segments
from xlstm_jax.plan.hlo import Program, called_computations

CASES = ((4, 64, 128), (8, 256, 512))
"""Heads, K and V."""

ITERATION = {"states": 0.8e-6, "dstates": 1.0e-6}
"""Seconds of an iteration over 64 positions with one program per multiprocessor: latency of the
loads, two products and barriers. Estimated from the instructions, not measured."""

LAUNCH = 2e-6
"""Seconds of a small launch, estimated."""

HBM_BANDWIDTH = 4.3e12
"""Bytes per second that a copy reaches on an H200, below the 4.8 TB/s of the data sheet."""

UNCOUNTED = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "iota")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Sizes of the calls."""

    T: int = 65_536


class Time(NamedTuple):
    """Milliseconds of one pass in this number of segments."""

    H: int
    K: int
    V: int
    direction: str  # "forward", or "both"
    segments: int
    programs: int  # of `states`
    states: float  # and `dstates`
    outputs: float
    xla: float
    xla_launches: int
    xla_bytes: int

    @property
    def total(self) -> float:
        """Milliseconds of all launches."""
        return self.states + self.outputs + self.xla


def model(H: int, K: int, V: int, T: int) -> Iterator[Time]:
    """Times without a split, and in as many segments as the chip computes at once."""
    sizes = gpu_cycles.Arguments(K=K, V=V, H=H, tokens=T, T=T)
    counts = {count.kernel: count for count in gpu_cycles.triton_counts(sizes)}
    unsplit = _launches(_compiled(H, K, V, T, 1, "forward")[0])["mlstm_states"]
    full = GPUS["H200"].multiprocessors // unsplit
    for count in (1, 2 ** int(math.log2(full))):
        for direction in ("forward", "both"):
            launches, text = _compiled(H, K, V, T, count, direction)
            yield _time(H, K, V, T, direction, count, _launches(launches), counts, text)


def _launches(launches: list[resources.Launch]) -> dict[str, int]:
    return {launch.name: math.prod(launch.grid) for launch in launches}


def _compiled(H: int, K: int, V: int, T: int, count: int, direction: str):
    """The launches of our kernels, and the text of the compiled program."""

    def call(*args):
        return ops.mlstm(*args, implementation="triton")[0]

    def both(*args):
        h, pullback = jax.vjp(call, *args)
        return h, pullback(jnp.cos(h))

    def shape(*sizes):
        return jax.ShapeDtypeStruct((1, T, H, *sizes), jnp.bfloat16)

    fn, args = (call if direction == "forward" else both), map(shape, (K, K, V))
    args = (*args, shape(), shape())
    with mock.patch.object(segments, "segment_length", lambda T, *_: T // count):
        launches = resources.launches_for("sm_90", fn, *args)
        return launches, compiler.compile_for("sm_90", fn, *args).as_text()


def _time(H, K, V, T, direction, count, programs, counts, text) -> Time:
    chip, blocks = GPUS["H200"], H * T / 64
    seconds = dict.fromkeys(("states", "outputs"), 0.0)
    for name, number in programs.items():
        work = counts[name.removeprefix("mlstm_")]
        cycles = max(work.tensor, work.issue) * blocks / (chip.multiprocessors * gpu_cycles.CLOCK)
        l2 = work.l2 * blocks / gpu_cycles.L2_BANDWIDTH
        if work.kernel in ITERATION:
            waves = -(-number // chip.multiprocessors)
            serial = waves * (T // 64 // count) * ITERATION[work.kernel]
            seconds["states"] += max(serial, l2)
        else:
            seconds["outputs"] += max(cycles, l2)
    sizes = list(_xla_launches(Program(text)))
    xla = sum(max(LAUNCH, size / HBM_BANDWIDTH) for size in sizes)
    return Time(
        H=H,
        K=K,
        V=V,
        direction=direction,
        segments=count,
        programs=programs["mlstm_states"],
        states=1e3 * seconds["states"],
        outputs=1e3 * seconds["outputs"],
        xla=1e3 * xla,
        xla_launches=len(sizes),
        xla_bytes=sum(sizes),
    )


def _xla_launches(program: Program) -> Iterator[int]:
    """Bytes of operands and results of every launch that is not one of our kernels."""
    pending, counts = [program.entry], program.execution_counts
    while pending:
        name = pending.pop()
        by_name = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in by_name.values():
            if instruction.opcode in ("while", "conditional", "call"):
                pending += called_computations(instruction)
            ours = "triton_kernel_call" in instruction.name
            if instruction.opcode in UNCOUNTED or ours:
                continue
            operands = (by_name[x] for x in instruction.operands if by_name[x].opcode != "tuple")
            size = instruction.num_bytes + sum(operand.num_bytes for operand in operands)
            yield from [size] * counts[name]


def main(args: Arguments) -> int:
    """Prints the modeled times."""
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    header = ["heads (K, V)", "pass", "segments", "programs of `states`", "`states`", "outputs"]
    header += ["XLA: launches, MB", "XLA", "ms"]
    times, lines = [], []
    for case in CASES:
        for time in model(*case, args.T):
            times.append(time._asdict() | {"total": time.total})
            lines.append([f"{time.H} ({time.K}, {time.V})", time.direction, f"{time.segments}"])
            lines[-1] += [f"{time.programs}", f"{time.states:.2f}", f"{time.outputs:.2f}"]
            lines[-1] += [f"{time.xla_launches}, {time.xla_bytes / 1e6:,.0f}", f"{time.xla:.2f}"]
            lines[-1] += [f"{time.total:.2f}"]
    print(measure.table(header, lines))
    result: dict[str, Any] = measure.run_info("sequence_split", ("jax", "triton"))
    measure.write(args.out, result | {"T": args.T, "ms": times})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
