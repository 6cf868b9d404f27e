"""Distillation: the two losses, inherited weights, and a run of all stages at a toy size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distillation
from experiments.distillation import SMOKE, STUDENTS
from tests import quick
from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.modules import LM


def init(cfg, seed=0):
    tokens = jnp.zeros((1, 8), jnp.int32)
    return quick.jit(LM(cfg).init)(jax.random.key(seed), tokens)["params"]


def batch(T=12) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, T + 1)).astype(np.int32)
    weights = np.ones((2, T), np.float32)
    weights[1, 5:] = 0
    segments, index = np.ones((2, T), np.int32), np.arange(2)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, weights, index)


def divergence(p, q):
    return float(np.sum(p * np.log(p / q)))


def test_sparse_kl_is_the_divergence_over_top_tokens_and_the_rest():
    rng = np.random.default_rng(0)
    teacher, student = rng.standard_normal((2, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, student))
    full = distillation.sparse_kl(teacher, student, 9)
    np.testing.assert_allclose(full, divergence(p, q), rtol=1e-3, atol=2e-5)
    top = np.argsort(-p)[:3]
    merged = [np.append(x[top], 1 - x[top].sum()) for x in (p, q)]
    actual = distillation.sparse_kl(teacher, student, 3)
    np.testing.assert_allclose(actual, divergence(*merged), rtol=1e-5)
    assert abs(distillation.sparse_kl(teacher, teacher, 3)) < 1e-6
    assert 0 < actual < full + 2e-5  # merging tokens never raises a divergence


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_inherits_all_weights_but_those_of_gates_and_norms_of_heads(name):
    letter = STUDENTS[name]
    teacher = init(SMOKE.model)
    model = distillation.student_config(SMOKE.model, letter)
    fresh = init(model, seed=1)
    params, inherited = distillation.inherit(teacher, fresh, letter)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    same = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(fresh), strict=True
        )
        if x is y
    ]
    own = ("forget_gate", "input_gate", "output_gate", "multihead_norm")
    assert same and all(any(part in path for part in own) for path in same), same
    assert inherited == sum(x.size for x in jax.tree.leaves(teacher))
    layer = {"M": "mlstm", "h": "hybrid"}[letter]
    actual = params["stack"][letter][layer]["q"]["kernel"]
    np.testing.assert_array_equal(actual, teacher["stack"]["a"]["attention"]["q"]["kernel"])


@pytest.mark.parametrize("name", distillation.LOSSES)
def test_losses_are_zero_for_the_teacher_and_sum_over_targets(name):
    model, params, other = LM(SMOKE.model), init(SMOKE.model), init(SMOKE.model, seed=1)
    loss_fn = quick.jit(distillation.LOSSES[name](model, model, params))
    total, sums = loss_fn(params, batch())
    assert abs(total) < 1e-4
    total, sums = loss_fn(other, batch())
    assert total > 0.1 and float(sums.ce_sum) == float(total)
    assert sums.weight_sum == 12 + 5
    changed = batch()
    changed.inputs[1, 5:] = 7  # after the last target of its sequence
    np.testing.assert_allclose(loss_fn(other, changed)[0], total, rtol=1e-5)


def test_a_teacher_with_other_blocks_or_fewer_heads_of_keys_is_refused():
    with pytest.raises(ConfigError, match="pattern='mm' must have attention blocks"):
        distillation.student_config(dataclasses.replace(SMOKE.model, pattern="mm"), "M")
    attention = dataclasses.replace(SMOKE.model.attention, num_kv_heads=2)
    with pytest.raises(ConfigError, match="num_kv_heads=2 must equal its num_heads=4"):
        distillation.student_config(dataclasses.replace(SMOKE.model, attention=attention), "h")


@pytest.mark.slow
def test_all_stages_at_a_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distillation, "STUDENTS", {"hybrid": "h"})
    out = tmp_path / "result.json"
    args = distillation.Arguments(size="smoke", out=out, runs=tmp_path / "runs")
    assert distillation.main(args) == 0
    result = json.loads(out.read_text())
    assert set(result["students"]) == {"hybrid"}
    for student in result["students"].values():
        kinds = {"hidden", "sparse_kl", "inherited", "scratch"}
        assert set(student["valid_loss"]) == set(student["agreement"]) == kinds
        assert student["state_bytes"]["256"] == student["state_bytes"]["2048"]
    assert out.with_suffix(".png").exists()
    assert "hybrid: within 5 % of the teacher" in capsys.readouterr().out
