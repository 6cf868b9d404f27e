"""Ranking and reporting of TPU schedules; `tests/compile` covers the compilation."""

import pathlib

import pytest

from experiments.benchmarks import measure, tpu_schedules, tpu_tiles
from pallas_kernels.aot import schedules
from pallas_kernels.hardware import TPUS
from pallas_kernels.mlstm.tpu_tiles import TABLE, TABLE_FILE, Tile, read_table

RESULTS = pathlib.Path(tpu_tiles.__file__).parent / "results"


def _record(tile: Tile, ns: float | None, chip: str = "v5e") -> dict:
    """A candidate whose schedules take `ns` together; None: it was dropped."""
    record = {"chip": chip, "K": 256, "V": 512, "tile": list(tile)}
    if ns is None:
        return {**record, "dropped": "too large"}
    bundles = ns * 1e-9 * TPUS[chip].clock / 2
    kernel = {"bundles_per_token": bundles, "bytes_per_token": 1}
    return {**record, **dict.fromkeys(tpu_tiles.KERNELS, kernel)}


def test_the_lowest_bound_wins():
    records = [
        _record(Tile(256, 128, 2), 10.0),
        _record(Tile(512, 128, 1), 9.0),
        _record(Tile(64, 64, 1), None),
    ]
    assert tpu_tiles.best_tiles(records) == {("v5e", 256, 512): Tile(512, 128, 1)}


def test_ties_go_to_the_longest_chunk_and_then_to_the_fewest_chunks_per_block():
    records = [_record(Tile(128, 128, 4), 10.0), _record(Tile(256, 128, 4), 10.1)]
    records += [_record(Tile(256, 128, 2), 10.15), _record(Tile(512, 128, 1), 10.5)]
    assert tpu_tiles.best_tiles(records) == {("v5e", 256, 512): Tile(256, 128, 2)}


def test_bound_is_the_larger_of_memory_and_schedule_on_one_core():
    record = _record(Tile(256, 128, 2), 4.0, "v5p")
    assert tpu_tiles.bound_ns(record) == pytest.approx(4.0)
    record["mlstm_forward"] = {"bundles_per_token": 1, "bytes_per_token": 13825}
    assert tpu_tiles.bound_ns(record) == pytest.approx(10.0 + 2.0)


def test_tile_table_equals_the_best_tiles_of_the_results(tmp_path):
    results = sorted(RESULTS.glob("tpu_tiles_*.json"))
    records = [record for path in results for record in measure.read_records(path)]
    assert tpu_tiles.best_tiles(records) == TABLE
    tpu_tiles.write_table(tmp_path / "table.json", records)
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


def test_schedule_is_parsed_from_the_compiler_output():
    schedule = schedules._schedule(3, SLOTS)
    assert schedule == (3, 1, pytest.approx(0.5), pytest.approx(1 / 3))


@pytest.mark.parametrize("chip", TPUS)
def test_cases_cover_every_kernel_on_every_chip(chip):
    names = {case.kernel for case in tpu_schedules.cases(chip, quick=True)}
    parts = ("forward", "backward", "decode")
    assert names == {f"{op}_{part}" for op in ("mlstm", "slstm") for part in parts}


def test_table_has_a_column_per_chip_and_a_line_per_kernel():
    record = {"kernel": "mlstm_forward", "size": "K=1", "tile": "", "bundles": 2.0, "spills": 0.5}
    record |= {"matrix_share": 0.25, "hbm_bytes": 4000}
    records = [{**record, "chip": "v6e"}, {**record, "chip": "v4", "hbm_bytes": 5000}]
    table = tpu_schedules.table(records)
    assert table.splitlines()[0] == "| kernel | size | v4 | v6e | HBM bytes |"
    assert table.splitlines()[2] == (
        "| `mlstm_forward` | K=1 | 2 (0.5, 25%) | 2 (0.5, 25%) | 4,000 to 5,000 |"
    )
