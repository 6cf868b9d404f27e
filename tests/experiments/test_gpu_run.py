"""Sections of the GPU run, except two, complete without errors at toy sizes on a CPU."""

import importlib
import json

import pytest

from experiments.benchmarks.gpu import peers, sections, settings, speed
from experiments.benchmarks.gpu.report import Report
from pallas_kernels import common
from xlstm_jax import ops

SMOKE = settings.smoke()
GPU_ONLY = ("peers", "exported")  # they need PyTorch, and files with GPU assembly
SECTIONS = [(name, ()) for name in sections.sections() if name not in ("correctness", *GPU_ONLY)]
PARTS = 3  # of the correctness section
SECTIONS += [("correctness", (0, PARTS))]
SECTIONS += [pytest.param("correctness", (part, PARTS), marks=pytest.mark.slow) for part in (1, 2)]

with common.interpreted():
    TRITON = ops.implementations("mlstm")["triton"]


@pytest.mark.slow
@pytest.mark.parametrize("section,part", SECTIONS)
def test_every_record_of_a_section_is_complete(section, part, tmp_path):
    if section == "tiles" and TRITON is not None:
        pytest.skip(TRITON)
    report = Report(section, tmp_path, alone=True)
    sections.sections()[section](report, SMOKE, *part)
    records = json.loads((tmp_path / f"{section}.json").read_text())
    assert records
    assert not [record for record in records if "error" in record or not record.get("ok", True)]
    assert all({"median_ms", "ok", "profiled"} & record.keys() for record in records)


def test_summary_collects_all_records_and_fails_on_errors_and_failed_checks(
    tmp_path, monkeypatch, capsys
):
    main = importlib.import_module("experiments.benchmarks.gpu_run")
    monkeypatch.setattr(main, "FOLDER", tmp_path / "work")
    report = Report("kernels", main.FOLDER)
    report.add("fast", lambda: {"median_ms": 1.5, "share": 0.5})
    report.add("broken", lambda: 1 / 0)
    right = {"errors": {"h": 1e-7, "dq": 2e-6}, "ok": True, "same_bits": True}
    report.add("right", lambda: right)
    out = tmp_path / "out" / "results.json"
    assert main.main("summary", str(out)) == 1
    report.records.pop(1)
    report.add("wrong", lambda: {"errors": {"h": float("nan"), "dq": 2.0}, "ok": False})
    assert main.main("summary", str(out)) == 1
    result = json.loads(out.read_text())
    assert {"date", "machine", "versions", "driver"} <= result.keys()
    assert [record["name"] for record in result["sections"]["kernels"]] == [
        "fast",
        "right",
        "wrong",
    ]
    text = capsys.readouterr().out
    for excerpt in (
        "1.500 ms, share 0.5",
        "ZeroDivisionError",
        "ok, worst dq 2.0e-06",
        "worst h nan",
    ):
        assert excerpt in text
    assert main.main("nothing") == 2


def test_full_settings_have_valid_tiles_and_no_duplicates():
    """What can be checked without a GPU: shapes, tiles and unique names."""
    full = settings.full()
    assert full.heads[0] == (8, 256, 512)
    with common.compiled_for("sm_90"):
        variants = speed.tile_variants(full)
    assert len(set(variants.values())) == len(variants)
    checks = (*full.mlstm_checks, *full.slstm_checks)
    assert len({(type(check), check.sizes, check.dtype, str(check)) for check in checks}) == 20
    names = [name for name, _ in peers.candidates(full)]
    assert len(set(names)) == len(names) == 12
    assert not [case for case in map(full.mlstm_case, ("forward",) * 4, full.heads) if case.B != 8]
