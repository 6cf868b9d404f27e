"""Counts what the mLSTM kernels need of an H200: matrix units, schedulers and the L2 cache.

    .venv-compile/bin/python experiments/benchmarks/gpu_cycles.py
    .venv-compile/bin/python experiments/benchmarks/gpu_cycles.py --K 128 --V 256 --out RESULT.json

No GPU is needed. Kernels are compiled for sm_90 and disassembled: instructions of each loop, times
its trips, and cycles of the matrix units. Those of Mosaic GPU kernels are counted from their
blocks. Bytes are what programs load from the L2 cache, and the sizes of operands and results.

A count is a lower bound for each unit, not a time: it excludes waits, and only a device shows which
units overlap.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_tiles, kernel_jax, measure
from experiments.benchmarks.kernel_cases import Case
from pallas_kernels import common
from pallas_kernels.aot import mosaic, resources, sass
from pallas_kernels.hardware import GPUS
from pallas_kernels.mlstm import mosaic_tiles, triton_tiles
from pallas_kernels.mlstm.chunks import chunk_length
from pallas_kernels.mlstm.mosaic_tiles import Outputs, States

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
    issue: float | None  # cycles of each of its four schedulers; None: not counted
    l2: float  # bytes that programs load from the L2 cache
    hbm: float = 0.0  # bytes, if each array is read or written once


def with_hbm(counts: list[Count], args: Arguments) -> list[Count]:
    """The counts with `hbm`."""
    L = chunk_length(args.K, args.V, args.T, None, 64)
    return [count._replace(hbm=_hbm_bytes(count.kernel, args.K, args.V, L)) for count in counts]


def _hbm_bytes(kernel: str, K: int, V: int, L: int) -> float:
    state, gate, gates = 2 * K * V * 64 / L, 4 * 64, 4 * 64 * 8
    tokens = {
        "states": K + V,
        "dstates": K + V,
        "h": 2 * K + 2 * V,
        "dq": 3 * K + 2 * V,  # k, dq and, for its sums, q
        "dk": 3 * K + 2 * V,
        "dv": 2 * K + 2 * V,
        "gates_backward": 2 * V,
    }
    states = {"states": 1, "h": 1, "dstates": 2, "dq": 1, "dk": 1, "dv": 1}
    others = {
        "chunk_maps": 2 * gate,
        "gates": 2 * gate + gates,
        "gates_backward": 3 * gate + gates,
        "gate_grads": 4 * gate,
        "h": gates + gate,
    }
    other = others.get(kernel, gates)
    return 2 * 64 * tokens.get(kernel, 0) + state * states.get(kernel, 0) + other


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
        # Only `gates_backward` has a loop with several iterations, over the columns of h and dh.
        iterations = sizes["V"] // sizes["BV"] if name == "gates_backward" else 1
        programs, trips = 64 / L, [1] + [iterations] * (len(loops) - 1)
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
    """Iterations of each loop of `outputs`: over the state, unless unrolled, and over positions."""
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
    groups, blocks = tile.states.groups, tile.states.blocks
    for name in ("states", "dstates"):
        l2 = 2 * 64 * 64 * (groups + blocks) * (K // groups) * (V // blocks)
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


def with_issue(counts: list[Count], args: Arguments) -> list[Count]:
    """Counts of the Mosaic GPU kernels, with the instructions that they issue."""
    case = Case(op="mlstm", part="gradient", dtype="bfloat16", B=1, T=1024, H=8, K=args.K, V=args.V)
    tile = mosaic_tiles.choose(args.K, args.V, jnp.dtype("bfloat16"), args.T, None)
    with common.compiled_for("sm_90"):
        shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "mosaic_gpu"))
    compiled = mosaic.resources("sm_90", kernel_jax.timed_function(case, "mosaic_gpu"), *shapes)
    loops = {x.name.removeprefix("mlstm_"): sass.loops(mosaic.disassemble(x)) for x in compiled}
    result = []
    for count in counts:
        if "states" in count.kernel:
            issue = _issue_of_states(loops[count.kernel], tile.states, args, tile.chunk)
        else:
            sizes = (args.V, args.K) if count.kernel in ("dq", "dk") else (args.K, args.V)
            block = tile.to_k if count.kernel in ("dq", "dk") else tile.to_v
            issue = _issue_of_outputs(loops[count.kernel], block, *sizes, tile.chunk)
        result.append(count._replace(issue=issue))
    return result


def _issue_of_states(loops: list[sass.Loop], block: States, args: Arguments, L: int) -> float:
    """Instructions per 64 positions of a scheduler, which has a warp of each group."""
    # The loop of copies, and those over chunks and in it over blocks of positions. One warp copies.
    _, copies, chunk, positions = (loop.instructions for loop in loops)
    groups = args.K // 64 * args.V // (64 * block.blocks)
    return groups * (positions + chunk * 64 / L + copies / 4 / block.groups)


def _issue_of_outputs(loops: list[sass.Loop], block: Outputs, A: int, W: int, L: int) -> float:
    """As `_issue_of_states`, for contracted width `A` and all columns `W` of a result."""
    others, items, in_positions = (L / 64 - 1) / 2, A // 64 // block.inner, False
    trips = [1.0]  # outside of loops is the block of the own positions, apart from its products
    for n, loop in enumerate(loops[1:], 1):
        children = n + 1 < len(loops) and loops[n + 1].depth > loop.depth
        if loop.depth > 1:
            # Over the contracted width: its blocks, or the items of several blocks.
            times = A / 64 if loop.product_cycles else items
            trips.append(times * (others if in_positions else 1))
            continue
        in_positions = children and loop.product_cycles > 0
        if in_positions:
            trips.append(others)
        elif not children and not loop.product_cycles:
            copied = A / 64 + (others + 1) * (items + 1)
            trips.append(copied / 4 / block.groups if n == 1 else 0)  # else it skips positions
        else:
            trips.append(items if children else A / 64)
    splits = W // (64 * block.blocks)
    return splits * sum(n * loop.instructions for n, loop in zip(trips, loops, strict=True))


def times(counts: list[Count], args: Arguments) -> dict[str, dict[str, float]]:
    """Milliseconds of each unit for the forward pass, and for both directions."""
    blocks = args.tokens * args.H / 64
    rate = {"tensor": GPUS["H200"].multiprocessors * CLOCK, "l2": L2_BANDWIDTH}
    rate |= {"issue": rate["tensor"], "hbm": GPUS["H200"].hbm_bandwidth}
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
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    result: dict[str, Any] = measure.run_info("gpu_cycles", ("jax", "triton"))
    for counts in (triton_counts(args), with_issue(mosaic_counts(args), args)):
        counts = with_hbm(counts, args)
        name, milliseconds = counts[0].implementation, times(counts, args)
        lines = [
            [
                c.kernel,
                f"{c.tensor:,.0f}",
                "" if c.issue is None else f"{c.issue:,.0f}",
                f"{c.l2:,.0f}",
                f"{c.hbm:,.0f}",
            ]
            for c in counts
        ]
        header = [name, "tensor cycles", "issue cycles", "bytes from L2", "of HBM"]
        print(measure.table(header, lines))
        print(f"{milliseconds}\n")
        result[name] = {"per_64_positions": [c._asdict() for c in counts], "ms": milliseconds}
    measure.write(args.out, result | {"arguments": dataclasses.asdict(args) | {"out": None}})
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
