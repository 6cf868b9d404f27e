"""The benchmarks run and account for what they measure. How fast anything is, no test asserts."""

import dataclasses
import json

import pytest

from experiments.benchmarks import cases, convert_memory, depth, length, measure, peer, train_step
from experiments.benchmarks.cases import Case
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LMConfig, SLSTMConfig, presets

TINY = Case(
    model=LMConfig(vocab_size=11, dim=8, pattern="s", slstm=SLSTMConfig(num_heads=2), remat="none"),
    batch_size=2,
    seq_len=4,
)


@pytest.fixture(scope="module")
def compiled():
    """The step of the small case, compiled once for all tests."""
    return cases.compiled_step(TINY)


@pytest.fixture
def tiny(monkeypatch, compiled):
    """One small case, and a process whose settings stay as they are."""
    monkeypatch.setattr(cases, "CASES", {"large": TINY})
    monkeypatch.setattr(cases, "compiled_step", lambda case: compiled)
    monkeypatch.setattr(measure, "MATRIX_SIZE", 8)
    monkeypatch.setattr(cpu, "prepare", lambda: False)


def test_a_run_without_a_peer_leaves_its_column_empty(tiny, tmp_path, capsys):
    out = tmp_path / "results" / "tiny.json"
    options = train_step.Options(config="large", sections=("train",), repeats=7, out=out)
    assert train_step.main(options) == 0
    row = json.loads(out.read_text())["train"]["large"]
    assert row["peer"] is None
    assert row["ours"]["repeats"] == 7
    low, high = row["ours"]["quartiles_seconds"]
    assert row["ours"]["fastest_seconds"] <= low <= row["ours"]["median_seconds"] <= high
    assert "large, ours:" in capsys.readouterr().out


def test_every_timed_step_trains(compiled):
    advance, _ = compiled
    losses = [float(advance()["loss"]) for _ in range(100)]
    assert losses[-1] < losses[0]


def test_rates_are_those_of_the_median_step():
    side = train_step.side([1.0, 2.0, 9.0], tokens=100, flops=8.0, rate=16.0)
    assert side["tokens_per_second"] == 50
    assert side["share_of_matrix_product_rate"] == 0.25


def test_a_peer_is_measured_in_turns_with_us(tiny):
    class Other:
        description = {"parameters": 1, "threads": 2}
        turns = []

        def seconds(self, steps):
            self.turns.append(steps)
            return [1.0] * steps

    row = train_step.in_turns("large", TINY, Other(), repeats=12)
    assert Other.turns == [5, 5, 2]
    assert row["peer"]["tokens_per_second"] == TINY.tokens
    assert row["ours_over_peer"] == row["ours"]["tokens_per_second"] / TINY.tokens


@pytest.mark.parametrize("python", ["no/such/python", "false"])
def test_an_interpreter_that_cannot_serve_is_refused_in_one_sentence(tiny, python, capsys):
    options = train_step.Options(config="large", sections=("train",), peer_python=python)
    assert train_step.main(options) == 2
    assert "peer-python must name an interpreter" in capsys.readouterr().err


def test_repeats_must_be_at_least_one():
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        train_step.Options(repeats=0)


def test_both_cases_have_as_many_parameters_as_the_models_of_the_peer():
    recorded = {"large": 3_353_888, "v1": 720_936}  # what peer_torch.py answers
    counts = {name: train_step.count_params(case.model) for name, case in cases.CASES.items()}
    assert counts == recorded
    assert set(peer.SCRIPT.parent.glob("peer_torch.py")) == {peer.SCRIPT}


def test_cost_per_token_is_given_for_each_length():
    result = length.run(repeats=1, lengths=(8, 16))
    assert set(result["lengths"]) == {"8", "16"}
    assert result["lengths"]["8"]["bytes_per_token"] > 0
    assert result["max_over_min"]["bytes_per_token"] >= 1


def test_compile_times_are_compared_at_their_fastest(monkeypatch):
    seconds = iter([2.0, 4.0, 8.0, 6.0])
    monkeypatch.setattr(depth, "compile_seconds", lambda model: next(seconds))
    models = {"one": TINY.model, "two": dataclasses.replace(TINY.model, pattern="ss")}
    result = depth.compare(models, [("two", "one")], repeats=2)
    assert result["models"]["one"] == {"pattern": "s", "bodies": 1, "seconds": [2.0, 8.0]}
    assert result["ratios"] == {"two / one": 2.0}


@pytest.mark.slow
def test_the_train_step_compiles_from_shapes_alone():
    assert depth.compile_seconds(TINY.model) > 0


def test_the_shortened_preset_has_both_kinds_of_block():
    pattern = depth.shortened(presets.get(depth.PRESET).pattern, 6)
    assert len(pattern) == 6
    assert set(pattern) == {"m", "s"}


@pytest.mark.slow
def test_the_memory_of_a_conversion_is_that_of_its_own_process(monkeypatch, tmp_path, capsys):
    tiny = presets.large(16, 2, 2, 24, vocab_size=32)
    monkeypatch.setattr(convert_memory, "MODEL", tiny)
    out = tmp_path / "memory.json"
    assert convert_memory.main(convert_memory.Options(shard_mib=1, out=out)) == 0
    found = json.loads(out.read_text())
    assert found["checkpoint_bytes"] > 4 * found["parameters"]
    peaks = found["peak_bytes"]
    assert 0 < peaks["interpreter"] < peaks["imports"] < peaks["hf-to-run"]
    assert "load_hf: peak" in capsys.readouterr().out
