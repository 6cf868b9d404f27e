"""`xlstm-jax check`: every implementation of the recurrent ops on this device."""

import contextlib
import dataclasses
import math

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE, MACHINE_FAILED
from xlstm_jax.errors import quote_path
from xlstm_jax.ops import device_check, verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRun:
    """Compares values, states and gradients of every implementation with the recurrence, and times.

    The result is stored for this device, its driver and these versions: "auto" never selects an
    implementation that failed.
    """

    json: bool = False  # print the result as JSON
    record: bool = True  # store the result


def run(argv: list[str]) -> int:
    """Runs `check`; the exit code is that of a failed machine if an implementation fails."""
    args = options.parse("check", CheckRun, argv)
    with console.output_to_stderr() if args.json else contextlib.nullcontext():
        outcomes = []
        for one in device_check.check(jax.default_backend()):
            outcomes.append(one)
            console.write(f"{one.workload.op} {one.implementation}: {_describe(one)}\n")
    results = device_check.verdicts(outcomes)
    if args.json:
        records = [one._asdict() | {"passed": one.passed} for one in outcomes]
        device = verdicts.describe()
        console.print_json({"device": device, "outcomes": records, "verdicts": results})
    else:
        _show(outcomes)
    # After the output: if the folder is not writable, the result is lost otherwise.
    path = verdicts.record(results) if args.record else None
    if not args.json:
        fields = {name: verdicts.describe()[name] for name in ("device", "driver")}
        console.print_fields(fields | ({"stored in": quote_path(path)} if path else {}))
    return DONE if all(one.passed for one in outcomes) else MACHINE_FAILED


def _describe(one: device_check.Outcome) -> str:
    if math.isnan(one.error):
        return f"{one.workload.label}: FAILED, {one.of}"
    verdict = "ok" if one.passed else "WRONG"
    return f"{one.workload.label}: {verdict}, error {one.error:.1e} of {one.of}"


def _show(outcomes: list[device_check.Outcome]) -> None:
    header = ["op", "sizes", "implementation", "error", "ms, both directions", "verdict"]
    lines = [
        [
            one.workload.op,
            one.workload.label,
            one.implementation,
            f"{one.error:.1e}",
            f"{one.milliseconds:.2f}",
            "passed" if one.passed else "failed",
        ]
        for one in outcomes
    ]
    console.write("\n")
    console.print_table(header, lines)
