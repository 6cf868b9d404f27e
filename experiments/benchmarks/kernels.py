"""How fast are the kernels, beside other ways to the same result?

An answer: medians of forward, and of forward and backward, over the length of rows at a constant
number of tokens; of a decode step over the batch; of an sLSTM's step over its width; with peak
memory and the share of the bound that the chip's data sheet sets.

    python experiments/benchmarks/kernels.py --out experiments/benchmarks/results/kernels.json
    python experiments/benchmarks/kernels.py --size smoke --out /tmp/kernels.json

Beside the JSON stand a table (.md) and a picture (.png). Every candidate runs at every size in a
process of its own. What cannot run is listed with its reason; nothing is left out in silence.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import tyro

from experiments.benchmarks import kernel_cases, kernel_report, measure
from experiments.benchmarks.kernel_cases import Case, Sizes
from pallas_kernels import hardware
from xlstm_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
CANDIDATES = {
    "mlstm": ("triton", "chunkwise", "attention", "mlstm_kernels", "fla"),
    "slstm": ("triton", "scan", "xlstm"),
    "decode": ("triton", "recurrent"),
}
PEERS = ("mlstm_kernels", "fla", "xlstm")  # PyTorch packages; the others are ours, or JAX's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    size: Literal["full", "smoke"] = "full"  # smoke: seconds on a CPU, says nothing about speed
    sections: tuple[str, ...] = tuple(CANDIDATES)
    candidates: tuple[str, ...] | None = None  # of each section; None: all of them
    heads: tuple[tuple[int, int, int], ...] | None = None  # H, K and V of the mLSTM's cases
    lengths: tuple[int, ...] | None = None  # of the mLSTM's rows
    tokens: int | None = None  # of one call, at every length
    slstm_widths: tuple[int, ...] | None = None
    decode_batches: tuple[int, ...] | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    repeats: int = 30
    warmup: int = 10
    sample_seconds: float = 0.05  # how long calls are sent off before they are waited for
    timeout: float = 600.0  # seconds for one candidate at one size
    peer_python: str | None = None  # an interpreter with the PyTorch packages; None: this one
    out: pathlib.Path | None = None  # where to write what was found, as JSON


def sizes(args: Arguments) -> Sizes:
    """Those of `args.size`, with what is given in their place."""
    base = kernel_cases.SMOKE if args.size == "smoke" else Sizes()
    names = ("heads", "lengths", "tokens", "slstm_widths", "decode_batches", "dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(base, **given)


def check(args: Arguments) -> None:
    """Raises ConfigError for names that stand for nothing."""
    known = {name for names in CANDIDATES.values() for name in names}
    for option, given, names in (
        ("sections", args.sections, set(CANDIDATES)),
        ("candidates", args.candidates or (), known),
    ):
        if wrong := [name for name in given if name not in names]:
            raise ConfigError(
                f"{option} must be of {', '.join(sorted(names))}, got {', '.join(wrong)}."
            )
    for option in ("repeats", "warmup"):
        if getattr(args, option) < 1:
            raise ConfigError(f"{option} must be at least 1, got {getattr(args, option)}.")


def rows(args: Arguments) -> Iterator[dict[str, Any]]:
    """One per candidate and case."""
    for cases in kernel_cases.groups(sizes(args), args.sections):
        section = "decode" if cases[0].part == "decode" else cases[0].op
        for candidate in CANDIDATES[section]:
            if args.candidates is None or candidate in args.candidates:
                yield from asked(args, candidate, cases)


def asked(args: Arguments, candidate: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """What a candidate's own process says of some cases."""
    request = {
        "candidate": candidate,
        "cases": [dataclasses.asdict(case) for case in cases],
        "settings": {
            "repeats": args.repeats,
            "warmup": args.warmup,
            "sample_seconds": args.sample_seconds,
        },
    }
    # As modules of the repository: beside a script, this file would be found as `kernels`.
    worker, python = "kernel_jax", sys.executable
    if candidate in PEERS:
        worker, python = "kernel_torch", args.peer_python or python
    command = [python, "-m", f"experiments.benchmarks.{worker}", json.dumps(request)]
    lines, failure = _run(command, args.timeout)
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    for number, case in enumerate(cases):
        answer = answers[number] if number < len(answers) else {"error": failure}
        yield {**dataclasses.asdict(case), "candidate": candidate, **answer}


def _run(command: list[str], timeout: float) -> tuple[list[str], str]:
    """What a process has printed, and why it said no more."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return said.decode().splitlines(), f"took more than {timeout:g} seconds"
    except OSError as error:
        raise ConfigError(
            f"peer-python must name an interpreter, got {command[0]!r} ({error.strerror})."
        ) from error
    complaint = [line for line in found.stderr.splitlines() if line.strip()]
    ended = f"ended with code {found.returncode}"
    return found.stdout.splitlines(), f"{ended}: {complaint[-1]}" if complaint else ended


def with_bounds(row: dict[str, Any], device: hardware.Gpu | None) -> dict[str, Any]:
    """A row with its rate and, for a chip whose peaks are known, the share of its bound."""
    if "median_seconds" not in row:
        return row
    fields = {field.name: row[field.name] for field in dataclasses.fields(Case)}
    work = kernel_cases.work(Case(**fields), attention=row["candidate"] == "attention")
    found = {"tflops_per_second": work.flops / row["median_seconds"] / 1e12}
    if device is not None:
        bound = kernel_cases.bound_seconds(work, row["dtype"], device)
        found |= {"bound_seconds": bound, "share_of_bound": bound / row["median_seconds"]}
    return {**row, **found}


@functools.cache
def driver() -> dict[str, str]:
    """What the driver says of the first GPU: its version and clocks; empty without one."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, map(str.strip, found.splitlines()[0].split(",")), strict=True))


def main(args: Arguments) -> int:
    check(args)
    found = []
    for row in rows(args):
        device = hardware.gpu_by_device_kind(row.get("device", driver().get("name", "")))
        found.append(with_bounds(row, device))
        print(json.dumps(found[-1]), flush=True)
    kinds = [row["device"] for row in found if "device" in row]
    result = {
        **measure.settings(),
        "device": kinds[0] if kinds else "",
        "driver": driver(),
        "versions": kernel_report.versions(),
        "rows": found,
    }
    print(kernel_report.table(result), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(kernel_report.table(result), encoding="utf-8")
        kernel_report.picture(result, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments, description=__doc__)))
    except ConfigError as error:
        sys.exit(str(error))
