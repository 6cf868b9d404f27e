"""The fine-tuning experiment: its questions, its criteria, and a run at the smallest size."""

import json

import pytest

from experiments import fine_tuning
from xlstm_jax.config import ConfigError


def test_validation_questions_are_not_in_the_training_data():
    chats = fine_tuning.conversations()
    train, valid = ({chat["messages"][0]["content"] for chat in chats[name]} for name in chats)
    assert len(valid) == 100 and len(train) > 500 and not train & valid
    assert chats == fine_tuning.conversations()


def test_an_unmeasured_peer_is_no_outcome():
    record = {"valid_loss": [[1, 0.4]], "exact_answers": 0.6}
    result = {
        "before": {"valid_loss": 1.0},
        "full": record | {"optimizer_bytes": 100},
        "lora": record | {"optimizer_bytes": 30},
        "base_is_unchanged": True,
        "peer": "not measured",
    }
    assert list(fine_tuning.outcome(result).values()) == [True] * 5 + [False, None, None]
    result["peer"] = {"transformers": 1e-5, "peft": 1e-3}
    assert list(fine_tuning.outcome(result).values())[-2:] == [True, False]


def test_an_unknown_size_is_rejected_with_the_known_ones():
    with pytest.raises(ConfigError, match="'paper' is unknown; use one of: smoke, cpu"):
        fine_tuning.config("paper")


@pytest.mark.slow
def test_the_smallest_size_writes_a_result_and_a_picture(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning.cpu, "prepare", lambda: None)  # it would change this process
    out = tmp_path / "result.json"
    arguments = fine_tuning.Arguments(size="smoke", out=out, runs=tmp_path / "runs")
    assert fine_tuning.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["base_is_unchanged"] and result["peer"] == "not measured"
    for kind in ("full", "lora"):
        assert result[kind]["valid_loss"][-1][1] < result["before"]["valid_loss"]
    assert result["lora"]["optimizer_bytes"] < result["full"]["optimizer_bytes"]
    assert out.with_suffix(".png").stat().st_size < 300 * 1024
