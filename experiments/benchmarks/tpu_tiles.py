"""Which tiles should the mLSTM kernels take on each TPU?

An answer: for every chip and head width the candidates that compile, ranked by what bounds them,
the matrix units or the memory; the best go into `pallas_kernels/mlstm/tpu_tiles.json`.

    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --out RESULT.json
    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --write RESULT.json

No TPU is needed: libtpu compiles the kernels ahead of time and their schedules are read. Times are
lower bounds from bundles, clock and traffic; nothing is timed. Candidates that do not fit VMEM are
dropped and listed. Every candidate spills some vector registers; how many is in the result.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from pallas_kernels.aot import compiler, schedules
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.mlstm import backends, cost, tpu_tiles
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_backward import mlstm_backward
from pallas_kernels.mlstm.tpu_forward import mlstm_forward
from pallas_kernels.mlstm.tpu_tiles import Tile

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
KERNELS = ("mlstm_forward", "mlstm_backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    chips: tuple[str, ...] = tuple(TPUS)
    widths: tuple[tuple[int, int], ...] = tuple(WIDTHS)  # K and V of a head
    out: pathlib.Path | None = None  # where to write the result, as JSON
    write: pathlib.Path | None = None  # a result: put its best rows into the table


def options_of(tile: Tile, *, resets: bool = False) -> Options:
    """Those of a layer at its defaults."""
    return Options(
        kernels=backends.tpu(),
        tile=tile,
        max_state=True,
        normalize=True,
        eps=1e-6,
        resets=resets,
        lanes=128,
        interpret=False,
    )


def calls(
    tile: Tile, K: int, V: int, dtype: jnp.dtype = BFLOAT16, *, resets: bool = False
) -> dict[str, Any]:
    """The kernels of one head, with the shapes of their arguments and their work."""
    B, H, T = 1, 1, LENGTH
    options = options_of(tile, resets=resets)
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
    """Bundles and traffic per token and head of both kernels."""
    row: dict[str, Any] = {"chip": chip, "K": K, "V": V, "tile": list(tile)}
    row["vmem_mib"] = round(tpu_tiles.vmem_bytes(tile, K, V, BFLOAT16) / MIB, 1)
    if row["vmem_mib"] * MIB > TPUS[chip].vmem_bytes:
        return {**row, "dropped": "needs more VMEM than there is, by estimate"}
    for name, (fn, shapes, work) in calls(tile, K, V).items():
        try:
            compiler.compile_for(chip, fn, *shapes)
            schedule = schedules.read()[name]
        except jax.errors.JaxRuntimeError as error:
            schedules.read()  # of what failed: not to be taken for the next one's
            return {**row, "dropped": str(error).splitlines()[0]}
        span = tile.chunk * tile.chunks_per_block
        row[name] = {
            "bundles_per_token": round(schedule.bundles / span, 2),
            "spills_per_token": round(schedule.spills / span, 2),
            "matrix_share": round(schedule.matrix_share, 3),
            "bytes_per_token": round(work.bytes_accessed / LENGTH),
        }
    return row


def bound_ns(row: dict[str, Any]) -> float:
    """The least time per token and head, forward and backward, on one core of the chip."""
    chip = TPUS[row["chip"]]
    seconds = sum(
        max(
            row[name]["bytes_per_token"] / chip.core_hbm_bandwidth,
            row[name]["bundles_per_token"] / chip.clock,
        )
        for name in KERNELS
    )
    return round(1e9 * seconds, 2)


def best(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], Tile]:
    """For each chip and width the candidate with the lowest bound.

    Of those within `TIE` of it the one with the longest chunks, which saves the fewest states, and
    then the one with the fewest chunks in a block, which takes the least VMEM.
    """
    groups: dict[tuple[str, int, int], list[tuple[float, Tile]]] = {}
    for row in rows:
        if "dropped" not in row:
            candidates = groups.setdefault((row["chip"], row["K"], row["V"]), [])
            candidates.append((bound_ns(row), Tile(*row["tile"])))
    return {key: _best(candidates) for key, candidates in groups.items()}


def _best(candidates: list[tuple[float, Tile]]) -> Tile:
    lowest = min(bound for bound, _ in candidates)
    near = [tile for bound, tile in candidates if bound <= TIE * lowest]
    return max(near, key=lambda tile: (tile.chunk, -tile.chunks_per_block))


def write_table(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """The best rows as the JSON that `tpu_tiles.read_table` reads, a line each."""
    lines = [
        json.dumps({"chip": chip, "K": K, "V": V, **tile._asdict()})
        for (chip, K, V), tile in sorted(best(rows).items())
    ]
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")


def write_result(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """A result as JSON, with the versions and the date it belongs to."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    result = {"date": f"{datetime.date.today()}", "versions": versions, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(args: Arguments) -> int:
    if args.write is not None:
        rows = json.loads(args.write.read_text(encoding="utf-8"))["rows"]
        write_table(tpu_tiles.TABLE_FILE, rows)
        return 0
    schedules.start()
    rows = []
    for chip in args.chips:
        for K, V in args.widths:
            for tile in CANDIDATES[TPUS[chip].matrix_unit]:
                rows.append(examine(chip, tile, K, V))
                print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        write_result(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
