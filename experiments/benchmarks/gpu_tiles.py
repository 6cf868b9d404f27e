"""Which blocks should the mLSTM's Triton kernels have on a chip?

An answer: for each kernel, its neighbours in the space of blocks; those that spill, take 255
registers or more shared memory than there is are dropped. On a GPU the rest is timed, and the
fastest is what `pallas_kernels/mlstm/triton_tiles.py` should say; without one it is only known what
compiles, and the rule there takes the widest.

    .venv-compile/bin/python experiments/benchmarks/gpu_tiles.py --chip sm_90
    python experiments/benchmarks/gpu_tiles.py --out RESULT.json         # on a GPU
"""

import dataclasses
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
    chip: str | None = None  # of `hardware.ARCHITECTURES`, to compile for; None: time here
    K: int = 256
    V: int = 512
    H: int = 8
    T: int = 8192
    tokens: int = 65_536  # of the whole batch
    dtype: str = "bfloat16"
    kernels: tuple[str, ...] = KERNELS  # whose blocks are varied; "chunk" varies the chunk
    repeats: int = 30
    out: pathlib.Path | None = None  # where to write what was found, as JSON


def neighbours(tile: Tile, kernel: str) -> Iterator[Tile]:
    """The tile, and those that differ from it in the blocks of one kernel."""
    yield tile
    if kernel == "chunk":
        yield from (tile._replace(chunk=chunk) for chunk in CHUNKS if chunk != tile.chunk)
        return
    block = getattr(tile, kernel)
    found = _of_states(block) if isinstance(block, States) else _of_outputs(block, tile.chunk)
    for candidate in dict.fromkeys(found):
        if candidate != block:
            yield tile._replace(**{kernel: candidate})


def _of_states(block: States) -> Iterator[States]:
    for k in {min(block.k, 32), block.k, 2 * block.k}:
        for v in {min(block.v, 64), block.v}:
            for positions in (32, 64):
                for warps in (4, 8):
                    for stages in (2, 3, 4):
                        yield States(k, v, positions, warps, stages)


def _of_outputs(block: Outputs, chunk: int) -> Iterator[Outputs]:
    for rows in (64, 128):
        for others in (16, 32, 64):
            for memory in (32, 64):
                for width in {block.width, max(block.width // 2, 16)}:
                    for warps in (4, 8):
                        for stages in (2, 3):
                            if rows <= chunk:
                                sizes = (rows, others, block.inner, memory, width)
                                yield Outputs(*sizes, warps, stages)


def call(tile: Tile, kernel: str, case: Case):
    """h, or all gradients where `kernel` is one of theirs, at a tile; and its arguments' shapes."""
    kernels = backends.triton()._replace(tile=lambda *_: tile)

    def forward(q, k, v, i, f):
        B, _, H, K = q.shape
        state = (jnp.zeros((B, H, K, case.V)), jnp.zeros((B, H, K)), jnp.zeros((B, H)))
        return api.mlstm(kernels, q, k, v, i, f, state)[0]

    def gradient(dh, *args):
        h, pull = jax.vjp(forward, *args)
        return h, pull(dh)

    return forward if case.part == "forward" else gradient


def examine(args: Arguments, tile: Tile, kernel: str, case: Case) -> dict[str, Any]:
    """Resources of one kernel at a tile, and on a GPU the time of all kernels together."""
    row: dict[str, Any] = {"kernel": kernel, "chunk": tile.chunk}
    if kernel != "chunk":
        row["block"] = getattr(tile, kernel)._asdict()
    fn = call(tile, kernel, case)
    chip = args.chip or gpu.current_chip()
    assert chip is not None
    try:
        if args.chip is not None:
            with common.compiled_for(chip):
                shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
            found = resources.resources(chip, fn, *shapes)
            mine = [one for one in found if kernel == "chunk" or one.name == f"mlstm_{kernel}"]
            row |= {"resources": [one._asdict() for one in mine]}
            row["dropped"] = [why for one in mine for why in resources.exceeded_limits(chip, one)]
        else:
            row |= timed(fn, case, args.repeats)
    except Exception as error:  # whatever a compiler says of a block that it cannot lay out
        row["dropped"] = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    return row


def timed(fn, case: Case, repeats: int) -> dict[str, Any]:
    """Median time of a compiled call on random inputs."""
    inputs = kernel_jax.inputs(case, "triton")
    program = jax.jit(fn).lower(*inputs).compile()
    measure.seconds(lambda: program(*inputs), 10)
    return measure.summary(measure.seconds(lambda: program(*inputs), repeats))


def main(args: Arguments) -> int:
    refusal = gpu.refusal() if args.chip is None else None
    if refusal is not None:
        print(f"gpu_tiles: {refusal}; --chip compiles ahead of time.", file=sys.stderr)
        return 2
    result = []
    for kernel in args.kernels:
        part = "forward" if kernel in ("states", "h") else "gradient"
        sizes = dict(B=max(1, args.tokens // args.T), T=args.T, H=args.H, K=args.K, V=args.V)
        case = Case(op="mlstm", part=part, dtype=args.dtype, **sizes)
        with common.compiled_for(args.chip or gpu.current_chip() or ""):
            tile = triton_tiles.choose(args.K, args.V, jnp.dtype(args.dtype), args.T, None)
        rows = [examine(args, one, kernel, case) for one in neighbours(tile, kernel)]
        rows.sort(key=lambda row: (bool(row.get("dropped")), row.get("median_seconds", 0.0)))
        for row in rows:
            print(json.dumps(row, default=str), flush=True)
        result += rows
    if args.out is not None:
        about = {"date": measure.settings()["date"], "versions": kernel_report.versions()}
        about |= {"arguments": dataclasses.asdict(args), "machine": measure.machine()}
        text = json.dumps({**about, "rows": result}, indent=1, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
