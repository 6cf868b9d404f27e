"""What the benchmarks of TPU schedules do besides compiling, which `tests/compile` has."""

import json
import pathlib

import pytest

from experiments.benchmarks import tpu_offline, tpu_schedules, tpu_tiles
from pallas_kernels import tiles
from pallas_kernels.tiles import CHIPS, Tile

RESULTS = pathlib.Path(tpu_tiles.__file__).parent / "results"


def _row(tile: Tile, bound: float | None, chip: str = "v5e") -> dict:
    row = {"chip": chip, "K": 256, "V": 512, "tile": list(tile)}
    return {**row, "dropped": "too large"} if bound is None else {**row, "bound_ns": bound}


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


def test_the_table_of_tiles_is_what_the_last_result_says():
    result = json.loads(sorted(RESULTS.glob("tpu_tiles_*.json"))[-1].read_text())
    assert tpu_tiles.best(result["rows"]) == tiles.TABLE


def test_a_result_is_written_into_the_source(tmp_path, monkeypatch):
    source = tmp_path / "tiles.py"
    source.write_text("before\nTABLE = {\n    old\n}\nafter\n")
    monkeypatch.setattr(tpu_tiles, "FILE", source)
    tpu_tiles.fill_table([_row(Tile(256, 128, 2), 1.0), _row(Tile(128, 128, 1), 1.0, "v4")])
    assert source.read_text() == (
        "before\nTABLE = {\n"
        '    ("v4", 256, 512): Tile(128, 128, 1),\n'
        '    ("v5e", 256, 512): Tile(256, 128, 2),\n'
        "}\nafter\n"
    )


TABLE = """== CAPACTIY:
MXU, VALU, VSTORE, VSTORE:SPILL
    4     4     1     1
== UTILIZATION:
4 0 1 0
2 4 1 1
0 0 0 0
"""


def test_a_schedule_is_read_off_the_compilers_table():
    schedule = tpu_offline._schedule(3, TABLE)
    assert schedule == (3, 1, pytest.approx(0.5), pytest.approx(1 / 3))


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_is_held_to_a_budget_on_every_chip(chip):
    names = {case.kernel for case in tpu_schedules.cases(chip, quick=True)}
    parts = ("forward", "backward", "decode")
    assert names == {f"{op}_{part}" for op in ("mlstm", "slstm") for part in parts}


def test_a_table_has_a_column_per_chip_and_a_line_per_kernel():
    row = {"kernel": "mlstm_forward", "size": "K=1", "tile": "", "bundles": 2.0, "spills": 0.5}
    row |= {"matrix_share": 0.25, "hbm_bytes": 4000}
    found = tpu_schedules.table([{**row, "chip": "v6e"}, {**row, "chip": "v4", "hbm_bytes": 5000}])
    assert found.splitlines()[0] == "| kernel | size | v4 | v6e | HBM bytes |"
    assert found.splitlines()[2] == (
        "| `mlstm_forward` | K=1 | 2 (0.5, 25%) | 2 (0.5, 25%) | 4,000 to 5,000 |"
    )
