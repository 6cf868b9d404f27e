"""Frozen parameters: no gradient, no optimizer state, and not a bit of them changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.plan.formula import _state_shapes
from xlstm_jax.sharding import make_devices
from xlstm_jax.train import (
    LoraConfig,
    TrainConfig,
    fit,
    init_state,
    make_optimizer,
    make_train_step,
    restore_params,
)
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.trainable import combine, num_bytes, partition

FREEZE = "token_embedding|lm_head"
CFG = TrainConfig(
    steps=20, warmup_steps=0, schedule="constant", lr=0.1, grad_clip=None, freeze=FREEZE
)
TOKENS = jnp.zeros((1, 1), jnp.int32)


@pytest.fixture(scope="module")
def run(tiny_lm, experiment, tmp_path_factory):
    cfg, run_dir = experiment(freeze=FREEZE, steps=6), tmp_path_factory.mktemp("frozen") / "run"
    return cfg, fit(cfg, run_dir), run_dir


def test_frozen_parameters_are_bit_identical_and_without_optimizer_state(run, assert_same):
    cfg, result, run_dir = run
    params, moments = result.state.params, optax.tree.get(result.state.opt_state, "mu")
    trained, frozen = partition(params, FREEZE)
    assert sorted(map(len, map(jax.tree.leaves, (trained, frozen, moments)))) == [2, 2, 2]
    about = json.loads((run_dir / "run.json").read_text())
    sizes = [num_bytes(tree) for tree in (params, trained, result.state.opt_state)]
    names = ("params_bytes", "trained_params_bytes", "optimizer_bytes")
    assert [about[name] for name in names] == sizes
    # Two moments of each trained parameter, and a count of steps.
    assert sizes[2] == 2 * sizes[1] + 4
    assert about["num_trained_params"] == 8 * 8 + 8
    initial = TrainProgram(cfg, make_devices(cfg.mesh)).init().params
    assert_same(partition(initial, FREEZE)[1], frozen)
    assert not np.array_equal(*(p["ffn"]["proj_down"]["kernel"] for p in (initial, params)))
    assert_same(restore_params(run_dir)[1], params)


def test_a_resumed_run_with_frozen_parameters_is_bit_exact(
    run, tmp_path, assert_same, crash_and_resume
):
    cfg, expected, _ = run
    assert_same(crash_and_resume(cfg, tmp_path / "run").state, expected.state)


@pytest.mark.parametrize(
    "freeze, message",
    [
        ("embeding", r"match the path of a parameter, got no match; .* token_embedding/embedding"),
        (".", "must leave a parameter to train, but matches all 4 paths"),
    ],
)
def test_a_pattern_without_effect_is_rejected_before_anything_is_written(
    tiny_lm, experiment, tmp_path, freeze, message
):
    with pytest.raises(ConfigError, match=message):
        fit(experiment(freeze=freeze), tmp_path / "run")
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_and_norms_are_those_of_the_trained_parameters(tiny, batches, accumulation):
    cfg, tx, batch = dataclasses.replace(CFG, accumulation=accumulation), optax.sgd(0.1), batches()
    state = init_state(tiny, tx, jax.random.key(0), TOKENS, freeze=FREEZE)
    everything = dataclasses.replace(cfg, freeze=None)
    expected, _ = jax.jit(make_train_step(tiny, tx, everything))(
        init_state(tiny, tx, jax.random.key(0), TOKENS), batch
    )
    new, metrics = jax.jit(make_train_step(tiny, tx, cfg))(state, batch)
    np.testing.assert_array_equal(
        new.params["lm_head"]["kernel"], state.params["lm_head"]["kernel"]
    )
    ours, theirs = (tree.params["ffn"]["proj_down"] for tree in (new, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    updates = jax.tree.map(jnp.subtract, ours, state.params["ffn"]["proj_down"])
    np.testing.assert_allclose(metrics["grad_norm"], 10 * optax.tree.norm(updates), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(ours), rtol=1e-6)


def test_vmapped_runs_with_frozen_parameters_equal_separate_ones(tiny, batches):
    tx, keys = make_optimizer(CFG), jax.random.split(jax.random.key(3))
    batch = jax.tree.map(jnp.asarray, batches())
    step = make_train_step(tiny, tx, CFG)

    def train(key):
        return step(init_state(tiny, tx, key, TOKENS, freeze=FREEZE), batch)[0].params

    together = jax.jit(jax.vmap(train))(keys)
    alone = jax.jit(train)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), together, alone)


def test_the_parts_of_a_tree_combine_to_it():
    params = {"a": {"kernel": 1.0, "bias": 2.0}, "b": {"kernel": 3.0}}
    trained, frozen = partition(params, "bias")
    assert jax.tree.leaves(trained) == [1.0, 3.0] and jax.tree.leaves(frozen) == [2.0]
    assert combine(trained, frozen) == combine(*partition(params)) == params


def test_a_plan_counts_optimizer_state_of_trained_parameters_only():
    model = LMConfig(vocab_size=64, dim=64, pattern="mM")
    frozen = _state_shapes(model, TrainConfig(freeze="^stack/m/|embedding"), LoraConfig())
    params, opt_state = frozen
    assert num_bytes(opt_state) == 2 * num_bytes(partition(params, "^stack/m/|embedding")[0]) + 4
    params, opt_state = _state_shapes(model, TrainConfig(), LoraConfig(rank=2))
    assert num_bytes(opt_state) == 2 * num_bytes(params["lora"]) + 4
