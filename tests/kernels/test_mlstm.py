"""What is particular to the mLSTM's TPU kernels: tiles, strips, what is kept and what it costs."""

import contextlib
import functools
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from pallas_kernels import common, tiles
from pallas_kernels.mlstm import backends, decode, gates, vjp
from pallas_kernels.mlstm.options import Options
from pallas_kernels.tiles import Tile
from tests import quick
from tests.kernels.calls import calls
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells
from xlstm_jax.cells.time import scan_time

# Interpreted kernels, two hundred of them: once is enough. Quick ones are among tests/ops.
pytestmark = pytest.mark.slow

LANES = 8
mlstm = functools.partial(vjp.mlstm, backends.tpu())
LEAVES = ("C", "n", "m")
INPUTS = ("q", "k", "v", "i", "f")


class Case(NamedTuple):
    q: Any
    k: Any
    v: Any
    i: Any
    f: Any
    state: tuple
    dh: Any
    dstate: tuple
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=29, H=2, K=6, V=10, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and a random loss on h and on every leaf of the last state, as stored."""
    rng = np.random.default_rng([seed, B, T, H, K, V])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    inputs = (normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V))
    gates = (scale * normal(B, T, H), scale * normal(B, T, H) + 3)
    state, dstate = (
        (normal(B, H, K, V), normal(B, H, K), normal(B, H)) for _ in ("state", "cotangents")
    )
    case = Case(*inputs, *gates, state, normal(B, T, H, V), dstate)
    if not flags:
        return case
    reset = rng.random((B, T)) < 4 / T
    return case._replace(reset=reset, mask=rng.random((B, T)) < 0.7)


def in_bfloat16(case: Case, dtype="float32") -> Case:
    """Inputs and the loss on h rounded to bfloat16, as arrays of `dtype`."""
    names = (*INPUTS, "dh")
    half = {name: jnp.asarray(getattr(case, name), jnp.bfloat16).astype(dtype) for name in names}
    return case._replace(**half)


def evaluate(function, case: Case) -> dict[str, jax.Array]:
    """h, the last state and all gradients, by name."""
    compute = functools.partial(function, reset=case.reset, mask=case.mask)
    (h, state), pull = jax.vjp(compute, *case[:6])
    *inputs, first = pull((case.dh, case.dstate))
    named = {"h": h, **dict(zip(LEAVES, state, strict=True))}
    named |= {f"d{name}": x for name, x in zip(INPUTS, inputs, strict=True)}
    return named | {f"d{name}": x for name, x in zip(LEAVES, first, strict=True)}


@contextlib.contextmanager
def traced(how=True, lanes=LANES, tile: Tile | None = None):
    """Kernels interpreted; `tile` in place of the one that a test's sizes would get."""
    patch = mock.patch.object(tiles, "mlstm", return_value=tile)
    with common.interpreted(how, lanes=lanes), patch if tile else contextlib.nullcontext():
        yield


@functools.cache
def _compiled(function, options: tuple, where: tuple = ()):
    """A program of a case; `where` says what it is traced in, as that is part of it, too."""
    del where
    return quick.jit(functools.partial(evaluate, functools.partial(function, **dict(options))))


def kernel(case: Case, *, how=True, lanes=LANES, tile=None, **options) -> dict[str, np.ndarray]:
    """By the kernels, interpreted; chunks of 8 where lanes are 8."""
    options.setdefault("chunk_size", LANES if lanes == LANES else None)
    compiled = _compiled(mlstm, tuple(sorted(options.items())), (how, lanes, tile))
    with traced(how, lanes, tile):
        return _wide(compiled(jax.tree.map(jnp.asarray, case)))


def truth(case: Case, function=None, **options) -> dict[str, np.ndarray]:
    """By the cell, or by a function of the same arguments, in float64."""
    compiled = _compiled(function or _by_the_cell, tuple(sorted(options.items())))
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return _wide(compiled(jax.tree.map(wide, case)))


def _by_the_cell(q, k, v, i, f, state, *, reset, mask, **options):
    state = cells.MLSTMState(*state)
    h, state = cells.mlstm_scan(q, k, v, i, f, state, reset=reset, mask=mask, **options)
    return h, tuple(state)


def _wide(results):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), results)


def assert_equal_results(actual, expected, row=TABLE["float32"]):
    """h, the state with the same log-scale, and all gradients agree."""
    assert_close(actual["h"], expected["h"], row.h, "h")
    for name in LEAVES:
        assert_close(actual[name], expected[name], row.state, name)
    gradients = [f"d{name}" for name in (*INPUTS, *LEAVES)]
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), row)


def equations(jaxpr, times: int = 1):
    """Every equation of a program with how often it runs, also inside of what it calls."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inside = times
        if eqn.primitive.name == "pallas_call":
            inside = times * math.prod(eqn.params["grid_mapping"].grid)
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, inside)


def run(case: Case, **options):
    """h and the last state of a case."""
    return mlstm(*case[:6], reset=case.reset, mask=case.mask, **options)


# Tiles and strips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [128, 256])
def test_tiles_of_real_width_equal_the_recurrence(chunk_size, dtype):
    """Two strips of 128 rows in a chunk of 256; 300 steps fill up three or two chunks."""
    case = in_bfloat16(make_case(B=1, T=300, K=64, V=128, flags=True))
    actual = kernel(in_bfloat16(case, dtype), lanes=128, chunk_size=chunk_size)
    assert_equal_results(actual, truth(case), TABLE[dtype])


TILES = [Tile(8, 8, 4), Tile(16, 16, 2), Tile(32, 8, 1), Tile(64, 32, 1)]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_strips_and_blocks_of_chunks_do_not_show(tile):
    case = make_case(T=64, flags=True)
    assert_equal_results(kernel(case, tile=tile), truth(case))


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["normalised", "plain"])
def test_strips_do_not_show_with_the_sigmoid_input_gate(options):
    case = make_case(T=64)
    options = {"input_gate": "sigmoid", **options}
    assert_equal_results(kernel(case, tile=Tile(16, 8, 2), **options), truth(case, **options))


@pytest.mark.parametrize("chunk_size", [8, 16, 32])
@pytest.mark.parametrize("where", ["random steps", "chunk starts", "chunk ends", "every step"])
def test_the_chunk_size_changes_nothing_wherever_resets_are(chunk_size, where):
    case = make_case(T=64, flags=True)
    steps = np.arange(64)
    pattern = {
        "random steps": case.reset,
        "chunk starts": steps % chunk_size == 0,
        "chunk ends": steps % chunk_size == chunk_size - 1,
        "every step": steps >= 0,
    }[where]
    case.reset[:] = pattern
    if where != "random steps":
        case.mask[:] |= pattern  # else masked resets are void
    assert_equal_results(kernel(case, chunk_size=chunk_size), truth(case))


@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_large_gates_in_long_chunks_equal_the_recurrence(scale):
    case = make_case(T=120, scale=scale, flags=True)
    actual = kernel(case, tile=Tile(64, 16, 2))
    assert_equal_results(actual, truth(case), TABLE["float32, large gates"])


def test_a_memory_of_tiny_scale_is_read_as_little_as_by_the_recurrence():
    """Log-scales around the lowest at which a memory is read, and nothing that is written."""
    case = make_case(T=64, flags=True)
    case.state[2][:] = [[-20.0, -25.0], [-22.0, -200.0]]
    case.i[:] -= 250
    case.reset[:] = False
    actual, expected = kernel(case), truth(case)
    assert np.abs(expected["h"]).max() < 1e-6
    assert_close(actual["h"], expected["h"], TABLE["float32"].h, "h")


# What the gradient takes for constant, and what is kept for it


def _constant_normaliser(q, k, v, i, f, state, *, reset, mask, eps=1e-6):
    """The recurrence; h is what is read over the true size of the normaliser, held constant."""

    def step(state, x):
        state, _ = cells.mlstm_step(state, *x)
        q, m = x[0] * x[0].shape[-1] ** -0.5, state.m
        found = jnp.einsum("BHK,BHKV->BHV", q, state.C)
        norm = jnp.maximum(jnp.abs(jnp.sum(q * state.n, axis=-1)), jnp.exp(-m)) + eps
        # Over e^m both change with m; it is their true sizes of which one is constant.
        scale = jnp.exp(m - jax.lax.stop_gradient(m)) / jax.lax.stop_gradient(norm)
        return state, found * scale[..., None]

    inputs = (q, k, v, i, f)
    h, state = scan_time(step, cells.MLSTMState(*state), inputs, reset=reset, mask=mask)
    return h, tuple(state)


def test_a_normaliser_without_gradient_is_a_constant():
    case = make_case(T=64, flags=True)
    constant = truth(case, _constant_normaliser)
    actual = kernel(case, normalizer_grad=False)
    assert_equal_results(actual, constant)
    # It matters: under this loss the whole gradient is another one.
    error = np.abs(actual["dq"] - truth(case)["dq"]).max()
    assert error > 0.1 * np.abs(constant["dq"]).max()


def test_states_saved_in_bfloat16_cost_gradients_their_digits_and_values_nothing():
    case = make_case(T=64, flags=True)
    expected, wide = truth(case), kernel(case)
    narrow = kernel(case, saved_dtype=jnp.dtype("bfloat16"))
    assert_equal_results(wide, expected)
    assert_equal_results(narrow, expected, TABLE["bfloat16"])
    for name in ("h", *LEAVES):
        np.testing.assert_array_equal(narrow[name], wide[name])
    for name in ("dq", "df"):
        errors = [np.abs(result[name] - expected[name]).max() for result in (wide, narrow)]
        assert errors[0] < 0.1 * errors[1]


def test_states_saved_in_float32_serve_inputs_of_bfloat16():
    case = in_bfloat16(make_case(T=64, flags=True))
    actual = kernel(in_bfloat16(case, "bfloat16"), saved_dtype=jnp.dtype("float32"))
    assert_equal_results(actual, truth(case), TABLE["bfloat16"])


def test_only_a_gradient_makes_the_forward_kernel_write_what_it_keeps():
    """h and the last memory; for a gradient the normaliser and the memories at chunk starts too."""
    case = jax.tree.map(jnp.asarray, make_case())
    (alone,) = calls(run, case)
    assert [v.aval.ndim for v in alone.outvars] == [3, 4, 4]
    forward, backward = calls(jax.grad(lambda c: run(c)[0].sum(), allow_int=True), case)
    assert [v.aval.ndim for v in forward.outvars] == [3, 4, 4, 4, 5, 5]
    assert forward.params["name"] == "mlstm_forward"
    assert backward.params["name"] == "mlstm_backward"


def test_what_remat_keeps_is_not_computed_again():
    case = jax.tree.map(jnp.asarray, make_case())
    names = ("mlstm_h", "mlstm_rows", "mlstm_states")

    def gradient(policy):
        again = jax.checkpoint(lambda c: run(c)[0], policy=policy)
        return jax.grad(lambda c: jnp.sum(again(c) * c.dh))

    policies = jax.checkpoint_policies
    kept = calls(gradient(policies.save_only_these_names(*names)), case)
    assert [call.params["name"] for call in kept] == ["mlstm_forward", "mlstm_backward"]
    assert len(calls(gradient(policies.nothing_saveable), case)) == 3


# One step


def make_step(dtype="float32", K=6, V=10) -> Case:
    """Rows: plain, reset, masked with NaN in it, memories of tiny scale, one of scale e^60."""
    case = in_bfloat16(make_case(B=5, T=1, H=3, K=K, V=V))
    case = jax.tree.map(np.array, case)
    case = case._replace(reset=np.zeros((5, 1), bool), mask=np.ones((5, 1), bool))
    case.reset[1:3] = True
    case.mask[2] = False
    for name in INPUTS:
        getattr(case, name)[2] = np.nan
    case.state[2][3:] = [[-200.0, -25.0, -22.0], [60.0] * 3]
    case.i[3] = -250.0
    return case._replace(**{name: jnp.asarray(getattr(case, name), dtype) for name in INPUTS})


def assert_step_equals_the_cell(case: Case, actual, **options):
    """h, C, n and m of one step; what is masked stays bit for bit."""
    dtype = str(case.q.dtype)
    wide = case._replace(**{name: np.asarray(getattr(case, name), "float32") for name in INPUTS})
    expected = truth(wide, **options)
    h, state = actual
    assert h.dtype == case.v.dtype
    for row, (found, right) in enumerate(zip(np.asarray(h, "float64"), expected["h"], strict=True)):
        assert_close(found, right, TABLE[dtype].h, f"h of row {row}", floor=1e-30)
    for name, leaf in zip(LEAVES, state, strict=True):
        assert leaf.dtype == jnp.float32
        assert_close(np.asarray(leaf), expected[name], TABLE["float32"].state, name)
    if case.mask is not None:
        asleep = ~case.mask[:, 0]
        assert not np.asarray(h, "float32")[asleep].any()
        for old, new in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(new[asleep], old[asleep])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_one_step_equals_the_cell(flags, dtype):
    case = make_step(dtype)
    if not flags:
        case = jax.tree.map(lambda x: x[:2], case)._replace(reset=None, mask=None)
    with traced():
        actual = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_step_equals_the_cell(case, actual)


@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.5}, {}], ids=str)
def test_one_step_with_the_sigmoid_input_gate_equals_the_cell(options):
    case = make_step()
    case = jax.tree.map(lambda x: x[:2], case._replace(mask=None))
    options = {"input_gate": "sigmoid", **options}
    with traced():
        actual = quick.jit(functools.partial(run, **options))(jax.tree.map(jnp.asarray, case))
    assert_step_equals_the_cell(case, actual, **options)


def test_a_memory_in_several_blocks_of_columns_equals_the_cell(monkeypatch):
    """V = 384 in three blocks of 128; h of each, and n once."""
    monkeypatch.setattr(decode, "BLOCK_BYTES", 4 * 8 * 128)
    case = make_step(K=8, V=384)
    (call,) = calls(run, jax.tree.map(jnp.asarray, case))
    assert call.params["grid_mapping"].grid == (5, 3, 3)
    with traced():
        actual = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_step_equals_the_cell(case, actual)


@pytest.mark.parametrize("K,V", [(8, 8), (256, 512), (512, 1024), (1280, 1280), (96, 100), (96, 7)])
def test_blocks_of_columns_divide_the_memory(K, V):
    case = make_case(B=1, T=1, H=1, K=K, V=V)
    (call,) = calls(run, jax.tree.map(jnp.asarray, case))
    columns = V // call.params["grid_mapping"].grid[2]
    assert V % columns == 0
    assert columns == V or columns % common.LANES == 0
    assert 4 * K * columns <= decode.BLOCK_BYTES


def test_one_step_writes_the_memory_in_place():
    """C and n go to the kernel with nothing but an axis added, and share their buffers with it."""
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    (call,) = calls(run, case)
    aliases = dict(call.params["input_output_aliases"])
    assert aliases == {4: 1, 5: 2}
    for given, returned in aliases.items():
        assert call.invars[given].aval == call.outvars[returned].aval
    assert [call.outvars[number].aval.shape for number in (1, 2)] == [(2, 2, 6, 10), (2, 2, 1, 6)]


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    names = lambda function: [call.params["name"] for call in calls(function, case)]  # noqa: E731
    assert names(run) == ["mlstm_decode"]
    gradient = jax.grad(lambda c: run(c)[0].sum())
    assert names(gradient) == ["mlstm_forward", "mlstm_backward"]


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_one_step_has_the_gradients_of_the_cell(flags):
    case = make_case(B=4, T=1)
    if flags:
        reset, mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)[..., None]
        case = case._replace(reset=reset, mask=mask)
    assert_equal_results(kernel(case), truth(case))


# Gates made ready for kernels


CHUNK = 8


class Gates(NamedTuple):
    """Raw gates `B T H`, flags `B T` or None, and the log-scale before the first step."""

    i: np.ndarray
    f: np.ndarray
    reset: np.ndarray | None
    mask: np.ndarray | None
    m: np.ndarray

    def ready(self, input_gate="exp", chunk=CHUNK) -> tuple[gates.LogGates, gates.Decays]:
        flags = (None if x is None else jnp.asarray(x) for x in (self.reset, self.mask))
        i, f, m = map(jnp.asarray, (self.i, self.f, self.m))
        logs = gates.log_gates(i, f, *flags, input_gate=input_gate)
        compute = functools.partial(gates.decays, chunk=chunk, max_state=input_gate == "exp")
        return logs, quick.jit(compute)(logs, m)


def make_gates(flags: bool, B=2, T=32, H=2, *, scale=2.0) -> Gates:
    case = make_case(B=B, T=T, H=H, scale=scale, flags=flags)
    return Gates(case.i, case.f, case.reset, case.mask, case.state[2])


both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])


def exact(raw: Gates, input_gate="exp"):
    """log i, log f and voided resets, `B H T`, in float64: by the definition, and by the cell."""
    i, f = (np.swapaxes(x, 1, 2).astype(np.float64) for x in (raw.i, raw.f))
    log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    log_i, log_f = i if input_gate == "exp" else log_sigmoid(i), log_sigmoid(f)
    asleep, reset = np.zeros(i.shape, bool), np.zeros(i.shape, bool)
    if raw.mask is not None:
        asleep |= ~raw.mask[:, None]
    if raw.reset is not None:
        reset |= raw.reset[:, None] & ~asleep
    return np.where(asleep, gates.NEG, log_i), np.where(asleep, 0, log_f), reset


def _nothing_to_neg(x: np.ndarray) -> np.ndarray:
    """Logs of weights that are no float32, all said the same way."""
    return np.where(x < -1e20, gates.NEG, x)


def assert_decays_equal(actual, expected, name, tolerance=1e-5):
    actual = _nothing_to_neg(np.asarray(actual, np.float64))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=name)


@both_flags
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_decays_are_sums_of_log_gates_up_to_a_reset(input_gate, flags):
    raw = make_gates(flags)
    _, x = raw.ready(input_gate)
    log_i, log_f, reset = exact(raw, input_gate)
    B, H, T = log_i.shape
    for b, h, chunk in np.ndindex(B, H, T // CHUNK):
        steps = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        add, keep, starts = (a[b, h, steps] for a in (log_i, log_f, reset))
        to_row = np.full(CHUNK, gates.NEG)
        weights = np.full((CHUNK, CHUNK), gates.NEG)
        for t in range(CHUNK):
            for s in range(t + 1):
                if not starts[s + 1 : t + 1].any():
                    weights[t, s] = keep[s + 1 : t + 1].sum() + add[s]
            if not starts[: t + 1].any():
                to_row[t] = keep[: t + 1].sum()
        here = (b, h, chunk)
        at = jax.tree.map(lambda a: np.asarray(a[here], np.float64), x)  # noqa: B023
        assert_decays_equal(at.to_row, to_row, "to_row")
        assert_decays_equal(at.across, to_row[-1], "across")
        assert_decays_equal(at.to_end, _nothing_to_neg(weights[-1]), "to_end")
        seen = np.tri(CHUNK, dtype=bool)
        if at.segment is not None:
            np.testing.assert_array_equal(at.segment, np.cumsum(starts))
            seen &= at.segment[:, None] == at.segment
        far = at.coarse[:, None] - at.coarse
        found = np.where(seen, far + at.fine[:, None] + (at.log_i - at.fine), gates.NEG)
        assert_decays_equal(found, _nothing_to_neg(weights), "weights")


@both_flags
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_m_is_that_of_the_recurrence(scale, flags):
    raw = make_gates(flags, scale=scale)
    _, x = raw.ready()
    log_i, log_f, reset = exact(raw)
    m, found = raw.m.astype(np.float64), []
    for t in range(log_i.shape[2]):
        m = np.maximum(log_f[..., t] + np.where(reset[..., t], 0, m), log_i[..., t])
        found.append(m)
    expected = np.stack(found, axis=-1).reshape(x.m.shape)
    np.testing.assert_allclose(x.m, expected, rtol=1e-6, atol=1e-5 * scale)
    np.testing.assert_allclose(x.m_end, expected[..., -1], rtol=1e-6, atol=1e-5 * scale)
    starts = np.concatenate([raw.m[..., None], expected[:, :, :-1, -1]], axis=-1)
    np.testing.assert_allclose(x.m_start, starts, rtol=1e-6, atol=1e-5 * scale)


@both_flags
def test_m_is_zero_with_the_sigmoid_input_gate(flags):
    _, x = make_gates(flags)._replace(m=np.zeros((2, 2), np.float32)).ready("sigmoid")
    assert not any(np.any(leaf) for leaf in (x.m, x.m_start, x.m_end))


def test_differences_of_large_sums_keep_their_digits():
    """Sums of 256 log gates near -40, thousands in all: neighbours' weights to 1e-5.

    In one part float32 would say them to 5e-4.
    """
    raw = make_gates(False, T=256, scale=0.3)
    raw = raw._replace(f=(raw.f - 43).astype(np.float32))
    _, x = raw.ready(chunk=256)
    log_i, log_f, _ = exact(raw)
    coarse, fine, source = (np.asarray(a)[:, :, 0] for a in (x.coarse, x.fine, x.log_i - x.fine))
    assert coarse.min() < -9000
    near = fine[..., 1:] + source[..., :-1]
    found = (coarse[..., 1:] - coarse[..., :-1]) + near
    expected = log_f[..., 1:] + log_i[..., :-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    one_part = np.cumsum(np.float32(log_f), axis=-1, dtype=np.float32)
    error = (one_part[..., 1:] - one_part[..., :-1]) + np.float32(log_i)[..., :-1] - expected
    assert np.abs(error).max() > 1e-4


@both_flags
def test_a_suffix_sum_ends_with_its_chunk_and_segment(rng, flags):
    raw = make_gates(flags)
    logs, decays = raw.ready()
    terms = rng.standard_normal(decays.m.shape).astype(np.float32)
    leaving = rng.standard_normal(terms.shape[:3]).astype(np.float32)
    args = (jnp.asarray(terms), jnp.asarray(leaving), decays.segment, logs.reset)
    found = quick.jit(gates.suffix_sum)(*args)
    reset = exact(raw)[2].reshape(terms.shape)
    segment = np.cumsum(reset, axis=-1)
    expected = np.zeros(terms.shape)
    for index in np.ndindex(*terms.shape):
        *here, j = index
        row, mine = terms[tuple(here)], segment[tuple(here)]
        same = (np.arange(CHUNK) >= j) & (mine == mine[j])
        total = row[same].sum(dtype=np.float64) + leaving[tuple(here)] * (mine[j] == mine[-1])
        expected[index] = 0 if reset[index] else total
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@both_flags
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_the_last_m_passes_its_gradient_back_along_the_maximum(rng, flags, shift):
    """With a first m of e^40 the path reaches it, where no reset lies between."""
    raw = make_gates(flags)
    raw = raw._replace(m=raw.m + np.float32(shift), f=raw.f + np.float32(2))
    if flags:
        raw.reset[1] = False
        # A path that ends at a reset: it passes the forget gate there and goes no further.
        raw.i[0, 20:] -= 50
        raw.reset[0, 20:], raw.mask[0, 20] = False, True
        raw.reset[0, 20] = True
    _, x = raw.ready()
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
    found = quick.jit(gates.scale_grads)(x, jnp.asarray(rho))
    for name, a, b in zip(("log_i", "log_f", "m"), found, expected, strict=True):
        np.testing.assert_array_equal(np.reshape(a, b.shape), b, err_msg=name)
    assert np.any(expected[2]) == (shift > 0)


# Costs


def products(jaxpr) -> int:
    """Operations of all matrix products, counted from their shapes."""

    def operations(eqn):
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * depth * math.prod(eqn.outvars[0].aval.shape)

    found = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "dot_general"]
    return sum(times * operations(eqn) for eqn, times in found)


def exponentials(jaxpr) -> int:
    found = [(e, n) for e, n in equations(jaxpr) if e.primitive.name == "exp"]
    return sum(times * math.prod(eqn.outvars[0].aval.shape) for eqn, times in found)


def traffic(call) -> int:
    """Bytes of everything that a kernel reads and writes, once each."""
    arrays = [v.aval for v in (*call.invars, *call.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def grid_of(call) -> int:
    return math.prod(call.params["grid_mapping"].grid)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [128, 256, 512])
def test_costs_are_those_of_the_products_exponentials_and_arrays(chunk_size, dtype):
    """Within 2 %: sums over single rows are left out."""
    case = in_bfloat16(make_case(B=2, T=1024, K=128, V=256), dtype)
    case = jax.tree.map(jnp.asarray, case)
    function = functools.partial(run, chunk_size=chunk_size)
    found = calls(jax.grad(lambda c: function(c)[0].sum()), case, lanes=128)
    found += calls(function, case, lanes=128)
    assert [call.params["name"][6:] for call in found] == ["forward", "backward", "forward"]
    for call in found:
        cost = call.params["cost_estimate"]
        body, times = call.params["jaxpr"], grid_of(call)
        assert cost.flops == pytest.approx(times * products(body), rel=0.02)
        assert cost.transcendentals == times * exponentials(body)
        assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.02)


def test_the_cost_of_one_step_is_five_operations_per_element_of_the_memory():
    """kept * C + key * v, and the sum of query * C."""
    K, V = 64, 256
    case = jax.tree.map(jnp.asarray, make_case(T=1, K=K, V=V))
    (call,) = calls(run, case, lanes=128)

    def touches_the_memory(eqn):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        return eqn.primitive.name in ("mul", "add", "reduce_sum") and (K, V) in shapes

    count = sum(times for e, times in equations(call.params["jaxpr"]) if touches_the_memory(e))
    cost = call.params["cost_estimate"]
    assert cost.flops == grid_of(call) * count * K * V
    assert cost.bytes_accessed == pytest.approx(traffic(call), rel=0.07)  # factors are left out


# Memory that is not there, and races


STRICT = {
    "nan": pltpu.InterpretParams(uninitialized_memory="nan"),
    "races": pltpu.InterpretParams(detect_races=True, random_seed=7),
}


@pytest.mark.parametrize("how", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("tile", [Tile(16, 8, 2), Tile(8, 8, 1)], ids=["16-8-2", "8-8-1"])
def test_no_memory_is_read_before_it_is_written_nor_twice_at_once(tile, flags, how, capfd):
    case = make_case(T=61 if tile.chunk > 8 else 21, flags=flags)
    assert_equal_results(kernel(case, how=how, tile=tile), truth(case))
    with traced(how, tile=tile):
        h, _ = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_close(np.asarray(h), truth(case)["h"], TABLE["float32"].h, "h")
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("how", STRICT.values(), ids=STRICT)
def test_one_step_reads_no_memory_before_it_is_written_nor_twice_at_once(how, monkeypatch, capfd):
    monkeypatch.setattr(decode, "BLOCK_BYTES", 4 * 8 * 128)
    case = make_step(K=8, V=256)
    with traced(how):
        actual = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_step_equals_the_cell(case, actual)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "chunk,advice", [(512, "chunk_size=256"), (384, "chunk_size=128"), (128, "use more heads")]
)
def test_the_advice_for_an_overflow_is_a_chunk_that_is_allowed(chunk, advice):
    tile, dtype = Tile(chunk, 128, 1), jnp.dtype("bfloat16")
    options = Options(backends.tpu(), tile, True, True, 1e-6, True, False, dtype, 128, False)
    assert advice in options.metadata()["if_vmem_overflows"]


@pytest.mark.parametrize("what", ["gate", "normaliser", "dtypes"])
def test_what_the_op_would_refuse_the_kernel_refuses_too(what):
    case = jax.tree.map(jnp.asarray, make_case())
    options = {"gate": {"input_gate": "relu"}, "normaliser": {"normalize": False}}.get(what, {})
    args = list(case[:6])
    if what == "dtypes":
        args[0] = args[0].astype(jnp.bfloat16)
    with common.interpreted(lanes=LANES), pytest.raises(ValueError, match="must|needs"):
        mlstm(*args, **options)
