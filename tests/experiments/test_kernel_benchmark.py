"""The benchmark of kernels: what it counts, what it runs, and what it makes of the answers."""

import dataclasses
import json

import jax
import pytest

from experiments.benchmarks import (
    kernel_cases,
    kernel_jax,
    kernel_report,
    kernel_torch,
    kernels,
)
from experiments.benchmarks.kernel_cases import SMOKE, Case, Sizes
from experiments.benchmarks.kernels import Arguments
from pallas_kernels import hardware
from xlstm_jax.config import ConfigError

QUICK = {"repeats": 2, "warmup": 1, "sample_seconds": 1e-4}
LARGE = Case(op="mlstm", part="gradient", B=32, T=2048, H=8, K=256, V=512)


def _smoke(section: str, part: str) -> Case:
    cases = [case for group in kernel_cases.groups(SMOKE, (section,)) for case in group]
    return next(case for case in cases if case.part == part)


def test_every_length_has_the_same_number_of_tokens():
    groups = list(kernel_cases.groups(Sizes(), ("mlstm",)))
    assert len(groups) == 3 * 8
    assert {case.tokens for group in groups for case in group} == {65536}
    assert all([case.part for case in group] == ["forward", "gradient"] for group in groups)


def test_the_bound_of_the_gradient_is_that_of_one_pass_each():
    """By hand: 4 (K + V) + 2 K V / L bytes forward, 8 K + 6 V + 2 K V / L backward, in bfloat16."""
    work = kernel_cases.work(LARGE)
    tokens = 65536 * 8
    assert work.bytes == tokens * (4 * 768 + 1024 + 8 * 256 + 6 * 512 + 1024)
    square = 0.625 * 256
    forward = 4 * 256 * 512 + 2 * square * (256 + 512)
    assert work.flops == tokens * (forward + 8 * 256 * 512 + 2 * square * (3 * 256 + 2 * 512))
    seconds = kernel_cases.bound_seconds(work, "bfloat16", hardware.GPUS["H100"])
    assert seconds == pytest.approx(1.60e-3, rel=0.01)


def test_attention_costs_what_its_causal_square_does():
    forward = dataclasses.replace(LARGE, part="forward")
    work = kernel_cases.work(forward, attention=True)
    assert work.flops == 2 * 65536 * 2048 * 8 * 512
    assert kernel_cases.work(LARGE, attention=True).flops == 3.5 * work.flops


def test_states_of_a_decode_step_do_not_fit_a_cache():
    step = dataclasses.replace(LARGE, part="decode", T=1, B=1)
    assert step.num_states * 8 * 256 * 512 * 4 >= 128 << 20
    assert dataclasses.replace(step, B=256).num_states == 1


@pytest.mark.parametrize(
    "kind,name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_a_module_is_known_by_the_name_it_reports(kind, name):
    assert hardware.gpu_by_device_kind(kind) == hardware.GPUS[name]


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"]
    + ["NVIDIA A10G", "NVIDIA L40S", "Tesla T4", "cpu"],
)
def test_of_other_devices_no_share_is_given(kind):
    assert hardware.gpu_by_device_kind(kind) is None
    row = {**dataclasses.asdict(LARGE), "candidate": "triton", "median_seconds": 1.0}
    assert "share_of_bound" not in kernels.with_bounds(row, hardware.gpu_by_device_kind(kind))


@pytest.mark.parametrize(
    "section,part,candidate",
    [
        ("mlstm", "forward", "attention"),
        ("mlstm", "gradient", "chunkwise"),
        ("slstm", "gradient", "scan"),
        ("decode", "decode", "recurrent"),
    ],
)
def test_a_candidate_is_timed(section, part, candidate):
    found = kernel_jax.measured(_smoke(section, part), candidate, QUICK)
    assert found["repeats"] == 2
    assert 0 < found["fastest_seconds"] <= found["median_seconds"]
    assert found["peak_bytes"] > 0


def test_a_kernel_that_cannot_run_here_says_why():
    assert "runs on a GPU" in kernel_jax.refusal(LARGE, "triton")
    assert "no such implementation" in kernel_jax.refusal(LARGE, "scan")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(kernel_torch.importlib.util, "find_spec", lambda name: None)
    assert kernel_torch.refusal("fla", {}) == "torch is not installed"
    monkeypatch.setattr(kernel_torch.importlib.util, "find_spec", {"torch": 1}.get)
    assert kernel_torch.refusal("fla", {}) == "flash-linear-attention is not installed"


def test_a_call_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    """As on a device whose memory a gradient does not fit."""
    small = [_smoke("mlstm", "forward"), _smoke("mlstm", "gradient")]

    def inputs(case, candidate):
        if case.part == "forward":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return real(case, candidate)

    real = kernel_jax.inputs
    monkeypatch.setattr(kernel_jax, "inputs", inputs)
    cases = [dataclasses.asdict(case) for case in small]
    kernel_jax.main({"candidate": "chunkwise", "cases": cases, "settings": QUICK})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["error"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert second["median_seconds"] > 0


def test_a_process_that_dies_is_a_row_with_an_error():
    group = next(kernel_cases.groups(SMOKE, ("mlstm",)))
    rows = list(kernels.asked(Arguments(peer_python="false"), "fla", group))
    assert [row["part"] for row in rows] == ["forward", "gradient"]
    assert all(row["error"] == "ended with code 1" for row in rows)


def test_names_that_stand_for_nothing_are_refused():
    with pytest.raises(ConfigError, match="sections must be of .*got mamba"):
        kernels.check(Arguments(sections=("mamba",)))
    with pytest.raises(ConfigError, match="candidates must be of .*got cuda"):
        kernels.check(Arguments(candidates=("triton", "cuda")))
    with pytest.raises(ConfigError, match="repeats must be at least 1"):
        kernels.check(Arguments(repeats=0))
    group = next(kernel_cases.groups(SMOKE, ("mlstm",)))
    with pytest.raises(ConfigError, match="peer-python must name an interpreter"):
        list(kernels.asked(Arguments(peer_python="/nowhere/python"), "fla", group))


def _result() -> dict:
    """As of a full run: every candidate at every size, but one that is skipped."""
    rows = []
    for number, group in enumerate(kernel_cases.groups(Sizes(), tuple(kernels.CANDIDATES))):
        for case in group:
            section = "decode" if case.part == "decode" else case.op
            for candidate in kernels.CANDIDATES[section]:
                row = {**dataclasses.asdict(case), "candidate": candidate}
                if candidate == "fla":
                    rows.append({**row, "skipped": "flash-linear-attention is not installed"})
                    continue
                row |= {"median_seconds": 1e-3 * (1 + number % 7), "peak_bytes": 2e9}
                rows.append(kernels.with_bounds(row, hardware.GPUS["H100"]))
    about = {"date": "2027-01-01T00:00+00:00", "device": "NVIDIA H100", "driver": {}}
    return {**about, "versions": kernel_report.versions(), "rows": rows}


def test_a_table_has_a_column_per_size_and_says_what_is_missing():
    text = kernel_report.table(_result())
    assert text.startswith("NVIDIA H100; python 3.")
    assert "| mlstm 8 x (256, 512), forward + backward, ms | T=512 | T=1024 |" in text
    assert "| triton | 1 (160%, 2 GB) | 2 (80%, 2 GB) |" in text
    assert "| slstm 4, forward, µs a step | K=64 | K=128 | K=256 | K=512 |" in text
    assert "| decode 8 x (256, 512), one step, µs | B=1 | B=32 | B=256 |" in text
    assert "- `fla`, mlstm: flash-linear-attention is not installed (48 cases)" in text
    assert "| fla |" not in text


def test_a_picture_of_a_full_run_is_small(tmp_path):
    kernel_report.picture(_result(), tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 300 << 10


def test_without_a_time_there_is_no_picture(tmp_path):
    kernel_report.picture({"rows": []}, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_a_run_writes_numbers_a_table_and_a_picture(tmp_path, capsys):
    out = tmp_path / "found.json"
    options = dict(size="smoke", sections=("decode",), candidates=("recurrent",), out=out)
    assert kernels.main(Arguments(**options, **QUICK)) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["candidate"] == "recurrent" and row["repeats"] == 2 and row["device"] == "cpu"
    assert "| recurrent |" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert out.with_suffix(".png").exists()
    assert json.loads(capsys.readouterr().out)["K"] == 16
