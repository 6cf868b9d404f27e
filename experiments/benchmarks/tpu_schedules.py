"""Counts the scheduled bundles of the TPU kernels, by kernel and chip.

The result is the budget of `tests/compile/test_schedules.py`, which fails if a kernel exceeds its
scheduled bundles or HBM traffic by more than 10 %.

    .venv-compile/bin/python experiments/benchmarks/tpu_schedules.py \
        --out tests/compile/schedules.json

No TPU is needed. Bundles are per token and head for the mLSTM, and per step and head, of a batch of
8, for the sLSTM. The schedule contains the body of the sLSTM's loop over time once, together with
the prologue of a block.
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
from pallas_kernels.mlstm.tpu_layout import num_sharing
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
    shapes: tuple  # of the arguments of `fn`
    units: int  # (token, head) pairs per pass through the schedule
    call_units: int  # the same for the entire call, by which its HBM traffic is divided


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    chips: tuple[str, ...] = tuple(TPUS)
    quick: bool = False  # only the head sizes of the largest and the smallest models
    out: pathlib.Path | None = None  # JSON file to write the result to


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def cases(chip: str, *, quick: bool = False) -> list[Case]:
    """All cases with a budget on one chip."""
    widths = [(64, 128), (256, 512)] if quick else tpu_tiles.WIDTHS
    sequences = [case for K, V in widths for case in mlstm_cases(chip, K, V)]
    sequences += [case for K in ([256] if quick else [256, 512]) for case in slstm_cases(chip, K)]
    return [*sequences, mlstm_decode_case(256, 512), slstm_decode_case(chip, 256)]


def mlstm_cases(chip: str, K: int, V: int) -> list[Case]:
    """Forward (with residuals saved) and backward, at the default tile."""
    if mlstm_tiles.refusal(K, V, BFLOAT16, chip=chip) is not None:
        return []
    tile = mlstm_tiles.choose(K, V, BFLOAT16, 8192, None, chip)
    heads = num_sharing(K, common.LANES)
    block_tokens, call_tokens = tile.chunk * tile.chunks_per_block * heads, tpu_tiles.LENGTH * heads
    label = f"chunk={tile.chunk} strip={tile.strip} blocks={tile.chunks_per_block}"
    return [
        Case(name, f"K={K} V={V}", label, fn, shapes, block_tokens, call_tokens)
        for name, (fn, shapes, _) in tpu_tiles.calls(tile, K, V).items()
    ]


def slstm_cases(chip: str, K: int, B: int = 8, H: int = 4, T: int = 256) -> list[Case]:
    """Forward (with residuals saved) and backward."""
    options = slstm_options(chip, B, T, H, K)
    blocks = options.tile.blocks
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    packed = functools.partial(shape, H, 1, dtype=jnp.uint32)  # weights: two bfloat16 in 32 bits
    x, b, state = bf16(T, H, B, 4 * K), shape(H, 4 * K), shape(4, H, B, K)
    h, gates, states = bf16(T, H, B, K), shape(T, H, B, 4 * K), (shape(T, H, B, K),) * 3

    def forward(*args):
        return slstm_forward(options, Inputs(*args, flags=None), save=True)

    def backward(*args):
        return slstm_backward(options, *args, flags=None)

    size, tile = f"B={B} K={K}", f"heads={blocks.heads} steps={blocks.steps}"
    units = blocks.heads * blocks.unroll
    forward_inputs = (x, packed(K // 2, 4 * K), b, state)
    backward_inputs = (gates, packed(2 * K, K), states, h, state)
    return [
        Case("slstm_forward", size, tile, forward, forward_inputs, units, T * H),
        Case("slstm_backward", size, tile, backward, backward_inputs, units, T * H),
    ]


def slstm_options(chip: str, B: int, T: int, H: int, K: int) -> Options:
    """Kernel options of a layer with default settings."""
    kernels = backends.tpu()
    with common.compiled_for(chip):
        tile = kernels.tile(B, T, H, K, BFLOAT16)
    return Options(kernels, tile, "sigmoid", save_gates=True, interpret=False, target=chip)


def mlstm_decode_case(K: int, V: int, B: int = 8, H: int = 8) -> Case:
    """One decode step of the mLSTM."""
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    q, v, gate = bf16(B, 1, H, K), bf16(B, 1, H, V), shape(B, 1, H)
    state = (shape(B, H, K, V), shape(B, H, K), shape(B, H))
    options = tpu_tiles.options_of(mlstm_tiles.Tile(128, 128, 1))  # a decode step has no tiles

    def step(q, k, v, log_i, log_f, state):
        log_gates = gates.LogGates(log_i, log_f, None)
        return mlstm_decode.step(options, q, k, v, log_gates, state)

    shapes = (q, q, v, gate, gate, state)
    return Case("mlstm_decode", f"K={K} V={V}", "", step, shapes, 1, B * H)


def slstm_decode_case(chip: str, K: int, B: int = 8, H: int = 4) -> Case:
    """One decode step of the sLSTM."""
    bf16 = functools.partial(shape, dtype=jnp.bfloat16)
    options = slstm_options(chip, B, 1, H, K)
    options = options._replace(tile=options.tile._replace(vmem_bytes=SCOPED_BYTES))
    shapes = (bf16(B, 4, H, K), bf16(H, K, 4, K), shape(H, 4, K), (shape(B, H, K),) * 4)

    def step(x, r, b, state):
        return slstm_decode.step(options, x, r, b, state, None)

    return Case("slstm_decode", f"B={B} K={K}", "", step, shapes, 1, H)


def evaluate(chip: str, case: Case) -> dict[str, Any]:
    """Compiles a case; records bundles and spills per unit, and HBM traffic."""
    donate = len(case.shapes) - 1 if case.kernel.endswith("decode") else None
    compiled = compiler.compile_for(chip, case.fn, *case.shapes, donate=donate)
    schedule = schedules.read()[case.kernel]
    hbm_bytes = compiler.bytes_accessed(compiled)[case.kernel]
    return {
        "kernel": case.kernel,
        "chip": chip,
        "size": case.size,
        "tile": case.tile,
        "bundles": round(schedule.bundles / case.units, 2),
        "spills": round(schedule.spills / case.units, 2),
        "matrix_share": round(schedule.matrix_share, 3),
        "hbm_bytes": round(hbm_bytes / case.call_units),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table with a column per chip: bundles (spills, utilization of the matrix units)."""
    chips = [chip for chip in TPUS if any(record["chip"] == chip for record in records)]
    lines = ["| kernel | size | " + " | ".join(chips) + " | HBM bytes |"]
    lines.append("|---" * (3 + len(chips)) + "|")
    for kernel, size in dict.fromkeys((record["kernel"], record["size"]) for record in records):
        by_chip = {r["chip"]: r for r in records if (r["kernel"], r["size"]) == (kernel, size)}
        hbm_bytes = sorted({record["hbm_bytes"] for record in by_chip.values()})
        cells = [_cell(by_chip.get(chip)) for chip in chips]
        traffic = " to ".join(f"{x:,}" for x in dict.fromkeys((hbm_bytes[0], hbm_bytes[-1])))
        lines.append("| " + " | ".join([f"`{kernel}`", size, *cells, traffic]) + " |")
    return "\n".join(lines)


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    return f"{record['bundles']:g} ({record['spills']:g}, {record['matrix_share']:.0%})"


def main(args: Arguments) -> int:
    """Compiles all cases, prints a table and writes the result."""
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    schedules.start()
    records = []
    for chip in args.chips:
        for case in cases(chip, quick=args.quick):
            records.append(evaluate(chip, case))
            print(json.dumps(records[-1]), flush=True)
    print(table(records), file=sys.stderr)
    if args.out is not None:
        tpu_tiles.write_result(args.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
