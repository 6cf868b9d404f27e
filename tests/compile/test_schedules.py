"""Scheduled bundles of the TPU kernels stay within a budget, `schedules.json`, and below targets.

libtpu dumps schedules for a process or not at all, so each chip is compiled in a subprocess. After
an improvement or a new libtpu, update the budget: `python experiments/benchmarks/tpu_schedules.py
--out tests/compile/schedules.json`.
"""

import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks.measure import read_records
from pallas_kernels.hardware import TPUS

ROOT = pathlib.Path(__file__).parents[2]
BUDGET = read_records(pathlib.Path(__file__).parent / "schedules.json")
MARGIN = 1.1

# Bundles per token and head at K = 256, V = 512.
TARGETS = {
    "v5e": {"mlstm_forward": 7.5, "mlstm_backward": 14.0},
    "v5p": {"mlstm_forward": 7.5, "mlstm_backward": 14.0},
    "v6e": {"mlstm_forward": 4.8, "mlstm_backward": 8.3},
}
KERNELS = {f"mlstm_{part}" for part in ("forward", "backward", "decode")}
KERNELS |= {f"slstm_{part}" for part in ("forward", "backward", "decode")}


def _measure(chip: str, folder: pathlib.Path, *options: str) -> list[dict]:
    out = folder / f"{chip}.json"
    script = "experiments.benchmarks.tpu_schedules"
    command = [sys.executable, "-m", script, "--chips", chip, "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    return read_records(out)


def _assert_within_budget(records: list[dict]):
    key = lambda record: tuple(record[name] for name in ("kernel", "chip", "size", "tile"))  # noqa: E731
    budgets = {key(budget): budget for budget in BUDGET}
    for record in records:
        budget = budgets.get(key(record))
        assert budget is not None, f"{key(record)} has no budget; add one"
        for name in ("bundles", "hbm_bytes"):
            assert record[name] <= MARGIN * budget[name], f"{key(record)}: {name} over budget"


def test_kernels_stay_within_their_budgets_and_targets(chip, tmp_path):
    records = _measure(chip, tmp_path, "--quick")
    assert {record["kernel"] for record in records} == KERNELS
    _assert_within_budget(records)
    for record in records:
        target = TARGETS.get(chip, {}).get(record["kernel"])
        assert target is None or record["bundles"] <= target


@pytest.mark.slow
def test_kernels_of_all_widths_stay_within_their_budgets(chip, tmp_path):
    records = _measure(chip, tmp_path)
    _assert_within_budget(records)
    assert len(records) == sum(budget["chip"] == chip for budget in BUDGET)


def test_budget_covers_every_kernel_on_every_chip():
    assert {(budget["kernel"], budget["chip"]) for budget in BUDGET} == {
        (kernel, chip) for kernel in KERNELS for chip in TPUS
    }
