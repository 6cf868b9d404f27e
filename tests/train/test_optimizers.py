"""The optimizers of `TrainConfig.optimizer`: their table, options, and learning rate factors."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import quick
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LMConfig, SLSTMConfig, param_shapes
from xlstm_jax.sharding import partition_spec, path_name
from xlstm_jax.train import (
    TrainConfig,
    averages,
    decay_mask,
    first_state,
    make_optimizer,
    make_schedule,
)
from xlstm_jax.train.config import OptimizerName
from xlstm_jax.train.optimizer import OPTIMIZERS, OPTIONS, lr_factor_of, weight_decay_of

CONSTANT = dict(steps=10, lr=1e-2, schedule="constant", warmup_steps=0)
KERNEL = "stack/M/mlstm/q/kernel"
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def tree(rng):
    """Parameters of two layers of a block, and of an embedding."""
    shapes = {"q": {"kernel": (2, 6, 6)}, "input_gate": {"bias": (2, 6)}}
    stack = jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = {
        "stack": {"M": {"mlstm": stack}},
        "token_embedding": {"embedding": rng.standard_normal((5, 6))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


@pytest.fixture
def params(rng):
    return tree(rng)


@pytest.fixture
def grads(rng):
    return tree(rng)


def train(cfg, params, grads, num_steps=3, **extra):
    """Parameters after some steps with the same gradients."""
    tx = make_optimizer(cfg)

    def step(carry, index):
        params, state = carry
        updates, state = tx.update(grads, state, params, step=index, **extra)
        return (optax.apply_updates(params, updates), state), None

    run = quick.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps)))
    return run()[0]


def test_the_table_has_every_name_of_the_config():
    assert tuple(OPTIMIZERS) == typing.get_args(OptimizerName)
    assert {option for record in OPTIMIZERS.values() for option in record.reads} == {*OPTIONS}


def test_adamw_is_the_chain_of_optax_bit_for_bit(params, grads, assert_same):
    cfg = TrainConfig(steps=10, lr=1e-2)
    schedule, step = make_schedule(cfg), jnp.int32(4)
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.grad_clip),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(float(schedule(step))),
    )
    tx = make_optimizer(cfg)
    update, plain_update = quick.jit(tx.update), quick.jit(chain.update)
    updates, state = update(grads, tx.init(params), params, step=step)
    expected, expected_state = plain_update(grads, chain.init(params), params)
    assert_same(updates, expected)
    assert_same(state[1], expected_state[1])


@every_optimizer
def test_the_learning_rate_depends_on_the_step_argument_and_the_scale(name, params, grads):
    """Not on a step count in the state; also under vmap. A rate of 0 changes nothing."""
    cfg = TrainConfig(optimizer=name, **CONSTANT | dict(schedule="linear", end_factor=0.5))
    tx = make_optimizer(cfg)
    # The first update of ADOPT is zero.
    _, state = train(cfg, params, grads, num_steps=1 if name == "adopt" else 0)

    @quick.jit
    @jax.vmap
    def moved(step, scale):
        return tx.update(grads, state, params, step=step, lr_scale=scale)[0]

    moves = moved(jnp.array([0, 0, 0, 10]), jnp.array([1.0, 0.0, 2.0, 1.0]))
    for leaf in jax.tree.leaves(moves):
        assert not np.allclose(leaf[0], 0, rtol=0, atol=1e-5)
        for index, factor in ((1, 0.0), (2, 2.0), (3, 0.5)):
            np.testing.assert_allclose(leaf[index], factor * leaf[0], rtol=1e-3, atol=2e-7)


@every_optimizer
def test_parameters_decay_exactly_if_the_optimizer_reads_the_weight_decay(name, params, grads):
    zeros = jax.tree.map(jnp.zeros_like, grads)
    cfg = TrainConfig(optimizer=name, **CONSTANT)
    after, _ = train(cfg, params, zeros)
    old, new = (jax.tree.leaves_with_path(x) for x in (params, after))
    for (path, before), (_, leaf) in zip(old, new, strict=True):
        decays = "weight_decay" in OPTIMIZERS[name].reads and path[-1].key == "kernel"
        assert decays == (not np.allclose(leaf, before, rtol=0, atol=1e-6)), path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=0.5), "momentum=0.5 has no effect .*'adamw'.* one of: sgd, muon"),
        (dict(optimizer="sgd", b1=0.8), "train.b1=0.8 .*'sgd'; leave it at 0.9, or use .*adamw, "),
        (dict(optimizer="lion", eps=1e-6), "train.eps=1e-06 has no effect .*'lion'"),
        (dict(optimizer="adam", weight_decay=0.2), "weight_decay=0.2 .*'adam'; leave it at 0.1"),
        (dict(optimizer="sgd", decay_pattern="x"), "decay_pattern='x' has no effect"),
        (dict(optimizer="adafactor", b2=0.9), "train.b2=0.9 has no effect"),
        (dict(optimizer="schedule_free_adamw", b1=0.0), "train.b1 must be above 0"),
    ],
)
def test_an_option_that_the_optimizer_does_not_read_is_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(TrainConfig(**options))


def test_no_weight_decay_is_accepted_by_every_optimizer():
    for name in OPTIMIZERS:
        cfg = TrainConfig(optimizer=name, weight_decay=0.0)
        assert callable(make_optimizer(cfg).update) and weight_decay_of(cfg) == 0


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon"])
def test_stacked_layers_are_updated_as_each_layer_alone(name, params, grads):
    """These optimizers depend on norms of a parameter, which are those of one layer."""
    cfg = TrainConfig(optimizer=name, grad_clip=None, **CONSTANT)
    grads["stack"]["M"]["mlstm"]["q"]["kernel"] *= jnp.array([1.0, 100.0])[:, None, None]
    params["stack"]["M"]["mlstm"]["q"]["kernel"] *= jnp.array([1.0, 30.0])[:, None, None]
    both, _ = train(cfg, params, grads)
    for layer in (slice(0, 1), slice(1, 2)):
        one = [jax.tree.map(lambda x, i=layer: x[i], tree["stack"]) for tree in (params, grads)]
        alone, _ = train(cfg, *({"stack": stack} for stack in one))
        for a, b in zip(*map(jax.tree.leaves, (both["stack"], alone["stack"])), strict=True):
            np.testing.assert_allclose(a[layer], b, rtol=1e-4, atol=1e-6)


@every_optimizer
def test_a_learning_rate_factor_scales_updates_and_0_changes_nothing(
    name, params, grads, assert_same
):
    cfg = TrainConfig(optimizer=name, **CONSTANT)
    factors = (("embedding$", 0.0), (r"q/kernel$", 0.5))
    plain, _ = train(cfg, params, grads, num_steps=1)
    after, _ = train(dataclasses.replace(cfg, lr_factors=factors), params, grads, num_steps=1)
    layers = [x["stack"]["M"]["mlstm"] for x in (plain, after, params)]
    plain_move, move = ((x["q"]["kernel"] - layers[2]["q"]["kernel"]) for x in layers[:2])
    np.testing.assert_allclose(move, 0.5 * plain_move, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(layers[1]["input_gate"]["bias"], layers[0]["input_gate"]["bias"])
    assert_same(after["token_embedding"], params["token_embedding"])


def test_the_first_matching_factor_wins(params):
    cfg = TrainConfig(lr_factors=(("q/kernel", 0.5), ("kernel|bias", 0.1)))
    assert lr_factor_of(params, cfg) == {
        "stack": {"M": {"mlstm": {"q": {"kernel": 0.5}, "input_gate": {"bias": 0.1}}}},
        "token_embedding": {"embedding": 1.0},
    }


@pytest.mark.parametrize(
    "factors",
    [(("q/kernle", 0.5),), (("kernel", 0.5), ("q/kernel", 0.1))],
    ids=["typo", "shadowed"],
)
def test_a_factor_of_no_parameter_is_an_error_with_the_nearest_paths(factors, params):
    tx = make_optimizer(TrainConfig(lr_factors=factors))
    with pytest.raises(ConfigError, match=f"got '{factors[-1][0]}'; the nearest .*{KERNEL}"):
        jax.eval_shape(tx.init, params)


def test_the_schedule_free_average_is_the_mean_of_its_iterates_weighted_by_squared_rates(
    params, grads
):
    """With gradients that do not depend on the parameters; `z` are those of Adam without b1."""
    cfg = TrainConfig(
        optimizer="schedule_free_adamw", weight_decay=0.0, **CONSTANT | dict(warmup_steps=4)
    )
    rates = [float(make_schedule(cfg)(step)) for step in range(5)]
    assert rates[0] == 0 and rates[4] > rates[1]
    z = [averages.schedule_free_state(train(cfg, params, grads, n)[1]).z for n in range(1, 6)]
    weights = np.square(rates) / np.sum(np.square(rates))
    mean = jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *z)
    y, state = train(cfg, params, grads, 5)
    for a, b in zip(*map(jax.tree.leaves, (averages.average_of(y, state), mean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert not np.allclose(jax.tree.leaves(y)[0], jax.tree.leaves(mean)[0], rtol=0, atol=1e-4)


def test_other_optimizers_are_evaluated_at_their_parameters(params):
    assert averages.average_of(params, make_optimizer(TrainConfig()).init(params)) is params


@every_optimizer
def test_moments_are_sharded_like_their_parameters(name):
    """Other arrays of the state, such as sums over rows in Adafactor, are replicated."""
    cfg = LMConfig(vocab_size=512, dim=256, pattern="ms", slstm=SLSTMConfig(num_heads=2))
    params = param_shapes(cfg)
    tx = make_optimizer(TrainConfig(optimizer=name))
    state = jax.eval_shape(lambda p: first_state(p, tx, ema=True), params)
    sizes = {"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}
    specs, num_moments = {}, 0
    for path, leaf in jax.tree.leaves_with_path(state):
        path = path_name(path)
        spec = partition_spec(path, leaf.shape, "fsdp_tensor", sizes, 2)
        if path.startswith("params/"):
            specs[path.removeprefix("params/"), leaf.shape] = spec
            continue
        owner = next(((p, s) for p, s in specs if path.endswith("/" + p)), (None, None))
        if owner[1] == leaf.shape:
            assert spec == specs[owner], path
            num_moments += 1
    assert num_moments > len(specs)
