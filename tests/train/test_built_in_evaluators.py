"""The built-in evaluators with a real model; `test_evaluators.py` replaces that of all runs."""

import pytest

from tests.train.test_evaluators import records
from xlstm_jax import data
from xlstm_jax.evaluate import loss_evaluator, position_evaluator
from xlstm_jax.generate import sample_evaluator
from xlstm_jax.modules import LM
from xlstm_jax.train import Evaluator, evaluators, fit


@pytest.mark.slow
def test_built_in_evaluators_measure_losses_and_sample_text(experiment, tmp_path):
    cfg = experiment(steps=2, eval_every=2)
    model, valid = LM(cfg.model), data.load(cfg.data, "valid")
    built_in = [
        loss_evaluator("again", model, valid, batch_size=4, max_batches=2),
        position_evaluator("at", model, valid, batch_size=4, max_batches=2),
        sample_evaluator("sample", model, valid.tokenizer, "gate ", characters=5),
    ]
    result = fit(cfg, tmp_path / "run", evaluators=built_in)
    (again,), (at,), (sample,) = (records(tmp_path / "run", e.name) for e in built_in)
    assert again["again_loss"] == pytest.approx(result.evaluation["valid_loss"], rel=1e-5)
    assert again["again_bits_per_byte"] > 0 and again["again_tokens"] > 0
    assert {"at_loss_0", "at_loss_8"} < at.keys()
    assert sample["sample_text"].startswith("gate ")
    assert evaluators.Evaluator is Evaluator
