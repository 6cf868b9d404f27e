"""Searches for the tiles of the mLSTM TPU kernels, by chip and head width.

Candidates are compiled ahead of time by libtpu, so no TPU is needed, and nothing is timed. They are
ranked by a lower bound on their time, the larger of scheduled bundles / clock rate and HBM traffic
/ bandwidth. `--write` stores the best ones in `pallas_kernels/mlstm/tpu_tiles.json`.

    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --out RESULT.json
    .venv-compile/bin/python experiments/benchmarks/tpu_tiles.py --write RESULT.json ...

The result also lists the candidates that do not compile, with the reason, and the register spills
of the others.
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

from experiments.benchmarks import measure
from pallas_kernels.aot import compiler, schedules
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.mlstm import backends, cost, tpu_tiles
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_backward import mlstm_backward
from pallas_kernels.mlstm.tpu_forward import mlstm_forward
from pallas_kernels.mlstm.tpu_layout import Heads, num_sharing
from pallas_kernels.mlstm.tpu_tiles import Tile

CANDIDATES = {  # by the side of the MXU
    128: [Tile(128, 128, 2), Tile(128, 128, 4), Tile(256, 128, 1), Tile(256, 128, 2)]
    + [Tile(256, 128, 4), Tile(512, 128, 1)],
    256: [Tile(128, 128, 4), Tile(256, 256, 1), Tile(256, 256, 2), Tile(512, 256, 1)]
    + [Tile(512, 256, 2)],
}
BFLOAT16 = jnp.dtype(jnp.bfloat16)
WIDTHS = [(64, 128), (128, 256), (256, 512), (512, 512), (1024, 1024)]
TIE = 1.02  # bounds within this factor count as equal
LENGTH = 8192  # T of the sequences whose traffic is counted
KERNELS = ("mlstm_forward", "mlstm_backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the search for TPU tiles."""

    chips: tuple[str, ...] = tuple(TPUS)
    widths: tuple[tuple[int, int], ...] = tuple(WIDTHS)  # K and V of a head
    out: pathlib.Path | None = None  # JSON file to write the result to
    write: tuple[pathlib.Path, ...] = ()  # result files whose best tiles replace the table


def options_of(tile: Tile, *, resets: bool = False) -> Options:
    """Kernel options of a layer with default settings in training, from the initial state."""
    return Options(
        kernels=backends.tpu(),
        tile=tile,
        forget_gate="sigmoid",
        max_state=True,
        normalize=True,
        eps=1e-6,
        resets=resets,
        lanes=128,
        interpret=False,
        zero_state=True,
    )


def calls(
    tile: Tile, K: int, V: int, dtype: jnp.dtype = BFLOAT16, *, resets: bool = False
) -> dict[str, Any]:
    """For both kernels on a block of heads: the function, shapes of its arguments, and its cost."""
    count = num_sharing(K, 128)
    heads, B, H, T = Heads(count, K, V), 1, count, LENGTH
    options = options_of(tile, resets=resets)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    gates, q, v = f32((B, H, 8, T)), array((B, T, H * K)), array((B, T, H * V))
    N = T // tile.chunk
    starts = (array((B, 1, N, H * K, V)), f32((B, 1, N, 1, H * K)))
    return {
        "mlstm_forward": (
            lambda *args: tuple(mlstm_forward(options, *args, C=None, n=None, save=True)),
            (gates, q, q, v),
            cost.forward(options, heads, B, T, H, dtype, save=True),
        ),
        "mlstm_backward": (
            lambda *args: tuple(mlstm_backward(options, *args, dC=None, dn=None)),
            (gates, q, q, v, v, v, *starts),
            cost.backward(options, heads, B, T, H, dtype, given=False),
        ),
    }


def evaluate(chip: str, tile: Tile, K: int, V: int) -> dict[str, Any]:
    """Bundles, spills and traffic of both kernels, per token and head; or why they are dropped."""
    record: dict[str, Any] = {"chip": chip, "K": K, "V": V, "tile": list(tile)}
    record["vmem_mib"] = round(tpu_tiles.vmem_bytes(tile, K, V, BFLOAT16) / MIB, 1)
    if record["vmem_mib"] * MIB > TPUS[chip].vmem_bytes:
        return {**record, "dropped": "needs more VMEM than the chip has, according to `vmem_bytes`"}
    for name, (fn, shapes, work) in calls(tile, K, V).items():
        try:
            compiler.compile_for(chip, fn, *shapes)
            schedule = schedules.read()[name]
        except jax.errors.JaxRuntimeError as error:
            schedules.read()  # discards what the failed compilation wrote
            return {**record, "dropped": str(error).splitlines()[0]}
        num_heads = num_sharing(K, 128)
        tokens = tile.chunk * tile.chunks_per_block * num_heads
        record[name] = {
            "bundles_per_token": round(schedule.bundles / tokens, 2),
            "spills_per_token": round(schedule.spills / tokens, 2),
            "matrix_share": round(schedule.matrix_share, 3),
            "bytes_per_token": round(work.bytes_accessed / num_heads / LENGTH),
        }
    return record


def bound_ns(record: dict[str, Any]) -> float:
    """Lower bound on the time of forward and backward, per token and head, on one core."""
    chip = TPUS[record["chip"]]
    seconds = sum(
        max(
            record[name]["bytes_per_token"] / chip.core_hbm_bandwidth,
            record[name]["bundles_per_token"] / chip.clock,
        )
        for name in KERNELS
    )
    return round(1e9 * seconds, 2)


def best_tiles(records: list[dict[str, Any]]) -> dict[tuple[str, int, int], Tile]:
    """The candidate with the lowest bound for each (chip, K, V).

    Ties, within a factor of `TIE`, go to the longest chunk, which saves the fewest states, then to
    the fewest chunks per block, which need the least VMEM.
    """
    groups: dict[tuple[str, int, int], list[tuple[float, Tile]]] = {}
    for record in records:
        if "dropped" not in record:
            candidates = groups.setdefault((record["chip"], record["K"], record["V"]), [])
            candidates.append((bound_ns(record), Tile(*record["tile"])))
    return {key: _best(candidates) for key, candidates in groups.items()}


def _best(candidates: list[tuple[float, Tile]]) -> Tile:
    lowest = min(bound for bound, _ in candidates)
    tied = [tile for bound, tile in candidates if bound <= TIE * lowest]
    return max(tied, key=lambda tile: (tile.chunk, -tile.chunks_per_block))


def write_table(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes the best tiles as JSON for `tpu_tiles.read_table`, one per line."""
    lines = [
        json.dumps({"chip": chip, "K": K, "V": V, **tile._asdict()})
        for (chip, K, V), tile in sorted(best_tiles(records).items())
    ]
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")


def write_result(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes a result as JSON, with versions and date."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    result = {"date": f"{datetime.date.today()}", "versions": versions, "records": records}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(args: Arguments) -> int:
    """Evaluates all candidates, or writes the table from an earlier result."""
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    if args.write:
        records = [record for path in args.write for record in measure.read_records(path)]
        write_table(tpu_tiles.TABLE_FILE, records)
        return 0
    schedules.start()
    records = []
    for chip in args.chips:
        for K, V in args.widths:
            for tile in CANDIDATES[TPUS[chip].matrix_unit]:
                records.append(evaluate(chip, tile, K, V))
                print(json.dumps(records[-1]), flush=True)
    if args.out is not None:
        write_result(args.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
