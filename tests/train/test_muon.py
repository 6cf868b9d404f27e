"""Muon: which matrices parameters consist of, and that each is orthogonalized by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import quick
from tests.modules.models import BASELINES
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, param_shapes, presets
from xlstm_jax.modules.baselines import options
from xlstm_jax.modules.kinds import BLOCKS, Matrices, matrices_of
from xlstm_jax.sharding import MeshConfig, make_devices, path_name
from xlstm_jax.sharding.axes import logical_axes
from xlstm_jax.train import TrainConfig, make_optimizer

CFG = TrainConfig(
    optimizer="muon", steps=10, lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0
)
MODEL = LMConfig(
    vocab_size=11,
    dim=16,
    pattern="msMm",
    mlstm=MLSTMConfig(num_heads=2, use_bias=True),
    slstm=SLSTMConfig(num_heads=2, ffn_bias=True),
    large=LargeConfig(num_heads=2, use_bias=True),
)
SPLIT = {
    "stack/m/mlstm/proj_up/kernel": Matrices(parts=2),
    "stack/m/mlstm/q_proj/kernel": Matrices("bio"),
    "stack/s/slstm/cell_input/kernel": Matrices("bio"),
    "stack/s/slstm/recurrent_kernel": Matrices("bibo"),
    "stack/s/ffn/proj_up/kernel": Matrices(parts=2),
    "stack/M/ffn/proj_up/kernel": Matrices(),
    "stack/M/mlstm/output_gate/kernel": Matrices(),
}
ADAM = ("token_embedding", "lm_head", "norm", "bias", "conv", "mlstm/input_gate", "learnable_skip")
ADAM += ("mlstm/forget_gate",)


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def model():
    """Random parameters and gradients, and the updates of two steps."""
    rng = np.random.default_rng(0)

    def noise(x):
        return jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    params = jax.tree.map(noise, param_shapes(MODEL))
    grads = jax.tree.map(noise, params)
    return params, grads, updates(params, grads)


def updates(params, grads, num_steps=2):
    tx = make_optimizer(dataclasses.replace(CFG, grad_clip=None))

    def step(state, index):
        update, state = tx.update(grads, state, params, step=index)
        return state, update

    run = quick.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(num_steps))[1])
    return jax.tree.map(lambda x: x[-1], run())


def of_one_matrix(grad, num_steps=2):
    """The updates of a plain matrix by optax."""
    tx = optax.contrib.muon(CFG.lr, beta=CFG.momentum, consistent_rms=0.2)
    state = tx.init(grad)
    for _ in range(num_steps):
        update, state = tx.update(grad, state, grad)
    return update


@pytest.mark.parametrize("path", SPLIT)
def test_every_matrix_of_a_parameter_is_updated_as_it_would_be_alone(path, model):
    _, grads, updated = model
    grad, update = named(grads)[path], named(updated)[path]
    axes, parts = SPLIT[path]
    for layer in range(len(grad)):
        # Independent of the code under test: batch axes come first, one matrix at a time.
        order = sorted(range(len(axes)), key=lambda i: "bio".index(axes[i]))
        matrices, expected = (
            x[layer].transpose(order).reshape(-1, *(x.shape[1 + i] for i in order[-2:]))
            for x in (update, grad)
        )
        for matrix, alone in zip(matrices[:3], expected[:3], strict=True):
            for a, b in zip(np.split(matrix, parts, 1), np.split(alone, parts, 1), strict=True):
                np.testing.assert_allclose(a, of_one_matrix(b), rtol=0, atol=1e-4)
                # Orthogonal up to the accuracy of the iteration, at a scale of Adam's updates.
                singular = np.linalg.svd(a / (0.2 * np.sqrt(max(a.shape))), compute_uv=False)
                assert singular.min() > 0.3 and singular.max() < 1.3


def test_joined_matrices_would_have_another_update(model):
    """The test above can fail."""
    grad = named(model[1])["stack/m/mlstm/proj_up/kernel"][0]
    halves = [of_one_matrix(half) for half in np.split(grad, 2, axis=1)]
    assert not np.allclose(of_one_matrix(grad), np.concatenate(halves, 1), rtol=0, atol=0.01)


def test_embeddings_gates_norms_biases_and_convolutions_are_updated_by_adam(model):
    params, grads, updated = model
    tx = optax.adamw(CFG.lr, CFG.b1, CFG.b2, CFG.eps, weight_decay=0.0, nesterov=True)

    @quick.jit
    def adam():
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]

    expected = adam()
    counts = {True: 0, False: 0}
    for (path, a), b in zip(named(updated).items(), jax.tree.leaves(expected), strict=True):
        is_adam = any(name in path for name in ADAM)
        assert np.allclose(a, b, rtol=1e-3, atol=1e-5) == is_adam, path
        counts[is_adam] += 1
    assert min(counts.values()) > 10


# Gates per head, step sizes and convolutions.
BASELINE_ADAM = (*ADAM, "mamba2/dt/", "gated_delta/beta", "gated_delta/decay", "hybrid/input_gate")
BASELINE_ADAM += ("hybrid/forget_gate",)


def speed(preset: str) -> pytest.MarkDecorator:
    """The smallest of a family is slow, the others are left to the run of every test."""
    return pytest.mark.slow if "_125m" in preset else pytest.mark.exhaustive


@pytest.mark.parametrize(
    "name",
    # Those of one generation have the same parameters at other sizes.
    [None, "xlstm_7b", *(pytest.param(n, marks=speed(n)) for n in presets.PRESETS)],
)
def test_every_parameter_of_every_preset_has_an_entry_that_fits_its_axes(name):
    for path, leaf in named(param_shapes(MODEL if name is None else presets.get(name))).items():
        matrices = matrices_of(path)
        is_kernel = path.endswith("kernel") and "conv" not in path
        is_adam = any(part in path for part in BASELINE_ADAM)
        assert (matrices is not None) == (is_kernel and not is_adam), path
        if matrices is not None:
            axes = matrices.axes.rjust(leaf.ndim, "b") if "stack/" in path else matrices.axes
            assert len(axes) == leaf.ndim and axes[-1] == "o", path
            assert sorted(axes.replace("b", "")) == ["i", "o"]
            assert leaf.shape[-1] % matrices.parts == 0


WITH_BIASES = dict(
    attention=options.AttentionConfig(use_bias=True, qk_norm=True, output_gate=True),
    window=options.WindowConfig(use_bias=True, norm_offset=True),
    mamba=options.MambaConfig(use_bias=True),
    mamba2=options.Mamba2Config(use_bias=True, head_dim=16),
)


@pytest.mark.parametrize("letter", BASELINES)
def test_every_parameter_of_a_baseline_has_an_entry_in_both_tables(letter):
    cfg = LMConfig(vocab_size=11, dim=32, pattern=letter, **WITH_BIASES)
    for path, leaf in named(param_shapes(cfg)).items():
        assert len(logical_axes(path, leaf.ndim)) == leaf.ndim
        matrices = matrices_of(path)
        is_adam = any(part in path for part in BASELINE_ADAM)
        assert (matrices is not None) == (path.endswith("kernel") and not is_adam), path
        if matrices is not None:
            assert len(matrices.axes) == leaf.ndim - 1 and leaf.shape[-1] % matrices.parts == 0


def test_a_parameter_that_the_table_lacks_is_an_error(monkeypatch):
    kind = dataclasses.replace(BLOCKS["m"], matrices={})
    monkeypatch.setitem(BLOCKS, "m", kind)
    with pytest.raises(ConfigError, match="'muon' must know .* stack/m/mlstm/.* `matrices` of its"):
        jax.eval_shape(make_optimizer(CFG).init, param_shapes(MODEL))


def test_the_state_has_the_shapes_of_the_parameters(model):
    state = jax.eval_shape(make_optimizer(CFG).init, model[0])
    moment = named(state)["1/inner_states/muon/inner_state/0/mu/stack/m/mlstm/proj_up/kernel"]
    assert moment.shape == named(model[0])["stack/m/mlstm/proj_up/kernel"].shape


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(fsdp=2, tensor=2)], ids=["fsdp", "tensor"])
def test_updates_on_a_mesh_equal_those_of_one_device(mesh, model, capfd):
    params, grads, expected = model
    with jax.default_device(None):
        devices = make_devices(MeshConfig(min_shard_size=2, **mesh))
        shardings = devices.shardings(params)
        with devices.active():
            sharded = updates(*jax.device_put((params, grads), (shardings, shardings)))
    assert "nvoluntary" not in capfd.readouterr().err
    for a, b in zip(*map(jax.tree.leaves, (sharded, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
