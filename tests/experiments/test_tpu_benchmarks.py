"""What the benchmarks of TPU schedules do besides compiling, which `tests/compile` has."""

import json
import pathlib

import pytest

from experiments.benchmarks import tpu_schedules, tpu_tiles
from pallas_kernels.aot import schedules
from pallas_kernels.hardware import TPUS
from pallas_kernels.mlstm.tpu_tiles import TABLE, TABLE_FILE, Tile, read_table

RESULTS = pathlib.Path(tpu_tiles.__file__).parent / "results"


def _row(tile: Tile, ns: float | None, chip: str = "v5e") -> dict:
    """A candidate whose kernels take `ns` together, by their schedules."""
    row = {"chip": chip, "K": 256, "V": 512, "tile": list(tile)}
    if ns is None:
        return {**row, "dropped": "too large"}
    bundles = ns * 1e-9 * TPUS[chip].clock / 2
    kernel = {"bundles_per_token": bundles, "bytes_per_token": 1}
    return {**row, **dict.fromkeys(tpu_tiles.KERNELS, kernel)}


def test_the_lowest_bound_wins():
    rows = [
        _row(Tile(256, 128, 2), 10.0),
        _row(Tile(512, 128, 1), 9.0),
        _row(Tile(64, 64, 1), None),
    ]
    assert tpu_tiles.best(rows) == {("v5e", 256, 512): Tile(512, 128, 1)}


def test_of_equal_bounds_the_longest_chunk_wins_and_then_the_fewest_in_a_block():
    rows = [_row(Tile(128, 128, 4), 10.0), _row(Tile(256, 128, 4), 10.1)]
    rows += [_row(Tile(256, 128, 2), 10.15), _row(Tile(512, 128, 1), 10.5)]
    assert tpu_tiles.best(rows) == {("v5e", 256, 512): Tile(256, 128, 2)}


def test_a_bound_is_that_of_memory_or_of_the_schedule_on_one_core():
    row = _row(Tile(256, 128, 2), 4.0, "v5p")
    assert tpu_tiles.bound_ns(row) == pytest.approx(4.0)
    row["mlstm_forward"] = {"bundles_per_token": 1, "bytes_per_token": 13825}
    assert tpu_tiles.bound_ns(row) == pytest.approx(10.0 + 2.0)


def test_the_table_of_tiles_is_what_the_last_result_says(tmp_path):
    rows = json.loads(sorted(RESULTS.glob("tpu_tiles_*.json"))[-1].read_text())["rows"]
    assert tpu_tiles.best(rows) == TABLE
    tpu_tiles.write_table(tmp_path / "table.json", rows)
    assert read_table(tmp_path / "table.json") == TABLE
    assert (tmp_path / "table.json").read_text() == TABLE_FILE.read_text()


SLOTS = """== CAPACTIY:
MXU, VALU, VSTORE, VSTORE:SPILL
    4     4     1     1
== UTILIZATION:
4 0 1 0
2 4 1 1
0 0 0 0
"""


def test_a_schedule_is_read_off_the_compilers_table():
    schedule = schedules._schedule(3, SLOTS)
    assert schedule == (3, 1, pytest.approx(0.5), pytest.approx(1 / 3))


@pytest.mark.parametrize("chip", TPUS)
def test_every_kernel_has_a_budget_on_every_chip(chip):
    names = {case.kernel for case in tpu_schedules.cases(chip, quick=True)}
    parts = ("forward", "backward", "decode")
    assert names == {f"{op}_{part}" for op in ("mlstm", "slstm") for part in parts}


def test_a_table_has_a_column_per_chip_and_a_line_per_kernel():
    row = {"kernel": "mlstm_forward", "size": "K=1", "tile": "", "bundles": 2.0, "spills": 0.5}
    row |= {"matrix_share": 0.25, "hbm_bytes": 4000}
    table = tpu_schedules.table([{**row, "chip": "v6e"}, {**row, "chip": "v4", "hbm_bytes": 5000}])
    assert table.splitlines()[0] == "| kernel | size | v4 | v6e | HBM bytes |"
    assert table.splitlines()[2] == (
        "| `mlstm_forward` | K=1 | 2 (0.5, 25%) | 2 (0.5, 25%) | 4,000 to 5,000 |"
    )
