"""What do the Triton kernels take of a GPU: registers, register spills, shared memory?

An answer: a line per kernel, size and chip, as Triton's own assembler has laid it out.

    .venv-compile/bin/python experiments/benchmarks/gpu_resources.py --chips sm_90 --ops mlstm
    .venv-compile/bin/python experiments/benchmarks/gpu_resources.py --out RESULT.json

No GPU is needed. A kernel that spills, takes 255 registers or more shared memory than there is is
marked with `!`; such a tile does not belong in a table, and `tests/compile` fails on it.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import tyro

from experiments.benchmarks import kernel_jax, kernel_report, measure
from experiments.benchmarks.kernel_cases import Case
from pallas_kernels import common
from pallas_kernels.aot import resources
from pallas_kernels.aot.resources import Resources

WIDTHS = {
    "mlstm": {
        "bfloat16": ((64, 128), (128, 256), (256, 512), (512, 512)),
        "float32": ((128, 256), (256, 512)),
    },
    "slstm": {
        "bfloat16": ((64, 64), (128, 128), (256, 256), (512, 512)),
        "float32": ((64, 64), (128, 128)),
    },
}
"""K and V of a head, of every op and dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    chips: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")  # keys of `hardware.ARCHITECTURES`
    ops: tuple[str, ...] = tuple(WIDTHS)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    widths: tuple[int, ...] | None = None  # K of the heads; None: all of them
    parts: tuple[str, ...] = ("forward", "gradient", "decode")
    out: pathlib.Path | None = None  # where to write what was found, as JSON


def cases(args: Arguments) -> Iterator[Case]:
    """Calls of several chunks, and of one step, for every width."""
    for op in args.ops:
        for dtype in args.dtypes:
            for K, V in WIDTHS[op][dtype]:
                for part in args.parts:
                    if args.widths is None or K in args.widths:
                        T = 1 if part == "decode" else 1024
                        yield Case(op=op, part=part, B=16, T=T, H=4, K=K, V=V, dtype=dtype)


def found(chip: str, case: Case) -> list[Resources]:
    """Of the kernels of one case, at the tile of the table."""
    with common.compiled_for(chip):
        shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
    return resources.resources(chip, kernel_jax.timed(case, "triton"), *shapes)


def rows(args: Arguments) -> Iterator[dict[str, Any]]:
    """One per kernel, size and chip; of a gradient those that the forward call has not."""
    for chip in args.chips:
        seen: set[tuple[Any, ...]] = set()
        for case in cases(args):
            for kernel in found(chip, case):
                sizes = (case.op, case.K, case.V, case.dtype)
                key = (*sizes, kernel.name, repr(kernel.constants))
                if key not in seen:
                    seen.add(key)
                    named = dict(zip(("op", "K", "V", "dtype"), sizes, strict=True))
                    why = resources.exceeded_limits(chip, kernel)
                    yield {"chip": chip, **named, **kernel._asdict(), "complaints": why}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: registers, spilled bytes, shared KiB, warps and stages of every kernel."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines = [
        "| kernel | K, V, dtype | " + " | ".join(chips) + " |",
        "|---" * (2 + len(chips)) + "|",
    ]
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["name"], f"{row['K']}, {row['V']}, {row['dtype']}")
        cells = groups.setdefault(key, {})
        cells[row["chip"]] = "; ".join(filter(None, (cells.get(row["chip"]), _cell(row))))
    for (name, size), cells in groups.items():
        line = [f"`{name}`", size, *(cells.get(chip, "") for chip in chips)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return (
        f"{row['registers']} r, {row['spills']} B, {row['shared_bytes'] / 1024:.0f} KiB, "
        f"{row['num_warps']} w, {row['num_stages']} s{' !' * bool(row['complaints'])}"
    )


def main(args: Arguments) -> int:
    result = []
    for row in rows(args):
        result.append(row)
        print(json.dumps(row, default=str), flush=True)
    print(table(result), file=sys.stderr)
    if args.out is not None:
        about = {"date": measure.settings()["date"], "versions": kernel_report.versions()}
        text = json.dumps({**about, "rows": result}, indent=1, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
