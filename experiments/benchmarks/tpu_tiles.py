"""Which tiles should the mLSTM kernels take on each TPU?

An answer: for every chip and head width the candidates that compile, ranked by what bounds them,
the matrix units or the memory; the best goes into the table of `pallas_kernels/tiles.py`.

    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --out RESULT.json
    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --write RESULT.json

No TPU is needed: kernels are compiled by libtpu and their schedules read. Times are lower bounds
from bundles, clock and traffic; nothing is timed. Candidates that do not fit VMEM are dropped and
listed. Every candidate stores some vectors for lack of registers; how many is in the result.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks import tpu_offline
from pallas_kernels import tiles
from pallas_kernels.mlstm import backends, cost
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_backward import mlstm_backward
from pallas_kernels.mlstm.tpu_forward import mlstm_forward
from pallas_kernels.tiles import CHIPS, MIB, Tile

CANDIDATES = {  # by the side of the matrix unit
    128: [Tile(128, 128, 2), Tile(128, 128, 4), Tile(256, 128, 1), Tile(256, 128, 2)]
    + [Tile(256, 128, 4), Tile(512, 128, 1)],
    256: [Tile(128, 128, 4), Tile(256, 256, 1), Tile(256, 256, 2), Tile(512, 256, 1)]
    + [Tile(512, 256, 2)],
}
BFLOAT16 = jnp.dtype(jnp.bfloat16)
WIDTHS = [(128, 256), (256, 512), (512, 512), (1024, 1024)]
TIE = 1.02  # bounds this near to each other say nothing
LENGTH = 8192  # of the sequences whose traffic is counted
FILE = pathlib.Path(tiles.__file__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    chips: tuple[str, ...] = tuple(CHIPS)
    widths: tuple[tuple[int, int], ...] = tuple(WIDTHS)  # K and V of a head
    out: pathlib.Path | None = None  # where to write what was found, as JSON
    write: pathlib.Path | None = None  # a result: put its best rows into the table


def options_of(tile: Tile, dtype: jnp.dtype = BFLOAT16, *, resets: bool = False) -> Options:
    """Those of a layer at its defaults."""
    return Options(
        kernels=backends.tpu(),
        tile=tile,
        max_state=True,
        normalize=True,
        eps=1e-6,
        normalizer_grad=True,
        resets=resets,
        saved_dtype=dtype,
        lanes=128,
        interpret=False,
    )


def calls(
    tile: Tile, K: int, V: int, dtype: jnp.dtype = BFLOAT16, *, resets: bool = False
) -> dict[str, Any]:
    """The kernels of one head, with the shapes of their arguments and their work."""
    B, H, T = 1, 1, LENGTH
    options = options_of(tile, dtype, resets=resets)
    shape = lambda *sizes, of=dtype: jax.ShapeDtypeStruct(sizes, of)  # noqa: E731
    f32 = functools.partial(shape, of=jnp.float32)
    rows, q, v = f32(B, H, 8, T), shape(B, T, H * K), shape(B, T, H * V)
    C, n, N = f32(B, H, K, V), f32(B, H, 1, K), T // tile.chunk
    saved = (shape(B, H, N, K, V), f32(B, H, N, 1, K))
    return {
        "mlstm_forward": (
            lambda *args: tuple(mlstm_forward(options, *args, save=True)),
            (rows, q, q, v, C, n),
            cost.forward(options, B, T, H, K, V, dtype, save=True),
        ),
        "mlstm_backward": (
            lambda *args: tuple(mlstm_backward(options, *args)),
            (rows, q, q, v, v, v, *saved, C, n),
            cost.backward(options, B, T, H, K, V, dtype),
        ),
    }


def examine(chip: str, tile: Tile, K: int, V: int) -> dict[str, Any]:
    """Bundles and traffic per token and head of both kernels, and the time they bound."""
    row: dict[str, Any] = {"chip": chip, "K": K, "V": V, "tile": list(tile)}
    row["vmem_mib"] = round(tiles.mlstm_vmem_bytes(tile, K, V, BFLOAT16) / MIB, 1)
    if row["vmem_mib"] * MIB > CHIPS[chip].vmem_bytes:
        return {**row, "dropped": "needs more VMEM than there is, by estimate"}
    clock = CHIPS[chip].flops_per_second / CHIPS[chip].flops_per_bundle
    bound = 0.0
    for name, (fn, shapes, work) in calls(tile, K, V).items():
        try:
            tpu_offline.compile_for(chip, fn, *shapes)
            schedule = tpu_offline.schedules()[name]
        except jax.errors.JaxRuntimeError as error:
            tpu_offline.schedules()  # of what failed: not to be taken for the next one's
            return {**row, "dropped": str(error).splitlines()[0]}
        span = tile.chunk * tile.chunks_per_block
        memory = work.bytes_accessed / LENGTH / CHIPS[chip].hbm_bytes_per_second
        compute = schedule.bundles / span / clock
        bound += max(memory, compute)
        row[name] = {
            "bundles_per_token": round(schedule.bundles / span, 2),
            "spills_per_token": round(schedule.spills / span, 2),
            "matrix_share": round(schedule.matrix_share, 3),
            "bytes_per_token": round(work.bytes_accessed / LENGTH),
            "compute_ns": round(1e9 * compute, 2),
            "memory_ns": round(1e9 * memory, 2),
        }
    return {**row, "bound_ns": round(1e9 * bound, 2)}


def best(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], Tile]:
    """For each chip and width the candidate with the lowest bound.

    Of those within `TIE` of it the one with the longest chunks, which keeps the fewest states, and
    then the one with the fewest chunks in a block, which takes the least VMEM.
    """
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "bound_ns" in row:
            groups.setdefault((row["chip"], row["K"], row["V"]), []).append(row)
    found = {}
    for key, group in groups.items():
        lowest = min(row["bound_ns"] for row in group)
        near = [Tile(*row["tile"]) for row in group if row["bound_ns"] <= TIE * lowest]
        found[key] = max(near, key=lambda tile: (tile.chunk, -tile.chunks_per_block))
    return found


def fill_table(rows: list[dict[str, Any]]) -> None:
    """Put the best rows into the source of `tiles.TABLE`."""
    lines = [
        f'    ("{chip}", {K}, {V}): Tile({tile.chunk}, {tile.strip}, {tile.chunks_per_block}),\n'
        for (chip, K, V), tile in sorted(best(rows).items())
    ]
    source = FILE.read_text(encoding="utf-8")
    table = "TABLE = {\n" + "".join(lines) + "}\n"
    FILE.write_text(re.sub(r"TABLE = \{\n.*?\n\}\n", table, source, count=1, flags=re.DOTALL))


def main(args: Arguments) -> int:
    if args.write is not None:
        fill_table(json.loads(args.write.read_text(encoding="utf-8"))["rows"])
        return 0
    tpu_offline.start(schedules=True)
    rows = []
    for chip in args.chips:
        for K, V in args.widths:
            for tile in CANDIDATES[CHIPS[chip].matrix_unit]:
                rows.append(examine(chip, tile, K, V))
                print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        tpu_offline.write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
