"""Registers, register spills and shared memory of the Triton kernels, by kernel, size and chip.

The figures are those reported by the assembler in Triton's wheel.

    .venv-compile/bin/python experiments/benchmarks/gpu_resources.py --chips sm_90 --ops mlstm
    .venv-compile/bin/python experiments/benchmarks/gpu_resources.py --out RESULT.json

No GPU is needed. Kernels that spill or exceed the shared memory are marked with `!`;
`tests/compile` fails if a default tile does.
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
"""K and V of a head, by op and dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the resource report."""

    chips: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")  # keys of `hardware.ARCHITECTURES`
    ops: tuple[str, ...] = tuple(WIDTHS)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    widths: tuple[int, ...] | None = None  # K of the heads; None: all in `WIDTHS`
    parts: tuple[str, ...] = ("forward", "gradient", "decode")
    out: pathlib.Path | None = None  # JSON file to write the result to


def cases(args: Arguments) -> Iterator[Case]:
    """Calls over several chunks, and decode steps, for every width."""
    for op in args.ops:
        for dtype in args.dtypes:
            for K, V in WIDTHS[op][dtype]:
                for part in args.parts:
                    if args.widths is None or K in args.widths:
                        T = 1 if part == "decode" else 1024
                        yield Case(op=op, part=part, B=16, T=T, H=4, K=K, V=V, dtype=dtype)


def kernel_resources(chip: str, case: Case) -> list[Resources]:
    """Resources of the kernels of one case, with the default tile."""
    with common.compiled_for(chip):
        shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
    return resources.resources(chip, kernel_jax.timed_function(case, "triton"), *shapes)


def records(args: Arguments) -> Iterator[dict[str, Any]]:
    """One record per kernel, size and chip; kernels shared by several parts appear once."""
    for chip in args.chips:
        seen: set[tuple[Any, ...]] = set()
        for case in cases(args):
            for kernel in kernel_resources(chip, case):
                sizes = (case.op, case.K, case.V, case.dtype)
                key = (*sizes, kernel.name, repr(kernel.constants))
                if key not in seen:
                    seen.add(key)
                    labels = dict(zip(("op", "K", "V", "dtype"), sizes, strict=True))
                    complaints = resources.exceeded_limits(chip, kernel)
                    record = {"chip": chip, **labels, **kernel._asdict()}
                    yield {**record, "complaints": complaints}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: registers, spilled bytes, shared KiB, warps and stages; kernels by chips."""
    chips = list(dict.fromkeys(record["chip"] for record in records))
    lines = [
        "| kernel | K, V, dtype | " + " | ".join(chips) + " |",
        "|---" * (2 + len(chips)) + "|",
    ]
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        key = (record["name"], f"{record['K']}, {record['V']}, {record['dtype']}")
        cells = groups.setdefault(key, {})
        chip = record["chip"]
        cells[chip] = "; ".join(filter(None, (cells.get(chip), _cell(record))))
    for (name, size), cells in groups.items():
        line = [f"`{name}`", size, *(cells.get(chip, "") for chip in chips)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _cell(record: dict[str, Any]) -> str:
    return (
        f"{record['registers']} r, {record['spills']} B, {record['shared_bytes'] / 1024:.0f} KiB, "
        f"{record['num_warps']} w, {record['num_stages']} s{' !' * bool(record['complaints'])}"
    )


def main(args: Arguments) -> int:
    """Compiles all kernels, prints a table and writes the result."""
    jax.config.update("jax_platforms", "cpu")  # compiles for targets that are not attached
    result = []
    for record in records(args):
        result.append(record)
        print(json.dumps(record, default=str), flush=True)
    print(table(result), file=sys.stderr)
    if args.out is not None:
        info = {"date": measure.date_and_flags()["date"], "versions": kernel_report.versions()}
        text = json.dumps({**info, "records": result}, indent=1, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
