"""Schedules are held to a budget, `schedules.json`, and to what the kernels were built to reach.

The compiler writes schedules for a whole process or not at all, so each chip has a process.
After a change for the better, or a new libtpu: `python experiments/benchmarks/tpu_schedules.py
--out tests/compile/schedules.json`.
"""

import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import measure
from pallas_kernels.hardware import TPUS

ROOT = pathlib.Path(__file__).parents[2]
STORED = measure.read_records(pathlib.Path(__file__).parent / "schedules.json")
MARGIN = 1.1

# Bundles per token and head at K = 256, V = 512.
TARGETS = {
    "v5e": {"mlstm_forward": 7.5, "mlstm_backward": 14.0},
    "v5p": {"mlstm_forward": 7.5, "mlstm_backward": 14.0},
    "v6e": {"mlstm_forward": 4.8, "mlstm_backward": 8.3},
}
KERNELS = {f"mlstm_{part}" for part in ("forward", "backward", "decode")}
KERNELS |= {f"slstm_{part}" for part in ("forward", "backward", "decode")}


def _found(chip: str, folder: pathlib.Path, *options: str) -> list[dict]:
    out = folder / f"{chip}.json"
    script = "experiments.benchmarks.tpu_schedules"
    command = [sys.executable, "-m", script, "--chips", chip, "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    return measure.read_records(out)


def _assert_within_budget(rows: list[dict]):
    key = lambda row: (row["kernel"], row["chip"], row["size"], row["tile"])  # noqa: E731
    budget = {key(row): row for row in STORED}
    for row in rows:
        stored = budget.get(key(row))
        assert stored is not None, f"{key(row)} has no budget; store one"
        assert row["bundles"] <= MARGIN * stored["bundles"], f"{key(row)}: more than 10 % above"
        assert row["hbm_bytes"] <= MARGIN * stored["hbm_bytes"], f"{key(row)}: more traffic"


def test_no_kernel_takes_more_bundles_than_its_budget(chip, tmp_path):
    rows = _found(chip, tmp_path, "--quick")
    assert {row["kernel"] for row in rows} == KERNELS
    _assert_within_budget(rows)
    for row in rows:
        target = TARGETS.get(chip, {}).get(row["kernel"])
        assert target is None or row["bundles"] <= target


@pytest.mark.slow
def test_no_kernel_of_another_width_takes_more_either(chip, tmp_path):
    rows = _found(chip, tmp_path)
    _assert_within_budget(rows)
    assert len(rows) == sum(row["chip"] == chip for row in STORED)


def test_the_stored_budget_has_every_kernel_on_every_chip():
    assert {(row["kernel"], row["chip"]) for row in STORED} == {
        (kernel, chip) for kernel in KERNELS for chip in TPUS
    }
