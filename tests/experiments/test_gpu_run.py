"""Every section of the GPU run but two, at toy sizes on the CPU: none may record an error."""

import importlib
import json

import pytest

from experiments.benchmarks.gpu import peers, sections, settings, speed
from experiments.benchmarks.gpu.report import Report
from pallas_kernels import common
from xlstm_jax import ops

SMOKE = settings.smoke()
ELSEWHERE = ("peers", "exported")  # they need PyTorch, and files that contain a GPU's assembly
RUN_HERE = [(name, ()) for name in sections.sections() if name not in ("correctness", *ELSEWHERE)]
CASES = 3  # parts of the correctness section
RUN_HERE += [("correctness", (0, CASES))]
RUN_HERE += [pytest.param("correctness", (part, CASES), marks=pytest.mark.slow) for part in (1, 2)]

with common.interpreted():
    TRITON = ops.implementations("mlstm")["triton"]


@pytest.mark.parametrize("section,part", RUN_HERE)
def test_a_section_measures_everything_it_names(section, part, tmp_path):
    if section == "tiles" and TRITON is not None:
        pytest.skip(TRITON)
    report = Report(section, tmp_path, alone=True)
    sections.sections()[section](report, SMOKE, *part)
    rows = json.loads((tmp_path / f"{section}.json").read_text())
    assert rows
    assert not [row for row in rows if "error" in row or not row.get("ok", True)]
    assert all({"median_ms", "ok", "profiled"} & row.keys() for row in rows)


def test_the_summary_has_all_rows_and_fails_if_one_is_wrong(tmp_path, monkeypatch, capsys):
    main = importlib.import_module("experiments.benchmarks.gpu_run")
    monkeypatch.setattr(main, "FOLDER", tmp_path / "work")
    report = Report("kernels", main.FOLDER)
    report.add("fast", lambda: {"median_ms": 1.5, "share": 0.5})
    report.add("broken", lambda: 1 / 0)
    right = {"errors": {"h": 1e-7, "dq": 2e-6}, "ok": True, "same_bits": True}
    report.add("right", lambda: right)
    out = tmp_path / "out" / "results.json"
    assert main.main("summary", str(out)) == 1
    report.rows.pop(1)
    report.add("wrong", lambda: {"errors": {"h": float("nan"), "dq": 2.0}, "ok": False})
    assert main.main("summary", str(out)) == 1
    result = json.loads(out.read_text())
    assert {"date", "machine", "versions", "driver"} <= result.keys()
    assert [row["what"] for row in result["sections"]["kernels"]] == ["fast", "right", "wrong"]
    text = capsys.readouterr().out
    for words in (
        "1.500 ms, share 0.5",
        "ZeroDivisionError",
        "ok, worst dq 2.0e-06",
        "worst h nan",
    ):
        assert words in text
    assert main.main("nothing") == 2


def test_the_real_sizes_name_calls_that_the_kernels_take():
    """As far as is known without a GPU: shapes, tiles, and that no row is there twice."""
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
