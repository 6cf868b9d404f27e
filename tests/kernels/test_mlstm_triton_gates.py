"""The Triton kernels for the gates of the mLSTM, interpreted, against the same in `jnp`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import backends, packing
from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.options import Backward, Options
from tests.kernels.triton_interpreter import race_detector
from tests.ops.subjects import implementations

REFUSAL = implementations("mlstm")["triton"]
pytestmark = [
    pytest.mark.slow,  # interpreted; tests/ops has the gradients of the op
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]

B, T, H, K, V, L = 2, 112, 2, 16, 32, 8
N = T // L  # more than three blocks of chunks, as interpreted


class Tile:
    """The only part of a tile that these kernels use."""

    chunk = L


EXTREMES = {
    "ordinary": (0.0, 3.0, 2.0),
    "closed forget gates": (-1e9, 3.0, 2.0),
    "some closed forget gates": (0.0, 3.0, 2.0),
    "large input gates": (2.0, 300.0, 2.0),
    "small input gates": (2.0, -1e6, 10.0),
    "steps of 1e5": (1e5, 1e5, 1e5),
}
"""Mean of f, mean of i, and scale of both."""


def options(kernels, forget_gate="sigmoid", **changes) -> Options:
    return Options(
        kernels=kernels,
        tile=Tile,
        forget_gate=forget_gate,
        **dict(max_state=True, normalize=True, eps=1e-6, resets=True, lanes=L, interpret=True)
        | changes,
    )


def make_gates(resets: bool, extreme: str, forget_gate: str) -> tuple[pre.LogGates, jax.Array]:
    """Log gates `B T H`, and m before the first step."""
    rng = np.random.default_rng(len(extreme))
    mean_f, mean_i, scale = EXTREMES[extreme]
    i, f = (mean + scale * rng.standard_normal((B, T, H)) for mean in (mean_i, mean_f))
    if extreme.startswith("some"):
        f = np.where(rng.random(f.shape) < 0.2, -1e9, f)
    reset = jnp.asarray(rng.random((B, T)) < 0.1) if resets else None
    mask = jnp.asarray(rng.random((B, T)) < 0.9)
    gates = pre.log_gates(
        *(jnp.asarray(x, jnp.float32) for x in (i, f)),
        *(reset, mask),
        input_gate="exp",
        forget_gate=forget_gate,
    )
    return gates, jnp.asarray(rng.standard_normal((B, H)), jnp.float32)


def close(actual, expected, atol=1e-4):
    """Equal to rounding; log weights below those of 0 in float32 are all alike."""
    lowest = -120.0
    actual, expected = (np.maximum(np.asarray(x, np.float64), lowest) for x in (actual, expected))
    scale = np.maximum(1, np.abs(expected))
    np.testing.assert_array_less(np.abs(actual - expected) / scale, atol)


def assert_packed_match(actual, expected, atol=1e-4):
    """Log weights of pairs and all other gates are equal; the split of a log weight may differ."""
    actual, expected = (
        packing.PackedGates(*np.moveaxis(np.asarray(x, np.float64), 2, 0))
        for x in (actual, expected)
    )
    np.testing.assert_array_equal(actual.segment, expected.segment)
    for name in ("read", "write", "normalizer", "decay"):
        close(getattr(actual, name), getattr(expected, name), atol)
    weights = []
    for x in (actual, expected):
        coarse, query, key, segment = (
            y.reshape(B, H, N, L) for y in (x.coarse, x.query, x.key, x.segment)
        )
        pairs = coarse[..., :, None] - coarse[..., None, :]
        pairs = pairs + query[..., :, None] + key[..., None, :]
        visible = np.tril(np.ones((L, L), bool)) & (segment[..., :, None] == segment[..., None, :])
        weights.append(np.where(visible, pairs, pre.NEG))
    close(*weights, atol)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("resets", [False, True], ids=["plain", "resets"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_gates_of_both_passes_match(extreme, resets, forget_gate):
    gates, m_first = make_gates(resets, extreme, forget_gate)
    options_of = functools.partial(options, forget_gate=forget_gate, resets=resets)
    expected = packing.forward(options_of(None), K, gates, m_first)
    kernels = backends.triton()
    with common.interpreted(lanes=L), race_detector() as errors:
        actual = jax.jit(lambda *x: kernels.pack_forward(options_of(kernels), K, *x))(
            gates, m_first
        )
        jax.block_until_ready(actual)
    assert not errors
    close(actual.m_starts, expected.m_starts)
    close(actual.m_last, expected.m_last)
    # Sums of many steps may round m differently, in its last digit.
    atol = 1e-4 + 2.0**-23 * float(jnp.max(jnp.abs(expected.m_starts)))
    assert_packed_match(actual.packed, expected.packed, atol)

    rng = np.random.default_rng(0)
    d = jnp.asarray(3 * rng.standard_normal((B, H, 1, T)), jnp.float32)
    h, dh = (jnp.asarray(rng.standard_normal((B, T, H * V)), jnp.float32) for _ in range(2))
    arrays = (gates, expected.m_starts, d, h, dh)
    expected = packing.backward_with_sums(options_of(None), K, *arrays)
    with race_detector() as errors:
        actual = jax.jit(lambda *x: kernels.pack_backward(options_of(kernels), K, *x))(*arrays)
        jax.block_until_ready(actual)
    assert not errors
    assert_packed_match(actual, expected, atol)


def test_without_an_exponential_gate_the_stabilizers_are_zero():
    gates, m_first = make_gates(True, "ordinary", "sigmoid")
    changes = dict(max_state=False, normalize=False)
    expected = packing.forward(options(None, **changes), K, gates, m_first)
    kernels = backends.triton()
    with common.interpreted(lanes=L):
        actual = kernels.pack_forward(options(kernels, **changes), K, gates, m_first)
        packed = kernels.pack_backward(
            options(kernels, **changes), K, gates, actual.m_starts, None, None, None
        )
    assert not np.any(actual.m_starts) and not np.any(actual.m_last)
    assert_packed_match(actual.packed, expected.packed)
    arrays = gates, actual.m_starts, None, None, None
    assert_packed_match(packed, packing.backward(options(None, **changes), K, *arrays))


@pytest.mark.parametrize("resets", [False, True], ids=["plain", "resets"])
def test_cotangents_of_gates_match(resets):
    gates, _ = make_gates(resets, "ordinary", "sigmoid")
    rng = np.random.default_rng(1)
    array = lambda *sizes: jnp.asarray(rng.standard_normal(sizes), jnp.float32)  # noqa: E731
    sums = Backward(
        *[None] * 3, array(B, H, 2, T), array(B, H, 2, T), array(B, H, N, 3), *[None] * 2
    )
    end = array(B, H)
    expected = packing.gate_grads(options(None, resets=resets), gates, sums, end)
    kernels = backends.triton()
    with common.interpreted(lanes=L), race_detector() as errors:
        call = functools.partial(kernels.gate_grads, options(kernels, resets=resets))
        actual = jax.block_until_ready(jax.jit(call)(gates, sums, end))
    assert not errors
    for x, y in zip(actual, expected, strict=True):
        close(x, y, 1e-5)


def test_nan_gates_are_not_hidden():
    gates, m_first = make_gates(False, "ordinary", "sigmoid")
    gates = gates._replace(log_i=gates.log_i.at[0, 3, 0].set(jnp.nan))
    kernels = backends.triton()
    with common.interpreted(lanes=L):
        packed = kernels.pack_forward(options(kernels, resets=False), K, gates, m_first).packed
    assert np.isnan(packed[0, 0, packing.KEY, 3]) and np.isnan(packed[0, 0, packing.WRITE, 3])
    assert not np.any(np.isnan(packed[1])) and not np.any(np.isnan(packed[0, 1]))
