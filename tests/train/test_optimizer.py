"""Learning rate schedules, weight decay masks and the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train import TrainConfig, decay_mask, make_optimizer, make_schedule
from xlstm_jax.train.optimizer import norm
from xlstm_jax.train.schedules import continued_end_factor

# Of 100 steps with lr 1: warm-up 10, cool-down 20 to 0.01, main part 10..80 down to 0.1.
PARTS = dict(steps=100, lr=1.0, warmup_steps=10, cooldown_steps=20, cooldown_lr=0.01)


def rates(cfg, steps):
    schedule = make_schedule(cfg)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", 10**-0.5),
        ("constant", 1.0),
    ],
)
def test_every_part_of_a_schedule_starts_and_ends_at_its_rate(schedule, middle):
    end = 1.0 if schedule == "constant" else 0.1
    cfg = TrainConfig(schedule=schedule, **PARTS)
    expected = [0.0, 0.5, 1.0, middle, end, (end + 0.01) / 2, 0.01, 0.01]
    np.testing.assert_allclose(rates(cfg, [0, 5, 10, 45, 80, 90, 100, 200]), expected, rtol=1e-6)


def test_wsd_is_constant_at_the_peak_and_then_decays():
    cfg = TrainConfig(schedule="wsd", decay_steps=30, **PARTS)
    np.testing.assert_allclose(
        rates(cfg, [0, 10, 30, 50, 65, 80, 100]), [0, 1, 1, 1, 0.55, 0.1, 0.01], rtol=1e-6
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential", "wsd"])
def test_a_schedule_without_warmup_and_cooldown_is_its_main_part(schedule):
    cfg = TrainConfig(steps=50, lr=2.0, schedule=schedule, warmup_steps=0)
    end = 2.0 if schedule == "constant" else 0.2
    np.testing.assert_allclose(rates(cfg, [0, 50, 80]), [2.0, end, end], rtol=1e-6)


def test_a_fraction_of_steps_equals_its_number_of_steps():
    fractions = TrainConfig(steps=200, warmup_steps=0.1, cooldown_steps=0.25)
    counts = TrainConfig(steps=200, warmup_steps=20, cooldown_steps=50)
    assert fractions.parts == (20, 0, 130, 50)
    assert rates(fractions, range(0, 201, 7)) == rates(counts, range(0, 201, 7))


def test_a_warmup_over_all_steps_ends_at_the_peak():
    cfg = TrainConfig(steps=10, lr=1.0, warmup_steps=10)
    np.testing.assert_allclose(rates(cfg, [0, 5, 9, 10]), [0, 0.5, 0.9, 1.0], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_a_cooldown_after_the_warmup_starts_at_the_peak(schedule):
    cfg = TrainConfig(schedule=schedule, **PARTS | dict(warmup_steps=80))
    np.testing.assert_allclose(rates(cfg, [40, 80, 90, 100]), [0.5, 1.0, 0.505, 0.01], rtol=1e-6)


def test_an_extended_exponential_decay_has_the_same_rate():
    """The end factor must be raised to the ratio of new to old steps."""
    assert 0.1 ** (540_000 / 495_000) == pytest.approx(0.0811, abs=5e-5)  # of a published recipe
    old = TrainConfig(steps=100, lr=1.0, schedule="exponential", warmup_steps=0)
    new = TrainConfig(
        steps=150,
        lr=1.0,
        schedule="exponential",
        warmup_steps=0,
        end_factor=0.1 ** (150 / 100),
    )
    np.testing.assert_allclose(rates(new, [0, 40, 100]), rates(old, [0, 40, 100]), rtol=1e-5)


def test_continued_end_factor_extends_a_decay_at_the_same_rate():
    assert continued_end_factor(0.1, 495_000, 540_000) == pytest.approx(0.0811, abs=5e-5)
    options = dict(lr=1.0, schedule="exponential", warmup_steps=0)
    old = TrainConfig(steps=100, **options)
    new = TrainConfig(steps=150, end_factor=continued_end_factor(0.1, 100, 150), **options)
    np.testing.assert_allclose(rates(new, [0, 40, 100]), rates(old, [0, 40, 100]), rtol=1e-5)


@pytest.fixture(scope="module")
def shapes():
    cfg = LMConfig(vocab_size=257, dim=64, pattern="msM")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.eval_shape(LM(cfg).init, jax.random.key(0), tokens)["params"]


def test_only_weight_matrices_decay(shapes):
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(shapes))
    decayed = {path_name(path) for path, flag in mask if flag}
    excluded = {path_name(path) for path, flag in mask if not flag}
    assert decayed and all(name.endswith("/kernel") for name in decayed)
    assert "token_embedding/embedding" in excluded and "lm_head/kernel" in decayed
    # Every decayed parameter is at least a matrix, after the axis of stacked layers.
    sizes = {path_name(p): leaf.ndim for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert all(sizes[name] >= 2 for name in decayed)
    assert any(name.endswith("/bias") for name in excluded)
    assert any("norm" in name for name in excluded)


def test_the_pattern_selects_the_parameters_that_decay(shapes):
    assert not any(jax.tree.leaves(decay_mask(shapes, "$^")))
    assert all(jax.tree.leaves(decay_mask(shapes, "")))


PARAMS = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "embedding": jnp.ones((3, 2))}


def updates(cfg, grads, step, **extra):
    tx = make_optimizer(cfg)
    return tx.update(grads, tx.init(PARAMS), PARAMS, step=step, **extra)[0]


def test_with_zero_gradients_only_weight_decay_changes_parameters():
    cfg = TrainConfig(steps=10, lr=0.5, schedule="constant", warmup_steps=0, weight_decay=0.2)
    decay = updates(cfg, jax.tree.map(jnp.zeros_like, PARAMS), jnp.int32(3))
    np.testing.assert_allclose(decay["a"]["kernel"], -0.5 * 0.2, rtol=1e-6)
    assert not decay["a"]["bias"].any() and not decay["embedding"].any()


def test_the_learning_rate_depends_on_the_step_argument():
    cfg = TrainConfig(steps=10, lr=1.0, schedule="linear", warmup_steps=0, weight_decay=0.0)
    sizes = [abs(float(updates(cfg, PARAMS, jnp.int32(s))["a"]["bias"][0])) for s in (0, 5, 10)]
    np.testing.assert_allclose(sizes, [1.0, 0.55, 0.1], rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    cfg = TrainConfig(grad_clip=1.0)
    _, state = make_optimizer(cfg).update(
        jax.tree.map(lambda p: 100 * p, PARAMS),
        make_optimizer(cfg).init(PARAMS),
        PARAMS,
        step=jnp.int32(0),
    )
    moments = optax.tree.get(state, "mu")
    assert float(norm(moments)) == pytest.approx(1 - cfg.b1, rel=1e-4)


def test_one_program_serves_a_grid_of_learning_rates():
    cfg = TrainConfig(steps=10, schedule="constant", warmup_steps=0)
    scales = jnp.array([0.5, 1.0, 2.0])
    grid = jax.vmap(lambda s: updates(cfg, PARAMS, jnp.int32(1), lr_scale=s))(scales)
    alone = updates(cfg, PARAMS, jnp.int32(1))
    for scale, update in zip(scales, grid["a"]["kernel"], strict=True):
        np.testing.assert_allclose(update, scale * alone["a"]["kernel"], rtol=1e-6)
