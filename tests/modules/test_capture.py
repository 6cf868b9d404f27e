"""Captured activations: values, their order, and that nothing captured costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax import cells, ops, sharding
from xlstm_jax.modules import BLOCKS, Backbone, LargeMLSTMLayer, MLSTMLayer, SLSTMLayer
from xlstm_jax.modules.capture import NAMES

slow = pytest.mark.slow
SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 3, 0]])
SCANNED = "MMsMMs"  # with rematerialization: one scan whose steps omit a letter


@functools.cache
def captured(pattern: str, remat: str = "none"):
    """The model, its variables, tokens, and what it returns with everything captured."""
    model, variables = models.model_and_variables(models.config(pattern, remat=remat))
    tokens = models.tokens(0, 2, 5)
    run = jax.jit(functools.partial(model.apply, capture=NAMES))
    return model, variables, tokens, run(variables, tokens, segment_ids=SEGMENTS)


def _assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "pattern, remat",
    [
        ("msM", "none"),
        pytest.param(SCANNED, "full", marks=slow),
        pytest.param(models.MIXED_BASELINES, "none", marks=slow),
    ],
)
def test_capturing_changes_neither_logits_nor_state(pattern, remat):
    model, variables, tokens, (logits, state, _) = captured(pattern, remat)
    expected = jax.jit(model.apply)(variables, tokens, segment_ids=SEGMENTS)
    jax.tree.map(np.testing.assert_array_equal, (logits, state), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, remat", [("msM", "none"), pytest.param(SCANNED, "full", marks=slow)]
)
def test_capturing_nothing_compiles_the_same_program(pattern, remat):
    model, variables = models.model_and_variables(models.config(pattern, remat=remat))
    tokens = models.tokens(0, 2, 5)

    def text(**options):
        grad = jax.grad(lambda v: jnp.sum(model.apply(v, tokens, **options)[0]))
        run = lambda v: (model.apply(v, tokens, **options), grad(v))  # noqa: E731
        return jax.jit(run).lower(variables).as_text()

    assert text() == text(capture=())
    assert text() != text(capture=("hidden",))


def test_captured_leaves_have_the_axes_layers_batch_time():
    model, _, _, (_, state, got) = captured("msM")
    assert set(got) == set(NAMES)
    assert got["hidden"].shape == (3, 2, 5, 16)
    assert set(got["gates"]) == set(got["state"]) == set("msM")
    assert {leaf.shape[:3] for leaf in jax.tree.leaves(got["gates"])} == {(1, 2, 5)}
    assert got["gates"]["m"]["o"].shape == (1, 2, 5, 2, 12)  # layers B T H V
    expected = jax.tree.map(lambda leaf: (*leaf.shape[:2], 5, *leaf.shape[2:]), state)
    assert jax.tree.map(jnp.shape, got["state"]) == expected


class _Recorder:
    """Arguments of the ops, in the order of the blocks."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("mlstm", "slstm"):
            monkeypatch.setattr(ops, name, functools.partial(self._run, getattr(ops, name)))

    def _run(self, op, *args, **options):
        self.calls.append(args)
        return op(*args, **options)


@pytest.mark.slow
def test_recurrence_from_captured_gates_gives_the_captured_stabilizers_and_states(monkeypatch):
    """The plain recurrence of the cells, one step at a time, in every layer of a model."""
    model, variables = models.model_and_variables(models.config("smMm"))
    recorder = _Recorder(monkeypatch)

    def run(variables):
        _, _, got = model.apply(variables, models.tokens(0, 2, 3), capture=("gates", "state"))
        # "state" runs each block again, one position at a time.
        return got, [args[:3] for args in recorder.calls if args[0].shape[1] == 3]

    with jax.disable_jit():  # the recorded arguments are arrays
        got, passes = run(variables)
    layers = {letter: iter(range(2)) for letter in "smM"}
    for letter, args in zip("smMm", passes, strict=True):
        layer = next(layers[letter])
        gates, states = jax.tree.map(
            lambda leaf, layer=layer: leaf[layer], (got["gates"][letter], got["state"][letter])
        )
        recurrence = jax.jit(_slstm_steps if letter == "s" else _mlstm_steps)
        for t, (state, normalizer) in enumerate(recurrence(gates, args)):
            actual = jax.tree.map(lambda leaf, t=t: leaf[:, t], getattr(states, "cell", states))
            _assert_close(actual, state)
            np.testing.assert_allclose(gates["m"][:, t], state.m, 1e-5, 1e-5)
            np.testing.assert_allclose(gates["normalizer"][:, t], normalizer, 1e-4, 1e-5)


def _slstm_steps(gates, args):
    """The states; the captured gates have the recurrent contribution, so its weights are zeros."""
    steps, state, no_weights = [], cells.slstm_init(2, 2, 8), jnp.zeros((2, 8, 4, 8))
    for t in range(3):
        x = jnp.stack([gates[name][:, t] for name in "ifzo"], axis=1)
        state, _ = cells.slstm_step(state, x, no_weights)
        steps.append((state, state.n))
    return steps


def _mlstm_steps(gates, args):
    """The states, and by what the read-out of the matrix memory was divided."""
    (B, _, H, K), V = args[0].shape, args[2].shape[-1]
    steps, state = [], cells.mlstm_init(B, H, K, V)
    for t in range(3):
        q, k, v = (a[:, t] for a in args[:3])
        state, h = cells.mlstm_step(state, q, k, v, gates["i"][:, t], gates["f"][:, t])
        read = jnp.einsum("BHK,BHKV->BHV", q, state.C) / np.sqrt(K)
        steps.append((state, (read / h)[..., 0]))
    return steps


@pytest.mark.parametrize("pattern", ["msM", pytest.param(models.MIXED_BASELINES, marks=slow)])
def test_state_of_a_position_is_the_state_to_continue_from(pattern):
    model, variables, tokens, (_, state, got) = captured(pattern)
    run = jax.jit(model.apply)
    for t in (1, 3):
        _, expected = run(variables, tokens[:, : t + 1], segment_ids=SEGMENTS[:, : t + 1])
        _assert_close(jax.tree.map(lambda leaf, t=t: leaf[:, :, t], got["state"]), expected)
    _assert_close(jax.tree.map(lambda leaf: leaf[:, :, -1], got["state"]), state)


@pytest.mark.parametrize("index, layer", [(3, 2), (5, 1)])
def test_hidden_states_are_the_outputs_of_the_blocks_in_order(index, layer):
    """Each is that of the block with this index, applied to the one before it."""
    model, variables, _, (_, _, got) = captured(SCANNED, "full")
    letter = SCANNED[index]
    stacked = variables["params"]["stack"][letter]
    params = jax.tree.map(lambda leaf: leaf[layer], stacked)
    run = jax.jit(BLOCKS[letter].block(model.cfg).apply)
    reset = jnp.array([[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    options = dict(reset=reset, mask=SEGMENTS != 0)
    expected, _ = run({"params": params}, got["hidden"][index - 1], **options)
    np.testing.assert_allclose(got["hidden"][index], expected, 1e-5, 1e-5)


@functools.cache
def _values_and_gradients(pattern, remat):
    model, variables = models.model_and_variables(models.config(pattern, remat=remat))

    def loss(variables):
        logits, _, got = model.apply(variables, models.tokens(0, 2, 3), capture=NAMES)
        total = sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(got))
        return jnp.sum(jnp.sin(logits)) + total, got

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, remat",
    [
        ("M", "names"),
        *(pytest.param("Ms", x, marks=slow) for x in ("names", "dots", "full", "offload")),
    ],
)
def test_captured_values_and_gradients_do_not_depend_on_the_loop_over_blocks(pattern, remat):
    values, grads = _values_and_gradients(pattern, remat)
    expected, expected_grads = _values_and_gradients(pattern, "none")
    _assert_close(values, expected, 1e-4)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)


@pytest.mark.slow
def test_decoding_steps_capture_what_one_pass_does():
    model, variables, tokens, _ = captured("msM")
    run = jax.jit(functools.partial(model.apply, capture=NAMES))
    _, state, expected = run(variables, tokens)
    _, state, first = run(variables, tokens[:, :4])
    _, _, last = run(variables, tokens[:, 4:], state)
    for tree in (expected, first, last):
        for gates in tree["gates"].values():
            del gates["log_f_sum"]  # a sum over the positions of a call
    for names in ("gates", "state", "hidden"):
        parts = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves, axis=2), first[names], last[names]
        )
        _assert_close(parts, expected[names], 1e-4)


@pytest.mark.slow
def test_capture_is_mapped_over_by_vmap():
    model, variables, tokens, _ = captured("msM")
    one = lambda t: model.apply(variables, t[None], capture=("gates", "hidden"))[2]  # noqa: E731
    mapped = jax.jit(jax.vmap(one))(tokens)
    expected = jax.jit(functools.partial(model.apply, capture=("gates", "hidden")))(
        variables, tokens
    )[2]
    _assert_close(jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, :, 0], 0, 1), mapped), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(data=2, seq=2), pytest.param(dict(tensor=2), marks=slow)])
def test_captured_values_do_not_depend_on_the_mesh(axes, one_device):
    model, variables = models.model_and_variables(models.config("ms"))
    tokens, segment_ids = models.tokens(0, 2, 6), jnp.array([[1, 1, 1, 2, 2, 2], [1] * 4 + [0] * 2])
    run = functools.partial(model.apply, segment_ids=segment_ids, capture=NAMES)
    expected = jax.jit(run)(variables, tokens)
    sizes = dict(data=1) | axes
    devices = sharding.make_devices(
        sharding.MeshConfig(**sizes), jax.devices("cpu")[: np.prod(list(sizes.values()))]
    )
    with devices.active():
        actual = jax.jit(lambda *x: run(*x))(variables, tokens)
    _assert_close(actual, expected, 1e-4)


def test_gates_are_float32_for_bfloat16_activations():
    model, variables = models.model_and_variables(models.config(dtype="bfloat16"))
    apply = functools.partial(model.apply, capture=NAMES)
    _, state, got = jax.eval_shape(apply, variables, models.tokens(0, 2, 5))
    dtypes = {
        (letter, name): leaf.dtype
        for letter, gates in got["gates"].items()
        for name, leaf in gates.items()
    }
    rounded = {("m", "o"), ("M", "o")}  # multiplied with activations
    assert {key for key, dtype in dtypes.items() if dtype == jnp.bfloat16} == rounded
    assert {dtypes[key] for key in dtypes if key not in rounded} == {jnp.dtype("float32")}
    assert got["hidden"].dtype == jnp.bfloat16
    dtype = lambda leaf: leaf.dtype  # noqa: E731
    assert jax.tree.map(dtype, got["state"]) == jax.tree.map(dtype, state)


@pytest.mark.parametrize("layer", [MLSTMLayer, SLSTMLayer, LargeMLSTMLayer])
def test_layers_store_gates_in_a_collection_only_on_request(layer, key):
    cfg = models.config()
    field = {MLSTMLayer: cfg.mlstm, SLSTMLayer: cfg.slstm, LargeMLSTMLayer: cfg.large}[layer]
    x = jax.random.normal(key, (2, 3, 16))
    module = layer(field)
    variables = jax.eval_shape(module.init, key, x)
    assert set(variables) == {"params"}
    run = functools.partial(module.apply, mutable=["gates"])
    (y, _), stored = jax.eval_shape(run, variables, x)
    assert y.shape == x.shape
    assert {leaf.shape[:3] for leaf in jax.tree.leaves(stored["gates"])} == {(2, 3, 2)}


def test_backbone_captures_as_the_model_does():
    model, variables, tokens, _ = captured("msM")
    x = variables["params"]["token_embedding"]["embedding"][tokens]
    backbone = functools.partial(Backbone(model.cfg).apply, capture=("hidden",))
    hidden = jax.jit(backbone)(variables, x)[2]
    expected = jax.jit(functools.partial(model.apply, capture=("hidden",)))(variables, tokens)[2]
    _assert_close(hidden, expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("capture", ["gates", ("gate",), True, None, (["gates"],)], ids=repr)
def test_unknown_names_are_rejected_in_one_line(capture):
    model, variables, tokens, _ = captured("msM")
    message = r"capture must be a tuple of names from \('gates', 'state', 'hidden'\), got"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, tokens, capture=capture)
