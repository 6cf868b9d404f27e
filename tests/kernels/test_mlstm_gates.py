"""Gate arithmetic of the mLSTM kernels: running sums, the stabilizer m, and their gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm import gates
from tests import quick
from tests.kernels.mlstm_cases import make_case

pytestmark = pytest.mark.slow  # like the tests of the kernels that read them

CHUNK = 8


class Gates(NamedTuple):
    """Raw gates `B T H`, flags `B T` or None, and m before the first step."""

    i: np.ndarray
    f: np.ndarray
    reset: np.ndarray | None
    mask: np.ndarray | None
    m: np.ndarray

    def compute(
        self, input_gate="exp", forget_gate="sigmoid", chunk=CHUNK
    ) -> tuple[gates.LogGates, gates.Decays]:
        """The log gates and the decays of all chunks."""
        flags = (None if x is None else jnp.asarray(x) for x in (self.reset, self.mask))
        i, f, m = map(jnp.asarray, (self.i, self.f, self.m))
        logs = gates.log_gates(i, f, *flags, input_gate=input_gate, forget_gate=forget_gate)

        def compute(logs, m):
            chunks = gates.in_chunks(logs, chunk)
            m = gates.stabilizers(chunks, m, max_state="exp" in (input_gate, forget_gate))
            return gates.decays(chunks, *m, forget_gate=forget_gate)

        return logs, quick.jit(compute)(logs, m)


def make_gates(flags: bool, B=2, T=32, H=2, *, scale=2.0) -> Gates:
    """Random gates, with random resets and mask if `flags`."""
    case = make_case(B=B, T=T, H=H, scale=scale, flags=flags)
    return Gates(case.i, case.f, case.reset, case.mask, case.state[2])


ACTIVATIONS = [(i, f) for i in ("exp", "sigmoid") for f in ("exp", "sigmoid")]
both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])


def exact(raw: Gates, input_gate="exp", forget_gate="sigmoid"):
    """log i, log f and unmasked resets, `B H T`, in float64, from their definitions."""
    i, f = (np.swapaxes(x, 1, 2).astype(np.float64) for x in (raw.i, raw.f))
    log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    log_i = i if input_gate == "exp" else log_sigmoid(i)
    log_f = f if forget_gate == "exp" else log_sigmoid(f)
    masked, reset = np.zeros(i.shape, bool), np.zeros(i.shape, bool)
    if raw.mask is not None:
        masked |= ~raw.mask[:, None]
    if raw.reset is not None:
        reset |= raw.reset[:, None] & ~masked
    return np.where(masked, gates.NEG, log_i), np.where(masked, 0, log_f), reset


def assert_log_weights_match(actual, expected, name):
    """Log weights agree, or both are so low that the weights are 0 in float32."""
    lowest = -120.0
    actual, expected = (np.maximum(np.asarray(x, np.float64), lowest) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=name)


@both_flags
@pytest.mark.parametrize("activations", ACTIVATIONS, ids="-".join)
def test_log_weights_are_sums_of_log_gates_relative_to_m(activations, flags):
    raw = make_gates(flags)
    if activations[1] == "exp":
        raw = raw._replace(f=raw.f - np.float32(3))  # mostly below 1
    _, x = raw.compute(*activations)
    log_i, log_f, reset = exact(raw, *activations)
    B, H, T = log_i.shape
    for b, h, chunk in np.ndindex(B, H, T // CHUNK):
        steps = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        log_i_chunk, log_f_chunk, resets = (a[b, h, steps] for a in (log_i, log_f, reset))
        from_start = np.full(CHUNK, gates.NEG)
        weights = np.full((CHUNK, CHUNK), gates.NEG)
        for t in range(CHUNK):
            for s in range(t + 1):
                if not resets[s + 1 : t + 1].any():
                    weights[t, s] = log_f_chunk[s + 1 : t + 1].sum() + log_i_chunk[s]
            if not resets[: t + 1].any():
                from_start[t] = log_f_chunk[: t + 1].sum()
        index = (b, h, chunk)
        at = jax.tree.map(lambda a: np.asarray(a[index], np.float64), x)  # noqa: B023
        weights, from_start = weights - at.m[:, None], from_start + at.m_start - at.m
        assert_log_weights_match(at.from_start, from_start, "from_start")
        assert_log_weights_match(x.across[index], from_start[-1], "across")
        assert_log_weights_match(at.to_end, weights[-1], "to_end")
        visible = np.tri(CHUNK, dtype=bool)
        if at.segment is not None:
            np.testing.assert_array_equal(at.segment, np.cumsum(resets))
            visible &= at.segment[:, None] == at.segment
        coarse = at.coarse[:, None] - at.coarse
        pairs = coarse + (at.fine + at.query)[:, None] + (at.key - at.fine)
        assert_log_weights_match(np.where(visible, pairs, gates.NEG), weights, "weights")


@both_flags
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_m_matches_the_recurrence(forget_gate, scale, flags):
    raw = make_gates(flags, scale=scale)
    _, x = raw.compute("exp", forget_gate)
    log_i, log_f, reset = exact(raw, "exp", forget_gate)
    m, m_steps = raw.m.astype(np.float64), []
    for t in range(log_i.shape[2]):
        m = np.maximum(log_f[..., t] + np.where(reset[..., t], 0, m), log_i[..., t])
        m_steps.append(m)
    expected = np.stack(m_steps, axis=-1).reshape(x.m.shape)
    np.testing.assert_allclose(x.m, expected, rtol=1e-6, atol=1e-5 * scale)
    np.testing.assert_allclose(x.m_end, expected[..., -1], rtol=1e-6, atol=1e-5 * scale)
    starts = np.concatenate([raw.m[..., None], expected[:, :, :-1, -1]], axis=-1)
    np.testing.assert_allclose(x.m_start, starts, rtol=1e-6, atol=1e-5 * scale)


@both_flags
def test_m_is_zero_with_sigmoid_input_gate(flags):
    _, x = make_gates(flags)._replace(m=np.zeros((2, 2), np.float32)).compute("sigmoid")
    assert not any(np.any(leaf) for leaf in (x.m, x.m_start, x.m_end))


def test_differences_of_large_sums_do_not_cancel():
    """Sums of 256 log gates near -40: weights of adjacent positions have an error below 1e-5.

    With the sums, some -10,000, in a single float32 the error would be 5e-4.
    """
    raw = make_gates(False, T=256, scale=0.3)
    raw = raw._replace(f=(raw.f - 43).astype(np.float32), m=np.zeros_like(raw.m))
    _, x = raw.compute("sigmoid", chunk=256)
    log_i, log_f, _ = exact(raw, "sigmoid")
    coarse, fine, key = (np.asarray(a)[:, :, 0] for a in (x.coarse, x.fine, x.key))
    assert coarse.min() < -9000
    near = fine[..., 1:] + (key - fine)[..., :-1]
    actual = (coarse[..., 1:] - coarse[..., :-1]) + near
    expected = log_f[..., 1:] + log_i[..., :-1]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    one_part = np.cumsum(np.float32(log_f), axis=-1, dtype=np.float32)
    error = (one_part[..., 1:] - one_part[..., :-1]) + np.float32(log_i)[..., :-1] - expected
    assert np.abs(error).max() > 1e-4


@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("f", [-100, -1e5, -1e9, -np.inf])
def test_closed_forget_gates_leave_no_rounding_errors(f, chunk):
    """Weights within a segment between closed forget gates are those without these gates."""
    raw = make_gates(False, T=512)
    raw.f[:, ::7] = f
    _, x = raw.compute(chunk=chunk)
    log_i, log_f, _ = exact(raw)
    shape = x.m.shape
    log_i, log_f, m = log_i.reshape(shape), log_f.reshape(shape), np.asarray(x.m, np.float64)
    near = np.asarray(x.coarse[..., 1:] - x.coarse[..., :-1], np.float64)
    near += np.asarray((x.fine + x.query)[..., 1:] + (x.key - x.fine)[..., :-1], np.float64)
    expected = log_f[..., 1:] + log_i[..., :-1] - m[..., 1:]
    assert_log_weights_match(near, expected, "weights")


@both_flags
def test_suffix_sums_end_with_their_chunk_and_segment(rng, flags):
    raw = make_gates(flags)
    _, decays = raw.compute()
    terms = rng.standard_normal(decays.m.shape).astype(np.float32)
    leaving = rng.standard_normal(terms.shape[:3]).astype(np.float32)
    args = (jnp.asarray(terms), jnp.asarray(leaving), decays.segment, decays.gates.reset)
    actual = quick.jit(gates.suffix_sum)(*args)
    reset = exact(raw)[2].reshape(terms.shape)
    segment = np.cumsum(reset, axis=-1)
    expected = np.zeros(terms.shape)
    for index in np.ndindex(*terms.shape):
        *chunk, j = index
        chunk_terms, segments = terms[tuple(chunk)], segment[tuple(chunk)]
        suffix = (np.arange(CHUNK) >= j) & (segments == segments[j])
        total = chunk_terms[suffix].sum(dtype=np.float64)
        total += leaving[tuple(chunk)] * (segments[j] == segments[-1])
        expected[index] = 0 if reset[index] else total
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@both_flags
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_gradient_of_the_final_m_follows_the_maximum(rng, flags, shift):
    """With an initial m of 40 the path reaches it, unless a reset intervenes."""
    raw = make_gates(flags)
    raw = raw._replace(m=raw.m + np.float32(shift), f=raw.f + np.float32(2))
    if flags:
        raw.reset[1] = False
        # A path that ends at a reset: the gradient reaches its forget gate and stops.
        raw.i[0, 20:] -= 50
        raw.reset[0, 20:], raw.mask[0, 20] = False, True
        raw.reset[0, 20] = True
    _, x = raw.compute()
    log_i, log_f, reset = exact(raw)

    def last(log_i, log_f, m):
        for t in range(reset.shape[2]):
            m = jnp.where(reset[..., t], 0, m)
            m = jnp.maximum(log_f[..., t] + m, log_i[..., t])
        return m

    rho = rng.standard_normal(raw.m.shape).astype(np.float32)
    with jax.enable_x64(True):
        gradient = quick.jit(lambda rho, *args: jax.vjp(last, *args)[1](rho))
        expected = gradient(*map(jnp.float64, (rho, log_i, log_f, raw.m)))
        expected = [np.asarray(g) for g in expected]
    path = gates.stabilizer_path(x.gates, x.m, x.m_start)
    path = (a.reshape(*a.shape[:2], -1) for a in path)
    actual = quick.jit(gates.stabilizer_grads)(*path, jnp.asarray(rho))
    for name, a, b in zip(("log_i", "log_f", "m"), actual, expected, strict=True):
        np.testing.assert_array_equal(np.reshape(a, b.shape), b, err_msg=name)
    assert np.any(expected[2]) == (shift > 0)
