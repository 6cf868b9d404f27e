"""LSTM, sLSTM and mLSTM layers: values, directions, padding, packing, state, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from xlstm_jax import compat, ops
from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.modules.nnx import from_nnx, to_nnx
from xlstm_jax.ops.flags import Flags

CLASSES = (compat.LSTM, compat.SLSTM, compat.MLSTM)
MERGES = (None, "reverse", "concat", "sum", "alternate")
B, T, F = 2, 7, 4
NUM_VALID = 3  # of T positions

every_cell = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def is_fast(cls, merge):
    """All cells share the code that merges directions: other merges than these are slow tests."""
    return cls is compat.LSTM or merge in (None, "concat")


every_layer = pytest.mark.parametrize(
    "cls, merge",
    [
        pytest.param(cls, merge, marks=() if is_fast(cls, merge) else pytest.mark.slow)
        for cls in CLASSES
        for merge in MERGES
    ],
    ids=lambda value: getattr(value, "__name__", value),
)


def make(cls, merge=None, num_layers=2, **options):
    """A layer that reads in the directions of `merge`."""
    if merge == "reverse":
        return cls(F, F, num_layers, reverse=True, **options)
    layer = cls(F, F, num_layers, **options)
    return layer if merge is None else compat.Bidirectional(layer, merge)


def inputs(seed=0, shape=(B, T, F)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def variables(layer, seed=1):
    """Random parameters of standard deviation 1/2: initial ones have gates without inputs."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs())
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes
    )


@functools.cache
def program(cls, merge, num_layers=2):
    """A compiled layer, with parameters that are the same in every test."""
    layer = make(cls, merge, num_layers)
    v = variables(layer)
    apply = jax.jit(lambda x, state, mask, reset: layer.apply(v, x, state, mask=mask, reset=reset))
    return lambda x, state=None, mask=None, reset=None: apply(
        x, layer.init_state(x.shape[0]) if state is None else state, mask, reset
    )


def assert_close(actual, expected, atol=2e-6):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5 if atol else 0, atol=atol)

    jax.tree.map(compare, actual, expected)


def some_state(cls, merge):
    """A state that is not the initial one."""
    layer = make(cls, merge)
    return jax.tree.map(lambda leaf: leaf + 0.5, layer.init_state(B))


# Values.


def by_op(cls, params, x, num_heads, *, reverse):
    """One layer from the op and the parameters."""
    split = (*x.shape[:2], num_heads, F // num_heads)
    if cls is not compat.MLSTM:
        op = ops.lstm if cls is compat.LSTM else ops.slstm
        gates = (x @ params["proj"]["kernel"]).reshape(*x.shape[:2], 4, *split[2:])
        return op(gates, params["recurrent_kernel"], params["bias"], reverse=reverse)

    def project(name):
        return x @ params[name]["kernel"] + params[name]["bias"][None, None]

    q, k, v, o = (project(n).reshape(split) for n in ("q_proj", "k_proj", "v_proj", "output_gate"))
    h, state = ops.mlstm(q, k, v, project("input_gate"), project("forget_gate"), reverse=reverse)
    return jax.nn.sigmoid(o) * h, state


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_one_layer_is_a_projection_and_the_op(cls, reverse):
    layer = cls(F, F, num_heads=2, reverse=reverse)
    v, x = variables(layer), inputs()

    @jax.jit
    def both(v, x):
        return layer.apply(v, x), by_op(cls, v["params"]["l0"], x, 2, reverse=reverse)

    (y, state), (h, expected) = both(v, x)
    assert_close(y, h.reshape(B, T, F))
    assert_close(state.cells, (expected,))


@functools.cache
def one_cell(cls, width):
    """A compiled layer of one cell, as a function of its parameters."""
    layer = cls(width, F)
    return jax.jit(lambda params, x: layer.apply({"params": {"l0": params}}, x))


def by_hand(cls, params, x, merge):
    """Cells that read forward, for backward ones sequences that are flipped here, merged here."""
    cells = []
    for index in range(2):
        outputs = []
        for name in [n for n in (f"l{index}", f"l{index}_reverse") if n in params]:
            is_backward = merge == "reverse" or name.endswith("_reverse")
            is_backward |= merge == "alternate" and index == 1
            step = -1 if is_backward else 1
            y, state = one_cell(cls, x.shape[-1])(params[name], x[:, ::step])
            outputs.append(y[:, ::step])
            cells += state.cells
        x = functools.reduce(jnp.add, outputs) if merge == "sum" else jnp.concatenate(outputs, -1)
    return x, compat.State(tuple(cells))


@every_layer
def test_directions_are_merged_layer_by_layer(cls, merge):
    layer, x = make(cls, merge), inputs()
    y, state = program(cls, merge)(x, mask=jnp.ones((B, T), bool), reset=jnp.zeros((B, T), bool))
    params = variables(layer)["params"]
    assert_close((y, state), by_hand(cls, params.get("layer", params), x, merge))
    assert len(state.cells) == (4 if merge in ("concat", "sum") else 2)
    assert y.shape == (B, T, 2 * F if merge == "concat" else F)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, layer.init_state(B))


def test_the_flag_bidirectional_concatenates():
    x, flag = inputs(shape=(B, NUM_VALID, F)), make(compat.LSTM, bidirectional=True)
    v = {"params": variables(make(compat.LSTM, "concat"))["params"]["layer"]}
    assert_close(jax.jit(flag.apply)(v, x), program(compat.LSTM, "concat")(x), 0)
    assert len(flag.init_state(B).cells) == 4


@every_cell
def test_layers_without_bias_have_none(cls):
    layer = make(cls, bias=False)
    v = variables(layer)
    paths = jax.tree_util.tree_leaves_with_path(v)
    assert paths and not [path for path, _ in paths if "bias" in jax.tree_util.keystr(path)]
    y, _ = jax.jit(layer.apply)(v, jnp.zeros((B, NUM_VALID, F)))
    np.testing.assert_array_equal(y, 0)


def initial(cls, width=F):
    """The initial parameters of a layer of one cell."""
    init = jax.jit(cls(F, width, num_heads=2).init)
    return init(jax.random.key(0), inputs())["params"]["l0"]


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_forget_gates_start_open(cls):
    params = initial(cls)
    bias = params["bias"][:, 1] if cls is compat.SLSTM else params["forget_gate"]["bias"]
    assert bias.min() == 3 and bias.max() == 6


def test_initial_weights_of_an_lstm_are_uniform_as_in_pytorch():
    for leaf in jax.tree.leaves(initial(compat.LSTM, 16)):
        assert 0.22 < abs(leaf).max() <= 1 / np.sqrt(16) and abs(leaf.mean()) < 0.05


def test_an_slstm_starts_without_recurrence_and_gates_of_an_mlstm_without_inputs():
    assert not initial(compat.SLSTM)["recurrent_kernel"].any()
    params = initial(compat.MLSTM)
    for name in ("input_gate", "forget_gate", "output_gate"):
        assert not params[name]["kernel"].any(), name
    assert not params["input_gate"]["bias"].any() and not params["output_gate"]["bias"].any()


@every_cell
def test_initial_states_are_zeros_in_float32(cls):
    for layer in (make(cls), make(cls, "concat")):
        leaves = jax.tree.leaves(layer.init_state(B, jnp.bfloat16))
        assert leaves and all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in leaves)


# Padding.


VALID = np.array([[0, 1, 2], [1, 4, 6]])  # of the first sequence: padding at the end


def padded(fill):
    """Sequences with `NUM_VALID` valid positions, their mask, and the valid positions alone."""
    x, mask = inputs(), np.zeros((B, T), bool)
    np.put_along_axis(mask, VALID, True, axis=1)
    return jnp.where(mask[..., None], x, fill), mask, gather(x)


def gather(x):
    """The valid positions."""
    return jnp.take_along_axis(x, VALID[..., None], axis=1)


@every_layer
def test_padding_changes_no_valid_output_and_no_state(cls, merge):
    apply, before = program(cls, merge), some_state(cls, merge)
    x, mask, valid = padded(fill=jnp.nan)
    y, state = apply(x, before, mask, np.zeros((B, T), bool))
    assert_close((gather(y), state), apply(valid, before))
    np.testing.assert_array_equal(y[~mask], 0)


def test_lengths_are_masks_with_padding_at_the_end():
    layer = make(compat.MLSTM, "concat")
    lengths, before = jnp.array([3, 0]), some_state(compat.MLSTM, "concat")
    y, state = jax.jit(layer.apply)(variables(layer), inputs(), before, lengths=lengths)
    mask, no_reset = np.arange(T)[None] < lengths[:, None], np.zeros((B, T), bool)
    expected = program(compat.MLSTM, "concat")(inputs(), before, mask, no_reset)
    assert_close((y, state), expected, 0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), state, before)


def check_gradients(cls, merge):
    layer, (x, mask, valid) = make(cls, merge), padded(fill=jnp.nan)
    weights = inputs(2, (B, T, 2 * F if merge == "concat" else F))

    @jax.jit
    def gradient(v, x, weights, mask):
        def loss(v, x):
            y, state = layer.apply(v, x, mask=mask)
            return (weights * y).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(state))

        return jax.grad(loss, argnums=(0, 1))(v, x)

    v = variables(layer)
    dv, dx = gradient(v, x, weights, mask)
    assert_close((dv, gather(dx)), gradient(v, valid, gather(weights), None), 2e-5)
    np.testing.assert_array_equal(dx[~mask], 0)


def test_gradients_ignore_padding():
    check_gradients(compat.LSTM, "alternate")


@pytest.mark.slow
@pytest.mark.parametrize("merge", MERGES)
@every_cell
def test_gradients_ignore_padding_in_all_layers_and_directions(cls, merge):
    check_gradients(cls, merge)


# Packed sequences.


@every_layer
def test_packed_sequences_are_independent_in_every_direction(cls, merge):
    apply, x = program(cls, merge), inputs()
    mask, reset = np.arange(T)[None] != 3, np.arange(T)[None] == 4
    reset |= ~mask  # ignored at a masked position
    mask, reset = (np.broadcast_to(flag, (B, T)) for flag in (mask, reset))
    y, state = apply(x, None, mask, reset)
    (first, one), (second, two) = apply(x[:, :3]), apply(x[:, 4:])
    assert_close(y[:, [0, 1, 2, 4, 5, 6]], jnp.concatenate([first, second], axis=1))
    if merge in (None, "reverse"):
        assert_close(state, two if merge is None else one)


def test_backward_resets_are_at_the_last_valid_position():
    reset = jnp.array([[1, 0, 0, 1, 0, 0, 1]], bool)
    ends = compat.padding.backward_reset(Flags(reset, None))
    assert ends.tolist() == [[0, 0, 1, 0, 0, 1, 0]]
    mask = jnp.array([[1, 0, 1, 1, 1, 1, 1]], bool)
    ends = compat.padding.backward_reset(Flags(reset, mask)) & mask
    assert ends.tolist() == [[0, 0, 1, 0, 0, 1, 0]]
    mask = jnp.array([[1, 1, 0, 1, 1, 0, 0]], bool)
    ends = compat.padding.backward_reset(Flags(reset, mask)) & mask
    assert ends.tolist() == [[0, 1, 0, 0, 0, 0, 0]]
    ends = compat.padding.backward_reset(Flags(reset, mask.at[0, 3].set(False))) & mask
    assert ends.tolist() == [[0, 0, 0, 0, 0, 0, 0]]
    assert compat.padding.backward_reset(Flags(None, mask)) is None


# Arguments.


@every_cell
def test_a_sequence_can_be_continued_from_its_state(cls):
    apply, x = program(cls, None), inputs()
    mask = np.broadcast_to(np.arange(T)[None] < 6, (B, T))
    full, last = apply(x, None, mask, np.zeros((B, T), bool))
    first, state = apply(x[:, :3])
    second, state = apply(x[:, 3:6], state)
    assert_close((jnp.concatenate([first, second], axis=1), state), (full[:, :6], last))


def test_time_may_be_the_first_axis():
    (x, mask, _), reset = padded(fill=0.0), np.arange(T)[None].repeat(B, 0) == 1
    layer = make(compat.LSTM, "concat", batch_first=False)
    v = variables(layer)
    for flags in (dict(mask=mask.T), dict(lengths=jnp.array([3, 5]))):
        y, state = jax.jit(layer.apply)(v, jnp.swapaxes(x, 0, 1), reset=reset.T, **flags)
        same = mask if "mask" in flags else np.arange(T)[None] < np.array([[3], [5]])
        expected = program(compat.LSTM, "concat")(x, None, same, reset)
        assert_close((jnp.swapaxes(y, 0, 1), state), expected, 0)


def test_hidden_and_cell_states_are_those_of_pytorch():
    y, state = program(compat.LSTM, "concat")(inputs(shape=(B, NUM_VALID, F)))
    assert state.h_n.shape == state.c_n.shape == (4, B, F)
    np.testing.assert_array_equal(state.h_n[2], y[:, -1, :F])
    np.testing.assert_array_equal(state.h_n[3], y[:, 0, F:])
    np.testing.assert_array_equal(state.c_n[1], state.cells[1].c.reshape(B, F))
    with pytest.raises(UnsupportedError, match="h_n must be of an LSTM or sLSTM, got MLSTMState"):
        _ = make(compat.MLSTM).init_state(B).h_n


def test_dropout_is_between_layers():
    cls, x = compat.LSTM, inputs(shape=(B, NUM_VALID, F))
    layer = make(cls, dropout=1.0)
    v, keys = variables(layer), {"dropout": jax.random.key(0)}
    dropped = jax.jit(functools.partial(layer.apply, deterministic=False, rngs=keys))
    (y, state), (plain, expected) = dropped(v, x), program(cls, None)(x)
    assert_close(state.cells[0], expected.cells[0], 0)
    from_zeros, _ = one_cell(cls, F)(v["params"]["l1"], jnp.zeros_like(x))
    assert_close(y, from_zeros)
    assert abs(y - plain).max() > 1e-3
    one = make(cls, num_layers=1, dropout=1.0)
    last, _ = one.apply({"params": {"l0": v["params"]["l0"]}}, x, deterministic=False, rngs=keys)
    assert_close(last, one_cell(cls, F)(v["params"]["l0"], x)[0])


@every_cell
def test_activations_keep_their_dtype_and_states_are_float32(cls):
    layer = make(cls, "sum")
    y, state = jax.eval_shape(layer.apply, variables(layer), inputs().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


# Transformations.


@every_cell
def test_models_and_sequences_can_be_mapped(cls):
    layer, (x, mask, _) = make(cls, "alternate"), padded(fill=0.0)
    models = [variables(layer, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def apply(v, x, mask):  # of one sequence
        return layer.apply(v, x[None], mask=mask[None])

    mapped = jax.jit(jax.vmap(jax.vmap(apply, in_axes=(None, 0, 0)), in_axes=(0, None, None)))
    y, state = jax.tree.map(lambda leaf: leaf[0].squeeze(1), mapped(stacked, x, mask))
    expected = program(cls, "alternate")(x, None, mask, np.zeros((B, T), bool))
    assert_close((y, state), expected)


def test_a_layer_with_its_state_is_exported():
    layer, x = make(compat.SLSTM), inputs(shape=(B, NUM_VALID, F))
    v, state = variables(layer), layer.init_state(B)
    exported = jax.export.export(jax.jit(layer.apply))(v, x, state)
    loaded = jax.export.deserialize(exported.serialize())
    assert_close(loaded.call(v, x, state), program(compat.SLSTM, None)(x, state))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_layers_run_on_any_mesh(axis_type):
    layer, (x, mask, _) = make(compat.LSTM, "concat", dropout=0.5), padded(fill=0.0)
    mesh = jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])
    call = functools.partial(
        layer.apply, deterministic=False, rngs={"dropout": jax.random.key(0)}, mask=mask
    )
    expected = jax.jit(call)(variables(layer), x)
    with jax.set_mesh(mesh):
        actual = jax.jit(call)(variables(layer), jax.device_put(x, jax.P("data")))
    assert_close(actual, expected)


def test_nnx_modules_have_the_same_outputs():
    layer, x = make(compat.MLSTM, "sum", dropout=0.5), inputs(shape=(B, NUM_VALID, F))
    v = variables(layer)
    module = to_nnx(layer, v["params"], dim=F, rngs=nnx.Rngs(dropout=0))

    @nnx.jit
    def both(module, x):
        state = module.init_state(B)
        return module(x, state)[0], module(x, state, deterministic=False)[0]

    y, dropped = both(module, x)
    assert_close(y, program(compat.MLSTM, "sum")(x)[0])
    assert_close(from_nnx(module), v["params"], 0)
    assert abs(dropped - y).max() > 1e-3


# Errors.


BAD_FIELDS = {
    "num_layers must be an integer of at least 1, got 0": dict(num_layers=0),
    "num_layers must be an integer of at least 1, got 1.5": dict(num_layers=1.5),
    "num_heads must divide hidden_size=4, got 3; use 1": dict(num_heads=3),
    "dropout must be a probability, from 0 to 1, got 1.5; use 0.0": dict(dropout=1.5),
    "reverse must be False with bidirectional=True": dict(bidirectional=True, reverse=True),
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_invalid_sizes_are_rejected(message, unchecked_types):
    with pytest.raises(ArgumentError, match=message):
        compat.LSTM(F, F, **BAD_FIELDS[message])


def test_invalid_directions_are_rejected():
    with pytest.raises(ArgumentError, match="`merge` must be 'concat' or 'sum' or .*, got 'mean'"):
        compat.Bidirectional(compat.LSTM(F, F), "mean")
    with pytest.raises(ArgumentError, match="layer must read in one direction, got reverse=True"):
        compat.Bidirectional(compat.LSTM(F, F, reverse=True))


BAD_CALLS = {
    r"x must have the axes \(B T 4\), .* got shape \(2, 7, 3\)": (lambda x: x[..., :3], {}),
    r"x must have the axes \(B T 4\), .* got shape \(7, 4\); add a": (lambda x: x[0], {}),
    "lengths must be None with a mask, got both": (
        lambda x: x,
        dict(lengths=jnp.array([1, 2]), mask=np.ones((B, T), bool)),
    ),
    r"mask must have the axes \(B T\) of x, \(2, 7\), got shape \(7, 2\)": (
        lambda x: x,
        dict(mask=np.ones((T, B), bool)),
    ),
    r"lengths must have one integer for each of the 2 sequences, got shape \(3,\)": (
        lambda x: x,
        dict(lengths=jnp.array([1, 2, 3])),
    ),
    "lengths must have one integer for each of the 2 sequences, .* dtype float32": (
        lambda x: x,
        dict(lengths=[1.0, 2.0]),
    ),
    r"lengths must be from 0 to T=7, got \[8, 3\]": (lambda x: x, dict(lengths=[8, 3])),
    r"lengths must be from 0 to T=7, got \[3, -1\]": (lambda x: x, dict(lengths=[3, -1])),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_arguments_that_do_not_fit_are_rejected(message, unchecked_types):
    layer, (change, options) = make(compat.LSTM), BAD_CALLS[message]
    with pytest.raises(ArgumentError, match=message):
        layer.apply(variables(layer), change(inputs()), **options)


def test_a_state_or_parameters_of_other_directions_are_rejected():
    layer, other = make(compat.LSTM), make(compat.LSTM, bidirectional=True)
    v, x = variables(layer), inputs()
    with pytest.raises(ArgumentError, match=r"state must be that of LSTM and 2 seq.*init_state\(2"):
        layer.apply(v, x, other.init_state(B))
    with pytest.raises(ArgumentError, match="params must have no entries but.*l0_reverse"):
        layer.apply(variables(other), x)
