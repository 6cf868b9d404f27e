"""Searches the neighborhood of the default block sizes of the mLSTM Triton kernels.

On a GPU all neighbors are timed, and the fastest one belongs in
`pallas_kernels/mlstm/triton_tiles.py`. With `--chip` they are only compiled, and those that spill
or exceed the shared memory are marked as dropped.

    .venv-compile/bin/python experiments/benchmarks/gpu_tiles.py --chip sm_90
    python experiments/benchmarks/gpu_tiles.py --out RESULT.json         # on a GPU
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks import kernel_jax, kernel_report, measure
from experiments.benchmarks.kernel_cases import Case
from pallas_kernels import common, gpu
from pallas_kernels.aot import resources
from pallas_kernels.mlstm import api, backends, triton_tiles
from pallas_kernels.mlstm.triton_tiles import Outputs, States, Tile

KERNELS = ("states", "h", "dq", "dk", "dv")
CHUNKS = (64, 128, 256, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the search for GPU blocks."""

    chip: str | None = None  # AOT target, a key of `hardware.ARCHITECTURES`; None: time on this GPU
    K: int = 256
    V: int = 512
    H: int = 8
    T: int = 8192
    tokens: int = 65_536  # B * T
    dtype: str = "bfloat16"
    kernels: tuple[str, ...] = KERNELS  # whose blocks are varied; "chunk" varies the chunk
    repeats: int = 30
    out: pathlib.Path | None = None  # JSON file to write the result to


def neighbors(tile: Tile, kernel: str) -> Iterator[Tile]:
    """The tile itself, and tiles that differ in the blocks of one kernel, or in the chunk."""
    yield tile
    if kernel == "chunk":
        yield from (tile._replace(chunk=chunk) for chunk in CHUNKS if chunk != tile.chunk)
        return
    block = getattr(tile, kernel)
    is_states = isinstance(block, States)
    blocks = _states_blocks(block) if is_states else _outputs_blocks(block, tile.chunk)
    for candidate in dict.fromkeys(blocks):
        if candidate != block:
            yield tile._replace(**{kernel: candidate})


def _states_blocks(block: States) -> Iterator[States]:
    for k in {min(block.k, 32), block.k, 2 * block.k}:
        for v in {min(block.v, 64), block.v}:
            for positions in (32, 64):
                for warps in (4, 8):
                    for stages in (2, 3, 4):
                        yield States(k, v, positions, warps, stages)


def _outputs_blocks(block: Outputs, chunk: int) -> Iterator[Outputs]:
    choices = itertools.product(
        (64, 128),  # positions
        (32, 64),  # other positions
        sorted({block.inner, max(block.inner // 2, 64), 2 * block.inner}),
        (block.state_inner,),
        sorted({block.width, max(block.width // 2, 16)}),
        (4, 8),  # warps
        (2, 3),  # stages
    )
    return (Outputs(*choice) for choice in choices if choice[0] <= chunk)


def tile_function(tile: Tile, kernel: str, case: Case):
    """The mLSTM with the given tile: h for the part "forward", else h and all gradients."""
    kernels = backends.triton()._replace(tile=lambda *_: tile)

    def forward(q, k, v, i, f):
        B, _, H, K = q.shape
        state = (jnp.zeros((B, H, K, case.V)), jnp.zeros((B, H, K)), jnp.zeros((B, H)))
        return api.mlstm(kernels, q, k, v, i, f, state)[0]

    def gradient(dh, *args):
        h, pullback = jax.vjp(forward, *args)
        return h, pullback(dh)

    return forward if case.part == "forward" else gradient


def evaluate(args: Arguments, tile: Tile, kernel: str, case: Case) -> dict[str, Any]:
    """Resources of one kernel with a tile, or on a GPU the time of all kernels together."""
    record: dict[str, Any] = {"kernel": kernel, "chunk": tile.chunk}
    if kernel != "chunk":
        record["block"] = getattr(tile, kernel)._asdict()
    fn = tile_function(tile, kernel, case)
    chip = args.chip or gpu.current_chip()
    assert chip is not None
    try:
        if args.chip is not None:
            with common.compiled_for(chip):
                shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
            usages = resources.resources(chip, fn, *shapes)
            if kernel != "chunk":
                usages = [usage for usage in usages if usage.name == f"mlstm_{kernel}"]
            record["resources"] = [usage._asdict() for usage in usages]
            record["dropped"] = [
                limit for usage in usages for limit in resources.exceeded_limits(chip, usage)
            ]
        else:
            record |= time_call(fn, case, args.repeats)
    except Exception as error:  # compilers raise various types for unsupported blocks
        record["dropped"] = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    return record


def time_call(fn, case: Case, repeats: int) -> dict[str, Any]:
    """Times a compiled call on random inputs."""
    inputs = kernel_jax.inputs(case, "triton")
    program = jax.jit(fn).lower(*inputs).compile()
    measure.seconds(lambda: program(*inputs), 10)
    return measure.summary(measure.seconds(lambda: program(*inputs), repeats))


def main(args: Arguments) -> int:
    """Evaluates the neighbors of the default tile for every kernel, and prints the best first."""
    refusal = gpu.refusal() if args.chip is None else None
    if refusal is not None:
        print(f"gpu_tiles: {refusal}; use --chip to compile ahead of time.", file=sys.stderr)
        return 2
    if args.chip is not None:
        jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    result = []
    for kernel in args.kernels:
        part = "forward" if kernel in ("states", "h") else "gradient"
        sizes = dict(B=max(1, args.tokens // args.T), T=args.T, H=args.H, K=args.K, V=args.V)
        case = Case(op="mlstm", part=part, dtype=args.dtype, **sizes)
        with common.compiled_for(args.chip or gpu.current_chip() or ""):
            tile = triton_tiles.choose(args.K, args.V, jnp.dtype(args.dtype), args.T, None)
        records = [evaluate(args, neighbor, kernel, case) for neighbor in neighbors(tile, kernel)]
        records.sort(key=lambda r: (bool(r.get("dropped")), r.get("median_seconds", 0.0)))
        for record in records:
            print(json.dumps(record, default=str), flush=True)
        result += records
    if args.out is not None:
        info = {"date": measure.date_and_flags()["date"], "versions": kernel_report.versions()}
        info |= {"arguments": dataclasses.asdict(args), "machine": measure.machine()}
        text = json.dumps({**info, "records": result}, indent=1, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
