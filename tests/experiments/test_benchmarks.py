"""The benchmarks run and report consistent figures. No test asserts a time."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.benchmarks import (
    cases,
    convert_memory,
    data_prepare,
    depth,
    length,
    measure,
    mesh,
    nnx_step,
    start_time,
    train_overhead,
    train_step,
    user_loop,
)
from tests import workloads
from tests.workloads import ModelWorkload
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.flops import count_params
from xlstm_jax.modules import LMConfig, MLSTMConfig, presets

MODEL = LMConfig(vocab_size=11, dim=8, pattern="m", mlstm=MLSTMConfig(num_heads=2), remat="none")
TINY = ModelWorkload(model=MODEL, batch_size=2, seq_len=4)


@pytest.fixture(scope="module")
def compiled():
    """The training program of the small workload."""
    return cases.compiled_step(TINY, "fsdp")


@pytest.fixture
def tiny(monkeypatch, compiled):
    """Replaces the workloads by one small one, and leaves process-wide settings unchanged."""
    monkeypatch.setattr(workloads, "MODELS", {"large": TINY})
    monkeypatch.setattr(cases, "compiled_step", lambda *_: compiled)
    monkeypatch.setattr(measure, "MATRIX_SIZE", 8)
    monkeypatch.setattr(cpu, "prepare", lambda: False)


def test_train_step_runs_without_a_peer(tiny, tmp_path):
    out = tmp_path / "results" / "tiny.json"
    args = train_step.Arguments(config="large", sections=("train",), repeats=7, out=out)
    assert train_step.main(args) == 0
    record = json.loads(out.read_text())["train"]["large"]
    assert record["peer"] is None
    ours = record["ours"]
    low, high = ours["quartiles_seconds"]
    assert ours["fastest_seconds"] <= low <= ours["median_seconds"] <= high


def test_timed_steps_reduce_the_loss(compiled):
    advance, _ = compiled
    losses = np.diff([float(advance().values["loss"]) for _ in range(100)])  # totals accumulate
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_steps_with_and_without_a_mesh_are_compared(tiny, tmp_path):
    out = tmp_path / "mesh.json"
    assert mesh.main(mesh.Arguments(repeats=2, out=out)) == 0
    record = json.loads(out.read_text())["large"]
    assert record["mesh"]["repeats"] == record["plain"]["repeats"] == 2


@pytest.mark.slow
def test_overhead_of_the_loop_is_measured_interleaved(tiny, one_device, monkeypatch, tmp_path):
    smoke = train_overhead.char_lm.config("smoke")
    train = dataclasses.replace(smoke.train, watch_every=10)
    smoke = dataclasses.replace(smoke, train=train)
    monkeypatch.setattr(train_overhead.char_lm, "config", lambda size: smoke)
    monkeypatch.setattr(train_overhead, "BLOCK", 5)
    out = tmp_path / "overhead.json"
    assert train_overhead.main(train_overhead.Arguments(repeats=2, out=out)) == 0
    record = json.loads(out.read_text())
    assert (record["full"]["repeats"], record["bare"]["repeats"]) == (4, 5)
    assert record["overhead"] == np.median(record["overheads"]) and len(record["overheads"]) == 2


@pytest.mark.slow
def test_steps_with_nnx_compute_what_those_of_linen_do(monkeypatch, tmp_path):
    losses = {}

    def seconds(call, repeats):
        losses.setdefault(call, []).extend(float(call()) for _ in range(repeats))
        return [1.0] * repeats

    monkeypatch.setattr(measure, "seconds", seconds)
    assert nnx_step.main(measure.TimedArguments(repeats=2, out=tmp_path / "nnx.json")) == 0
    first, *others = losses.values()
    assert len(others) == 3 and first[0] > first[-1]
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


@pytest.mark.slow
def test_plain_loop_runs_without_a_peer_and_reduces_the_loss(tiny, tmp_path):
    out = tmp_path / "user_loop.json"
    assert user_loop.main(user_loop.Arguments(repeats=2, out=out)) == 0
    assert json.loads(out.read_text())["train"]["large"]["ours"]["page_faults"] >= 0
    advance, _ = user_loop.plain_loop(TINY)
    losses = [float(advance()) for _ in range(100)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_both_starts_have_the_same_phases(tmp_path):
    out = tmp_path / "start_time.json"
    assert start_time.main(start_time.Arguments(out=out)) == 0
    result = json.loads(out.read_text())
    assert result["first"].keys() == result["second"].keys() > {"initialize", "trace", "compile"}


def test_timers_alternate():
    calls = []
    timers = {name: lambda n, name=name: calls.append((name, n)) or [1.0] * n for name in "ab"}
    assert measure.interleaved(timers, 12) == {"a": [1.0] * 12, "b": [1.0] * 12}
    assert calls == [("a", 5), ("b", 5), ("a", 5), ("b", 5), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("key", ["records", "rows"])
def test_records_of_old_and_new_result_files_are_read(key, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"date": "2026-11-23", key: [{"K": 1}]}))
    assert measure.read_records(tmp_path / "result.json") == [{"K": 1}]


def test_rates_use_the_median_step():
    rates = train_step.step_rates("name", 100, 8.0, 16.0, "ours", [1.0, 2.0, 9.0])
    assert rates["tokens_per_second"] == 50 and rates["share_of_matrix_product_rate"] == 0.25


@pytest.mark.parametrize("python", ["no/such/python", "false"])
def test_an_unusable_peer_interpreter_is_rejected(python):
    with pytest.raises(ConfigError, match="peer-python must name an interpreter"):
        train_step.train("large", 1, python)


def test_parameter_counts_equal_those_of_the_peer():
    recorded = {"large": 3_353_888, "v1": 720_936}  # as reported by peer_torch.py
    assert {name: count_params(w.model) for name, w in workloads.MODELS.items()} == recorded


def test_cost_per_token_is_reported_for_each_length():
    result = length.run(repeats=1, lengths=(8,))
    assert result["lengths"]["8"]["bytes_per_token"] > 0
    assert result["max_over_min"]["bytes_per_token"] == 1


def test_compile_time_ratios_use_the_fastest_repeats(monkeypatch):
    seconds = iter([2.0, 4.0, 8.0, 6.0])
    monkeypatch.setattr(depth, "compile_seconds", lambda model: next(seconds))
    models = {"one": MODEL, "two": dataclasses.replace(MODEL, pattern="mm")}
    result = depth.compare(models, (("two", "one"),), repeats=2)
    assert result["models"]["one"] == {"pattern": "m", "bodies": 1, "seconds": [2.0, 8.0]}
    assert result["ratios"] == {"two / one": 2.0}


def test_shortened_preset_has_both_kinds_of_block():
    assert set(depth.shortened(presets.get(depth.PRESET).pattern, 6)) == {"m", "s"}


@pytest.mark.slow
def test_conversion_memory_is_measured_per_process(monkeypatch, tmp_path):
    monkeypatch.setattr(convert_memory, "MODEL", presets.large(16, 2, 2, 24, vocab_size=32))
    out = tmp_path / "memory.json"
    assert convert_memory.main(convert_memory.Arguments(shard_mib=1, out=out)) == 0
    result = json.loads(out.read_text())
    assert result["checkpoint_bytes"] > 4 * result["parameters"]
    peaks = result["peak_bytes"]
    assert 0 < peaks["interpreter"] < peaks["imports"] < peaks["hf-to-run"]


@pytest.mark.slow
def test_preparation_is_compared_on_the_same_documents(tmp_path):
    out = tmp_path / "prepare.json"
    assert data_prepare.main(data_prepare.Arguments(mib=1, files=2, repeats=1, out=out)) == 0
    result = json.loads(out.read_text())
    (library,), (prepared,) = result["library"], result["prepare"]
    assert library["bytes"] == prepared["bytes"] >= 2**20
    documents = prepared["tokens"] - library["tokens"]  # each has an end-of-document token
    assert 100 < documents < 5000
    assert prepared["rss"] > prepared["pss"] > 0 and prepared["cpu_seconds"] > 0
