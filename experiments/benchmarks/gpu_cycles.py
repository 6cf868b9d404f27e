"""What the mLSTM kernels ask of an H200, by counting: matrix units, schedulers and the L2 cache.

    .venv-compile/bin/python experiments/benchmarks/gpu_cycles.py
    .venv-compile/bin/python experiments/benchmarks/gpu_cycles.py --K 128 --V 256 --out RESULT.json

No GPU is needed. Triton kernels are compiled for sm_90 and disassembled: cycles of the matrix units
and instructions of each loop, times its trips. Mosaic GPU kernels are counted from their blocks,
as a program is one loop over copies of equal size. Bytes are what programs load from the L2 cache.

A count is a lower bound for each unit, not a time: waits are not in it, and what overlaps with what
is known on a device only.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_tiles, kernel_jax, measure
from experiments.benchmarks.kernel_cases import Case
from pallas_kernels import common
from pallas_kernels.aot import resources, sass
from pallas_kernels.hardware import GPUS
from pallas_kernels.mlstm import mosaic_tiles, triton_tiles

CLOCK = 1.7e9
"""Cycles per second under load, below the 1.98 GHz of the data sheet."""

L2_BANDWIDTH = 5.6e12
"""Bytes per second from the L2 cache to all multiprocessors."""

FORWARD = ("chunk_maps", "gates", "states", "h")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Sizes of the call."""

    K: int = 256
    V: int = 512
    H: int = 8
    tokens: int = 65_536  # B T
    T: int = 8192


class Count(NamedTuple):
    """Of one kernel, per 64 positions of a head."""

    implementation: str
    kernel: str
    tensor: float  # cycles of the matrix units of a multiprocessor
    issue: float | None  # cycles of its four schedulers; None: not counted
    l2: float  # bytes


def triton_counts(args: Arguments) -> list[Count]:
    """Counts of the Triton kernels, from their instructions."""
    case = Case(op="mlstm", part="gradient", dtype="bfloat16", B=1, T=1024, H=8, K=args.K, V=args.V)
    with common.compiled_for("sm_90"):
        tile = triton_tiles.choose(args.K, args.V, jnp.dtype("bfloat16"), args.T, None)
        shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
    fn = gpu_tiles.tile_function(tile, "h", case)
    return [
        _triton_count(launch, tile.chunk) for launch in resources.launches_for("sm_90", fn, *shapes)
    ]


def _triton_count(launch: resources.Launch, L: int) -> Count:
    loops = sass.loops(sass.disassemble(resources.cubin(launch, "sm_90")))
    sizes, groups = dict(launch.constants), dict(launch.options)["num_warps"] / 4
    name = launch.name.removeprefix("mlstm_")
    if name in ("chunk_maps", "gates", "gates_backward", "gate_grads"):
        # Only `gates_backward` has a loop with more than one turn, over the columns of h and dh.
        turns = sizes["V"] // sizes["BV"] if name == "gates_backward" else 1
        programs, trips = 64 / L, [1] + [turns] * (len(loops) - 1)
        l2 = 2 * 2 * 64 * sizes["V"] if name == "gates_backward" else 0
    elif "states" in name:
        K, V, k, v = sizes["K"], sizes["V"], sizes["BK"], sizes["BV"]
        programs, trips = (K // k) * (V // v) * 64 / sizes["BT"], [0] + [1] * (len(loops) - 1)
        l2 = 2 * 64 * (k + v) * (K // k) * (V // v)
        if name == "dstates":
            l2 += 2 * K * V * 64 / L
    else:
        A, W, positions = sizes["A"], sizes["W"], sizes["BT"]
        blocks = _blocks_seen(L, positions, sizes["BS"])
        trips = _trip_counts(loops, blocks, A // sizes["BC"], A // sizes["BA"])
        programs = W // sizes["BW"] * 64 / positions
        l2 = programs * _bytes_of_outputs(name, A, sizes["BW"], positions, blocks * sizes["BS"])
    tensor = sum(n * loop.product_cycles for n, loop in zip(trips, loops, strict=True))
    issue = sum(n * loop.instructions for n, loop in zip(trips, loops, strict=True))
    return Count("triton", name, programs * groups * tensor, programs * groups * issue, l2)


def _trip_counts(loops: list[sass.Loop], blocks: float, state: int, inner: int) -> list[float]:
    """Turns of each loop of `outputs`: over the state, unless unrolled, and over positions."""
    outer = [n for n, loop in enumerate(loops) if loop.depth == 1]
    trips: list[float] = []
    for n, loop in enumerate(loops):
        depth_1 = blocks if n == outer[-1] else state
        trips.append({0: 1.0, 1: depth_1, 2: blocks * inner}[loop.depth])
    return trips


def _blocks_seen(L: int, positions: int, others: int) -> float:
    """Blocks of other positions that a program reads, on average over a chunk."""
    return (L / positions + 1) / 2 * positions / others


def _bytes_of_outputs(name: str, A: int, width: int, positions: int, others: float) -> float:
    """Bytes that a program loads: the state, its own operand, and the other positions."""
    own = 2 * positions * (A + (width if name in ("dq", "dk") else 0))
    return 2 * A * width + own + 2 * others * (A + width)


def mosaic_counts(args: Arguments) -> list[Count]:
    """Counts of the Mosaic GPU kernels, from their blocks of 64 x 64."""
    tile = mosaic_tiles.choose(args.K, args.V, jnp.dtype("bfloat16"), args.T, None)
    K, V, L, counts = args.K // 64, args.V // 64, tile.chunk, []
    product = 4 * 32  # cycles of a product of two blocks
    rows, columns = tile.states.groups, tile.states.blocks
    for name in ("states", "dstates"):
        l2 = 2 * 64 * 64 * (rows + columns) * (K // rows) * (V // columns)
        l2 += 2 * args.K * args.V * 64 / L if name == "dstates" else 0
        counts.append(Count("mosaic_gpu", name, K * V * product + K * 4 * 18, None, l2))
    for name, A, W, block in (
        ("h", K, V, tile.to_v),
        ("dq", V, K, tile.to_k),
        ("dk", V, K, tile.to_k),
        ("dv", K, V, tile.to_v),
    ):
        seen = (L / 64 + 1) / 2  # by one warp group; others are skipped, but loaded
        splits, positions = W // block.blocks, 64 * block.groups
        tensor = splits * product * (A * block.blocks + seen * (A + block.blocks))
        loaded = _bytes_of_outputs(
            name, 64 * A, 64 * block.blocks, positions, _blocks_seen(L, positions, 64) * 64
        )
        counts.append(Count("mosaic_gpu", name, tensor, None, splits * loaded * 64 / positions))
    return counts


def times(counts: list[Count], args: Arguments) -> dict[str, dict[str, float]]:
    """Milliseconds of each unit for the forward pass, and for both directions."""
    blocks = args.tokens * args.H / 64
    rate = {"tensor": GPUS["H200"].multiprocessors * CLOCK, "l2": L2_BANDWIDTH}
    rate["issue"] = rate["tensor"]
    result = {}
    for direction, names in (("forward", FORWARD), ("both", None)):
        mine = [count for count in counts if names is None or count.kernel in names]
        result[direction] = {
            unit: 1e3 * blocks * sum(getattr(count, unit) for count in mine) / rate[unit]
            for unit in rate
            if all(getattr(count, unit) is not None for count in mine)
        }
    return result


def main(args: Arguments) -> int:
    """Prints the counts and the milliseconds of each unit."""
    result: dict[str, Any] = measure.run_info("gpu_cycles", ("jax", "triton"))
    for counts in (triton_counts(args), mosaic_counts(args)):
        name, milliseconds = counts[0].implementation, times(counts, args)
        rows = [
            [
                c.kernel,
                f"{c.tensor:,.0f}",
                "" if c.issue is None else f"{c.issue:,.0f}",
                f"{c.l2:,.0f}",
            ]
            for c in counts
        ]
        header = [name, "tensor cycles", "issue cycles", "bytes from L2"]
        print(measure.table(header, rows))
        print(f"{milliseconds}\n")
        result[name] = {"per_64_positions": [c._asdict() for c in counts], "ms": milliseconds}
    measure.write(args.out, result | {"arguments": dataclasses.asdict(args) | {"out": None}})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
