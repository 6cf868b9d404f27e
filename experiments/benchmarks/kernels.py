"""How fast are the kernels, beside other ways to the same result?

An answer: medians of forward, and of forward and backward, over sequence lengths at a constant
number of tokens; of a decode step over the batch; of an sLSTM's step over its head dimension; with
peak memory and the share of the bound that the chip's data sheet sets.

    python experiments/benchmarks/kernels.py --out experiments/benchmarks/results/kernels.json
    python experiments/benchmarks/kernels.py --size smoke --out /tmp/kernels.json

Beside the JSON stand a table (.md) and a picture (.png). Every candidate runs at every size in a
process of its own. What cannot run is listed with its reason.
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
PEERS = ("mlstm_kernels", "fla", "xlstm")  # PyTorch packages; the others are ours, or JAX's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments, Sizes):
    size: Literal["full", "smoke"] = "full"  # smoke: in place of all sizes those for a CPU
    sections: tuple[Literal["mlstm", "slstm", "decode"], ...] = ("mlstm", "slstm", "decode")
    candidates: tuple[str, ...] | None = None  # of each section; None: all of them
    warmup: int = 10
    sample_seconds: float = 0.05  # how long calls are dispatched before they are waited for
    timeout: float = 600.0  # seconds for one candidate at one size
    peer_python: str | None = None  # an interpreter with the PyTorch packages; None: this one

    def __post_init__(self):
        super().__post_init__()
        known = sorted({name for names in CANDIDATES.values() for name in names})
        if wrong := set(self.candidates or ()) - set(known):
            raise ConfigError(
                f"candidates must be of {', '.join(known)}, got {', '.join(sorted(wrong))}."
            )
        if self.warmup < 1:
            raise ConfigError(f"warmup must be at least 1, got {self.warmup}; 10 is usual.")


def rows(args: Arguments) -> Iterator[dict[str, Any]]:
    """One per candidate and case."""
    sizes = Sizes(**kernel_cases.SMOKE) if args.size == "smoke" else args
    for cases in kernel_cases.groups(sizes, args.sections):
        for candidate in CANDIDATES[cases[0].section]:
            if args.candidates is None or candidate in args.candidates:
                yield from ask(args, candidate, cases)


def ask(args: Arguments, candidate: str, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """The answers of a candidate's own process to some cases."""
    request = {
        "candidate": candidate,
        "cases": [dataclasses.asdict(case) for case in cases],
        "settings": {name: getattr(args, name) for name in ("repeats", "warmup", "sample_seconds")},
    }
    # As modules of the repository: beside a script, this file would be found as `kernels`.
    worker, python = "kernel_jax", sys.executable
    if candidate in PEERS:
        worker, python = "kernel_torch", args.peer_python or python
    command = [python, "-m", f"experiments.benchmarks.{worker}", json.dumps(request)]
    lines, failure = run_process(command, args.timeout)
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    for number, case in enumerate(cases):
        answer = answers[number] if number < len(answers) else {"error": failure}
        yield with_bound({**dataclasses.asdict(case), "candidate": candidate, **answer}, case)


def run_process(command: list[str], timeout: float) -> tuple[list[str], str]:
    """The lines that a process prints, and why it printed no more."""
    options: dict[str, Any] = dict(cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode().splitlines(), f"took more than {timeout:g} seconds"
    except OSError as error:
        raise ConfigError(
            f"peer-python must name an interpreter, got {command[0]!r} ({error.strerror})."
        ) from error
    complaint = [line for line in done.stderr.splitlines() if line.strip()]
    ended = f"ended with code {done.returncode}"
    return done.stdout.splitlines(), f"{ended}: {complaint[-1]}" if complaint else ended


def with_bound(row: dict[str, Any], case: Case) -> dict[str, Any]:
    """A row with its rate and, for a chip whose peaks are known, the share of its bound."""
    if "median_seconds" not in row:
        return row
    work = kernel_cases.work(case, attention=row["candidate"] == "attention")
    row = {**row, "tflops_per_second": work.flops / row["median_seconds"] / 1e12}
    kind = row.get("device", measure.driver().get("name", ""))
    bound = kernel_cases.bound_seconds(work, case.dtype, kind)
    if bound is None:
        return row
    return {**row, "bound_seconds": bound, "share_of_bound": bound / row["median_seconds"]}


def main(args: Arguments) -> int:
    found = []
    for row in rows(args):
        found.append(row)
        print(json.dumps(row), flush=True)
    result = {
        **measure.about("kernels", kernel_report.PACKAGES),
        "device": next((row["device"] for row in found if "device" in row), ""),
        "driver": measure.driver(),
        "rows": found,
    }
    table = kernel_report.table(result)
    print(table, file=sys.stderr)
    measure.write(args.out, result)
    if args.out is not None:
        args.out.with_suffix(".md").write_text(table, encoding="utf-8")
        kernel_report.picture(result, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
