"""NNX modules have the parameters, outputs and gradients of linen modules, and train like them."""

import contextlib
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import nnx

from tests.modules import models
from xlstm_jax import config, modules, sharding
from xlstm_jax.data import DataConfig
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.initializers import normal
from xlstm_jax.modules.nnx import from_nnx, to_nnx
from xlstm_jax.sharding.rules import DEFAULT_RULES
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint

CFG = models.config("M")
TOKENS = models.tokens(0, 2, 5)
TX = optax.adamw(1e-2)

LAYERS = {  # a module and the shape of its input, if it has one
    "mLSTM": (modules.MLSTMLayer(models.config().mlstm), (2, 5, 16)),
    "sLSTM": (modules.SLSTMLayer(models.config().slstm), (2, 5, 16)),
    "large mLSTM": (modules.LargeMLSTMLayer(CFG.large), (2, 5, 16)),
    "mLSTM block": (modules.MLSTMBlock(CFG), (2, 5, 16)),
    "sLSTM block": (modules.SLSTMBlock(CFG), (2, 5, 16)),
    "large block": (modules.LargeBlock(CFG), (2, 5, 16)),
    "baselines": (modules.Backbone(models.config(models.MIXED_BASELINES)), (2, 5, 16)),
    "backbone": (modules.Backbone(models.config()), (2, 5, 16)),
    "feed-forward": (modules.GatedFeedForward(20, use_bias=True), (2, 5, 16)),
    "large feed-forward": (modules.LargeFeedForward(20), (2, 5, 16)),
    "convolution": (modules.CausalConv(4), (2, 5, 16)),
    "dense": (modules.Dense(6, normal(1.0), use_bias=True), (2, 16)),
    "head-wise dense": (modules.HeadwiseDense(8, 4, normal(1.0)), (2, 16)),
    "embedding": (modules.Embedding(11, 16, normal(1.0)), None),
    "layer norm": (modules.LayerNorm(use_bias=True), (2, 16)),
    "RMS norm": (modules.RMSNorm(), (2, 16)),
    "multi-head norm": (modules.MultiHeadNorm(1e-5, as_offset=True), (2, 5, 2, 8)),
}


class Wrapper(nn.Module):
    """A module of a user around one of ours."""

    @nn.compact
    def __call__(self, x):
        y, _ = modules.LargeBlock(CFG, name="mlstm_block")(x)
        return nn.Dense(3, name="classes")(y)


def by_path(tree):
    """Path -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def params_of(module):
    """Path -> `nnx.Param`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(path): param for path, param in flat}


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()


def assert_equal(actual, expected, tolerance=0.0):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected
    )


@pytest.fixture(scope="module")
def params():
    """Parameters of the small model, none of which is zero."""
    return models.model_and_variables(CFG)[1]["params"]


def test_outputs_states_and_gradients_are_those_of_linen():
    model, variables = models.model_and_variables(models.config("mM"))
    state = models.perturbed(model.init_state(2))

    def run(call):
        logits, state_out = call(TOKENS, state)
        return jnp.sum(jnp.sin(logits)) + sum(map(jnp.sum, jax.tree.leaves(state_out))), logits

    def linen(params):
        return run(lambda *x: model.apply({"params": params}, *x))

    expected, grads = jax.jit(jax.value_and_grad(linen, has_aux=True))(variables["params"])
    module = to_nnx(model.cfg, variables["params"])
    actual, module_grads = nnx.jit(nnx.value_and_grad(run, has_aux=True))(module)
    assert_equal(actual, expected)
    assert_equal(nnx.to_pure_dict(module_grads), grads)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x == "baselines" else []) for x in LAYERS],
)
def test_layers_have_the_parameters_and_the_program_of_linen(name):
    """Traced only: equal programs give equal results."""
    linen, shape = LAYERS[name]
    takes_dim = not (shape is None or isinstance(getattr(linen, "cfg", None), modules.LMConfig))
    module = nnx.eval_shape(lambda: to_nnx(linen, dim=16 if takes_dim else None))
    inputs = () if shape is None else (jax.ShapeDtypeStruct(shape, jnp.float32),)
    expected = jax.eval_shape(linen.init, jax.random.key(0), *inputs)["params"]
    graph, state = nnx.split(module)
    state = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)

    def apply(params, *x):
        return linen.apply({"params": params}, *x)

    def call(params, *x):
        return nnx.merge(graph, params)(*x)

    programs = [str(jax.make_jaxpr(fn)(expected, *inputs)) for fn in (apply, call)]
    addresses = r"0x[0-9a-f]+"
    assert re.sub(addresses, "", programs[0]) == re.sub(addresses, "", programs[1])


def test_parameters_are_those_of_a_jitted_init(params):
    key = nnx.Rngs(3).params()
    expected = jax.jit(modules.LM(CFG).init)(key, TOKENS)["params"]
    module = to_nnx(CFG, rngs=nnx.Rngs(3))
    assert_equal(from_nnx(module), expected)
    assert by_path(from_nnx(module)).keys() == params_of(module).keys() == by_path(params).keys()
    assert len(jax.tree.leaves(nnx.state(module))) == len(jax.tree.leaves(params))
    assert module.linen == modules.LM(CFG)


def test_the_state_is_that_of_linen():
    module = nnx.eval_shape(lambda: to_nnx(LAYERS["sLSTM"][0], dim=16))
    assert_equal(module.init_state(3, 16), LAYERS["sLSTM"][0].init_state(3, 16))
    module = nnx.eval_shape(lambda: to_nnx(CFG))
    assert_equal(module.init_state(3), modules.LM(CFG).init_state(3))


def optax_step(params, moments):
    """One step of plain optax on the linen model."""
    loss = lambda p: loss_of(modules.LM(CFG).apply({"params": p}, TOKENS)[0])  # noqa: E731
    updates, moments = TX.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments


@nnx.jit
def nnx_step(module, optimizer):
    """The same step on an NNX module."""
    grads = nnx.grad(lambda module: loss_of(module(TOKENS)[0]))(module)
    optimizer.update(module, grads)


@nnx.jit
def new_optimizer(module):
    return nnx.Optimizer(module, TX, wrt=nnx.Param)


MESHES = {
    "one device": pytest.param(None),
    "mesh": pytest.param(lambda: sharding.make_mesh(data=2, fsdp=2, tensor=2)),
    # Its axes are Explicit.
    "bare": pytest.param(lambda: jax.make_mesh((4, 2), ("data", "tensor")), marks=pytest.mark.slow),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_three_steps_of_an_nnx_optimizer_equal_those_of_optax(mesh, params):
    step, moments = jax.jit(optax_step), TX.init(params)
    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(jax.set_mesh(mesh()))
        module = to_nnx(CFG, params)
        optimizer = new_optimizer(module)
        trees = module.stack, optimizer.opt_state[0].mu["stack"]
        for _ in range(3):
            for kernel in (tree["M"]["ffn"]["proj_up"]["kernel"] for tree in trees):
                sharded = kernel.get_value().sharding
                assert not mesh or sharded.spec == jax.P(None, None, "tensor")
            params, moments = step(params, moments)
            nnx_step(module, optimizer)
            assert_equal(from_nnx(module), params, 1e-6)


@pytest.mark.parametrize("cfg", [models.config(), models.config("m", dim=1024)])
def test_parameters_carry_logical_axes_and_are_sharded_by_the_rules_in_use(cfg):
    """Also a module that was made before the mesh was active."""
    module, mesh = nnx.eval_shape(lambda: to_nnx(cfg)), sharding.make_mesh(fsdp=4, tensor=2, data=1)

    def assert_sharded_by(rules, sizes):
        specs = params_of(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
        for path, param in params_of(module).items():
            expected = sharding.partition_spec(path, param.shape, rules, sizes)
            assert specs[path].get_value() == expected, path
            assert param.out_sharding == sharding.logical_axes(path, len(param.shape))

    with jax.set_mesh(mesh):
        assert_sharded_by(DEFAULT_RULES, mesh.shape)
        with sharding.use_rules("fsdp", replicated=("tensor",)):
            assert_sharded_by(sharding.RULES["fsdp"], mesh.shape)
    assert_sharded_by(DEFAULT_RULES, dict.fromkeys(sharding.MESH_AXES, 1))


def test_logical_axis_rules_of_flax_take_precedence():
    module = nnx.eval_shape(lambda: to_nnx(LAYERS["large feed-forward"][0], dim=16))
    with nnx.logical_axis_rules([("embed", "x"), ("mlp", None)]):
        specs = nnx.get_partition_spec(nnx.state(module))
    assert specs["proj_up"]["kernel"].get_value() == jax.P("x", None)


def test_parameters_of_other_modules_are_sharded_where_they_are_ours():
    params = params_of(nnx.eval_shape(lambda: to_nnx(Wrapper(), dim=16)))
    assert params["mlstm_block/ffn/proj_up/kernel"].out_sharding == ("embed", "mlp")
    assert not params["classes/kernel"].has_metadata("out_sharding")


def test_sharded_creation_as_in_the_documentation_of_flax():
    mesh, module = sharding.make_mesh(data=1, fsdp=4, tensor=2), LAYERS["large feed-forward"][0]

    @nnx.jit
    def create():
        created = to_nnx(module, rngs=nnx.Rngs(0), dim=16)
        state = nnx.state(created)
        specs = nnx.get_partition_spec(state)
        nnx.update(created, jax.lax.with_sharding_constraint(state, specs))
        return created

    with jax.set_mesh(mesh):
        created = create()
    assert created.proj_up["kernel"].get_value().sharding.spec == jax.P(None, "tensor")
    assert_equal(from_nnx(created), from_nnx(to_nnx(module, rngs=nnx.Rngs(0), dim=16)))
    _, abstract = nnx.get_abstract_model(lambda: to_nnx(module, dim=16), mesh)
    assert abstract["proj_up"]["kernel"].get_value().sharding.spec == jax.P(None, "tensor")


@pytest.mark.parametrize("types", ["Auto Auto", "Explicit Explicit", "Explicit Auto"])
def test_parameters_initial_or_given_are_sharded_over_the_active_mesh(types):
    """Given parameters may be NumPy arrays, or arrays on a device."""
    layer = LAYERS["large feed-forward"][0]
    arrays = jax.tree.map(np.asarray, from_nnx(to_nnx(layer, dim=16)))
    given = arrays | {"proj_up": jax.device_put(arrays["proj_up"], jax.devices()[1])}
    axis_types = tuple(map(jax.sharding.AxisType.__getitem__, types.split()))
    with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=axis_types)):
        # A sharded program may round initial values in another way.
        made = (to_nnx(layer, given, dim=16), 0.0), (to_nnx(layer, dim=16), 1e-7)
        for module, tolerance in made:
            moments = nnx.Optimizer(module, TX, wrt=nnx.Param).opt_state[0].nu
            for kernels in (module.proj_up, module.proj_up_gate, moments["proj_up"]):
                assert kernels["kernel"].get_value().sharding.spec == jax.P(None, "tensor")
            assert_equal(from_nnx(module), arrays, tolerance)


def test_a_block_kind_without_logical_axes_is_refused(monkeypatch):
    monkeypatch.setitem(modules.BLOCKS, "M", dataclasses.replace(modules.BLOCKS["M"], axes={}))
    with pytest.raises(KeyError, match="add one to the `axes` of its block kind"):
        nnx.eval_shape(lambda: to_nnx(CFG))


def test_a_mesh_axis_shards_one_of_two_dimensions_with_the_same_logical_axis(monkeypatch):
    axes = {r"ffn/proj_up/kernel": ("mlp", "mlp")} | modules.BLOCKS["M"].axes
    monkeypatch.setitem(modules.BLOCKS, "M", dataclasses.replace(modules.BLOCKS["M"], axes=axes))
    module = nnx.eval_shape(lambda: to_nnx(modules.LargeBlock(CFG)))
    kernel = nnx.get_partition_spec(nnx.state(module))["ffn"]["proj_up"]["kernel"]
    assert kernel.get_value() == jax.P("tensor", None)


def test_modules_can_be_split_merged_and_vmapped():
    layer, x = LAYERS["feed-forward"][0], jnp.ones((1, 2, 16))
    create = nnx.vmap(lambda rngs: to_nnx(layer, rngs=rngs, dim=16))
    ensemble = create(nnx.Rngs(params=0).split(3))
    outputs = nnx.vmap(lambda module, x: module(x), in_axes=(0, None))(ensemble, x)
    graph, state = nnx.split(ensemble)
    for n in range(3):
        member = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], state))
        expected = layer.apply({"params": from_nnx(member)}, x)
        np.testing.assert_allclose(outputs[n], expected, rtol=1e-6, atol=1e-6)


def test_checkpoints_of_a_run_and_of_nnx_are_read_by_the_other(tmp_path, params):
    module, run = to_nnx(CFG, params), tmp_path / "run"
    cfg = config.to_dict(
        ExperimentConfig(name="nnx", model=CFG, data=DataConfig(), train=TrainConfig())
    )
    checkpoint.save_params(run, from_nnx(module), cfg)
    (run / "config.json").write_text(json.dumps(cfg))
    restored_cfg, restored = checkpoint.restore_params(run)
    assert_equal(restored, params)
    assert_equal(from_nnx(to_nnx(restored_cfg.model, restored)), params)
    # Flax users save the pure dictionary with Orbax.
    ocp.save(tmp_path / "nnx", nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert_equal(ocp.load(tmp_path / "nnx", params), params)


def test_dropout_draws_from_the_stream_of_the_call_or_of_the_construction():
    layer = modules.GatedFeedForward(20, dropout=0.5)
    x = jnp.ones((2, 5, 16))
    module = to_nnx(layer, rngs=nnx.Rngs(0), dim=16)
    apply = nnx.jit(lambda module, *rngs: module(x, deterministic=False, rngs=(*rngs, None)[0]))
    key = nnx.Rngs(dropout=7).dropout()
    expected = layer.apply(
        {"params": from_nnx(module)}, x, deterministic=False, rngs={"dropout": key}
    )
    np.testing.assert_allclose(apply(module, nnx.Rngs(dropout=7)), expected, atol=1e-6)
    first, second = apply(module), apply(module)
    assert (first != second).any() and module.dropout_rngs.count == 2
    module.train()
    assert_equal(module(x), layer.apply({"params": from_nnx(module)}, x), 1e-6)


def test_dropout_without_rngs_is_refused():
    layer = modules.GatedFeedForward(20, dropout=0.5)
    for rngs in (None, nnx.Rngs(params=0)):
        module = to_nnx(layer, dim=16, rngs=rngs)
        with pytest.raises(ArgumentError, match=r"rngs must be an nnx.Rngs .* got None; pass"):
            module(jnp.ones((1, 1, 16)), deterministic=False)


def test_a_model_without_dropout_needs_no_rngs():
    layer, x = LAYERS["feed-forward"][0], jnp.ones((1, 1, 16))
    module = to_nnx(layer, dim=16, rngs=nnx.Rngs(0))
    assert_equal(module(x, deterministic=False), module(x))
    assert not jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param)))


LAYER = modules.LargeFeedForward(20)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: to_nnx(3), r"cfg_or_module must be .*, got 3; pass an LMConfig"),
        (lambda: to_nnx(modules.LM), "cfg_or_module must be .*, got <class .*; pass an LMConfig"),
        (lambda: to_nnx(LAYER), "dim must be the input width of LargeFeedForward, .* got None; "),
        (lambda: to_nnx(LAYER, dim=0), "dim must be the input width .* got 0; pass dim="),
        (lambda: to_nnx(CFG, dim=16), "dim must be None for LM, got 16; leave it out"),
        (lambda: to_nnx(LAYERS["embedding"][0], dim=16), "dim must be None for Embedding, got 16"),
        (lambda: to_nnx(modules.Backbone(CFG), dim=8), "config of Backbone, 16, got 8; leave it"),
        (lambda: to_nnx(CFG, rngs=0), r"rngs must be an nnx.Rngs, got 0; pass nnx.Rngs\(0\)"),
        (lambda: from_nnx({}), "module must be what to_nnx returned, got <class 'dict'>; "),
    ],
)
def test_an_invalid_argument_is_named_in_one_line(call, message, unchecked_types):
    with pytest.raises(ArgumentError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_parameters_of_another_config_are_listed(params):
    other = models.config("M", dim=32)
    with pytest.raises(ArgumentError) as error:
        to_nnx(other, params)
    message = str(error.value)
    assert re.search(
        r"^params must .*LM.* but 1[0-9] do not fit: lm_head/kernel is \(16, 11\), not", message
    )
    assert message.count(" is ") == 3 and ", ...; use variables['params']" in message
    with pytest.raises(ArgumentError, match="params/lm_head/kernel is"):
        to_nnx(CFG, {"params": {"lm_head": params["lm_head"]}} | params)


def test_leaves_that_no_longer_fit_are_listed(params):
    module = to_nnx(CFG, params)
    module.adapter = nnx.Param(jnp.ones(3))
    del module.out_norm
    with pytest.raises(ArgumentError, match=r"^module .* but 2 .* adapter is \(3,\), not absent; "):
        from_nnx(module)


def test_names_of_nnx_modules_are_refused_as_parameters():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="train")(x)

    with pytest.raises(ArgumentError, match="Layer must not have parameters named 'train'"):
        to_nnx(Layer(), dim=4)


@pytest.mark.slow
def test_the_documentation_runs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "nnx.md"
    example, mesh = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    names = {"sharding": sharding}
    exec(compile(example + mesh, page, "exec"), names)
    assert names["losses"][2] < names["losses"][0]
    assert names["logits"].shape == (8, 13, 256) and names["y"].shape == (2, 10, 64)
    assert len(names["optimizer"].opt_state[0].mu["lm_head"]["kernel"].sharding.device_set) == 8


def test_modules_are_imported_without_nnx():
    code = "import sys, xlstm_jax.modules; sys.exit('flax.nnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
