"""How many cycles do the TPU kernels take, by the compiler's own schedule?

An answer: a table of kernels and chips with scheduled bundles, which `tests/compile` holds the
kernels to; ten per cent more fail it.

    .venv-compile/bin/python experiments/benchmarks/tpu_schedules.py \
        --out tests/compile/schedules.json

No TPU is needed. The unit of an mLSTM kernel is one token of one head, that of an sLSTM kernel one
step of one head, of either decode kernel one head. A kernel over time with an inner loop (sLSTM)
has its body counted once, together with what starts a block.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks import tpu_tiles
from experiments.benchmarks.tpu_tiles import BFLOAT16
from pallas_kernels import common
from pallas_kernels.aot import compiler, schedules
from pallas_kernels.hardware import TPUS
from pallas_kernels.mlstm import gates
from pallas_kernels.mlstm import tpu_decode as mlstm_decode
from pallas_kernels.mlstm import tpu_tiles as mlstm_tiles
from pallas_kernels.slstm import backends
from pallas_kernels.slstm import tpu_decode as slstm_decode
from pallas_kernels.slstm.options import Inputs, Options
from pallas_kernels.slstm.tpu_kernels import slstm_backward, slstm_forward
from pallas_kernels.tpu import SCOPED_BYTES


class Case(NamedTuple):
    """One kernel at one size."""

    kernel: str
    size: str
    tile: str
    fn: Callable[..., Any]
    shapes: tuple
    units: int  # tokens, steps or heads that one pass through the schedule stands for
    all_units: int  # of the whole call, by which its traffic is divided


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    chips: tuple[str, ...] = tuple(TPUS)
    quick: bool = False  # only the head width of the large models
    out: pathlib.Path | None = None  # where to write the result, as JSON


def shape(*of: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(of, dtype)


def cases(chip: str, *, quick: bool = False) -> list[Case]:
    """Everything that is held to a budget on one chip."""
    widths = [(256, 512)] if quick else tpu_tiles.WIDTHS
    found = [case for K, V in widths for case in mlstm_cases(chip, K, V)]
    found += [case for K in ([256] if quick else [256, 512]) for case in slstm_cases(chip, K)]
    return [*found, mlstm_step(256, 512), slstm_step(chip, 256)]


def mlstm_cases(chip: str, K: int, V: int) -> list[Case]:
    """Forward with everything saved, and backward, at the tile of the table."""
    if mlstm_tiles.refusal(K, V, BFLOAT16, chip=chip) is not None:
        return []
    tile = mlstm_tiles.choose(K, V, BFLOAT16, 8192, None, chip)
    span = tile.chunk * tile.chunks_per_block
    words = f"chunk={tile.chunk} strip={tile.strip} blocks={tile.chunks_per_block}"
    return [
        Case(name, f"K={K} V={V}", words, fn, shapes, span, tpu_tiles.LENGTH)
        for name, (fn, shapes, _) in tpu_tiles.calls(tile, K, V).items()
    ]


def slstm_cases(chip: str, K: int, B: int = 8, H: int = 4, T: int = 256) -> list[Case]:
    """Forward with everything saved, and backward."""
    options = slstm_options(chip, B, T, H, K)
    blocks = options.tile.blocks
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    words = functools.partial(shape, H, 1, dtype=jnp.uint32)
    x, b, state = bf16(T, H, B, 4 * K), shape(H, 4 * K), shape(4, H, B, K)
    h, gates, seen = bf16(T, H, B, K), shape(T, H, B, 4 * K), (shape(T, H, B, K),) * 3

    def forward(*args):
        return slstm_forward(options, Inputs(*args, flags=None), save=True)

    def backward(*args):
        return slstm_backward(options, *args, flags=None)

    size, tile = f"B={B} K={K}", f"heads={blocks.heads} steps={blocks.steps}"
    units = blocks.heads * blocks.unroll
    given = (x, words(K // 2, 4 * K), b, state)
    after = (gates, words(2 * K, K), seen, h, state)
    return [
        Case("slstm_forward", size, tile, forward, given, units, T * H),
        Case("slstm_backward", size, tile, backward, after, units, T * H),
    ]


def slstm_options(chip: str, B: int, T: int, H: int, K: int) -> Options:
    """Those of a layer at its defaults."""
    kernels = backends.tpu()
    with common.compiled_for(chip):
        tile = kernels.tile(B, T, H, K, BFLOAT16)
    return Options(kernels, tile, "sigmoid", save_gates=True, interpret=False, target=chip)


def mlstm_step(K: int, V: int, B: int = 8, H: int = 8) -> Case:
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    q, v, gate = bf16(B, 1, H, K), bf16(B, 1, H, V), shape(B, 1, H)
    state = (shape(B, H, K, V), shape(B, H, K), shape(B, H))
    options = tpu_tiles.options_of(mlstm_tiles.Tile(128, 128, 1))  # a step is not cut

    def step(q, k, v, log_i, log_f, state):
        log_gates = gates.LogGates(log_i, log_f, None)
        return mlstm_decode.step(options, q, k, v, log_gates, state)

    shapes = (q, q, v, gate, gate, state)
    return Case("mlstm_decode", f"K={K} V={V}", "", step, shapes, 1, B * H)


def slstm_step(chip: str, K: int, B: int = 8, H: int = 4) -> Case:
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    options = slstm_options(chip, B, 1, H, K)
    options = options._replace(tile=options.tile._replace(vmem_bytes=SCOPED_BYTES))
    shapes = (bf16(B, 4, H, K), bf16(H, K, 4, K), shape(H, 4, K), (shape(B, H, K),) * 4)

    def step(x, r, b, state):
        state = slstm_decode.step(options, x, r, b, state, None)
        return state[2].astype(x.dtype), state

    return Case("slstm_decode", f"B={B} K={K}", "", step, shapes, 1, H)


def examine(chip: str, case: Case) -> dict[str, Any]:
    """One row of the table."""
    donate = len(case.shapes) - 1 if case.kernel.endswith("decode") else None
    compiled = compiler.compile_for(chip, case.fn, *case.shapes, donate=donate)
    schedule = schedules.read()[case.kernel]
    moved = compiler.bytes_accessed(compiled)[case.kernel]
    return {
        "kernel": case.kernel,
        "chip": chip,
        "size": case.size,
        "tile": case.tile,
        "bundles": round(schedule.bundles / case.units, 2),
        "spills": round(schedule.spills / case.units, 2),
        "matrix_share": round(schedule.matrix_share, 3),
        "hbm_bytes": round(moved / case.all_units),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per kernel and size; by chip bundles, spills and share of matrix units."""
    chips = [chip for chip in TPUS if any(row["chip"] == chip for row in rows)]
    lines = ["| kernel | size | " + " | ".join(chips) + " | HBM bytes |"]
    lines.append("|---" * (3 + len(chips)) + "|")
    for kernel, size in dict.fromkeys((row["kernel"], row["size"]) for row in rows):
        found = {r["chip"]: r for r in rows if (r["kernel"], r["size"]) == (kernel, size)}
        moved = sorted({row["hbm_bytes"] for row in found.values()})
        cells = [_cell(found.get(chip)) for chip in chips]
        span = " to ".join(f"{x:,}" for x in dict.fromkeys((moved[0], moved[-1])))
        lines.append("| " + " | ".join([f"`{kernel}`", size, *cells, span]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['bundles']:g} ({row['spills']:g}, {row['matrix_share']:.0%})"


def main(args: Arguments) -> int:
    schedules.start()
    rows = []
    for chip in args.chips:
        for case in cases(chip, quick=args.quick):
            rows.append(examine(chip, case))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows), file=sys.stderr)
    if args.out is not None:
        tpu_tiles.write_result(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
