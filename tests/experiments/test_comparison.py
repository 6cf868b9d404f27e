"""The comparison of models: equal parameters, the criteria, and a run at the smallest size."""

import json

import pytest

from experiments import comparison
from xlstm_jax.config import ConfigError
from xlstm_jax.flops import count_params


def measured(parameters=100, last=2.0, first=4.0):
    curve = {50: first, 100: 3.0, 150: last}
    return {"parameters": parameters, "curve": curve, "bits_per_byte": last}


def test_all_models_have_equal_parameters_within_two_percent():
    counts = [count_params(comparison.config("cpu", name).model) for name in comparison.MODELS]
    assert max(counts) <= (1 + comparison.TOLERANCE) * min(counts)
    assert all(500_000 < count < 600_000 for count in counts)


def test_models_with_a_preset_have_the_published_sizes():
    published = {"xLSTM[1:0]": 409.3, "xLSTM[7:1]": 408.4, "Llama": 406.6, "Mamba": 423.1}
    for name, millions in published.items():
        model = comparison.config("paper", name).model
        assert count_params(model) / 1e6 == pytest.approx(millions, abs=0.06), name
    assert comparison.config("paper", "hybrid").model.pattern == "h" * 24


@pytest.mark.parametrize(
    ("models", "holds"),
    [
        ([measured(), measured(101)], [True, True, True]),
        ([measured(), measured(103)], [True, False, True]),
        ([measured(), measured(last=3.01)], [False, True, False]),
        ([measured(), measured(first=2.9)], [False, True, True]),
    ],
)
def test_the_outcome_names_what_fails(models, holds):
    assert list(comparison.outcome("cpu", dict(enumerate(models))).values()) == holds


def test_pairs_in_another_order_than_published_are_named():
    bits = {"xLSTM[1:0]": 2.0, "Mamba": 1.9, "Llama": 2.3, "hybrid": 1.0}
    models = {name: {"bits_per_byte": value} for name, value in bits.items()}
    pairs = comparison.reversed_pairs(models)
    assert pairs == ["Mamba (1.900) is ahead of xLSTM[1:0] (2.000)"]


def test_a_run_counts_as_finished_after_its_last_evaluation(tmp_path):
    cfg = comparison.config("smoke", "Llama")
    assert comparison.finished(cfg, tmp_path) is None
    lines = [
        {"step": 5, "loss": 4.0, "step_time": 0.5},
        {"step": 5, "valid_loss": 4.0, "valid_bits_per_byte": 6.0},
        {"step": 10, "loss": 3.0, "step_time": 0.25},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison.finished(cfg, tmp_path) is None
    lines.append({"step": 10, "valid_loss": 3.5, "valid_bits_per_byte": 5.0})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = comparison.finished(cfg, tmp_path)
    assert result is not None
    assert result["curve"] == {5: 6.0, 10: 5.0} and result["bits_per_byte"] == 5.0
    assert result["tokens_per_second"] == 4 * 32 / 0.25


def test_an_unknown_model_is_rejected_with_the_known_ones():
    with pytest.raises(ConfigError, match="model='GPT' is unknown; use one of: xLSTM"):
        comparison.config("cpu", "GPT")
    with pytest.raises(ConfigError, match="is unknown; use one of: smoke, cpu, paper"):
        comparison.config("huge")


@pytest.mark.slow
def test_the_smallest_size_does_not_repeat_finished_models(
    tmp_path, monkeypatch, capsys, one_device
):
    options = dict(size="smoke", runs=tmp_path / "runs", out=tmp_path / "c.json")
    assert comparison.main(comparison.Options(models=("Llama",), **options)) == 0
    monkeypatch.setattr(comparison, "fit", None)  # a second call would fail
    assert comparison.main(comparison.Options(models=("Llama",), **options)) == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert list(result["models"]) == ["Llama"]
    assert list(result["models"]["Llama"]["curve"]) == ["5", "10"]
    assert 0 < result["models"]["Llama"]["bits_per_byte"] < 9
    assert "| Llama |" in capsys.readouterr().out
    assert 0 < (tmp_path / "c.png").stat().st_size < 300 * 1024
