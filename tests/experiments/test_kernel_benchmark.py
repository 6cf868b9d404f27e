"""The benchmark of kernels: what it counts, that it runs, and that failures become rows."""

import dataclasses
import json

import jax
import pytest

from experiments.benchmarks import kernel_cases, kernel_jax, kernel_report, kernel_torch, kernels
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


def test_every_length_has_the_same_number_of_tokens():
    cases = _cases(Sizes(), "mlstm")
    assert len(cases) == 3 * 8 * 2 and {case.tokens for case in cases} == {65536}


def test_the_bound_of_the_gradient_is_that_of_one_pass_each():
    """By hand: 4 (K + V) + 2 K V / L bytes forward, 8 K + 6 V + 2 K V / L backward, in bfloat16."""
    work = kernel_cases.work(LARGE)
    tokens = 65536 * 8
    assert work.bytes == tokens * (4 * 768 + 1024 + 8 * 256 + 6 * 512 + 1024)
    square = 0.625 * 256
    forward = 4 * 256 * 512 + 2 * square * (256 + 512)
    assert work.flops == tokens * (forward + 8 * 256 * 512 + 2 * square * (3 * 256 + 2 * 512))
    seconds = kernel_cases.bound_seconds(work, "bfloat16", H100)
    assert seconds == pytest.approx(1.60e-3, rel=0.01)


def test_attention_costs_what_its_causal_square_does():
    forward = kernel_cases.work(dataclasses.replace(LARGE, part="forward"), attention=True)
    assert forward.flops == 2 * 65536 * 2048 * 8 * 512
    assert kernel_cases.work(LARGE, attention=True).flops == 3.5 * forward.flops


def test_states_of_a_decode_step_do_not_fit_a_cache():
    step = dataclasses.replace(LARGE, part="decode", T=1, B=1)
    assert step.num_states * 8 * 256 * 512 * 4 >= 128 << 20
    assert dataclasses.replace(step, B=256).num_states == 1


def test_only_a_device_of_the_table_has_a_bound():
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
    found = kernel_jax.measured(_cases(SMOKE, section)[number], candidate, QUICK)
    assert found["repeats"] == 2
    assert 0 < found["fastest_seconds"] <= found["median_seconds"]
    assert found["peak_bytes"] > 0


def test_what_cannot_run_says_why(monkeypatch):
    assert "runs on a GPU" in kernel_jax.refusal(LARGE, "triton")
    assert "no such implementation" in kernel_jax.refusal(LARGE, "nothing")
    monkeypatch.setattr(kernel_torch.importlib.util, "find_spec", lambda name: None)
    assert kernel_torch.refusal("fla", {}) == "torch is not installed"


def test_a_call_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    """As on a device whose memory a gradient does not fit."""

    def measured(case, candidate, settings):
        if case.part == "forward":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return {"median_seconds": 1.0}

    monkeypatch.setattr(kernel_jax, "measured", measured)
    cases = [dataclasses.asdict(case) for case in _cases(SMOKE, "mlstm")[:2]]
    kernel_jax.main({"candidate": "chunkwise", "cases": cases, "settings": QUICK})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["error"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert second["median_seconds"] > 0


def test_a_process_that_dies_is_a_row_with_an_error():
    cases = _cases(SMOKE, "mlstm")[:2]
    rows = list(kernels.ask(Arguments(peer_python="false"), "fla", cases))
    assert [row["error"] for row in rows] == ["ended with code 1"] * 2
    with pytest.raises(ConfigError, match="peer-python must name an interpreter"):
        list(kernels.ask(Arguments(peer_python="/nowhere/python"), "fla", cases))


def test_invalid_arguments_are_refused():
    with pytest.raises(ConfigError, match="candidates must be of .*got cuda"):
        Arguments(candidates=("triton", "cuda"))
    for name in ("repeats", "warmup"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            Arguments(**{name: 0})


def test_a_full_run_makes_a_table_and_a_picture(tmp_path):
    """Every candidate at every size, but one that is skipped."""
    rows = []
    for case in _cases(Sizes(), *kernels.CANDIDATES):
        for candidate in kernels.CANDIDATES[case.section]:
            row = {**dataclasses.asdict(case), "candidate": candidate, "device": H100}
            row |= {"skipped": "absent"} if candidate == "fla" else {"median_seconds": 1e-3}
            rows.append(kernels.with_bound(row, case))
    about = {"date": "2027-01-01T00:00+00:00", "device": H100, "driver": {}, "versions": {}}
    text = kernel_report.table({**about, "rows": rows})
    assert "| triton | 1 (160%) |" in text and "- `fla`, mlstm: absent (48 cases)" in text
    kernel_report.picture({**about, "rows": rows}, tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 300 << 10


def test_a_run_writes_numbers_and_a_table(tmp_path):
    out = tmp_path / "found.json"
    options = dict(size="smoke", sections=("decode",), candidates=("triton",), out=out)
    assert kernels.main(Arguments(**options)) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["K"] == 16 and row["device"] == "cpu" and "GPU" in row["skipped"]
    assert "- `triton`, decode: " in out.with_suffix(".md").read_text(encoding="utf-8")
