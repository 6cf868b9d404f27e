"""Causal convolution: formula, state, resets and masks, for values and gradients."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests import golden_files, quick
from xlstm_jax import ops

B, T, F = 2, 11, 3
WINDOWS = [1, 4]
windows = pytest.mark.parametrize("W", WINDOWS, ids="W{}".format)
mixings = pytest.mark.parametrize("mixing", [False, True], ids=["depthwise", "mixing"])


def make(W: int, mixing: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of a call, in float64."""
    rng = np.random.default_rng([seed, W])
    out = F + 2 if mixing else F
    return {
        "x": rng.standard_normal((B, T, F)),
        "kernel": rng.standard_normal((W, F, out) if mixing else (W, F)),
        "bias": rng.standard_normal(out),
        "state": rng.standard_normal((B, W - 1, F)),
    }


def convolve_sequence(x, kernel, bias, state, reset, mask):
    """Outputs and last inputs of one sequence, one step at a time."""
    W = kernel.shape[0]
    window = [*state]
    y = []
    for x_t, is_reset, is_valid in zip(x, reset, mask, strict=True):
        if not is_valid:
            y.append(np.zeros_like(bias))
            continue
        if is_reset:
            window = [np.zeros_like(x_t)] * (W - 1)
        window = [*window, x_t]
        taps = zip(window, kernel, strict=True)
        y.append(bias + sum(w * k if k.ndim == 1 else w @ k for w, k in taps))
        window = window[1:]
    return np.stack(y), np.stack(window) if W > 1 else state


def by_steps(args, reset, mask):
    """`convolve_sequence` of every sequence."""
    kernel, bias = args["kernel"], args["bias"]
    results = [
        convolve_sequence(args["x"][b], kernel, bias, args["state"][b], reset[b], mask[b])
        for b in range(B)
    ]
    return tuple(np.stack(leaf) for leaf in zip(*results, strict=True))


def inner(a, b):
    """Inner product of two pytrees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.asarray(x) * np.asarray(y))) for x, y in pairs)


def pullback(call):
    """A jitted function (arguments, cotangents) -> (outputs, gradients)."""

    def evaluate(args, cotangents):
        outputs, pullback = jax.vjp(call, args)
        return outputs, pullback(cotangents)[0]

    return quick.jit(evaluate)


def flags(rng):
    """Random resets, and masks with four random masked steps in every sequence."""
    mask = np.ones((B, T), bool)
    for sequence in mask:
        sequence[rng.choice(T, 4, replace=False)] = False
    return rng.random((B, T)) < 0.3, mask


def call_with(reset, mask):
    keywords = {}
    if reset is not None:
        keywords["reset"] = jnp.asarray(reset)
    if mask is not None:
        keywords["mask"] = jnp.asarray(mask)
    return lambda args: ops.causal_conv(**args, **keywords)


@pytest.mark.parametrize("kind", ["plain", "resets", "masks", "both"])
@mixings
@windows
def test_values_states_and_gradients_match_the_formula(W, mixing, kind, rng, x64):
    args = make(W, mixing)
    reset, mask = flags(rng)
    arguments = (
        reset if kind in ("resets", "both") else None,
        mask if kind in ("masks", "both") else None,
    )
    reset = reset if arguments[0] is not None else np.zeros((B, T), bool)
    mask = mask if arguments[1] is not None else np.ones((B, T), bool)
    expected = by_steps(args, reset, mask)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape), expected)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), args)
    call = pullback(call_with(*arguments))
    actual, gradients = call(*jax.tree.map(jnp.asarray, (args, cotangents)))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    # The formula is linear in inputs and in weights, so a central difference is exact.
    ahead, behind = (
        by_steps(jax.tree.map(lambda a, d, s=s: a + s * d, args, direction), reset, mask)
        for s in (0.5, -0.5)
    )
    slope = inner(cotangents, ahead) - inner(cotangents, behind)
    np.testing.assert_allclose(inner(gradients, direction), slope, rtol=1e-11)


@pytest.mark.parametrize("W,mixing", [(1, False), (4, False), (4, True)])
def test_sequence_can_be_split_anywhere(W, mixing):
    args = jax.tree.map(jnp.float32, make(W, mixing))
    call = quick.jit(ops.causal_conv)
    y, last = call(**args)
    for split in (1, 5, T - 1):
        first, state = call(**{**args, "x": args["x"][:, :split]})
        second, state = call(**{**args, "x": args["x"][:, split:], "state": state})
        joined = np.concatenate([first, second], axis=1)
        np.testing.assert_allclose(joined, y, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(state, last)


def test_packed_sequence_equals_its_separate_documents():
    args = jax.tree.map(jnp.float32, make(4, False))
    boundaries = [0, 4, 5, T]
    reset = np.zeros((B, T), bool)
    reset[:, boundaries[:-1]] = True
    y, last = quick.jit(call_with(reset, None))(args)
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        call = quick.jit(ops.causal_conv)
        document, state = call(args["x"][:, start:stop], args["kernel"], args["bias"])
        np.testing.assert_allclose(y[:, start:stop], document, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("W,mixing", [(1, False), (4, False), (4, True)])
def test_masked_sequence_equals_the_sequence_without_masked_positions(W, mixing, rng):
    args = jax.tree.map(jnp.float32, make(W, mixing))
    reset, mask = flags(rng)
    drop = lambda x: np.asarray(x)[mask].reshape((B, T - 4) + x.shape[2:])  # noqa: E731
    y, last = quick.jit(call_with(reset, mask))(args)
    shorter = {**args, "x": jnp.asarray(drop(args["x"]))}
    expected, state = quick.jit(call_with(drop(reset), None))(shorter)
    np.testing.assert_allclose(drop(y), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last, state)
    assert not np.asarray(y)[~mask].any()


@windows
def test_inputs_of_masked_steps_do_not_change_results(W, rng):
    args = jax.tree.map(jnp.float32, make(W, False))
    reset, mask = flags(rng)
    garbage = {**args, "x": jnp.where(mask[..., None], args["x"], jnp.nan)}

    @quick.jit
    def evaluate(args, reset):
        outputs, pullback = jax.vjp(call_with(reset, mask), args)
        return outputs, pullback(jax.tree.map(jnp.ones_like, outputs))[0]

    clean = evaluate(args, reset)
    jax.tree.map(np.testing.assert_array_equal, evaluate(garbage, reset | ~mask), clean)
    assert not np.asarray(clean[1]["x"])[~mask].any()


@windows
def test_fully_masked_sequence_leaves_the_state_unchanged(W):
    args = jax.tree.map(jnp.float32, make(W, False))
    y, state = quick.jit(call_with(np.ones((B, T), bool), np.zeros((B, T), bool)))(args)
    np.testing.assert_array_equal(state, args["state"])
    assert not y.any()


@windows
def test_outputs_depend_on_their_window_only(W):
    args = jax.tree.map(jnp.float32, make(W, False))
    outputs = lambda x: ops.causal_conv(**{**args, "x": x})[0].sum((0, 2))  # noqa: E731
    slope = quick.jit(jax.jacrev(outputs))(args["x"])
    reach = np.abs(np.asarray(slope)).sum((1, 3))  # output step, input step
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    np.testing.assert_array_equal(reach > 0, (s <= t) & (s > t - W))


def test_state_and_bias_default_to_zeros():
    args = jax.tree.map(jnp.float32, make(4, False))
    zeros = {**args, "state": jnp.zeros_like(args["state"]), "bias": jnp.zeros(F)}
    call = quick.jit(ops.causal_conv)
    expected, actual = call(**zeros), call(args["x"], args["kernel"])
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@mixings
def test_bfloat16_inputs_give_bfloat16_outputs(mixing):
    args = jax.tree.map(jnp.bfloat16, make(4, mixing))
    y, state = jax.eval_shape(lambda args: ops.causal_conv(**args), args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_depthwise_convolution_matches_the_golden_file():
    golden = golden_files.load("v1_components")
    x = jnp.asarray(golden.arrays["input/x"])
    conv = golden.under("conv/")
    kernel, bias = jnp.asarray(conv["param/weight"][:, 0].T), jnp.asarray(conv["param/bias"])
    call, half = quick.jit(ops.causal_conv), x.shape[1] // 2
    y, _ = call(x, kernel, bias)
    golden_files.assert_matches(np.asarray(y), conv["output"], 2e-5, "y")
    _, state = call(x[:, :half], kernel, bias)
    golden_files.assert_matches(np.asarray(state), conv["state_after_half"], 2e-5, "state")
    second, _ = call(x[:, half:], kernel, bias, state)
    golden_files.assert_matches(np.asarray(second), conv["output"][:, half:], 2e-5, "rest")


def test_channel_mixing_convolution_matches_the_golden_file():
    golden = golden_files.load("v1_components")
    conv = golden.under("conv_mixing/")
    kernel = jnp.asarray(conv["param/weight"].transpose(2, 1, 0))
    x, bias = jnp.asarray(golden.arrays["input/x"]), jnp.asarray(conv["param/bias"])
    y, _ = quick.jit(ops.causal_conv)(x, kernel, bias)
    golden_files.assert_matches(np.asarray(y), conv["output"], 2e-5, "y")


@pytest.mark.parametrize(
    "name,shape",
    [
        ("x", (B, T)),
        ("kernel", (4, F + 1)),
        ("kernel", (F,)),
        ("bias", (F + 1,)),
        ("state", (B, 4, F)),
        ("state", (B + 1, 3, F)),
        ("reset", (B, T + 1)),
        ("mask", (B + 1, T)),
    ],
)
def test_wrong_shape_raises_an_error_with_the_argument(name, shape):
    args = {**make(4, False), "reset": np.zeros((B, T)), "mask": np.ones((B, T))}
    args = {
        k: jnp.asarray(a, bool if k in ("reset", "mask") else "float32") for k, a in args.items()
    }
    args[name] = jnp.zeros(shape, args[name].dtype)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=rf"`{name}` must .*shape") as error:
            ops.causal_conv(**args)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(shape) in str(error.value) and "\n" not in str(error.value)
