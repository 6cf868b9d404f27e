"""The kernel benchmark: counted work, measurement on a CPU, and records of failures."""

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
    measure,
)
from experiments.benchmarks.kernel_cases import Case, Sizes
from experiments.benchmarks.kernels import Arguments
from xlstm_jax import ops
from xlstm_jax.config import ConfigError

SMOKE = Sizes(**kernel_cases.SMOKE)
QUICK = {"repeats": 2, "warmup": 1, "sample_seconds": 1e-4}
LARGE = Case(op="mlstm", part="gradient", B=32, T=2048, H=8, K=256, V=512)
H100 = "NVIDIA H100 80GB HBM3"


def _cases(sizes: Sizes, *sections: str) -> list[Case]:
    return sum(kernel_cases.groups(sizes, sections), [])


def test_all_lengths_have_the_same_number_of_tokens():
    cases = _cases(Sizes(), "mlstm")
    assert len(cases) == 3 * 8 * 2 and {case.tokens for case in cases} == {65536}


def test_gradient_bound_counts_one_forward_and_one_backward_pass():
    """By hand: 4 (K + V) + 2 K V / L bytes forward, 8 K + 6 V + 2 K V / L backward, in bfloat16."""
    work = kernel_cases.work(LARGE)
    tokens = 65536 * 8
    assert work.bytes == tokens * (4 * 768 + 1024 + 8 * 256 + 6 * 512 + 1024)
    square = 0.625 * 256
    forward = 4 * 256 * 512 + 2 * square * (256 + 512)
    assert work.flops == tokens * (forward + 8 * 256 * 512 + 2 * square * (3 * 256 + 2 * 512))
    seconds = kernel_cases.bound_seconds(work, "bfloat16", H100)
    assert seconds == pytest.approx(1.60e-3, rel=0.01)


def test_attention_work_is_that_of_the_causal_half():
    forward = kernel_cases.work(dataclasses.replace(LARGE, part="forward"), attention=True)
    assert forward.flops == 2 * 65536 * 2048 * 8 * 512
    assert kernel_cases.work(LARGE, attention=True).flops == 3.5 * forward.flops


def test_decode_states_exceed_any_cache():
    step = dataclasses.replace(LARGE, part="decode", T=1, B=1)
    assert step.num_states * 8 * 256 * 512 * 4 >= 128 << 20
    assert dataclasses.replace(step, B=256).num_states == 1


def test_only_known_devices_have_a_bound():
    known = f"{H100}, NVIDIA H200, NVIDIA A100-SXM4-80GB, NVIDIA B200, NVIDIA A10, NVIDIA L4"
    unknown = "NVIDIA H100 PCIe, NVIDIA H100 NVL, NVIDIA A100-SXM4-40GB, NVIDIA A10G, Tesla T4, cpu"
    bound = lambda kind: kernel_cases.bound_seconds(kernel_cases.work(LARGE), "bfloat16", kind)  # noqa: E731
    assert all(map(bound, [*known.split(", "), "NVIDIA GeForce RTX 5090"]))
    assert not any(map(bound, [*unknown.split(", "), "NVIDIA A100-PCIE-40GB", "NVIDIA L40S"]))


@pytest.mark.parametrize(
    "section,number,candidate",
    [("mlstm", 0, "attention"), ("slstm", 1, [*ops.implementations("slstm")][-1])]
    + [("decode", 0, "recurrent")],
)
def test_a_candidate_is_timed(section, number, candidate):
    record = kernel_jax.measure_case(_cases(SMOKE, section)[number], candidate, QUICK)
    assert record["repeats"] == 2
    assert 0 < record["fastest_seconds"] <= record["median_seconds"]
    assert record["peak_bytes"] > 0


def test_unsupported_cases_have_a_reason(monkeypatch):
    assert "runs on a GPU" in kernel_jax.refusal(LARGE, "triton")
    assert "no such implementation" in kernel_jax.refusal(LARGE, "nothing")
    monkeypatch.setattr(kernel_torch.importlib.util, "find_spec", lambda name: None)
    assert kernel_torch.refusal("fla", {}) == "torch is not installed"


def test_a_failing_case_does_not_affect_others(monkeypatch, capsys):
    """Such as an allocation that exceeds the memory of the device."""

    def measure_case(case, candidate, settings):
        if case.part == "forward":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return {"median_seconds": 1.0}

    monkeypatch.setattr(kernel_jax, "measure_case", measure_case)
    cases = [dataclasses.asdict(case) for case in _cases(SMOKE, "mlstm")[:2]]
    kernel_jax.main({"candidate": "chunkwise", "cases": cases, "settings": QUICK})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["error"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert second["median_seconds"] > 0


def test_a_process_that_exits_early_yields_records_with_errors():
    cases = _cases(SMOKE, "mlstm")[:2]
    records = list(kernels.measure_cases(Arguments(peer_python="false"), "fla", cases))
    assert [record["error"] for record in records] == ["exited with code 1"] * 2
    with pytest.raises(ConfigError, match="peer-python must name an interpreter"):
        list(kernels.measure_cases(Arguments(peer_python="/nowhere/python"), "fla", cases))


def test_invalid_arguments_are_rejected():
    with pytest.raises(ConfigError, match="candidates must be among .*got cuda"):
        Arguments(candidates=("triton", "cuda"))
    for name in ("repeats", "warmup"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            Arguments(**{name: 0})


def test_a_full_result_gives_a_table_and_a_plot(tmp_path):
    """Every candidate at every size; one is skipped."""
    records = []
    for case in _cases(Sizes(), *kernels.CANDIDATES):
        for candidate in kernels.CANDIDATES[case.section]:
            record = {**dataclasses.asdict(case), "candidate": candidate, "device": H100}
            record |= {"skipped": "absent"} if candidate == "fla" else {"median_seconds": 1e-3}
            records.append(kernels.with_bound(record, case))
    info = {"date": "2027-01-01T00:00+00:00", "device": H100, "driver": {}, "versions": {}}
    result = {**info, "records": records}
    text = kernel_report.table(result)
    assert "| triton | 1 (160%) |" in text and "- `fla`, mlstm: absent (48 cases)" in text
    kernel_report.plot(result, tmp_path / "plot.png")
    assert 10_000 < (tmp_path / "plot.png").stat().st_size < 300 << 10


def test_a_run_writes_records_and_a_table(tmp_path):
    out = tmp_path / "kernels.json"
    options = dict(size="smoke", sections=("decode",), candidates=("triton",), out=out)
    assert kernels.main(Arguments(**options)) == 0
    (record,) = measure.read_records(out)
    assert record["K"] == 16 and record["device"] == "cpu" and "GPU" in record["skipped"]
    assert "- `triton`, decode: " in out.with_suffix(".md").read_text(encoding="utf-8")
