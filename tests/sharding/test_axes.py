"""Models and ops on meshes of any axis names and types, and inside a `shard_map` of the user."""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import common
from tests import quick
from tests.modules.models import BASELINES
from xlstm_jax import ops
from xlstm_jax.cells import mlstm_scan, slstm_scan
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, MLSTMLayer, SLSTMConfig
from xlstm_jax.modules.baselines import options
from xlstm_jax.sharding import constrain, tree_shardings, use_rules
from xlstm_jax.sharding.axes import dividing_axes
from xlstm_jax.sharding.rules import DEFAULT_RULES, complete

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BATCH, VOCAB = 8, 16
SIZES = dict(
    vocab_size=VOCAB,
    dim=8,
    mlstm=MLSTMConfig(num_heads=2),
    slstm=SLSTMConfig(num_heads=2),
    lstm=options.LSTMConfig(num_heads=2, ffn_dim=16),
    attention=options.AttentionConfig(num_heads=4, num_kv_heads=2, cache_size=6, ffn_dim=16),
    window=options.WindowConfig(num_heads=2, window=2, num_sinks=1, ffn_dim=16),
    hybrid=options.HybridConfig(num_heads=2, window=2, num_sinks=1, ffn_dim=16),
    mamba=options.MambaConfig(state_dim=3, chunk_size=4),
    mamba2=options.Mamba2Config(head_dim=4, state_dim=3, groups=2, chunk_size=4),
    gated_delta=options.GatedDeltaConfig(
        num_heads=4, num_qk_heads=2, qk_dim=3, v_dim=4, ffn_dim=16, chunk_size=4
    ),
    rwkv4=options.RWKV4Config(ffn_dim=16),
)
FEATURES = dict.fromkeys(("inner", "heads", "mlp", "vocab"), "tp")


def tokens(T=4):
    return jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(BATCH, T)), jnp.int32)


def loss_of(model):
    def loss(params, tokens):
        logits, _ = model.apply(params, tokens)
        logits = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[..., None], axis=-1))

    return loss


@functools.cache
def single_device(pattern):
    """A model, its parameters, and loss and gradients on one device."""
    model = LM(LMConfig(pattern=pattern, **SIZES))
    params = quick.jit(model.init)(jax.random.key(0), tokens())
    return model, params, quick.jit(jax.value_and_grad(loss_of(model)))(params, tokens())


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_equals_single_device(pattern, mesh, batch_axes, shardings=None):
    model, params, expected = single_device(pattern)
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens(), NamedSharding(mesh, P(batch_axes)))
        params = jax.device_put(params, shardings or NamedSharding(mesh, P()))
        actual = quick.jit(jax.value_and_grad(loss_of(model)))(params, batch)
    assert_close(actual, expected)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SLOW_BASELINES = [slow(letter) for letter in BASELINES]
FOUR, EIGHT = ((2, 2), ("data", "tensor")), ((2, 2, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("pattern", "mesh"),
    [("m", FOUR), ("s", EIGHT)]
    + [slow(pattern, FOUR) for pattern in ("s", "M", "msM", "mmmmmmmm", "msmsmsms")]
    + [slow(pattern, EIGHT) for pattern in ("m", "M", "msM")],
)
def test_model_on_a_bare_mesh_equals_one_device(pattern, mesh):
    """The axes of `jax.make_mesh` are Explicit; eight blocks run in a scan."""
    batch_axes = tuple(name for name in mesh[1] if name in ("data", "fsdp"))
    assert_equals_single_device(pattern, jax.make_mesh(*mesh), batch_axes)


@pytest.mark.parametrize("pattern", ["m", slow("s"), slow("M"), slow("msM"), *SLOW_BASELINES])
def test_parameters_sharded_by_the_rules_equal_one_device(pattern):
    mesh = jax.make_mesh(*EIGHT)
    shardings = tree_shardings(single_device(pattern)[1], DEFAULT_RULES, mesh, min_shard_size=0)
    assert_equals_single_device(pattern, mesh, ("data", "fsdp"), shardings)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["M", slow("m"), slow("s")])
@pytest.mark.parametrize("types", [(EXPLICIT,) * 2, slow((EXPLICIT, AUTO)), slow((AUTO, EXPLICIT))])
def test_sequence_sharded_over_a_bare_mesh_equals_one_device(types, pattern):
    assert_equals_single_device(pattern, jax.make_mesh((2, 2), ("data", "seq"), types), "data")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", BASELINES)
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_sequence_sharded_over_a_mesh_is_gathered_by_baselines(kind, pattern):
    assert_equals_single_device(
        pattern, jax.make_mesh((2, 2), ("data", "seq"), (kind,) * 2), "data"
    )


@pytest.mark.slow
@pytest.mark.parametrize("pattern", BASELINES)
def test_baselines_on_auto_axes_equal_one_device(pattern):
    mesh = jax.make_mesh(*EIGHT, (AUTO,) * 3)
    shardings = tree_shardings(single_device(pattern)[1], DEFAULT_RULES, mesh, min_shard_size=0)
    assert_equals_single_device(pattern, mesh, ("data", "fsdp"), shardings)


@pytest.mark.parametrize("pattern", ["s", slow("m"), slow("M")])
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_renamed_axes_and_a_stage_axis_equal_one_device(kind, pattern):
    mesh = jax.make_mesh((2, 2, 2), ("stage", "dp", "tp"), (kind,) * 3)
    with use_rules({"batch": "dp", **FEATURES}, replicated=("stage",)):
        assert_equals_single_device(pattern, mesh, "dp")


def grads_within_shard_map(pattern, mesh, check, **options):
    """Gradients of the user's own data parallelism over the axis `replica`."""
    model, params, _ = single_device(pattern)

    def step(params, tokens):
        if check:  # else JAX sums the gradients of replicated parameters
            params = jax.lax.pcast(params, "replica", to="varying")
        return jax.lax.pmean(jax.value_and_grad(loss_of(model))(params, tokens), "replica")

    specs = dict(in_specs=(P(), P("replica")), out_specs=P(), check_vma=check)
    with jax.set_mesh(mesh):
        args = jax.device_put((params, tokens()), (P(), P("replica")))
        return quick.jit(jax.shard_map(step, **specs, **options))(*args)


@pytest.mark.parametrize(
    "pattern", ["m", "s", slow("M"), slow("msM"), slow("msmsmsms"), *SLOW_BASELINES]
)
@pytest.mark.parametrize("check", [True, slow(False)])
def test_data_parallelism_of_the_user_equals_one_device(check, pattern):
    actual = grads_within_shard_map(pattern, jax.make_mesh((4,), ("replica",)), check)
    assert_close(actual, single_device(pattern)[2], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "kind", "check"),
    [
        ("s", EXPLICIT, True),
        slow("m", EXPLICIT, True),
        slow("m", AUTO, True),
        slow("M", AUTO, True),
        slow("s", AUTO, False),
        slow("m", EXPLICIT, False),
        *(slow(letter, EXPLICIT, True) for letter in BASELINES),
    ],
)
@pytest.mark.parametrize("other", ["tensor", slow("seq")])
def test_shard_map_over_some_axes_equals_one_device(other, pattern, kind, check):
    mesh = jax.make_mesh((2, 2), ("replica", other), (kind, kind))
    actual = grads_within_shard_map(pattern, mesh, check, axis_names={"replica"})
    assert_close(actual, single_device(pattern)[2])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_omitted_blocks_and_masks_work_within_a_checked_shard_map(remat):
    """A period with omitted blocks runs conditionals; masks reorder the inputs of convolutions."""
    model = LM(LMConfig(pattern="mmsmm", remat=remat, **SIZES))
    params = quick.jit(model.init)(jax.random.key(0), tokens())
    segment_ids = jnp.asarray([[1, 2, 2, 0]] * BATCH)
    mesh = jax.make_mesh((4,), ("replica",), (AUTO,))

    def loss(params, tokens, segment_ids):
        return jnp.mean(model.apply(params, tokens, None, segment_ids)[0] ** 2)

    expected = quick.jit(jax.grad(loss))(params, tokens(), segment_ids)
    specs = dict(in_specs=(P(), P("replica"), P("replica")), out_specs=P())
    step = jax.shard_map(lambda *x: jax.lax.pmean(loss(*x), "replica"), mesh=mesh, **specs)
    assert_close(quick.jit(jax.grad(step))(params, tokens(), segment_ids), expected)


def op_calls(rng):
    """Name -> an op or a cell of x `B T H K`, in which all arrays are built from x."""
    T, H, K = 6, 2, 4
    x = jnp.asarray(rng.standard_normal((BATCH, T, H, K)), jnp.float32)
    r = 0.1 * jnp.asarray(rng.standard_normal((H, K, 4, K)), jnp.float32)
    ids = jnp.asarray(rng.integers(3, size=(BATCH, T)), jnp.int32)
    flat = lambda x: x.reshape(BATCH if x.shape[0] == BATCH else -1, T, H * K)  # noqa: E731
    four = lambda x: jnp.stack([x] * 4, axis=2)  # noqa: E731
    kernel = jnp.ones((H * K, 6)) / 8

    def mlstm(x, ids, op=ops.mlstm, **options):
        return op(x, x, x, x[..., 0], x[..., 1], **options)

    calls = {
        "slstm": lambda x, ids: ops.slstm(four(x), r, mask=ids),
        "lstm": lambda x, ids: ops.lstm(four(x), r, reset=ids),
        "conv": lambda x, ids: ops.causal_conv(flat(x), jnp.ones((4, H * K)), mask=ids),
        "cross entropy": lambda x, ids: ops.cross_entropy(
            flat(x), kernel, ids, jnp.ones(ids.shape), chunk_size=5
        )[0],
        "layer norm": lambda x, ids: ops.layer_norm(x),
        "multi-head norm": lambda x, ids: ops.multi_head_norm(x),
        "dense": lambda x, ids: ops.dense(flat(x), kernel),
        "grouped dense": lambda x, ids: ops.grouped_dense(flat(x), jnp.ones((H, K, K))),
        "embed": lambda x, ids: ops.embed(ids, kernel),
        "documents": lambda x, ids: ops.document_starts(ids),
        "mlstm scan": lambda x, ids: mlstm(x, ids, mlstm_scan),
        "slstm scan": lambda x, ids: slstm_scan(four(x), r),
        "attention": lambda x, ids: ops.attention(x, x, x, window=3, num_sinks=1, mask=ids),
        "selective scan": lambda x, ids: ops.selective_scan(
            flat(x),
            jax.nn.softplus(flat(x)),
            -kernel,
            flat(x)[..., :6],
            flat(x)[..., 2:],
            reset=ids,
        ),
        "ssd": lambda x, ids: ops.ssd(
            x, jax.nn.softplus(x[..., 0]), -r[:, 0, 0, 0], x, x, mask=ids
        ),
        "delta rule": lambda x, ids: ops.gated_delta_rule(
            x, x / 8, x, -jax.nn.softplus(x[..., 0]), jax.nn.sigmoid(x[..., 1]), reset=ids
        ),
        "wkv": lambda x, ids: ops.wkv(flat(x), flat(x), -kernel[:, 0], kernel[:, 1], mask=ids),
    }
    for name in ("chunkwise", "parallel", "recurrent"):
        calls[name] = functools.partial(mlstm, implementation=name, chunk_size=4)
    return x, ids, calls


CELLS = ("mlstm scan", "slstm scan")


def test_results_of_ops_carry_the_sharding_of_the_rules(rng):
    x, ids, calls = op_calls(rng)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    specs = {}
    with jax.set_mesh(mesh):
        x, ids = jax.device_put((x, ids), NamedSharding(mesh, P("data")))
        for name in set(calls) - {*CELLS, "parallel", "recurrent"}:
            first = jax.tree.leaves(jax.eval_shape(calls[name], x, ids))[0]
            specs[name] = tuple(first.sharding.spec)
        kernel = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P(None, "tensor")))
        product = jax.eval_shape(ops.dense, x.reshape(BATCH, 6, 8), kernel)
        assert product.sharding.spec == P("data", None, "tensor")
        state = jax.eval_shape(calls["chunkwise"], x, ids)[1]
        assert state.C.sharding.spec == P("data", "tensor", None, None)
        constrained = quick.jit(lambda x: constrain(x, "batch", "time", "heads", None))(x)
        assert constrained.sharding.spec == P("data", None, "tensor", None)
    by_head = ("data", None, "tensor", None)
    assert specs == {
        "chunkwise": by_head,
        "slstm": by_head,
        "lstm": by_head,
        "conv": ("data", None, "tensor"),
        "cross entropy": (),
        "layer norm": ("data", None, None, None),  # as its input
        "multi-head norm": ("data", None, "tensor"),
        "dense": ("data", None, None),  # the kernel is replicated
        "grouped dense": ("data", None, None),
        "embed": ("data", None, None),
        "documents": ("data", None),
        "attention": by_head,
        "selective scan": ("data", None, "tensor"),
        "ssd": by_head,
        "delta rule": by_head,
        "wkv": ("data", None, "tensor"),
    }


STATE_SPECS = {
    "L": [(None, "data", "tensor", None)] * 2,
    "a": [(None, "data", "tensor", None, None)] * 2 + [(None, "data")],
    "b": [(None, "data", None, None), (None, "data", "tensor", None)],
    "B": [(None, "data", None, None)] * 3 + [(None, "data", "tensor", None, None)],
    "d": [(None, "data", None, None)] * 3 + [(None, "data", "tensor", None, None)],
    "r": [(None, "data", None, None)]
    + [(None, "data", "tensor")] * 3
    + [(None, "data", None, None)],
}


@pytest.mark.slow
def test_states_of_a_model_carry_the_sharding_of_the_rules():
    model = LM(LMConfig(pattern="".join(STATE_SPECS), **SIZES))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens())
        _, states = jax.eval_shape(model.apply, params, tokens())
    leaves = {letter: jax.tree.leaves(state) for letter, state in states.items()}
    specs = {name: [tuple(x.sharding.spec) for x in group] for name, group in leaves.items()}
    assert specs == STATE_SPECS


@pytest.mark.slow
@pytest.mark.parametrize("group", range(3))
def test_ops_and_cells_equal_one_device_within_a_checked_shard_map(group, rng):
    x, ids, calls = op_calls(rng)

    def loss(name, x, ids):
        leaves = jax.tree.leaves(calls[name](x, ids))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves if leaf.dtype == jnp.float32)

    mesh, specs = jax.make_mesh((4,), ("replica",), (AUTO,)), (P("replica"), P("replica"))
    names = sorted(set(calls) - {"documents", "embed"})  # these do not depend on x
    for name in names[group::3]:
        local = functools.partial(loss, name)
        total = lambda x, ids, local=local: jax.lax.psum(local(x, ids), "replica")  # noqa: E731
        mapped = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
        actual = quick.jit(jax.grad(mapped))(x, ids)
        assert_close(actual, quick.jit(jax.grad(local))(x, ids))


def test_a_sequence_over_a_manual_axis_is_continued_by_the_states_of_the_caller(rng):
    x, _, _ = op_calls(rng)

    def mlstm(x, state=None):
        return ops.mlstm(x, x, x, x[..., 0], x[..., 1], state)

    expected, _ = quick.jit(mlstm)(x)
    _, middle = quick.jit(mlstm)(x[:, :3])
    states = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), middle)
    mesh = jax.make_mesh((2,), ("seq",), (AUTO,))

    def local(x, states):
        return mlstm(x, jax.tree.map(lambda leaf: leaf[0], states))[0]

    time = P(None, "seq")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(time, P("seq")), out_specs=time)
    with jax.set_mesh(mesh):
        program = quick.jit(mapped).lower(x, states).compile()
        assert_close(quick.jit(mapped)(x, states), expected)
    assert not re.search("all-gather|all-reduce|collective-permute", program.as_text())


def test_a_kernel_within_a_checked_shard_map_says_what_to_pass(rng):
    x, ids, calls = op_calls(rng)
    mesh = jax.make_mesh((4,), ("replica",), (AUTO,))
    call = functools.partial(calls["chunkwise"], implementation="pallas_tpu", chunk_size=8)
    specs = dict(in_specs=(P("replica"), P("replica")), out_specs=P("replica"))
    mapped = jax.shard_map(lambda x, ids: call(x, ids)[0], mesh=mesh, **specs)
    with (
        common.interpreted(lanes=8),
        pytest.raises(NotImplementedError, match="pass check_vma=False"),
    ):
        jax.eval_shape(mapped, x, ids)


def test_state_and_dropout_and_initialization_work_on_a_bare_mesh():
    model = LM(LMConfig(pattern="m", dropout=0.5, **SIZES))
    params = quick.jit(model.init)(jax.random.key(0), tokens())
    keys = {"dropout": jax.random.key(1)}

    def run(params, tokens):
        logits, state = model.apply(params, tokens, deterministic=False, rngs=keys)
        return logits, model.apply(params, tokens, state)

    expected = quick.jit(run)(params, tokens())
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens(), NamedSharding(mesh, P("data")))
        shardings = tree_shardings(params, DEFAULT_RULES, mesh, min_shard_size=0)
        initialize = quick.jit(model.init, out_shardings=shardings)
        sharded = initialize(jax.random.key(0), batch)
        assert_close(sharded, params, 0)
        assert_close(quick.jit(run)(sharded, batch), expected)


def test_rules_that_use_a_mesh_axis_for_batch_and_features_equal_one_device():
    with use_rules({"batch": "data", "inner": "data", "heads": "data"}):
        assert_equals_single_device("m", jax.make_mesh((2,), ("data",)), "data")


@pytest.mark.slow
def test_a_layer_inside_a_module_of_the_user_works_on_a_bare_mesh():
    import flax.linen as nn

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("first", "second"):
                x = x + MLSTMLayer(MLSTMConfig(num_heads=2), name=name)(x)[0]
            return x

    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    params = quick.jit(Twice().init)(jax.random.key(1), x)
    expected = quick.jit(Twice().apply)(params, x)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        assert_close(quick.jit(Twice().init)(jax.random.key(1), x), params, 0)
        assert_close(quick.jit(Twice().apply)(params, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_a_model_runs_on_a_mesh_without_jit(kind):
    model, params, _ = single_device("s")
    with jax.set_mesh(jax.make_mesh(*FOUR, (kind, kind))):
        actual = model.apply(params, tokens())
    assert_close(actual, quick.jit(model.apply)(params, tokens()))


@pytest.mark.parametrize("kind", [EXPLICIT, slow(AUTO)])
@pytest.mark.parametrize("pattern", ["s", slow("m"), slow("M")])
def test_no_device_repeats_the_work_of_another(pattern, kind):
    """FLOPs per device of a step, as compiled, whether parameters are sharded or replicated."""
    model = LM(LMConfig(vocab_size=512, dim=256, pattern=pattern))
    batch = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), batch)

    def flops(params, batch):
        step = quick.jit(jax.grad(loss_of(model)))
        return step.lower(params, batch).compile().cost_analysis()["flops"]

    one = flops(params, batch)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (kind, kind))
    shardings = tree_shardings(params, DEFAULT_RULES, mesh)
    replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
    with jax.set_mesh(mesh):
        batch = batch.update(sharding=NamedSharding(mesh, P("data")))
        for target in (shardings, replicated):
            sharded = jax.tree.map(lambda x, s: x.update(sharding=s), params, target)
            assert flops(sharded, batch) <= 1.2 / mesh.size * one


def test_other_rules_trace_a_jitted_function_again():
    rules = []

    @jax.jit
    def fn(x):
        rules.append(constrain(x, "batch", None) is x)
        return x

    x = jnp.zeros((4, 4))
    fn(x)
    with use_rules({"batch": "data"}):
        fn(x)
        fn(x)
        with use_rules("fsdp_seq"):
            fn(x)
    with use_rules({"batch": ("data",)}):  # the same rules
        fn(x)
    fn(x)
    assert len(rules) == 3


UNKNOWN = {
    "op": lambda x: ops.mlstm(x, x, x, x[..., 0], x[..., 0]),
    "norm": lambda x: constrain(ops.layer_norm(x), None, None, None, None),
    "layer": lambda x: MLSTMLayer(MLSTMConfig(num_heads=2)).init(jax.random.key(0), x[..., 0]),
    "model": lambda x: single_device("m")[0].apply(single_device("m")[1], tokens()),
}


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
@pytest.mark.parametrize("call", UNKNOWN)
def test_a_mesh_axis_that_no_rule_names_is_one_line(call, kind):
    x = jnp.ones((4, 3, 2, 4))
    single_device("m")
    with jax.set_mesh(jax.make_mesh((2, 2), ("replica", "model"), (kind, kind))):
        with pytest.raises(ValueError, match="mesh axis 'replica' of size 2") as error:
            quick.jit(UNKNOWN[call])(x)
    (line,) = str(error.value).splitlines()
    assert "use_rules({'batch': 'replica', 'heads': 'model', 'inner': 'model'" in line


def test_the_line_maps_every_axis_of_the_mesh():
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("stage", "data", "tensor"))):
        with pytest.raises(ValueError, match=r"'batch': 'data'.*replicated=\('stage',\)\)"):
            constrain(jnp.ones(4), "batch")


def test_rules_that_are_wrong_are_one_line():
    for rules, message in (
        ({"replica": "data"}, "no logical axis 'replica'; use some of: batch, time"),
        ("zero", "'zero' is not known; use one of: data, fsdp"),
    ):
        with pytest.raises(ValueError, match=message), use_rules(rules):
            pass
    unchecked = inspect.unwrap(complete)  # without the type checks of the tests
    for rules, message in (
        ({"batch": 3}, "must be a mesh axis or a tuple of them, got 3"),
        ({"batch": ("data", 3)}, "must be a mesh axis or a tuple of them"),
        (3, "must be a table from logical to mesh axes or the name of one, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            unchecked(rules)


def test_an_axis_that_does_not_divide_is_not_used_and_the_first_use_of_an_axis_wins():
    with use_rules({"batch": "data", "inner": "data", "mlp": "absent"}):
        with jax.set_mesh(jax.make_mesh((4,), ("data",))):
            x = constrain(jnp.ones((6, 8)), "batch", "mlp")
            assert x.sharding.spec == P(None, None)
            x = constrain(jnp.ones((8, 8)), "batch", "inner")
            assert x.sharding.spec == P("data", None)


@pytest.mark.parametrize("sizes", [{"a": 4, "b": 2}, {"a": 2, "b": 3, "c": 2}])
def test_the_product_of_the_chosen_axes_divides_the_length(sizes):
    for length in range(1, 49):
        chosen = dividing_axes(length, sizes, sizes)
        shards = math.prod(sizes[axis] for axis in chosen)
        assert length % shards == 0
        for axis in sizes.keys() - set(chosen):
            assert length % (shards * sizes[axis])
