"""Learning rates at every boundary, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.train import TrainConfig, decay_mask, make_optimizer, make_schedule
from xlstm_jax.train.optimizer import continued_end_factor, norm, path_name

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
def test_every_part_begins_and_ends_where_it_should(schedule, middle):
    end = 1.0 if schedule == "constant" else 0.1
    cfg = TrainConfig(schedule=schedule, **PARTS)
    expected = [0.0, 0.5, 1.0, middle, end, (end + 0.01) / 2, 0.01, 0.01]
    np.testing.assert_allclose(rates(cfg, [0, 5, 10, 45, 80, 90, 100, 200]), expected, rtol=1e-6)


def test_wsd_holds_the_peak_and_then_decays():
    cfg = TrainConfig(schedule="wsd", decay_steps=30, **PARTS)
    np.testing.assert_allclose(
        rates(cfg, [0, 10, 30, 50, 65, 80, 100]), [0, 1, 1, 1, 0.55, 0.1, 0.01], rtol=1e-6
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential", "wsd"])
def test_a_schedule_without_warmup_and_cooldown_is_its_main_part(schedule):
    cfg = TrainConfig(steps=50, lr=2.0, schedule=schedule, warmup_steps=0)
    end = 2.0 if schedule == "constant" else 0.2
    np.testing.assert_allclose(rates(cfg, [0, 50, 80]), [2.0, end, end], rtol=1e-6)


def test_a_share_below_one_is_the_same_as_its_count():
    shares = TrainConfig(steps=200, warmup_steps=0.1, cooldown_steps=0.25)
    counts = TrainConfig(steps=200, warmup_steps=20, cooldown_steps=50)
    assert shares.parts == (20, 0, 130, 50)
    assert rates(shares, range(0, 201, 7)) == rates(counts, range(0, 201, 7))


def test_a_warmup_as_long_as_the_run_never_falls():
    cfg = TrainConfig(steps=10, lr=1.0, warmup_steps=10)
    np.testing.assert_allclose(rates(cfg, [0, 5, 9, 10]), [0, 0.5, 0.9, 1.0], rtol=1e-6)


def test_a_decay_goes_on_at_the_same_rate():
    """With the end factor raised to the ratio of its lengths."""
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


def test_a_decay_continues_at_the_same_rate():
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
    marked = jax.tree_util.tree_leaves_with_path(decay_mask(shapes))
    decayed = {path_name(path) for path, keep in marked if keep}
    spared = {path_name(path) for path, keep in marked if not keep}
    assert decayed and all(name.endswith("/kernel") for name in decayed)
    assert "token_embedding/embedding" in spared and "lm_head/kernel" in decayed
    # Behind a stacked layer axis every decayed parameter is at least a matrix.
    sizes = {path_name(p): leaf.ndim for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert all(sizes[name] >= 2 for name in decayed)
    assert any(name.endswith("/bias") for name in spared)
    assert any("norm" in name for name in spared)


def test_another_pattern_marks_other_parameters(shapes):
    assert not any(jax.tree.leaves(decay_mask(shapes, "$^")))
    assert all(jax.tree.leaves(decay_mask(shapes, "")))


PARAMS = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "embedding": jnp.ones((3, 2))}


def updates(cfg, grads, step, **extra):
    tx = make_optimizer(cfg)
    return tx.update(grads, tx.init(PARAMS), PARAMS, step=step, **extra)[0]


def test_without_gradient_only_weight_decay_moves_parameters():
    cfg = TrainConfig(steps=10, lr=0.5, schedule="constant", warmup_steps=0, weight_decay=0.2)
    found = updates(cfg, jax.tree.map(jnp.zeros_like, PARAMS), jnp.int32(3))
    np.testing.assert_allclose(found["a"]["kernel"], -0.5 * 0.2, rtol=1e-6)
    assert not found["a"]["bias"].any() and not found["embedding"].any()


def test_the_step_is_given_and_decides_the_rate():
    cfg = TrainConfig(steps=10, lr=1.0, schedule="linear", warmup_steps=0, weight_decay=0.0)
    sizes = [abs(float(updates(cfg, PARAMS, jnp.int32(s))["a"]["bias"][0])) for s in (0, 5, 10)]
    np.testing.assert_allclose(sizes, [1.0, 0.55, 0.1], rtol=1e-4)


def test_a_gradient_is_clipped_by_its_global_norm():
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
    for scale, found in zip(scales, grid["a"]["kernel"], strict=True):
        np.testing.assert_allclose(found, scale * alone["a"]["kernel"], rtol=1e-6)
