"""Times the kernels and other implementations of the same computation.

Records median times, peak memory and the share of the bound set by the chip's data sheet: mLSTM
forward, and forward + backward, over sequence lengths at a constant number of tokens; a decode step
over batch sizes; one step of the sLSTM over head dimensions.

    python experiments/benchmarks/kernels.py --out experiments/benchmarks/results/kernels.json
    python experiments/benchmarks/kernels.py --size smoke --out /tmp/kernels.json

A table (.md) and a plot (.png) are written next to the JSON. Each candidate runs in a separate
process at each size. Candidates that cannot run are listed with the reason.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

from experiments.benchmarks import kernel_cases, kernel_report, measure
from experiments.benchmarks.kernel_cases import Case, Sizes
from xlstm_jax import ops
from xlstm_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
CANDIDATES = {
    "mlstm": ("triton", "chunkwise", "attention", "mlstm_kernels", "fla"),
    "slstm": ("triton", list(ops.implementations("slstm"))[-1], "xlstm"),
    "decode": ("triton", "recurrent"),
}
PEERS = ("mlstm_kernels", "fla", "xlstm")  # PyTorch packages; all other candidates run in JAX


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments, Sizes):
    """Options of the kernel benchmark."""

    size: Literal["full", "smoke"] = "full"  # smoke: only the toy sizes for a CPU
    sections: tuple[Literal["mlstm", "slstm", "decode"], ...] = ("mlstm", "slstm", "decode")
    candidates: tuple[str, ...] | None = None  # None: all of each section
    warmup: int = 10  # calls before the first sample
    sample_seconds: float = 0.05  # how long the calls of one sample take together
    timeout: float = 600.0  # of one candidate at one size, in seconds
    peer_python: str | None = None  # interpreter with the PyTorch packages; None: the current one

    def __post_init__(self):
        super().__post_init__()
        known = sorted({name for names in CANDIDATES.values() for name in names})
        if wrong := set(self.candidates or ()) - set(known):
            raise ConfigError(
                f"candidates must be among {', '.join(known)}, got {', '.join(sorted(wrong))}."
            )
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1, got {self.warmup}; 10 is usual.")


def records(args: Arguments) -> Iterator[dict[str, Any]]:
    """Measures every case with every candidate; one record each."""
    sizes = Sizes(**kernel_cases.SMOKE) if args.size == "smoke" else args
    for cases in kernel_cases.groups(sizes, args.sections):
        for candidate in CANDIDATES[cases[0].section]:
            if args.candidates is None or candidate in args.candidates:
                yield from measure_cases(args, candidate, cases)


def measure_cases(args: Arguments, candidate: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Measures some cases with one candidate in a separate process; one record per case."""
    request = {
        "candidate": candidate,
        "cases": [dataclasses.asdict(case) for case in cases],
        "settings": {name: getattr(args, name) for name in ("repeats", "warmup", "sample_seconds")},
    }
    # As a module: the folder of a script precedes all others on the path, and this file would
    # shadow any package named `kernels`.
    worker, python = "kernel_jax", sys.executable
    if candidate in PEERS:
        worker, python = "kernel_torch", args.peer_python or python
    command = [python, "-m", f"experiments.benchmarks.{worker}", json.dumps(request)]
    lines, failure = run_process(command, args.timeout)
    measurements = [json.loads(line) for line in lines if line.startswith("{")]
    for number, case in enumerate(cases):
        measured = measurements[number] if number < len(measurements) else {"error": failure}
        yield with_bound({**dataclasses.asdict(case), "candidate": candidate, **measured}, case)


def run_process(command: list[str], timeout: float) -> tuple[list[str], str]:
    """Lines on standard output of a process, and how it ended."""
    options: dict[str, Any] = dict(cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    try:
        process = subprocess.run(command, **options)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode().splitlines(), f"timed out after {timeout:g} seconds"
    except OSError as error:
        raise ConfigError(
            f"peer-python must name an interpreter, got {command[0]!r} ({error.strerror}); "
            "leave it out to use the current one."
        ) from error
    messages = [line for line in process.stderr.splitlines() if line.strip()]
    status = f"exited with code {process.returncode}"
    return process.stdout.splitlines(), f"{status}: {messages[-1]}" if messages else status


def with_bound(record: dict[str, Any], case: Case) -> dict[str, Any]:
    """Adds the rate of a record and, for a device with known peaks, the share of its bound."""
    if "median_seconds" not in record:
        return record
    work = kernel_cases.work(case, attention=record["candidate"] == "attention")
    record = {**record, "tflops_per_second": work.flops / record["median_seconds"] / 1e12}
    kind = record.get("device", measure.driver().get("name", ""))
    bound = kernel_cases.bound_seconds(work, case.dtype, kind)
    if bound is None:
        return record
    return {**record, "bound_seconds": bound, "share_of_bound": bound / record["median_seconds"]}


def main(args: Arguments) -> int:
    """Measures all cases and writes the records, the table and the plot."""
    measured = []
    for record in records(args):
        measured.append(record)
        print(json.dumps(record), flush=True)
    result = {
        **measure.run_info("kernels", kernel_report.PACKAGES),
        "device": next((record["device"] for record in measured if "device" in record), ""),
        "driver": measure.driver(),
        "records": measured,
    }
    table = kernel_report.table(result)
    print(table, file=sys.stderr)
    measure.write(args.out, result)
    if args.out is not None:
        args.out.with_suffix(".md").write_text(table, encoding="utf-8")
        kernel_report.plot(result, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
